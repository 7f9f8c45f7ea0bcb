"""The files of a build directory on disk, whoever put them there. Links are followed where they lead to allowed places only."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import tree
from .. import variant as variants
from ..errors import BadMetadata, Refused, UnknownKernel

METADATA = "metadata.json"
SMALL = 4 << 20  # bytes that `read_small` gives at most: metadata names files, it does not hold them


SOURCES = frozenset({"torch-ext", "tvm-ffi-ext"})
"""Where a repository keeps the Python of its sources: to the grammar, builds for a backend named `ext`."""


def is_variant(name: str) -> bool:
    """Whether a directory of this name is a build variant."""
    if name in SOURCES:
        return False
    try:
        variants.parse(name)
    except BadMetadata:
        return False
    return True


def skipped(path: str) -> bool:
    """Bytecode caches: never part of a build."""
    return path.endswith((".pyc", ".pyo")) or ("__pycache__" in path and "__pycache__" in path.split("/"))


def listing(root: Path, within: Sequence[Path]) -> dict[str, Path]:
    """`{relative path: real file}` of the build at `root`, links followed.

    Raises:
        Refused: a link that leads nowhere, to a directory, or out of `within`; or something that is neither file nor link.
    """
    found: dict[str, Path] = {}
    problems: list[str] = []
    allowed = [root, *within]
    for path, seen in tree.walk(root):
        if skipped(path):
            continue
        file = root / path
        if stat.S_ISLNK(seen.st_mode):
            file = Path(os.path.realpath(file))
            if not any(file.is_relative_to(place) for place in allowed):
                problems.append(f"{path} is a link that leads out of the kernel, to {file}")
            elif not file.is_file():
                problems.append(f"{path} is a link to {file}, which is not a file")
        elif not stat.S_ISREG(seen.st_mode):
            problems.append(f"{path} is not a file")
        found[path] = file
    if problems:
        raise Refused("\n".join(sorted(problems)), asked=f"reading {root}", todo="copy the files into the directory itself")
    return dict(sorted(found.items()))


def beside(root: Path) -> Iterator[Path]:
    """Where the links of a repository at `root` may lead: itself, and for a hub snapshot the blobs it is made of."""
    yield root
    for parent in root.parents:
        if parent.name == "snapshots":
            yield parent.parent / "blobs"
            yield parent.parent.parent / "blobs"  # newer clients share blobs between repositories
            return


def read_small(file: Path) -> bytes:
    """A file that is expected to be small.

    Raises:
        Refused: it is larger than any honest one.
    """
    if file.stat().st_size > SMALL:
        raise Refused(f"{file} has {file.stat().st_size} bytes, at most {SMALL} are read")
    return file.read_bytes()


def copy(files: dict[str, Path], into: Path) -> None:
    """Copy contents (no links, no times, no permissions) below `into`."""
    for path, file in files.items():
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


class Fingerprints:
    """Content digests of directories, remembered as long as sizes, times and inodes stay as they were."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[tuple[object, ...], str]] = {}
        self._lock = threading.Lock()

    def of(self, root: Path, within: Sequence[Path]) -> str:
        """Hex sha256 over the paths and contents of the build at `root`, as `tree.digest` would say of a copy of it."""
        files = listing(root, within)
        stats = [(path, file.stat()) for path, file in files.items()]
        state = tuple((p, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for p, s in stats)
        with self._lock:
            known = self._known.get(root)
        if known is not None and known[0] == state:
            return known[1]
        digest = tree.digest_of({path: tree.sha256(file) for path, file in files.items()})
        with self._lock:
            self._known[root] = (state, digest)
        return digest


def check_copy(into: Path, commit: str, name: str) -> None:
    """The bytes below `into` are the ones that `commit` names.

    Raises:
        UnknownKernel: the directory changed since it was looked at.
    """
    here = f"{commit.partition('-')[0]}-{tree.digest(into)}"
    if here != commit:
        raise UnknownKernel(f"{name} changed: it is {here} now", asked=f"fetching {name} at {commit}", todo="find it again")
