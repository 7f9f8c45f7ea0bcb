"""RMSNorm with a gate, after the norm or before it, over a whole row or over groups of it; forward and backward.

    after:  y = x * rsqrt(mean(x^2) + eps) * w * act(z)
    before: h = x * act(z),  y = h * rsqrt(mean(h^2) + eps) * w        silu(z) = z * s(z), sigmoid(z) = s(z) = 1 / (1 + exp(-z))

Source: Gu & Dao 2024, arXiv:2405.21060 (Mamba-2: before), and Yang et al. 2024, arXiv:2412.06464 (gated delta rule: after).
Everything in float32, rounded once: the modules round up to three times, each in its own order, and are no closer to the formula.

Bytes, forward: x and z read once, y written once. Backward: x, z and dy read once, dx and dz written once, one partial dw row per
program. The row statistic is recomputed in backward. z may be a slice of longer rows: it is read where it lies.
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

SILU, SIGMOID = 0, 1


@triton.jit(do_not_specialize=["M", "eps"])
def _forward(
    X, Z, W, Y, M, eps, ZS: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ACT: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """G groups of N a row. A program has ROWS rows of one group. ZS: from one row of Z to the next."""
    group = tl.program_id(0) % G * N
    row = tl.program_id(0) // G * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    at = row.to(tl.int64)[:, None] * (G * N) + group + col[None, :]
    x = tl.load(X + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    z = tl.load(Z + row.to(tl.int64)[:, None] * ZS + group + col[None, :], mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + group + col, mask=col < N, other=0.0).to(tl.float32)
    a = 1.0 / (1.0 + tl.exp(-z))
    if ACT == 0:
        a *= z
    if BEFORE:
        x *= a
    rstd = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + eps)
    y = x * rstd[:, None] * w[None, :]
    if not BEFORE:
        y *= a
    tl.store(Y + at, y, mask=inside)


@triton.jit(do_not_specialize=["M", "workers", "eps"])
def _backward(
    DY, X, Z, W, DX, DZ, P, M, workers, eps,
    ZS: tl.constexpr, G: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ACT: tl.constexpr, BEFORE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx, dz and one partial row of dw per worker; a worker is G programs, one for each group."""
    pid = tl.program_id(0)
    group = pid % G * N
    col = tl.arange(0, BLOCK)
    w = tl.load(W + group + col, mask=col < N, other=0.0).to(tl.float32)
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for block in tl.range(pid // G, tl.cdiv(M, ROWS), workers, num_stages=STAGES):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)[None, :]
        at = row.to(tl.int64)[:, None] * (G * N) + group + col[None, :]
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(Z + row.to(tl.int64)[:, None] * ZS + group + col[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        s = 1.0 / (1.0 + tl.exp(-z))
        if ACT == 0:
            a = z * s
            da = s + a * (1.0 - s)
        else:
            a = s
            da = s * (1.0 - s)
        if BEFORE:
            n = x * a
        else:
            n = x
        rstd = 1.0 / tl.sqrt_rn(tl.sum(n * n, axis=1) / N + eps)
        n *= rstd[:, None]
        if BEFORE:
            dn = dy
        else:
            dn = dy * a
        dw += dn * n
        g = dn * w[None, :]
        c = tl.sum(g * n, axis=1) / N
        dh = (g - n * c[:, None]) * rstd[:, None]
        if BEFORE:
            dz = dh * x * da
            dh *= a
        else:
            dz = dy * n * w[None, :] * da
        tl.store(DX + at, dh, mask=inside)
        tl.store(DZ + at, dz, mask=inside)
    tl.store(P + pid.to(tl.int64) * N + col, tl.sum(dw, axis=0), mask=col < N)


# -- host side ----------------------------------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter)
_ACTS = {"silu": SILU, "swish": SILU, "sigmoid": SIGMOID}
_forwards: dict[tuple[Any, ...], tuple[Any, int]] = {}
_backwards: dict[tuple[Any, ...], tuple[Any, Any]] = {}
space("gated_norm.forward", _forwards, ROWS=(1, 2, 4, 8), num_warps=(1, 2, 4, 8, 16), also=({"ROWS": 2, "num_warps": 8}, {"num_warps": 4}))
space("gated_norm.backward", _backwards, ROWS=(1, 2, 4), num_warps=(2, 4, 8, 16), STAGES=(1, 2, 3, 4), also=({"num_warps": 8, "ROWS": 2},))


def _about(x: Tensor, gate: Tensor, weight: Tensor, step: int, groups: int, act: str, before: bool) -> str:
    """What a launch is bound for, in words."""
    dtypes = ", ".join(str(t.dtype).removeprefix("torch.") for t in (x, gate, weight))
    where = "before" if before else "after"
    return f"{dtypes}; {act} {where}, {weight.shape[0]} wide in {groups}, gates {step} apart"


def formula(x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: str = "silu", groups: int = 1, *, before: bool = False) -> Tensor:
    """The same in plain torch, in float32 or wider: for tracing, for tensor subclasses, and to read. Returns x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = gate.to(wide)
    a = torch.sigmoid(z) if _ACTS[act] == SIGMOID else torch.nn.functional.silu(z)
    if before:
        return formula_ungated(x.to(wide) * a, weight, eps, groups).to(x.dtype)
    return (formula_ungated(x.to(wide), weight, eps, groups) * a).to(x.dtype)


def formula_ungated(x: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    """RMSNorm by groups, in float32 or wider; returns x's dtype. What a gated norm is when it is given no gate."""
    wide = torch.promote_types(x.dtype, torch.float32)
    f = x.to(wide).unflatten(-1, (groups, -1))
    return ((f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2) * weight.to(wide)).to(x.dtype)


def known(act: str) -> str:
    """`act`, which the kernel has.

    Raises:
        ValueError: it has not.
    """
    if act not in _ACTS:
        raise ValueError(f"gated norms have the activations {', '.join(_ACTS)}, not {act!r}")
    return act


def rms_norm_gated(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: str = "silu", groups: int = 1, *, before: bool = False
) -> Tensor:
    """RMSNorm of x (..., N) by groups of N / `groups`, scaled by weight (N,), and gated by act(gate), gate of x's shape.

    act: `silu` (or `swish`) or `sigmoid`. before: the gate comes before the norm. bf16, fp16 or fp32, each tensor its own;
    returns x's dtype, contiguous. Groups up to 65536 long. Inputs are not written.
    """
    if (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(gate) not in _PLAIN
        or type(weight) not in _PLAIN
        or not _fits(x, gate, weight, groups)
    ):
        return formula(x, gate, weight, eps, act, groups, before=before)
    if torch.is_grad_enabled() and (x.requires_grad or gate.requires_grad or weight.requires_grad):
        return _GatedNorm.apply(x, gate, weight, eps, act, groups, before)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run(x, gate, weight, eps, act, groups, before)


def _fits(x: Tensor, gate: Tensor, weight: Tensor, groups: int) -> bool:
    """The kernel can take these; everything else goes through the formula."""
    return (
        x.is_cuda is not INTERPRETED
        and x.device == gate.device == weight.device
        and x.shape == gate.shape
        and x.shape[-1:] == weight.shape
        and weight.is_contiguous()
        and x.numel() > 0
        and weight.shape[0] % groups == 0
        and weight.shape[0] // groups <= 65536
        and torch.float64 not in (x.dtype, gate.dtype, weight.dtype)
    )


def _strided(z: Tensor) -> tuple[Tensor, int]:
    """z, or a copy, and the distance between its rows: one for all, with elements side by side."""
    shape, stride = z.shape, z.stride()
    if z.is_contiguous() or len(shape) < 2 or stride[-1] != 1:
        return z.contiguous(), shape[-1]
    step, reach = stride[-2], stride[-2] * shape[-2]
    for i in range(len(shape) - 3, -1, -1):
        if shape[i] != 1 and stride[i] != reach:
            return z.contiguous(), shape[-1]
        reach *= shape[i]
    return z, step


def _run(x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: str, groups: int, before: bool) -> Tensor:
    x, (gate, step) = x.contiguous(), _strided(gate)
    width = weight.shape[0]
    rows = x.numel() // width
    y = torch.empty_like(x)
    device = x.get_device()
    px, pz, pw, py = x.data_ptr(), gate.data_ptr(), weight.data_ptr(), y.data_ptr()
    key = (x.dtype, gate.dtype, weight.dtype, width, groups, step, device, rows > 64, act, before, (px | pz | pw | py) & 15)
    found = _forwards.get(key)
    if found is None:
        n = width // groups
        block, tile, warps = _tile(n, rows > 64)

        def make(c: dict[str, Any]) -> tuple[Any, int]:
            launch = bind(
                _forward, (x, gate, weight, y, 17, 1e-6), device=device, num_warps=c["num_warps"],
                ZS=step, G=groups, N=n, BLOCK=block, ROWS=c["ROWS"], ACT=_ACTS[act], BEFORE=int(before),
            )  # fmt: skip
            return launch, c["ROWS"]

        bucket = f"{_about(x, gate, weight, step, groups, act, before)}, {size(rows, 64)} rows"
        found = _forwards[key] = bound("gated_norm.forward", {"ROWS": tile, "num_warps": warps}, bucket, device, make)
    launch, tile = found
    with on(device):
        launch(-(-rows // tile) * groups, current_stream(device), px, pz, pw, py, rows, eps)
    return y


def _run_backward(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: str, groups: int, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dgate, dweight. x is contiguous."""
    dy, (gate, step) = dy.contiguous(), _strided(gate)
    width = weight.shape[0]
    n = width // groups
    rows = x.numel() // width
    device = x.get_device()
    dx, dz, dw = torch.empty_like(x), torch.empty(x.shape, dtype=gate.dtype, device=x.device), torch.empty_like(weight)
    workers = min(max(1, multiprocessors(device) * (1 if n > 4096 else 2) // groups), rows)
    partial = torch.empty((workers, width), dtype=torch.float32, device=x.device)
    py, px, pz, pw = dy.data_ptr(), x.data_ptr(), gate.data_ptr(), weight.data_ptr()
    key = (dy.dtype, x.dtype, gate.dtype, weight.dtype, width, groups, step, device, act, before, (py | px | pz | pw) & 15)
    found = _backwards.get(key)
    if found is None:
        block = triton.next_power_of_2(n)
        tile = max(1, 2048 // block)
        warps = 16 if block >= 8192 else 8 if block >= 4096 else 4  # by registers: five rows are held in them
        loaded = block * tile * (dy.element_size() + x.element_size() + gate.element_size())

        def make(c: dict[str, Any]) -> Any:
            return bind(
                _backward, (dy, x, gate, weight, dx, dz, partial, 17, 17, 1e-6), device=device, num_warps=c["num_warps"],
                ZS=step, G=groups, N=n, BLOCK=block, ROWS=c["ROWS"], ACT=_ACTS[act], BEFORE=int(before), STAGES=c["STAGES"],
            )  # fmt: skip

        default = {"ROWS": tile, "num_warps": warps, "STAGES": stages(loaded, device)}
        about = f"{str(dy.dtype).removeprefix('torch.')}, {_about(x, gate, weight, step, groups, act, before)}"
        launch = bound("gated_norm.backward", default, about, device, make)
        total = bind(_sum_partials, (partial, dw, 17), device=device, num_warps=4, N=width, BLOCK=32, ROWS=64)
        found = _backwards[key] = launch, total
    launch, total = found
    with on(device):
        stream = current_stream(device)
        launch(
            workers * groups, stream, py, px, pz, pw, dx.data_ptr(), dz.data_ptr(), partial.data_ptr(), rows, workers, eps
        )  # fmt: skip
        total(-(-width // 32), stream, partial.data_ptr(), dw.data_ptr(), workers)
    return dx, dz, dw


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float, act: str, groups: int, before: bool
    ) -> Tensor:  # fmt: skip
        x = x.contiguous()
        ctx.save_for_backward(x, gate, weight)
        ctx.form = eps, act, groups, before
        return _run(x, gate, weight, eps, act, groups, before)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch types *Any
        x, gate, weight = ctx.saved_tensors
        if recorded():
            eps, act, groups, before = ctx.form
            found = differentiable(
                lambda x, z, w: formula(x, z, w, eps, act, groups, before=before), (x, gate, weight), dy
            )  # fmt: skip
            return *found, None, None, None, None
        return *_run_backward(dy, x, gate, weight, *ctx.form), None, None, None, None
