"""LayerNorm, forward and backward.

    y = (x - mean) * rsqrt(var + eps) * w + b        mean and var (of the row, biased) in float32; rounded once

Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450. The variance is that of the centred row, which is in registers: no cancellation.

Bytes, forward: x read once, y written once. Backward: x and dy read once, dx written once, one partial row of dw and of db per
program, which is what torch's own backward does not have. Row statistics are recomputed there: nothing but x and w is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream, multiprocessors, on
from ._stages import stages
from ._second import differentiable, recorded
from .rms_norm import _sum_partials, _tile
from .tuning import bound, size, space


@triton.jit(do_not_specialize=["M", "eps"])
def _forward(
    X, W, B, Y, M, eps, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    x = tl.load(X + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    x = tl.where(inside, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
    y = x * (1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps))[:, None]
    if SCALED:
        y *= tl.load(W + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    if SHIFTED:
        y += tl.load(B + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y, mask=inside)


@triton.jit(do_not_specialize=["M", "programs", "eps"])
def _backward(
    DY, X, W, DX, PW, PB, M, programs, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr, SHIFTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, and one partial row of dw and of db per program."""
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    if SCALED:
        w = tl.load(W + col, mask=col < N, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in tl.range(pid, tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - (tl.sum(x, axis=1) / N)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
        n = x * rstd[:, None]
        if SHIFTED:
            db += g
        if SCALED:
            dw += g * n
            g *= w[None, :]
        mean = tl.sum(g, axis=1) / N
        c = tl.sum(g * n, axis=1) / N
        tl.store(DX + at, (g - mean[:, None] - n * c[:, None]) * rstd[:, None], mask=inside)
    to = pid.to(tl.int64) * N + col
    if SCALED:
        tl.store(PW + to, tl.sum(dw, axis=0), mask=col < N)
    if SHIFTED:
        tl.store(PB + to, tl.sum(db, axis=0), mask=col < N)


# -- host side ----------------------------------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter)
_OR_NONE = (*_PLAIN, type(None))
_forwards: dict[tuple[Any, ...], tuple[Any, int]] = {}
_backwards: dict[tuple[Any, ...], tuple[Any, ...]] = {}
space("layer_norm.forward", _forwards, ROWS=(1, 2, 4, 8), num_warps=(1, 2, 4, 8, 16), also=({"ROWS": 2, "num_warps": 8}, {"num_warps": 4}))
space("layer_norm.backward", _backwards, ROWS=(1, 2, 4), num_warps=(2, 4, 8, 16), STAGES=(1, 2, 3, 4), also=({"num_warps": 8, "ROWS": 2},))


def _about(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> str:
    """What a launch is bound for, in words."""
    dtypes = (f"{name} {str(t.dtype).removeprefix('torch.')}" for name, t in (("weight", weight), ("bias", bias)) if t is not None)
    return ", ".join((str(x.dtype).removeprefix("torch."), *dtypes)) + f"; {x.shape[-1]} wide"


def formula(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Torch's own operator: for tracing, for tensor subclasses, under autocast. In float32 where dtypes are mixed; returns x's."""
    n = x.shape[-1:]
    if all(t is None or t.dtype is x.dtype for t in (weight, bias)):
        return torch.nn.functional.layer_norm(x, n, weight, bias, eps)
    w, b = (None if t is None else t.float() for t in (weight, bias))
    return torch.nn.functional.layer_norm(x.float(), n, w, b, eps).to(x.dtype)


def _written_out(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """For second derivatives: those of torch's operator raise where there is a bias and no weight."""
    f = x.float()
    f = f - f.mean(-1, keepdim=True)
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    f = f if weight is None else f * weight.float()
    return (f if bias is None else f + bias.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension. x (..., N), weight and bias (N,) or None -> (..., N) in x's dtype, contiguous.

    bf16, fp16 or fp32, each tensor its own. N up to 65536. Inputs are not written.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(weight) not in _OR_NONE
        or type(bias) not in _OR_NONE
        or not _fits(x, weight, bias)
    ):
        return formula(x, weight, bias, eps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run(x, weight, bias, eps)


def _fits(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """The kernel can take these; everything else goes through torch, whose operator autocast knows."""
    if x.is_cuda is INTERPRETED or x.dtype is torch.float64 or x.numel() == 0 or x.shape[-1] > 65536:
        return False
    for t in (weight, bias):
        if t is not None and not (
            t.device == x.device and t.shape == x.shape[-1:] and t.is_contiguous() and t.dtype is not torch.float64
        ):
            return False
    return not torch.is_autocast_enabled(x.device.type)


def _run(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    n = x.shape[-1]
    rows = x.numel() // n
    y = torch.empty_like(x)
    device = x.get_device()
    w, b = x if weight is None else weight, x if bias is None else bias
    px, pw, pb, py = x.data_ptr(), w.data_ptr(), b.data_ptr(), y.data_ptr()
    key = (x.dtype, w.dtype, b.dtype, n, device, rows > 64, weight is None, bias is None, (px | pw | pb | py) & 15)
    found = _forwards.get(key)
    if found is None:
        block, tile, warps = _tile(n, rows > 64)

        def make(c: dict[str, Any]) -> tuple[Any, int]:
            launch = bind(
                _forward, (x, w, b, y, 17, 1e-6), device=device, num_warps=c["num_warps"],
                N=n, BLOCK=block, ROWS=c["ROWS"], SCALED=int(weight is not None), SHIFTED=int(bias is not None),
            )  # fmt: skip
            return launch, c["ROWS"]

        bucket = f"{_about(x, weight, bias)}, {size(rows, 64)} rows"
        found = _forwards[key] = bound("layer_norm.forward", {"ROWS": tile, "num_warps": warps}, bucket, device, make)
    launch, tile = found
    with on(device):
        launch(-(-rows // tile), current_stream(device), px, pw, pb, py, rows, eps)
    return y


def _run_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx, dweight, dbias. x is contiguous."""
    dy = dy.contiguous()
    n = x.shape[-1]
    rows = x.numel() // n
    device = x.get_device()
    dx = torch.empty_like(x)
    dw, db = (None if t is None else torch.empty_like(t) for t in (weight, bias))
    programs = min(multiprocessors(device) * (1 if n > 4096 else 2), rows)
    partial = torch.empty((2, programs, n), dtype=torch.float32, device=x.device)
    w, b = x if weight is None else weight, x if bias is None else bias
    py, px, pw = dy.data_ptr(), x.data_ptr(), w.data_ptr()
    of_w, of_b = partial.data_ptr(), partial.data_ptr() + 4 * programs * n
    key = (dy.dtype, x.dtype, w.dtype, b.dtype, n, device, weight is None, bias is None, (py | px | pw | of_b) & 15)
    found = _backwards.get(key)
    if found is None:
        block = triton.next_power_of_2(n)
        tile = max(1, 2048 // block)
        warps = 16 if block >= 8192 else 8 if block >= 4096 else 4  # by registers: two sums are held in them
        loaded = block * tile * (dy.element_size() + x.element_size())

        def make(c: dict[str, Any]) -> Any:
            return bind(
                _backward, (dy, x, w, dx, partial, partial[1], 17, 17, 1e-6), device=device, num_warps=c["num_warps"],
                N=n, BLOCK=block, ROWS=c["ROWS"], SCALED=int(weight is not None), SHIFTED=int(bias is not None),
                STAGES=c["STAGES"],
            )  # fmt: skip

        default = {"ROWS": tile, "num_warps": warps, "STAGES": stages(loaded, device)}
        launch = bound("layer_norm.backward", default, _about(x, weight, bias), device, make)
        totals = [
            None if t is None else bind(_sum_partials, (p, t, 17), device=device, num_warps=4, N=n, BLOCK=32, ROWS=64)
            for p, t in ((partial, dw), (partial[1], db))
        ]
        found = _backwards[key] = launch, *totals
    launch, of_weight, of_bias = found
    with on(device):
        stream = current_stream(device)
        launch(programs, stream, py, px, pw, dx.data_ptr(), of_w, of_b, rows, programs, eps)
        if dw is not None:
            of_weight(-(-n // 32), stream, of_w, dw.data_ptr(), programs)
        if db is not None:
            of_bias(-(-n // 32), stream, of_b, db.data_ptr(), programs)
    return dx, dw, db


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return _run(x, weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch types *Any
        x, weight, bias = ctx.saved_tensors
        if recorded():
            eps, given = ctx.eps, tuple(t for t in (x, weight, bias) if t is not None)

            def whole(*tensors: Tensor) -> Tensor:
                left = iter(tensors)
                return _written_out(*(None if t is None else next(left) for t in (x, weight, bias)), eps)  # type: ignore[arg-type]  # x is none of them

            found = iter(differentiable(whole, given, dy))
            return *(None if t is None else next(found) for t in (x, weight, bias)), None
        return *_run_backward(dy, x, weight, bias, ctx.eps), None
