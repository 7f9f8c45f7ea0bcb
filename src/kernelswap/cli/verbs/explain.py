"""`kernelswap explain`: what would be served by what in a model, and why the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from ...types import Swap
from .. import exits, session
from ..output import Answer, progress

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Models"

Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps...; default: the first accelerator, else cpu.", metavar="DEVICE"),
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16, float16; auto: what the checkpoint has.", metavar="DTYPE")
]
Only = Annotated[
    list[str] | None,
    typer.Option("--only", help="Only sites that this glob names: a path, its end, a layer. Repeatable.", metavar="GLOB"),
]
Skip = Annotated[list[str] | None, typer.Option("--skip", help="Not the sites that this glob names. Repeatable.", metavar="GLOB")]


def command(
    model: Annotated[str, typer.Argument(help="A model's id on the hub, or its directory.", metavar="MODEL")],
    everything: Annotated[bool, typer.Option("--all", help="One block per module, not one line per kind.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    only: Only = None,
    skip: Skip = None,
    sbom: Annotated[
        Path | None,
        typer.Option("--sbom", help="Write the kernels that would serve as a bill of materials (CycloneDX 1.6).", metavar="FILE"),
    ] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Say what would serve each kind of site in a model, and why the others stay as they are.

    The model is loaded and nothing in it is changed; kernels are compiled and proved on random tensors, as for a swap.
    Exit code 1: nothing would be swapped.
    """
    from ... import render
    from ...bench import subject
    from ...sbom import bill

    with progress(quiet=as_json) as report:
        report("loading the model", 0, 0)
        loaded = subject.load(model, device=where(device), dtype=dtype, offline=offline)
        report("loading the model", 1, 1)
        options: dict[str, Any] = {"only": only, "skip": skip, "build": "wait", "progress": report}
        outcomes = session.swapper(cache=cache, offline=offline).plan(loaded.model, **options)
    swapped = sum(isinstance(o, Swap) for o in outcomes)
    if sbom is not None:
        _write(sbom, bill(outcomes, model=model))
    data = {"model": model, "sites": render.outcomes_json(outcomes), "swapped": swapped}

    def text(out: Console) -> None:
        if everything:
            out.print(render.outcomes(outcomes, long=True), markup=False, soft_wrap=True)
            return
        from ..views import outcomes as show

        if outcomes:
            show(outcomes, out)
        out.print(f"{swapped} of {len(outcomes)} sites would be swapped")

    return Answer(data, text, exits.OK if swapped else exits.NO)


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as e:
        raise KernelSwapError(f"{path} cannot be written: {e.strerror}", todo="Name another file for --sbom.") from e


def where(device: str | None) -> str:
    """The device asked for, else the first accelerator, else the CPU.

    Raises:
        KernelSwapError: torch does not have it here.
    """
    import torch

    if device is None:
        accelerator = getattr(torch, "accelerator", None)
        found = accelerator.current_accelerator() if accelerator is not None and accelerator.is_available() else None
        return found.type if found is not None else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise KernelSwapError(
            f"torch cannot use {device!r} here: {str(e).splitlines()[0]}", todo="`kernelswap doctor` says what is here"
        ) from e
    return device
