"""`hub://`, the default: kernel repositories of a Hugging Face hub, through the cache that its tools share.

Requests: none for a commit that was listed before; one (refs) for a version, and none when it was asked within `remember`
seconds; one more (tree) for a commit that is new. Files come one build at a time, several at once, and each is compared with
what the hub lists for it. An unreachable hub means "use what is here", with one warning; offline means the same without asking.

    hub_client  four requests        hub_index  names and listings, remembered
    hub_cache   the cache on disk    hub_files  files, compared
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import strict
from ..errors import BadMetadata, KernelSwapError, NotCached, NotOnHub, Refused, UnknownKernel, Unreachable
from ..types import Candidate, Progress, Requirement
from . import hub_cache
from .environment import DEFAULT_ENDPOINT
from .hub_cache import COMMIT, STATUS, CachedRepo, Listing, Refs
from .hub_client import HubClient
from .hub_files import HubFiles
from .hub_index import HubIndex, choose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", re.ASCII)
_HOPS = 5  # a kernel that moved more often than that is a loop in disguise


@dataclass(frozen=True, slots=True)
class _At:
    """A commit, under which name it was found, and what a person should know about it."""

    name: str
    commit: str
    ref: str | None = None
    notes: tuple[str, ...] = ()


@dataclass
class _Names:
    """(repository, commit) -> names by which it was asked for: written to the cache once it is fetched."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    of: dict[tuple[str, str], set[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HubSource:
    """One hub and one cache. Safe to share between threads; several may share a cache."""

    cache: Path
    endpoint: str = DEFAULT_ENDPOINT
    offline: bool = False
    token: str | None = field(default=None, repr=False)
    timeout: float = 10.0
    """Seconds that the hub may take to begin an answer."""
    progress: Progress | None = field(default=None, repr=False, compare=False)
    workers: int = 8
    """Files that are downloaded at once."""
    remember: float = 60.0
    """Seconds for which a list of versions is taken for current, and a hub that did not answer for unreachable."""
    backoff: float = 0.5
    """Seconds before a request is repeated; doubled each time."""
    patience: float = 60.0
    """Seconds for all of an answer, and for a file beyond what 64 KiB a second would take."""
    key: str = "hub"
    _index: HubIndex = field(init=False, repr=False, compare=False)
    _files: HubFiles = field(init=False, repr=False, compare=False)
    _names: _Names = field(default_factory=_Names, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        client = HubClient(self.endpoint.rstrip("/"), self.token, self.timeout, self.backoff, self.patience)
        index = HubIndex(self.cache, client, self.offline, self.remember)
        files = HubFiles(self.cache, client, index.ready, self.offline, self.workers, self.progress)
        object.__setattr__(self, "_index", index)
        object.__setattr__(self, "_files", files)

    # -- finding ----------------------------------------------------------------------------------------------------

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """Every build at the commit that the requirement stands for.

        A version N is the head of branch `vN`. Without any, it is the highest `vN`, else `main`. Redirects
        (`kernel-status.toml`) are followed: to the revision that they name, else to the version that was asked for.
        Without an answer from the hub, only builds that are wholly in the cache are found.

        Raises:
            UnknownKernel: no such repository, version or revision; known ones are listed.
            Unreachable: the hub did not answer and the cache has nothing that was asked for.
            NotCached: offline, and the cache has nothing that was asked for.
            BadMetadata: a redirect does not parse, or redirects lead in a circle.
        """
        try:
            at = self._follow(requirement)
            variants, notes = self._variants(at, requirement)
        except (UnknownKernel, Unreachable, NotCached) as e:
            raise _for(requirement, e) from e
        if at.ref is not None:
            with self._names.lock:
                self._names.of.setdefault((at.name, at.commit), set()).add(at.ref)
        return tuple(Candidate(requirement, self.key, at.name, at.commit, v) for v in variants), notes

    def refs(self, name: str) -> Refs:
        """Branches and tags of a repository, from the hub or as last seen.

        Raises:
            UnknownKernel, Unreachable, NotCached: as `find`.
        """
        return self._index.refs(Requirement(name))[0]

    def _variants(self, at: _At, asked: Requirement) -> tuple[list[str], tuple[str, ...]]:
        """Builds that can be had, and the notes."""
        listing = self._index.listing(at.name, at.commit, asked)
        published = [v for v in hub_cache.variants(listing or ()) if strict.path_problem(v) is None]
        if listing is not None and not self._index.silent:
            return published, at.notes
        notes = [*at.notes, *filter(None, [self._index.note()])]
        here = [v for v in CachedRepo(self.cache, at.name).complete(at.commit, listing) if strict.path_problem(v) is None]
        if not here and self.offline:
            raise self._index.not_cached(asked)
        if not here:  # the hub may be back by the time that files are wanted
            return published, tuple(notes)
        if missing := len(set(published) - set(here)):
            notes.append(f"{missing} more builds are published, but not in the cache")
        return here, tuple(notes)

    def _locate(self, asked: Requirement) -> _At:
        """The commit that `asked` names in its own repository."""
        name = asked.name
        if not _NAME.fullmatch(name) or "--" in name or ".." in name:
            raise UnknownKernel(f"{name!r} is no repository name", asked=f"looking for {asked}", todo="write org/name")
        if asked.revision is not None and COMMIT.fullmatch(asked.revision):
            return _At(name, asked.revision)
        refs, live = self._index.refs(asked)
        ref = choose(asked, refs)
        commit = refs.commit(ref) if ref is not None else None
        if commit is not None:
            return _At(name, commit, ref, _newer(asked, refs))
        if asked.revision is not None:
            return _At(name, self._index.commit_of(asked, asked.revision, live=live), asked.revision)
        raise self._index.no_such(asked, live=live)

    # -- redirects --------------------------------------------------------------------------------------------------

    def _follow(self, requirement: Requirement) -> _At:
        """The commit that is meant, after redirects."""
        path, asked = [requirement.name], requirement
        notes: list[str] = []
        while True:
            try:
                at = self._locate(asked)
            except UnknownKernel:
                moved = self._moved_on_main(asked)
                if moved is None:
                    raise
                at = moved
            notes += at.notes
            target = self._target(at, asked)
            if target is None:
                return replace(at, notes=tuple(notes))
            notes.append(f"{asked.name} moved to {target.name}" + (f" at {target.revision}" if target.revision else ""))
            if target.name in path or len(path) > _HOPS:
                raise BadMetadata(
                    f"its redirects lead in a circle: {' -> '.join((*path, target.name))}",
                    asked=f"looking for {requirement}",
                    todo="tell the publisher",
                )
            path.append(target.name)
            asked = target

    def _target(self, at: _At, asked: Requirement) -> Requirement | None:
        """What this commit redirects to, or None."""
        listing = self._index.listing(at.name, at.commit, asked)
        data = self._files.small(at.name, at.commit, STATUS, listing)
        if data is None:
            return None
        name, revision = moved_to(data, where=f"{STATUS} of {at.name} at {at.commit[:12]}")
        if revision is None and asked.revision is not None:
            revision = "main"  # the format's default: a commit or branch of the old repository means nothing in the new one
        if revision is None:
            return replace(asked, name=name, text=None)
        return replace(asked, name=name, version=None, constraints=None, revision=revision, text=None)

    def _moved_on_main(self, asked: Requirement) -> _At | None:
        """A repository that moved may say so on `main` alone, and have no such version any more."""
        with contextlib.suppress(UnknownKernel, Unreachable, NotCached):
            commit = self._index.refs(asked, known=True)[0].commit("main")
            at = _At(asked.name, commit, "main") if commit else None
            return at if at is not None and self._target(at, asked) is not None else None
        return None

    # -- files ------------------------------------------------------------------------------------------------------

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """One small file of the build, from the cache or the hub; None when the build has no such file.

        Raises:
            NotCached: offline, or the hub did not answer while other builds of this commit are in the cache.
            Unreachable: the hub did not answer, or its bytes are not those that it lists.
        """
        listing = self._index.listing(candidate.name, candidate.commit, candidate.requirement)
        try:
            return self._files.small(candidate.name, candidate.commit, f"build/{candidate.variant}/{name}", listing)
        except Unreachable as e:
            if not CachedRepo(self.cache, candidate.name).complete(candidate.commit, listing):
                raise
            raise NotCached(e.found, asked=e.asked, todo=e.todo) from e

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """Every file of the build, cached ones from the cache, and each compared with what the hub lists for it.

        Raises:
            Refused: the repository lists a path that does not stay inside the build, or more than any honest build has.
            NotCached: offline, and a file is missing.
            Unreachable: a download failed, or its bytes are not those that the hub lists.
            StoreError: the cache cannot be written.
            UnknownKernel: there is no such build.
        """
        name, commit, prefix = candidate.name, candidate.commit, f"build/{candidate.variant}/"
        asked = f"fetching {candidate.requirement} ({candidate.variant})"
        cached = CachedRepo(self.cache, name)
        listing = self._index.listing(name, commit, candidate.requirement)
        paths = hub_cache.variants(cached.on_disk(commit) if listing is None else listing).get(candidate.variant, [])
        if not paths:
            raise UnknownKernel(f"{name} has no such build at {commit[:12]}", asked=asked, todo="find it again")
        self._every(candidate, {path: into / path.removeprefix(prefix) for path in paths}, listing, asked)
        with self._names.lock:
            names = set(self._names.of.get((name, commit), ()))
        for ref in names:
            cached.write_fetched_ref(ref, commit)

    def fetch_folder(self, candidate: Candidate, folder: str, into: Path) -> None:
        """Everything below another folder of the repository, at the candidate's commit, to `into/<folder>`; maybe nothing.

        Raises:
            As `fetch`, but for UnknownKernel.
        """
        listing = self._index.listing(candidate.name, candidate.commit, candidate.requirement)
        here = CachedRepo(self.cache, candidate.name).on_disk(candidate.commit) if listing is None else listing
        targets = {path: into / path for path in here if path.startswith(f"{folder}/")}
        if targets:
            self._every(candidate, targets, listing, f"fetching {folder} of {candidate.requirement}")

    def git_lfs_concat(self, candidate: Candidate) -> str | None:
        """The digest of the build as old locks have it; `None` where the files of its commit cannot be told apart."""
        listing = self._index.listing(candidate.name, candidate.commit, candidate.requirement)
        if listing is None:
            listing = CachedRepo(self.cache, candidate.name).fetched(candidate.commit, candidate.variant)
        return hub_cache.git_lfs_concat(listing, candidate.variant) if listing is not None else None

    def _every(self, candidate: Candidate, targets: Mapping[str, Path], listing: Listing | None, asked: str) -> None:
        problems = [f"{strict.quote(p)} {why}" for p in targets if (why := strict.path_problem(p)) is not None]
        if problems:
            raise Refused("\n".join(problems[:20]), asked=asked, todo="tell the publisher")
        step = f"fetching {candidate.name} {candidate.variant}"
        self._files.every(candidate.name, candidate.commit, targets, listing, step)


def moved_to(data: bytes, *, where: str) -> tuple[str, str | None]:
    """The repository, and the revision if it says one, that the text of a `kernel-status.toml` redirects to.

    Raises:
        BadMetadata: it does not parse, or says something else.
    """
    try:
        value = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as e:
        raise BadMetadata(f"it does not parse: {e or 'nested too deeply'}", asked=where, todo="tell the publisher") from e
    kind, name, revision = value.get("kind"), value.get("destination"), value.get("revision")
    if kind != "redirect":
        todo = "a newer kernelswap may know it"
        raise BadMetadata(f"kind is {strict.quote(kind)}, this version knows 'redirect'", asked=where, todo=todo)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(revision, str | None):
        raise BadMetadata("destination must be org/name, and revision text", asked=where, todo="tell the publisher")
    return name, revision


def _newer(asked: Requirement, refs: Refs) -> tuple[str, ...]:
    newest = max(refs.versions(), default=None)
    if asked.version is None or newest is None or newest <= asked.version:
        return ()
    return (f"{asked.name} also has the newer version {newest}",)


def _for(requirement: Requirement, error: KernelSwapError) -> KernelSwapError:
    """The error in terms of what the caller asked for, instead of the one request that failed."""
    asked = f"looking for {requirement}"
    if (error.asked or "").startswith(asked):
        return error
    kind = next(k for k in (NotOnHub, UnknownKernel, Unreachable, NotCached) if isinstance(error, k))
    return kind(error.found, asked=asked, todo=error.todo)
