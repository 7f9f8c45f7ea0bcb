"""A model without and with kernels, side by side: times from interleaved runs, peak memory, distance to float64.

Both sides are alive at once and share their parameters: the original is a `twin` of the swapped model. Runs take turns,
and the order within a turn alternates, so that a machine that grows warm or busy does so for both.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from ..types import Progress
    from .subject import Subject

SHORTEST = 2e-4  # seconds per sample; below it a clock's own steps and one interrupt would show
NOISE = 0.02  # a difference below this share is none, however tight the quartiles


@dataclass(frozen=True)
class Times:
    """Seconds of one side: the median, and the quartiles around it."""

    median: float
    low: float
    high: float
    runs: int

    @staticmethod
    def of(samples: list[float]) -> Times:
        """From at least one sample, in seconds."""
        if len(samples) == 1:
            return Times(samples[0], samples[0], samples[0], 1)
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return Times(median, low, high, len(samples))


@dataclass(frozen=True)
class Pair:
    """Both sides of one measurement. `speedup` over 1: the kernel is faster. It is the median over the turns' own ratios."""

    original: Times
    kernel: Times
    speedup: float
    low: float
    """Lower and upper quartile of the turns' ratios."""
    high: float

    @property
    def slower(self) -> bool:
        """The kernel loses by more than noise."""
        return self.speedup < 1 - NOISE and self.high < 1

    @property
    def faster(self) -> bool:
        """The kernel wins by more than noise."""
        return self.speedup > 1 + NOISE and self.low > 1


class Turns:
    """Collects samples of two sides that take turns."""

    def __init__(self) -> None:
        self.original: list[float] = []
        self.kernel: list[float] = []

    def pair(self) -> Pair:
        """What was measured. Needs at least one sample of each side."""
        ratios = Times.of([a / b for a, b in zip(self.original, self.kernel, strict=True)])
        return Pair(Times.of(self.original), Times.of(self.kernel), ratios.median, ratios.low, ratios.high)


def interleave(
    original: Callable[[], Any], kernel: Callable[[], Any], *, seconds: float, device: str = "cpu", least: int = 5
) -> Pair:
    """Both in turn for about `seconds`, at least `least` turns. A short call is repeated within a sample to `SHORTEST`."""
    wait = waiter(device)
    for side in (original, kernel, original, kernel):
        side()
    wait()
    once = min(_sample(side, 1, wait) for side in (original, kernel, original, kernel))
    repeats = max(1, int(SHORTEST / max(once, 1e-9)))
    turns, end = Turns(), time.perf_counter() + seconds
    while len(turns.original) < least or time.perf_counter() < end:
        sides = [(original, turns.original), (kernel, turns.kernel)]
        for side, into in sides if len(turns.original) % 2 else sides[::-1]:
            into.append(_sample(side, repeats, wait))
    return turns.pair()


def _sample(side: Callable[[], Any], repeats: int, wait: Callable[[], None]) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        side()
    wait()
    return (time.perf_counter() - start) / repeats


def waiter(device: str) -> Callable[[], None]:
    """What to call so that everything that was launched has happened."""
    import torch

    kind = device.partition(":")[0]
    module = getattr(torch, kind, None)
    return getattr(module, "synchronize", None) or (lambda: None) if kind != "cpu" else lambda: None


# -- the other side -----------------------------------------------------------------------------------------------


def twin(model: nn.Module) -> nn.Module:
    """A copy of every module that shares every parameter and buffer: the same model, at no memory, to swap or to keep."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def exact(model: nn.Module) -> nn.Module:
    """A copy in float64: the reference."""
    return copy.deepcopy(model).double()


# -- the whole model ----------------------------------------------------------------------------------------------


def whole(
    subject: Subject,
    original: nn.Module,
    kernel: nn.Module,
    *,
    seconds: float,
    device: str = "cpu",
    steps: int = 8,
    progress: Progress | None = None,
) -> dict[str, Pair]:
    """`prefill` and `decode` of a causal model, `forward` of an encoder.

    Prefill is one forward over the prompt with an empty cache. Decode is one forward with one new token on the cache
    that this prefill left; `steps` of them follow each prefill, and each is a sample.
    """
    import torch

    wait = waiter(device)
    turns = {name: Turns() for name in (("prefill", "decode") if subject.kind == "causal" else ("forward",))}
    with torch.no_grad():
        for model in (original, kernel):
            for _ in _phases(subject, model, 2, wait):
                pass
        start, turn = time.perf_counter(), 0
        while turn < 3 or time.perf_counter() - start < seconds:  # a median wants three
            sides = [("original", original), ("kernel", kernel)]
            for name, model in sides if turn % 2 else sides[::-1]:
                for phase, took in _phases(subject, model, steps, wait):
                    getattr(turns[phase], name).append(took)
            turn += 1
            if progress:
                progress("timing the whole model", min(time.perf_counter() - start, seconds), seconds)
        if progress:
            progress("timing the whole model", seconds, seconds)
    return {name: t.pair() for name, t in turns.items()}


def _phases(subject: Subject, model: nn.Module, steps: int, wait: Callable[[], None]) -> Iterator[tuple[str, float]]:
    if subject.kind == "encoder":
        start = time.perf_counter()
        model(**subject.inputs)
        wait()
        yield "forward", time.perf_counter() - start
        return
    start = time.perf_counter()
    out = model(**subject.inputs, use_cache=True)
    wait()
    yield "prefill", time.perf_counter() - start
    token = out.logits[:, -1:].argmax(-1)
    for _ in range(steps):
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        wait()
        yield "decode", time.perf_counter() - start
        token = out.logits[:, -1:].argmax(-1)


def step(subject: Subject, model: nn.Module) -> None:
    """One training step short of the optimiser: forward in train mode, loss, backward. The gradients are dropped.

    The loss is the causal model's own on the prompt; of an encoder the mean square of its last hidden states.
    """
    model.train()
    try:
        if subject.kind == "causal":
            loss = model(**subject.inputs, labels=subject.inputs["input_ids"], use_cache=False).loss
        else:
            loss = model(**subject.inputs)[0].float().square().mean()
        loss.backward()
    finally:
        model.zero_grad(set_to_none=True)
        model.eval()


def training(
    subject: Subject,
    original: nn.Module,
    kernel: nn.Module,
    *,
    seconds: float,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Pair:
    """A training step (`step`) of both in turns, three turns at least."""
    wait, turns = waiter(device), Turns()
    for model in (original, kernel):
        step(subject, model)
    wait()
    start = time.perf_counter()
    while len(turns.original) < 3 or time.perf_counter() - start < seconds:
        if progress:
            progress("timing training steps", min(time.perf_counter() - start, seconds), seconds)
        sides = [(original, turns.original), (kernel, turns.kernel)]
        for model, into in sides if len(turns.original) % 2 else sides[::-1]:
            begun = time.perf_counter()
            step(subject, model)
            wait()
            into.append(time.perf_counter() - begun)
    if progress:
        progress("timing training steps", seconds, seconds)
    return turns.pair()


# -- how far from the truth, and how much memory -------------------------------------------------------------------


def distance(output: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest error of a row, relative to that row: max over rows of |x - r| / |r|, both (..., N), in float64."""
    a, r = output.double().flatten(0, -2), reference.double().flatten(0, -2)
    return float(((a - r).norm(dim=-1) / r.norm(dim=-1).clamp_min(1e-300)).max())


def peak(run: Callable[[], Any], device: str = "cpu", *, least_of: int = 2) -> int | None:
    """Bytes that `run` needs beyond what was held before it, at its worst moment; `None` where nobody counts.

    CUDA: the allocator's own count. Linux: the kernel's high-water mark of resident memory, reset before each of
    `least_of` runs, of which the least counts: whatever else happened in the process only ever adds.
    """
    gc.collect()
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if device != "cpu" or sys.platform != "linux":
        return None
    with suppress(OSError):
        return min(_resident(run) for _ in range(least_of))
    return None


def _resident(run: Callable[[], Any]) -> int:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed; then the next run needs "nothing"
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field + ":"))
