"""LOCAL_KERNELS: directories that stand in for repositories, for the kernel asked for and for its dependencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..types import Candidate, Requirement, Source
from .directory import DirectorySource, stand_in
from .pinned import old_digest


@dataclass(frozen=True, slots=True)
class Overrides:
    """`source`, except for the repositories named in `local`: those are their directories, at whatever version was asked."""

    source: Source
    local: Mapping[str, Path]
    key: str = "local"
    _directories: DirectorySource = field(default_factory=lambda: DirectorySource("local"), repr=False, compare=False)

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """The directory's builds where there is one for that name, else what `source` finds.

        Raises:
            UnknownKernel: the directory is not there or has no build; the repository is not asked instead.
        """
        path = self.local.get(requirement.name)
        if path is None:
            return self.source.find(requirement)
        found, notes = self._directories.find(stand_in(requirement, path))
        kept = tuple(replace(c, requirement=requirement) for c in found)
        return kept, (f"{requirement.name} is overridden by the directory {path}", *notes)

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """From wherever the candidate came."""
        return self._of(candidate).read(candidate, name)

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """From wherever the candidate came."""
        self._of(candidate).fetch(candidate, into)

    def git_lfs_concat(self, candidate: Candidate) -> str | None:
        """As the source of the candidate has it; a directory that stands in for a repository has none."""
        return old_digest(self._of(candidate), candidate)

    def _of(self, candidate: Candidate) -> Source:
        return self._directories if candidate.source == self.key else self.source
