"""The kernels as functions on tensors: direct where no gradient is wanted, through autograd where one is.

Every function takes any tensor. Where the kernel does not apply (another dtype, another device) or is known to be slower at that
size, torch computes the same formula. Nothing here writes its inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from ._ops import NAMESPACE, ops

_rms_norm, _rms_norm_backward = ops.rms_norm.default, ops.rms_norm_backward.default
_layer_norm, _layer_norm_backward = ops.layer_norm.default, ops.layer_norm_backward.default
_act, _act_backward = ops.act.default, ops.act_backward.default
_act_mul, _act_mul_backward = ops.act_mul.default, ops.act_mul_backward.default
_rotary = ops.rotary.default

_DTYPES = (torch.float32, torch.bfloat16)
_ACT = {name: number for number, name in enumerate(reference.ACTS)}
_grad = torch.is_grad_enabled


def rms_norm(x: Tensor, weight: Tensor, eps: float, centered: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w`, or `* (1 + w)` where `centered`.

    Shapes: x (..., N), weight (N,), returns (..., N), contiguous. float32 and bfloat16, sums in float32, rounded once.
    Memory: reads x once, writes y once.
    """
    dtype = x.dtype
    if dtype is not weight.dtype or dtype not in _DTYPES or not x.is_cpu:
        return reference.rms_norm(x, weight, eps, centered)
    if _grad() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, centered)
    return _rms_norm(x, weight, eps, centered)


def act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`, act one of `silu gelu gelu_tanh gelu_quick`.

    Shapes: gate, up and the result (...), one shape. The product is rounded once. Memory: reads both once, writes once.
    """
    dtype = gate.dtype
    if dtype is not up.dtype or dtype not in _DTYPES or not gate.is_cpu or gate.shape != up.shape:
        return reference.act_mul(gate, up, act)
    if _grad() and (gate.requires_grad or up.requires_grad):
        return _ActMul.apply(gate, up, _ACT[act])
    return _act_mul(gate, up, _ACT[act])


def act(x: Tensor, act: str) -> Tensor:
    """`act(x)`, act one of `silu gelu gelu_tanh gelu_quick`. Shapes: x and the result (...)."""
    if x.dtype not in _DTYPES or not x.is_cpu:
        return reference.ACTS[act](x)
    if _grad() and x.requires_grad:
        return _Act.apply(x, _ACT[act])
    return _act(x, _ACT[act])


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * w + b` over the last dimension. Shapes: x (..., N), weight and bias (N,) or None."""
    dtype = x.dtype
    if dtype not in _DTYPES or not x.is_cpu or any(t is not None and t.dtype is not dtype for t in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    w = x.new_empty(0) if weight is None else weight
    b = x.new_empty(0) if bias is None else bias
    if _grad() and (x.requires_grad or w.requires_grad or b.requires_grad):
        return _LayerNorm.apply(x, w, b, eps)
    return _layer_norm(x, w, b, eps)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k, half-split; see `reference.rotary` for formula and shapes.

    The results are dense, in the order of memory that q and k have. Gradients flow to q and k; cos and sin that want one are
    served by torch.
    """
    dtype = q.dtype
    if (
        dtype not in _DTYPES
        or not (dtype is k.dtype is cos.dtype is sin.dtype)
        or not q.is_cpu
        or q.dim() != 4
        or cos.dim() != 3
        or unsqueeze_dim not in (1, 2)
    ):
        return reference.rotary(q, k, cos, sin, unsqueeze_dim)
    if _grad():
        if cos.requires_grad or sin.requires_grad:
            return reference.rotary(q, k, cos, sin, unsqueeze_dim)
        if q.requires_grad or k.requires_grad:
            return _Rotary.apply(q, k, cos, sin, 3 - unsqueeze_dim)
    return _rotary(q, k, cos, sin, 3 - unsqueeze_dim, False)


# -- gradients ----------------------------------------------------------------------------------------------------
# Statistics of a row are recomputed in the backward pass: it reads the row anyway, and saving them would cost every forward.


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float, centered: bool) -> Tensor:
        return _rms_norm(x, weight, eps, centered)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps, ctx.centered = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        weight_too = ctx.needs_input_grad[1]
        dx, dw = _rms_norm_backward(grad, x, weight, ctx.eps, ctx.centered, weight_too)
        return dx, dw if weight_too else None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return _layer_norm(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, weight_too, bias_too, _ = ctx.needs_input_grad
        dx, dw, db = _layer_norm_backward(grad, x, weight, ctx.eps, weight_too, bias_too)
        return dx, dw if weight_too else None, db if bias_too else None, None


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, act: int) -> Tensor:
        return _act(x, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.act = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _act_backward(grad, *ctx.saved_tensors, ctx.act), None


class _ActMul(torch.autograd.Function):
    @staticmethod
    def forward(gate: Tensor, up: Tensor, act: int) -> Tensor:
        return _act_mul(gate, up, act)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.act = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_gate, d_up = _act_mul_backward(grad, *ctx.saved_tensors, ctx.act)
        return d_gate, d_up, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_dim: int) -> tuple[Tensor, Tensor]:
        return _rotary(q, k, cos, sin, token_dim, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, _, cos, sin, ctx.token_dim = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        return *_rotary(dq, dk, *ctx.saved_tensors, ctx.token_dim, True), None, None, None


# -- shapes, for tracing ------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # noqa: TOR901  # lives as long as this module


def _dense(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _dense_as(x: Tensor) -> Tensor:
    b, m, n, d = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((b, n, m, d)).transpose(1, 2)
    return x.new_empty((b, m, n, d))


_FAKE = {
    "rms_norm": lambda x, weight, eps, centered: _dense(x),
    "rms_norm_backward": lambda grad, x, weight, eps, centered, weight_too: (
        _dense(x),
        x.new_empty(x.shape[-1] if weight_too else 0),
    ),
    "layer_norm": lambda x, weight, bias, eps: _dense(x),
    "layer_norm_backward": lambda grad, x, weight, eps, weight_too, bias_too: (
        _dense(x),
        x.new_empty(x.shape[-1] if weight_too else 0),
        x.new_empty(x.shape[-1] if bias_too else 0),
    ),
    "act": lambda x, act: _dense(x),
    "act_backward": lambda grad, x, act: _dense(x),
    "act_mul": lambda gate, up, act: _dense(gate),
    "act_mul_backward": lambda grad, gate, up, act: (_dense(gate), _dense(up)),
    "rotary": lambda q, k, cos, sin, token_dim, inverse: (_dense_as(q), _dense_as(k)),
}
for _name, _fake in _FAKE.items():
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=_library)
