"""The main job's report as one table, for 80 columns and up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..bench.ab import Pair
    from ..bench.job import Report
    from ..bench.kinds import Measured


_LEGEND = "error: of the worst row, relative, against float64. Times: medians; x: median of the turns, 2x is twice as fast."


def show(report: Report, out: Console) -> None:
    """Print it: what was run, the table, the totals, the undo."""
    head = f"{report.model}: {report.family}, {_count(report.parameters)} parameters, {report.dtype} on {report.device}"
    out.print(Text(head, style="bold"))
    threads = threads_of(report)
    generated = f", {report.new_tokens} generated" if report.new_tokens else ""
    out.print(Text(f"{report.tokens} tokens of text{generated}{threads}", style="dim"))
    phases = list(report.whole) or sorted({p for row in report.rows for p in row.pairs}, reverse=True)
    measured = [row for row in report.rows if row.pairs]
    if measured or report.whole:
        out.print(_measured(report, measured, phases))
    kept = [row for row in report.rows if not row.pairs]
    if kept or report.unclaimed:
        out.print(_kept(report, kept))
    out.print(Text(_LEGEND, style="dim"))
    _texts(report, out)
    _closing(report, out)


def threads_of(report: Report) -> str:
    """`, 2 threads`; nothing where they do not matter."""
    if report.device != "cpu":
        return ""
    return ", 1 thread" if report.threads == 1 else f", {report.threads} threads"


def whole(report: Report, out: Console) -> None:
    """The whole model alone: times, errors, memory, generated text, the undo."""
    if report.whole:
        out.print(_measured(report, [], list(report.whole)))
        out.print(Text(_LEGEND, style="dim"))
    _texts(report, out)
    _closing(report, out)


def _table() -> Table:
    from rich import box

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=False, show_edge=False, header_style="bold")


def _measured(report: Report, rows: list[Measured], phases: list[str]) -> Table:
    table = _table()
    table.add_column("site, count,\nand what serves it", overflow="fold")
    table.add_column("", no_wrap=True, style="dim")
    table.add_column("\nerror", justify="right", no_wrap=True)
    for phase in phases:
        table.add_column(f"{phase}\nms", justify="right", no_wrap=True)
        table.add_column("", justify="right", no_wrap=True)
    cells: list[Text | str]
    for row in rows:
        layer, _, width = row.kind.key
        served = (row.kind.serves, "green") if row.kind.swapped else (f"the original: {row.loses}", "yellow")
        cells = [
            Text.assemble(" ".join(filter(None, (layer, width))), (f" x{len(row.kind.sites)}", "dim"), "\n", served),
            "original\nkernel",
            f"{_error(row.error('original'))}\n{_error(row.error('kernel'))}",
        ]
        for phase in phases:
            cells += _pair(row.pairs.get(phase), taken=row.kind.swapped)
        table.add_row(*cells)
    if report.whole:
        table.add_section()
        cells = [
            Text.assemble(("whole model", "bold"), f"\n{report.swapped} of {report.sites} sites swapped"),
            "original\nkernels",
            f"{_error(report.error_original)}\n{_error(report.error_kernel)}",
        ]
        for phase in phases:
            cells += _pair(report.whole.get(phase), taken=True)
        table.add_row(*cells)
        cells = [Text("peak memory,\nbeyond the weights"), "original\nkernels", ""]
        step = f"{_bytes(report.step_memory_original)}\n{_bytes(report.step_memory_kernel)}"
        first = f"{_bytes(report.memory_original)}\n{_bytes(report.memory_kernel)}"
        for i, phase in enumerate(phases):
            cells += [first if i == 0 else step if phase == "training" and report.step_memory_kernel else "", ""]
        table.add_row(*cells)
    return table


def _pair(pair: Pair | None, *, taken: bool) -> tuple[str, Text]:
    if pair is None:
        return "", Text("")
    style = "bold green" if pair.faster and taken else "yellow" if pair.slower else "dim"
    times = f"{_ms(pair.original.median)}\n{_ms(pair.kernel.median)}"
    return times, Text.assemble("\n", (f"{pair.speedup:.2f}x", style))


def _kept(report: Report, rows: list[Measured]) -> Table:
    table = _table()
    table.add_column("stays as it was", overflow="fold", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        layer, target, width = row.kind.key
        name = Text.assemble(" ".join(filter(None, (layer, width))), (f" ({target})", "dim"))
        reason = row.kind.reason or f"served by {row.kind.serves}, which this run did not call"
        table.add_row(name, str(len(row.kind.sites)), reason)
    for cls, count in report.unclaimed:
        table.add_row(cls, str(count), Text("no row of the table names it", style="dim"))
    return table


def _texts(report: Report, out: Console) -> None:
    if not report.text_original or not report.swapped:
        return
    if report.same_until >= report.new_tokens:
        out.print(f"The same {report.new_tokens} tokens were generated without and with kernels.")
    else:
        out.print(f"The first {report.same_until} of {report.new_tokens} generated tokens are the same without and with kernels.")


def _closing(report: Report, out: Console) -> None:
    if not report.swapped:
        out.print(Text("Nothing was swapped.", style="bold red"))
    if report.undone:
        out.print(f"Undone, and as it was: outputs bit for bit; class, __dict__ and hooks of all {report.modules} modules.")
    else:
        out.print(Text("The model is NOT as it was:", style="bold red"))
        if not report.outputs_equal:
            out.print("  its outputs differ")
        for line in report.left_behind[:20]:
            out.print(Text(f"  {line}"))


def _ms(seconds: float) -> str:
    """Four digits that mean something: `412.3`, `0.0211`."""
    ms = seconds * 1e3
    return f"{ms:.1f}" if ms >= 100 else f"{ms:.2f}" if ms >= 10 else f"{ms:.3f}" if ms >= 0.1 else f"{ms:.4f}"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _bytes(value: int | None) -> str:
    if value is None:
        return "-"
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def _count(value: int) -> str:
    return f"{value / 1e9:.1f} G" if value >= 1e9 else f"{value / 1e6:.0f} M"
