"""Which of two is faster. Interleaved, on fresh inputs, warm or with cold caches; medians with their spread."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COLD = 256 << 20
"""Bytes written between runs to empty the caches of an accelerator (an H200's L2 has 60 MB)."""
COLD_CPU = 8 << 20
"""The same for a processor's L2, at least. Its last level is left alone: there lies the interpreter, in every real run too."""
NOISE = 0.02  # a difference below this share is none, however tight the quartiles
INPUTS = 8  # sets of inputs in rotation: fresh ones, without paying for their making inside the clock
LEAST = 5  # runs of each, whatever the time says


@dataclass(frozen=True, slots=True)
class Measured:
    """Times in seconds per call. `ratio` above 1: the second is faster."""

    median_a: float
    median_b: float
    ratio: float
    """Median over the pairs of runs of (a / b)."""
    spread: float
    """Half the distance between the quartiles of that ratio, relative to it: differences below it are noise."""
    runs: int

    @property
    def faster(self) -> bool:
        """Whether b beats a by more than the noise."""
        return self.ratio > 1.0 + self.noise

    @property
    def slower(self) -> bool:
        """Whether b loses by more than the noise."""
        return self.ratio < 1.0 - self.noise

    @property
    def noise(self) -> float:
        """The share that a difference must exceed: `spread`, or `NOISE` where the quartiles lie closer."""
        return max(self.spread, NOISE)


def compare(
    a: Callable[..., Any],
    b: Callable[..., Any],
    make_inputs: Callable[[], tuple[Any, ...]],
    *,
    seconds: float = 1.0,
    device: torch.device | str = "cpu",
    cold: bool = False,
    inputs: int = INPUTS,
) -> Measured:
    """Time `a(*inputs)` against `b(*inputs)` in turn, a b b a, for about `seconds` in all, at least `LEAST` runs of each.

    Gradients are as the caller set them. On cuda the device's own clock is read, so the launch counts only as far as the
    device waits for it. `cold` empties its L2, or the processor's, before each run. Without it, calls too
    short for the clock are repeated within one run.
    """
    device = torch.device(device)
    sets = [make_inputs() for _ in range(inputs)]
    once = _Cuda(device, cold=cold) if device.type == "cuda" else _Wall(device, cold=cold)
    deadline = time.perf_counter() + seconds
    for given in sets[:2]:  # warm: compilers, caches, clocks
        for f in (a, b):
            once(f, [given])
    times: dict[bool, list[float]] = {False: [], True: []}
    longest = max(once(a, [sets[0]]), once(b, [sets[0]]))
    repeat = 1 if cold else max(1, min(1000, int(once.grain / max(longest, 1e-9))))
    batches = _batches(sets, repeat)
    while time.perf_counter() < deadline or len(times[True]) < LEAST:
        for second in (False, True, True, False):
            times[second].append(once(b if second else a, next(batches)) / repeat)
    return _summary(times[False], times[True])


def _batches(sets: list[tuple[Any, ...]], repeat: int) -> Iterator[list[tuple[Any, ...]]]:
    at = 0
    while True:
        yield [sets[(at + i) % len(sets)] for i in range(repeat)]
        at += repeat


def _summary(a: list[float], b: list[float]) -> Measured:
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Measured(statistics.median(a), statistics.median(b), middle, (high - low) / 2 / middle, len(a))


class _Wall:
    grain = 2e-4
    """Seconds that one timed run should take at least."""

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.flush = torch.empty(second_level(), dtype=torch.int8) if cold else None
        self.wait = getattr(getattr(torch, device.type, None), "synchronize", None) if device.type != "cpu" else None

    def __call__(self, f: Callable[..., Any], batch: list[tuple[Any, ...]]) -> float:
        if self.flush is not None:
            self.flush.add_(1)  # read and written: a block of zeros may be answered by a page that is not there
        start = time.perf_counter()
        for inputs in batch:
            f(*inputs)
        if self.wait is not None:
            self.wait()
        return time.perf_counter() - start


@functools.cache
def second_level() -> int:
    """Bytes to write so that nothing of before is left in the processor's L2: four times its size, `COLD_CPU` at least."""
    largest = 0
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index2/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text(encoding="ascii").strip()
            largest = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1:], 0)
    return max(4 * largest, COLD_CPU)


class _Cuda:
    grain = 1e-4

    def __init__(self, device: torch.device, *, cold: bool) -> None:
        self.device = device
        self.flush = torch.empty(COLD, dtype=torch.int8, device=device) if cold else None
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's own

    def __call__(self, f: Callable[..., Any], batch: list[tuple[Any, ...]]) -> float:
        with torch.cuda.device(self.device):
            if self.flush is not None:
                self.flush.zero_()
            self.start.record()
            for inputs in batch:
                f(*inputs)
            self.end.record()
            self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3
