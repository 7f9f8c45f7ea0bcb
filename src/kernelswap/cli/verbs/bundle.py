"""`kernelswap bundle`: one file with the kernels of a model, for machines without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import session
from ..output import Answer, plain, progress
from .explain import where

PANEL = "Models"


def command(
    file: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", metavar="FILE")],
    model: Annotated[
        str | None, typer.Argument(help="A model's id on the hub, or its directory.", metavar="[MODEL]", show_default=False)
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option("--kernel", help="A kernel beside those of the table, such as org/kernel@1. Repeatable.", metavar="SPEC"),
    ] = None,
    machine: Annotated[
        list[str] | None,
        typer.Option(
            "--machine", help="Where it will be used: torch=2.14,cuda=13.2,sm=120. Repeatable; default: here.", metavar="FACTS"
        ),
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="The kernels of the default table that are on the hub, too.")] = False,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Write one file with every kernel that may serve a model, its evidence, verdicts and lock. --bundle FILE uses it.

    For other machines, nothing is loaded here: all candidates go in, and are proved there. For this one, the model is swapped
    and called once, so that verdicts go along. What comes with kernelswap is not in the file, unless it was compiled here.
    """
    from ... import bundling
    from ...provider import Terms

    if model is None and not kernel:
        raise KernelSwapError("neither a model nor a kernel is named", todo="name a model, or kernels with --kernel")
    with progress(quiet=as_json) as tell:
        wanted = bundling.Wanted(specs=tuple(kernel or ()), machines=tuple(machine or ()), hub=hub)
        if model is not None:
            wanted = _with_model(wanted, model, offline=offline)
        swapper = session.swapper(cache=cache, offline=offline)
        written = bundling.write(file, swapper, wanted, Terms("wait", progress=tell))
    about = written.about
    verdicts = len(about.verdicts.get("verdicts", ()))
    data: dict[str, Any] = {
        "file": str(file),
        "sha256": written.sha256,
        "bytes": file.stat().st_size,
        "machines": list(about.machines),
        "kernels": list(about.kernels),
        "verdicts": verdicts,
        "left_out": [{"what": what, "why": why} for what, why in written.left_out],
    }
    lines = [
        *(f"{k['spec']}: {k['variant']} at {k['commit'][:12]}" for k in about.kernels),
        *(f"left out: {what}: {why}" for what, why in written.left_out),
        f"wrote {file}, {_size(data['bytes'])}: {_count(len(about.kernels), 'kernel')}, {_count(verdicts, 'verdict')}",
        f"for {'; '.join(about.machines)}",
        f"sha256 {written.sha256}",
        f"next: on the other machine, `kernelswap explain MODEL --bundle {file.name}`, or Swapper(bundle=...)",
    ]
    return Answer(data, plain("\n".join(lines)))


def _with_model(wanted: Any, model: str, *, offline: bool) -> Any:
    from dataclasses import replace

    from ...bench import subject

    loaded = subject.load(model, device=where(None), dtype="auto", offline=offline)
    return replace(wanted, model=loaded.model, name=model, exercise=loaded.forward)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _size(n: int) -> str:
    return f"{n / 1024:.0f} KiB" if n < 1 << 20 else f"{n / (1 << 20):.1f} MiB"
