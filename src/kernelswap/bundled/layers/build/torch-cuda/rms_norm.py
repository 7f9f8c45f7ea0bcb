"""RMSNorm and residual add + RMSNorm, forward and backward.

    y = x * rsqrt(mean(x^2) + eps) * (offset + w)        mean in float32

Source: Zhang & Sennrich 2019, arXiv:1910.07467. Casts as Llama's module has them (`offset` 0: the normalised row is
rounded to x's dtype, then multiplied by w) or as Gemma's (`offset` 1: the product is in float32, then rounded).

Bytes, forward: x read once, y written once. Backward: x and dy read once, dx written once, one partial dw row per program.
The row statistic is recomputed in backward, where x is read anyway: nothing but x and w is saved.
"""

# long: the norm and the norm of a sum are two forms of each step (kernel, gradients, host side), written and tuned side by side.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_device, current_stream, multiprocessors, on
from ._stages import stages
from ._second import differentiable, recorded
from .tuning import bound, size, space


@triton.jit
def _normed(x, w, X, eps, N: tl.constexpr, OFFSET: tl.constexpr):
    """Rows x, float32, times w; rounded as the modules round, to what X holds."""
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
    x = x * rstd[:, None]
    if OFFSET:
        y = x * (1.0 + w.to(tl.float32))[None, :]
    else:
        y = x.to(X.dtype.element_ty).to(tl.float32) * w.to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["M", "eps"])
def _forward(
    X, W, Y, M, eps, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr, EVICT: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    x = tl.load(X + at, mask=inside, other=0.0, eviction_policy=EVICT, cache_modifier=CACHE).to(tl.float32)
    w = tl.load(W + col, mask=col < N, other=0.0)
    tl.store(Y + at, _normed(x, w, X, eps, N, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["M", "programs", "eps"])
def _forward_staying(
    X, W, Y, M, programs, eps, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr,
    EVICT: tl.constexpr, CACHE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same in programs that stay: the weight is read once, and the next rows are on their way."""
    col = tl.arange(0, BLOCK)
    w = tl.load(W + col, mask=col < N, other=0.0)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        x = tl.load(X + at, mask=inside, other=0.0, eviction_policy=EVICT, cache_modifier=CACHE).to(tl.float32)
        tl.store(Y + at, _normed(x, w, X, eps, N, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["M", "eps"])
def _add_forward(
    X, D, W, S, Y, M, eps, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr, EVICT: tl.constexpr,
    CACHE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * N + col[None, :]
    x = tl.load(X + at, mask=inside, other=0.0, eviction_policy=EVICT, cache_modifier=CACHE).to(tl.float32)
    d = tl.load(D + at, mask=inside, other=0.0, eviction_policy=EVICT, cache_modifier=CACHE).to(tl.float32)
    w = tl.load(W + col, mask=col < N, other=0.0)
    s = (x + d).to(S.dtype.element_ty)  # rounded as eager rounds the residual stream
    tl.store(S + at, s, mask=inside)
    tl.store(Y + at, _normed(s.to(tl.float32), w, X, eps, N, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["M", "programs", "eps"])
def _add_staying(
    X, D, W, S, Y, M, programs, eps, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr,
    EVICT: tl.constexpr, CACHE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The same in programs that stay."""
    col = tl.arange(0, BLOCK)
    w = tl.load(W + col, mask=col < N, other=0.0)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        x = tl.load(X + at, mask=inside, other=0.0, eviction_policy=EVICT, cache_modifier=CACHE).to(tl.float32)
        d = tl.load(D + at, mask=inside, other=0.0, eviction_policy=EVICT, cache_modifier=CACHE).to(tl.float32)
        s = (x + d).to(S.dtype.element_ty)
        tl.store(S + at, s, mask=inside)
        tl.store(Y + at, _normed(s.to(tl.float32), w, X, eps, N, OFFSET), mask=inside)


@triton.jit(do_not_specialize=["M", "programs", "eps"])
def _backward(
    DY, DS, X, W, DX, P, M, programs, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx and one partial row of dw per program. RESIDUAL: dx += DS, the gradient that arrives through the sum."""
    pid = tl.program_id(0)
    col = tl.arange(0, BLOCK)
    w = tl.load(W + col, mask=col < N, other=0.0).to(tl.float32)
    if OFFSET:
        w += 1.0
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in tl.range(pid, tl.cdiv(M, ROWS), programs, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row.to(tl.int64)[:, None] * N + col[None, :]
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
        n = x * rstd[:, None]
        g = dy * w[None, :]
        c = tl.sum(g * n, axis=1) / N
        dx = (g - n * c[:, None]) * rstd[:, None]
        if RESIDUAL:
            dx += tl.load(DS + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + at, dx, mask=inside)
        dw += dy * (n if OFFSET else n.to(X.dtype.element_ty).to(tl.float32))
    tl.store(P + pid.to(tl.int64) * N + col, tl.sum(dw, axis=0), mask=col < N)


@triton.jit(do_not_specialize=["programs"])
def _sum_partials(P, DW, programs, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)
        acc += tl.load(P + row[:, None] * N + col[None, :], mask=(row < programs)[:, None] & (col < N)[None, :], other=0.0)
    tl.store(DW + col, tl.sum(acc, axis=0), mask=col < N)


# -- host side ----------------------------------------------------------------------------------------------------
# Every microsecond here is paid at each call of each norm: one dict lookup, raw pointers, no autograd.Function unless a
# gradient is wanted. Under tracing the formula itself is handed to the compiler, which fuses it with its neighbours.

_PLAIN = (Tensor, torch.nn.Parameter)  # subclasses (DTensor, quantised, functorch) take the formula
_forwards: dict[tuple[Any, ...], tuple[Any, int]] = {}
_adds: dict[tuple[Any, ...], tuple[Any, int]] = {}
_backwards: dict[tuple[Any, ...], tuple[Any, Any, int]] = {}


def _tile(n: int, many: bool) -> tuple[int, int, int]:
    """BLOCK, ROWS, num_warps of the forward kernels, measured on an H200 (benchmarks/LOG.md)."""
    block = triton.next_power_of_2(n)
    warps = max(1, min(16, block // 512))
    if many and block < 512:
        return block, 1024 // block, 4
    return block, 1, warps if many else max(2, warps)


_BIG = 33554432
"""Elements beyond which a hint to let go of what was read costs 4 % instead of being worth as much: the L2 of an H200."""
_ROWS: dict[str, Any] = {
    "ROWS": (1, 2, 4, 8),
    "num_warps": (2, 4, 8, 16),
    "EVICT": ("", "evict_first"),
    "CACHE": ("", ".cg"),
    "PROGRAMS": (0, 1, 2, 4, 8),  # that stay, on each multiprocessor; 0: as many as there are blocks of rows
    "STAGES": (1, 2, 3, 4),
    "needs": {"STAGES": "PROGRAMS"},
    "also": (
        {"num_warps": 4},
        {"ROWS": 2, "num_warps": 8},
        {"ROWS": 2, "num_warps": 16},
        {"ROWS": 4, "num_warps": 16},
        {"PROGRAMS": 4, "STAGES": 2, "num_warps": 4},
        {"PROGRAMS": 2, "STAGES": 3, "num_warps": 8},
        {"PROGRAMS": 2, "STAGES": 2, "ROWS": 2, "num_warps": 8},
        {"PROGRAMS": 1, "STAGES": 3, "ROWS": 4, "num_warps": 16},
        {"PROGRAMS": 8, "STAGES": 1, "num_warps": 4},
    ),
}
space("rms_norm.forward", _forwards, **_ROWS)
space("rms_norm.add", _adds, **_ROWS)
space(
    "rms_norm.backward", _backwards, ROWS=(1, 2, 4), num_warps=(2, 4, 8, 16), STAGES=(1, 2, 3, 4), PROGRAMS=(1, 2, 3, 4),
    also=({"num_warps": 8, "ROWS": 2}, {"num_warps": 16, "PROGRAMS": 1}),
)  # fmt: skip


def _rowwise(
    kernel: str, once: Any, staying: Any, args: tuple[Any, ...], n: int, rows: int, device: int, offset: int, *, evict: str
) -> tuple[Any, int]:  # fmt: skip
    """A launch of the forward kernels and how many rows a program has. `args`: tensors like those it is for."""
    block, tile, warps = _tile(n, rows > 64)
    dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in args[:-1])
    bucket = f"{dtypes}; {n} wide, {size(rows, 64)} rows, {size(rows * n, _BIG)} elements{', centred' * offset}"

    def make(c: dict[str, Any]) -> tuple[Any, int]:
        more = {"N": n, "BLOCK": block, "ROWS": c["ROWS"], "OFFSET": offset, "EVICT": c["EVICT"], "CACHE": c["CACHE"]}
        if not c["PROGRAMS"]:
            return bind(once, (*args, 17, 1e-6), device=device, num_warps=c["num_warps"], **more), c["ROWS"]
        launch = bind(staying, (*args, 17, 17, 1e-6), device=device, num_warps=c["num_warps"], **more, STAGES=c["STAGES"])
        most = multiprocessors(device) * c["PROGRAMS"]

        def some(blocks: int, stream: int, *call: Any) -> None:
            programs = min(blocks, most)
            launch(programs, stream, *call[:-1], programs, call[-1])

        return some, c["ROWS"]

    default = {"ROWS": tile, "num_warps": warps, "EVICT": evict, "CACHE": "", "PROGRAMS": 0, "STAGES": 2}
    return bound(kernel, default, bucket, device, make)  # type: ignore[no-any-return]  # what make returns


def formula(x: Tensor, weight: Tensor, eps: float, offset: int = 0) -> Tensor:
    """The same in plain torch: for tracing, for tensor subclasses, and to read."""
    f = x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (f * (1.0 + weight.float())).to(x.dtype)
    return weight * f.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: int = 0) -> Tensor:
    """RMSNorm over the last dimension. x (..., N), weight (N,) -> (..., N), contiguous.

    bf16, fp16 or fp32; mixed x and weight give torch's promoted dtype (`offset` 0) or x's (`offset` 1). N up to 65536.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or type(weight) not in _PLAIN or not fits(x, weight):
        return formula(x, weight, eps, offset)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps, offset)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run(x, weight, eps, offset)


def fits(x: Tensor, weight: Tensor) -> bool:
    """The kernel can take these; everything else goes through the formula."""
    return (
        x.is_cuda is not INTERPRETED
        and weight.is_cuda is not INTERPRETED
        and weight.is_contiguous()
        and x.shape[-1:] == weight.shape
        and weight.shape[0] <= 65536
        and x.numel() > 0
    )


def _run(x: Tensor, weight: Tensor, eps: float, offset: int) -> Tensor:
    if not x.is_contiguous():
        x = x.contiguous()
    n = x.shape[-1]
    rows = x.numel() // n
    dtype = x.dtype
    if offset or weight.dtype is dtype:
        y = torch.empty_like(x)
    else:
        y = torch.empty_like(x, dtype=torch.promote_types(dtype, weight.dtype))
    device = x.get_device()
    px, pw, py = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    small = rows * n <= _BIG
    key = (dtype, weight.dtype, n, device, rows > 64, offset, small, (px | pw | py) & 15)
    found = _forwards.get(key)
    if found is None:
        found = _forwards[key] = _rowwise(
            "rms_norm.forward", _forward, _forward_staying, (x, weight, y), n, rows, device, offset,
            evict="evict_first" if small else "",
        )  # fmt: skip
    launch, tile = found
    if device == current_device():
        launch(-(-rows // tile), current_stream(device), px, pw, py, rows, eps)
    else:
        with torch.cuda.device(device):
            launch(-(-rows // tile), current_stream(device), px, pw, py, rows, eps)
    return y


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: int = 0) -> tuple[Tensor, Tensor]:
    """The residual stream after a block, and its norm: s = x + delta rounded as torch rounds it, and `rms_norm(s)`.

    x, delta (..., N) of one shape and dtype, weight (N,) -> (s, y), both (..., N), contiguous. Inputs are not written.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(delta) not in _PLAIN
        or type(weight) not in _PLAIN
        or x.dtype is not delta.dtype
        or x.shape != delta.shape
        or x.device != delta.device
        or not fits(x, weight)
    ):
        return _add_formula(x, delta, weight, eps, offset)
    if torch.is_grad_enabled() and (x.requires_grad or delta.requires_grad or weight.requires_grad):
        return _AddRMSNorm.apply(x, delta, weight, eps, offset)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run_add(x, delta, weight, eps, offset)


def _add_formula(x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: int) -> tuple[Tensor, Tensor]:
    s = x + delta
    return s, formula(s, weight, eps, offset)


def _run_add(x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: int) -> tuple[Tensor, Tensor]:
    x, delta = x.contiguous(), delta.contiguous()
    n = x.shape[-1]
    rows = x.numel() // n
    dtype = x.dtype
    s = torch.empty_like(x)
    y = torch.empty_like(x, dtype=None if offset else torch.promote_types(dtype, weight.dtype))
    device = x.get_device()
    px, pd, pw, ps, py = x.data_ptr(), delta.data_ptr(), weight.data_ptr(), s.data_ptr(), y.data_ptr()
    key = (dtype, weight.dtype, n, device, (rows > 64) + (rows * n > _BIG), offset, (px | pd | pw | ps | py) & 15)
    found = _adds.get(key)
    if found is None:
        found = _adds[key] = _rowwise(
            "rms_norm.add", _add_forward, _add_staying, (x, delta, weight, s, y), n, rows, device, offset, evict=""
        )  # fmt: skip
    launch, tile = found
    with on(device):
        launch(-(-rows // tile), current_stream(device), px, pd, pw, ps, py, rows, eps)
    return s, y


def _run_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float, offset: int, ds: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx, dweight. `ds`: gradient of the sum that x is, added to dx."""
    n = x.shape[-1]
    rows = x.numel() // n
    dy = dy.contiguous()
    dx = torch.empty_like(x)
    device = x.get_device()
    dw = torch.empty_like(weight)
    extra = dy if ds is None else ds.contiguous()
    align = (dy.data_ptr() | x.data_ptr() | weight.data_ptr() | extra.data_ptr()) & 15
    key = (x.dtype, dy.dtype, extra.dtype, weight.dtype, n, device, offset, ds is None, align)
    found = _backwards.get(key)
    if found is None:
        block = triton.next_power_of_2(n)
        tile = max(1, 4096 // block) if block <= 1024 else 1
        warps = 16 if block >= 16384 else 8 if block >= 8192 else 4
        loaded = block * tile * (dy.element_size() + x.element_size() + (0 if ds is None else extra.element_size()))
        floats = x.new_empty(0, dtype=torch.float32)
        total = bind(_sum_partials, (floats, dw, 17), device=device, num_warps=4, N=n, BLOCK=32, ROWS=64)

        def make(c: dict[str, Any]) -> tuple[Any, Any, int]:
            launch = bind(
                _backward, (dy, extra, x, weight, dx, floats, 17, 17, 1e-6), device=device, num_warps=c["num_warps"],
                N=n, BLOCK=block, ROWS=c["ROWS"], OFFSET=offset, RESIDUAL=int(ds is not None), STAGES=c["STAGES"],
            )  # fmt: skip
            return launch, total, multiprocessors(device) * c["PROGRAMS"]

        dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, dy, extra, weight))
        bucket = f"{dtypes}; {n} wide{', residual' * (ds is not None)}{', centred' * offset}"
        default = {"ROWS": tile, "num_warps": warps, "STAGES": stages(loaded, device), "PROGRAMS": 1 if n > 4096 else 2}
        found = _backwards[key] = bound("rms_norm.backward", default, bucket, device, make)
    launch, total, most = found
    programs = min(most, rows)
    partial = torch.empty((programs, n), dtype=torch.float32, device=x.device)
    with on(device):
        stream = current_stream(device)
        launch(
            programs, stream, dy.data_ptr(), extra.data_ptr(), x.data_ptr(), weight.data_ptr(), dx.data_ptr(),
            partial.data_ptr(), rows, programs, eps,
        )  # fmt: skip
        total(-(-n // 32), stream, partial.data_ptr(), dw.data_ptr(), programs)
    return dx, dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: int) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return _run(x, weight, eps, offset)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]  # torch types *Any
        x, weight = ctx.saved_tensors
        if recorded():
            eps, offset = ctx.eps, ctx.offset
            return *differentiable(lambda x, w: formula(x, w, eps, offset), (x, weight), dy), None, None  # type: ignore[return-value]
        return *_run_backward(dy, x, weight, ctx.eps, ctx.offset, None), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor, weight: Tensor, eps: float, offset: int) -> tuple[Tensor, Tensor]:
        s, y = _run_add(x, delta, weight, eps, offset)
        ctx.save_for_backward(s, weight)
        ctx.eps, ctx.offset = eps, offset
        return s, y

    @staticmethod
    def backward(ctx: Any, ds: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]  # torch types *Any
        s, weight = ctx.saved_tensors
        if recorded():
            # written out: s is this function's own output, and autograd inside its backward would wait for itself
            f = s.float()
            r = torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + ctx.eps)
            n = f * r
            g = dy.float() * (weight.float() + ctx.offset)
            dx = ds + ((g - n * (g * n).mean(-1, keepdim=True)) * r).to(s.dtype)
            dw = (dy.float() * n).flatten(0, -2).sum(0).to(weight.dtype)
        else:
            dx, dw = _run_backward(dy, s, weight, ctx.eps, ctx.offset, ds)
        return dx, dx, dw, None, None  # type: ignore[return-value]
