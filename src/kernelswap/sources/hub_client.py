"""The hub over HTTP, through `huggingface_hub` (1.10 and later, 2.x): its session, proxies, tokens and cache. One third party here.

Four requests exist: refs, revision, tree, and a file. Answers are plain values of `hub_cache.py`, and errors are ours.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import quote

from .._version import __version__
from ..errors import KernelSwapError, NotCached, NotOnHub, StoreError, UnknownKernel, Unreachable
from . import wire
from .deadline import within
from .environment import DEFAULT_ENDPOINT
from .hub_cache import COMMIT, Entry, Listing, Refs, interesting

_log = logging.getLogger(__name__)
_PAGES = 200  # of 1000 entries; no kernel has as many, a broken server may page for ever
_RETRY = {408, 429, 500, 502, 503, 504}
_ANSWER_BYTES = 64 << 20  # a page of the listing of a thousand files is 300 kB
_LEAST_RATE = 64 << 10  # bytes a second; what comes slower on the whole does not come
_SLACK = 64 << 20  # bytes; the hub's client hands them on in pieces of ten megabytes, and takes up what was cut short
_PATIENCE = 10.0  # seconds that a server may ask us to wait before the next try
_DISK = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG}

T = TypeVar("T")


class NoSuchRevision(NotOnHub):
    """The repository is there, the revision is not."""


class NoSuchFile(UnknownKernel):
    """The revision is there, the file is not."""


class Busy(Unreachable):
    """Not now: worth another try. `wait` is what the server asked for, in seconds."""

    def __init__(self, found: str, *, wait: float | None = None, asked: str | None = None, todo: str | None = None) -> None:
        super().__init__(found, asked=asked, todo=todo)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class HubClient:
    """Asks one hub. Keeps nothing."""

    endpoint: str
    token: str | None = None
    timeout: float = 10.0
    backoff: float = 0.5
    """Seconds before the second try; doubled for each further one."""
    patience: float = 60.0
    """Seconds for all of one answer, however slowly its pieces come; for a file, 64 KiB a second on top."""

    def refs(self, name: str, *, tries: int = 3) -> Refs:
        """Branches and tags.

        Raises:
            UnknownKernel: no such repository, or not for this token.
            Unreachable: no answer, or not a hub's answer.
        """
        value, _ = self._api(f"{name}/refs", f"listing the versions of {name}", tries)
        return self._expect(
            lambda: Refs(
                {str(b["name"]): _commit(b["targetCommit"]) for b in value["branches"]},
                {str(t["name"]): _commit(t["targetCommit"]) for t in value.get("tags") or ()},
            )
        )

    def commit_of(self, name: str, revision: str, *, tries: int = 3) -> str:
        """The commit of anything the hub knows as a revision: `refs/pr/1`, a short commit.

        Raises:
            UnknownKernel, Unreachable: as `refs`; NoSuchRevision when the repository has none of that name.
        """
        value, _ = self._api(f"{name}/revision/{quote(revision, safe='')}", f"looking for {name} at {revision}", tries)
        return self._expect(lambda: _commit(value["sha"]))

    def listing(self, name: str, commit: str, *, tries: int = 3) -> Listing:
        """Every build's files and the status file, in as many pages as the hub makes of it.

        Raises:
            UnknownKernel, Unreachable: as `commit_of`.
        """
        found: dict[str, Entry] = {}
        url: str | None = f"{name}/tree/{commit}?recursive=true&expand=false"
        for _ in range(_PAGES):
            entries, url = self._api(url, f"listing the files of {name} at {commit[:12]}", tries)
            found |= self._expect(partial(_entries, entries))
            if url is None:
                return found
        raise Unreachable(f"{self.endpoint} lists the files of {name} without end")

    def trusts(self, publisher: str, *, tries: int = 3) -> bool:
        """Whether the hub calls this organisation a trusted publisher of kernels; nobody else is one.

        Raises:
            Unreachable: no answer, or not a hub's answer.
        """
        url = f"{self.endpoint}/api/organizations/{quote(publisher, safe='')}/overview"
        try:
            value, _ = self._api(url, f"asking whether {publisher} is a trusted publisher", tries)
        except UnknownKernel:
            return False
        except Unreachable as e:
            if getattr(getattr(e.__cause__, "response", None), "status_code", None) == 404:  # a person, or nobody
                return False
            raise
        return self._expect(lambda: bool(value.get("trustedKernelPublisher")))

    def download(
        self,
        name: str,
        commit: str,
        path: str,
        cache: Path,
        *,
        size: int,
        force: bool = False,
        tick: Callable[[int], None] | None = None,
    ) -> Path:
        """One file into the shared cache; `tick(bytes)` as they come. Resumes and retries as the hub's client does.

        One that is much longer than `size`, or much slower than any line in use, is given up.

        Raises:
            NoSuchFile, UnknownKernel, Unreachable: as `commit_of`.
            StoreError: the cache cannot be written, or is full.
        """
        hub = importlib.import_module("huggingface_hub.file_download")
        asked, seconds = f"downloading {path} of {name} at {commit[:12]}", self.patience + size / _LEAST_RATE
        come, given_up = 0, threading.Event()

        def count(n: int) -> None:
            nonlocal come
            come += n
            if given_up.is_set() or come > 2 * size + _SLACK:  # twice: what was cut short and came again is counted again
                raise Busy(
                    f"network failure: {self._who} sends more than the {size} bytes that it lists", asked=asked, todo=_CHECK
                )
            if tick is not None:
                tick(n)

        def file() -> str:
            at: str = hub.hf_hub_download(
                name,
                path,
                repo_type="kernel",
                revision=commit,
                cache_dir=cache,
                endpoint=self.endpoint,
                token=self.token,
                etag_timeout=self.timeout,
                force_download=force,
                library_name="kernelswap",
                library_version=__version__,
                tqdm_class=_quiet(count),
            )
            return at

        def late() -> Busy:
            given_up.set()  # its thread ends with the next bytes
            return self._slow(asked, seconds)

        with self._errors(asked):
            return Path(within(seconds, file, late))

    # -- one request

    def _api(self, path: str | None, asked: str, tries: int) -> tuple[Any, str | None]:
        """(JSON, address of the next page). Server trouble is retried, with the waits that the server asks for."""
        assert path is not None
        url = path if "://" in path else f"{self.endpoint}/api/kernels/{path}"
        for attempt in range(1, tries + 1):
            try:
                return self._once(url, asked)
            except Busy as e:  # noqa: PERF203 -- two or three rounds of network
                if attempt == tries:
                    raise
                wait = self.backoff * 2 ** (attempt - 1) if e.wait is None else e.wait
                if wait > _PATIENCE:
                    raise
                _log.info("%s: %s; trying again in %.1f s", asked, e.reason, wait)
                time.sleep(wait)
        raise AssertionError("unreachable: the last try returns or raises")

    def _once(self, url: str, asked: str) -> tuple[Any, str | None]:
        data, following = self._get(url, asked)
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise Unreachable(f"{self._who} answered something that is no hub's answer", asked=asked, todo=_CHECK) from e
        # A mirror may hand on the addresses of the hub itself. Anywhere else our token does not go.
        if following is not None and following.startswith(f"{DEFAULT_ENDPOINT}/"):
            following = self.endpoint + following.removeprefix(DEFAULT_ENDPOINT)
        if following is not None and not following.startswith(f"{self.endpoint}/"):
            raise Unreachable(f"{self._who} sends us on to {following}", asked=asked, todo=_CHECK)
        return value, following

    def _get(self, url: str, asked: str) -> tuple[bytes, str | None]:
        """(body, address of the next page), of bounded size and within bounded time."""
        utils = importlib.import_module("huggingface_hub.utils")

        def body() -> tuple[bytes, str | None]:
            headers = utils.build_hf_headers(token=self.token, library_name="kernelswap", library_version=__version__)
            with utils.get_session().stream("GET", url, headers=headers, timeout=self.timeout) as response:
                utils.hf_raise_for_status(response)
                found = bytearray()
                for piece in response.iter_bytes():
                    found += piece
                    if len(found) > _ANSWER_BYTES:
                        raise Unreachable(f"{self._who} answered more than {_ANSWER_BYTES} bytes", asked=asked, todo=_CHECK)
            return bytes(found), response.links.get("next", {}).get("url")

        with self._errors(asked):
            return within(self.patience, body, lambda: self._slow(asked, self.patience))

    def _slow(self, asked: str, seconds: float) -> Busy:
        return Busy(f"network failure: {self._who} was not done after {seconds:.0f} s", asked=asked, todo=_CHECK)

    def _expect(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise Unreachable(f"{self._who} answered something that is no hub's answer", todo=_CHECK) from e

    @property
    def _who(self) -> str:
        return f"the hub at {self.endpoint}"

    @contextlib.contextmanager
    def _errors(self, asked: str) -> Iterator[None]:  # a line for each error of theirs
        """Whatever the client raises becomes ours, and what is a network failure is called one."""
        errors = importlib.import_module("huggingface_hub.errors")
        try:
            yield
        except KernelSwapError:
            raise
        except errors.OfflineModeIsEnabled as e:
            raise NotCached(
                "huggingface_hub was told to be offline (HF_HUB_OFFLINE)", asked=asked, todo="unset it, or fetch this first"
            ) from e
        except errors.GatedRepoError as e:
            raise UnknownKernel(
                "its owner grants access one by one, and not to this account", asked=asked, todo="ask for access on its page"
            ) from e
        except errors.RepositoryNotFoundError as e:
            todo = "check the name; a private one needs a token (HF_TOKEN, or `hf auth login`)"
            raise NotOnHub(f"{self._who} has no such kernel repository, or not for this account", asked=asked, todo=todo) from e
        except errors.LocalEntryNotFoundError as e:  # nor in its cache: what the hub answered instead is the cause
            raise self._instead(e.__cause__ or e, asked) from e
        except (errors.RevisionNotFoundError, errors.EntryNotFoundError) as e:
            if isinstance(e, errors.RevisionNotFoundError):
                raise NoSuchRevision(f"{self._who} has no such revision", asked=asked, todo="check the version") from e
            raise NoSuchFile(f"{self._who} has no such file", asked=asked) from e
        except (errors.HfHubHTTPError, errors.FileMetadataError, *wire.failures()) as e:
            raise self._instead(e, asked) from e
        except errors.HFValidationError as e:
            raise UnknownKernel(wire.line(e), asked=asked, todo="a kernel repository is named org/name") from e
        except OSError as e:
            if e.errno in _DISK:
                raise StoreError(
                    f"the hub cache cannot be written: {e}", asked=asked, todo="free space, or name another with HF_HUB_CACHE"
                ) from e
            raise Busy(f"network failure: {type(e).__name__}: {wire.line(e)}", asked=asked, todo=_CHECK) from e

    def _instead(self, e: BaseException, asked: str) -> Unreachable:
        """What came instead of an answer."""
        if getattr(e, "response", None) is not None:
            return self._status(e, asked)
        return Busy(f"network failure: {self._who} did not answer ({type(e).__name__}: {wire.line(e)})", asked=asked, todo=_CHECK)

    def _status(self, e: Any, asked: str) -> Unreachable:
        status = getattr(e.response, "status_code", 0)
        if status == 429:
            after = str(e.response.headers.get("Retry-After", ""))
            wait = float(after) if after.isdigit() else None
            said = f", and asks to wait {after} s" if wait is not None else ""
            return Busy(
                f"network failure: {self._who} limits our requests (429){said}",
                wait=wait,
                asked=asked,
                todo="wait, or log in for a higher limit",
            )
        if status in _RETRY:
            return Busy(
                f"network failure: {self._who} answered {status}",
                asked=asked,
                todo="try again later, or use a mirror (HF_ENDPOINT)",
            )
        if status in {401, 403}:
            return Unreachable(f"{self._who} refused the token ({status})", asked=asked, todo="check HF_TOKEN, or log in again")
        return Unreachable(f"network failure: {self._who} answered {status}", asked=asked, todo=_CHECK)


_CHECK = "check the connection, the proxy settings and HF_ENDPOINT"


def _entries(page: Any) -> dict[str, Entry]:
    files = (e for e in page if e["type"] == "file" and interesting(str(e["path"])))
    return {str(e["path"]): Entry(int(e["size"]), str(e["oid"]), _sha256(e.get("lfs"))) for e in files}


def _sha256(lfs: Any) -> str | None:
    return str(lfs.get("oid") or lfs["sha256"]) if lfs else None


def _commit(value: object) -> str:
    if not COMMIT.fullmatch(str(value)):
        raise ValueError(f"{value!r} is no commit")
    return str(value)


def _quiet(tick: Callable[[int], None]) -> Any:
    """The hub's progress bar, but drawing nothing: who shows progress, and how, is not the library's choice."""
    base = importlib.import_module("huggingface_hub.utils").tqdm

    class Quiet(base):  # type: ignore[misc, valid-type]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if n:
                tick(int(n))
            return cast("bool | None", super().update(n))

    return Quiet
