"""`kernelswap lock`: pin what a project asks for, commits and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
    update: Annotated[bool, typer.Option("--update", help="Look everything up anew; else what is locked stays.")] = False,
    cache: session.Cache = None,
    as_json: bool = False,
) -> Answer:
    """Pin the kernels of [tool.kernels.dependencies], their commits and the digest of every file of every build.

    Writes kernels.lock, which other loaders read, and kernelswap.lock, with the digests; says what changed. Commit both.
    With --model: the kernels that serve that model, those of the default table included, into kernelswap.lock in its directory,
    or in DIR for a model of the hub.
    """
    from ... import lock as locks
    from ...compat import writing

    if model is not None and project == Path() and Path(model).is_dir():
        project = Path(model)
    former = writing.former(project)
    swapper = session.swapper(cache=cache)
    with progress(quiet=as_json) as tell:
        if model is not None:
            from ...bench import subject

            loaded = subject.load(model, device=where(None), dtype="auto", offline=False)
            outcomes = swapper.plan(loaded.model, build="wait", progress=tell)
            made = writing.of_model(outcomes, None if update else former)
        else:
            made = writing.make(swapper, writing.asked(project), former=None if update else former, progress=tell)
    changes = locks.diff(former or locks.Lock(), made)
    files = [str(path) for path in writing.write(made, project, theirs=model is None)]
    entries: list[dict[str, Any]] = [
        {"spec": e.asked, "commit": e.commit, "builds": [b.variant for b in e.builds]} for e in made.entries
    ]
    lines = [*(changes or ["nothing changed"]), f"wrote {' and '.join(files)}"]
    return Answer({"files": files, "changes": changes, "entries": entries}, plain("\n".join(lines)))
