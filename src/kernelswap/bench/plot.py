"""The main job's report as a picture: speed by kind of site, and distance to float64. PNG, or a page that needs nothing else."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import KernelSwapError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .ab import Pair
    from .job import Report
    from .kinds import Measured

COLOURS = {"prefill": "#0b6e99", "forward": "#0b6e99", "decode": "#d1603d"}
SUFFIXES = (".png", ".svg", ".html")


def misfit(path: Path) -> str | None:
    """Why nothing can be written there, or `None`; asked before the long work."""
    if path.suffix not in SUFFIXES:
        return f"{path.name} ends in none of {', '.join(SUFFIXES)}"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent}"
    return None


def save(report: Report, path: Path) -> None:
    """Write the picture to `path`, by its suffix.

    Raises:
        KernelSwapError: another suffix, or no such directory.
    """
    why = misfit(path)
    if why is not None:
        raise KernelSwapError(why, asked=f"a plot in {path}", todo="name a file that ends in .png, .svg or .html")
    figure = draw(report, title=path.suffix != ".html")
    if path.suffix == ".png":
        figure.savefig(path, dpi=150)
        return
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names web addresses and nothing else
    path.write_text(page(report, svg[svg.index("<svg") :]) if path.suffix == ".html" else svg, encoding="utf-8")


def draw(report: Report, *, title: bool = True) -> Figure:
    """Left: how many times faster, by kind and phase, with quartiles. Right: error against float64, original and kernel."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = _rows(report)
    with rc_context({"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "kernelswap"}):
        figure = Figure(figsize=(10, 1.7 + 0.55 * len(rows)), layout="constrained")
        if title:
            figure.suptitle(_title(report), x=0.01, ha="left", fontsize=11, fontweight="bold")
        speed, error = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [3, 2]})
        _speed(speed, rows)
        _error(error, rows)
        speed.set_yticks(range(len(rows)), [name for name, *_ in rows])
        speed.set_ylim(len(rows) - 0.5, -0.5)
    return figure


Row = tuple[str, dict[str, "Pair"], "float | None", "float | None", bool]


def _rows(report: Report) -> list[Row]:
    rows: list[Row] = []
    for row in report.rows:
        if row.pairs:
            name = _name(row)
            rows.append((name, dict(row.pairs), row.error("original"), row.error("kernel"), row.kind.swapped))
    if report.whole:
        rows.append(("whole model", dict(report.whole), report.error_original, report.error_kernel, True))
    return rows


def _name(row: Measured) -> str:
    layer, _, width = row.kind.key
    stays = "" if row.kind.swapped else "\n(original stays)"
    return f"{' '.join(filter(None, (layer, width)))} x{len(row.kind.sites)}{stays}"


def _title(report: Report) -> str:
    return f"{report.model} ({report.parameters / 1e6:.0f} M, {report.dtype}, {report.device}): with kernels, against without"


def _speed(axes: Any, rows: list[Row]) -> None:
    phases = list(dict.fromkeys(phase for _, pairs, *_ in rows for phase in pairs))
    furthest = max((p.high for _, pairs, *_ in rows for p in pairs.values()), default=1.0)
    for i, phase in enumerate(phases):
        offset = (i - (len(phases) - 1) / 2) * 0.32
        for y, (_, pairs, _, _, swapped) in enumerate(rows):
            if phase not in pairs:
                continue
            pair, colour = pairs[phase], COLOURS.get(phase, "#555555")
            label = phase if not any(phase in p for _, p, *_ in rows[:y]) else None
            axes.barh(y + offset, pair.speedup - 1, left=1, height=0.26, color=colour, alpha=1 if swapped else 0.35, label=label)
            axes.plot([pair.low, pair.high], [y + offset] * 2, color="black", lw=0.9)
            axes.annotate(
                f"{pair.speedup:.2f}x",
                (max(pair.speedup, pair.high, 1), y + offset),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    axes.axvline(1, color="black", lw=0.8)
    lowest = min((p.low for _, pairs, *_ in rows for p in pairs.values()), default=1.0)
    axes.set_xlim(min(0.8, lowest - 0.1), max(1.2, furthest + 0.12 * (furthest - min(0.8, lowest))))
    axes.set_xlabel("times faster than the original (line: middle half of the turns)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if len(phases) > 1:
        axes.legend(loc="lower right", frameon=False)


def _error(axes: Any, rows: list[Row]) -> None:
    known = [(y, a, b) for y, (_, _, a, b, _) in enumerate(rows) if a and b]
    for y, a, b in known:
        axes.plot([a, b], [y, y], color="#bbbbbb", lw=2, zorder=1)
    axes.scatter(
        [a for _, a, _ in known], [y for y, _, _ in known], color="white", edgecolor="black", s=36, label="original", zorder=2
    )
    axes.scatter([b for *_, b in known], [y for y, *_ in known], color="#2a7f3f", s=22, label="kernel", zorder=3)
    axes.set_xscale("log")
    if known:
        values = [v for _, *ab in known for v in ab]
        axes.set_xlim(min(values) / 3, max(values) * 3)
        axes.legend(loc="lower left", frameon=False)
    axes.set_xlabel("error against float64 (worst row, relative)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#eeeeee")


_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.25rem; } p { color: var(--dim); }
figure { margin: 1rem 0; background: #fff; border-radius: 6px; padding: .5rem; } figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; margin-bottom: 1.5rem; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, td.why { text-align: left; white-space: normal; }
"""


def page(report: Report, svg: str) -> str:
    """One HTML page with the picture and the numbers; it loads nothing."""
    e = html.escape
    phases = list(dict.fromkeys(phase for _, pairs, *_ in _rows(report) for phase in pairs))
    head = "".join(f"<th colspan=3>{e(p)}, ms" for p in phases)
    under = "<tr><th>site<th>original<th>kernel" + "<th>original<th>kernel<th>faster" * len(phases)
    body = []
    served = {_name(row): row.kind.serves or f"the original: {row.loses}" for row in report.rows if row.pairs}
    for name, pairs, a, b, _ in _rows(report):
        by = f"<br><small>{e(served.get(name, f'{report.swapped} of {report.sites} sites swapped'))}</small>"
        cells = [f"<td>{e(name.partition(chr(10))[0])}{by}", f"<td>{_number(a)}", f"<td>{_number(b)}"]
        for phase in phases:
            p = pairs.get(phase)
            cells.append(
                f"<td>{p.original.median * 1e3:.4g}<td>{p.kernel.median * 1e3:.4g}<td>{p.speedup:.2f}x" if p else "<td><td><td>"
            )
        body.append("<tr>" + "".join(cells))
    kept = [
        f"<tr><td>{e(' '.join(filter(None, (r.kind.key[0], r.kind.key[2]))))} x{len(r.kind.sites)}<td class=why>{e(r.kind.reason)}"
        for r in report.rows
        if not r.pairs
    ]
    kept += [f"<tr><td>{e(name)} x{count}<td class=why>no row of the table names it" for name, count in report.unclaimed]
    memory = ""
    if report.memory_original is not None and report.memory_kernel is not None:
        both = f"{report.memory_original / 2**20:.0f} MiB without kernels, {report.memory_kernel / 2**20:.0f} MiB with them"
        memory = f"Peak memory of a forward, beyond the weights: {both}. "
    undone = "The swap was undone; outputs, classes, __dict__ and hooks are as before." if report.undone else "NOT as it was."
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>kernelswap: {e(report.model)}</title><style>{_STYLE}</style>"
        f"<h1>{e(_title(report))}</h1><p>{report.tokens} tokens, {report.threads} threads. {memory}{undone}</p><figure>{svg}</figure>"
        f"<div class=wide><table><tr><th><th colspan=2>error{head}{under}{''.join(body)}</table></div>"
        f"<div class=wide><table><tr><th>stays as it was<th style='text-align:left'>why{''.join(kept)}</table></div></html>\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
