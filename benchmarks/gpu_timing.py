"""Timing on a GPU, shared by the benchmarks beside it: device time by graph replay over rotated buffers, host time by loops."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

Call = Callable[[], object]


def device_us(candidates: dict[str, Sequence[Call]], replays: int = 11) -> dict[str, tuple[float, float]]:
    """Median microseconds of one call and the spread (p90 - p10)/median; replays of all candidates are interleaved.

    Each list of calls is captured once as a CUDA graph; a spin kernel before each replay keeps the queue ahead of the host.
    """
    graphs = {}
    for name, calls in candidates.items():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graphs[name] = graph
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(replays + 1):
        for name in list(graphs) if turn % 2 else list(reversed(graphs)):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(200_000)
            start.record()
            graphs[name].replay()
            end.record()
            torch.cuda.synchronize()
            if turn:
                times[name].append(start.elapsed_time(end) * 1e3 / len(candidates[name]))
    return {name: (statistics.median(t), _spread(t)) for name, t in times.items()}


def wall_ms(
    candidates: dict[str, Call], repeats: int = 7, before: dict[str, Call] | None = None
) -> dict[str, tuple[float, float]]:
    """Median wall milliseconds and spread, interleaved; `before` is run untimed ahead of each candidate's turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 2):
        for name in list(candidates) if turn % 2 else list(reversed(candidates)):
            if before:
                before[name]()
            candidates[name]()
            torch.cuda.synchronize()
            start = time.perf_counter()
            candidates[name]()
            torch.cuda.synchronize()
            if turn > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(t), _spread(t)) for name, t in times.items()}


def host_us(call: Call, calls: int = 500, repeats: int = 9) -> float:
    """Median microseconds of CPU that one call costs, the queue never full."""
    times = []
    for turn in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if turn:
            times.append((time.perf_counter() - start) * 1e6 / calls)
    return statistics.median(times)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def element_wise_bandwidth() -> float:
    """Bytes per second of an element-wise kernel over 2 GB, read and written: the ceiling of this card in this run."""
    x = torch.randn(1 << 29, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    took, _ = device_us({"neg": [lambda: torch.neg(x, out=y)]})["neg"]
    return 2 * x.numel() * 2 / (took * 1e-6)


def machine() -> dict[str, object]:
    """What the numbers hold for."""
    import transformers
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write(rows: list[dict[str, object]], path: Path) -> None:
    """Rows and machine as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    part.replace(path)  # whoever ends this run finds whole rows


def _spread(times: list[float]) -> float:
    ordered = sorted(times)
    return (ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]) / statistics.median(times)
