"""`kernelswap versions`: which versions a kernel has, and which of them run here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...errors import KernelSwapError, UnknownKernel
from ...spec import parse
from .. import session
from ..output import Answer, plain

PANEL = "Kernels"


def command(
    name: Annotated[str, typer.Argument(help="org/repo", metavar="NAME")],
    machine: session.MachineText = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
) -> Answer:
    """List the versions of a kernel on the hub, newest last, with the build that would run here, or why none would."""
    from ...sources import configured

    if parse(name).source != "hub":
        raise UnknownKernel(
            "only kernels on a hub have versions to list",
            asked=f"the versions of {name}",
            todo=f"`kernelswap find {name}` says which builds there are.",
        )
    swapper = session.swapper(cache=cache, offline=offline, machine=machine)
    source = swapper.sources["hub"]
    refs: Any = getattr(configured.hub_of(source), "refs", None)  # also behind LOCAL_KERNELS, a lock, or mirrors
    if refs is None:
        raise KernelSwapError(f"{type(source).__name__} has no versions to list", todo="`kernelswap find NAME` says what it has")
    rows: list[dict[str, Any]] = []
    for version in sorted(refs(name).versions()):
        found = swapper.find(f"{name}@{version}")
        nearest = next((j.rejected for j in found.judged if j.rejected is not None), "it has no builds")
        chosen = found.chosen
        rows.append(
            {
                "version": version,
                "variant": chosen.variant if chosen else None,
                "why_not": None if chosen else nearest,
                "builds": [j.candidate.variant for j in found.judged],
            }
        )
    lines = [f"{name}@{row['version']}: {row['variant'] or 'no build fits: ' + row['why_not']}" for row in rows]
    return Answer({"name": name, "versions": rows}, plain("\n".join(lines) or f"{name} has no versions (branches v1, v2, ...)"))
