"""A contest: everything that may serve a model's sites, timed within a budget, one process at a time on a machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from ..types import Outcome, Progress
from .speed import Speeds

LEAST, MOST = 0.1, 0.5  # seconds for one candidate at one size; a call that takes longer is made five times all the same
WAIT = 600.0  # seconds beyond its own budget that a contest waits for another one on this machine


@dataclass(frozen=True)
class Contest:
    """What was found. `speeds` has every measurement; `outcomes` is what `choose="measured"` gives now."""

    speeds: Speeds
    outcomes: tuple[Outcome, ...]
    measured: int
    """Now; whatever else is there was kept from before."""
    left: int
    """Not measured yet: the time was up."""


def hold(
    speeds: Speeds, plan: Callable[[], tuple[Outcome, ...]], *, seconds: float, lock: Path, progress: Progress | None = None
) -> Contest:
    """Measure what is missing until nothing is, or for `seconds`. `plan` plans with `speeds`, which tells it what there is.

    An original that proves to be the fastest may hold sites of its own, which are planned, and measured, thereafter.
    """
    tell, done = progress or (lambda *_: None), 0
    with _alone(lock, 2 * seconds + WAIT):
        end: float | None = None
        while True:
            outcomes, todo = plan(), list(speeds.missing())
            end = time.monotonic() + seconds if end is None else end  # what is compiled for the first plan is no measuring
            for i, (entry, spec, candidate, bucket) in enumerate(todo):
                if (left := end - time.monotonic()) <= 0:
                    break
                tell("measuring candidates", i, len(todo))
                tell(f"{entry.site.layer}: {spec}", 0, 0)
                speeds.measure(entry, candidate, bucket, seconds=min(MOST, max(LEAST, left / (len(todo) - i))))
                tell(f"{entry.site.layer}: {spec}", 1, 1)
                done += 1
            if todo:
                tell("measuring candidates", len(todo), len(todo))
            if not todo or time.monotonic() >= end:
                return Contest(speeds, plan() if todo else outcomes, done, sum(1 for _ in speeds.missing()))


@contextlib.contextmanager
def _alone(lock: Path, seconds: float) -> Iterator[None]:
    """One process at a time, waiting for `seconds` at most; where no file can be locked, nobody waits."""
    held: filelock.BaseFileLock | None = None
    with contextlib.suppress(OSError, NotImplementedError):  # a timeout is an OSError, too
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(lock, timeout=seconds)
        held.acquire()
    try:
        yield
    finally:
        if held is not None:
            held.release()
