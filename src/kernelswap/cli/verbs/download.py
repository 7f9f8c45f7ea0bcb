"""`kernelswap download`: fetch what a project's lock names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import session
from ..output import Answer, plain, progress

PANEL = "Kernels"


def command(
    project: Annotated[Path, typer.Argument(help="The directory of the lock.", metavar="[DIR]")] = Path(),
    all_variants: Annotated[bool, typer.Option("--all-variants", help="Every build, for other machines too.")] = False,
    cache: session.Cache = None,
    as_json: bool = False,
) -> Answer:
    """Fetch and verify the kernels that a project's lock names, so that they load offline. Nothing is imported."""
    from ... import locking
    from ...compat import state

    lock = locking.former(project)
    if lock is None:
        raise KernelSwapError(
            f"there is no {locking.THEIRS} or {locking.OURS} in {project}", todo=f"`kernelswap lock {project}` writes them"
        )
    state.use(session.swapper(cache=cache))
    swapper = state.varied(lock=lock)
    rows: list[dict[str, Any]] = []
    with progress(quiet=as_json) as tell:
        for number, entry in enumerate(lock.entries):
            tell("fetching", number, len(lock.entries))
            builds = [swapper.artifact(entry.asked).candidate.variant]
            if all_variants:
                builds = locking.fetch_all(swapper.sources["hub"], entry)
            rows.append({"spec": entry.asked, "commit": entry.commit, "builds": builds})
        tell("fetching", len(lock.entries), len(lock.entries))
    lines = [f"{row['spec']} at {row['commit'][:12]}: {', '.join(row['builds'])}" for row in rows]
    return Answer({"kernels": rows}, plain("\n".join(lines) or "the lock names no kernel"))
