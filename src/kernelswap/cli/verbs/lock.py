"""`kernelswap lock`: pin what a project asks for, commits and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import session
from ..output import Answer, plain, progress
from .explain import where

PANEL = "Kernels"


def command(
    project: Annotated[Path, typer.Argument(help="The directory of pyproject.toml.", metavar="[DIR]")] = Path(),
    model: Annotated[
        str | None,
        typer.Option("--model", help="Lock what would serve this model (an id on the hub, or a directory).", metavar="MODEL"),
    ] = None,
    hub: Annotated[
        bool, typer.Option("--hub", help="With --model: kernels of the table that are on the hub may serve, too.")
    ] = False,
    update: Annotated[bool, typer.Option("--update", help="Look everything up anew; else what is locked stays.")] = False,
    cache: session.Cache = None,
    as_json: bool = False,
) -> Answer:
    """Pin the kernels of [tool.kernels.dependencies], their commits and the digest of every file of every build.

    Writes kernels.lock, which other loaders read, and kernelswap.lock, with the digests; says what changed. Commit both.
    With --model: the kernels that serve that model, those of the default table included, into kernelswap.lock in its directory,
    or in DIR for a model of the hub. What is replaced is kept: `kernelswap lock-rollback` brings it back.
    """
    from ... import lock as locks
    from ... import locking

    if model is not None and project == Path() and Path(model).is_dir():
        project = Path(model)
    if not project.is_dir():
        raise KernelSwapError(f"there is no directory {project}", todo="Name that of a project, or of a model.")
    former = locking.former(project)
    kept = None if update else former
    swapper = session.swapper(cache=cache, locked=kept if model is not None else None)
    with progress(quiet=as_json) as tell:
        if model is not None:
            from ...bench import subject

            loaded = subject.load(model, device=where(None), dtype="auto", offline=False, runs=False)
            outcomes = swapper.plan(loaded.model, hub=hub, build="wait", progress=tell)
            made = locking.of_model(outcomes, kept)
        else:
            made = locking.make(swapper.sources["hub"], locking.asked(project), former=kept, progress=tell)
    changes = locks.diff(former or locks.Lock(), made)
    written = locking.write(made, project, theirs=model is None, cache=swapper.store.cache)
    files = [str(path) for path in written]
    entries: list[dict[str, Any]] = [
        {"spec": e.asked, "commit": e.commit, "builds": [b.variant for b in e.builds]} for e in made.entries
    ]
    lines = [*(changes or ["nothing changed"]), f"wrote {' and '.join(files)}"]
    return Answer({"files": files, "changes": changes, "entries": entries}, plain("\n".join(lines)))
