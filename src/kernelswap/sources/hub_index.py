"""Which names and which files a hub has: asked, remembered, and answered from the cache when the hub does not answer."""

from __future__ import annotations

import difflib
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .. import spec
from ..errors import KernelSwapError, NotCached, NotOnHub, UnknownKernel, Unreachable
from ..types import Requirement
from .hub_cache import CachedRepo, Listing, Refs
from .hub_client import Busy, HubClient, NoSuchRevision

_log = logging.getLogger(__name__)
_SHOWN = 20  # names that a message lists
_MOMENT = 5.0  # seconds after a failure in which not even a quick question is asked again


@dataclass
class _State:
    """What was asked lately. Guarded by `lock`."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    refs: dict[str, tuple[float, Refs]] = field(default_factory=dict)
    listings: dict[tuple[str, str], Listing] = field(default_factory=dict)
    up: float = float("-inf")
    """When the hub last answered."""
    down: tuple[float, KernelSwapError] | None = None
    """When it last failed to, and how; None once it answers again."""
    warned: bool = False


@dataclass(frozen=True, slots=True)
class HubIndex:
    """One hub's names and listings. Shared by threads."""

    cache: Path
    client: HubClient = field(repr=False)
    offline: bool = False
    remember: float = 60.0
    _state: _State = field(default_factory=_State, init=False, repr=False, compare=False)

    # -- names

    def refs(self, asked: Requirement, *, known: bool = False) -> tuple[Refs, bool]:
        """(names of commits, whether the hub itself said so). With `known`, nothing is asked that was not asked lately.

        Raises:
            UnknownKernel: no such repository.
            Unreachable, NotCached: the hub was not or could not be asked, and nothing of the repository is in the cache.
        """
        now = time.monotonic()
        with self._state.lock:
            at, lately = self._state.refs.get(asked.name, (0.0, None))
        if lately is not None and (known or now - at < self.remember):
            return lately, True
        cached = CachedRepo(self.cache, asked.name)
        usable = cached.usable_refs()
        if self.offline or known:
            if usable is None:
                raise self.not_cached(asked)
            return usable, False
        if usable is not None and self.silent and choose(asked, usable) is not None:
            return usable, False
        try:
            refs = self.client.refs(asked.name, tries=1 if usable is not None else 3)
        except (Unreachable, NotCached) as e:
            self._failed(e)
            if usable is None:
                raise
            self._fell_back(e)
            return usable, False
        self._answered()
        with self._state.lock:
            self._state.refs[asked.name] = (now, refs)
        cached.write_seen_refs(refs)
        return refs, True

    def commit_of(self, asked: Requirement, revision: str, *, live: bool) -> str:
        """The commit of what is neither branch nor tag, such as `refs/pr/1`; `live` is what `refs` said.

        Raises:
            UnknownKernel: there is none; known names are listed.
            Unreachable, NotCached: nobody can say, and it was not fetched by this name before.
        """
        cached = CachedRepo(self.cache, asked.name).fetched_refs().commit(revision)
        if live:
            try:
                return self.client.commit_of(asked.name, revision, tries=1 if cached else 3)
            except NoSuchRevision as e:
                raise self.no_such(asked, live=True) from e
            except (Unreachable, NotCached) as e:
                self._failed(e)
                if cached is None:
                    raise
                self._fell_back(e)
        if cached is None:
            raise self.no_such(asked, live=False)
        return cached

    # -- files

    def listing(self, name: str, commit: str, asked: Requirement) -> Listing | None:
        """The files of a commit; None when the hub does not say and never said, and something of it is in the cache.

        Raises:
            UnknownKernel: there is no such commit.
            Unreachable, NotCached: nothing of it is in the cache.
        """
        with self._state.lock:
            known = self._state.listings.get((name, commit))
        if known is not None:
            return known
        cached = CachedRepo(self.cache, name)
        listing = cached.listing(commit)
        if listing is None:
            here = bool(cached.on_disk(commit))
            if here and self.silent:
                return None
            if self.offline:
                raise self.not_cached(asked)
            try:
                listing = self.client.listing(name, commit, tries=1 if here else 3)
            except NoSuchRevision as e:
                raise NotOnHub(f"{name} has no commit {commit}", asked=f"looking for {asked}", todo="check it") from e
            except (Unreachable, NotCached) as e:
                self._failed(e)
                if not here:
                    raise
                self._fell_back(e)
                return None
            self._answered()
            cached.write_listing(commit, listing)
        with self._state.lock:
            self._state.listings[(name, commit)] = listing
        return listing

    # -- whether the hub answers

    @property
    def silent(self) -> bool:
        """Not asked where the cache can answer: offline, or it just did not answer."""
        down = self._state.down
        return self.offline or (down is not None and time.monotonic() - down[0] < self.remember)

    def note(self) -> str | None:
        """What a person should know when the cache answers in the hub's place."""
        down = self._state.down
        return f"using what is in the cache: {down[1].reason}" if down is not None and self.silent and not self.offline else None

    def ready(self, name: str) -> None:
        """Before a download: where the hub said nothing lately, one quick question, because a download is patient.

        Raises:
            Unreachable, NotCached: it does not answer.
        """
        now = time.monotonic()
        with self._state.lock:
            up, down = self._state.up, self._state.down
        if down is not None and now - down[0] < min(_MOMENT, self.remember):
            raise type(down[1])(down[1].found, asked=down[1].asked, todo=down[1].todo)
        if down is not None or now - up > self.remember:
            try:
                self.client.refs(name, tries=1)
            except (Unreachable, NotCached) as e:
                self._failed(e)
                raise
            self._answered()

    def _answered(self) -> None:
        with self._state.lock:
            self._state.up, self._state.down, self._state.warned = time.monotonic(), None, False

    def _failed(self, error: KernelSwapError) -> None:
        """A refused token or an answer that makes no sense is about one question; no answer is about the hub."""
        if isinstance(error, Busy | NotCached):
            with self._state.lock:
                self._state.down = (time.monotonic(), error)

    def _fell_back(self, error: KernelSwapError) -> None:
        with self._state.lock:
            first, self._state.warned = not self._state.warned, True
            if self._state.down is None:
                self._state.down = (time.monotonic(), error)
        if first:
            _log.warning("%s; using what is in the cache", error.reason)

    # -- what to say

    def not_cached(self, asked: Requirement) -> NotCached:
        """Offline, and this is not here."""
        return NotCached(
            self._here(asked),
            asked=f"looking for {asked}, offline",
            todo="find it once with a connection, or name what is here",
        )

    def no_such(self, asked: Requirement, *, live: bool) -> KernelSwapError:
        """There is no such version, or nobody can say; with what there is."""
        down = self._state.down
        if not live and down is not None and not self.offline:
            return Unreachable(f"{down[1].found}; {self._here(asked)}", asked=f"looking for {asked}", todo=down[1].todo)
        if not live:
            return self.not_cached(asked)
        refs, _ = self.refs(asked, known=True)
        versions = [f"v{v}" for v in sorted(refs.versions())]
        names = versions if asked.version is not None else [*versions, *sorted({*refs.branches, *refs.tags} - set(versions))]
        near = difflib.get_close_matches(asked.revision or "", names, n=1)
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        kind = NotOnHub if asked.revision is not None else UnknownKernel
        return kind(
            f"{asked.name} has {', '.join(names[:_SHOWN]) or 'no versions'}{more}",
            asked=f"looking for {asked}",
            todo=f"did you mean {near[0]}?" if near else "ask for one of these",
        )

    def _here(self, asked: Requirement) -> str:
        usable = CachedRepo(self.cache, asked.name).usable_refs()
        names = sorted({*usable.branches, *usable.tags}) if usable is not None else []
        return f"the cache has {', '.join(names)} of it" if names else f"it was never fetched into {self.cache}"


def choose(asked: Requirement, refs: Refs) -> str | None:
    """The branch or tag that is meant, or None."""
    if asked.version is not None:
        return refs.versions().get(asked.version)
    if asked.constraints is not None:
        return spec.matching(asked.constraints, refs.tags, refs.branches)
    if asked.revision is not None:
        return asked.revision if refs.commit(asked.revision) else None
    versions = refs.versions()
    return versions[max(versions)] if versions else ("main" if refs.commit("main") else None)
