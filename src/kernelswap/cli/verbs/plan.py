"""`kernelswap plan`: what would serve a model on a machine that is not here, and what would be lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import KernelSwapError
from .. import exits, session
from ..output import Answer, progress
from .explain import Dtype, Only, Skip, where

if TYPE_CHECKING:
    from rich.console import Console

    from ...forecast import Forecast
    from ...types import Machine

PANEL = "Models"


def command(
    model: Annotated[str, typer.Argument(help="A model's id on the hub, or its directory.", metavar="MODEL")],
    machine: Annotated[
        str,
        typer.Option("--machine", help="What is different there: torch=2.14,cuda=13.2,sm=120,offline.", metavar="FACTS"),
    ],
    hub: Annotated[bool, typer.Option("--hub", help="Count in kernels of the table that are on the hub.")] = False,
    attention: session.Attention = False,
    use: session.Use = None,
    dtype: Dtype = "auto",
    only: Only = None,
    skip: Skip = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Also each candidate that would not serve there, with its reason.")
    ] = False,
    cache: session.Cache = None,
    offline: session.Offline = False,
    as_json: bool = False,
) -> Answer:
    """Say what would serve a model on another machine, by which build, and what would be lost against this one.

    Here the plan is made and proved as for a swap; there it is answered from what builds say about themselves, and has to be proved
    when one gets there. `offline` in FACTS: no network there, so of the hub only what is in this machine's cache counts.
    Exit code 1: something that a kernel serves here would not be served there.
    """
    from ...api import Swapper
    from ...bench import subject
    from ...forecast import device_of, everywhere, forecast
    from ...proof.ledger import Ledger

    there = session.machine_of(machine)
    if there is None:
        raise KernelSwapError("--machine says nothing", todo="Such as --machine torch=2.14,cuda=13.2,sm=120.")
    table = session.table(use)
    with progress(quiet=as_json) as report:
        report("loading the model", 0, 0)
        loaded = subject.load(model, device=where(None), dtype=dtype, offline=offline, runs=False)
        report("loading the model", 1, 1)
        base = session.swapper(cache=cache, offline=offline)
        ledger = Ledger(base.prover)
        swapper = Swapper(
            sources=base.sources,
            verifiers=base.verifiers,
            machine=base.machine,
            store=base.store,
            table=everywhere(base.table),
            prover=ledger,
            cache=cache,
        )
        options: dict[str, Any] = {"table": table, "only": only, "skip": skip, "hub": hub, "build": "wait", "progress": report}
        options["attention"] = attention or None
        outcomes = swapper.plan(loaded.model, **options)
        report("asking for the other machine", 0, 0)
        elsewhere = session.swapper(cache=cache, offline=offline or "offline" in dict(there.why))
        refused: dict[tuple[str, str], set[tuple[str, str | None]]] = {}
        for e in ledger.entries:
            if not e.verdict.accepted:
                refused.setdefault((e.site.layer, e.site.target), set()).add(e.asked)
        found = forecast(elsewhere, loaded.model, outcomes, there, hub=hub, named=_specs(table), refused=refused)
        report("asking for the other machine", 1, 1)
    lost = sum(f.lost for f in found)
    data = {
        "model": model,
        "here": _machine(base.machine),
        "there": _machine(there),
        "device": device_of(there),
        "sites": [_plain(f) for f in found],
        "served_here": sum(bool(f.here) for f in found),
        "served_there": sum(bool(f.there) for f in found),
        "lost": lost,
        "gained": sum(f.gained for f in found),
    }

    def text(out: Console) -> None:
        _show(found, data, out, everything=everything)

    return Answer(data, text, exits.NO if lost else exits.OK)


def _specs(table: dict[str, list[str]] | None) -> set[str]:
    return {spec for specs in (table or {}).values() for spec in specs}


def _machine(machine: Machine) -> dict[str, Any]:
    from ... import render

    return render.machine_json(machine)


def _plain(f: Forecast) -> dict[str, Any]:
    return {
        "path": f.site.path,
        "layer": f.site.layer,
        "original": f.site.target,
        "here": f.here or None,
        "there": f.there or None,
        "build": f.build or None,
        "lost": f.lost,
        "why": f.why or None,
        "passed": [{"spec": spec, "why": why} for spec, why in f.passed],
    }


def _show(found: tuple[Forecast, ...], data: dict[str, Any], out: Console, *, everything: bool) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out.print(Text(f"there: {_words(data['there'])}"), soft_wrap=True)
    groups: dict[tuple[str, ...], list[Forecast]] = {}
    for f in found:
        groups.setdefault((f.site.layer, f.site.target.rpartition(".")[2], f.here, f.there, f.build, f.why), []).append(f)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for name in ("site", "here", "there"):
        table.add_column(name, overflow="fold")
    for (layer, original, here, there, build, why), members in groups.items():
        first = members[0]
        after: list[Any] = (
            [(there, "green"), (f"\n{build}", "dim")] if there else [("the original", "red" if first.lost else "dim")]
        )
        if not there:
            after += [("\nlost: " if first.lost else "\n", "red" if first.lost else "dim"), (why, "" if first.lost else "dim")]
        if everything:
            after += [
                (f"\nnot {spec}: {reason}", "dim") for spec, reason in first.passed if why not in (reason, f"{spec}: {reason}")
            ]
        table.add_row(
            Text.assemble(layer, (f" x{len(members)}\n{original}", "dim")),
            Text(here or "the original", style="green" if here else "dim"),
            Text.assemble(*after),
        )
    if groups:
        out.print(table)
    said = f"{data['served_there']} of {len(found)} sites would be served by kernels there, {data['served_here']} are here"
    out.print(Text(f"{said}; {data['lost']} lost, {data['gained']} gained", style="bold"))
    out.print(Text("There, each is to be proved on its first use; `kernelswap check` does it ahead of time.", style="dim"))


def _words(machine: dict[str, Any]) -> str:
    def version(value: Any) -> str:
        return ".".join(map(str, value)) if value else ""

    parts = [
        f"{machine['os']} {machine['cpu']}",
        f"torch {version(machine['torch'])}" if machine["torch"] else "no torch",
        " ".join(filter(None, (machine["backend"], version(machine["backend_version"])))),
        *(d["arch"] or d["name"] for d in machine["devices"]),
        "offline" if "offline" in machine["why"] else "",
    ]
    return ", ".join(filter(None, parts))
