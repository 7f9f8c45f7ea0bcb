"""`kernelswap explain`: what would be served by what in a model, and why the rest stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, progress

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Models"

Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1, mps...; default: the first accelerator, else cpu.", metavar="DEVICE"),
]
MeasuredDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16, float16; default: float32, or what the checkpoint has.", metavar="DTYPE"),
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: torch's own choice.", min=1, metavar="N")]
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
    attention: session.Attention = False,
    choose: Annotated[
        str,
        typer.Option("--choose", help="table, or measured: what `kernelswap bench` found to be the fastest here.", metavar="HOW"),
    ] = "table",
    sbom: Annotated[
        Path | None,
        typer.Option("--sbom", help="Write the kernels that would serve as a bill of materials (CycloneDX 1.6).", metavar="FILE"),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write the report as one page for a browser; it loads nothing.", metavar="FILE"),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run the model: errors site by site, times, shares of a step, calls.")
    ] = False,
    lock: Annotated[
        Path | None,
        typer.Option(
            "--lock", help="Compare with the lock of this directory; default: the model's own, else this one.", metavar="DIR"
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Time for taking times, with --measure.", min=0.1, metavar="S")
    ] = 12.0,
    cache: session.Cache = None,
    offline: session.Offline = False,
    bundle: session.Bundle = None,
    as_json: bool = False,
) -> Answer:
    """Say what would serve each kind of site in a model, and why the others stay as they are.

    The model is loaded and is afterwards as it was; kernels are compiled and proved on random tensors, as for a swap. With
    --measure it is also run, with kernels and without, on a text that comes with kernelswap.
    Exit code 1: nothing would be swapped.
    """
    from ... import locking
    from ...bench import subject
    from ...report.facts import facts
    from ...sbom import bill

    folder = lock or (Path(model) if Path(model).is_dir() else Path())
    with progress(quiet=as_json) as report:
        report("loading the model", 0, 0)
        away = offline or bundle is not None
        loaded = subject.load(model, device=where(device), dtype=dtype, offline=away, runs=measure)
        report("loading the model", 1, 1)
        options: dict[str, Any] = {"only": only, "skip": skip, "build": "wait", "choose": choose, "progress": report}
        options["attention"] = attention or None
        swapper = session.swapper(cache=cache, offline=offline, bundle=bundle)
        outcomes = swapper.plan(loaded.model, **options)
        if measure:
            from ...bench.observe import observe

            applied, observed = observe(loaded, outcomes, swapper.machine, device=where(device), seconds=seconds, progress=report)
            with applied:
                data = applied.facts(name=loaded.name, observed=observed, lock=folder)
                outcomes = applied.outcomes
        else:
            there = locking.there(folder)
            data = facts(outcomes, model=loaded.model, name=loaded.name, machine=swapper.machine, lock=there)
        if html is not None:
            _page(html, data)
    swapped = data["swapped"]
    if sbom is not None:
        _write("--sbom", sbom, json.dumps(bill(outcomes, model=model), indent=2) + "\n")

    def text(out: Console) -> None:
        from ... import render
        from ...report.text import sections
        from .. import views

        if everything:
            out.print(render.outcomes(outcomes, long=True, calls=data["calls"]), markup=False, soft_wrap=True)
            out.print()
            out.print(sections(data), markup=False, soft_wrap=True)
        else:
            if outcomes:
                views.outcomes(outcomes, out)
            if measure:
                views.observed(data, out)
            out.print(f"{swapped} of {len(outcomes)} sites would be swapped")
        if html is not None:
            out.print(f"The report is in {html}", markup=False, soft_wrap=True)

    return Answer(data, text, exits.OK if swapped else exits.NO)


def _page(path: Path, data: dict[str, Any]) -> None:
    from ...report.page import page

    _write("--html", path, page(data))


def _write(option: str, path: Path, value: str) -> None:
    try:
        path.write_text(value, encoding="utf-8")
    except OSError as e:
        raise KernelSwapError(f"{path} cannot be written: {e.strerror}", todo=f"Name another file for {option}.") from e


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
