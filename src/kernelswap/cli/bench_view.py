"""What `kernelswap bench` found, for 80 columns and up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..render import seconds
from .report_view import threads_of
from .report_view import whole as show_whole

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.model import Lap, Race, Report

_LEGEND = (
    "x: median over the turns, on fresh inputs with a cold L2; 2x is twice as fast as the original, whose time is shown. "
    "* serves calls of that size; what does not beat the original by more than the noise serves none."
)


MOST = 6  # sizes of call that are columns; of more each is a line


def show(report: Report, out: Console) -> None:
    """The candidates, kind by kind; then the whole model."""
    whole = report.whole
    head = f"{whole.model}: {whole.family}, {whole.dtype} on {whole.device}"
    out.print(Text(head + threads_of(whole), style="bold"))
    racing = [race for race in report.races if race.laps]
    for unit in dict.fromkeys(race.unit for race in racing if len(race.sizes) <= MOST):
        out.print(_table([race for race in racing if race.unit == unit]))
    for race in racing:
        if len(race.sizes) > MOST:
            out.print(_long(race))
    if racing:
        out.print(Text(_LEGEND, style="dim"))
    else:
        none = "The time was up before a candidate was measured." if report.left else "No site of this model has a candidate."
        out.print(none)
    _passed(report, out)
    counts = f"{report.measured} measured now, {report.known} known from before"
    out.print(counts + (f", {report.left} left: the time was up, the same command goes on." if report.left else "."))
    out.print()
    show_whole(whole, out)


def _table(races: list[Race]) -> Table:
    from rich import box

    sizes = races[0].sizes
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=False, show_edge=False, header_style="bold")
    table.add_column("kind of site,\nand its candidates", overflow="fold")
    for size in sizes:
        table.add_column("\n".join(size.rsplit(" ", 1)), justify="right", no_wrap=True)
    for race in races:
        name = " ".join(filter(None, (race.layer, race.width)))
        table.add_row(Text.assemble((name, "bold"), (f" x{race.count}, {race.mode}", "dim")), *[""] * len(sizes))
        serving = {size: by for size, by, _ in race.serves}
        for candidate in dict.fromkeys(lap.candidate for lap in race.laps):
            laps = {lap.size: lap for lap in race.laps if lap.candidate == candidate}
            cells = [_cell(laps.get(size), serves=serving.get(size) == candidate) for size in sizes]
            broken = next((lap.reason for lap in laps.values() if lap.speedup is None), "")
            table.add_row(Text.assemble(f"  {candidate}", (f": {broken}" if broken else "", "yellow")), *cells)
        base = {lap.size: lap.seconds_original for lap in race.laps if lap.seconds_original is not None}
        times = [_time(base.get(size), serves=size in base and not serving.get(size)) for size in sizes]
        table.add_row(Text("  the original", style="dim"), *times)
    return table


def _long(race: Race) -> Table:
    """One kind of site whose calls come in many sizes: a line for each that was measured."""
    from rich import box

    candidates = list(dict.fromkeys(lap.candidate for lap in race.laps))
    serving = {size: by for size, by, _ in race.serves}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=False, show_edge=False, header_style="bold")
    table.add_column(Text.assemble((race.layer, "bold"), (f" x{race.count}, {race.mode}", "dim")), overflow="fold")
    table.add_column("the\noriginal", justify="right", no_wrap=True)
    for candidate in candidates:
        head, _, layer = candidate.rpartition(":")
        table.add_column(f"{head.rpartition('/')[2]}:\n{layer}" if head else layer, justify="right", overflow="fold")
    for size in race.sizes:
        laps = {lap.candidate: lap for lap in race.laps if lap.size == size}
        if laps:
            base = next((lap.seconds_original for lap in laps.values() if lap.seconds_original is not None), None)
            cells = [_cell(laps.get(c), serves=serving.get(size) == c) for c in candidates]
            table.add_row(Text(f"  {size}"), _time(base, serves=not serving.get(size)), *cells)
    broken = {lap.candidate: lap.reason for lap in reversed(race.laps) if lap.speedup is None}
    if broken:
        table.add_section()
    for candidate, why in broken.items():
        table.add_row(Text(f"  - {candidate}: {why}", style="yellow"))
    return table


def _cell(lap: Lap | None, *, serves: bool) -> Text:
    text = "" if lap is None else "-" if lap.speedup is None else f"{lap.speedup:.2f}x"
    style = "bold green" if serves else "" if lap is None or lap.wins else "yellow"
    return Text(text + ("*" if serves and text else " "), style=style)


def _time(value: float | None, *, serves: bool) -> Text:
    text = "" if value is None else seconds(value)
    return Text(text + ("*" if serves and text else " "), style="bold green" if serves else "dim")


def _passed(report: Report, out: Console) -> None:
    """Candidates that could not take part, each reason once; those for other devices and modes as a number."""
    elsewhere: set[str] = set()
    other: dict[str, list[tuple[str, str]]] = {}
    for race in report.races:
        for spec, why in race.passed:
            if why.startswith(("is for ", "is registered for ")):
                elsewhere.add(spec)
            else:
                other.setdefault(spec, []).append((race.layer, why.partition(", element [")[0].partition(", row [")[0]))
    if not other and not elsewhere:
        return
    out.print(Text("could not take part", style="bold"))
    for spec, reasons in other.items():
        for why in dict.fromkeys(why for _, why in reasons):
            where = ", ".join(dict.fromkeys(layer for layer, reason in reasons if reason == why))
            out.print(Text(f"  {spec}, for {where}: {why}", style="dim"))
    if elsewhere:
        out.print(Text(f"  {len(elsewhere)} of the table are for other devices or modes", style="dim"))
