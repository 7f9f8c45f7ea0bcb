"""act(gate) * up, forward and backward: SwiGLU and GeGLU without their intermediate.

    silu(g) = g * sigmoid(g)     gelu(g) = g * Phi(g)     gelu_tanh(g) = g/2 * (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3)))

Source: Shazeer 2020, arXiv:2002.05202. The activation is rounded to the input dtype before the product, as eager does.
Bytes, forward: gate and up read once, y written once. Backward: gate, up, dy read once, dgate and dup written once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own spelling
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_device, current_stream, on
from ._second import differentiable, recorded
from .tuning import bound, size, space

SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def _tanh(x):
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def _act(g, ACT: tl.constexpr):
    if ACT == 0:
        return g / (1.0 + tl.exp(-g))
    elif ACT == 1:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    else:
        return 0.5 * g * (1.0 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))


@triton.jit
def _act_grad(g, ACT: tl.constexpr):
    if ACT == 0:
        s = 1.0 / (1.0 + tl.exp(-g))
        return s * (1.0 + g * (1.0 - s))
    elif ACT == 1:
        return 0.5 * (1.0 + tl.erf(g * 0.7071067811865476)) + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        t = _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g))
        return 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * g * g)


@triton.jit
def _forward(G, U, Y, n, BLOCK: tl.constexpr, ACT: tl.constexpr, EVICT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    g = tl.load(G + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    u = tl.load(U + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    a = _act(g, ACT).to(G.dtype.element_ty).to(tl.float32)
    tl.store(Y + at, a * u, mask=inside)


@triton.jit
def _backward(DY, G, U, DG, DU, n, BLOCK: tl.constexpr, ACT: tl.constexpr, EVICT: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    dy = tl.load(DY + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    g = tl.load(G + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    u = tl.load(U + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    a = _act(g, ACT).to(G.dtype.element_ty).to(tl.float32)
    tl.store(DU + at, dy * a, mask=inside)
    tl.store(DG + at, dy * u * _act_grad(g, ACT), mask=inside)


_ACTS = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH}
_PLAIN = (Tensor, torch.nn.Parameter)
_forwards: dict[tuple[Any, ...], Any] = {}
_backwards: dict[tuple[Any, ...], Any] = {}
_BLOCK = 1024
_AXES: dict[str, Any] = {
    "BLOCK": (256, 512, 1024, 2048, 4096),
    "num_warps": (1, 2, 4, 8),
    "EVICT": ("", "evict_first"),
    "also": ({"BLOCK": 2048, "num_warps": 8}, {"BLOCK": 512, "num_warps": 2}),
}
space("glu.forward", _forwards, **_AXES)
space("glu.backward", _backwards, **_AXES)


def _elementwise(kernel: str, fn: Any, args: tuple[Any, ...], n: int, act: str, device: int) -> tuple[Any, int]:
    """A launch and how many elements a program has."""
    example = (1 << 32 if n > 2147483647 else 4096) + (n & 15 != 0)
    dtypes = dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in args)

    def make(c: dict[str, Any]) -> tuple[Any, int]:
        more = {"BLOCK": c["BLOCK"], "ACT": _ACTS[act], "EVICT": c["EVICT"]}
        return bind(fn, (*args, example), device=device, num_warps=c["num_warps"], **more), c["BLOCK"]

    bucket = f"{', '.join(dtypes)}; {act}; {size(n, *_SIZES)} elements"
    return bound(kernel, {"BLOCK": _BLOCK, "num_warps": 4, "EVICT": ""}, bucket, device, make)  # type: ignore[no-any-return]  # what make returns


_SIZES = (65536, 16777216)


def formula(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """The same in plain torch: for tracing, for tensor subclasses, and to read."""
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


def act_mul(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """act(gate) * up. gate, up: same shape and dtype (bf16, fp16, fp32) -> the same, contiguous. Inputs are not written."""
    if (
        torch.compiler.is_compiling()
        or type(gate) not in _PLAIN
        or type(up) not in _PLAIN
        or gate.is_cuda is INTERPRETED
        or gate.dtype is not up.dtype
        or gate.dtype is torch.float64
        or gate.shape != up.shape
        or gate.numel() == 0
    ):
        return formula(gate, up, act)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _ActMul.apply(gate, up, act)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run(gate, up, act)


def _run(gate: Tensor, up: Tensor, act: str) -> Tensor:
    if not (gate.is_contiguous() and up.is_contiguous()):
        gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    n = gate.numel()
    device = gate.get_device()
    pg, pu, py = gate.data_ptr(), up.data_ptr(), y.data_ptr()
    key = (gate.dtype, device, act, n & 15 == 0, (n > 65536) + (n > 16777216) + (n > 2147483647), (pg | pu | py) & 15)
    found = _forwards.get(key)
    if found is None:
        found = _forwards[key] = _elementwise("glu.forward", _forward, (gate, up, y), n, act, device)
    launch, block = found
    if device == current_device():
        launch(-(-n // block), current_stream(device), pg, pu, py, n)
    else:
        with torch.cuda.device(device):
            launch(-(-n // block), current_stream(device), pg, pu, py, n)
    return y


class _ActMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return _run(gate, up, act)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]  # torch types *Any
        gate, up = ctx.saved_tensors
        if recorded():
            act = ctx.act
            return *differentiable(lambda gate, up: formula(gate, up, act), (gate, up), dy), None  # type: ignore[return-value]
        dy = dy.contiguous()
        dg, du = torch.empty_like(gate), torch.empty_like(up)
        n, device = gate.numel(), gate.get_device()
        align = (dy.data_ptr() | gate.data_ptr() | up.data_ptr()) & 15
        key = (gate.dtype, dy.dtype, device, ctx.act, n & 15 == 0, (n > 65536) + (n > 16777216) + (n > 2147483647), align)
        found = _backwards.get(key)
        if found is None:
            found = _backwards[key] = _elementwise("glu.backward", _backward, (dy, gate, up, dg, du), n, ctx.act, device)
        launch, block = found
        with on(device):
            launch(
                -(-n // block), current_stream(device),
                dy.data_ptr(), gate.data_ptr(), up.data_ptr(), dg.data_ptr(), du.data_ptr(), n,
            )  # fmt: skip
        return dg, du, None
