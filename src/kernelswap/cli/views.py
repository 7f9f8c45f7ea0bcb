"""Tables for a person, folded to the terminal: a model's outcomes, a resolution, a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from .. import render
from ..report import text

if TYPE_CHECKING:
    from rich.console import Console

    from ..types import Outcome, Resolution


def outcomes(rows: Sequence[Outcome], out: Console) -> None:
    """One row for each group: the layer and how many, what serves it, why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("site", overflow="fold")
    table.add_column("served by, and why", overflow="fold")
    for count, layer, original, by, why in render.outcome_groups(rows):
        style = "" if by == "the original" else "green"
        table.add_row(Text.assemble(layer, (f" x{count}\n{original}", "dim")), Text.assemble((by, style), "\n", (why, "dim")))
    out.print(table)


def observed(facts: Mapping[str, Any], out: Console) -> None:
    """What a run measured: each phase of the model, then each kind, faster by how much and how much of the phase it was."""
    phases, faster = text.phases(facts), text.speed_of(facts)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    table.add_column("measured", overflow="fold")
    for phase in phases:
        table.add_column(phase, justify="right")
        table.add_column("of it", justify="right", style="dim")
    steps = {s["phase"]: s for s in facts["observed"]["steps"]}
    cells = [f"{steps[p]['speedup']:.2f}x" if p in steps else "" for p in phases]
    table.add_row("whole model", *(cell for one in cells for cell in (one, "")))
    for kind in facts["kinds"]:
        if kind["serving"]:
            speeds, parts = faster.get(f"{kind['layer']} {kind['original']}", {}), kind["share"] or {}
            row = [cell for p in phases for cell in (speeds.get(p, ""), text.share(parts[p]) if p in parts else "")]
            table.add_row(f"{kind['layer']} x{kind['count']}", *row)
    out.print(table)
    out.print(Text(facts["observed"]["how"], style="dim"))


def resolution(found: Resolution, out: Console) -> None:
    """What was asked, every build with its reason, and the notes."""
    chosen = found.chosen
    out.print(
        Text.assemble((str(found.requirement), "bold"), ": ", chosen.variant if chosen else "no build fits"), soft_wrap=True
    )
    rows = []
    for judged in found.judged:
        if judged.rejected is not None:
            rows.append((Text("-", style="dim"), judged.candidate.variant, Text(judged.rejected, style="dim")))
        elif judged.candidate is chosen:
            where = f"chosen, {chosen.source} {chosen.name} at {render.short(chosen.commit)}"
            rows.append((Text("*", style="green"), chosen.variant, Text(where, style="green")))
        else:
            rows.append((Text("+"), judged.candidate.variant, Text("fits")))
    out.print(grid(rows, indent=2))
    for note in found.notes:
        out.print(Text(f"  note: {note}"), soft_wrap=True)
    if chosen is None:
        count = len(found.judged)
        out.print(Text(f"  none of {count} builds fits" if count else "  no builds were found"))


def machine(values: Mapping[str, Any], out: Console) -> None:
    """Every fact of `render.machine_json`, with its reason."""
    why, rows = values["why"], []
    for name, value in values.items():
        if name not in {"why", "devices"}:
            rows.append((Text(name), _value(value), Text(why.get(name, ""), style="dim")))
    for device in values["devices"]:
        name = f"{device['type']}:{device['index']}"
        about = ", ".join(filter(None, (device["name"], _value(device["capability"]), device["arch"])))
        rows.append((Text(name), about, Text(why.get(name, ""), style="dim")))
    out.print(grid(rows))


def grid(rows: Sequence[tuple[Text, str, Text]], *, indent: int = 0) -> Table:
    """Three columns; the last is folded, the others are not unless one of them is very wide."""
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", min_width=min(44, max((len(r[1]) for r in rows), default=0)))
    table.add_column(overflow="fold")
    for first, second, third in rows:
        table.add_row(Text.assemble(" " * indent, first), second, third)
    return table


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ".".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
