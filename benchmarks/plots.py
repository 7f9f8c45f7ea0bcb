"""Pictures of the rows in benchmarks/results: the share of the floor by kernel and shape, and each row of whole models as bars.

SVG for light and dark pages. `python3 dev.py docs` draws them into docs/img, beside docs/performance.md that shows them.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
OURS = "kernelswap"
INK, DARK_INK = "#24292f", "#e6edf3"
GRID, DARK_GRID = "#d0d7de", "#3d444d"
COLOURS = {
    OURS: "#2f81f7", "swapped": "#2f81f7", "swapped+attention": "#39c5cf", "swapped+loss": "#1158c7", "graphs": "#1158c7",
    "eager": "#8b949e", "original": "#8b949e", "Liger": "#d29922", "QuACK": "#db61a2", "FA4": "#db61a2",
    "torch.compile": "#3fb950", "layer.compile()": "#3fb950", "torch.compile(model)": "#3fb950",
    "F.rms_norm": "#a371f7", "torch bf16": "#a371f7", "SDPA": "#a371f7", "SDPA cuDNN": "#8957e5", "SDPA flash": "#f0883e",
    "varlen_attn": "#bf8700", "eager static": "#8b949e",
}  # fmt: skip
COLUMNS = 4
STYLE = (
    f'@media (prefers-color-scheme: dark) {{ [style*="fill: {INK}"] {{ fill: {DARK_INK} !important }} '
    f'[style*="stroke: {INK}"] {{ stroke: {DARK_INK} !important }} [style*="stroke: {GRID}"] {{ stroke: {DARK_GRID} !important }} }}'
)
SETTINGS = {
    "font.family": "DejaVu Sans", "font.size": 8, "svg.fonttype": "path", "svg.hashsalt": "kernelswap",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GRID, "xtick.color": INK, "ytick.color": INK, "grid.color": GRID,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip


def digest(rows: Iterable[Row]) -> str:
    """Of the rows that a picture shows: written into it, so that a picture of other rows is noticed."""
    return hashlib.sha256(json.dumps(list(rows), sort_keys=True).encode()).hexdigest()[:16]


def drawable(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Rows for the picture of the kernels, and for that of whole models."""
    rows = list(rows)
    return (
        [r for r in rows if "kernel" in r and OURS in r.get("us", {}) and "floor_us" in r],
        [r for r in rows if isinstance(r.get("speedup"), dict) and r["speedup"]],
    )


def save(rows: Iterable[Row], folder: Path, prefix: str) -> list[Path]:
    """Draw what there is to draw."""
    kernels, models = drawable(rows)
    drawn = []
    for name, some, draw in (("kernels", kernels, draw_kernels), ("models", models, draw_models)):
        if some:
            path = folder / f"{prefix}-{name}.svg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(svg(draw(some), digest(some)), encoding="utf-8")
            drawn.append(path)
    return drawn


def svg(figure: Figure, mark: str) -> str:
    """Transparent, its ink following the reader's colour scheme."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(SETTINGS):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", out.getvalue(), flags=re.DOTALL)
    return re.sub(r"(<svg [^>]*>)", rf"\1\n <!-- rows {mark} -->\n <style>{STYLE}</style>", text, count=1, flags=re.DOTALL)


def draw_kernels(rows: list[Row]) -> Figure:
    """A panel for each kernel: how near the floor everybody comes at each shape that fills the GPU; one for a few tokens, in us."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    few = [r for r in rows if r["floor_us"] < 1.0]
    panels: dict[str, list[Row]] = {}
    for r in rows:
        if r not in few:
            shape, _, mode = r["shape"].partition(" ")
            attention = r["kernel"].startswith("K9")  # its shapes come in modes, which are compared among themselves
            panels.setdefault(f"{r['kernel']}, {mode}" if attention else r["kernel"], []).append({**r, "shape": shape})
    count = len(panels)
    lines = -(-count // COLUMNS)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10, 2.5 * lines + (0.32 * len(few) + 1.0 if few else 0)), layout="constrained")
        parts = figure.subfigures(2, 1, height_ratios=[2.5 * lines, 0.32 * len(few) + 1.0]) if few and count else [figure, figure]
        seen: dict[str, Any] = {}
        if count:
            parts[0].suptitle(
                "Share of the floor (dashed: nothing but the bytes or the operations that must be)", x=0.01, ha="left", fontsize=8
            )
            axes = parts[0].subplots(lines, min(COLUMNS, count), squeeze=False).flatten()
            for axis, (kernel, some) in zip(axes, sorted(panels.items()), strict=False):
                _shares(axis, kernel, some, seen)
            for axis in axes[count:]:
                axis.set_axis_off()
        if few:
            _microseconds(parts[1].subplots(), few, seen)
        names = _ordered(seen)[::-1]
        figure.legend([seen[n] for n in names], names, loc="outside lower center", ncols=min(8, len(names)), frameon=False)
    return figure


def _colour(name: str) -> str:
    return COLOURS.get(name, "#8b949e")


def _ordered(names: Iterable[str]) -> list[str]:
    """Ours last, so that it is drawn on top."""
    return sorted(names, key=lambda name: (name == OURS, list(COLOURS).index(name) if name in COLOURS else 99))


def _shares(axis: Any, kernel: str, rows: list[Row], seen: dict[str, Any]) -> None:
    names = _ordered({n for r in rows for n in r["us"]})
    for place, name in enumerate(names):
        aside = 0.5 * (place / (len(names) - 1) - 0.5) if len(names) > 1 else 0.0
        at = [(i + aside, r["floor_us"] / r["us"][name]) for i, r in enumerate(rows) if name in r["us"]]
        size = 42 if name == OURS else 20
        seen[name] = axis.scatter(*zip(*at, strict=True), s=size, color=_colour(name), label=name, zorder=3 + (name == OURS))
    axis.axhline(1.0, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    axis.set_title(kernel, fontsize=8, fontweight="bold", loc="left")
    narrow = max(len(r["shape"]) for r in rows) > (8 if len(rows) > 2 else 11)
    labels = [re.sub(r"x(?=\d+$)", "\nx", r["shape"]) if narrow else r["shape"] for r in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=6.5)
    axis.set_xlim(-0.5, len(rows) - 0.5)
    axis.set_ylim(0, max(1.1, *(1.05 * r["floor_us"] / r["us"][OURS] for r in rows)))
    axis.grid(axis="y", linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)


def _microseconds(axis: Any, rows: list[Row], seen: dict[str, Any]) -> None:
    for name in _ordered({n for r in rows for n in r["us"]}):
        at = [(r["us"][name], len(rows) - i) for i, r in enumerate(rows) if name in r["us"]]
        size = 42 if name == OURS else 20
        seen[name] = axis.scatter(*zip(*at, strict=True), s=size, color=_colour(name), label=name, zorder=3 + (name == OURS))
    axis.set_xscale("log")
    axis.set_yticks([len(rows) - i for i in range(len(rows))], [f"{r['kernel']}, {r['shape']}" for r in rows])
    ticks = [t for t in (1, 2, 3, 5, 10, 20, 30, 50, 100) if t <= 1.3 * max(max(r["us"].values()) for r in rows)]
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_title("A few tokens: microseconds of the GPU (less is better)", fontsize=8, fontweight="bold", loc="left")
    axis.grid(linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(length=0)


def draw_models(rows: list[Row]) -> Figure:
    """Speed over the original, a group of bars for each row."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    bars = sum(len(r["speedup"]) for r in rows)
    with rc_context(SETTINGS):
        figure = Figure(figsize=(10, 0.19 * bars + 0.22 * len(rows) + 1.0), layout="constrained")
        axis = figure.subplots()
        seen: dict[str, Any] = {}
        y, ticks = 0.0, []
        for r in rows:
            start = y
            for name, ratio in r["speedup"].items():
                (seen[name],) = axis.barh([y], [ratio], height=0.85, color=_colour(name), label=name)
                axis.annotate(f"{ratio:.2f}x", (ratio, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=6.5)
                y -= 1
            ticks.append(((start + y + 1) / 2, r["row"]))
            y -= 0.8
        axis.axvline(1.0, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        axis.set_yticks([t for t, _ in ticks], [name for _, name in ticks])
        axis.set_ylim(y + 0.8, 0.8)
        axis.set_xlim(0, 1.08 * max(v for r in rows for v in r["speedup"].values()))
        axis.set_title("Times as fast as the original (dashed: the original)", fontsize=8, fontweight="bold", loc="left")
        axis.grid(axis="x", linewidth=0.5)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=min(7, len(seen)), frameon=False)
    return figure
