"""The one place where the command line makes a Swapper, and the options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..api import Swapper
    from ..types import Machine

Cache = Annotated[
    Path | None, typer.Option("--cache", help="Where verified kernels are kept, instead of the user's cache.", metavar="DIR")
]
Offline = Annotated[bool, typer.Option("--offline", help="Use what was fetched before; ask no server.")]
MachineText = Annotated[
    str | None,
    typer.Option("--machine", help="Another machine to answer for: torch=2.14,cuda=13.2,sm=120.", metavar="FACTS"),
]


def swapper(*, cache: Path | None = None, offline: bool = False, machine: str | None = None) -> Swapper:
    """A Swapper of this call's options."""
    from ..api import Swapper

    return Swapper(cache=cache, offline=offline, machine=machine_of(machine))


def machine_of(text: str | None) -> Machine | None:
    """This machine with what `text` says otherwise; `None` where it says nothing.

    Raises:
        KernelSwapError: `text` does not parse.
    """
    if not text:
        return None
    from .. import machine

    return machine.override(machine.look(), text)
