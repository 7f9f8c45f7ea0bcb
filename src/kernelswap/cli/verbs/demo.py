"""`kernelswap demo`: a model without kernels, with them, and without them again, measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, progress
from .explain import Device, MeasuredDtype, Threads, where

if TYPE_CHECKING:
    from rich.console import Console

PANEL = "Models"


def command(
    model: Annotated[
        str | None,
        typer.Option("--model", help="Any causal language model or encoder: an id, or a directory.", metavar="ID_OR_PATH"),
    ] = None,
    device: Device = None,
    dtype: MeasuredDtype = None,
    threads: Threads = None,
    tokens: Annotated[int, typer.Option("--tokens", help="New tokens to generate.", min=1, metavar="N")] = 32,
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Time for measuring; default: 6 to 15.", min=1.0, metavar="S")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw it, too: FILE.png, FILE.svg or FILE.html.", metavar="FILE")
    ] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
    bundle: session.Bundle = None,
    as_json: bool = False,
) -> Answer:
    """Swap a model's layers, measure both sides, show one table, undo, and prove that nothing is left.

    Without --model: a Qwen3-architecture language model with random weights, made on the spot; no network, no GPU needed.
    Bundled kernels are compiled the first time. Where a kernel is slower, the original goes back in and the table says so.
    Exit code 1: nothing was swapped, or the model is not as it was.
    """
    from ...bench import job, subject
    from ...bench import plot as picture

    if plot is not None and (why := picture.misfit(plot)) is not None:
        raise KernelSwapError(why, asked=f"a plot in {plot}", todo="name a file that ends in .png, .svg or .html")
    with progress(quiet=as_json) as report:
        report("making the model" if model is None else "loading the model", 0, 0)
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        on = where(device)
        about = (
            subject.demo(device=on, dtype=dtype or "float32")
            if model is None
            else subject.load(model, device=on, dtype=dtype or "auto", offline=offline or bundle is not None)
        )
        report("making the model" if model is None else "loading the model", 1, 1)
        swapper = session.swapper(cache=cache, offline=offline, bundle=bundle)
        found = job.run(about, swapper.swap, device=on, new_tokens=tokens, seconds=seconds, progress=report)
    if plot is not None:
        picture.save(found, plot)
    data = {**found.to_json(), "plot": str(plot) if plot is not None else None}

    def text(out: Console) -> None:
        from ..report_view import show

        show(found, out)
        if plot is not None:
            out.print(f"Drawn in {plot}", markup=False, soft_wrap=True)

    return Answer(data, text, exits.OK if found.swapped and found.undone else exits.NO)
