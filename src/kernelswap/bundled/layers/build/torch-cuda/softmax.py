"""Softmax over the last dimension, forward and backward, in float32 inside and rounded once.

    y = exp(x - max(x)) / sum(exp(x - max(x)))        dx = y * (dy - sum(dy * y))

Source: Milakov & Gimelshein 2018, arXiv:1805.02867, for rows that do not fit: maximum and sum are found in one sweep over them.

Bytes, forward: x read once and y written once; a row longer than LONGEST is read twice (the second time out of L2, where it fits).
Backward: y and dy read once (twice), dx written once. Only y is saved.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream, on
from ._second import recorded
from .rms_norm import _tile
from .tuning import bound, size, space

LONGEST = 16384
"""Elements of a row up to which a program holds it in registers."""


@triton.jit(do_not_specialize=["M"])
def _forward(X, Y, M, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    x = tl.load(X + at, mask=inside, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
    x = tl.exp(x - tl.max(x, axis=1)[:, None])
    tl.store(Y + at, x / tl.sum(x, axis=1)[:, None], mask=inside)


@triton.jit(do_not_specialize=["M"])
def _backward(DY, Y, DX, M, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    y = tl.load(Y + at, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(DX + at, y * (dy - tl.sum(dy * y, axis=1)[:, None]), mask=inside)


@triton.jit
def _forward_long(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    """A row a program, by blocks. A block of -inf alone must not turn the sum to NaN: only a whole row of them does."""
    start = tl.program_id(0).to(tl.int64) * N
    col = tl.arange(0, BLOCK)
    top = float("-inf")
    total = 0.0
    for block in range(0, N, BLOCK):
        x = tl.load(X + start + block + col, mask=block + col < N, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, axis=0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(x - finite), axis=0)
        top = higher
    for block in range(0, N, BLOCK):
        x = tl.load(X + start + block + col, mask=block + col < N, other=float("-inf")).to(tl.float32)
        tl.store(Y + start + block + col, tl.exp(x - top) / total, mask=block + col < N)


@triton.jit
def _backward_long(DY, Y, DX, N: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * N
    col = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, N, BLOCK):
        y = tl.load(Y + start + block + col, mask=block + col < N, other=0.0).to(tl.float32)
        acc += y * tl.load(DY + start + block + col, mask=block + col < N, other=0.0).to(tl.float32)
    total = tl.sum(acc, axis=0)
    for block in range(0, N, BLOCK):
        y = tl.load(Y + start + block + col, mask=block + col < N, other=0.0).to(tl.float32)
        dy = tl.load(DY + start + block + col, mask=block + col < N, other=0.0).to(tl.float32)
        tl.store(DX + start + block + col, y * (dy - total), mask=block + col < N)


# -- host side ----------------------------------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter)
_BLOCK = 8192
_forwards: dict[tuple[Any, ...], tuple[Any, int]] = {}
_backwards: dict[tuple[Any, ...], tuple[Any, int]] = {}
for _name, _cache in (("softmax.forward", _forwards), ("softmax.backward", _backwards)):
    space(
        _name, _cache, ROWS=(1, 2, 4, 8), num_warps=(1, 2, 4, 8, 16), BLOCK=(2048, 4096, 8192, 16384),
        also=({"ROWS": 2, "num_warps": 8}, {"num_warps": 4}, {"BLOCK": 4096, "num_warps": 8}),
    )  # fmt: skip


def _rowwise(
    kernel: str, short: Any, long: Any, args: tuple[Tensor, ...], n: int, rows: int, device: int
) -> tuple[Any, int]:  # fmt: skip
    """A launch and how many rows a program has; 0: one, by blocks of it."""
    bucket = f"{', '.join(str(t.dtype).removeprefix('torch.') for t in args)}; {n} wide, {size(rows, 64)} rows"
    if n > LONGEST:

        def by_blocks(c: dict[str, Any]) -> tuple[Any, int]:
            return bind(long, args, device=device, num_warps=c["num_warps"], N=n, BLOCK=c["BLOCK"]), 0

        return bound(kernel, {"BLOCK": _BLOCK, "num_warps": 16}, bucket, device, by_blocks)  # type: ignore[no-any-return]  # what it returns
    block, tile, warps = _tile(n, rows > 64)

    def whole(c: dict[str, Any]) -> tuple[Any, int]:
        return bind(short, (*args, 17), device=device, num_warps=c["num_warps"], N=n, BLOCK=block, ROWS=c["ROWS"]), c["ROWS"]

    return bound(kernel, {"ROWS": tile, "num_warps": warps}, bucket, device, whole)  # type: ignore[no-any-return]  # what it returns


def formula(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Torch's own operator: for tracing, for tensor subclasses, under autocast."""
    return torch.nn.functional.softmax(x, dim=-1, dtype=dtype)


def softmax(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Softmax of x (..., N) over the last dimension -> (..., N) in `dtype` (x's where None), contiguous.

    bf16, fp16 or fp32, rows of any length, a row of -inf alone gives NaN, as torch's. Inputs are not written.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or x.is_cuda is INTERPRETED
        or x.numel() == 0
        or x.dim() == 0
        or not x.is_floating_point()
        or torch.float64 in (x.dtype, dtype)
        or torch.is_autocast_enabled(x.device.type)
    ):
        return formula(x, dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Softmax.apply(x, dtype)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run(x, dtype)


def _run(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    x = x.contiguous()
    n = x.shape[-1]
    rows = x.numel() // n
    y = torch.empty_like(x, dtype=dtype)
    device = x.get_device()
    px, py = x.data_ptr(), y.data_ptr()
    key = (x.dtype, y.dtype, n, device, rows > 64, (px | py) & 15)
    found = _forwards.get(key)
    if found is None:
        found = _forwards[key] = _rowwise("softmax.forward", _forward, _forward_long, (x, y), n, rows, device)
    launch, tile = found
    with on(device):
        if tile:
            launch(-(-rows // tile), current_stream(device), px, py, rows)
        else:
            launch(rows, current_stream(device), px, py)
    return y


def _run_backward(dy: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    dy = dy.contiguous()
    n = y.shape[-1]
    rows = y.numel() // n
    dx = torch.empty_like(y, dtype=dtype)
    device = y.get_device()
    pd, py, px = dy.data_ptr(), y.data_ptr(), dx.data_ptr()
    key = (dy.dtype, y.dtype, dtype, n, device, rows > 64, (pd | py | px) & 15)
    found = _backwards.get(key)
    if found is None:
        found = _backwards[key] = _rowwise("softmax.backward", _backward, _backward_long, (dy, y, dx), n, rows, device)
    launch, tile = found
    with on(device):
        if tile:
            launch(-(-rows // tile), current_stream(device), pd, py, px, rows)
        else:
            launch(rows, current_stream(device), pd, py, px)
    return dx


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype | None) -> Tensor:
        y = _run(x, dtype)
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]  # torch types *Any
        (y,) = ctx.saved_tensors
        if recorded():  # y has a history, through which autograd goes on
            f, g = y.float(), dy.float()
            return (f * (g - (f * g).sum(-1, keepdim=True))).to(ctx.dtype), None
        return _run_backward(dy, y, ctx.dtype), None
