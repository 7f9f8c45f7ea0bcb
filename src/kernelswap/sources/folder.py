"""A folder of kernels: in a directory, behind HTTP(S), in S3 or whatever else fsspec opens, or in one file (a bundle).

    <root>/<org>/<name>/refs.json                      names of commits; `mirror.py` writes all of this
    <root>/<org>/<name>/<commit>.json                  the files of a commit, with sizes and digests
    <root>/<org>/<name>/<commit>/build/<variant>/...   the files

Nothing has to be listed by the server, so that any static one will do. What a commit holds never changes and is asked for
once per machine; names are asked for again after a while, and when the folder does not answer, those of last time count.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from .. import strict
from ..errors import BadMetadata, NotCached, Refused, UnknownKernel, Unreachable
from ..types import Candidate, Progress, Requirement
from .folder_files import COMMIT, MOST_BYTES, MOST_LISTING, MOST_REFS, REFS, Files, Names, is_name, parse_files, parse_names
from .hub_cache import Refs, variants

T = TypeVar("T")
MOST_SMALL = 4 << 20
"""Bytes that are read of a small file of a build."""


class Transport(Protocol):
    """How bytes of a folder are had. Safe to share between threads."""

    @property
    def where(self) -> str:
        """What messages call the folder."""
        ...

    @property
    def local(self) -> bool:
        """Whether the bytes are on this machine: then nothing is remembered, and being offline changes nothing."""
        ...

    def read(self, path: str, most: int) -> bytes | None:
        """All of a file of at most `most` bytes; None when there is none of that name.

        Raises:
            Unreachable: it cannot be asked, or the file is larger.
        """
        ...

    def copy(self, path: str, target: Path, size: int) -> None:
        """A file of `size` bytes to `target`; fewer or others if that is what there is, never many more.

        Raises:
            Unreachable: it cannot be asked, or has no such file.
        """
        ...


@dataclass(frozen=True, slots=True)
class Memory:
    """What a folder said, on disk. Best effort: what cannot be written is asked for again."""

    root: Path | None = None

    def get(self, path: str) -> bytes | None:
        """What was put there."""
        if self.root is not None:
            with contextlib.suppress(OSError):
                return (self.root / path).read_bytes()
        return None

    def put(self, path: str, data: bytes) -> None:
        """Remember it; whole or not at all."""
        if self.root is None:
            return
        target = self.root / path
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        with contextlib.suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(target)


@dataclass
class _Lately:
    """Guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    names: dict[str, tuple[float, Names]] = field(default_factory=dict)
    files: dict[tuple[str, str], Files] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FolderSource:
    """One folder. Safe to share between threads."""

    transport: Transport
    memory: Memory = field(default_factory=Memory)
    offline: bool = False
    progress: Progress | None = field(default=None, repr=False, compare=False)
    workers: int = 8
    remember: float = 60.0
    """Seconds for which names of commits are taken for current."""
    key: str = "folder"
    _lately: _Lately = field(default_factory=_Lately, init=False, repr=False, compare=False)

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """Every build in the folder at the commit that the requirement stands for; versions as on a hub.

        Raises:
            UnknownKernel: the folder does not have it; what it has of that kernel is listed.
            Unreachable: the folder did not answer, and never did for this kernel.
            NotCached: offline, and it was not asked for before.
        """
        asked, name = f"looking for {requirement}", requirement.name
        if requirement.revision is not None and COMMIT.fullmatch(requirement.revision):  # no name of it has to be asked for
            files = self._files(name, requirement.revision, requirement)
            if files is not None:
                return self._builds(requirement, name, requirement.revision, files), ()
        names = self._names(name, requirement)
        commit = names.commit(requirement)
        notes = [self._lately.notes[name]] if name in self._lately.notes else []
        if names.moved is not None and commit is not None:
            notes.append(f"{name} moved to {names.moved}")
            name = names.moved
        files = self._files(name, commit, requirement) if commit is not None else None
        if commit is None or files is None:
            here = sorted({*names.refs.branches, *names.refs.tags, *filter(None, names.asked)})
            raise UnknownKernel(
                f"{self.transport.where} has {', '.join(here[:20]) or 'no version'} of {name}",
                asked=asked,
                todo="ask for one of these",
            )
        return self._builds(requirement, name, commit, files), tuple(notes)

    def _builds(self, requirement: Requirement, name: str, commit: str, files: Files) -> tuple[Candidate, ...]:
        return tuple(Candidate(requirement, self.key, name, commit, v) for v in variants(files) if strict.path_problem(v) is None)

    def refs(self, name: str) -> Refs:
        """Branches and tags that the folder knows.

        Raises:
            As `find`.
        """
        return self._names(name, Requirement(name)).refs

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """One small file of the build, or None.

        Raises:
            Unreachable, NotCached: it cannot be had, or its bytes are not those that the folder lists.
        """
        at = f"build/{candidate.variant}/{name}"
        entry = (self._files(candidate.name, candidate.commit, candidate.requirement) or {}).get(at)
        if entry is None:
            return None
        size, digest = entry
        if size > MOST_SMALL:
            raise Refused(f"{at} has {size} bytes, at most {MOST_SMALL} are read", asked=f"reading {candidate.name}")
        path = f"{candidate.name}/{candidate.commit}/{at}"
        data = self._remembered(path)
        if data is None or hashlib.sha256(data).hexdigest() != digest:
            self._online(f"reading {path}")
            data = self.transport.read(path, MOST_SMALL)
            if data is None or hashlib.sha256(data).hexdigest() != digest:
                raise self._differs([path], candidate)
            self._put(path, data)
        return data

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """Every file of the build, each compared with what the folder lists for it.

        Raises:
            UnknownKernel: there is no such build.
            Unreachable, NotCached: a file cannot be had, or is not the one that the folder lists.
        """
        files = self._files(candidate.name, candidate.commit, candidate.requirement) or {}
        prefix, asked = f"build/{candidate.variant}/", f"fetching {candidate.requirement} ({candidate.variant})"
        paths = variants(files).get(candidate.variant, [])
        if not paths:
            raise UnknownKernel(f"{self.transport.where} has no such build", asked=asked, todo="find it again")
        self._online(asked)
        total, step = sum(files[p][0] for p in paths), f"fetching {candidate.name} {candidate.variant}"
        if total > MOST_BYTES:
            raise Refused(f"{total} bytes; at most {MOST_BYTES} are fetched", asked=asked, todo="tell the publisher")
        done, lock = 0, threading.Lock()

        def one(path: str) -> None:
            nonlocal done
            target = into / path.removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._copy(candidate, path, target, *files[path])
            with lock:
                done += files[path][0]
                if self.progress is not None and done < total:
                    self.progress(step, done, total)

        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="kernelswap-fetch") as pool:
            tasks = [pool.submit(one, path) for path in paths]
            try:
                for task in tasks:
                    task.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if self.progress is not None:
            self.progress(step, total, total)

    # -- names and files

    def _names(self, name: str, asked: Requirement) -> Names:
        if not is_name(name):
            raise UnknownKernel(f"{name!r} is no repository name", asked=f"looking for {asked}", todo="write org/name")
        now = time.monotonic()
        with self._lately.lock:
            at, lately = self._lately.names.get(name, (float("-inf"), Names()))
        if now - at < self.remember:
            return lately
        path, notes = f"{name}/{REFS}", self._lately.notes
        try:
            self._online(f"looking for {asked}")
            data = self.transport.read(path, MOST_REFS)
            notes.pop(name, None)
        except (Unreachable, NotCached) as e:
            data = self._remembered(path)
            if data is None:
                raise
            if isinstance(e, Unreachable):
                notes[name] = f"using what {self.transport.where} said last time: {e.reason}"
        if data is None:
            raise UnknownKernel(f"{self.transport.where} has no {name}", asked=f"looking for {asked}", todo="check the name")
        names = self._parsed(parse_names, data)
        self._put(path, data)
        with self._lately.lock:
            self._lately.names[name] = (now, names)
        return names

    def _files(self, name: str, commit: str, asked: Requirement) -> Files | None:
        if not is_name(name) or not COMMIT.fullmatch(commit):
            return None
        with self._lately.lock:
            known = self._lately.files.get((name, commit))
        if known is not None:
            return known
        path = f"{name}/{commit}.json"
        data = self._remembered(path)
        if data is None:
            self._online(f"looking for {asked}")
            data = self.transport.read(path, MOST_LISTING)
            if data is None:
                return None
        files = self._parsed(parse_files, data)
        self._put(path, data)
        with self._lately.lock:
            self._lately.files[name, commit] = files
        return files

    def _copy(self, candidate: Candidate, path: str, target: Path, size: int, digest: str) -> None:
        """One file, compared; once more where it differs: a transfer cut short deserves one fresh start."""
        at = f"{candidate.name}/{candidate.commit}/{path}"
        for last in (False, True):
            try:
                self.transport.copy(at, target, size)
            except Unreachable:
                if last:
                    raise
                continue
            if target.stat().st_size == size and _sha256(target) == digest:
                return
        raise self._differs([at], candidate)

    def _differs(self, paths: Sequence[str], candidate: Candidate) -> Unreachable:
        return Unreachable(
            f"{', '.join(paths)} is not what {self.transport.where} lists",
            asked=f"fetching {candidate.requirement} ({candidate.variant})",
            todo="write the folder anew, or try another connection",
        )

    def _parsed(self, parse: Callable[[bytes], T], data: bytes) -> T:
        try:
            return parse(data)
        except BadMetadata as e:
            raise Unreachable(
                f"{self.transport.where} answered something that is no folder of kernels: {e.reason}",
                todo="check the address; `kernelswap mirror` writes such a folder",
            ) from e

    def _online(self, asked: str) -> None:
        if self.offline and not self.transport.local:
            raise NotCached(
                f"offline, and {self.transport.where} was not asked for it before",
                asked=asked,
                todo="fetch it once with a connection",
            )

    def _remembered(self, path: str) -> bytes | None:
        return None if self.transport.local else self.memory.get(path)

    def _put(self, path: str, data: bytes) -> None:
        if not self.transport.local:
            self.memory.put(path, data)


def _sha256(file: Path) -> str:
    state = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            state.update(piece)
    return state.hexdigest()
