"""Timing on a GPU, shared by the benchmarks beside it: device time by graph replay over rotated buffers, host time by loops.

Without CUDA the same functions read the wall clock: the scripts run then, at sizes that say nothing, which is how they are tested.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import torch

Call = Callable[[], object]
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def synchronize() -> None:
    """Wait for the device, where there is one to wait for."""
    if CUDA:
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Give back what nobody holds."""
    if CUDA:
        torch.cuda.empty_cache()


def free_bytes() -> int:
    """Device memory that a benchmark may take."""
    if not CUDA:
        return 4 << 30
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def device_us(
    candidates: dict[str, Sequence[Call]], replays: int = 11, failed: dict[str, str] | None = None
) -> dict[str, tuple[float, float]]:
    """Median microseconds of one call and the spread (p90 - p10)/median; replays of all candidates are interleaved.

    Each list of calls is captured once as a CUDA graph; a spin kernel before each replay keeps the queue ahead of the host.
    With `failed`, what cannot be captured is left out and why is kept there.
    """
    if not CUDA:
        return queued_us(candidates, replays=1, failed=failed)
    graphs = _each(candidates, lambda calls: captured(calls).replay, failed)
    return _events(graphs, {name: len(calls) for name, calls in candidates.items()}, replays, spin=200_000)


def queued_us(
    candidates: dict[str, Sequence[Call]], replays: int = 11, failed: dict[str, str] | None = None
) -> dict[str, tuple[float, float]]:
    """The same without capture, for calls that take long on the device or wait for it themselves: between two events of the stream."""

    def once(calls: Sequence[Call]) -> Call:
        def run() -> None:
            for call in calls:
                call()

        run()
        return run

    runs = _each(candidates, once, failed)
    counts = {name: len(calls) for name, calls in candidates.items()}
    if CUDA:
        return _events(runs, counts, replays, spin=1_000_000)
    took = wall_ms(runs, replays, warm=0)
    return {name: (ms * 1e3 / counts[name], spread) for name, (ms, spread) in took.items()}


def _each(
    candidates: dict[str, Sequence[Call]], make: Callable[[Sequence[Call]], Call], failed: dict[str, str] | None
) -> dict[str, Call]:
    made = {}
    for name, calls in candidates.items():
        try:
            made[name] = make(calls)
        except Exception as e:  # noqa: PERF203  # what the others can do is still to be found
            if failed is None:
                raise
            failed[name] = first_line(e)
    return made


def first_line(e: BaseException) -> str:
    """An error as a cell of a table."""
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:160] if text else ''}"


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """All calls in one graph, run once before."""
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
    return graph


def _events(runs: dict[str, Call], counts: dict[str, int], replays: int, *, spin: int) -> dict[str, tuple[float, float]]:
    times = turns(runs, counts, replays, spin=spin)
    return {name: (statistics.median(t), _spread(t)) for name, t in times.items()}


def turns(runs: dict[str, Call], counts: dict[str, int], replays: int, *, spin: int = 200_000) -> dict[str, list[float]]:
    """Microseconds of one of each run's calls, turn by turn; all take turns, and the first one is forgotten."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(replays + 1):
        for name in list(runs) if turn % 2 else list(reversed(runs)):
            took = _once(runs[name], spin)
            if turn:
                times[name].append(took / counts[name])
    return times


def _once(run: Call, spin: int) -> float:
    if not CUDA:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(spin)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e3


def wall_ms(
    candidates: dict[str, Call], repeats: int = 7, before: dict[str, Call] | None = None, warm: int = 2
) -> dict[str, tuple[float, float]]:
    """Median wall milliseconds and spread, interleaved; `before` is run untimed ahead of each candidate's turn.

    `warm` turns are run and forgotten; with none, a candidate is not called ahead of its timed call either.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + warm):
        for name in list(candidates) if turn % 2 else list(reversed(candidates)):
            if before:
                before[name]()
            if warm:
                candidates[name]()
            synchronize()
            start = time.perf_counter()
            candidates[name]()
            synchronize()
            if turn >= warm:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(t), _spread(t)) for name, t in times.items()}


def host_us(call: Call, calls: int = 500, repeats: int = 9) -> float:
    """Median microseconds of CPU that one call costs, the queue never full."""
    times = []
    for turn in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls if CUDA else 3):
            call()
        if turn:
            times.append((time.perf_counter() - start) * 1e6 / (calls if CUDA else 3))
    return statistics.median(times)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def peak_since(call: Call) -> int:
    """Bytes that `call` held beyond what was there before, at its highest."""
    if not CUDA:
        call()
        return 0
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def element_wise_bandwidth() -> float:
    """Bytes per second of an element-wise kernel over 2 GB, read and written: the ceiling of this card in this run."""
    x = torch.randn(min(1 << 29, free_bytes() // 16) if CUDA else 1 << 16, device=DEVICE, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    took, _ = device_us({"neg": [lambda: torch.neg(x, out=y)]})["neg"]
    return 2 * x.numel() * 2 / (took * 1e-6)


def read_bandwidth() -> float:
    """Bytes per second of the fastest reader here: a sum, or torch's attention of one token over a large cache."""
    x = torch.randn(min(1 << 29, free_bytes() // 16) if CUDA else 1 << 16, device=DEVICE, dtype=torch.bfloat16)
    total = torch.empty((), device=DEVICE, dtype=torch.float32)
    reads = {"sum": [lambda: torch.sum(x, dim=0, dtype=torch.float32, out=total)]}
    bytes_read = {"sum": x.numel() * 2}
    heads, keys = 8, 32768 if CUDA else 64
    batch = min(32, free_bytes() // (8 * heads * keys * 128)) if CUDA else 1
    if batch:
        k, v = (torch.randn(batch, heads, keys, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        q = torch.randn(batch, 4 * heads, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        reads["attention"] = [lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)]
        bytes_read["attention"] = (k.numel() + v.numel()) * 2
    with torch.no_grad():
        return max(bytes_read[name] / (us * 1e-6) for name, (us, _) in device_us(reads).items())


def matrix_rate() -> float:
    """Operations per second of a bf16 product on random data."""
    n = 8192 if CUDA else 64
    left, right = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / (device_us({"mm": [lambda: left @ right] * 8})["mm"][0] * 1e-6)


def machine() -> dict[str, object]:
    """What the numbers hold for."""
    about: dict[str, object] = {"gpu": None, "torch": torch.__version__, "python": platform.python_version()}
    if CUDA:
        properties = torch.cuda.get_device_properties(0)
        about |= {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return about | {name: version(name) for name in ("triton", "transformers")}


def version(distribution: str) -> str | None:
    """Which release is installed; `None`: none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def write(rows: list[dict[str, object]], path: Path, **more: object) -> None:
    """Rows, machine and whatever else, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), **more, "rows": rows}, indent=1) + "\n")
    part.replace(path)  # whoever ends this run finds whole rows


def _spread(times: list[float]) -> float:
    ordered = sorted(times)
    return (ordered[int(0.9 * (len(ordered) - 1))] - ordered[int(0.1 * (len(ordered) - 1))]) / statistics.median(times)
