"""Cross entropy of a linear layer's output, a few rows of it at a time, with its gradients made on the way.

    loss = sum over rows of logsumexp(z) - z[target], z = x W^T + b        dz = softmax(z) - onehot(target)

and what `Terms` adds. Memory beyond the gradients is bounded by a workspace instead of growing with rows x vocabulary.
Arithmetic as Transformers' loss has it: the product in x's dtype, everything after it in float32, dz rounded to x's dtype
before the products that make dx and dW. On NVIDIA GPUs the part between the products is the Triton kernel of
`cross_entropy.py`, elsewhere torch.

Gradients are made in the forward pass, while the logits are there, where that costs no accuracy. float16 waits for the
backward pass: it cannot hold softmax / rows before the loss scale has come. So does `reduction="none"`, whose rows are
scaled one by one. The price of waiting is one more product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own spelling
from torch import Tensor

from .formula import Terms, shaped
from .formula import losses as formula
from .tuning import choose, space

WORKSPACE = {"cpu": 64 << 20}
"""Bytes of float32 logits at a time, by type of device; two of this size live at once."""
ELSEWHERE = 512 << 20  # a chip that is wider wants more rows in a product
LEAST = 128
"""Rows of a piece, whatever the vocabulary."""
KERNEL = 592 << 20
"""Bytes of logits at a time where the Triton kernel serves, which works in place: 2048 rows of 151936 words in bfloat16."""
ROUNDINGS = 8
"""Pieces whose products are summed in the dtype of the weight's gradient on a GPU; more are summed in float32, which costs
another 4 bytes for each of its elements. n sums in bfloat16 err about sqrt((n + 1) / 2) times as much as one product does."""


def linear_cross_entropy(  # noqa: PLR0913  # what a loss may ask for
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *, ignore_index: int = -100, reduction: str = "mean",
    label_smoothing: float = 0.0, z_loss: float = 0.0, scale: float = 1.0, softcap: float = 0.0, workspace: int | None = None,
) -> Tensor:  # fmt: skip
    """x (rows, H), weight (V, H), bias (V,) or None, all of one floating dtype; target (rows,) int64 -> float32, () or (rows,).

    Rows whose target is `ignore_index` add nothing; `reduction` is `mean` (over the others; none of them: nan), `sum` or
    `none`. `z_loss` adds that much of logsumexp squared to each row. `scale` multiplies the logits; `softcap` makes them
    `softcap * tanh(z / softcap)`. `workspace`: bytes of logits at a time. Differentiable as often as wanted: the first
    backward pass finds its gradients made, any other computes them anew.

    Raises:
        IndexError: a target is no row of `weight` (on the CPU; the Triton kernel answers nan, torch on a GPU asserts).
    """
    pre, post = (scale / softcap, softcap) if softcap else (scale, 1.0)
    terms = Terms(ignore_index, label_smoothing, z_loss, pre, post, bool(softcap))
    return of_terms(x, weight, bias, target, terms, reduction, workspace)


def of_terms(  # noqa: PLR0913, PLR0917  # as above
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms, reduction: str, workspace: int | None = None
) -> Tensor:
    """See `linear_cross_entropy`."""
    count = (target != terms.ignore).sum(dtype=torch.float32) if reduction == "mean" else None
    loss: Tensor = _Loss.apply(x, weight, bias, target, count, terms, reduction == "none", workspace)
    return loss


_Sweep = Callable[[Tensor, Tensor, "Tensor | None", Tensor, "Tensor | None", "Tensor | None", Terms], None]
_modules: list[Any] = []


def _triton() -> Any:
    """`cross_entropy.py`, or None where there is no Triton."""
    if not _modules:
        try:
            from . import cross_entropy
        except ImportError:
            cross_entropy = None  # type: ignore[assignment]
        _modules.append(cross_entropy)
    return _modules[0]


def _kernel(x: Tensor) -> Any:
    """The module whose `sweep` serves x, or None."""
    if not x.is_cuda or torch.version.hip is not None or torch.cuda.get_device_capability(x.device) < (7, 0):
        return None
    return _triton()


def _in_torch(rows: int, vocab: int, like: Tensor) -> _Sweep:
    """`sweep` of `cross_entropy.py` in torch, dz in the place of z."""
    single: Any = {"dtype": torch.float32, "device": like.device}
    # made once: fresh memory for each piece would be faulted in for each piece
    wide = None if like.dtype is torch.float32 else torch.empty(rows, vocab, **single)
    shares = torch.empty(rows, vocab, **single)

    def sweep(
        z: Tensor, goal: Tensor, losses: Tensor | None, lse: Tensor, dz: Tensor | None, by: Tensor | None, terms: Terms
    ) -> None:
        f, p = z if wide is None else wide[: len(z)], shares[: len(z)]
        if f is not z:
            f.copy_(z)
        slope = None
        if terms.tanh:
            slope = torch.tanh_(f.mul_(terms.pre)).square().neg_().add_(1.0).mul_(terms.pre * terms.post)
            f.mul_(terms.post)
        elif terms.pre != 1.0:
            f.mul_(terms.pre)
        live = goal != terms.ignore
        torch._log_softmax(f, 1, False, out=p)
        if terms.z_loss:
            torch.logsumexp(f, 1, out=lse)
        if losses is not None:
            losses.copy_(F.nll_loss(p, goal, ignore_index=terms.ignore, reduction="none"))
            if terms.smoothing:
                losses.mul_(1.0 - terms.smoothing).sub_(p.mean(1).masked_fill_(~live, 0.0), alpha=terms.smoothing)
            if terms.z_loss:
                losses.add_(lse.square().masked_fill_(~live, 0.0), alpha=terms.z_loss)
        if dz is None:
            return
        torch.exp(p, out=f)
        if terms.z_loss:
            f.mul_((1.0 + 2.0 * terms.z_loss * lse)[:, None])
        f.scatter_add_(1, torch.where(live, goal, 0)[:, None], torch.full_like(p[:, :1], terms.smoothing - 1.0))
        if terms.smoothing:
            f.sub_(terms.smoothing / vocab)
        if slope is not None:
            f.mul_(slope)
        elif terms.pre != 1.0:
            f.mul_(terms.pre)
        if by is not None:
            f.mul_(by[:, None] if by.dim() else by)
        f.masked_fill_(~live[:, None], 0.0)
        if f is not dz:
            dz.copy_(f)

    return sweep


def _weights(weight: Tensor, pieces: int, *, on_gpu: bool) -> tuple[Tensor, Callable[[Tensor, Tensor, bool], None]]:
    """Where the weight's gradient is summed, and what adds z^T x of a piece to it: `add(z, x, first)`."""
    if weight.dtype is torch.float32 or (on_gpu and pieces <= ROUNDINGS):
        total = torch.empty_like(weight, memory_format=torch.contiguous_format)

        def add(z: Tensor, x: Tensor, first: bool) -> None:
            if first:
                torch.mm(z.t(), x, out=total)
            else:
                total.addmm_(z.t(), x)

        return total, add
    total = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    if on_gpu and weight.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8

        def add(z: Tensor, x: Tensor, first: bool) -> None:  # noqa: ARG001  # the same face
            torch.ops.aten.addmm.dtype_out(total, z.t(), x, torch.float32, out=total)

        return total, add
    term = torch.empty_like(weight, memory_format=torch.contiguous_format)

    def add(z: Tensor, x: Tensor, first: bool) -> None:  # noqa: ARG001  # the same face
        total.add_(torch.mm(z.t(), x, out=term))

    return total, add


_cuts: dict[tuple[Any, ...], tuple[int, int]] = {}
space(
    "linear_cross_entropy", _cuts,
    MIB=(148, 296, 592, 594),  # 594: 2048 rows of 151936 in bfloat16, of which 592 holds 1920
    EVEN=(0, 1),
    also=({"MIB": 594}, {"MIB": 592, "EVEN": 1}, {"MIB": 594, "EVEN": 1}),
)  # fmt: skip


def _cut(rows: int, vocab: int, x: Tensor) -> tuple[int, int]:
    """Bytes of logits at a time where the kernel serves, and whether pieces are to be equally long."""
    key = (x.dtype, vocab, x.shape[1], rows.bit_length(), x.device)
    found = _cuts.get(key)
    if found is None:
        low = 1 << max(0, rows.bit_length() - 1)
        bucket = f"{str(x.dtype).removeprefix('torch.')}; {x.shape[1]} to {vocab}; {low}-{2 * low - 1} rows"
        chosen = choose("linear_cross_entropy", {"MIB": KERNEL >> 20, "EVEN": 0}, bucket, x.get_device())
        found = _cuts[key] = chosen["MIB"] << 20, chosen["EVEN"]
    return found


def _step(rows: int, vocab: int, x: Tensor, workspace: int | None, *, on_gpu: bool) -> int:
    """Rows of a piece."""
    if on_gpu:
        held, even = (workspace, 0) if workspace else _cut(rows, vocab, x)
        step = max(1, held // max(1, vocab * x.element_size()))
        step = step // 128 * 128 or step  # whole tiles of the matrix product
        if even and step >= 128:
            step = -(-rows // -(-rows // step) // 128) * 128
    else:
        step = max(LEAST, (workspace or WORKSPACE.get(x.device.type, ELSEWHERE)) // (4 * max(1, vocab)))
    return min(max(1, rows), step)


def _pieces(  # noqa: PLR0913, PLR0917  # one loop
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, terms: Terms, workspace: int | None,
    losses: Tensor | None, lse: Tensor, scale: Tensor | None, wanted: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """[dx, dweight, dbias], each None where not wanted. `losses`, `lse`, `scale` as in `sweep`."""
    rows, vocab = x.shape[0], weight.shape[0]
    kernel = _kernel(x)
    step = _step(rows, vocab, x, workspace, on_gpu=kernel is not None)
    logits = torch.empty(step, vocab, dtype=x.dtype, device=x.device)
    sweep: _Sweep = kernel.sweep if kernel is not None else _in_torch(step, vocab, x)
    dx = torch.empty_like(x) if wanted[0] else None
    dw, add = _weights(weight, -(-rows // step), on_gpu=kernel is not None) if wanted[1] and rows else (None, None)
    db = torch.zeros(vocab, dtype=torch.float32, device=x.device) if wanted[2] else None
    for start in range(0, rows, step):
        part = slice(start, start + step)
        z = logits[: x[part].shape[0]]
        if bias is None:
            torch.mm(x[part], weight.t(), out=z)
        else:
            torch.addmm(bias, x[part], weight.t(), out=z)
        by = scale[part] if scale is not None and scale.dim() else scale
        sweep(z, target[part], None if losses is None else losses[part], lse[part], z if any(wanted) else None, by, terms)
        if dx is not None:
            torch.mm(z, weight, out=dx[part])
        if add is not None:
            add(z, x[part], start == 0)
        if db is not None:
            db += z.sum(0, dtype=torch.float32)
    if wanted[1] and dw is None:
        dw = torch.zeros_like(weight)
    return [dx, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(x.dtype)]


def _inside(x: Tensor, scale: Tensor | None) -> Tensor | None:
    """What gradients made in the forward pass are scaled by there: in the kernel it costs nothing, in torch another sweep."""
    if _kernel(x) is None:
        return None
    return torch.ones((), dtype=torch.float32, device=x.device) if scale is None else scale


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917  # a node takes what it is given
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, count: Tensor | None, terms: Terms, by_row: bool,
        workspace: int | None,
    ) -> Tensor:  # fmt: skip
        target = target.contiguous()
        losses = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
        lse = torch.empty_like(losses)
        ctx.later = by_row or x.dtype is torch.float16
        wanted = (False,) * 3 if ctx.later else ctx.needs_input_grad[:3]
        scale = None if count is None else count.clamp(min=1.0).reciprocal()  # no row that counts: gradients of zero, as torch gives
        ctx.made = _pieces(x, weight, bias, target, terms, workspace, losses, lse, _inside(x, scale), wanted)
        ctx.save_for_backward(x, weight, bias, target, scale, lse)
        ctx.terms, ctx.workspace = terms, workspace
        if by_row:
            return losses
        return losses.sum() if count is None else losses.sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, target, scale, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        rest = (None,) * 5
        if torch.is_grad_enabled():  # `create_graph=True`: the formula, which has a history
            held = [t for t, w in zip((x, weight, bias), wanted, strict=True) if w]
            rows = formula(F.linear(x, weight, bias), target, ctx.terms)
            by = grad if scale is None else grad * scale
            found = iter(torch.autograd.grad(rows, held, by.expand_as(rows), create_graph=True))
            return *(next(found) if w else None for w in wanted), *rest
        again = (x, weight, bias, target, ctx.terms, ctx.workspace, None)
        if ctx.later:
            by = grad if scale is None else grad * scale
            return *_pieces(*again, lse, by.float().contiguous(), wanted), *rest
        made, ctx.made = ctx.made, None
        if made is None:
            made = _pieces(*again, lse, _inside(x, scale), wanted)
        kernel = _kernel(x)
        if kernel is not None:
            return *(None if t is None else kernel.scaled(t, grad) for t in made), *rest
        grad = grad if scale is None else grad * scale
        return *(None if t is None else t.mul_(grad) for t in made), *rest
