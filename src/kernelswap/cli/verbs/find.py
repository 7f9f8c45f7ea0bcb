"""`kernelswap find`: which build of a kernel would run here, and why each other one would not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .. import exits, session
from ..output import Answer

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Kernels"


def command(
    spec: Annotated[str, typer.Argument(help="[source://]name[@version][:Layer]", metavar="SPEC")],
    machine: session.MachineText = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
    bundle: session.Bundle = None,
) -> Answer:
    """Say which build of a kernel fits this machine (or another), and why each other does not.

    Nothing is fetched but lists and one small file per build that is considered. Exit code 1: no build fits.
    """
    from ... import render

    resolution = session.swapper(cache=cache, offline=offline, bundle=bundle, machine=machine).find(spec)
    code = exits.OK if resolution.chosen is not None else exits.NO

    def text(out: Console) -> None:
        from ..views import resolution as show

        show(resolution, out)

    return Answer(render.resolution_json(resolution), text, code)
