"""`bundled://`: the kernels that come with this package, and what was compiled from their sources on this machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UnknownKernel
from ..spec import BUNDLED
from ..types import Candidate, Requirement
from .directory import builds, candidates
from .files import Fingerprints, beside, check_copy, copy, listing, read_small

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # one path component, never `..`


@dataclass(frozen=True, slots=True)
class BundledSource:
    """`<root>/<name>/build/<variant>`, and `<built>/<name>/<source digest>/build/<variant>`."""

    root: Path
    """The directory of packaged kernels."""
    built: Path
    """Where compiled ones go; need not exist."""
    source_digest: Callable[[Path], str] = field(repr=False, compare=False)
    """`build.source_digest`: builds of other sources than the installed ones are not seen."""
    key: str = "bundled"
    _seen: Fingerprints = field(default_factory=Fingerprints, repr=False, compare=False)

    def names(self) -> tuple[str, ...]:
        """Every bundled kernel."""
        if not self.root.is_dir():
            return ()
        return tuple(sorted(p.name for p in self.root.iterdir() if (p / "build").is_dir() or (p / "build.toml").is_file()))

    def compiled(self, name: str) -> Path:
        """The directory that `build.compile` fills for the installed sources of `name`."""
        return self.built / name / self.source_digest(self.root / name)

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """Packaged and compiled builds. A note where the kernel has sources that were not compiled yet.

        Raises:
            UnknownKernel: there is no bundled kernel of that name, or not at that revision.
        """
        name = requirement.name.removeprefix(BUNDLED)
        known = self.names()
        if name not in known or not _NAME.fullmatch(name):
            near = difflib.get_close_matches(name, known, n=1)
            raise UnknownKernel(
                f"the bundled kernels are: {', '.join(known) or 'none'}",
                asked=f"looking for {requirement}",
                todo=f"did you mean bundled://{near[0]}?" if near else "name one of them, or a kernel of the hub as org/name",
            )
        found: list[Candidate] = []
        notes: list[str] = []
        for root in self._roots(name):
            here = builds(root)
            if here:
                found += candidates(requirement, self.key, name, here, root, self._seen)
            elif root != self.root / name:
                notes.append(f"{name} has sources that are not compiled on this machine yet; `kernelswap build` does it")
        return tuple(found), tuple(notes)

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """One file of the build, or None.

        Raises:
            UnknownKernel: the build is gone.
        """
        file = self._files(candidate).get(name)
        return read_small(file) if file else None

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """Copy the build.

        Raises:
            UnknownKernel: the build is gone, or changed since it was found.
        """
        copy(self._files(candidate), into)
        check_copy(into, candidate.commit, candidate.name)

    def _roots(self, name: str) -> list[Path]:
        packaged = self.root / name
        return [packaged, self.compiled(name)] if (packaged / "build.toml").is_file() else [packaged]

    def _files(self, candidate: Candidate) -> dict[str, Path]:
        """The first build of that variant with those bytes, so that a packaged and a compiled one do not cross over."""
        for root in self._roots(candidate.name):
            at = builds(root).get(candidate.variant)
            within = list(beside(root.resolve()))
            if at is not None and f"local-{self._seen.of(at, within)}" == candidate.commit:
                return listing(at, within)
        raise UnknownKernel(
            f"{candidate.name} has no build {candidate.variant} with these bytes any more",
            asked=f"reading {candidate.requirement} at {candidate.commit}",
            todo="find it again",
        )
