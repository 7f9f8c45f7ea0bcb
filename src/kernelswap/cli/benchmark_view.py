"""What `kernelswap benchmark` shows: a table for the terminal, a picture in light and dark."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.ab import Times
    from ..bench.scripts import Workload

_NAMES = {"kernel": "kernel", "reference": "eager", "compiled": "torch.compile"}
_COLOURS = {"reference": "#4c78a8", "compiled": "#e0883a"}


def table(data: Mapping[str, Any], rows: Sequence[Workload], out: Console) -> None:
    """One block for each workload: the kernel, and how many times as long the reference takes."""
    machine = data["machine"]
    head = f"{data['kernel']}: {data['variant']} at {data['commit'][:18]}"
    out.print(Text(head, style="bold"), soft_wrap=True)
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    out.print(
        f"{machine['device']} ({machine['name']}{threads}), torch {machine['torch']}, {data['iterations']} calls of each side in turn",
        soft_wrap=True,
        markup=False,
    )
    out.print(Text(f"{'':16}{'warm, ms':>19}{'':9}{'cold caches, ms':>19}", style="bold"), soft_wrap=True)
    for row in rows:
        out.print(Text.assemble((row.name, "bold"), "  ", *_judged(row)), soft_wrap=True)
        for side in row.warm:
            out.print(_line(side, row), soft_wrap=True)
        if row.graph is not None:
            out.print(f"{'  as CUDA graph':16}{_time(row.graph)}", soft_wrap=True)
        for note in row.notes:
            out.print(Text("  " + note, style="dim"))
    foot = "Medians, with half the distance between the quartiles. x: how many times as long as the kernel the authors' reference takes."
    for line in textwrap.wrap(foot, width=min(out.width, 100)):
        out.print(Text(line, style="dim"), soft_wrap=True)


def _judged(row: Workload) -> list[tuple[str, str]]:
    if row.failed is not None:
        return [(f"FAILED: {row.failed}", "red")]
    if row.matches is None:
        return [("not compared: it has no reference", "dim")]
    error = f", largest error of a row {row.error:.1e}" if row.error is not None else ""
    return [(f"matches{error}", "green")] if row.matches else [(f"WRONG{error}", "red")]


def _line(side: str, row: Workload) -> str:
    line = f"{'  ' + _NAMES[side]:16}"
    for times in (row.warm, row.cold):
        ratio = f"{times[side].median / times['kernel'].median:>7.2f}x " if side != "kernel" else " " * 9
        line += _time(times[side]) + ratio
    return line.rstrip()


def _time(times: Times) -> str:
    return f"{times.median * 1e3:>9.4g} ± {(times.high - times.low) / 2 * 1e3:<7.2g}"


def draw(rows: Sequence[Workload], *, title: str, base: Path, png: bool = False) -> None:
    """`<base>_light.svg` and `<base>_dark.svg`: for each workload, how many times as long as the kernel each reference takes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    shown = [row for row in rows if len(row.warm) > 1]
    for theme, ink, paper in (("light", "#202124", "#ffffff"), ("dark", "#e8eaed", "#1e1f22")):
        style: Any = {"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "path", "svg.hashsalt": "kernelswap"}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink)
        with rc_context(style):
            figure = Figure(figsize=(8, 1.4 + 0.5 * max(1, len(shown))), layout="constrained", facecolor=paper)
            axes: Any = figure.subplots()
            axes.set_facecolor(paper)
            axes.set_title(title, loc="left", fontweight="bold")
            for i, side in enumerate(s for s in _COLOURS if any(s in row.warm for row in shown)):
                for y, row in enumerate(shown):
                    if side in row.warm:
                        x = row.warm[side].median / row.warm["kernel"].median
                        label = _NAMES[side] if not any(side in r.warm for r in shown[:y]) else None
                        axes.barh(y + (i - 0.5) * 0.34, x - 1, left=1, height=0.3, color=_COLOURS[side], label=label)
                        ends = (max(x, 1), y + (i - 0.5) * 0.34)
                        axes.annotate(f"{x:.2f}x", ends, (4, 0), textcoords="offset points", va="center", fontsize=8)
            axes.axvline(1, color=ink, lw=0.8)
            axes.set_yticks(range(len(shown)), [row.name for row in shown])
            axes.set_ylim(max(len(shown), 1) - 0.5, -0.5)
            axes.margins(x=0.15)
            axes.set_xlabel("times as long as the kernel (warm; median)")
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            if shown:
                axes.legend(loc="lower right", frameon=False)
            figure.savefig(base.with_name(f"{base.name}_{theme}.{'png' if png else 'svg'}"), dpi=150, facecolor=paper)
