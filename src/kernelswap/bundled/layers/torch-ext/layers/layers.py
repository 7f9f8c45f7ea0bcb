"""What stands in for a module's forward. Each class takes its state from the module it serves and has none of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functional import (
    GELU_LARGE,
    GELU_UPTO,
    MIN_GELU_TANH,
    MIN_SILU,
    act,
    act_mul,
    add_rms_norm,
    layer_norm,
    rms_norm,
    rotary,
)

_gelu = nn.functional.gelu
_silu = torch._C._nn.silu  # noqa: SLF001  # what torch.nn.functional.silu calls, without the Python that asking its size costs


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * w`: Llama's RMSNorm and its like. Reads `weight` (N,), `variance_epsilon` or `eps`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., N)."""
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        if eps is None:  # torch.nn.RMSNorm's default: an epsilon of the dtype's
            return nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], self.weight)
        return rms_norm(hidden_states, self.weight, eps)


class RMSNormZeroCentered(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (1 + w)`: Gemma's RMSNorm. Reads `weight` (N,), `eps` or `variance_epsilon`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., N) -> (..., N)."""
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return rms_norm(x, self.weight, eps, centered=True)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last dimension. Reads `weight`, `bias` (either may be None), `eps`, `normalized_shape`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (..., N) -> (..., N)."""
        if len(self.normalized_shape) != 1:
            return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return layer_norm(input, self.weight, self.bias, self.eps)


class SwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`. Calls `gate_proj`, `up_proj`, `down_proj`, so that whatever replaced them stays in effect."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., hidden) -> (..., hidden)."""
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), "silu"))


class GeGLUMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))`: Gemma's MLP. Calls `gate_proj`, `up_proj`, `down_proj`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., hidden) -> (..., hidden)."""
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), "gelu_tanh"))


class GEGLU(nn.Module):
    """`h * gelu(g)` with `h, g` the halves of `proj(x)`: diffusers' GEGLU. Calls `proj`; the halves are read where they lie."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:  # noqa: ARG002  # the original's
        """hidden_states (..., N) -> (..., width of `proj` / 2). Further arguments are ignored, as the original does."""
        half, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return act_mul(gate, half, "gelu")


class SwiGLU(nn.Module):
    """`h * silu(g)` with `h, g` the halves of `proj(x)`: diffusers' SwiGLU. Calls `proj`; the halves are read where they lie."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., width of `proj` / 2)."""
        half, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return act_mul(gate, half, "silu")


class LinearGELU(nn.Module):
    """`gelu(proj(x))`, with tanh where `approximate` says so: diffusers' GELU."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., width of `proj`)."""
        return (GELUTanh if self.approximate == "tanh" else GELU).forward(self, self.proj(hidden_states))


class LinearQuickGELU(nn.Module):
    """`h * sigmoid(1.702 h)` with `h = proj(x)`: diffusers' ApproximateGELU."""

    has_backward = True
    can_torch_compile = True

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., N) -> (..., width of `proj`)."""
        return act(self.proj(x), "gelu_quick")


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`q` (B, HQ, T, D), k (B, HK, T, D), cos and sin (B or 1, T, R) -> rotated q and k, in new memory.

    With `unsqueeze_dim` 2, q and k are (B, T, H, D). Dimensions from R on are passed through.
    """
    return rotary(q, k, cos, sin, unsqueeze_dim)


apply_rotary_pos_emb.has_backward = True
apply_rotary_pos_emb.can_torch_compile = True


class SiLU(nn.Module):
    """`x * sigmoid(x)`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (...) -> (...)."""
        if input.numel() < MIN_SILU:
            return _silu(input)
        return act(input, "silu")


class GELU(nn.Module):
    """`x * Phi(x)`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (...) -> (...)."""
        n = input.numel()
        if n == 1 or GELU_UPTO.get(input.dtype, 0) < n < GELU_LARGE:
            return _gelu(input)
        return act(input, "gelu")


class GELUTanh(nn.Module):
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`, which torch has as one operator."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (...) -> (...)."""
        if input.numel() < MIN_GELU_TANH:
            return _gelu(input, approximate="tanh")
        return act(input, "gelu_tanh")


class NewGELU(nn.Module):
    """`GELUTanh`, whose original is spelled out in eight operators."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (...) -> (...)."""
        return act(input, "gelu_tanh")


class FastGELU(nn.Module):
    """`GELUTanh` in another order of operations."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (...) -> (...)."""
        return act(input, "gelu_tanh")


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (...) -> (...)."""
        return act(input, "gelu_quick")


# -- in the place of statements: given the norms that these call, whose weights and eps they read -------------------


def residual_norm(norm: nn.Module, residual: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`s = residual + hidden`, both (..., N); returns Llama's RMSNorm of s, and s. `norm` is as `RMSNorm` reads it."""
    s, y = add_rms_norm(residual, hidden, norm.weight, _eps(norm))
    return y, s


def residual_norm_zero_centered(norm: nn.Module, residual: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same with Gemma's RMSNorm."""
    s, y = add_rms_norm(residual, hidden, norm.weight, _eps(norm), centered=True)
    return y, s


def norm_rotary(q_norm: nn.Module, k_norm: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's RMSNorm of every head of q (B, HQ, T, D) and k (B, HK, T, D), then rotated by cos and sin (B or 1, T, R)."""
    return _norm_rotary(q_norm, k_norm, q, k, cos, sin, centered=False)


def norm_rotary_zero_centered(
    q_norm: nn.Module, k_norm: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with Gemma's RMSNorm."""
    return _norm_rotary(q_norm, k_norm, q, k, cos, sin, centered=True)


def _norm_rotary(
    q_norm: nn.Module, k_norm: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, centered: bool
) -> tuple[Tensor, Tensor]:
    q, k = (_heads(x, norm, centered=centered) for x, norm in ((q, q_norm), (k, k_norm)))
    return rotary(q, k, cos, sin)


def _heads(x: Tensor, norm: nn.Module, *, centered: bool) -> Tensor:
    """RMSNorm of x (B, H, T, D) in the order of its memory: as projections leave it, heads lie inside of tokens."""
    inside = x.stride(1) < x.stride(2)
    y = rms_norm(x.transpose(1, 2) if inside else x, norm.weight, _eps(norm), centered=centered)
    return y.transpose(1, 2) if inside else y


def _eps(norm: nn.Module) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


for _function in (residual_norm, residual_norm_zero_centered, norm_rotary, norm_rotary_zero_centered):
    _function.has_backward = True
    _function.can_torch_compile = True
