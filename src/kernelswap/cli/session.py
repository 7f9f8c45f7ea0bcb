"""The one place where the command line makes a Swapper, and the options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import KernelSwapError

if TYPE_CHECKING:
    from ..api import Swapper
    from ..lock import Lock
    from ..types import Machine

Cache = Annotated[
    Path | None, typer.Option("--cache", help="Where verified kernels are kept, instead of the user's cache.", metavar="DIR")
]
Offline = Annotated[bool, typer.Option("--offline", help="Use what was fetched before; ask no server.")]
Bundle = Annotated[
    Path | None,
    typer.Option("--bundle", help="Take kernels from this file of `kernelswap bundle`, and open no socket.", metavar="FILE"),
]
MachineText = Annotated[
    str | None,
    typer.Option("--machine", help="Another machine to answer for: torch=2.14,cuda=13.2,sm=120.", metavar="FACTS"),
]
Use = Annotated[
    list[str] | None,
    typer.Option(
        "--use", help="A kernel of your own for a layer: RMSNorm=dir:///path:RMSNorm. Repeatable.", metavar="LAYER=SPEC"
    ),
]
Attention = Annotated[bool, typer.Option("--attention", help="The model's attention, too, as swap(attention=True) switches it.")]


def swapper(
    *,
    cache: Path | None = None,
    offline: bool = False,
    machine: str | None = None,
    locked: Lock | None = None,
    bundle: Path | None = None,
) -> Swapper:
    """A Swapper of this call's options. What `locked` names is found at its commit; what it does not name, as ever."""
    from ..api import Swapper

    made = Swapper(cache=cache, offline=offline, machine=machine_of(machine), bundle=bundle)
    if locked is not None and "hub" in made.sources:
        from ..sources.pinned import Pinned

        made.sources["hub"] = Pinned(made.sources["hub"], locked, strict=False)
    return made


def machine_of(text: str | None) -> Machine | None:
    """This machine with what `text` says otherwise; `None` where it says nothing.

    Raises:
        KernelSwapError: `text` does not parse.
    """
    if not text:
        return None
    from .. import machine

    return machine.override(machine.look(), text)


def cache_of(cache: Path | None) -> Path:
    """The cache of this call's options; nothing heavy is imported."""
    import os

    from ..sources.environment import Environment

    return cache or Environment.read(os.environ).cache


def moment(seconds: float) -> str:
    """A time since 1970 as local time, to the second."""
    import datetime as dt

    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc).astimezone().isoformat(" ", "seconds")


def table(use: list[str] | None) -> dict[str, list[str]] | None:
    """`["RMSNorm=org/a:X", ...]` as a table; several for one layer are tried in order.

    Raises:
        KernelSwapError: an entry is not LAYER=SPEC.
    """
    found: dict[str, list[str]] = {}
    for text in use or ():
        layer, sign, spec = text.partition("=")
        if not (sign and layer and spec):
            raise KernelSwapError(f"{text!r} is not LAYER=SPEC", todo="Write --use RMSNorm=org/kernel@1:RMSNorm, say.")
        found.setdefault(layer, []).append(spec)
    return found or None
