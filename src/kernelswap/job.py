"""The processes of one job on one machine agree: the first to ask resolves and fetches, the others wait and take its answer.

A launcher (torchrun, accelerate, SLURM) tells its processes which rank they are. Those with one parent and one
rendezvous share a folder in the cache, with a lock and an answer per requirement: the commit that it stood for. So a
branch that moves between two ranks moves for neither, and the hub hears one question, not one per rank. Where the network
failed for the first, it has failed for all for a minute: either every rank has the kernel, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import filelock

from . import errors
from .errors import KernelSwapError
from .types import Candidate, Requirement

AGREED_SECONDS = 600.0
"""For how long an answer is that of the job: a later job of the same parent may have the same name."""
FAILED_SECONDS = 60.0
_LOCK_SECONDS = 1800.0
_OLD = 86_400.0
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Job:
    """What the processes of one job share. A folder that cannot be written means that each asks for itself."""

    folder: Path

    @classmethod
    def of(cls, cache: Path, named: Sequence[tuple[str, str]]) -> Job | None:
        """The job that `named` (`Environment.job`) is about; `None` for a process alone."""
        if not named:
            return None
        about = [platform.node(), os.getppid(), _started(os.getppid()), *map(list, named)]
        return cls(cache / "jobs" / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:40])

    @contextlib.contextmanager
    def turn(self, requirement: Requirement) -> Iterator[None]:
        """One process of the job at a time is in here with `requirement`.

        Raises:
            KernelSwapError: what the network did to another process of the job in its turn.
        """
        lock = self._acquire(self._path(requirement, "lock"))
        try:
            self._raise_former(requirement)
            try:
                yield
            except KernelSwapError as e:
                if e.fault == "network":
                    self._write(self._path(requirement, "failed"), [type(e).__name__, e.found, e.asked, e.todo])
                raise
        finally:
            if lock is not None:
                lock.release()

    def agreed(self, requirement: Requirement) -> Requirement | None:
        """What to look for instead: the commit that another process found; `None` where nobody did."""
        value = self._read(self._path(requirement, "agreed"), AGREED_SECONDS)
        if not (isinstance(value, list) and len(value) == 2 and all(isinstance(v, str) for v in value)):
            return None
        name, commit = value
        if not _COMMIT.fullmatch(commit):
            return None
        return replace(requirement, name=name, version=None, constraints=None, revision=commit, text=None)

    def agree(self, requirement: Requirement, candidates: Sequence[Candidate]) -> None:
        """Tell the others what was found."""
        found = {(c.name, c.commit) for c in candidates}
        if len(found) == 1:
            self._write(self._path(requirement, "agreed"), list(found.pop()))

    def once(self, about: str, decide: Callable[[], Any]) -> Any:
        """What the first process of the job that asked decided `about`: a JSON value. The others wait, and take it."""
        path = self.folder / f"{hashlib.sha256(about.encode()).hexdigest()[:40]}.decided"
        lock = self._acquire(path.with_suffix(".lock"))
        try:
            former = self._read(path, AGREED_SECONDS)
            if isinstance(former, dict) and former.get("about") == about:
                return former["decided"]
            decided = decide()
            self._write(path, {"about": about, "decided": decided})
            return decided
        finally:
            if lock is not None:
                lock.release()

    def _raise_former(self, requirement: Requirement) -> None:
        value = self._read(self._path(requirement, "failed"), FAILED_SECONDS)
        if isinstance(value, list) and len(value) == 4 and all(v is None or isinstance(v, str) for v in value):
            kind = next((k for k in (errors.Unreachable, errors.NotCached) if k.__name__ == value[0]), None)
            if kind is not None:
                raise kind(value[1] or "", asked=value[2], todo=value[3])

    def _path(self, requirement: Requirement, what: str) -> Path:
        text = str(replace(requirement, layer=None, text=None))
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.{what}"

    def _acquire(self, path: Path) -> filelock.BaseFileLock | None:
        try:
            if not self.folder.exists():
                _clean(self.folder.parent)
                self.folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path, timeout=_LOCK_SECONDS)
            lock.acquire()
        except (OSError, NotImplementedError):  # a read-only cache, no locks here, or held for too long: each for itself
            return None
        return lock

    def _read(self, path: Path, seconds: float) -> Any:
        try:
            return json.loads(path.read_bytes()) if abs(time.time() - path.stat().st_mtime) < seconds else None
        except (OSError, ValueError, RecursionError):
            return None

    def _write(self, path: Path, value: object) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(value), encoding="utf-8")
            temporary.replace(path)


def _started(pid: int) -> str:
    """When a process began, where the system says so: its number alone is given again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _clean(jobs: Path) -> None:
    with contextlib.suppress(OSError):
        for folder in jobs.iterdir():
            if time.time() - folder.stat().st_mtime > _OLD:
                shutil.rmtree(folder, ignore_errors=True)
