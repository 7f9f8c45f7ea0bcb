"""Transformer layers on NVIDIA GPUs, in Triton. Each class stands in for a module's forward; the module keeps its state."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _every

from .gated_norm import formula_ungated, known, rms_norm_gated
from .glu import act_mul
from .layer_norm import layer_norm
from .projections import few, gate_up, project
from .rms_norm import add_rms_norm, rms_norm
from .rope import HALVES_NARROW, PAIRS, PAIRS_TO_HALVES, PAIRS_WIDE, norm_rope, rope


class RMSNorm(nn.Module):
    """Llama's RMSNorm. Reads `weight` (N,) and `variance_epsilon` or `eps`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., N)."""
        try:
            eps = self.variance_epsilon
        except AttributeError:
            eps = self.eps
        return rms_norm(hidden_states, self.weight, eps)


class RMSNormZeroCentered(nn.Module):
    """Gemma's RMSNorm: scale is 1 + weight, product in float32. Reads `weight` (N,) and `eps` or `variance_epsilon`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N) -> (..., N)."""
        try:
            eps = self.eps
        except AttributeError:
            eps = self.variance_epsilon
        return rms_norm(x, self.weight, eps, 1)


class RMSNormGated(nn.Module):
    """norm(x) * weight * act(gate): Qwen3-Next's and Kimi's. Reads `weight` (N,), `variance_epsilon` or `eps`, `activation`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """hidden_states, gate (..., N) -> (..., N)."""
        return _gated(self, hidden_states, gate, known(self.activation), 1, before=False)


class RMSNormGateFirst(nn.Module):
    """norm(x * silu(gate)) * weight by groups: Mamba-2's. Reads `weight` (N,), `variance_epsilon` or `eps`, `group_size`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """hidden_states, gate (..., N) -> (..., N)."""
        return _gated(self, hidden_states, gate, "silu", self.weight.shape[0] // self.group_size, before=True)


class RMSNormGatedGroups(nn.Module):
    """Either of the two by groups, with silu: FalconH1's. Reads `n_groups` and `norm_before_gate` besides weight and eps."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """hidden_states, gate (..., N) -> (..., N)."""
        return _gated(self, hidden_states, gate, "silu", self.n_groups, before=not self.norm_before_gate)


def _gated(norm: nn.Module, x: Tensor, gate: Tensor | None, act: str, groups: int, *, before: bool) -> Tensor:
    try:
        eps = norm.variance_epsilon
    except AttributeError:
        eps = norm.eps
    if gate is None:
        return formula_ungated(x, norm.weight, eps, groups)
    return rms_norm_gated(x, gate, norm.weight, eps, act, groups, before=before)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last dimension. Reads `weight`, `bias` (either may be None), `eps`, `normalized_shape`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, input: Tensor) -> Tensor:
        """input (..., N) -> (..., N)."""
        if len(self.normalized_shape) != 1:
            return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return layer_norm(input, self.weight, self.bias, self.eps)


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Calls `gate_proj`, `up_proj`, `down_proj`: whatever replaced them stays in effect."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), "silu"))


class GeGLUMLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)): Gemma's MLP. Calls `gate_proj`, `up_proj`, `down_proj`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), "gelu_tanh"))


class SwiGLUMLPFused(nn.Module):
    """`SwiGLUMLP`; of few rows and without gradients, all before `down_proj` is one launch that reads the weights itself.

    Reads `gate_proj` and `up_proj`, where these are `nn.Linear` and calling them would do nothing else; calls them else.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(_gate_up(self, x, "silu"))


class GeGLUMLPFused(nn.Module):
    """The same of `GeGLUMLP`, with tanh-GELU."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(_gate_up(self, x, "gelu_tanh"))


class GeGLUErfMLPFused(nn.Module):
    """The same with GELU proper, by the error function."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(_gate_up(self, x, "gelu"))


def _gate_up(mlp: nn.Module, x: Tensor, act: str) -> Tensor:
    gate, up = mlp.gate_proj, mlp.up_proj
    if not torch.compiler.is_compiling() and few(x) and _idle(gate) and _idle(up):
        g, u = gate._parameters, up._parameters
        y = gate_up(x, g["weight"], u["weight"], g["bias"], u["bias"], act)
        if y is not None:
            return y
    return act_mul(gate(x), up(x), act)


def _idle(linear: nn.Module) -> bool:
    """Whether calling it is a product with its weight and nothing else."""
    held = linear.__dict__
    return type(linear) is nn.Linear and not (
        "forward" in held
        or held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or _every._global_forward_hooks
        or _every._global_forward_pre_hooks
        or _every._global_backward_hooks
        or _every._global_backward_pre_hooks
    )


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q (B, HQ, S, D), k (B, HK, S, D), cos and sin (B or 1, S, R) -> rotated q and k, in new memory; by halves of R.

    What lies beyond R is passed through. Other places of tokens and heads as in `rope`.
    """
    return rope(q, k, cos, sin, unsqueeze_dim)


def apply_rotary_pos_emb_part(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same, contiguous also where R is D: GPT-NeoX's, Phi's, GLM-4's, which put what they rotate and the rest together."""
    a, b = rope(q, k, cos, sin, unsqueeze_dim)
    return a.contiguous(), b.contiguous()


def apply_rotary_pos_emb_pairs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The same with pairs of neighbours, the i-th of which turns by the i-th cos: GLM's, Ernie's, Helium's."""
    return rope(q, k, cos, sin, unsqueeze_dim, PAIRS)


def apply_rotary_pos_emb_pairs_wide(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """The same with pairs of neighbours, each element with its own cos: Cohere's."""
    return rope(q, k, cos, sin, unsqueeze_dim, PAIRS_WIDE)


def apply_rotary_pos_emb_halves_narrow(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """By halves, with cos and sin (B or 1, S, R / 2): GPT-OSS's."""
    return rope(q, k, cos, sin, unsqueeze_dim, HALVES_NARROW)


def apply_rotary_pos_emb_interleave(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1  # noqa: ARG001 -- the original's
) -> tuple[Tensor, Tensor]:
    """Pairs of neighbours, which come to lie in halves: DeepSeek-V3's. `position_ids` is ignored, as the original does."""
    return rope(q, k, cos, sin, unsqueeze_dim, PAIRS_TO_HALVES)


# -- in the place of statements: given the norms that these call, whose weights and eps they read ---------------------------


def residual_norm(norm: nn.Module, residual: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`s = residual + hidden`, (..., N) both; returns Llama's RMSNorm of s, and s. `norm` as `RMSNorm` reads it."""
    s, y = add_rms_norm(residual, hidden, norm._parameters["weight"], _eps(norm))
    return y, s


def residual_norm_zero_centered(norm: nn.Module, residual: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same with Gemma's RMSNorm."""
    s, y = add_rms_norm(residual, hidden, norm._parameters["weight"], _eps(norm), 1)
    return y, s


def norm_rotary(
    q_norm: nn.Module, k_norm: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Llama's RMSNorm of every head of q (B, HQ, S, D) and k (B, HK, S, D), then rotated by cos and sin (B or 1, S, D)."""
    return _norm_rotary(q_norm, k_norm, q, k, cos, sin, 0)


def norm_rotary_zero_centered(
    q_norm: nn.Module, k_norm: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with Gemma's RMSNorm."""
    return _norm_rotary(q_norm, k_norm, q, k, cos, sin, 1)


def _norm_rotary(
    q_norm: nn.Module, k_norm: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, offset: int
) -> tuple[Tensor, Tensor]:
    v, w, eps, other = q_norm._parameters["weight"], k_norm._parameters["weight"], _eps(q_norm), _eps(k_norm)
    if eps != other:
        return rope(rms_norm(q, v, eps, offset), rms_norm(k, w, other, offset), cos, sin)
    return norm_rope(q, k, v, w, cos, sin, eps, 1, offset)


def projections(
    q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Three `nn.Linear` of hidden (..., K): (..., N_i) each. Of few rows one launch; else each is called. No gradients.

    Whoever calls this has asked whether they are `nn.Linear` and calling them would do nothing else.
    """
    if few(hidden):
        q, k, v = q_proj._parameters, k_proj._parameters, v_proj._parameters
        found = project(hidden, (q["weight"], k["weight"], v["weight"]), (q["bias"], k["bias"], v["bias"]))
        if found is not None:
            return found
    return q_proj(hidden), k_proj(hidden), v_proj(hidden)


projections.can_torch_compile = True  # type: ignore[attr-defined]  # the layer contract's marks; traced, the modules are called
projections.has_backward = False  # type: ignore[attr-defined]


def _eps(norm: nn.Module) -> float:
    held = norm.__dict__  # an attribute that a module lacks costs it a microsecond
    return held["variance_epsilon"] if "variance_epsilon" in held else held["eps"]  # type: ignore[no-any-return]  # a float


for _function in (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_part,
    apply_rotary_pos_emb_pairs,
    apply_rotary_pos_emb_pairs_wide,
    apply_rotary_pos_emb_halves_narrow,
    apply_rotary_pos_emb_interleave,
    residual_norm,
    residual_norm_zero_centered,
    norm_rotary,
    norm_rotary_zero_centered,
):
    _function.can_torch_compile = True  # type: ignore[attr-defined]  # the layer contract's marks, on a function
    _function.has_backward = True  # type: ignore[attr-defined]
