"""Cross entropy with its gradient: two sweeps over each row of logits, the second one out of L2.

    loss = logsumexp(z) - z[target]          dz = softmax(z) - onehot(target)

A row of 151936 bf16 logits is 304 KB, more than shared memory; with one row per multiprocessor in flight the rows of a
wave (40 MB) fit in the H200's 60 MB of L2, so the second read costs no device memory traffic. Logits are not written to.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own spelling
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream
from ._second import recorded


@triton.jit(do_not_specialize=["ignore", "rows"])
def _forward_backward(
    Z, T, LOSS, DZ, SCALE, ignore, rows,
    V: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, GRAD: tl.constexpr,
):  # fmt: skip
    """LOSS: (rows,) float32, unscaled. DZ: dloss/dlogits * SCALE[0], in Z's dtype; may be Z itself."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(T + row)
    base = row * V
    col = tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        z = tl.load(Z + base + start + col, mask=start + col < V, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        new = tl.maximum(m, z)
        acc = acc * tl.exp2((m - tl.where(new == float("-inf"), 0.0, new)) * 1.4426950408889634) + tl.exp2((z - tl.where(new == float("-inf"), 0.0, new)) * 1.4426950408889634)
        m = new
    top = tl.max(m, axis=0)
    total = tl.sum(acc * tl.exp2((m - top) * 1.4426950408889634), axis=0)
    lse = top + tl.log(total)
    if target != ignore:
        zt = tl.load(Z + base + target).to(tl.float32)
        tl.store(LOSS + row, lse - zt)
    else:
        tl.store(LOSS + row, 0.0)
    if GRAD:
        live = tl.where(target != ignore, tl.load(SCALE), 0.0)
        for start in tl.range(0, V, BLOCK, num_stages=STAGES):
            at = start + col
            z = tl.load(Z + base + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            p = tl.exp2((z - lse) * 1.4426950408889634)
            tl.store(DZ + base + at, (p - tl.where(at == target, 1.0, 0.0)) * live, mask=at < V, cache_modifier=".cs")


@triton.jit
def _scale(DZ, G, n, BLOCK: tl.constexpr):
    """DZ *= G[0], and nothing at all where G[0] is 1: the usual end of a backward pass costs one load per block."""
    g = tl.load(G).to(tl.float32)
    if g != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(DZ + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(DZ + at, z * g, mask=at < n)


_PLAIN = (Tensor, torch.nn.Parameter)
_bound: dict[tuple[Any, ...], Any] = {}
_scales: dict[tuple[Any, ...], Any] = {}
WORKSPACE = 592 << 20
"""Bytes of logits that `linear_cross_entropy` holds at a time: 2048 tokens of a 151936-word vocabulary in bf16."""


def _sweep(z: Tensor, target: Tensor, dz: Tensor, scale: Tensor, ignore: int, grad: bool) -> Tensor:
    """Losses (rows,) float32 of contiguous logits z (rows, V); with `grad`, dz = dloss/dz * scale (dz may be z).

    scale: () float32 on the device, so that a mean over a count which only the device knows needs no second sweep.
    """
    rows, vocab = z.shape
    loss = torch.empty(rows, dtype=torch.float32, device=z.device)
    device = z.get_device()
    key = (z.dtype, target.dtype, vocab, device, grad, (z.data_ptr() | dz.data_ptr()) & 15)
    launch = _bound.get(key)
    if launch is None:
        launch = _bound[key] = bind(
            _forward_backward, (z, target, loss, dz, scale, -100, 17), device=device, num_warps=8,
            V=vocab, BLOCK=min(4096, triton.next_power_of_2(vocab)), STAGES=4, GRAD=int(grad),
        )  # fmt: skip
    with torch.cuda.device(device):
        launch(
            rows, current_stream(device), z.data_ptr(), target.data_ptr(), loss.data_ptr(), dz.data_ptr(),
            scale.data_ptr(), ignore, rows,
        )  # fmt: skip
    return loss


def _scaled(dz: Tensor, by: Tensor) -> Tensor:
    """dz * by in place, without asking the device for the value of `by`."""
    n = dz.numel()
    device = dz.get_device()
    by = by.contiguous()
    key = (dz.dtype, by.dtype, device, n & 15, n > 2147483647, dz.data_ptr() & 15)
    launch = _scales.get(key)
    if launch is None:
        example = (1 << 32 if n > 2147483647 else 4096) + (n & 15 != 0)
        launch = _scales[key] = bind(_scale, (dz, by, example), device=device, num_warps=8, BLOCK=8192)
    with torch.cuda.device(device):
        launch(-(-n // 8192), current_stream(device), dz.data_ptr(), by.data_ptr(), n)
    return dz


def takes(z: Tensor, target: Tensor) -> bool:
    """The kernel can take these; everything else goes through torch."""
    return (
        type(z) in _PLAIN
        and type(target) in _PLAIN
        and z.is_cuda is not INTERPRETED
        and target.is_cuda is not INTERPRETED
        and z.dim() == 2
        and z.numel() > 0
    )


def cross_entropy(z: Tensor, target: Tensor, *, ignore_index: int = -100, divide_by: Tensor | float | None = None) -> Tensor:
    """Sum of the rows' cross entropies over `divide_by`, or their mean over the rows that count. z (rows, V) -> ().

    float32 arithmetic whatever z's dtype; the gradient has z's dtype. z is not written to. Rows whose target is
    `ignore_index` add nothing and get a zero gradient; all rows ignored: 0/0 = nan as torch gives.
    """
    if torch.compiler.is_compiling() or not takes(z, target):
        total = F.cross_entropy(z.float(), target, ignore_index=ignore_index, reduction="sum")
        return total / ((target != ignore_index).sum() if divide_by is None else divide_by)
    z = z.contiguous()
    target = target.contiguous()
    scale = _per_row(target, ignore_index, divide_by)
    return _CrossEntropy.apply(z, target, scale, ignore_index)  # type: ignore[no-any-return]  # autograd.Function is untyped


def _per_row(target: Tensor, ignore: int, divide_by: Tensor | float | None) -> Tensor:
    """1 / (what the sum is divided by), () float32 on target's device."""
    if divide_by is None:
        divide_by = (target != ignore).sum()
    if not isinstance(divide_by, Tensor):
        return torch.full((), 1.0 / divide_by, dtype=torch.float32, device=target.device)
    return divide_by.to(device=target.device, dtype=torch.float32).reciprocal()


def _once(ctx: Any) -> Any:
    """The gradient that was made in forward; it is scaled where it lies, so there is one use of it."""
    made, ctx.made = ctx.made, None
    if recorded() or made is None:
        what = "differentiated twice (`create_graph=True`)" if recorded() else "gone back through twice (`retain_graph=True`)"
        raise RuntimeError(
            f"the gradient of this cross entropy was made in its forward pass: it cannot be {what}; "
            "torch.nn.functional.cross_entropy can"
        )
    return made


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor, scale: Tensor, ignore: int) -> Tensor:
        grad = ctx.needs_input_grad[0]
        dz = torch.empty_like(z) if grad else z
        loss = _sweep(z, target, dz, scale, ignore, grad)
        ctx.made = dz if grad else None
        return loss.sum() * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]  # torch types *Any
        dz = _once(ctx)
        return _scaled(dz, g), None, None, None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, divide_by: Tensor | float | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:  # fmt: skip
    """Cross entropy of x @ weight.T without ever holding all logits. x (rows, H), weight (V, H), target (rows,) -> ().

    Rows go through in chunks whose logits fill `workspace` bytes; gradients of x and weight are made in forward. Peak
    memory beyond them: `workspace`. Chunks this large keep the matrix products at full rate, where chunks of V/H
    tokens (64 at H 1024) do not.
    """
    scale = _per_row(target, ignore_index, divide_by)
    return _LinearCrossEntropy.apply(x, weight, target, scale, ignore_index, workspace)  # type: ignore[no-any-return]  # untyped


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, scale: Tensor, ignore: int, workspace: int) -> Tensor:
        rows, vocab = x.shape[0], weight.shape[0]
        need_x, need_w = ctx.needs_input_grad[:2]
        chunk = max(1, workspace // (vocab * x.element_size()))
        if chunk >= 128:
            chunk = chunk // 128 * 128  # whole tiles of the matrix product
        chunk = min(chunk, rows)
        dx = torch.empty_like(x) if need_x else None
        dw: Tensor | None = None
        losses = torch.empty(rows, dtype=torch.float32, device=x.device)
        logits = torch.empty((chunk, vocab), dtype=x.dtype, device=x.device)
        for start in range(0, rows, chunk):
            part = x[start : start + chunk]
            z = logits[: part.shape[0]]
            torch.mm(part, weight.t(), out=z)
            losses[start : start + chunk] = _sweep(z, target[start : start + chunk], z, scale, ignore, need_x or need_w)
            if dx is not None:
                torch.mm(z, weight, out=dx[start : start + chunk])
            if need_w:
                if dw is None:
                    dw = torch.mm(z.t(), part)
                else:
                    dw.addmm_(z.t(), part)
        ctx.made = dx, dw
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:  # type: ignore[override]  # torch types *Any
        dx, dw = _once(ctx)
        return (
            None if dx is None else _scaled(dx, g),
            None if dw is None else _scaled(dw, g),
            None, None, None, None,
        )  # fmt: skip
