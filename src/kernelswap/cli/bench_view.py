"""What `kernelswap bench` found, for 80 columns and up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from ..render import seconds

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.model import Race, Report

_LEGEND = (
    "x: median over the turns, on fresh inputs with a cold L2; 2x is twice as fast as the original, whose time is below. "
    "What serves is green; what does not beat the original by more than the noise serves nowhere."
)


def show(report: Report, out: Console) -> None:
    """The candidates, kind by kind; then the whole model."""
    whole = report.whole
    head = f"{whole.model}: {whole.family}, {whole.dtype} on {whole.device}"
    out.print(Text(head + (f", {whole.threads} threads" if whole.device == "cpu" else ""), style="bold"))
    racing = [race for race in report.races if race.laps]
    for unit in dict.fromkeys(race.unit for race in racing):
        out.print(_table([race for race in racing if race.unit == unit]))
    if racing:
        out.print(Text(_LEGEND, style="dim"))
    else:
        out.print("No site of this model has a candidate that could be measured.")
    _passed(report, out)
    counts = f"{report.measured} measured now, {report.known} known from before"
    out.print(counts + (f", {report.left} left: the time was up, the same command goes on." if report.left else "."))
    out.print()
    from .report_view import whole as show_whole

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
            cells = []
            for size in sizes:
                lap = laps.get(size)
                text = "" if lap is None else "-" if lap.speedup is None else f"{lap.speedup:.2f}x"
                style = "bold green" if serving.get(size) == candidate else "" if lap is None or lap.wins else "yellow"
                cells.append(Text(text, style=style))
            broken = next((lap.reason for lap in laps.values() if lap.speedup is None), "")
            table.add_row(Text.assemble(f"  {candidate}", (f": {broken}" if broken else "", "yellow")), *cells)
        base = {lap.size: lap.seconds_original for lap in race.laps if lap.seconds_original is not None}
        times = [
            Text(seconds(base[size]) if size in base else "", style="dim" if serving.get(size) else "bold green")
            for size in sizes
        ]
        table.add_row(Text("  the original", style="dim"), *times)
    return table


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
