"""Verdicts on disk: small JSON files, one per key, written atomically and shared between processes.

A file that somebody else wrote must not make a kernel accepted: each carries an HMAC under a key of this user (a file of mode
0600 outside the verdicts, so that a shared or copied cache brings no verdicts along). What does not verify counts as not there.
Taking over verdicts from elsewhere is an explicit act: `import_`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tempfile
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs

from ..errors import BadMetadata
from ..types import Verdict

FORMAT = 1
LARGEST = 1 << 16  # bytes of one file; a verdict is about 600


class Verdicts:
    """The verdicts of one machine's user. Thread-safe; any number of processes may share `path`.

    A directory that cannot be written keeps its verdicts in this process alone.
    """

    def __init__(self, path: Path, *, key: Path | None = None) -> None:
        """`path`: a directory, made when needed. `key`: the file with the user's secret, by default in their data directory."""
        self.path = path
        self._key_file = key or platformdirs.user_data_path("kernelswap") / "verdicts.key"
        self._secret: bytes | None = None
        self._memo: dict[str, Verdict] = {}
        self._lock = threading.Lock()

    def get(self, key: str) -> Verdict | None:
        """The verdict for `key`, or None when there is none that is ours."""
        found = self._memo.get(key)
        if found is None and (found := self._read(self._file(key))) is not None:
            if found.key != key:
                return None
            self._memo[key] = found
        return found

    def put(self, verdict: Verdict) -> None:
        """Keep `verdict` under its key, here and on disk. A full or read-only disk costs a new check next time, nothing else."""
        if not verdict.key:
            raise ValueError("a verdict without a key holds for nothing")
        self._memo[verdict.key] = verdict
        with contextlib.suppress(OSError):
            self._write(verdict)

    def forget(self, key: str) -> None:
        """Drop one verdict, here and on disk."""
        self._memo.pop(key, None)
        with contextlib.suppress(OSError):
            self._file(key).unlink()

    def __iter__(self) -> Iterator[Verdict]:
        """All verdicts on disk that are ours, by key."""
        for file in sorted(self.path.glob("[0-9a-f][0-9a-f]/*.json")):
            if (found := self._read(file)) is not None and file.stem == found.key:
                yield found

    def export(self, *, digests: Collection[str] | None = None) -> dict[str, Any]:
        """Verdicts as plain JSON, to travel with a lock. Without signatures: who imports them decides to trust them.

        `digests`: of the builds whose verdicts are wanted; all of them by default.
        """
        wanted = [v for v in self if digests is None or dict(v.details).get("digest") in digests]
        return {"format": FORMAT, "verdicts": [dataclasses.asdict(v) for v in wanted]}

    def import_(self, exported: Mapping[str, Any]) -> int:
        """Take over verdicts that `export` gave elsewhere, as this user's own. Returns how many.

        Their keys name the machine that they hold for, so they serve on machines of that kind only.

        Raises:
            BadMetadata: not an export of this format; nothing was taken over.
        """
        verdicts = _exported(exported)
        for verdict in verdicts:
            self.put(verdict)
        return len(verdicts)

    def lend(self, exported: Mapping[str, Any]) -> int:
        """As `import_`, for as long as this object lives: nothing is written. Our own verdicts go over them."""
        verdicts = _exported(exported) if exported else []
        for verdict in verdicts:
            if self.get(verdict.key) is None:
                self._memo[verdict.key] = verdict
        return len(verdicts)

    # -- files --

    def _file(self, key: str) -> Path:
        if not key or any(c not in "0123456789abcdef" for c in key):
            raise ValueError(f"a verdict's key is a hexadecimal digest, not {key!r}")
        return self.path / key[:2] / f"{key}.json"

    def _read(self, file: Path) -> Verdict | None:
        try:
            data = file.read_bytes() if file.stat().st_size <= LARGEST else b""
            raw = json.loads(data)
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("mac"), str):
            return None
        body = raw.get("verdict")
        if not hmac.compare_digest(self._mac(body).encode(), raw["mac"].encode()):
            return None
        return _verdict(body)

    def _write(self, verdict: Verdict) -> None:
        file, body = self._file(verdict.key), dataclasses.asdict(verdict)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                json.dump({"format": FORMAT, "verdict": body, "mac": self._mac(body)}, out, indent=1)
            Path(name).replace(file)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise

    def _mac(self, body: Any) -> str:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        return hmac.new(self._own_secret(), text.encode(), hashlib.sha256).hexdigest()

    def _own_secret(self) -> bytes:
        with self._lock:
            if self._secret is None:
                self._secret = _secret(self._key_file)
            return self._secret


def _secret(file: Path) -> bytes:
    """The user's secret, made on first use. Where no file can hold it, one that lives as long as this process."""
    with contextlib.suppress(OSError):
        if (held := _held(file)) is not None:
            return held
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent)  # mode 0600 from the start
        try:
            with os.fdopen(handle, "wb") as out:
                out.write(secrets.token_bytes(32))
            if file.exists():  # readable by others, or damaged: whatever it signed is void
                Path(name).replace(file)
            else:
                with contextlib.suppress(FileExistsError):  # another process was faster: its secret counts
                    os.link(name, file)
        finally:
            with contextlib.suppress(OSError):
                Path(name).unlink()
        if (held := _held(file)) is not None:
            return held
    return secrets.token_bytes(32)


def _held(file: Path) -> bytes | None:
    try:
        about = file.stat()
        held = file.read_bytes()
    except OSError:
        return None
    if os.name == "posix" and (about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077):
        return None
    return held if len(held) == 32 else None


def _exported(exported: Mapping[str, Any]) -> list[Verdict]:
    if exported.get("format") != FORMAT or not isinstance(exported.get("verdicts"), list):
        raise BadMetadata(
            f"format {exported.get('format')!r} is not {FORMAT}",
            asked="import verdicts",
            todo="Export them again with this version of kernelswap.",
        )
    found = []
    for number, raw in enumerate(exported["verdicts"]):
        verdict = _verdict(raw)
        if verdict is None or not re.fullmatch("[0-9a-f]{1,128}", verdict.key):
            raise BadMetadata(f"entry {number} is no verdict", asked="import verdicts", todo="Export them again.")
        found.append(verdict)
    return found


def _verdict(raw: Any) -> Verdict | None:
    if not isinstance(raw, dict) or set(raw) != {f.name for f in dataclasses.fields(Verdict)}:
        return None
    numbers = (raw[n] for n in ("error_original", "error_kernel", "seconds_original", "seconds_kernel"))
    details = raw["details"]
    fine = (
        isinstance(raw["accepted"], bool)
        and isinstance(raw["reason"], str)
        and isinstance(raw["key"], str)
        and all(n is None or (isinstance(n, int | float) and not isinstance(n, bool)) for n in numbers)
        and isinstance(details, list | tuple)
        and all(isinstance(d, list | tuple) and len(d) == 2 and all(isinstance(t, str) for t in d) for d in details)
    )
    return Verdict(**{**raw, "details": tuple((str(a), str(b)) for a, b in details)}) if fine else None
