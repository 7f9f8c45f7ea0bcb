"""How wrong is too wrong: the one table of limits, and the errors that are held against it. Pure functions of tensors.

A kernel is not asked to be close to the original; it is asked to be as accurate as the original. Both are compared with a
float64 reference, per row (a row is the last dimension), in three ways, so that neither small rows nor single elements hide:

* `row`: norm of the difference over norm of the reference row;
* `element`: largest difference over the largest magnitude of the row;
* `relative`: largest difference over the element's own magnitude plus `share` of the row's largest; where the original itself
  is that accurate in every element, which sums are not.

The limit of each row is `factor` times the original's own error in that row (at least its median over the rows, so that an
original that happens to be exact somewhere sets no trap) plus a floor in units of the dtype's rounding, plus eight times what
the reference itself changes when the inputs move by one rounding of the arithmetic inside (`spread`): where the question is
ill-conditioned, no answer is held to more digits than the question has.

On inputs with independent rounding errors (`generic` cases) there is a fourth, much sharper one: `coherent`, the part of the
difference that lies along the reference. Rounding noise averages out there; an accumulation in bfloat16, or an eps of 1e-5 in
place of 1e-6, does not. With r = reference and errors r_i e_i, |e_i| <= u, that part is sum(r_i^2 e_i) / sum(r_i^2): its deviation
is sd(e) sqrt(sum(r_i^4)) / sum(r_i^2), and sd(e) is 0.42 u for one rounding of numbers of all sizes, 0.6 u for two. Fourth powers
make large elements count: of normal rows times a normal weight a ninth of the elements are as good as all.

The gradient of a matrix is looked at twice. A row of it adds up a few tokens, each rounded up to five times on the way back, and
where its terms cancel what is left of them is not small: single rows go to 6 u and beyond without a fault. All rows together stay
within 2.2 u, so the whole is held more tightly than each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SINGLE = 2.0**-24
"""Unit roundoff of float32: what 16-bit kernels compute with inside."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Limits for outputs of one dtype. Floors are in multiples of `unit`."""

    unit: float
    """Unit roundoff: half the distance from 1 to the next larger number."""
    inside: float
    """Unit roundoff of the arithmetic inside."""
    factor: float
    row: float
    element: float
    relative: float
    share: float
    coherent: float
    """Floor of the coherent error, absolute: what an approximate rsqrt or exp in hardware costs."""
    flush: float
    """Differences up to this size are the dtype's own granularity near zero."""


TOLERANCES: dict[torch.dtype, Tolerance] = {
    # share 1 for the wide ones: their arithmetic inside is no finer than their rounding, so elements are held to the row.
    torch.float64: Tolerance(2.0**-53, 2.0**-53, 4.0, 64.0, 128.0, 128.0, 1.0, 2.0**-46, 2.3e-308),
    torch.float32: Tolerance(SINGLE, SINGLE, 4.0, 16.0, 32.0, 32.0, 1.0, 2.0**-21, 1.2e-38),
    torch.float16: Tolerance(2.0**-11, SINGLE, 2.5, 2.0, 4.0, 4.0, 2.0**-7, 2.0**-18, 2.0**-22),
    torch.bfloat16: Tolerance(2.0**-8, SINGLE, 2.5, 2.0, 4.0, 4.0, 2.0**-9, 2.0**-18, 1.2e-38),
}

CONDITION = 8.0  # times the reference's own move under one rounding of its inputs
SUMS = 2.0  # floors of gradients: their formulas round more often, and every implementation has its own
ROW_OF_MATRIX = 2.0  # times that for one row of a matrix's gradient
WHOLE = 2.0  # times the original's own error: all of a matrix's gradient, over a floor of `row`
NOISE = 3.0  # times the deviation of rounding noise, in units u: five deviations of two roundings
LARGE, SOME = 1 << 18, 256  # elements, and rows, above which only outstanding rows are looked at in float64
SMALL = 1 << 14  # elements that are looked at in any case
LOUDEST = 0.98  # a reference beyond this share of the dtype's range may round to inf in one and not in the other


@dataclass(frozen=True, slots=True)
class Finding:
    """One tensor of a kernel compared with the original's. `wrong` is None when it is fine."""

    wrong: str | None
    original: float
    """Largest row error of the original."""
    kernel: float


def compare(  # noqa: PLR0913  # each option says one thing about the tensors, and a caller names those that hold
    kernel: Tensor,
    original: Tensor,
    reference: Tensor,
    *,
    moved: Tensor | None = None,
    generic: bool = False,
    gradient: bool = False,
    matrix: bool = False,
    sums: bool = False,
    level: float = 0.0,
    slack: float = 1.0,
    most: int = 0,
) -> Finding:
    """Hold `kernel` against `reference` by the yardstick of `original`.

    Shapes: all equal, any rank; a row is the last dimension. dtypes: kernel and original equal, reference float64 (or what
    the machine has). `moved` is the reference for inputs that are off by one rounding. A `gradient` is a sum, of a `matrix` over
    few tokens. `sums`: so is this output: where it cancels, an original may be accurate in every element by luck alone. Rows
    smaller than `level` times the usual row (root mean square) are held to that instead of to their own size; of a matrix, 1.
    `slack` multiplies the floors, for when the original has to be its own reference and shows no error of its own.
    `most`: rows to look at, those that stand out; else only of large tensors some are left out.
    """
    limits = TOLERANCES.get(original.dtype)
    if limits is None:
        return _exact(kernel, original)
    shape = _shape(original)
    if original.numel() == 0:
        return Finding(None, 0.0, 0.0)
    rows = _outstanding(kernel.reshape(-1, shape[-1]), original.reshape(-1, shape[-1]), most)
    k, o, r = (_rows(t, shape, rows) for t in (kernel, original, reference))
    wrong = _nonfinite(k, o, r, torch.finfo(original.dtype).max, shape, rows)
    if wrong is not None:
        return Finding(wrong, 0.0, math.inf)
    fine = r.isfinite() & k.isfinite()
    r = torch.where(fine, r, 0.0)
    dk = _difference(k, r, fine, limits.flush)
    do = _difference(o, r, fine & o.isfinite(), limits.flush)
    s = torch.zeros_like(r) if moved is None else _difference(_rows(moved, shape, rows).nan_to_num(), r, fine, 0.0)
    ek, eo, es = _errors((dk, do, s), r, limits.share, 1.0 if matrix else level)
    largest = r.abs().amax(-1)  # beside a reference that is as good as zero any error is huge: judged, not told
    told = (largest > limits.unit * largest.amax()) & (largest > do.amax(-1))
    worst_original, worst_kernel = (float(e[0][told].amax()) if bool(told.any()) else 0.0 for e in (eo, ek))
    if gradient:
        if matrix and rows is None and (wrong := _whole(dk, do, s, r, limits, slack)) is not None:
            return Finding(wrong, worst_original, worst_kernel)
        slack *= SUMS * (ROW_OF_MATRIX if matrix else 1.0)
    floors = limits.row, limits.element, limits.relative
    for name, i in (("element", 1), ("row", 0), ("relative", 2)):
        if name == "relative" and (gradient or sums or slack > 1.0 or float(eo[i].max()) > limits.relative * limits.unit):
            # Sums cancel: the original promises nothing about single small elements either. As its own reference (slack) it
            # cannot say whether it does: of a rotation in bfloat16 it may say 0 where the right answer is not.
            continue
        usual = eo[i].median()
        limit = limits.factor * torch.maximum(eo[i], usual) + slack * floors[i] * limits.unit + CONDITION * es[i]
        over = ek[i] / limit
        at = int(over.nan_to_num(torch.inf).argmax())
        if not float(over[at]) <= 1.0:
            at_row = at if rows is None else int(rows[at])
            return Finding(_say(name, (at, at_row), shape, (ek[i], eo[i], limit), (dk, k, r)), worst_original, worst_kernel)
    if generic and rows is None and s.max() <= limits.unit * r.abs().max():
        wrong = _coherent(k, o, r, limits)
    return Finding(wrong, worst_original, worst_kernel)


# -- errors -------------------------------------------------------------------------------------------------------


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape) if tensor.ndim else (1,)


def _rows(tensor: Tensor, shape: tuple[int, ...], rows: Tensor | None) -> Tensor:
    held = tensor.detach().reshape(-1, shape[-1])
    return (held if rows is None else held[rows]).to(torch.float64 if tensor.device.type != "mps" else torch.float32)


def _outstanding(kernel: Tensor, original: Tensor, most: int = 0) -> Tensor | None:
    """Of a large tensor (a weight's gradient) the rows in which the two differ most, and some more; None for all.

    Wherever the kernel is wrong and the original is not, the two differ: nothing is missed.
    """
    if len(kernel) <= (most or 2 * SOME) or kernel.numel() <= (SMALL if most else LARGE):
        return None
    few = (most or SOME) // 4
    found = [torch.linspace(0, len(kernel) - 1, few, device=kernel.device).long()]
    if not torch.equal(kernel, original):
        difference, size = torch.sub(kernel.float(), original.float()).abs_(), original.float().abs()
        widest, largest = difference.amax(-1), size.amax(-1) + 1e-37
        if not bool(widest.isfinite().all() and largest.isfinite().all()):
            found.append(kernel.isfinite().ne(original.isfinite()).any(-1).nonzero()[:few, 0])
        measures = widest, widest / largest, difference.norm(dim=-1) / (size.norm(dim=-1) + 1e-37)
        found += [measure.nan_to_num(0.0, torch.inf).topk(few).indices for measure in measures]
    rows: Tensor = torch.cat(found).unique()  # type: ignore[no-untyped-call]  # torch's own
    return rows


def _difference(value: Tensor, reference: Tensor, where: Tensor, flush: float) -> Tensor:
    return torch.where(where, ((value - reference).abs() - flush).clamp_min(0), 0.0)


_Three = tuple[Tensor, Tensor, Tensor]


def _errors(differences: Sequence[Tensor], reference: Tensor, share: float, level: float) -> list[_Three]:
    """Row, element and relative error of each difference, of shape (rows,)."""
    tiny = 1e-300 if reference.dtype == torch.float64 else 1e-37
    size = reference.abs()
    norm, top = size.norm(dim=-1), size.amax(dim=-1)
    if reference.shape[-1] < 16:  # in a short row everything may cancel: its neighbours say what is small
        level = max(level, 0.1)
    if level:
        norm, top = (torch.maximum(t, level * t.square().mean().sqrt()) for t in (norm, top))
    norm, top, own = norm + tiny, top + tiny, size + share * top[:, None] + tiny
    return [(d.norm(dim=-1) / norm, d.amax(dim=-1) / top, (d / own).amax(dim=-1)) for d in differences]


def _whole(dk: Tensor, do: Tensor, s: Tensor, r: Tensor, limits: Tolerance, slack: float) -> str | None:
    size = float(r.norm())
    if not size:
        return None
    found, own, moved = (float(t.norm()) / size for t in (dk, do, s))
    limit = WHOLE * own + slack * limits.row * limits.unit + CONDITION * moved
    return None if found <= limit else f"all of it: error {found:.1e} (original {own:.1e}, limit {limit:.1e})"


def _coherent(k: Tensor, o: Tensor, r: Tensor, limits: Tolerance) -> str | None:
    rows, n = r.shape
    if n < 32 or rows < 8:
        return None
    power = (r * r).sum(-1)
    live = power > 0
    if int(live.sum()) < 8:
        return None
    k, o, r, power = k[live], o[live], r[live], power[live]
    along_k, along_o = ((d * r).sum(-1) / power for d in (k - r, o - r))
    noise = limits.unit / math.sqrt(n)
    limit = float(2.0 * along_o.square().mean().sqrt()) + 0.5 * noise + limits.coherent
    found = float(along_k.square().mean().sqrt())
    if found > limit:
        return (
            f"every row is off by a common factor: {found:.1e} along the reference "
            f"(original {float(along_o.square().mean().sqrt()):.1e}, limit {limit:.1e})"
        )
    share = power / power.sum()
    whole_k, whole_o = abs(float((along_k * share).sum())), abs(float((along_o * share).sum()))
    noise = limits.unit * float((r * r).norm() / power.sum())
    limit = 3.0 * whole_o + NOISE * noise + limits.coherent
    if whole_k > limit:
        return f"all is off by a common factor: {whole_k:.1e} along the reference (original {whole_o:.1e}, limit {limit:.1e})"
    return None


# -- what is no number --------------------------------------------------------------------------------------------


def _nonfinite(k: Tensor, o: Tensor, r: Tensor, largest: float, shape: tuple[int, ...], rows: Tensor | None) -> str | None:
    if bool(k.isfinite().all()) and bool(o.isfinite().all()):
        return None
    loud = r.abs() > LOUDEST * largest
    checks = (
        (k.isnan() & ~o.isnan() & ~r.isnan(), "NaN where the original has a number"),
        (k.isinf() & o.isfinite() & ~loud, "infinite where the original is finite"),
        (~k.isnan() & o.isnan() & r.isnan(), "hides a NaN that the original shows"),
        (k.isfinite() & o.isinf() & ~r.isfinite(), "finite where the original is infinite"),
        (k.isinf() & o.isinf() & (k.sign() != o.sign()), "infinite with the wrong sign"),
    )
    for where, what in checks:
        if bool(where.any()):
            row, column = divmod(int(where.flatten().int().argmax()), shape[-1])
            row = row if rows is None else int(rows[row])
            return (
                f"{what}: {int(where.sum())} of {where.numel()} elements, first at {_position(row * shape[-1] + column, shape)}"
            )
    return None


def _exact(kernel: Tensor, original: Tensor) -> Finding:
    """Integers and booleans have no rounding."""
    if torch.equal(kernel, original):
        return Finding(None, 0.0, 0.0)
    wrong = (kernel != original).flatten()
    where = _position(int(wrong.int().argmax()), _shape(original))
    return Finding(f"{int(wrong.sum())} of {wrong.numel()} elements differ, first at {where}", 0.0, math.inf)


# -- words --------------------------------------------------------------------------------------------------------


def _position(flat: int, shape: tuple[int, ...]) -> str:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return f"[{', '.join(map(str, reversed(index)))}]"


def _say(name: str, at: tuple[int, int], shape: tuple[int, ...], errors: _Three, held: _Three) -> str:
    """`at`: the row among those looked at, and in the tensor. `errors`: of the kernel, of the original, the limit, by row.
    `held`: the differences, the kernel's rows, the reference's.
    """
    found, original, limit = (float(e[at[0]]) for e in errors)
    numbers = f"error {found:.1e} (original {original:.1e}, limit {limit:.1e})"
    if name == "row":
        where = _position(at[1] * shape[-1], shape).rpartition(",")[0] + ", :]" if len(shape) > 1 else "[:]"
        return f"row {where}: {numbers}"
    difference, k, r = (t[at[0]] for t in held)
    column = int((difference if name == "element" else difference / (r.abs() + 1e-37)).argmax())
    where = _position(at[1] * shape[-1] + column, shape)
    return f"element {where} is {float(k[column]):.6g}, not {float(r[column]):.6g}: {numbers}"
