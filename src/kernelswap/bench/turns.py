"""Several sides of one question, timed in turn: warm or with cold caches, by the wall or by the device's own clock.

Who goes first changes from turn to turn, so that a machine that grows warm or busy does so for all sides.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .ab import SHORTEST, Times

Side = Callable[[], Any]
COLD_GPU = 256 << 20
"""Bytes written to empty the caches of an accelerator (an H200's L2 has 60 MB)."""
_COLD_CPU = 64 << 20  # where the machine does not say how large its last cache is


def take_turns(
    sides: Mapping[str, Side], *, turns: int, warmup: int, device: str = "cpu", cold: bool = False
) -> dict[str, Times]:
    """Seconds per call of each side, from `turns` samples of each (at least 1), after `warmup` calls of each.

    On cuda they are the device's own seconds; elsewhere the wall's, until the device is done. Calls that are too short for the
    clock are repeated within a sample, unless `cold`: then the caches are emptied before each call.
    """
    clock = _Events() if device.startswith("cuda") else _Wall(device)
    flush = _flusher(device) if cold else None
    for _ in range(warmup):
        for side in sides.values():
            side()
    repeats = {name: 1 if cold else max(1, int(SHORTEST / max(clock(side, 1), 1e-9))) for name, side in sides.items()}
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        order = list(sides.items())
        at = turn % len(order)
        for name, side in [*order[at:], *order[:at]]:
            if flush is not None:
                flush()
            samples[name].append(clock(side, repeats[name]))
    return {name: Times.of(seconds) for name, seconds in samples.items()}


def captured(side: Side) -> Side:
    """`side` as a CUDA graph to be replayed.

    Raises:
        Whatever the capture of something that cannot be captured raises; mostly RuntimeError.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            side()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side()
    return graph.replay


class _Wall:
    def __init__(self, device: str) -> None:
        module = getattr(torch, device.partition(":")[0], None)
        self.wait: Side = getattr(module, "synchronize", None) or (lambda: None)

    def __call__(self, side: Side, repeats: int) -> float:
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            side()
        self.wait()
        return (time.perf_counter() - start) / repeats


class _Events:
    def __init__(self) -> None:
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own

    def __call__(self, side: Side, repeats: int) -> float:
        self.start.record()
        for _ in range(repeats):
            side()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3 / repeats


def _flusher(device: str) -> Side:
    if not device.startswith("cpu"):
        return torch.empty(COLD_GPU, dtype=torch.int8, device=device).zero_
    try:
        size = 2 * os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (AttributeError, OSError, ValueError):
        size = 0
    return torch.empty(max(size, _COLD_CPU), dtype=torch.int8).zero_
