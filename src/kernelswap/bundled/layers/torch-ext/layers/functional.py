"""The kernels as functions on tensors: direct where no gradient is wanted, through autograd where one is.

Every function takes any tensor. Where the kernel does not apply (another dtype, another device) or is known to be slower at that
size, torch computes the same formula. Nothing here writes its inputs.
"""

# ruff: noqa: ARG005, FBT001 -- signatures are those of torch.autograd.Function and of the operators

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._ops import NAMESPACE, ops

_rms_norm, _rms_norm_backward = ops.rms_norm.default, ops.rms_norm_backward.default
_add_rms_norm = ops.add_rms_norm.default
_layer_norm, _layer_norm_backward = ops.layer_norm.default, ops.layer_norm_backward.default
_act, _act_backward = ops.act.default, ops.act_backward.default
_act_mul, _act_mul_backward = ops.act_mul.default, ops.act_mul_backward.default
_rotary = ops.rotary.default

_DTYPES = (torch.float32, torch.bfloat16)
_ACT = {name: number for number, name in enumerate(reference.ACTS)}
_FORMULAS = tuple(reference.ACTS.values())

# Numbers of elements from which a kernel wins over torch's operators, from benchmarks/LOG.md. RMSNorm and rotary win at one row.
MIN_RECORDED, MIN_RECORDED_LONE = 16384, 65536  # a Python function costs autograd 10 us more than an operator; lone: one operator
MIN_SILU, MIN_GELU_TANH = 8192, 1024
_WIDE = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
# erf-GELU is oneDNN's where oneDNN has the dtype: it starts slowly, except for one element, and is not caught from GELU_UPTO on;
# results above GELU_LARGE are fresh memory, in which huge pages make up for it where vectors are wide.
GELU_UPTO = {torch.float32: 16384 if _WIDE else 4096, torch.bfloat16: 16384 if _WIDE else 0}
GELU_LARGE = 16 << 20 if _WIDE else 1 << 62

_recording = torch.is_grad_enabled
_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)  # noqa: SLF001  # torch.func has no public word for it


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w`, or `* (1 + w)` where `centered`.

    Shapes: x (..., N), weight (N,), returns (..., N), contiguous. float32 and bfloat16, sums in float32, rounded once.
    Memory: reads x once, writes y once.
    """
    if x.dtype is not weight.dtype or not _served(x):
        return reference.rms_norm(x, weight, eps, centered=centered)
    if _recording() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, centered)
    return _rms_norm(x, weight, eps, centered)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> tuple[Tensor, Tensor]:
    """`s = x + delta`, rounded as torch rounds it, and `rms_norm(s)`, in one pass.

    Shapes: x, delta (..., N), weight (N,), returns s and y (..., N), contiguous. float32 and bfloat16.
    Memory: reads x and delta once, writes s and y once.
    """
    if not (x.dtype is delta.dtype is weight.dtype) or x.shape != delta.shape or not _served(x):
        return reference.add_rms_norm(x, delta, weight, eps, centered=centered)
    if _recording() and (x.requires_grad or delta.requires_grad or weight.requires_grad):
        return _AddRMSNorm.apply(x, delta, weight, eps, centered)
    return _add_rms_norm(x, delta, weight, eps, centered)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * w + b` over the last dimension. Shapes: x (..., N), weight and bias (N,) or None."""
    dtype = x.dtype
    w = x.new_empty(0) if weight is None else weight
    b = x.new_empty(0) if bias is None else bias
    if w.dtype is not dtype or b.dtype is not dtype or not _served(x):
        return reference.layer_norm(x, weight, bias, eps)
    if _recording() and (x.requires_grad or w.requires_grad or b.requires_grad):
        if x.numel() < MIN_RECORDED_LONE:
            return reference.layer_norm(x, weight, bias, eps)
        return _LayerNorm.apply(x, w, b, eps)
    return _layer_norm(x, w, b, eps)


def act(x: Tensor, act: str) -> Tensor:
    """`act(x)`, act one of `silu gelu gelu_tanh gelu_quick`. Shapes: x and the result (...)."""
    if not _served(x):
        return reference.ACTS[act](x)
    if _recording() and x.requires_grad:
        if act == "gelu" or x.numel() < (MIN_RECORDED_LONE if act == "silu" else MIN_RECORDED):
            return reference.ACTS[act](x)
        return _Act.apply(x, _ACT[act])
    return _act(x, _ACT[act])


def act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`, act one of `silu gelu gelu_tanh gelu_quick`.

    Shapes: gate, up and the result (...), one shape. The product is rounded once. Memory: reads both once, writes once.
    """
    if gate.dtype is not up.dtype or not _served(gate):
        return reference.act_mul(gate, up, act)
    if _recording() and (gate.requires_grad or up.requires_grad):
        if gate.numel() < MIN_RECORDED:
            return reference.act_mul(gate, up, act)
        return _ActMul.apply(gate, up, _ACT[act])
    return _act_mul(gate, up, _ACT[act])


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotary embedding of q and k, half-split; see `reference.rotary` for formula and shapes.

    The results are dense, in the order of memory that q and k have. Gradients flow to q and k; cos and sin that want one are
    served by torch.
    """
    one_dtype = q.dtype is k.dtype is cos.dtype is sin.dtype
    if not one_dtype or not _served(q) or q.dim() != 4 or cos.dim() != 3 or unsqueeze_dim not in {1, 2}:
        return reference.rotary(q, k, cos, sin, unsqueeze_dim)
    if _recording():
        if cos.requires_grad or sin.requires_grad:
            return reference.rotary(q, k, cos, sin, unsqueeze_dim)
        if q.requires_grad or k.requires_grad:
            return _Rotary.apply(q, k, cos, sin, 3 - unsqueeze_dim)
    return _rotary(q, k, cos, sin, 3 - unsqueeze_dim, False)


def _served(x: Tensor) -> bool:
    return x.dtype in _DTYPES and x.is_cpu and not _transformed()


# -- gradients ----------------------------------------------------------------------------------------------------
# Statistics of a row are recomputed in the backward pass: it reads the row anyway, and saving them would cost every forward.
# `forward` takes `ctx`: with a separate `setup_context` torch binds the arguments to the signature anew in every call (40 us).
# That form is what torch.func needs, so under its transforms the formula serves.
# Second derivatives go through the formula too: `_differentiable`.


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, centered: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.centered = eps, centered
        return _rms_norm(x, weight, eps, centered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if _second_order():
            eps, centered = ctx.eps, ctx.centered
            return *_differentiable(lambda x, w: reference.rms_norm(x, w, eps, centered=centered), (x, weight), grad), None, None
        weight_too = ctx.needs_input_grad[1]
        dx, dw = _rms_norm_backward(grad, x, weight, ctx.eps, ctx.centered, weight_too)
        return dx, dw if weight_too else None, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float, centered: bool) -> tuple[Tensor, Tensor]:
        s, y = _add_rms_norm(x, delta, weight, eps, centered)
        ctx.save_for_backward(s, weight)
        ctx.eps, ctx.centered = eps, centered
        return s, y

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        s, weight = ctx.saved_tensors
        weight_too = ctx.needs_input_grad[2]
        if (
            _second_order()
        ):  # written out: s is this function's own output, and autograd inside its backward would wait for itself
            r = torch.rsqrt(s.float().pow(2).mean(-1, keepdim=True) + ctx.eps)
            n, g = s.float() * r, dy.float() * (weight.float() + float(ctx.centered))
            dx = ((g - n * (g * n).mean(-1, keepdim=True)) * r).to(s.dtype)
            dw = (dy.float() * n).flatten(0, -2).sum(0).to(weight.dtype) if weight_too else None
            return ds + dx, ds + dx, dw, None, None
        dx, dw = _rms_norm_backward(dy, s, weight, ctx.eps, ctx.centered, weight_too)
        dx += ds
        return dx, dx, dw if weight_too else None, None, None


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return _layer_norm(x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        if _second_order():
            eps = ctx.eps
            return *_differentiable(lambda *t: reference.layer_norm(*t, eps), (x, weight, bias), grad), None
        _, weight_too, bias_too, _ = ctx.needs_input_grad
        dx, dw, db = _layer_norm_backward(grad, x, weight, ctx.eps, weight_too, bias_too)
        return dx, dw if weight_too else None, db if bias_too else None, None


class _Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, act: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.act = act
        return _act(x, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if _second_order():
            return *_differentiable(_FORMULAS[ctx.act], (x,), grad), None
        return _act_backward(grad, x, ctx.act), None


class _ActMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: int) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _act_mul(gate, up, act)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if _second_order():
            formula = _FORMULAS[ctx.act]
            return *_differentiable(lambda gate, up: formula(gate) * up, (gate, up), grad), None
        d_gate, d_up = _act_mul_backward(grad, gate, up, ctx.act)
        return d_gate, d_up, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.token_dim = token_dim
        return _rotary(q, k, cos, sin, token_dim, False)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        if _second_order():  # linear in the gradients: the transpose, as a function that autograd knows
            return *_RotaryBack.apply(dq, dk, cos, sin, ctx.token_dim), None, None, None
        return *_rotary(dq, dk, cos, sin, ctx.token_dim, True), None, None, None


class _RotaryBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, token_dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.token_dim = token_dim
        return _rotary(dq, dk, cos, sin, token_dim, True)

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:
        return *_Rotary.apply(q, k, *ctx.saved_tensors, ctx.token_dim), None, None, None


def _second_order() -> bool:
    """Whether this backward pass is itself being recorded (`create_graph=True`), and not merely traced by a compiler."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiable(formula: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `formula` at `inputs`, themselves with a history; an input that wants none, or is empty, gets None."""
    wanted = [t for t in inputs if t.requires_grad and t.numel()]
    out = formula(*(t if t.numel() or inputs[0].numel() == 0 else None for t in inputs))
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if any(t is w for w in wanted) else None for t in inputs)


# -- shapes, for tracing ------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "FRAGMENT")  # lives as long as this module


def _dense(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _dense_as(x: Tensor) -> Tensor:
    b, m, n, d = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty((b, n, m, d)).transpose(1, 2)
    return x.new_empty((b, m, n, d))


_FAKE = {
    "rms_norm": lambda x, weight, eps, centered: _dense(x),
    "add_rms_norm": lambda x, delta, weight, eps, centered: (_dense(x), _dense(x)),
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
