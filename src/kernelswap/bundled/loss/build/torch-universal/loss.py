"""Cross entropy of a linear layer's output, a few rows of it at a time, with its gradients made on the way.

    loss = sum over rows of logsumexp(z) - z[target], z = x W^T + b        dz = softmax(z) - onehot(target)

Memory beyond the gradients: twice `WORKSPACE`, instead of several times rows x vocabulary. Arithmetic as Transformers' loss has it: the
product in x's dtype, everything after it in float32, dz rounded to x's dtype before the products that make dx and dW.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own spelling
from torch import Tensor

WORKSPACE = {"cpu": 64 << 20}
"""Bytes of float32 logits at a time, by type of device; two of this size live at once."""
ELSEWHERE = 512 << 20  # a chip that is wider wants more rows in a product
LEAST = 128
"""Rows of a piece, whatever the vocabulary."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """x (rows, H), weight (V, H), bias (V,) or None, all float32 or all bfloat16; target (rows,) int64 -> () float32.

    Rows whose target is `ignore_index` add nothing; `reduction` is `mean` (over the others; none of them: nan) or `sum`.
    Differentiable as often as wanted: the first backward pass finds its gradients made, any other computes them anew.

    Raises:
        IndexError: a target is no row of `weight` (on the CPU; elsewhere the device asserts it, as torch's own loss does).
    """
    count = (target != ignore_index).sum() if reduction == "mean" else None
    loss: Tensor = _Loss.apply(x, weight, bias, target, ignore_index, count)
    return loss


def _pieces(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, wanted: tuple[bool, ...]) -> list[Any]:
    """[sum of the losses, dx or None, dweight or None, dbias or None]."""
    rows, vocab = x.shape[0], weight.shape[0]
    step = min(max(1, rows), max(LEAST, WORKSPACE.get(x.device.type, ELSEWHERE) // (4 * max(1, vocab))))
    single: Any = {"dtype": torch.float32, "device": x.device}
    total = torch.zeros((), **single)
    dx = torch.empty_like(x) if wanted[0] else None
    # sums over pieces in float32: bfloat16 would round once for each
    dw = torch.zeros(weight.shape, **single) if wanted[1] else None
    db = torch.zeros(vocab, **single) if wanted[2] else None
    # made once: fresh memory for each piece would be faulted in for each piece
    logits = torch.empty(step, vocab, dtype=x.dtype, device=x.device)
    wide = logits if x.dtype is torch.float32 else torch.empty(step, vocab, **single)
    shares = torch.empty(step, vocab, **single)
    term = None if dw is None or x.dtype is torch.float32 else torch.empty_like(weight)
    for start in range(0, rows, step):
        part, goal = x[start : start + step], target[start : start + step]
        z, f, p = (t[: part.shape[0]] for t in (logits, wide, shares))
        if bias is None:
            torch.mm(part, weight.t(), out=z)
        else:
            torch.addmm(bias, part, weight.t(), out=z)
        if f is not z:
            f.copy_(z)
        torch._log_softmax(f, 1, False, out=p)
        total += F.nll_loss(p, goal, ignore_index=ignore, reduction="sum")
        if not any(wanted):
            continue
        live = goal != ignore
        torch.exp(p, out=f)
        f.scatter_add_(1, torch.where(live, goal, 0)[:, None], torch.full_like(p[:, :1], -1.0))
        f.masked_fill_(~live[:, None], 0.0)
        if f is not z:
            z.copy_(f)
        if dx is not None:
            torch.mm(z, weight, out=dx[start : start + step])
        if dw is not None:
            if term is None:
                dw.addmm_(z.t(), part)
            else:
                dw += torch.mm(z.t(), part, out=term)
        if db is not None:
            db += z.sum(0, dtype=torch.float32)
    return [total, dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(x.dtype)]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore: int, count: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias, target, count)
        ctx.ignore = ignore
        total, *ctx.made = _pieces(x, weight, bias, target, ignore, ctx.needs_input_grad[:3])
        return total if count is None else total / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, count = ctx.saved_tensors
        if torch.is_grad_enabled():  # `create_graph=True`: the formula, which has a history
            held = [t for t, wanted in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if wanted]
            reduction = "sum" if count is None else "mean"
            loss = F.cross_entropy(F.linear(x, weight, bias).float(), target, ignore_index=ctx.ignore, reduction=reduction)
            found = iter(torch.autograd.grad(loss, held, grad, create_graph=True))
            return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), None, None, None
        made, ctx.made = ctx.made, None
        if made is None:
            made = _pieces(x, weight, bias, target, ctx.ignore, ctx.needs_input_grad[:3])[1:]
        grad = grad if count is None else grad / count.clamp(min=1)  # no row that counts: zeros, as torch gives
        return *(None if t is None else t.mul_(grad) for t in made), None, None, None
