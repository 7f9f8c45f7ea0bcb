"""Cross entropy with its gradient in Triton: two sweeps over each row of logits, the second one out of L2.

    loss = logsumexp(z) - z[target]          dz = softmax(z) - onehot(target)        and what `Terms` adds to that

A row of 151936 bf16 logits is 304 KB, more than shared memory; with one row per multiprocessor in flight the rows of a
wave (40 MB) fit in the H200's 60 MB of L2, so the second read costs no device memory traffic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream, multiprocessors, on
from .formula import Terms
from .formula import losses as formula
from .tuning import bound, space


@triton.jit
def _tanh(u):
    return 1.0 - 2.0 / (1.0 + tl.exp2(u * 2.8853900817779268))


@triton.jit
def _read(Z, at, V: tl.constexpr, pre, post, SHAPE: tl.constexpr, EVICT: tl.constexpr):
    """Logits as the loss sees them, float32; -inf beyond the row."""
    z = tl.load(Z + at, mask=at < V, other=float("-inf"), eviction_policy=EVICT).to(tl.float32)
    if SHAPE == 1:
        z = tl.where(at < V, z * pre, float("-inf"))
    if SHAPE == 2:
        z = tl.where(at < V, _tanh(z * pre) * post, float("-inf"))
    return z


@triton.jit(do_not_specialize=["ignore", "smoothing", "z_loss", "pre", "post"])
def _sweeps(
    Z, T, LOSS, LSE, DZ, SCALE, ignore, smoothing, z_loss, pre, post,
    V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, SHAPE: tl.constexpr, SMOOTH: tl.constexpr,
    LOSSES: tl.constexpr, GRAD: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """LOSS, LSE: (rows,) float32, unscaled; LSE is read where LOSSES is 0. DZ: dloss/dlogits * SCALE[row * STEP], in Z's
    dtype, rounded once; may be Z itself. SHAPE: 0 none, 1 `pre * z`, 2 `post * tanh(pre * z)`.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(T + row)
    counts = target != ignore
    known = (target >= 0) & (target < V)  # others give nan where torch asserts
    Z += row * V
    col = tl.arange(0, BLOCK)
    if LOSSES:
        # A maximum and a sum for every 8 neighbours, which one thread reads at once, not for every column: half the exponentials
        # (of a multiprocessor's 16 a cycle, the two sweeps would take longer than the memory).
        few = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        m = tl.full((BLOCK // 8,), float("-inf"), tl.float32)
        acc = tl.zeros((BLOCK // 8,), tl.float32)
        plain = tl.zeros((BLOCK // 8,), tl.float32)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            z = _read(Z, start + few, V, pre, post, SHAPE, "evict_last")
            if SMOOTH:
                plain += tl.sum(tl.where(start + few < V, z, 0.0), axis=1)
            new = tl.maximum(m, tl.max(z, axis=1))
            safe = tl.where(new == float("-inf"), 0.0, new)
            acc = acc * tl.exp2((m - safe) * 1.4426950408889634)
            acc += tl.sum(tl.exp2((z - safe[:, None]) * 1.4426950408889634), axis=1)
            m = new
        top = tl.max(m, axis=0)
        lse = top + tl.log(tl.sum(acc * tl.exp2((m - top) * 1.4426950408889634), axis=0))
        zt = tl.load(Z + target, mask=known, other=float("nan")).to(tl.float32)
        if SHAPE == 1:
            zt = zt * pre
        if SHAPE == 2:
            zt = _tanh(zt * pre) * post
        if SMOOTH:
            loss = lse - (1.0 - smoothing) * zt - smoothing * (tl.sum(plain, axis=0) / V)
        else:
            loss = lse - zt
        tl.store(LOSS + row, tl.where(counts, loss + z_loss * lse * lse, 0.0))
        tl.store(LSE + row, lse)
    else:
        lse = tl.load(LSE + row)
    if GRAD:
        by = tl.load(SCALE + row * STEP).to(tl.float32)
        by = tl.where(known, by, float("nan"))
        grown = 1.0 + 2.0 * z_loss * lse
        DZ += row * V
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + col
            z = _read(Z, at, V, pre, post, SHAPE, "evict_first")
            d = tl.exp2((z - lse) * 1.4426950408889634) * grown
            if SMOOTH:
                d -= smoothing / V
            d -= tl.where(at == target, 1.0 - smoothing, 0.0)
            if SHAPE == 1:
                d *= pre
            if SHAPE == 2:
                t = z / post
                d *= pre * post * (1.0 - t * t)
            tl.store(DZ + at, tl.where(counts, d * by, 0.0), mask=at < V, cache_modifier=".cs")


@triton.jit(do_not_specialize=["programs"])
def _scale(DZ, G, n, programs, BLOCK: tl.constexpr):
    """DZ *= G[0], and nothing at all where G[0] is 1: the usual end of a backward pass costs one load per program."""
    g = tl.load(G).to(tl.float32)
    if g != 1.0:
        for start in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, n, programs * BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = tl.load(DZ + at, mask=at < n, other=0.0).to(tl.float32)
            tl.store(DZ + at, z * g, mask=at < n)


_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_bound: dict[tuple[Any, ...], Any] = {}
_scales: dict[tuple[Any, ...], Any] = {}
space(
    "cross_entropy", _bound, BLOCK=(4096, 8192, 16384, 32768), num_warps=(4, 8, 16, 32), STAGES=(1, 2, 3),
    also=(
        {"BLOCK": 16384, "num_warps": 16},
        {"BLOCK": 16384, "num_warps": 32},
        {"BLOCK": 8192, "num_warps": 16},
        {"BLOCK": 4096, "num_warps": 8, "STAGES": 2},
    ),
)  # fmt: skip


def sweep(
    z: Tensor, target: Tensor, losses: Tensor | None, lse: Tensor, dz: Tensor | None, scale: Tensor | None, terms: Terms
) -> None:
    """Losses and logsumexps of contiguous logits z (rows, V) into `losses` and `lse`, both (rows,) float32; their gradient
    times `scale`, () or (rows,) float32 on the device, into `dz`, which may be z.

    `losses` None: `lse` holds what a former sweep left there. `dz` None: no gradient.
    """
    rows, vocab = z.shape
    device = z.get_device()
    shape = 2 if terms.tanh else int(terms.pre != 1.0)
    out, by, loss = z if dz is None else dz, lse if scale is None else scale, lse if losses is None else losses
    modes = (shape, int(terms.smoothing != 0.0), int(losses is not None), int(dz is not None), by.dim())
    key = (z.dtype, target.dtype, vocab, device, modes, (z.data_ptr() | out.data_ptr()) & 15)
    numbers = (terms.smoothing, terms.z_loss, terms.pre, terms.post)
    launch = _bound.get(key)
    if launch is None:
        # measured: the larger the block, the fewer rows share the L2; terms that keep more beside each logit would spill at 32768
        block = min(16384 if modes[0] == 2 or modes[1] else 32768, max(8, triton.next_power_of_2(vocab)))

        def make(c: dict[str, Any]) -> Any:
            return bind(
                _sweeps, (z, target, loss, lse, out, by, -100, 0.5, 0.5, 0.5, 0.5), device=device,
                num_warps=c["num_warps"], V=vocab, BLOCK=c["BLOCK"], STAGES=c["STAGES"],
                SHAPE=modes[0], SMOOTH=modes[1], LOSSES=modes[2], GRAD=modes[3], STEP=modes[4],
            )  # fmt: skip

        default = {"BLOCK": block, "num_warps": max(4, block // 1024), "STAGES": 1}
        wanted = ("losses" * modes[2], "gradient" * modes[3], ("", "scaled", "soft cap")[shape], "smoothing" * modes[1])
        bucket = f"{str(z.dtype).removeprefix('torch.')}; {vocab} wide; {', '.join(filter(None, wanted))}"
        launch = _bound[key] = bound("cross_entropy", default, bucket, device, make)
    with on(device):
        launch(
            rows, current_stream(device), z.data_ptr(), target.data_ptr(), loss.data_ptr(), lse.data_ptr(), out.data_ptr(),
            by.data_ptr(), terms.ignore, *map(float, numbers),
        )  # fmt: skip


def scaled(dz: Tensor, by: Tensor) -> Tensor:
    """dz * by in place, () by, without asking the device for its value."""
    n = dz.numel()
    if n == 0:
        return dz
    device = dz.get_device()
    by = by.contiguous()
    key = (dz.dtype, by.dtype, device, n & 15, n > 2147483647, dz.data_ptr() & 15)
    launch = _scales.get(key)
    if launch is None:
        example = (1 << 32 if n > 2147483647 else 4096) + (n & 15 != 0)
        launch = _scales[key] = bind(_scale, (dz, by, example, 17), device=device, num_warps=8, BLOCK=8192)
    programs = min(-(-n // 8192), 4 * multiprocessors(device))
    with on(device):
        launch(programs, current_stream(device), dz.data_ptr(), by.data_ptr(), n, programs)
    return dz


def takes(z: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernel can take a tensor like z and its company; everything else goes through torch."""
    return all(
        t is None or (type(t) in _PLAIN and t.is_cuda is not INTERPRETED and t.device == z.device) for t in (z, *others)
    ) and z.dtype in _DTYPES


def cross_entropy(
    z: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean", label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """As `torch.nn.functional.cross_entropy` of z.float(): z (rows, V), target (rows,) int64 -> () or (rows,) float32.

    float32 arithmetic whatever z's dtype; the gradient has z's dtype. z is not written to. Rows whose target is
    `ignore_index` add nothing and get a zero gradient; all rows ignored: 0/0 = nan as torch gives.
    """
    terms = Terms(ignore_index, label_smoothing, z_loss)
    if torch.compiler.is_compiling() or z.dim() != 2 or z.numel() == 0 or not takes(z, target):
        rows = formula(z, target, terms)
        if reduction == "mean":
            return rows.sum() / (target != ignore_index).sum()
        return rows.sum() if reduction == "sum" else rows
    count = (target != ignore_index).sum(dtype=torch.float32) if reduction == "mean" else torch.ones((), device=z.device)
    found = _CrossEntropy.apply(z.contiguous(), target.contiguous(), count, terms, reduction == "none")
    return found  # type: ignore[no-any-return]  # autograd.Function is untyped


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, count: Tensor, terms: Terms, rows: bool) -> Tensor:
        scale = count.clamp(min=1.0).reciprocal()
        losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        lse = torch.empty_like(losses)
        # float16 cannot hold a gradient before a loss scale has come; one that comes by row cannot be multiplied in later
        ctx.later = rows or z.dtype is torch.float16
        dz = None if ctx.later or not ctx.needs_input_grad[0] else torch.empty_like(z)
        sweep(z, target, losses, lse, dz, scale, terms)
        ctx.save_for_backward(z, target, scale, lse)
        ctx.terms, ctx.made = terms, dz
        return losses if rows else losses.sum() / count

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        z, target, scale, lse = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph=True`: the formula, which has a history
            rows = formula(z, target, ctx.terms)
            return *torch.autograd.grad(rows, z, (g * scale).expand_as(rows), create_graph=True), None, None, None, None
        dz, ctx.made = ctx.made, None
        if ctx.later:
            dz = torch.empty_like(z)
            sweep(z, target, None, lse, dz, (g * scale).float().contiguous(), ctx.terms)
            return dz, None, None, None, None
        if dz is None:  # a second time through (`retain_graph=True`)
            dz = torch.empty_like(z)
            sweep(z, target, None, lse, dz, scale, ctx.terms)
        return scaled(dz, g), None, None, None, None
