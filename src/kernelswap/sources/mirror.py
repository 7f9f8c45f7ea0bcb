"""Write a folder of kernels (`folder.py`): builds that other sources have, at the commits that they found."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import metadata as metadata_file
from .. import strict, tree
from ..errors import KernelSwapError, Refused, StoreError, UnknownKernel
from ..types import Candidate, Progress, Requirement, Source
from . import folder_files
from .dependencies import requirement_of
from .files import METADATA
from .folder_files import FORMAT, REFS, Names, after_at
from .hub_cache import Refs


@dataclass(frozen=True, slots=True)
class Mirror:
    """The folder at `root`. What is there already stays; files are put in place before what names them."""

    root: Path

    def put(self, candidate: Candidate, files: Path) -> None:
        """The build whose files lie below `files`.

        Raises:
            Refused: its name or a path in it would not stay inside the folder.
            StoreError: the folder cannot be written.
        """
        base = f"{candidate.name}/{candidate.commit}"
        paths = {f"build/{candidate.variant}/{path}": path for path, _ in tree.walk(files)}
        problems = [f"{strict.quote(p)} {why}" for p in paths if (why := strict.path_problem(p)) is not None]
        if not folder_files.is_name(candidate.name):
            problems.append(f"{strict.quote(candidate.name)} is no repository name")
        if problems:
            raise Refused("\n".join(problems), asked=f"mirroring {candidate.requirement}", todo="tell the publisher")
        listed = dict(self._files(base))
        for path, inside in paths.items():
            data = (files / inside).read_bytes()
            listed[path] = (len(data), tree.sha256(files / inside))
            self._write(f"{base}/{path}", data)
        self._write(f"{base}.json", _json({"files": {p: list(listed[p]) for p in sorted(listed)}}))

    def name(self, candidate: Candidate, refs: Refs) -> None:
        """That the requirement of `candidate` means its commit, and which of `refs` do.

        Raises:
            StoreError: the folder cannot be written.
        """
        asked, commit = candidate.requirement, candidate.commit
        here = refs.only({commit})
        self._names(asked.name, here, {after_at(asked): commit}, candidate.name if candidate.name != asked.name else None)
        if candidate.name != asked.name:  # found under its own name as well
            self._names(candidate.name, here, {}, None)

    def add(
        self,
        source: Source,
        requirement: Requirement,
        variants: re.Pattern[str] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Candidate]:
        """Every build that `source` has for `requirement` and for what these depend on, or those whose variant matches as a whole.

        Raises:
            UnknownKernel: it has no such build.
            StoreError, Refused: as `put`; also what finding and fetching raise.
        """
        done, left, added = set[str](), [requirement], list[Candidate]()
        while left:
            wanted = left.pop(0)
            if str(wanted) in done or wanted.source == "bundled":
                continue
            done.add(str(wanted))
            found = self._builds(source, wanted, variants)
            for number, candidate in enumerate(found):
                if progress is not None:
                    progress(f"mirroring {wanted}", number, len(found))
                with tempfile.TemporaryDirectory() as files:
                    source.fetch(candidate, Path(files))
                    self.put(candidate, Path(files))
                    left += _depends(candidate, Path(files))
            self.name(found[0], refs_of(source, found[0].name))
            if progress is not None:
                progress(f"mirroring {wanted}", len(found), len(found))
            added += found
        return added

    def _builds(self, source: Source, requirement: Requirement, variants: re.Pattern[str] | None) -> list[Candidate]:
        found, _ = source.find(requirement)
        wanted = [c for c in found if variants is None or variants.fullmatch(c.variant)]
        if not wanted:
            builds = ", ".join(sorted(c.variant for c in found)) or "none"
            raise UnknownKernel(f"its builds are: {builds}", asked=f"mirroring {requirement}", todo="name one of these")
        return wanted

    # -- files

    def _files(self, base: str) -> folder_files.Files:
        path = self.root / f"{base}.json"
        try:
            return folder_files.parse_files(path.read_bytes()) if path.exists() else {}
        except KernelSwapError as e:
            raise StoreError(f"{path} is damaged: {e.reason}", todo="Remove it, and mirror again.") from e

    def _names(self, name: str, refs: Refs, asked: dict[str, str], moved: str | None) -> None:
        path = self.root / name / REFS
        try:
            former = folder_files.parse_names(path.read_bytes()) if path.exists() else Names()
        except KernelSwapError as e:
            raise StoreError(f"{path} is damaged: {e.reason}", todo="Remove it, and mirror again.") from e
        value = {
            "branches": {**former.refs.branches, **refs.branches},
            "tags": {**former.refs.tags, **refs.tags},
            "asked": {**former.asked, **asked},
            **({"moved": moved} if moved is not None else {}),
        }
        self._write(f"{name}/{REFS}", _json(value))

    def _write(self, path: str, data: bytes) -> None:
        target = self.root / path
        temporary = target.with_name(f".{uuid.uuid4().hex}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(target)
        except OSError as e:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise StoreError(
                f"{target} cannot be written: {e.strerror or e}", todo="Choose another directory, or free some space."
            ) from e


def refs_of(source: Source, name: str) -> Refs:
    """Branches and tags of a repository, where the source, or the one that it wraps, knows such."""
    for one in _layers(source):
        refs = getattr(one, "refs", None)
        if refs is not None:
            with contextlib.suppress(KernelSwapError):
                found: Refs = refs(name)
                return found
    return Refs()


def _depends(candidate: Candidate, files: Path) -> list[Requirement]:
    file = files / METADATA
    data = file.read_bytes() if file.exists() else b"{}"
    about = metadata_file.parse(data, package=candidate.name, path_hint=candidate.variant)
    return [requirement_of(d) for d in about.kernel_depends]


def _layers(source: Source) -> Iterable[Source]:
    yield source
    inner = getattr(source, "source", None)
    for one in (inner,) if inner is not None else getattr(source, "sources", ()):
        yield from _layers(one)


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps({"format": FORMAT, **value}, indent=1, ensure_ascii=True) + "\n").encode()
