"""A directory as values: its files, what they hash to, one digest for the whole. Reads, never writes, never follows a link."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20  # large enough that hashing, not system calls, is the cost
# A fifo in place of a file would block the open, a link would lead elsewhere. Neither flag exists on Windows.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)

# ctime is when the inode changed, which nobody can set; on Windows it is when the file was made, which proves nothing.
CTIME_PROVES = os.name != "nt"
_FINE, _COARSE = 50_000_000, 2_500_000_000  # ns: more than a kernel tick; more than FAT's and HFS+'s two seconds


@dataclass(frozen=True, slots=True)
class File:
    """What a file looked like when it was hashed."""

    sha256: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    def proven(self, found: os.stat_result, written_ns: int) -> bool:
        """Nothing about the inode changed since it was hashed, and it was hashed long enough after its last change.

        Two changes within one tick of the file system's clock have the same ctime, so a file that changed just before
        the manifest was written (`written_ns`, by the same clock) could have changed again after it was hashed.
        """
        tick = _FINE if found.st_ctime_ns % 1_000_000_000 else _COARSE
        return (
            stat.S_ISREG(found.st_mode)
            and (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
            == (self.size, self.mtime_ns, self.ctime_ns, self.inode)
            and found.st_ctime_ns + tick < written_ns
        )


def walk(root: Path, *, directories: bool = False) -> Iterator[tuple[str, os.stat_result]]:
    """`(path, lstat)` of everything below `root` that is not a directory, in no order.

    Paths are relative with `/` separators. A link is an entry, whatever it points to. With `directories`, those as well.

    Raises:
        OSError: `root` or a directory below it cannot be listed.
    """
    below = [""]
    while below:
        prefix = below.pop()
        with os.scandir(root / prefix if prefix else root) as entries:
            for entry in entries:
                path = f"{prefix}/{entry.name}" if prefix else entry.name
                found = os.lstat(entry.path)  # not entry.stat(): on Windows that one has no inode
                is_directory = stat.S_ISDIR(found.st_mode)
                if is_directory:
                    below.append(path)
                if directories or not is_directory:
                    yield path, found


def sha256(path: Path) -> str:
    """Hex sha256 of the bytes of a regular file.

    Raises:
        OSError: it cannot be read, is a link, or is no regular file.
    """
    total = hashlib.sha256()
    descriptor = os.open(path, _FLAGS)
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123  # a descriptor: Path.open cannot refuse links
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        buffer = memoryview(bytearray(_CHUNK))
        while n := file.readinto(buffer):
            total.update(buffer[:n])
    return total.hexdigest()


def hashes(root: Path) -> dict[str, str]:
    """`{path: hex sha256}` of every file below `root`, in path order."""
    return {path: sha256(root / path) for path in sorted(path for path, _ in walk(root))}


def digest_of(files: Mapping[str, str]) -> str:
    """One hex sha256 for `{path: hex sha256}`: over `path NUL hash` in order of the encoded paths. The same on every OS."""
    total = hashlib.sha256()
    for encoded, content in sorted((os.fsencode(path), content) for path, content in files.items()):
        total.update(encoded + b"\0" + bytes.fromhex(content))
    return total.hexdigest()


def digest(root: Path) -> str:
    """One hex sha256 for all files below `root`. Empty directories, times and permissions do not count."""
    return digest_of(hashes(root))
