"""`kernelswap bench`: candidates by size of call, then the whole model; or the benchmarks behind the published figures."""

from __future__ import annotations

import json
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
    attention: session.Attention = False,
    use: session.Use = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave out the originals under torch.compile.")] = False,
    no_train: Annotated[bool, typer.Option("--no-train", help="Inference alone: no backward, no training step.")] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Draw it, too: FILE.png, FILE.svg or FILE.html.", metavar="FILE")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Write what --json prints there, too; our own benchmarks: as rows come.", metavar="FILE.json"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Of our own benchmarks, the rows that matter most.")] = False,
    only: Annotated[
        str | None, typer.Option("--only", help="Of our own benchmarks, these rows: K1,K7 or prefill,decode.", metavar="ROWS")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="With `kernels`, on a GPU: look for better configurations and keep them.")
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", help="Tune for this shape, K1=8192x5120 say, not for ours. May be repeated.", metavar="ROW=SIZE"),
    ] = None,
    of_model: Annotated[
        str | None, typer.Option("--of", help="Tune for the shapes of this model: an id or a directory.", metavar="MODEL")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Tune anew what was tuned on this device.")] = False,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Time every candidate of every site of a model, keep what was found, and measure the whole model with what won.

    Candidates: bundled kernels, what is installed here, kernels of the hub with --hub, your own with --use (`--use attention=...`, too),
    and the original under torch.compile. With --attention the model's attention is raced like the rest, by prompt and step.
    `swap(model, choose="measured")` uses what was kept. Whoever is stopped goes on: the same command measures only what is missing.
    `bench kernels` and `bench model` run the benchmarks behind our published figures on this machine, and say of each target whether it
    was met. What FILE.json has of rows that are not measured again stays (on a GPU).
    `bench kernels --tune` checks and times what the bundled GPU kernels could be launched with, and keeps what beats the default by more
    than the noise: every later start on this device uses it. Who is stopped goes on.
    Exit code 1: nothing won, the model is not as it was, or an output was wrong.
    """
    if tune or shape or of_model is not None or again:
        if what != KERNELS or not tune or plot is not None or hub or dtype is not None:
            raise KernelSwapError(
                "--tune is for `bench kernels`, and --shape, --of and --again are for --tune", asked=f"bench {what}",
                todo="kernelswap bench kernels --tune [--only K1,K8] [--quick]",
            )  # fmt: skip
        given = [text for one in shape or () for text in ("--shape", one)] + (["--model", of_model] if of_model else [])
        given += [*(["--again"] if again else []), *(["--cache", str(cache.absolute())] if cache is not None else [])]
        return _tuned(where(device), as_json=as_json, seconds=budget or 300.0, given=given, out=out, quick=quick, only=only)
    if what in {KERNELS, WHOLE} and not (what == WHOLE and where(device) == "cpu"):
        if plot is not None or hub or use or dtype is not None:
            raise KernelSwapError(f"`bench {what}` draws nothing and takes no --hub, --use or --dtype", asked=f"bench {what}")
        return _ours(what, where(device), as_json=as_json, seconds=budget, threads=threads, out=out, quick=quick, only=only)
    if quick or only is not None:
        raise KernelSwapError(
            "--quick and --only are for `bench kernels` and, on a GPU, `bench model`", asked=f"bench {what}",
            todo="--time-budget and --no-train shorten this one",
        )  # fmt: skip
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
            attention=attention,
            use=session.table(use),
            progress=report,
        )
    if plot is not None:
        race_plot.save(found, plot)
    data = {**found.to_json(), "plot": str(plot) if plot is not None else None}
    if out is not None:
        out.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")

    def text(out: Console) -> None:
        from ..bench_view import show

        show(found, out)
        if plot is not None:
            out.print(f"Drawn in {plot}", markup=False, soft_wrap=True)

    return Answer(data, text, exits.OK if found.whole.swapped and found.whole.undone else exits.NO)


def _ours(what: str, device: str, *, as_json: bool, **asked: Any) -> Answer:
    from ...bench import ours

    into = console(stderr=as_json)
    if device == "cpu":
        into.print("The kernels of the CPU; with an NVIDIA GPU, those of the GPU.", markup=False)
    data: dict[str, Any] = ours.run(what, device, line=lambda text: into.print(text, markup=False, soft_wrap=True), **asked)

    def text(out: Console) -> None:
        rows = len(data["rows"])
        out.print(f"{rows} rows." if data["complete"] else f"{rows} rows; the time was up before the others.")
        if not data["right"]:
            out.print("An output was wrong; its row says which, and was not timed.")
        if asked["out"] is not None:
            out.print(f"Written to {asked['out']}", markup=False, soft_wrap=True)

    return Answer(data, text, exits.OK if data["right"] else exits.NO)


def _tuned(
    device: str, *, as_json: bool, seconds: float, given: list[str], out: Path | None, quick: bool, only: str | None
) -> Answer:
    from ...bench import ours

    if device == "cpu":
        raise KernelSwapError(
            "what is tuned are the Triton kernels of NVIDIA GPUs, and there is none here",
            asked="bench kernels --tune",
            todo="Run it on the machine that will use them: what is found holds for that device.",
        )
    into = console(stderr=as_json)
    data: dict[str, Any] = ours.run(
        "tuning",
        device,
        line=lambda text: into.print(text, markup=False, soft_wrap=True),
        out=out,
        quick=quick,
        only=only,
        more=["--seconds", str(seconds), *given],
    )

    def text(to: Console) -> None:
        won = sum(row["config"] is not None for row in data["tuned"])
        to.print(
            f"{len(data['tuned'])} buckets of calls looked at; for {won} something beats the default, and serves from now on."
        )
        if not data["right"]:
            to.print("An output was wrong, or a call failed; its line says which.")
        if out is not None:
            to.print(f"Written to {out}", markup=False, soft_wrap=True)

    return Answer(data, text, exits.OK if data["right"] else exits.NO)
