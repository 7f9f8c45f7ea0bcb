"""`kernelswap mirror`: kernels of the hub into a folder that serves as a source."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import session
from ..output import Answer, plain, progress

PANEL = "Kernels"


def command(
    folder: Annotated[Path, typer.Argument(help="The folder to write into; what is in it stays.", metavar="DIR")],
    specs: Annotated[list[str], typer.Argument(help="The kernels, as in org/kernel@1.", metavar="SPEC...")],
    variant: Annotated[
        str, typer.Option("--variant", help="Only the builds that this glob names, such as *-cu128-x86_64-linux.", metavar="GLOB")
    ] = "*",
    cache: session.Cache = None,
    as_json: bool = False,
) -> Answer:
    """Copy kernels, every build of them and what they depend on, into a folder that other machines use in the hub's place.

    They find it there as it is, behind any web server, or in a bucket: order = ["https://...", "hub"] below [sources] in
    kernelswap.toml, or KERNELSWAP_SOURCES. Nothing is imported.
    """
    from ... import spec
    from ...sources.mirror import Mirror

    swapper, mirror, rows = session.swapper(cache=cache), Mirror(folder), list[dict[str, Any]]()
    builds = re.compile(fnmatch.translate(variant))
    with progress(quiet=as_json) as tell:
        for text in specs:
            for found in mirror.add(swapper.sources["hub"], spec.parse(text), builds, progress=tell):
                rows.append({"name": found.name, "commit": found.commit, "variant": found.variant})
    lines = [f"{row['name']} {row['commit'][:12]} {row['variant']}" for row in rows]
    data = {"folder": str(folder), "builds": rows}
    return Answer(data, plain("\n".join([*lines, f"{len(rows)} builds in {folder}"])))
