"""`kernelswap bench`: candidates by size of call, then the whole model; or the benchmarks behind the published figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, console, progress
from .explain import Device, MeasuredDtype, Threads, where

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Models"
DEMO, KERNELS, WHOLE = "demo", "kernels", "model"


def command(
    what: Annotated[
        str,
        typer.Argument(
            help="A model: an id, a directory, or `demo`, made on the spot. `kernels`, `model`: our own benchmarks.",
            metavar="MODEL|kernels|model",
        ),
    ] = DEMO,
    device: Device = None,
    dtype: MeasuredDtype = None,
    threads: Threads = None,
    budget: Annotated[
        float | None,
        typer.Option(
            "--time-budget",
            help="Seconds in all, about; default: 120, of our own benchmarks as long as they take.",
            min=1.0,
            metavar="S",
        ),
    ] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Kernels of the table that are on the hub are candidates, too.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave out the originals under torch.compile.")] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Inference alone: no backward, no training step.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw it, too: FILE.png, FILE.svg or FILE.html.", metavar="FILE")
    ] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Time every candidate of every site of a model, keep what was found, and measure the whole model with what won.

    Candidates: bundled kernels, what is installed here, kernels of the hub with --hub, and the original under torch.compile.
    `swap(model, choose="measured")` uses what was kept. Whoever is stopped goes on: the same command measures only what is missing.
    `bench kernels` and `bench model` run the benchmarks behind our published figures on this machine.
    Exit code 1: nothing won, or the model is not as it was.
    """
    if what in {KERNELS, WHOLE} and not (what == WHOLE and where(device) == "cpu"):
        if plot is not None or hub or dtype is not None:
            raise KernelSwapError(f"`bench {what}` draws nothing and takes no --hub or --dtype", asked=f"bench {what}")
        return _ours(what, where(device), budget, threads, as_json=as_json)
    from ...bench import model as benching
    from ...bench import plot as picture
    from ...bench import race_plot, subject

    if plot is not None and (why := picture.misfit(plot)) is not None:
        raise KernelSwapError(why, asked=f"a plot in {plot}", todo="name a file that ends in .png, .svg or .html")
    with progress(quiet=as_json) as report:
        report("loading the model", 0, 0)
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        on = where(device)
        about = (
            subject.demo(device=on, dtype=dtype or "float32")
            if what in {DEMO, WHOLE}
            else subject.load(what, device=on, dtype=dtype or "auto", offline=offline)
        )
        report("loading the model", 1, 1)
        swapper = session.swapper(cache=cache, offline=offline)
        found = benching.run(
            about,
            swapper,
            device=on,
            seconds=budget or 120.0,
            train=not no_train,
            compile=not no_compile,
            hub=hub,
            progress=report,
        )
    if plot is not None:
        race_plot.save(found, plot)
    data = {**found.to_json(), "plot": str(plot) if plot is not None else None}

    def text(out: Console) -> None:
        from ..bench_view import show

        show(found, out)
        if plot is not None:
            out.print(f"Drawn in {plot}", markup=False, soft_wrap=True)

    return Answer(data, text, exits.OK if found.whole.swapped and found.whole.undone else exits.NO)


def _ours(what: str, device: str, budget: float | None, threads: int | None, *, as_json: bool) -> Answer:
    from ...bench import ours

    out = console(stderr=as_json)
    more = ("--threads", str(threads)) if threads is not None and device == "cpu" else ()
    data: dict[str, Any] = ours.run(
        what, device, seconds=budget, more=more, line=lambda text: out.print(text, markup=False, soft_wrap=True)
    )

    def text(out: Console) -> None:
        rows = len(data["rows"])
        out.print(f"{rows} rows." if data["complete"] else f"{rows} rows; the time was up before the others.")

    return Answer(data, text)
