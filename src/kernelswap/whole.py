"""What is decided for a model as a whole: what computes its attention, and whether its decode steps are replayed. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from . import sites, table
from .errors import KernelSwapError, Refused, Tampered
from .slots import attention, attention_kernels
from .types import Choice, Chooser, Implementation, Machine, Outcome, Run, Site, Swap, Unasked, Use, Verdict

if TYPE_CHECKING:
    import torch.nn as nn

    from .replay.replays import Differs


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the caller asks for."""

    attention: bool | Unasked | None = None
    """`None`: with graphs, where those are captured."""
    graphs: bool = False
    replacing: bool = False
    """A swap of ours is going to be undone first."""
    off: str | None = None
    """Why kernels are switched off, if they are."""
    prefer: Mapping[str, Sequence[Use]] = field(default_factory=dict)
    """Glob to what is tried first there."""
    named: Collection[str] = ()
    """Specs that the user wrote: a verifier that refuses one of them raises."""
    chooser: Chooser | None = None
    """Picks among all kernels that may serve; `None`: the first one does."""
    runs: Mapping[bool, Run | None] = field(default_factory=lambda: {False: Run(), True: Run(training=True)})
    """What a kernel must be able to do, by the `training` of the model; None: nothing is asked for."""

    def uses(self, site: Site) -> Sequence[Use]:
        """What may serve, in order."""
        row = site.row
        first = [use for glob, given in self.prefer.items() if sites.named_by(glob, site) for use in given]
        taken = {use.spec for use in first}
        return [*first, *(u for u in (*row.use, *(row.rivals if self.chooser else ())) if u.spec not in taken)]

    def choose(
        self,
        site: Site,
        part: nn.Module,
        original: Callable[..., Any],
        kernels: Sequence[tuple[str, Implementation | str]],
        *,
        training: bool,
    ) -> Choice:
        """As `attention.Choose`."""
        run = self.runs[training]
        if run is None:
            return Choice(None, ((site.layer, "was not asked for in this mode"),))
        able = [(spec, one if isinstance(one, str) else one.cannot(run) or one) for spec, one in kernels]
        passed = tuple((spec, one) for spec, one in able if isinstance(one, str))
        accepted = [(spec, one, _ON_REAL_CALLS) for spec, one in able if not isinstance(one, str)]
        if self.chooser is None:
            return Choice(accepted[0][1], passed, _ON_REAL_CALLS) if accepted else Choice(None, passed)
        choice = self.chooser.choose(site, part, original, accepted, run)
        return replace(choice, passed=(*passed, *choice.passed))


_ON_REAL_CALLS = Verdict(accepted=True, reason="to be proved on its first real calls")


def outcomes(
    model: nn.Module,
    planned: Sequence[Outcome],
    wanted: Wanted,
    machine: Machine,
    provide: Callable[[str, str], Implementation],
    differs: Differs,
) -> tuple[Outcome, ...]:
    """One for the steps, if graphs are wanted, and one for each attention setting, if that is.

    Args:
        model: any module.
        planned: for what is in it, and for itself.
        wanted: see there.
        machine: what the kernels are for.
        provide: `provide(spec, device)`, or any `KernelSwapError`.
        differs: compares a replay with the step itself.

    Raises:
        Tampered: bytes of a kernel differ from what was verified before.
        Refused: a kernel that the user named was refused by a verifier.
    """
    off = f"kernels are switched off: {wanted.off}" if wanted.off is not None else ""

    def kernel(text: str, device: str) -> Implementation | str:
        try:
            return off or provide(text, device)
        except Tampered:
            raise
        except KernelSwapError as e:
            if isinstance(e, Refused) and text in wanted.named:
                raise
            return e.reason

    def offered(site: Site) -> list[tuple[str, Implementation | str]]:
        """Kernels for attention, up to the first that may serve, or, where somebody chooses among them, all."""
        found: list[tuple[str, Implementation | str]] = []
        for use in wanted.uses(site):
            one = table.misfit(use, site.device, machine) or kernel(use.spec, site.device)
            found.append((use.spec, attention_kernels.understood(one) if isinstance(one, Implementation) else one))
            if wanted.chooser is None and not isinstance(found[-1][1], str):
                break
        return found

    found: list[Outcome] = []
    with_attention = wanted.attention
    if wanted.graphs:
        from .replay import site  # needs torch when it is imported; this file must not

        taken = any(isinstance(o, Swap) and not o.site.path for o in planned)
        device = next((p.device for p in model.parameters()), None)
        writes = kernel("kernelswap/attention:append_token", str(device)) if device is not None and device.type == "cuda" else ""
        append = None if isinstance(writes, str) else writes.forward
        found.append(site.outcome(model, differs, append=append, taken=taken, replacing=wanted.replacing, off=off))
        with_attention = isinstance(found[0], Swap) if with_attention is None else with_attention
    if with_attention:
        unasked = with_attention if isinstance(with_attention, Unasked) else None
        found += attention.outcomes(model, offered, wanted.choose, replacing=wanted.replacing, unasked=unasked)
    return tuple(found)
