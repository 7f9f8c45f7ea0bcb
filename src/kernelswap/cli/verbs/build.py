"""`kernelswap build`: compile the bundled kernels, or a repository with sources."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import BuildFailed
from .. import session
from ..output import Answer, plain, progress

PANEL = "Kernels"


def command(
    directory: Annotated[
        Path | None, typer.Argument(help="A kernel repository with build.toml; without it, the bundled kernels.", metavar="[DIR]")
    ] = None,
    into: Annotated[
        Path | None, typer.Option("--into", help="Where build/VARIANT goes; default: DIR itself.", metavar="DIR")
    ] = None,
    cache: session.Cache = None,
    as_json: bool = False,
) -> Answer:
    """Compile kernels for this machine, unless exactly that was compiled before.

    The bundled kernels go into the cache; they are compiled on first use anyway, in the background.
    """
    from ... import build, machine

    here = machine.look()
    start = time.perf_counter()
    built: list[dict[str, Any]] = []
    with progress(quiet=as_json) as report:
        if directory is None:
            paths = session.swapper(cache=cache).build(progress=report)
            built += [{"variant": path.name, "path": str(path)} for path in paths]
        else:
            if not directory.is_dir():
                raise BuildFailed(f"there is no directory {directory}", todo="give the directory that holds build.toml")
            path = build.compile(directory, here, into or directory, progress=report)
            built.append({"variant": path.name, "path": str(path)})
    seconds = time.perf_counter() - start
    lines = [f"{b['variant']}: {b['path']}" for b in built] + [f"{seconds:.1f} s, {build.compiler() or 'no compiler'}"]
    return Answer({"built": built, "seconds": seconds, "compiler": build.compiler()}, plain("\n".join(lines)))
