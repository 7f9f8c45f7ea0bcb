"""Measured configurations of bundled kernels: one readable JSON file for each kernel, device and set of versions that they hold for.

A file is named by, and repeats, what its choices hold for: the digest of the kernel's files, the device's name and capability, torch
and Triton. Where one of these changes another file is looked for, so that nothing stale is found. Whoever writes replaces the whole
file under a lock, so that processes share it; a damaged file counts as not there. What a kernel does with a choice that is not among
those it names is the kernel's affair: it takes none (`tuning.py` of each bundled repository).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import filelock

from . import strict
from .errors import BadMetadata

FORMAT = 1
LARGEST = 4 << 20
"""Bytes of one file; a choice with its figures is about 500."""
WAIT = 10.0  # seconds for another process that writes; it takes milliseconds

Choice = Mapping[str, Any]
Find = Callable[[str, str, int], "Mapping[str, Any] | None"]


def place(device: int) -> dict[str, str]:
    """What a measurement on `device`, an index as `Tensor.get_device()` gives it, holds for besides the kernel."""
    import torch

    about = {"torch": str(torch.__version__), "triton": _triton()}
    if device < 0 or not torch.cuda.is_available():
        return {"device": "cpu", "capability": "", **about}
    found = torch.cuda.get_device_properties(device)
    return {"device": str(found.name), "capability": f"{found.major}.{found.minor}", **about}


def _triton() -> str:
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return str(getattr(sys.modules.get("triton"), "__version__", ""))


class Tunings:
    """The files in one directory. Any number of processes may share it; one that cannot be written keeps nothing.

    A record says what was found for one kernel and one bucket: `config`, the values that beat the default's by more than the
    noise, or null where none did, and whatever else there is to say of the measurement.
    """

    def __init__(self, path: Path) -> None:
        """`path`: a directory, made when needed."""
        self.path = path

    def file(self, digest: str, at: Mapping[str, str]) -> Path:
        """Where the choices for a kernel with this digest are, at a `place`."""
        unique = hashlib.sha256(repr((FORMAT, digest, sorted(at.items()))).encode()).hexdigest()
        return self.path / f"{unique[:20]}.json"

    def read(self, digest: str, at: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]]:
        """Kernel name, bucket, record. Empty where there is no file, or one that is not whole."""
        return _records(self.file(digest, at), {"digest": digest, **at}) or {}

    def put(
        self, digest: str, at: Mapping[str, str], name: str, bucket: str, record: Mapping[str, Any], *, kernel: str = ""
    ) -> None:
        """Keep one record, over a former one. `kernel`: the repository's name, for who reads the file.

        Raises:
            OSError: the directory cannot be written.
            filelock.Timeout: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.file(digest, at)
        with filelock.FileLock(file.with_suffix(".lock"), timeout=WAIT):
            kept = self.read(digest, at)
            kept.setdefault(name, {})[bucket] = dict(record)
            _write(file, {"format": FORMAT, "kernel": kernel, "digest": digest, **at, "choices": kept})

    def finder(self, digest: str) -> Find:
        """What a kernel asks: `(name, bucket, device index) -> values or None`. Reads once for each device, when first asked."""
        known: dict[int, dict[str, dict[str, dict[str, Any]]]] = {}

        def find(name: str, bucket: str, device: int) -> Mapping[str, Any] | None:
            if device not in known:
                known[device] = self.read(digest, place(device))
            config = known[device].get(name, {}).get(bucket, {}).get("config")
            return config if isinstance(config, dict) else None

        return find

    def tuned(self, digest: str, device: int) -> tuple[str, ...]:
        """In words, which kernels of a repository have choices on a device, see `won`."""
        return won(self.read(digest, place(device)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Every whole file, as it stands."""
        for file in sorted(self.path.glob("*.json")):
            if (found := _whole(file)) is not None:
                yield found


def won(choices: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """In words, for which of those something beat the default: `rope (2 of 3 measured)`."""
    counts = {name: sum(isinstance(r.get("config"), dict) for r in buckets.values()) for name, buckets in choices.items()}
    return tuple(f"{name} ({counts[name]} of {len(choices[name])} measured)" for name in sorted(counts) if counts[name])


def hand_in(module: ModuleType, digest: str, tunings: Tunings) -> None:
    """Give a kernel that asks for measured configurations those of this directory. One that does not ask is left alone."""
    use = getattr(getattr(module, "tuning", None), "use", None)
    if callable(use):
        use(tunings.finder(digest))


def _whole(file: Path) -> dict[str, Any] | None:
    try:
        found = strict.loads(file.read_bytes(), what=file.name, max_bytes=LARGEST)
    except (OSError, BadMetadata):
        return None
    if not isinstance(found, dict) or found.get("format") != FORMAT or not isinstance(found.get("choices"), dict):
        return None
    whole = all(
        isinstance(buckets, dict) and all(isinstance(record, dict) for record in buckets.values())
        for buckets in found["choices"].values()
    )
    return found if whole else None


def _records(file: Path, holds_for: Mapping[str, str]) -> dict[str, dict[str, dict[str, Any]]] | None:
    found = _whole(file)
    if found is None or any(found.get(name) != value for name, value in holds_for.items()):
        return None
    choices: dict[str, dict[str, dict[str, Any]]] = found["choices"]
    return choices


def _write(file: Path, content: Mapping[str, Any]) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump(content, out, indent=1)
            out.write("\n")
        Path(name).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink()
        raise
