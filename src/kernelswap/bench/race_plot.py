"""The candidates of a model as a picture: times faster than the original by size of call, and the whole model. PNG, SVG or a page."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .model import Race, Report

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#111;background:#fff}"
    "svg{max-width:100%;height:auto}h1{font-size:1.2rem}"
)
COLUMNS = 3


def save(report: Report, path: Path) -> None:
    """Write the picture to `path`, by its suffix; see `plot.misfit`."""
    figure = draw(report)
    if path.suffix == ".png":
        figure.savefig(path, dpi=150)
        return
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    if path.suffix == ".html":
        title = html.escape(_title(report))
        svg = (
            f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{svg[svg.index('<svg') :]}</html>\n"
        )
    path.write_text(svg, encoding="utf-8")


def draw(report: Report) -> Figure:
    """One panel for each kind of site: a line for each candidate over the sizes of call, noise as a bar; one for the whole model."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    races = [race for race in report.races if race.laps]
    panels = len(races) + bool(report.whole.whole)
    lines = max(1, -(-panels // COLUMNS))
    with rc_context({"font.family": "DejaVu Sans", "font.size": 8, "svg.fonttype": "path", "svg.hashsalt": "kernelswap"}):
        figure = Figure(figsize=(3.6 * min(COLUMNS, max(1, panels)), 0.6 + 2.7 * lines), layout="constrained")
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=10, fontweight="bold")
        axes = iter(figure.subplots(lines, min(COLUMNS, max(1, panels)), squeeze=False).flat)
        for race in races:
            _race(next(axes), race)
        rest = list(axes)
        if report.whole.whole and rest:
            _whole(rest.pop(0), report)
        for one in rest:
            one.set_axis_off()
    return figure


def _race(axes: Any, race: Race) -> None:
    where = {size: i for i, size in enumerate(race.sizes)}
    for candidate in dict.fromkeys(lap.candidate for lap in race.laps):
        laps = [lap for lap in race.laps if lap.candidate == candidate and lap.speedup is not None]
        times = [lap.speedup or 0.0 for lap in laps]
        bars = [t * (lap.noise or 0.0) for t, lap in zip(times, laps, strict=True)]
        axes.errorbar([where[lap.size] for lap in laps], times, yerr=bars, marker="o", ms=3, lw=1.2, capsize=2, label=candidate)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks(range(len(race.sizes)), ["\n".join(size.rsplit(" ", 1)) for size in race.sizes], fontsize=6)
    axes.set_title(f"{' '.join(filter(None, (race.layer, race.width)))} x{race.count}, {race.mode}", fontsize=8, loc="left")
    highest = max((lap.speedup or 0.0 for lap in race.laps), default=1.0)
    axes.set_ylim(0, 1.3 * max(1.0, highest))  # a bar of noise may be cut off: where it ends says nothing
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=6)


def _whole(axes: Any, report: Report) -> None:
    pairs = report.whole.whole
    for i, (phase, pair) in enumerate(pairs.items()):
        axes.bar(i, pair.speedup, width=0.6, color="#0b6e99")
        axes.plot([i, i], [pair.low, pair.high], color="black", lw=0.9)
        axes.annotate(f"{pair.speedup:.2f}x", (i, max(pair.high, pair.speedup)), (0, 3), textcoords="offset points", ha="center")
        axes.annotate(phase, (i, 0), (0, 4), textcoords="offset points", ha="center", color="white", fontsize=6)
    axes.axhline(1, color="black", lw=0.8)
    axes.set_xticks([])
    axes.margins(y=0.15)
    axes.set_title("whole model", fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _title(report: Report) -> str:
    about = report.whole
    return f"{about.model} ({about.dtype}, {about.device}): times faster than the original"
