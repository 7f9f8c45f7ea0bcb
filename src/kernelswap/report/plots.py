"""The pictures of the page: SVG that takes its fonts and colours from the page around it, in two widths. By matplotlib."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import facts as fact

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Facts = Mapping[str, Any]
WIDE, NARROW = 10.6, 3.7  # inches; one for a desk, one for a phone

# Colours that nothing else uses stand for the page's variables until the SVG is written.
INK, DIM, LINE, ORIGINAL, KERNEL, CARD = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
HUES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
_VARIABLES = {
    INK: "--ink",
    DIM: "--dim",
    LINE: "--line",
    ORIGINAL: "--original",
    KERNEL: "--kernel",
    CARD: "--card",
    **{hue: f"--hue{i}" for i, hue in enumerate(HUES, 1)},
}
_STYLE: Any = {
    "font.size": 9.5,
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, readable aloud
    "text.color": INK,
    "axes.labelcolor": DIM,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": DIM,
    "ytick.color": DIM,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def both(draw: Callable[[Figure, Facts, bool], None], facts: Facts, name: str) -> tuple[str, str] | None:
    """A picture for a wide and for a narrow page; None where there is nothing to draw."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    found = []
    for width in (WIDE, NARROW):
        wide = width == WIDE
        with rc_context({**_STYLE, "svg.hashsalt": f"{name}{width}"}):
            figure = Figure(figsize=(width, 3.2), layout="constrained")
            draw(figure, facts, wide)
            if not figure.axes:
                return None
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None})
        found.append(_adopt(out.getvalue(), f"{name}-{'wide' if wide else 'narrow'}"))
    return found[0], found[1]


def _adopt(svg: str, name: str) -> str:
    """The page's variables for the placeholders, ids of its own, no size and no font of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # names web addresses and nothing else
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)  # HTML knows them
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="(?!site:)', f'id="{name}-', svg)
    svg = re.sub(r'url\(#|href="#', lambda m: f"{m[0]}{name}-", svg)
    svg = re.sub(r"font: ([\d.]+)px[^;\"]*", r"font-size: \1px", svg)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.replace('id="site:', 'data-site="').strip()


# -- the pictures -------------------------------------------------------------------------------------------------


def errors(figure: Figure, facts: Facts, wide: bool) -> None:  # noqa: FBT001  # the face of `both`'s argument
    """Error against float64 by place in the model: a ring for the original, a dot for the kernel, a colour for each kind."""
    points = []
    for i, outcome in enumerate(facts["outcomes"]):
        choice = fact.now(outcome)
        verdict = choice["verdict"] if choice is not None else None
        if choice is None or verdict is None or choice["implementation"] is None:
            continue
        pair = verdict["error_original"], verdict["error_kernel"]
        if all(isinstance(e, float) for e in pair):
            points.append((i, outcome["layer"], *pair))
    if not points:
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure.set_size_inches(figure.get_figwidth(), 3.4 if wide else 3.9)
    axes = figure.subplots()
    least = min((e for *_, a, b in points for e in (a, b) if e > 0), default=1e-8)
    exact = any(e <= 0 for *_, a, b in points for e in (a, b))
    floor = 10 ** (math.floor(math.log10(least)) - 0.3) if exact else least  # exact ones lie on it
    for n, layer in enumerate(dict.fromkeys(p[1] for p in points)):
        hue = HUES[n % len(HUES)]
        mine = _representative([p for p in points if p[1] == layer])
        for place, (i, _, a, b) in enumerate(mine):
            a, b = max(a, floor), max(b, floor)  # noqa: PLW2901  # exact ones
            axes.plot([i, i], [a, b], color=LINE, lw=1.4, zorder=1)
            axes.plot(i, a, "o", ms=5.5, mfc=CARD, mec=hue, mew=1.1, zorder=2)
            axes.plot(i, b, "o", ms=4.5, color=hue, mec="none", zorder=3, gid=f"site:{i}", label=None if place else layer)
    axes.set_yscale("log")
    axes.set_ylim(bottom=floor / 1.8)
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 3.0) if max(e for *_, a, b in points for e in (a, b)) < 300 * floor else (1.0,))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("place in the model, first site to last")
    axes.set_title("relative error of the worst row, against float64", loc="left", fontsize=9, color=DIM, pad=10)
    axes.xaxis.set_major_locator(_whole())
    axes.margins(x=0.03)
    figure.legend(loc="outside lower left", ncols=6 if wide else 2, handletextpad=0.2, columnspacing=1.4, labelcolor=INK)


Point = tuple[int, str, float, float]
MOST = 240
"""Sites of one kind that are drawn: a mixture of experts has thousands."""


def _representative(points: Sequence[Point]) -> list[Point]:
    """All of them; of very many some at equal distances, and those whose kernel is the worst beside its original."""
    if len(points) <= MOST:
        return list(points)
    worst = sorted(points, key=lambda p: p[3] / max(p[2], 1e-300), reverse=True)[: MOST // 4]
    return sorted({*worst, *points[:: -(-4 * len(points) // (3 * MOST))]})


def speeds(figure: Figure, facts: Facts, wide: bool) -> None:  # noqa: FBT001  # as above
    """Traffic with memory by rows of a call, kernel and original of each kind; above it the roof, where it was measured."""
    observed = facts["observed"] or {}
    shown = [s for s in observed.get("speeds", ()) if s["bytes"]]
    kinds = list(dict.fromkeys((s["layer"], s["original"], s["width"]) for s in shown))
    if not shown:
        return
    columns = min(len(kinds), 4 if wide else 1)
    lines = -(-len(kinds) // columns)
    figure.set_size_inches(figure.get_figwidth(), 2.55 * lines + 0.35)
    grid = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    for axes, kind in zip(grid.flat, kinds, strict=False):
        mine = sorted((s for s in shown if (s["layer"], s["original"], s["width"]) == kind), key=lambda s: int(s["rows"]))
        rows = [s["rows"] for s in mine]
        for key, colour in (("seconds_original", ORIGINAL), ("seconds_kernel", KERNEL)):
            axes.plot(rows, [s["bytes"] / s[key] / 1e9 for s in mine], "o-", color=colour, lw=1.8, ms=4)
        if observed.get("bandwidth"):
            axes.axhline(observed["bandwidth"] / 1e9, color=DIM, lw=1, ls=(0, (4, 3)))
        axes.set_title(" ".join(map(str, filter(None, (kind[0], kind[2])))), loc="left", fontsize=9.5, color=INK)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(axis="y")
        _plain(axes, rows)
    for axes in list(grid.flat)[len(kinds) :]:
        axes.set_visible(False)
    figure.supxlabel("rows of a call", fontsize=9, color=DIM)
    figure.supylabel("GB/s", fontsize=9, color=DIM)


def time(figure: Figure, facts: Facts, wide: bool) -> None:  # noqa: FBT001  # as above
    """Where the time of each phase of the original went: a bar a phase, a part for each kind that a kernel could serve."""
    shares = [(k, k["share"]) for k in facts["kinds"] if k["share"] and k["serving"]]
    phases = list(dict.fromkeys(phase for _, share in shares for phase in share))
    if not phases:
        return
    figure.set_size_inches(figure.get_figwidth(), 0.55 * len(phases) + 0.6 + (0 if wide else 0.3 * -(-len(shares) // 2)))
    axes = figure.subplots()
    at = dict.fromkeys(phases, 0.0)
    layers = list(dict.fromkeys(kind["layer"] for kind, _ in shares))
    for n, layer in enumerate(layers):
        hue = HUES[n % len(HUES)]
        for y, phase in enumerate(phases):
            part = sum(share.get(phase, 0.0) for kind, share in shares if kind["layer"] == layer)
            axes.barh(y, part, left=at[phase], color=hue, height=0.5, label=None if y else layer)
            if part > (0.06 if wide else 0.16):
                axes.text(at[phase] + part / 2, y, f"{part:.0%}", ha="center", va="center", color=CARD, fontsize=9)
            at[phase] += part
    for y, phase in enumerate(phases):
        rest = max(0.0, 1 - at[phase])
        axes.barh(y, rest, left=at[phase], color=LINE, height=0.5, label=None if y else "everything else")
        if rest > (0.06 if wide else 0.16):
            axes.text(at[phase] + rest / 2, y, f"{rest:.0%}", ha="center", va="center", color=INK, fontsize=9)
    axes.set_yticks(range(len(phases)), phases)
    axes.set_ylim(len(phases) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", labelcolor=INK)
    figure.legend(loc="outside lower left", ncols=6 if wide else 2, handlelength=0.9, columnspacing=1.4, labelcolor=INK)


def _whole() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=8)


def _plain(axes: Axes, rows: Sequence[int]) -> None:
    """Ticks at the sizes that were measured, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xticks(sorted(set(rows)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x < 1024 else f"{x / 1024:g}k"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
