"""`kernelswap bisect`: which swap of a model's plan broke a number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, progress
from .check import Inputs, Prompt
from .explain import Device, Dtype, Only, Skip, where

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from ...apply import Applied
    from ...bench.bisect import Found, Step
    from ...types import Outcome

PANEL = "Models"


def command(
    model: Annotated[str, typer.Argument(help="A model's id on the hub, or its directory.", metavar="MODEL")],
    metric: Annotated[
        str, typer.Option("--metric", help="logits, loss, perplexity, or your own: file.py:function.", metavar="METRIC")
    ] = "logits",
    threshold: Annotated[
        str | None,
        typer.Option("--threshold", help="How far from the unswapped model's number is fine: 0.01, or 1%.", metavar="X"),
    ] = None,
    prompt: Prompt = None,
    inputs: Inputs = None,
    check: Annotated[
        str, typer.Option("--check", help="As of swap: first-use, always, sample:N, off.", metavar="WHEN")
    ] = "first-use",
    use: session.Use = None,
    device: Device = None,
    dtype: Dtype = "auto",
    only: Only = None,
    skip: Skip = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Find the swap that broke a number: apply the first n of a model's plan, halve n; then that one alone, and all but that one.

    logits: the largest difference of a logit from the unswapped model's, as a share of the largest logit. A function of your own
    takes the model and gives a number. Without --threshold: what rounding may cause, 0.1% in float32, 5% in bfloat16.
    Exit code 1: a swap broke it. The model is as it was afterwards.
    """
    from ...apply import apply, how_often
    from ...bench import bisect, given, subject

    how_often(check)
    table, limit = session.table(use), _threshold(threshold)
    if prompt is not None and inputs is not None:
        raise KernelSwapError("--prompt and --inputs both say what to run on", todo="Give one of them.")
    with progress(quiet=as_json) as report:
        report("loading the model", 0, 0)
        loaded = subject.load(model, device=where(device), dtype=dtype, offline=offline)
        loaded = given.with_prompt(loaded, prompt) if prompt is not None else loaded
        loaded = given.with_file(loaded, inputs) if inputs is not None else loaded
        measure, scale = bisect.metric(metric, loaded)
        report("loading the model", 1, 1)
        swapper = session.swapper(cache=cache, offline=offline)
        options: dict[str, Any] = {"table": table, "only": only, "skip": skip, "build": "wait", "progress": report}
        outcomes = swapper.plan(loaded.model, **options)

        def some(part: Sequence[Outcome]) -> Applied:
            return apply(loaded.model, part, swapper.prover, check=check, machine=swapper.machine)

        found = bisect.bisect(
            loaded.model,
            outcomes,
            some,
            measure,
            threshold=limit[0] if limit is not None else None,
            relative=limit[1] if limit is not None else False,
            scale=scale,
            progress=report,
        )
    data = {"model": model, "metric": metric, **_plain(found)}

    def text(out: Console) -> None:
        _show(found, metric, out)

    return Answer(data, text, exits.NO if found.culprit is not None else exits.OK)


def _threshold(text: str | None) -> tuple[float, bool] | None:
    """Number and whether it is a share."""
    if text is None:
        return None
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise KernelSwapError(f"--threshold {text!r} is no number", todo="Write 0.01, or 1% of the unswapped model's number.")
    return (value / 100, True) if text.endswith("%") else (value, False)


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _step(step: Step | None) -> dict[str, Any] | None:
    return None if step is None else {"swaps": step.swaps, "value": _number(step.value), "broken": step.broken}


def _plain(found: Found) -> dict[str, Any]:
    from ... import render

    return {
        "before": found.before,
        "limit": found.limit,
        "swaps": found.swaps,
        "steps": [_step(s) for s in found.steps],
        "number": found.number,
        "culprit": render.outcomes_json([found.culprit])[0] if found.culprit is not None else None,
        "alone": _step(found.alone),
        "without": _step(found.without),
    }


def _show(found: Found, metric: str, out: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from ... import render

    out.print(
        Text(f"{metric}: {found.before:.6g} without kernels; up to {found.limit:.3g} away from that is fine"), soft_wrap=True
    )
    grid = Table.grid(padding=(0, 2, 0, 0))
    for right in (True, True, False):
        grid.add_column(justify="right" if right else "left", no_wrap=True)
    for step in found.steps:
        grid.add_row(
            f"first {step.swaps} of {found.swaps} swaps",
            f"{step.value:.6g}",
            Text("broken", "red") if step.broken else Text("fine", "green"),
        )
    if found.steps:
        out.print(grid)
    if found.culprit is None or found.number is None:
        out.print(
            Text(
                "Nothing is broken: with every swap of the plan the number is what it was."
                if found.swaps
                else "Nothing is swapped.",
                style="bold",
            )
        )
        return
    site = found.culprit.site
    choice = found.culprit.serving(training=site.training)
    out.print(
        Text.assemble((f"Broken by swap {found.number}: {site.path or 'the model itself'}", "bold red"), f" ({site.layer})"),
        soft_wrap=True,
    )
    if choice.implementation is not None:
        origin = choice.implementation.origin
        name = render.named(origin, choice.implementation.layer)
        out.print(Text(f"  served by {name}, {origin.candidate.variant}, digest {render.short(origin.digest)}"), soft_wrap=True)
    for label, then in (("this swap alone", found.alone), ("all others, without it", found.without)):
        if then is not None:
            out.print(
                Text.assemble(f"  {label}: {then.value:.6g}, ", ("broken", "red") if then.broken else ("fine", "green")),
                soft_wrap=True,
            )
    what = f"skip={site.path!r}" if site.kind == "module" else f"skip={site.layer!r}"
    more = (
        "; there is another culprit, which a second run with it finds"
        if found.without is not None and found.without.broken
        else ""
    )
    out.print(Text(f"Leave it out with {what} (--skip here){more}.", style="dim"), soft_wrap=True)
