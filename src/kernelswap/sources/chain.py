"""Several sources in order: the first that knows the kernel serves it. For mirrors, and for a hub behind a local folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ..errors import KernelSwapError, NotCached, UnknownKernel, Unreachable
from ..types import Candidate, Requirement, Source
from .deadline import within

Found = tuple[Sequence[Candidate], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chain:
    """`sources` in order. One that does not know the kernel or does not answer is passed over, with a note."""

    sources: Sequence[Source]
    budget: float = 30.0
    """Seconds for one `find`, over all sources together. A source that is still silent then counts as unreachable."""
    key: str = "chain"
    _origin: dict[Candidate, Source] = field(default_factory=dict, repr=False, compare=False)

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """What the first source that knows it has.

        Raises:
            UnknownKernel: all were asked and none knows it.
            Unreachable: at least one could not be asked, so that nobody can say; the message has a line for each.
            Refused, BadMetadata, ...: of the first source that fails in any other way; others are not asked instead.
        """
        end = time.monotonic() + self.budget
        failed: list[tuple[str, KernelSwapError]] = []
        for index, source in enumerate(self.sources):
            name = str(getattr(source, "key", f"source {index + 1}"))
            try:
                found, notes = _within(partial(source.find, requirement), end - time.monotonic(), name)
            except (UnknownKernel, Unreachable, NotCached) as e:
                failed.append((name, e))
                continue
            for candidate in found:
                self._origin[candidate] = source
            return found, (*(f"{n} passed over: {e.reason}" for n, e in failed), *notes)
        raise self._nobody(requirement, failed)

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """From the source that found the candidate."""
        return self._of(candidate).read(candidate, name)

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """From the source that found the candidate."""
        self._of(candidate).fetch(candidate, into)

    def _of(self, candidate: Candidate) -> Source:
        """The finder; for a candidate of another process (a lock, a pickle), the source with its key."""
        if candidate in self._origin:
            return self._origin[candidate]
        named = [s for s in self.sources if getattr(s, "key", None) == candidate.source]
        if not named:
            keys = ", ".join(str(getattr(s, "key", "?")) for s in self.sources)
            raise UnknownKernel(f"this chain has {keys}", asked=f"reading {candidate.name} from {candidate.source!r}")
        return named[0]

    def _nobody(self, requirement: Requirement, failed: Sequence[tuple[str, KernelSwapError]]) -> KernelSwapError:
        asked, found = f"looking for {requirement}", "\n".join(f"{name}: {e.found}" for name, e in failed)
        if not failed:
            return UnknownKernel("the chain has no source", asked=asked, todo="give it at least one")
        if len(failed) == 1:
            return failed[0][1]
        if all(isinstance(e, UnknownKernel) for _, e in failed):
            return UnknownKernel(found, asked=asked, todo="check the name and the version")
        return Unreachable(found, asked=asked, todo="check the connection, or add a source that can be reached")


def _within(call: Callable[[], Found], seconds: float, name: str) -> Found:
    if seconds <= 0:
        raise Unreachable(f"{name} was not asked: the time allowed for all sources was used up")
    return within(
        seconds,
        call,
        lambda: Unreachable(f"{name} did not answer within {seconds:.1f} s", todo="check the connection to it"),
    )
