"""Compile in a process of its own, which outlives this one: a short first script must not leave the second one without kernels.

Nothing here waits. Whoever wants the result asks again later; `build.compile` sees to it that two askers compile once.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

from .types import Machine

_CODE = """
import pickle, sys
sys.path[:] = pickle.load(sys.stdin.buffer)  # where the parent found kernelswap and torch
root, machine, into = pickle.load(sys.stdin.buffer)
from kernelswap import build, errors
try:
    build.compile(root, machine, into)
except errors.KernelSwapError as e:
    sys.exit(e.reason)
"""


@dataclass(slots=True)
class Job:
    """One compilation. `failed` is why it came to nothing, once that is known."""

    done: threading.Event = field(default_factory=threading.Event)
    failed: str | None = None


class Background:
    """The compilations that one Swapper has started, each at most once."""

    def __init__(self) -> None:
        self._jobs: dict[tuple[Path, Path, Machine], Job] = {}
        self._lock = threading.Lock()

    def start(self, root: Path, machine: Machine, into: Path) -> Job:
        """Begin to compile the repository `root` as `build.compile` does, unless that was begun before."""
        with self._lock:
            job = self._jobs.get((root, into, machine))
            if job is None:
                job = self._jobs[root, into, machine] = Job()
                _begin(job, root, machine, into)
            return job

    def wait(self, seconds: float | None = None) -> bool:
        """Until everything that was started has ended; `False`: it has not, after `seconds`."""
        with self._lock:
            jobs = list(self._jobs.values())
        return all(job.done.wait(seconds) for job in jobs)


def _begin(job: Job, root: Path, machine: Machine, into: Path) -> None:
    command = [sys.executable, "-c", _CODE]
    try:
        child = subprocess.Popen(  # noqa: S603  # this interpreter, fixed code
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C here is not meant for it
        )
    except OSError as e:
        job.failed = f"no process could be started to compile it: {e}"
        job.done.set()
        return
    given = pickle.dumps([p for p in sys.path if p]) + pickle.dumps((root, machine, into))

    def follow() -> None:
        _, said = child.communicate(given)
        if child.returncode:
            last = said.decode(errors="replace").strip().splitlines()
            job.failed = last[-1] if last else f"the compiling process ended with {child.returncode}"
        job.done.set()

    threading.Thread(target=follow, name="kernelswap-build", daemon=True).start()
