"""Refuse shapes that no honest build has: links, bytecode, devices, names that mean two things, bombs."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .. import tree
from ..errors import Refused
from ..types import Candidate, Evidence, Metadata

_SHOWN = 20  # problems listed before "and N more"
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$"} | {f"{port}{n}" for port in ("com", "lpt") for n in "0123456789¹²³"}
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISCHR, "a character device"),
)


@dataclass(frozen=True, slots=True)
class ContentsVerifier:
    """Looks at names, types and sizes; reads no file. The limits are far above any real build, far below what hurts."""

    max_files: int = 20_000
    """The largest builds seen carry the headers of a template library: some thousand files."""
    max_bytes: int = 8 << 30
    max_file_bytes: int = 4 << 30
    max_depth: int = 32
    max_path_bytes: int = 1024
    max_name_bytes: int = 255

    def check(self, candidate: Candidate, metadata: Metadata, staged: Path) -> Evidence:  # noqa: ARG002  # the protocol's signature
        """Raises:
        Refused: with every problem, one a line.
        """
        entries, count, size = [], 0, 0
        for path, found in tree.walk(staged, directories=True):
            count += 1
            size += 0 if stat.S_ISDIR(found.st_mode) else found.st_size
            if count > self.max_files:  # at once: a list of a million problems is a bomb of its own
                raise Refused(f"more than {self.max_files} files and directories")
            entries.append((path, found))
        entries.sort(key=lambda entry: os.fsencode(entry[0]))
        problems = [problem for path, found in entries for problem in self._entry(path, found)]
        problems += _collisions(path for path, _ in entries)
        if size > self.max_bytes:
            problems.append(f"{size} bytes in all, at most {self.max_bytes} are accepted")
        if not any(stat.S_ISREG(found.st_mode) for _, found in entries):
            problems.append("there is no file in it")
        if problems:
            more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise Refused("\n".join(problems[:_SHOWN] + more))
        return Evidence("contents", f"{count} entries, {size} bytes; no links, no bytecode, no odd names")

    def _entry(self, path: str, found: os.stat_result) -> Iterator[str]:
        shown = ascii(path)
        if not stat.S_ISDIR(found.st_mode):
            kind = next((word for test, word in _KINDS if test(found.st_mode)), None)
            if kind is None and not stat.S_ISREG(found.st_mode):
                kind = "of an unknown type"
            if kind is not None:
                yield f"{shown} is {kind}"
            elif found.st_nlink > 1:
                yield f"{shown} is a hard link: {found.st_nlink} names for one file"
            if found.st_mode & (stat.S_ISUID | stat.S_ISGID):  # on a directory the group bit only means "inherit the group"
                yield f"{shown} runs as another user"
            if found.st_size > self.max_file_bytes:
                yield f"{shown} has {found.st_size} bytes, at most {self.max_file_bytes} are accepted"
        parts = path.split("/")
        if parts[-1] == "__pycache__" or PurePosixPath(path).suffix in {".pyc", ".pyo"}:
            yield f"{shown} is bytecode, which can say anything its source does not"
        if len(parts) > self.max_depth:
            yield f"{shown} is {len(parts)} directories deep, at most {self.max_depth} are accepted"
        if len(os.fsencode(path)) > self.max_path_bytes or len(os.fsencode(parts[-1])) > self.max_name_bytes:
            yield f"{shown} is too long a name"
        problem = _name_problem(parts[-1])
        if problem is not None:
            yield f"{shown} {problem}"


def _name_problem(name: str) -> str | None:
    """Why one part of a path means different things to different systems or readers, or `None`."""
    if any("\ud800" <= c <= "\udfff" for c in name):
        return "is not UTF-8"
    if any(unicodedata.category(c) in {"Cc", "Cf", "Zl", "Zp", "Cn", "Co"} for c in name):
        return "has control or invisible characters"
    if any(c in '\\:*?"<>|' for c in name):
        return "has a character that is a separator, a drive or a wildcard elsewhere"
    if name != name.strip() or name.endswith("."):
        return "begins or ends with a space or ends with a dot, which Windows drops"
    if name.split(".", maxsplit=1)[0].rstrip().casefold() in _RESERVED:
        return "is the name of a device on Windows"
    return None


def _collisions(paths: Iterable[str]) -> Iterator[str]:
    """Names that are one file where case or the form of accents does not count (macOS, Windows)."""
    seen: dict[str, str] = {}
    for path in paths:
        key = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())
        if key in seen:
            yield f"{path!a} and {seen[key]!a} are one file where case or accents do not count"
        seen[key] = path
