"""What the figures are held to: each target, judged from the rows that the benchmarks wrote. Needs nothing but those rows.

`judge` is what the benchmarks print at their end and what docs/performance.md shows, so that both say the same of old and new rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OURS = "kernelswap"
NOISE = 0.01
"""Two medians closer than this are one figure: a rival within it is no winner."""


@dataclass(frozen=True)
class Verdict:
    """One target. `met`: `None` where the rows do not say."""

    row: str
    target: str
    measured: str = "not measured"
    met: bool | None = None


class Rows:
    """Rows of both scripts, by kernel and shape or by name."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.kernels: dict[tuple[str, str], Row] = {}
        self.named: dict[str, Row] = {}
        for row in rows:
            if "kernel" in row:
                self.kernels[row["kernel"], row.get("shape", "")] = row
            else:
                self.named[row["row"]] = row

    def of(self, kernel: str) -> list[Row]:
        """The timed rows of a kernel."""
        return [row for (name, _), row in self.kernels.items() if name == kernel and OURS in row.get("us", {})]


Judge = Callable[[Rows], "tuple[str, bool] | None"]


def share(kernel: str, shape: str, floor: float) -> Judge:
    """Ours reaches this share of the floor."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        row = rows.kernels.get((kernel, shape))
        if row is None or OURS not in row.get("us", {}):
            return None
        reached = row["floor_us"] / row["us"][OURS]
        return f"{reached:.3f}", round(reached, 3) >= floor

    return judge


def against(kernel: str, shape: str, rival: str, times: float, *, us: float | None = None) -> Judge:
    """Ours is that many times as fast as one rival; or takes at most `us`."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        row = rows.kernels.get((kernel, shape))
        if row is None or OURS not in row.get("us", {}):
            return None
        ours = row["us"][OURS]
        if us is not None:
            return f"{ours:.2f} us", ours <= us
        if rival not in row["us"]:
            return None
        return f"{row['us'][rival] / ours:.2f}x", row["us"][rival] / ours >= times

    return judge


def fastest(kernel: str, wanted: Callable[[str], bool], *, least: float = 1.0, rival: str | None = None) -> Judge:
    """The best rival's time over ours, at the worst of those shapes."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        found = []
        for row in rows.of(kernel):
            others = {k: v for k, v in row["us"].items() if not k.startswith(OURS) and rival in (None, k)}
            if wanted(row["shape"]) and others:
                best = min(others, key=lambda name: others[name])
                found.append((others[best] / row["us"][OURS], best, row["shape"]))
        if not found:
            return None
        ratio, best, shape = min(found)
        return f"{ratio:.2f}x {best} at {shape}, the worst of {len(found)}", round(ratio, 2) >= least

    return judge


def host(limit: float, *, grad: bool) -> Judge:
    """Microseconds of CPU of every swapped call."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        row = rows.kernels.get(("H1 host cost", ""))
        if row is None:
            return None
        ours = {k: v for k, v in row["us"].items() if k.endswith(" with grad") is grad and not k.startswith(("eager ", "F."))}
        if not ours:
            return None
        worst = max(ours, key=lambda name: ours[name])
        return f"{ours[worst]:.1f} us, {worst} (of {len(ours)})", ours[worst] <= limit

    return judge


def extra(kernel: str, shape: str, limit: float) -> Judge:
    """GiB beyond the gradients."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        found = rows.kernels.get((kernel, shape), {}).get("gib_beyond_gradients")
        return None if found is None else (f"{found:.2f} GiB", found <= limit)

    return judge


def swapped(row: Row) -> dict[str, float]:
    """Speedups of what is ours and neither captured nor compiled."""
    found = row.get("speedup")
    return {k: v for k, v in found.items() if k.startswith("swapped")} if isinstance(found, dict) else {}


def speedup(name: str, least: float, rivals: Sequence[tuple[str, float]] = ()) -> Judge:
    """The best of the swapped ones over the original, and over rivals where they were measured."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        row = rows.named.get(name)
        if row is None or not swapped(row):
            return None
        best = max(swapped(row), key=lambda name: row["speedup"][name])
        reached = row["speedup"][best]
        text, met = f"{reached:.2f}x ({best})", reached >= least
        for rival, times in rivals:
            if rival in row["speedup"]:
                over = reached / row["speedup"][rival]
                text, met = f"{text}, {over:.2f}x {rival}", met and over >= times
            else:
                text += f", {rival} not measured"
        return text, met

    return judge


def never_slower(rows: Rows) -> tuple[str, bool] | None:
    """E0: every ratio of the plain swap."""
    found = [
        (row["speedup"]["swapped"], name)
        for name, row in rows.named.items()
        if any(part in name for part in (" prefill ", " decode step ", " training step "))
        and not name.endswith(" graph")
        and "swapped" in swapped(row)
    ]
    if not found:
        return None
    worst, where = min(found)
    slower = sum(ratio < 1.0 for ratio, _ in found)
    return f"{worst:.2f}x at {where}, the worst of {len(found)}" + (f"; {slower} below 1" if slower else ""), not slower


def graph_ms(name: str, limit: float, rival: str) -> Judge:
    """Milliseconds of the fastest captured one, and faster than the rival captured."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        row = rows.named.get(name)
        ours = {k: v for k, v in row["ms"].items() if k.startswith("swapped")} if row else {}
        if row is None or not ours:
            return None
        best = min(ours, key=lambda name: ours[name])
        other = row["ms"].get(rival)
        text = f"{ours[best]:.2f} ms ({best})" + (f", {rival} {other:.2f} ms" if other else f", {rival} not measured")
        return text, ours[best] <= limit and (other is None or ours[best] < other)

    return judge


def decoding(size: str, batch: int, least: float) -> Judge:
    """`generate()` with graphs, over the original as `generate()` compiles it (reduce-overhead)."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        ours = rows.named.get(f"{size} static batch {batch} in generate()")
        rival = rows.named.get(f"{size} static batch {batch} compiled by generate()")
        if ours is None or rival is None:
            return None
        times = rival["ms"] / ours["ms"]["graphs"]
        return f"{times:.2f}x ({ours['ms']['graphs']:.2f} ms a token, compiled {rival['ms']:.2f})", times >= least

    return judge


def ready(limit: float) -> Judge:
    """Seconds of `swap` and the first `generate()` together, at their worst."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        own = {n: sum(r["ready_s"].values()) for n, r in rows.named.items() if isinstance(r.get("ready_s"), dict)}
        rivals = [r["ready_s"] for r in rows.named.values() if isinstance(r.get("ready_s"), float)]
        if not own:
            return None
        worst = max(own, key=lambda name: own[name])
        compiled = f", compiled {min(rivals):.0f} to {max(rivals):.0f} s" if rivals else ""
        return f"{own[worst]:.1f} s at {worst}{compiled}", own[worst] <= limit

    return judge


def new_lengths(batch: int, least: float) -> Judge:
    """Plain `generate()` at lengths that were never met, the best of ours."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        found: dict[str, float] = {}
        row = rows.named.get(f"0.6b generate new lengths batch {batch}")
        if row is not None:
            found |= swapped(row)
        row = rows.named.get(f"0.6b dynamic batch {batch}, new lengths, per token")
        if row is not None:
            found["swap(attention=True)"] = row["speedup"]
        if not found:
            return None
        best = max(found, key=lambda name: found[name])
        return f"{found[best]:.2f}x ({best})", found[best] >= least

    return judge


def peak(name: str, limit: float) -> Judge:
    """GiB of a training step, of the swapped one that needs least."""

    def judge(rows: Rows) -> tuple[str, bool] | None:
        found = {k: v for k, v in rows.named.get(name, {}).get("peak_gib", {}).items() if k.startswith("swapped")}
        if not found:
            return None
        best = min(found, key=lambda name: found[name])
        return f"{found[best]:.1f} GiB ({best})", found[best] <= limit

    return judge


def explained(rows: Rows) -> tuple[str, bool] | None:
    """Greedy text: every first difference lies where the original's own two best logits cannot be told apart in bfloat16."""
    found = [
        (name, candidate, difference)
        for name, row in rows.named.items()
        for candidate, one in row.get("against_original", {}).items()
        if candidate.startswith("swapped")
        for difference in one["differences"]
    ]
    compared = [
        (one["sequences"], one["identical"])
        for row in rows.named.values()
        for candidate, one in row.get("against_original", {}).items()
        if candidate.startswith("swapped")
    ]
    if not compared:
        return None
    total, same = (sum(pair[i] for pair in compared) for i in (0, 1))
    above = sum(not d["below"] for _, _, d in found)
    text = f"{same} of {total} sequences identical, {len(found) - above} part below the resolution"
    return text + (f", {above} above it" if above else ""), not above


def _k9(least: float, mode: str) -> Judge:
    def wanted(shape: str) -> bool:
        return shape.endswith(mode)

    def judge(rows: Rows) -> tuple[str, bool] | None:
        judged = [fastest(f"K9 attention {what}", wanted, least=least)(rows) for what in ("fwd", "fwd+bwd")]
        found = [one for one in judged if one is not None]
        return ("; ".join(text for text, _ in found), all(met for _, met in found)) if found else None

    return judge


def _few(shape: str) -> bool:
    return shape.startswith(("1x", "16x"))


TARGETS: tuple[tuple[str, str, Judge], ...] = (
    ("K1", "RMSNorm forward, 16384x4096: 0.95 of the floor", share("K1 RMSNorm fwd", "16384x4096", 0.95)),
    ("K1", "RMSNorm forward, 4096x4096: 0.87", share("K1 RMSNorm fwd", "4096x4096", 0.87)),
    ("K1", "RMSNorm forward, 1 and 16 tokens: the fastest", fastest("K1 RMSNorm fwd", _few)),
    ("K2", "RMSNorm forward + backward, 16384x4096: 0.86", share("K2 RMSNorm fwd+bwd", "16384x4096", 0.86)),
    ("K2", "RMSNorm forward + backward, 16384x1024: 0.70", share("K2 RMSNorm fwd+bwd", "16384x1024", 0.70)),
    ("K2", "the same, 2.4x Liger", against("K2 RMSNorm fwd+bwd", "16384x1024", "Liger", 2.4)),
    ("K3", "residual + RMSNorm forward, 16384x4096: 0.95", share("K3 add+RMSNorm fwd", "16384x4096", 0.95)),
    ("K3", "residual + RMSNorm forward + backward: 0.92", share("K3 add+RMSNorm fwd+bwd", "16384x4096", 0.92)),
    ("K4", "q/k norm + RoPE forward, 16384 tokens: 0.88", share("K4 q/k-norm+RoPE fwd", "16384 tokens", 0.88)),
    ("K4", "the same, 1.85x Liger", against("K4 q/k-norm+RoPE fwd", "16384 tokens", "Liger", 1.85)),
    ("K4", "RoPE forward + backward, 16384 tokens: 0.92", share("K4 RoPE fwd+bwd", "16384 tokens", 0.92)),
    ("K5", "SiLU*mul forward: 1.0x Liger everywhere", fastest("K5 SiLU*mul fwd", bool, rival="Liger")),
    ("K5", "SiLU*mul forward, 1x14336: 1.4 us", against("K5 SiLU*mul fwd", "1x14336", "", 0, us=1.4)),
    ("K6", "cross entropy forward + backward, 4096x151936: 0.65", share("K6 cross entropy f+b", "4096x151936", 0.65)),
    ("K6", "cross entropy forward + backward, 8192x151936: 0.65", share("K6 cross entropy f+b", "8192x151936", 0.65)),
    ("K7", "head + cross entropy, hidden 1024: 4x Liger", against("K7 LM head + CE f+b", "8192x1024x151936", "Liger", 4.0)),
    ("K7", "head + cross entropy, hidden 4096: 1.35x Liger", against("K7 LM head + CE f+b", "8192x4096x151936", "Liger", 1.35)),
    ("K7", "beyond the gradients, hidden 1024: 0.6 GiB", extra("K7 LM head + CE f+b", "8192x1024x151936", 0.6)),
    ("K7", "beyond the gradients, hidden 4096: 0.6 GiB", extra("K7 LM head + CE f+b", "8192x4096x151936", 0.6)),
    ("K8", "decode attention, length on the device, 32x8k: 0.90 of the read rate", share("K8 decode attention", "32x8192", 0.90)),
    ("K8", "decode attention, length on the device, 1x32k: 0.80", share("K8 decode attention", "1x32768", 0.80)),
    ("K9", "causal attention: 0.99x the best there is", _k9(0.99, "eager")),
    ("K9", "the same, captured in a CUDA graph", _k9(0.99, "captured")),
    ("K9", "the same, under torch.compile", _k9(0.99, "compiled")),
    ("H1", "host, a swapped call without gradient: 8 us", host(8.0, grad=False)),
    ("H1", "host, a swapped call with gradient: 18 us", host(18.0, grad=True)),
    ("E0", "never slower: every point of prefill, decode and training at 1.0x", never_slower),
    ("E1", "0.6B prefill 8x2048: 2.45x, above Liger and layer.compile()",
     speedup("0.6b prefill 8x2048", 2.45, (("Liger", 1.0), ("layer.compile()", 1.0)))),
    ("E2", "0.6B prefill 1x2048, no graph, not compiled: 1.8x", speedup("0.6b prefill 1x2048", 1.8)),
    ("E2", "0.6B prefill 1x2048 in a graph: 6.3 ms, below torch.compile(model)'s",
     graph_ms("0.6b prefill 1x2048 graph", 6.3, "torch.compile(model)")),
    ("E3", "8B prefill 8x2048: 1.33x", speedup("8b prefill 8x2048", 1.33)),
    ("E4", "0.6B generate() with graphs, batch 32: 2.2x reduce-overhead", decoding("0.6b", 32, 2.2)),
    ("E4", "8B generate() with graphs, batch 32: 2.3x reduce-overhead", decoding("8b", 32, 2.3)),
    ("E4", "0.6B generate() with graphs, batch 1: 1.2x", decoding("0.6b", 1, 1.2)),
    ("E4", "8B generate() with graphs, batch 1: 1.2x", decoding("8b", 1, 1.2)),
    ("E4", "ready in 2 s", ready(2.0)),
    ("E5", "0.6B generate(), dynamic cache, new lengths, batch 1: 2.5x", new_lengths(1, 2.5)),
    ("E5", "the same, batch 32: 2.5x", new_lengths(32, 2.5)),
    ("E6", "0.6B training step 4x2048: 2.1x, 1.1x layer.compile()",
     speedup("0.6b training step 4x2048", 2.1, (("layer.compile()", 1.1),))),
    ("E6", "the same: 14 GiB at its peak", peak("0.6b training step 4x2048", 14.0)),
    ("text", "256 greedy tokens are the original's, or part where its two best logits lie closer than bfloat16 resolves", explained),
)  # fmt: skip
"""Row of the table, what is asked, and how the rows say."""


def judge(rows: Iterable[Row]) -> list[Verdict]:
    """Every target, in order."""
    there = Rows(rows)
    verdicts = []
    for row, target, how in TARGETS:
        found = how(there)
        verdicts.append(Verdict(row, target) if found is None else Verdict(row, target, *found))
    return verdicts


def losers(rows: Iterable[Row]) -> list[str]:
    """Where somebody else was faster than ours by more than the noise, one line a row."""
    lines = []
    for row in rows:
        if ours := swapped(row):
            times = {**row["speedup"], "original": 1.0}
            best = max(ours.values())
            ahead = {k: v / best - 1 for k, v in times.items() if k not in ours and v / best > 1 + NOISE}
            where = row["row"]
        elif "kernel" in row and OURS in row.get("us", {}):
            mine = row["us"][OURS]
            ahead = {k: mine / v - 1 for k, v in row["us"].items() if not k.startswith(OURS) and mine / v > 1 + NOISE}
            where = f"{row['kernel']}, {row['shape']}"
        else:
            continue
        if ahead:
            lines.append(f"{where}: " + ", ".join(f"{k} by {v:.0%}" for k, v in sorted(ahead.items(), key=lambda kv: -kv[1])))
    return lines


def table(verdicts: Sequence[Verdict], *, all_of_them: bool = False) -> list[str]:
    """For a terminal: each target that was measured, and under it the figure."""
    said = {True: "met   ", False: "MISSED", None: "      "}
    lines = []
    for v in verdicts:
        if v.met is not None or all_of_them:
            lines += textwrap.wrap(f"{v.row:4} {said[v.met]} {v.target}", 79, subsequent_indent=" " * 12)
            lines += textwrap.wrap(v.measured, 79, initial_indent=" " * 12, subsequent_indent=" " * 12)
    return lines
