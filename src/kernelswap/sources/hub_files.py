"""Files of a hub commit into the shared cache: several at once, each compared with what the hub lists for it."""

from __future__ import annotations

import io
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from .. import strict
from ..errors import NotCached, Refused, Unreachable
from ..types import Progress
from .files import SMALL, read_small
from .hub_cache import CachedRepo, Entry, Listing
from .hub_client import Busy, HubClient

_log = logging.getLogger(__name__)
_Take = Callable[[Path, Entry | None], str | None]
_MAX_FILES, _MAX_BYTES = 20_000, 8 << 30  # far above any real build; asked before the first byte comes


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Reads from the cache, and through `client` what is not there. A `listing` of None means that the hub cannot be asked.

    What is handed on was compared after it left the cache: other processes write there, and under a wrong ETag two files
    are one blob.
    """

    cache: Path
    client: HubClient = field(repr=False)
    ready: Callable[[str], None] = field(repr=False)
    """Called with the repository before a download; raises where the hub is known not to answer."""
    offline: bool = False
    workers: int = 8
    progress: Progress | None = field(default=None, repr=False)

    def small(self, name: str, commit: str, path: str, listing: Listing | None) -> bytes | None:
        """A file that is expected to be small, or None when the commit has no such file.

        Raises:
            NotCached, Unreachable, StoreError: as `every`.
            Refused: it is larger than any honest one.
        """
        if strict.path_problem(path) is not None:
            return None
        if path not in listing if listing is not None else CachedRepo(self.cache, name).file(commit, path) is None:
            return None
        if listing is not None and listing[path].size > SMALL:  # before a byte of it comes
            raise Refused(f"{path} has {listing[path].size} bytes, at most {SMALL} are read", asked=f"reading {name}")
        found: list[bytes] = []

        def take(file: Path, entry: Entry | None) -> str | None:
            found[:] = [read_small(file)]
            return entry.differs(io.BytesIO(found[0])) if entry else None

        self._file(name, commit, path, listing, _Meter(None, "", 0), take)
        return found[0]

    def every(self, name: str, commit: str, paths: Mapping[str, Path], listing: Listing | None, step: str) -> None:
        """Copy `{path in the repository: target}`. Targets that were written when something fails stay for the caller to remove.

        Raises:
            Refused: a path does not stay inside the repository, or there is more of it than any honest build has.
            NotCached: offline, and a file is missing.
            Unreachable: a download failed, or its bytes are not those that the hub lists.
            StoreError: the cache cannot be written.
        """
        total = sum(listing[p].size for p in paths) if listing is not None else 0
        if len(paths) > _MAX_FILES or total > _MAX_BYTES:
            raise Refused(
                f"{len(paths)} files, {total} bytes; at most {_MAX_FILES} and {_MAX_BYTES} are fetched",
                asked=f"fetching {name} at {commit[:12]}",
                todo="tell the publisher",
            )
        meter = _Meter(self.progress, step, total)
        for target in paths.values():
            target.parent.mkdir(parents=True, exist_ok=True)

        def one(path: str, target: Path) -> None:
            def take(file: Path, entry: Entry | None) -> str | None:
                shutil.copyfile(file, target)
                with target.open("rb") as copy:
                    why = entry.differs(copy) if entry else None
                if why is not None:
                    target.unlink()
                return why

            self._file(name, commit, path, listing, meter, take)

        with ThreadPoolExecutor(max(1, self.workers), thread_name_prefix="kernelswap-fetch") as pool:
            tasks = [pool.submit(one, path, target) for path, target in paths.items()]
            try:
                for task in tasks:
                    task.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        meter.end()

    def _file(self, name: str, commit: str, path: str, listing: Listing | None, meter: _Meter, take: _Take) -> None:
        """Hand one file of the cache to `take`, and fetch it when it is not there or `take` says that its bytes are wrong."""
        cached = CachedRepo(self.cache, name)
        file = cached.file(commit, path)
        asked = f"reading {name} at {commit[:12]}"
        entry = listing[path] if listing is not None else None
        why = take(file, entry) if file is not None else "is not in the cache"
        if why is None:
            meter.add(entry.size if entry else 0)
            return
        if self.offline or entry is None:
            raise NotCached(f"{path} {why}", asked=f"{asked}, offline", todo="fetch it once with a connection")
        self.ready(name)
        if file is not None:
            _log.warning("%s of %s in the cache %s; fetching it again", path, name, why)
        for force in (file is not None, True):
            part = _Part(meter, entry.size)
            try:
                here = self.client.download(name, commit, path, self.cache, size=entry.size, force=force, tick=part.add)
                why = take(here, entry)
            except Busy as e:  # the client resumed and retried what it could; a transfer cut short deserves one fresh start
                if force:
                    raise
                why = e.reason
            except FileNotFoundError as e:  # another process took it out, for the reason for which we would
                why = str(e)
            if why is None:
                part.end()
                return
            part.undo()
            cached.forget(commit, path)
        raise Unreachable(
            f"network failure: {path} {why}, twice",
            asked=f"downloading {name} at {commit[:12]}",
            todo="something between here and the hub changes files: a proxy, a mirror; try another connection",
        )


class _Meter:
    """Bytes that are here, reported as they come. Threads add to it."""

    def __init__(self, progress: Progress | None, step: str, total: int) -> None:
        self.progress, self.step, self.total, self.done = progress, step, total, 0
        self.lock = threading.Lock()

    def add(self, n: int) -> None:
        with self.lock:
            self.done += n
            if self.progress is not None and self.done < self.total:  # the end is said by `end`, once
                self.progress(self.step, self.done, self.total)

    def end(self) -> None:
        if self.progress is not None:
            self.progress(self.step, self.total, self.total)


class _Part:
    """One file's share of a meter: never more than its size, and taken back when it has to come again."""

    def __init__(self, meter: _Meter, size: int) -> None:
        self.meter, self.size, self.done = meter, size, 0

    def add(self, n: int) -> None:
        n = min(n, self.size - self.done)
        self.done += n
        self.meter.add(n)

    def end(self) -> None:
        self.add(self.size - self.done)

    def undo(self) -> None:
        self.meter.add(-self.done)
        self.done = 0
