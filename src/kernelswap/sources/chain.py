"""Several sources in order: the first that knows the kernel serves it. For mirrors, and for a hub behind a local folder."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..errors import KernelSwapError, NotCached, UnknownKernel, Unreachable
from ..types import Candidate, Requirement, Source
from .deadline import within
from .pinned import old_digest

_log = logging.getLogger(__name__)
T = TypeVar("T")
Found = tuple[Sequence[Candidate], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chain:
    """`sources` in order. One that does not know the kernel or does not answer is passed over, with a note.

    One that found a build and then cannot deliver it is passed over, too: the next that has the same build at the same commit does.
    """

    sources: Sequence[Source]
    budget: float = 30.0
    """Seconds for one `find`, over all sources together. Each may take its share of what is left; then it counts as unreachable."""
    key: str = "chain"
    _origin: dict[Candidate, Source] = field(default_factory=dict, repr=False, compare=False)

    def find(self, requirement: Requirement) -> Found:
        """What the first source that knows it has.

        Raises:
            UnknownKernel: all were asked and none knows it.
            Unreachable: at least one could not be asked, so that nobody can say; the message has a line for each.
            Refused, BadMetadata, ...: of the first source that fails in any other way; others are not asked instead.
        """
        end = time.monotonic() + self.budget
        failed: list[tuple[str, KernelSwapError]] = []
        for index, source in enumerate(self.sources):
            share = (end - time.monotonic()) / (len(self.sources) - index)
            try:
                found, notes = _within(partial(source.find, requirement), share, _name(source))
            except (UnknownKernel, Unreachable, NotCached) as e:
                failed.append((_name(source), e))
                continue
            for candidate in found:
                self._origin[candidate] = source
            return found, (*(f"passed over: {_said(n, e.reason)}" for n, e in failed), *notes)
        raise self._nobody(requirement, failed)

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """From the source that found the candidate, or one that has the same build.

        Raises:
            Unreachable, NotCached: none of them delivers it.
        """
        return self._delivered(candidate, lambda source, found: source.read(found, name))

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """As `read`."""

        def fetch(source: Source, found: Candidate) -> None:
            for path in into.iterdir():  # what the one before had brought
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            source.fetch(found, into)

        self._delivered(candidate, fetch)

    def git_lfs_concat(self, candidate: Candidate) -> str | None:
        """As the source that found the candidate has it."""
        return old_digest(self.of(candidate), candidate)

    def _delivered(self, candidate: Candidate, ask: Callable[[Source, Candidate], T]) -> T:
        first = self.of(candidate)
        try:
            return ask(first, candidate)
        except (Unreachable, NotCached) as e:
            for source, same in self._elsewhere(candidate, first):
                try:
                    found = ask(source, same)
                except (Unreachable, NotCached):
                    continue
                _log.warning("%s of %s comes from %s: %s", candidate.variant, candidate.name, _name(source), e.reason)
                return found
            raise

    def _elsewhere(self, candidate: Candidate, but: Source) -> Iterator[tuple[Source, Candidate]]:
        """The same build at the same commit, in other sources."""
        asked = Requirement(candidate.name, source=candidate.requirement.source, revision=candidate.commit)
        for source in self.sources:
            if source is not but:
                try:
                    found, _ = _within(partial(source.find, asked), self.budget, _name(source))
                except (UnknownKernel, Unreachable, NotCached):
                    continue
                for same in found:
                    if (same.name, same.commit, same.variant) == (candidate.name, candidate.commit, candidate.variant):
                        yield source, replace(same, requirement=candidate.requirement)

    def of(self, candidate: Candidate) -> Source:
        """The finder; for a candidate of another process (a lock, a pickle), the source with its key."""
        if candidate in self._origin:
            return self._origin[candidate]
        named = [s for s in self.sources if getattr(s, "key", None) == candidate.source]
        if not named:
            keys = ", ".join(str(getattr(s, "key", "?")) for s in self.sources)
            raise UnknownKernel(f"this chain has {keys}", asked=f"reading {candidate.name} from {candidate.source!r}")
        return named[0]

    def _nobody(self, requirement: Requirement, failed: Sequence[tuple[str, KernelSwapError]]) -> KernelSwapError:
        asked, found = f"looking for {requirement}", "\n".join(_said(name, e.found) for name, e in failed)
        if not failed:
            return UnknownKernel("the chain has no source", asked=asked, todo="give it at least one")
        if len(failed) == 1:
            return failed[0][1]
        if all(isinstance(e, UnknownKernel) for _, e in failed):
            return UnknownKernel(found, asked=asked, todo="check the name and the version")
        return Unreachable(found, asked=asked, todo="check the connection, or add a source that can be reached")


def _said(name: str, text: str) -> str:
    return text if " " in name and name in text else f"{name}: {text}"  # a folder says itself which it is


def _name(source: Source) -> str:
    where = getattr(getattr(source, "transport", None), "where", None)
    return str(where or getattr(source, "key", type(source).__name__))


def _within(call: Callable[[], Found], seconds: float, name: str) -> Found:
    if seconds <= 0:
        raise Unreachable(f"{name} was not asked: the time allowed for all sources was used up")
    return within(
        seconds,
        call,
        lambda: Unreachable(f"{name} did not answer within {seconds:.1f} s", todo="check the connection to it"),
    )
