"""A source wrapped by a lock: the same names, but only at the commits that the lock states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import tree
from ..errors import Refused, UnknownKernel
from ..lock import Lock, Locked, LockedBuild
from ..types import Candidate, Requirement, Source


@dataclass(frozen=True, slots=True)
class Pinned:
    """What `source` has, at the locked commit; where the lock has digests, the bytes are compared with them."""

    source: Source
    lock: Lock
    strict: bool = True
    """Refuse what the lock does not name. Else `source` answers, with a note; also other builds of a commit than the lock lists."""

    @property
    def key(self) -> str:
        """That of the wrapped source: its candidates are handed on."""
        return str(getattr(self.source, "key", "pinned"))

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """The builds at the locked commit; when strict, of an entry that lists builds, those.

        Raises:
            UnknownKernel: the lock does not name it (when strict), names it for another version, or what is there redirects.
        """
        entry = self.lock.find(requirement.name, requirement)
        if entry is None:
            if not self.strict:
                found, notes = self.source.find(requirement)
                return found, (*notes, f"{requirement} is not in the lock")
            raise self._unlocked(requirement)
        at = replace(requirement, version=None, constraints=None, revision=entry.commit, text=None)
        found, notes = self.source.find(at)
        if moved := next((c for c in found if c.commit != entry.commit), None):
            raise UnknownKernel(
                f"that commit redirects to {moved.name} at {moved.commit}",
                asked=f"looking for {requirement}, locked at {entry.commit}",
                todo=f"lock {moved.name} instead",
            )
        locked = {b.variant for b in entry.builds} if self.strict else set()
        kept = tuple(replace(c, requirement=requirement) for c in found if not locked or c.variant in locked)
        return kept, (*notes, f"locked at {entry.commit}")

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """As the wrapped source reads it."""
        return self.source.read(candidate, name)

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """As the wrapped source fetches it, then compared with the digests of the lock.

        Raises:
            Refused: a file is missing, added or different; every one is named.
        """
        self.source.fetch(candidate, into)
        entry = self.lock.find(candidate.requirement.name, candidate.requirement)
        build = entry.build(candidate.variant) if entry else None
        if build is None:
            return
        check_old(self.source, candidate, build)
        if not (build.files or build.tree):
            return
        found = tree.hashes(into)
        problems = _differences(dict(build.files), found) if build.files else []
        if build.tree and not problems and tree.digest_of(found) != build.tree:
            problems = [f"the lock states the tree {build.tree}, this is {tree.digest_of(found)}"]
        if problems:
            raise Refused(
                "\n".join(problems),
                asked=f"fetching {candidate.requirement} ({candidate.variant}) as locked",
                todo="if the change is meant, write the lock anew; otherwise somebody changed what was published",
            )

    def git_lfs_concat(self, candidate: Candidate) -> str | None:
        """As the wrapped source has it."""
        return old_digest(self.source, candidate)

    def _unlocked(self, requirement: Requirement) -> UnknownKernel:
        other: Locked | None = self.lock.find(requirement.name)
        names = sorted({e.name for e in self.lock.entries})
        found = f"the lock has {other.asked} at {other.commit}" if other else f"the lock has {', '.join(names) or 'no kernel'}"
        return UnknownKernel(found, asked=f"looking for {requirement} in the lock", todo="add it with `kernelswap lock`")


def old_digest(source: Source, candidate: Candidate) -> str | None:
    """The build's digest as old locks have it, where the source knows it."""
    ask = getattr(source, "git_lfs_concat", None)
    found: str | None = ask(candidate) if ask is not None else None
    return found


def check_old(source: Source, candidate: Candidate, build: LockedBuild) -> None:
    """Compare a build with what an old lock pins of it.

    Raises:
        Refused: it is another.
    """
    if build.git_lfs_concat is None or candidate.source == "local":  # a directory that stands in for it is the user's own doing
        return
    found = old_digest(source, candidate)
    if found != build.git_lfs_concat:
        this = f"this is sha256-{found}" if found is not None else "that of what is in the cache cannot be told"
        raise Refused(
            f"the lock states sha256-{build.git_lfs_concat} for {build.variant}, {this}",
            asked=f"fetching {candidate.requirement} ({candidate.variant}) as locked",
            todo="if the change is meant, write the lock anew; otherwise somebody changed what was published",
        )


def _differences(locked: dict[str, str], found: dict[str, str]) -> list[str]:
    missing = [f"{path} is missing" for path in sorted(locked.keys() - found.keys())]
    changed = [f"{path} differs from the lock" for path in sorted(locked.keys() & found.keys()) if locked[path] != found[path]]
    return missing + changed + [f"{path} is not in the lock" for path in sorted(found.keys() - locked.keys())]
