"""Check a model's kernels ahead of time: every size of call, on the model's own tensors, with gradients where asked."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .. import spec
from ..apply import apply
from ..proof import keys
from ..types import Kept, Machine, Outcome

if TYPE_CHECKING:
    from ..proof.ledger import Entry, Ledger
    from ..types import Progress
    from .subject import Subject

SIZES = (1, 13, 199)
"""Tokens of shortened calls: one for each bucket of rows (`proof.keys.SIZES`) below the whole input's."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of it."""

    outcomes: tuple[Outcome, ...]
    """As they stand after the run."""
    entries: tuple[Entry, ...]
    """Every question that was asked, in order."""
    refused: tuple[tuple[str, str, str], ...]
    """`(path, layer, reason)`: a real call refused the kernel; or a proof did, and no other candidate serves the site, or the
    kernel had been named."""

    @property
    def done(self) -> int:
        """Checks on real tensors that ran now."""
        return sum(e.tensors != "random" and not e.known for e in self.entries)


def check(
    subject: Subject,
    outcomes: Sequence[Outcome],
    ledger: Ledger,
    machine: Machine,
    *,
    training: bool = False,
    named: Collection[str] = (),
    progress: Progress | None = None,
) -> Checked:
    """Run the swapped model on its inputs and on shortened ones, `ledger` looking on. The model is as it was afterwards.

    `outcomes` are of a plan made with the same ledger, `named` are specs that whoever asks wants to know about. What it finds it leaves in its store: a later start with calls of
    these sizes, dtypes and layouts pays nothing.
    """
    tell = progress or (lambda *_: None)
    applied = apply(subject.model, outcomes, ledger, check="always", machine=machine)  # every call: each bucket is met
    try:
        given = list(_shortened(subject.inputs))
        steps = 2 * len(given) if training else len(given)
        for done, inputs in enumerate(given):
            tell("checking on the model's own tensors", done, steps)
            with torch.no_grad():
                subject.model(**inputs)
        if subject.kind == "causal":
            subject.generate(2)  # a step with a cache has a layout of its own
        if training:
            with _training(subject.model):
                for done, inputs in enumerate(given, len(given)):
                    tell("checking on the model's own tensors", done, steps)
                    _step(subject, inputs)
        tell("checking on the model's own tensors", steps, steps)
        refused = [(site.path, site.layer, why) for site, why in applied.refusals]
        now = applied.outcomes
    finally:
        applied.undo()
    theirs = {(r.name, r.layer) for r in map(spec.parse, named)}
    kept = {(o.site.path, o.site.layer) for o in outcomes if isinstance(o, Kept)}
    refused += [
        (e.site.path, e.site.layer, f"{e.kernel}: {e.verdict.reason}")
        for e in ledger.entries
        if not e.verdict.accepted and e.tensors == "random" and ((e.site.path, e.site.layer) in kept or e.asked in theirs)
    ]
    return Checked(now, tuple(ledger.entries), tuple(dict.fromkeys(refused)))


def _shortened(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The first tokens of the first sequence, one call for each bucket of `SIZES` below that of all of it; then all of it."""
    held = [t for t in inputs.values() if isinstance(t, torch.Tensor)]
    if held and len(held) == len(inputs) and len({t.shape for t in held}) == 1 and held[0].ndim == 2:
        seen = {keys.size_of(held[0].numel())}
        for size in SIZES:
            tokens = min(size, held[0].shape[1])
            if (bucket := keys.size_of(tokens)) not in seen:
                seen.add(bucket)
                yield {name: t[:1, :tokens].contiguous() for name, t in inputs.items()}
    yield inputs


def _step(subject: Subject, inputs: dict[str, Any]) -> None:
    """A forward and a backward; gradients are dropped."""
    with torch.enable_grad():
        output = subject.model(**inputs)[0]
        output.float().square().mean().backward()
    subject.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _training(model: torch.nn.Module) -> Iterator[None]:
    """Training mode, and afterwards each module's own mode and each parameter's own gradient again."""
    modes = [(module, module.training) for module in model.modules()]
    grads = [(p, p.grad) for p in model.parameters()]
    for parameter, _ in grads:
        parameter.grad = None
    try:
        model.train()
        yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for module, mode in modes:
            if module.training is not mode:
                module.training = mode
