"""A real call of a kernel that random tensors have accepted already, for about one forward of the original.

What random tensors proved before the swap (odd shapes, gaps, memory, leaks, randomness, gradients in all the ways they are asked
for) is not proved again. What only the user's own tensors can show is: whether the numbers are right for them, at their size.

* The original runs once at full size; the kernel's run at full size is the answer. It gets copies of the inputs, so that
  a kernel that writes to them finds nothing of the user's.
* The rows in which the two differ most, and some more, are held against float64 by the usual limits.
* The same rows, alone, with gaps and in the sizes that this call is not of, must give what they gave in it.

In training the call is made with gradients by both, up to `PART` elements; everything that comes out is compared between the two,
and `3 * FEW` rows with float64. Modules with many weights meet float64 only in calls of so many rows that it costs no more
than the call; in smaller ones float64 is asked only where the two differ by more than their roundings.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..types import Verdict
from . import calls, inputs, keys, memory, real, trial
from .agree import Differs, Result, same, structure
from .real import BOTH, OTHERS, PART, WHOLE, Real, accepted, refused
from .reference import Reference, tensors, twin
from .tolerance import TOLERANCES, compare

FEW = 16  # rows each by absolute difference, by relative difference, and evenly spaced; 4 where they are wide or weights many
LOOKED_AT = 1 << 16  # elements of them
BLOCK = 1 << 17  # elements compared at a time, on a CPU
SMALL = 1 << 19  # elements of a derived call
MANY_WEIGHTS, WORTH = 1 << 18, 512  # weights; rows of a call from which on float64 weights cost no more than it
GAPS = 13  # rows of the derived call that has gaps between them: prime, and beyond one vector register

Aside = Callable[..., AbstractContextManager[None]]
"""`aside(small=...)`: out of sight of the caller's state, and one check at a time; `small`: nothing in it is worth threads."""


def answer(call: Real, aside: Aside) -> tuple[Any, Verdict, bool] | None:
    """The output, the verdict, and whether that holds tomorrow. None: this call has to be looked at in the thorough way.

    The output is the kernel's, in the caller's autograd mode; the original's when refused.
    """
    n = real.positions(call.site.row.probe, call.leaves, call.dim)
    if n < 1 or call.size > WHOLE or call.site.row.probe == "head" or call.untestable() is not None:
        return None
    if call.module is not None and not real.can_copy(call.module):
        return None
    return _Quick(call, n, aside).answer()


class _Quick:
    def __init__(self, call: Real, n: int, aside: Aside) -> None:
        self.call, self.n, self.aside = call, n, aside
        self.module = None if call.module is None else twin(call.module, _shared)
        held = {} if self.module is None else tensors(self.module)
        self.heavy = sum(t.numel() for t in held.values()) > MANY_WEIGHTS
        self.owned = [*call.held, *held.values()]
        self.sums = call.site.row.probe in real.SUMMED
        self.errors = trial.Errors()
        self.case = "this call"
        call.ask(self.module)

    def answer(self) -> tuple[Any, Verdict, bool] | None:
        call, original = self.call, None
        try:
            with self.aside(small=False):
                if call.want is not None:
                    self.with_gradients()
                if call.want is None or call.size > PART:
                    original = self.by_original()
                    if original is None:
                        return None
            # with gradients what is returned belongs to the caller's graph, and inputs were looked after above
            given = call.leaves if call.want is not None else [real.own(v) for v in call.leaves]
            before = memory.states(call.device)
            output, verdict = call.by_kernel(accepted(self.errors), given)
            if not verdict.accepted:  # it raised
                return output, verdict, "OutOfMemory" not in verdict.reason
            if original is not None:
                self.drew_nothing(before)
                with self.aside(small=not self.heavy):
                    self.judge(output, original, given)
        except Differs as e:
            return call.by_original(), refused(e, self.errors, self.case), e.lasting
        except trial.Skip:
            return None
        except torch.OutOfMemoryError:
            why = f"cannot be tested: the check ran out of memory on {self.case}"
            return call.by_original(), Verdict(accepted=False, reason=why), False
        return output, accepted(self.errors), True

    def by_original(self) -> Result | None:
        """At full size, without gradients; None where its outputs have no rows, or it draws random numbers."""
        call = self.call
        with torch.no_grad():
            result = calls.call(call.original, self.module, (call.args, call.kwargs), call.device)
        fine = all(t.dtype in TOLERANCES and self.rows_of(t) is not None for t in result.outputs)
        return result if fine and result.outputs and not result.drew else None

    def drew_nothing(self, before: list[Tensor]) -> None:
        """Since then; what was drawn is put back first."""
        if not memory.same_seed(self.call.device, before):
            memory.restore(self.call.device, before)
            raise Differs("draws random numbers, which the original does not: everything random after it would change")

    def judge(self, output: Any, original: Result, given: list[Any]) -> None:
        """What the kernel gave for the whole call, and then for parts of it."""
        call = self.call
        kernel = calls.result(pytree.tree_map_only(Tensor, Tensor.detach, output), drew=False)
        if call.want is None:
            self.unharmed(given)
        structure(kernel, original, [*self.owned, *(t for t in given if isinstance(t, Tensor))])
        rows = self.outstanding(kernel, original)
        with torch.no_grad():
            mine, theirs = ([self.picked(t, rows) for t in r.outputs] for r in (kernel, original))
            if self.heavy and self.n < WORTH and self.alike(mine, theirs):
                self.errors.reference = "the original itself: its many weights met float64 before the swap"
                return
            self.case = f"{len(rows)} of the {self.n} rows of this call"
            pair = self.pair()
            case = self.taken(self.case, rows)
            answer = trial.rejudge(pair, case, mine, self.errors)
            if not self.heavy:
                self.derived(pair, rows, mine, answer)

    def unharmed(self, given: list[Any]) -> None:
        """The kernel had copies: they must still be like what the user gave, in rows all over."""
        call = self.call
        index = torch.linspace(0, self.n - 1, min(self.n, 4 * FEW), dtype=torch.float64, device="cpu").long()
        leaves = [
            [v for v in real.take(call.site.row.probe, held, index, call.dim) or () if isinstance(v, Tensor)]
            for held in (call.leaves, given)
        ]
        for i, (mine, theirs) in enumerate(zip(*leaves, strict=True)):
            if not same([mine], [theirs]):
                labels = calls.names(call.original, call.args, call.kwargs, bound=call.module is not None)
                raise Differs(f"changes its input {labels[i]} in place")

    def outstanding(self, kernel: Result, original: Result, n: int | None = None) -> Tensor:
        """Rows in which the outputs differ most, and others, as many as `LOOKED_AT` allows; in order. `n`: how many there are."""
        n = self.n if n is None else n
        few = 4 if self.heavy else max(4, min(FEW, LOOKED_AT * self.n // max(1, 3 * self.call.size)))
        found = [torch.linspace(0, n - 1, min(few, n), dtype=torch.float64, device="cpu").long()]
        for k, o in zip(kernel.outputs, original.outputs, strict=True):
            a, b = self.rows_of(k.detach(), n), self.rows_of(o.detach(), n)
            if a is None or b is None:
                raise trial.Skip("an output has no rows of the call")
            found += [t.cpu() for t in _widest(a, b, few)]
        rows: Tensor = torch.cat(found).unique()  # type: ignore[no-untyped-call]  # torch's own
        return rows

    def alike(self, mine: list[Tensor], theirs: list[Tensor]) -> bool:
        """Whether these are as close to each other as two right ones are."""
        found = [compare(k, o, _wide(o), sums=self.sums, slack=BOTH) for k, o in zip(mine, theirs, strict=True)]
        return all(f.wrong is None for f in found)

    def derived(self, pair: trial.Pair, rows: Tensor, mine: list[Tensor], answer: list[Tensor]) -> None:
        """Rows of the call in calls of other sizes and layouts: what came out for them in the whole call, or as good."""
        few = torch.arange(GAPS, device="cpu") * len(rows) // GAPS
        wanted = [("its first row alone", torch.zeros(1, dtype=torch.long, device="cpu"), False)]
        wanted.append((f"{GAPS} of its rows, non-contiguous", few, True))
        wanted += [
            (
                f"{count} of its rows{', repeated' if count > len(rows) else ''}",
                torch.arange(count, device="cpu") % len(rows),
                False,
            )
            for count in OTHERS
            if keys.size_of(count) != keys.size_of(self.n) and count * (self.call.size // self.n) <= SMALL
        ]
        for what, index, gaps in wanted:
            self.case = what
            case = self.taken(what, rows[index], gaps=gaps)
            ask = functools.partial(calls.call, pair.candidate, pair.module, (case.args, case.kwargs), pair.device)
            got = calls.guarded(ask).outputs
            usual = [self.picked(t, index, taken=True) for t in mine]
            if len(got) == len(usual) and not same(got, [t.reshape(g.shape) for t, g in zip(usual, got, strict=True)]):
                expected = [self.picked(t, index, taken=True) for t in answer]
                for i, (k, o, r) in enumerate(zip(got, usual, expected, strict=True)):
                    found = compare(k, o.reshape(k.shape), r.reshape(k.shape), sums=self.sums, slack=BOTH)
                    if found.wrong is not None:
                        raise Differs(f"differs in {'output' if len(got) == 1 else f'output {i}'}, {found.wrong}")

    def with_gradients(self) -> None:
        """The call once by each with all its gradients; then few rows of it, by float64 too.

        Raises:
            Differs, Skip: as `trial.examine`.
        """
        call, pair = self.call, self.pair()
        most = max(1, min(self.n, PART // max(1, call.size // self.n)))
        whole = torch.linspace(0, self.n - 1, most, dtype=torch.float64, device="cpu").long()
        case = call.case("this call", [real.own(v) for v in call.leaves]) if most == self.n else self.taken("this call", whole)
        kernel, original = trial.against_original(pair, case, call.want, slack=BOTH, most=3 * FEW)
        if self.heavy and self.n < WORTH:
            return
        index = whole[self.outstanding(kernel, original, most)]
        self.case = f"{len(index)} of the {self.n} rows of this call"
        trial.glance(pair, self.taken(self.case, index), want=call.want, errors=self.errors)
        self.case = "this call"

    # -- parts of the call --

    def pair(self) -> trial.Pair:
        call = self.call
        if call.pair is None:
            reference = Reference(call.original, self.module, call.device)
            call.pair = trial.Pair(
                call.original, call.candidate.forward, self.module, reference, call.device, watched=not self.heavy
            )
        return call.pair

    def taken(self, what: str, rows: Tensor, *, gaps: bool = False) -> inputs.Case:
        """Rows of the call as a call.

        Raises:
            Skip: they cannot be had.
        """
        picked = self.call.taken(rows)
        if picked is None:
            raise trial.Skip("there are no rows to take from it")
        return self.call.case(what, [real.strided(v) for v in picked] if gaps else picked, counts=True)

    def rows_of(self, output: Tensor, n: int | None = None) -> Tensor | None:
        """An output with the rows, or positions, of the call in front, or of `n` of them; None where it has others."""
        n = self.n if n is None else n
        if self.call.site.row.probe in real.ROWWISE:
            rows = output.reshape(-1, output.shape[-1]) if output.ndim > 1 else output.reshape(1, -1)
            return rows if len(rows) == n else None
        return output.movedim(3 - self.call.dim, 0) if output.ndim == 4 and output.shape[3 - self.call.dim] == n else None

    def picked(self, output: Tensor, rows: Tensor, *, taken: bool = False) -> Tensor:
        """Those rows of an output, in the shape that a call of these rows alone gives. `taken`: the output is such a one."""
        index = rows.to(output.device)
        if self.call.site.row.probe not in real.ROWWISE:
            return output.detach().index_select(3 - self.call.dim, index)
        flat = output.detach() if taken else output.detach().reshape(-1, output.shape[-1])
        return flat[index]


def _widest(kernel: Tensor, original: Tensor, few: int) -> list[Tensor]:
    """Rows of the largest difference, and of the largest beside the row's own size.

    Five passes (norms of torch's take twenty), over blocks that a cache holds: fresh memory for all of it costs as much again.
    """
    step = max(1, BLOCK * len(original) // original.numel()) if original.device.type == "cpu" else len(original)
    parts = [_differences(k, o) for k, o in zip(kernel.split(step), original.split(step), strict=True)]  # type: ignore[no-untyped-call]  # torch leaves it untyped
    measures = (torch.cat(m) for m in zip(*parts, strict=True))
    return [m.topk(min(few, len(m))).indices for m in measures]


def _differences(kernel: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """The largest by row, and in relation to the row's largest element."""
    difference = (kernel - original).abs_().amax(-1).float()
    size = torch.maximum(original.amax(-1), -original.amin(-1)).float()
    one, other = (m.reshape(len(kernel), -1).nan_to_num(torch.inf).amax(1) for m in (difference, difference / (size + 1e-37)))
    return one, other


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type == "mps" else tensor.double()


def _shared(_: str, tensor: Tensor) -> Tensor:
    """The same memory: nothing of the user's is written to, and what the kernel writes to a weight was looked for before."""
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach()
    return nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)


__all__ = ["answer"]
