"""What was loaded, on record: `<cache>/audit.jsonl`, one JSON object a line, only ever appended to.

    {"format": 1, "event": "load", "time": "2026-01-31T12:00:00.123+00:00", "spec": "org/kernel@1", "source": "hub",
     "name": "org/kernel", "commit": "...", "variant": "...", "digest": "...", "license": "MIT",
     "evidence": [["publisher", "..."], ...], "depends": ["<digest>", ...],
     "process": {"pid": 4711, "executable": "/usr/bin/python3", "script": "train.py", "kernelswap": "0.1"}}

A line is written before the import, so that a kernel which ends the process is on record too; an import that failed
adds a line with `event` `failed` and the `reason`. It is a record for people who look back, not evidence against the
user's own account: code that was loaded can rewrite it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import stat
import sys
import threading
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import filelock

from ._version import __version__
from .types import Artifact

FORMAT = 1
MAX_BYTES = 8 << 20
"""A file of this size is put aside before the next line."""
KEPT = 4
"""Older files: `audit.1.jsonl` is the youngest of them."""

_log = logging.getLogger(__name__)
_FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_lock = threading.Lock()
_written: set[tuple[Path, int, str, str, str, str]] = set()
_silent: set[Path] = set()


@dataclass(frozen=True, slots=True)
class Audit:
    """One log. Safe to share between threads and processes. A log that cannot be written breaks nothing and is noted once."""

    path: Path
    max_bytes: int = MAX_BYTES

    def loading(self, artifact: Artifact) -> None:
        """What `artifact` depends on, and itself, will be imported; a line for each that this process has not had."""
        for one in _with_depends(artifact):
            key = self._key(one)
            with _lock:
                if key in _written:
                    continue
                _written.add(key)
            self._append({"event": "load", **_about(one)})

    def failed(self, artifact: Artifact, reason: str) -> None:
        """The import of `artifact` came to nothing. Loading it again will be on record again."""
        with _lock:
            _written.discard(self._key(artifact))
        self._append({"event": "failed", "reason": reason[:2000], **_about(artifact)})

    def _key(self, artifact: Artifact) -> tuple[Path, int, str, str, str, str]:
        c = artifact.candidate
        return self.path, os.getpid(), artifact.digest, c.source, c.name, c.commit  # pid: a fork is another process

    def _append(self, value: dict[str, Any]) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"format": FORMAT, "time": now, **value, "process": _process()}, ensure_ascii=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._rotate()
            self._write(line.encode("ascii") + b"\n")
        except OSError as e:
            if self.path not in _silent:
                _silent.add(self.path)
                _log.warning("what is loaded is not on record, since %s cannot be written: %s", self.path, e.strerror or e)

    def _write(self, line: bytes) -> None:
        file = os.open(self.path, _FLAGS, 0o600)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(None, "it is no regular file")
            if os.write(file, line) < len(line):  # one write: lines of other processes go before or after it
                with contextlib.suppress(OSError):
                    os.write(file, b"\n")  # what is torn spoils no line but its own
                raise OSError(None, "no space left")
        finally:
            os.close(file)

    def _rotate(self) -> None:
        """Put a full file aside. Whoever writes into it meanwhile finds the line there: nothing is copied."""
        if not self._full():
            return
        lock = filelock.FileLock(self.path.with_suffix(".lock"), timeout=1.0)
        with contextlib.suppress(NotImplementedError, OSError), lock:  # not had: the file grows larger than meant, and is whole
            if self._full():  # nobody did it while we waited
                aside = [self.path, *(self.path.with_suffix(f".{n}{self.path.suffix}") for n in range(1, KEPT + 1))]
                for older, younger in itertools.pairwise(reversed(aside)):
                    with contextlib.suppress(FileNotFoundError):
                        younger.replace(older)

    def _full(self) -> bool:
        try:
            return self.path.lstat().st_size >= self.max_bytes
        except FileNotFoundError:
            return False


def _with_depends(artifact: Artifact) -> list[Artifact]:
    return [*(found for below in artifact.depends for found in _with_depends(below)), artifact]


def _about(artifact: Artifact) -> dict[str, Any]:
    c = artifact.candidate
    return {
        "spec": str(c.requirement),
        "source": c.source,
        "name": c.name,
        "commit": c.commit,
        "variant": c.variant,
        "digest": artifact.digest,
        "license": artifact.metadata.license,
        "evidence": [[e.verifier, e.statement] for e in artifact.evidence],
        "depends": [below.digest for below in artifact.depends],
    }


def _process() -> dict[str, Any]:
    script = sys.argv[0] if sys.argv else ""  # alone: arguments may hold secrets
    return {"pid": os.getpid(), "executable": sys.executable, "script": script, "kernelswap": __version__}
