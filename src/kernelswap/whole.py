"""What is decided for a model as a whole: what computes its attention, and whether its decode steps are replayed. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import KernelSwapError, Tampered
from .slots import attention
from .types import Implementation, Outcome, Swap, Unasked

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


def outcomes(
    model: nn.Module,
    planned: Sequence[Outcome],
    wanted: Wanted,
    provide: Callable[[str, str], Implementation],
    differs: Differs,
) -> tuple[Outcome, ...]:
    """One for the steps, if graphs are wanted, and one for each attention setting, if that is.

    Args:
        model: any module.
        planned: for what is in it, and for itself.
        wanted: see there.
        provide: `provide(spec, device)`, or any `KernelSwapError`.
        differs: compares a replay with the step itself.

    Raises:
        Tampered: bytes of a kernel differ from what was verified before.
    """
    off = f"kernels are switched off: {wanted.off}" if wanted.off is not None else ""

    def kernel(text: str, device: str) -> Implementation | str:
        try:
            return off or provide(text, device)
        except Tampered:
            raise
        except KernelSwapError as e:
            return e.reason

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
        found += attention.outcomes(model, kernel, replacing=wanted.replacing, unasked=unasked)
    return tuple(found)
