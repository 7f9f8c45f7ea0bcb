"""`kernelswap check`: the kernels of a model, on its own tensors, before it is put to work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, progress
from .explain import Device, Dtype, Only, Skip, where

if TYPE_CHECKING:
    from rich.console import Console

    from ...bench.checking import Checked
    from ...proof.ledger import Entry

PANEL = "Models"

Prompt = Annotated[str | None, typer.Option("--prompt", help="A text for the model, instead of ours.", metavar="TEXT")]
Inputs = Annotated[
    Path | None,
    typer.Option(
        "--inputs", help="Tensors for the model's forward, by name: FILE.json, .safetensors, .npz or .pt.", metavar="FILE"
    ),
]


def command(
    model: Annotated[str, typer.Argument(help="A model's id on the hub, or its directory.", metavar="MODEL")],
    prompt: Prompt = None,
    inputs: Inputs = None,
    training: Annotated[bool, typer.Option("--training", help="Gradients, too: a training step of each size.")] = False,
    anew: Annotated[bool, typer.Option("--anew", help="Check also what a verdict is known for.")] = False,
    device: Device = None,
    dtype: Dtype = "auto",
    only: Only = None,
    skip: Skip = None,
    use: session.Use = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", help="Write the verdicts of these kernels, to go with a lock.", metavar="FILE"),
    ] = None,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Check every kernel that would serve a model: on random tensors, then on the model's own, in calls of every size.

    Each is held against the original, with a float64 run of the original as the measure. The verdicts are kept: a later start with
    calls like these checks nothing any more. Exit code 1: something was refused (the original serves there).
    """
    from ...api import Swapper
    from ...bench import given, subject
    from ...bench.checking import check
    from ...proof import Check
    from ...proof.ledger import Ledger

    table = session.table(use)
    named = [spec for specs in (table or {}).values() for spec in specs]
    if prompt is not None and inputs is not None:
        raise KernelSwapError("--prompt and --inputs both say what to run on", todo="Give one of them.")
    with progress(quiet=as_json) as report:
        report("loading the model", 0, 0)
        loaded = subject.load(model, device=where(device), dtype=dtype, offline=offline)
        loaded = given.with_prompt(loaded, prompt) if prompt is not None else loaded
        loaded = given.with_file(loaded, inputs) if inputs is not None else loaded
        report("loading the model", 1, 1)
        base = session.swapper(cache=cache, offline=offline)
        prover = base.prover
        if isinstance(prover, Check):
            prover.thorough = True  # nobody waits for this call
        ledger = Ledger(prover, anew=anew)
        swapper = Swapper(
            sources=base.sources, verifiers=base.verifiers, machine=base.machine, store=base.store, prover=ledger, cache=cache
        )
        options: dict[str, Any] = {"table": table, "only": only, "skip": skip, "build": "wait", "progress": report}
        outcomes = swapper.plan(loaded.model, **options)
        found = check(loaded, outcomes, ledger, swapper.machine, training=training, named=named, progress=report)
    store = getattr(base.prover, "store", None)
    if export is not None and store is not None:
        _write(export, store.export(digests={e.digest for e in found.entries}))
    data = {
        "model": model,
        "checks": [_plain(e) for e in found.entries],
        "ran": found.done,
        "refused": [{"path": path, "layer": layer, "reason": why} for path, layer, why in found.refused],
        "sites": len(found.outcomes),
        "verdicts": str(store.path) if store is not None else None,
        "exported": str(export) if export is not None else None,
    }

    def text(out: Console) -> None:
        _show(found, data, out)

    return Answer(data, text, exits.NO if found.refused else exits.OK)


def _plain(entry: Entry) -> dict[str, Any]:
    from ... import render

    return {
        "path": entry.site.path,
        "layer": entry.site.layer,
        "kernel": entry.kernel,
        "digest": entry.digest,
        "tensors": entry.tensors,
        "mode": "training" if entry.training else "inference",
        "known": entry.known,
        **render.verdict_json(entry.verdict),
    }


def _show(found: Checked, data: dict[str, Any], out: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ...report.text import error

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("kernel, for", overflow="fold")
    table.add_column("checked on", overflow="fold")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("original", justify="right", no_wrap=True)
    for (kernel, layer), entries in _grouped(found.entries).items():
        sites = {e.site.path for e in entries}
        bad = [e for e in entries if not e.verdict.accepted]
        good = [e for e in entries if e.verdict.accepted]
        sides = {side: dict.fromkeys(e.tensors for e in good if e.training is side) for side in (False, True)}
        on: list[Any] = [f"forward: {', '.join(sides[False])}"] if sides[False] else []
        on += [f"{chr(10) if on else ''}gradients: {', '.join(sides[True])}"] if sides[True] else []
        for why, n in _reasons(bad).items():
            on += ["\n" if on else "", (f"refused{f' at {n} sites' if n > 1 else ''}: {why}", "red")]
        worst = [
            max((v for e in good if (v := getattr(e.verdict, f"error_{side}")) is not None), default=None)
            for side in ("kernel", "original")
        ]
        table.add_row(
            Text.assemble((kernel, "green" if good else ""), (f"\n{layer} x{len(sites)}", "dim")),
            Text.assemble(*on),
            *map(error, worst),
        )
    if found.entries:
        out.print(table)
    else:
        out.print("No kernel would serve this model: `kernelswap explain` says why.")
    kept = sum(e.known for e in found.entries)
    out.print(Text(f"{found.done} checks on real tensors ran; {kept} were known from earlier ones.", style="dim"))
    if found.refused:
        places = len({(path, layer) for path, layer, _ in found.refused})
        out.print(Text(f"A kernel was refused at {places} of {len(found.outcomes)} sites.", style="bold red"))
    elif found.entries:
        out.print(Text("Nothing was refused.", style="bold"))
    if data["exported"]:
        out.print(Text(f"The verdicts are in {data['exported']}"), soft_wrap=True)


def _grouped(entries: tuple[Entry, ...]) -> dict[tuple[str, str], list[Entry]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kernel, entry.site.layer), []).append(entry)
    return groups


def _reasons(entries: list[Entry]) -> dict[str, int]:
    """Each distinct reason, the first in full, with the number of sites."""
    from ... import render

    first: dict[str, tuple[str, set[str]]] = {}
    for entry in entries:
        _, paths = first.setdefault(render.general(entry.verdict.reason), (entry.verdict.reason, set()))
        paths.add(entry.site.path)
    return {why: len(paths) for why, paths in first.values()}


def _write(path: Path, value: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as e:
        raise KernelSwapError(f"{path} cannot be written: {e.strerror}", todo="Name another file for --export.") from e
