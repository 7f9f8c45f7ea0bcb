"""Three ways to have the bytes of a folder: a directory, HTTP(S), and fsspec (`s3://bucket/kernels`, `gs://`, ...).

fsspec is an extra (`pip install 'kernelswap[remote]'`); it takes its credentials and endpoints from where its file systems do,
for S3 the AWS environment variables and files.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from .. import strict
from ..errors import KernelSwapError, MissingDependency, NotCached, TableError, Unreachable
from . import wire
from .deadline import within
from .folder import Transport

T = TypeVar("T")
_CHUNK = 8 << 20
_LEAST_RATE = 64 << 10  # as for a hub
_RETRY = {408, 429, 500, 502, 503, 504}
_PATIENCE = 10.0  # seconds that a server may ask us to wait before the next try
_CHECK = "check the address and the connection"


@dataclass(frozen=True, slots=True)
class DirectoryTransport:
    """A directory on this machine, or one that is mounted."""

    root: Path
    local: bool = True

    @property
    def where(self) -> str:
        """Its path."""
        return f"the folder {self.root}"

    def read(self, path: str, most: int) -> bytes | None:
        """See `Transport`."""
        file = self._file(path)
        if file is None:
            return None
        try:
            with file.open("rb") as stream:
                data = stream.read(most + 1)
        except OSError as e:
            raise Unreachable(f"{self.where} cannot be read: {e}", todo="check it, and its permissions") from e
        if len(data) > most:
            raise Unreachable(f"{path} of {self.where} is larger than {most} bytes")
        return data

    def copy(self, path: str, target: Path, size: int) -> None:
        """See `Transport`."""
        file = self._file(path)
        if file is None:
            raise Unreachable(f"{self.where} has no {path}, which it lists", todo="write it anew")
        try:
            with file.open("rb") as stream:
                left = size + 1
                with target.open("wb") as out:
                    while left > 0 and (piece := stream.read(min(_CHUNK, left))):
                        out.write(piece)
                        left -= len(piece)
        except PermissionError as e:
            raise Unreachable(f"{self.where} cannot be read: {e}", todo="check its permissions") from e

    def _file(self, path: str) -> Path | None:
        """A regular file inside, links followed as far as they stay inside."""
        file = self.root / path
        if not self.root.is_dir():
            raise Unreachable(f"there is no directory {self.root}", todo="check the path, and whether it is mounted")
        try:
            real, root = file.resolve(), self.root.resolve()
            return real if real.is_relative_to(root) and real.is_file() else None
        except OSError as e:
            raise Unreachable(f"{self.where} cannot be read: {e}", todo="check it, and its permissions") from e


@dataclass(frozen=True, slots=True)
class HttpTransport:
    """Any static web server, through the hub client's session: its proxies and certificates hold, its token is not sent."""

    url: str
    timeout: float = 10.0
    """Seconds that the server may take to go on with an answer."""
    patience: float = 60.0
    """Seconds for all of an answer; for a file, 64 KiB a second on top."""
    backoff: float = 0.5
    local: bool = False

    @property
    def where(self) -> str:
        """Its address."""
        return f"the folder at {self.url}"

    def read(self, path: str, most: int) -> bytes | None:
        """See `Transport`."""
        found = bytearray()

        def take(piece: bytes) -> None:
            found.extend(piece)
            if len(found) > most:
                raise Unreachable(f"{path} of {self.where} is larger than {most} bytes")

        return bytes(found) if self._get(path, take, self.patience, found.clear) else None

    def copy(self, path: str, target: Path, size: int) -> None:
        """See `Transport`."""
        with target.open("wb") as out:

            def take(piece: bytes) -> None:
                out.write(piece)
                if out.tell() > size:
                    raise Unreachable(f"{self.where} sends more than the {size} bytes that it lists for {path}")

            def again() -> None:
                out.seek(0)
                out.truncate()

            if not self._get(path, take, self.patience + size / _LEAST_RATE, again):
                raise Unreachable(f"{self.where} has no {path}, which it lists", todo="write it anew")

    def _get(self, path: str, take: Callable[[bytes], None], seconds: float, again: Callable[[], None]) -> bool:
        """Whether there is such a file. Server trouble is retried, with the waits that the server asks for."""
        asked, end = f"reading {path}", time.monotonic() + seconds
        for attempt in range(3):
            status, wait, why = self._once(path, take, max(0.01, end - time.monotonic()), asked)
            if status in {200, 404, 410}:
                return status == 200
            wait = self.backoff * 2**attempt if wait is None else wait
            if status not in _RETRY or attempt == 2 or wait > _PATIENCE or time.monotonic() + wait > end:
                break
            again()
            time.sleep(wait)
        raise Unreachable(f"network failure: {self.where} {why}", asked=asked, todo=_CHECK)

    def _once(self, path: str, take: Callable[[bytes], None], seconds: float, asked: str) -> tuple[int, float | None, str]:
        """(status, wait that the server asks for, what happened); a transfer that broke counts as 503."""
        utils = importlib.import_module("huggingface_hub.utils")
        errors = importlib.import_module("huggingface_hub.errors")
        given_up = threading.Event()

        def request() -> tuple[int, float | None, str]:
            url = f"{self.url.rstrip('/')}/{quote(path)}"
            with utils.get_session().stream("GET", url, timeout=self.timeout) as response:
                status, after = int(response.status_code), str(response.headers.get("Retry-After", ""))
                for piece in response.iter_bytes() if status == 200 else ():
                    if given_up.is_set():
                        break
                    take(piece)
            wait = float(after) if after.isdigit() else None
            return status, wait, f"answered {status}" + (f", and asks to wait {after} s" if wait is not None else "")

        def late() -> Unreachable:
            given_up.set()  # its thread ends with the next bytes
            return Unreachable(f"network failure: {self.where} was not done after {seconds:.0f} s", asked=asked, todo=_CHECK)

        try:
            return within(seconds, request, late)
        except KernelSwapError:
            raise
        except errors.OfflineModeIsEnabled as e:
            raise NotCached("huggingface_hub was told to be offline (HF_HUB_OFFLINE)", asked=asked, todo="unset it") from e
        except wire.failures() as e:
            return 503, None, f"did not answer ({type(e).__name__}: {wire.line(e)})"


@dataclass(frozen=True, slots=True)
class FsspecTransport:
    """What fsspec opens, S3 for one."""

    url: str
    patience: float = 60.0
    local: bool = False
    _opened: list[tuple[Any, str]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def where(self) -> str:
        """Its address."""
        return f"the folder at {self.url}"

    def read(self, path: str, most: int) -> bytes | None:
        """See `Transport`."""
        try:
            data = self._bytes(path, 0, most + 1)
        except FileNotFoundError:
            return None
        if len(data) > most:
            raise Unreachable(f"{path} of {self.where} is larger than {most} bytes")
        return data

    def copy(self, path: str, target: Path, size: int) -> None:
        """See `Transport`."""
        with target.open("wb") as out:
            while (at := out.tell()) < size:
                try:
                    piece = self._bytes(path, at, min(size, at + _CHUNK))
                except FileNotFoundError as e:
                    raise Unreachable(f"{self.where} has no {path}, which it lists", todo="write it anew") from e
                if not piece:
                    return
                out.write(piece)

    def _bytes(self, path: str, start: int, end: int) -> bytes:
        asked = f"reading {path}"
        seconds = self.patience + (end - start) / _LEAST_RATE

        def work() -> bytes:
            filesystem, root = self._open()
            found: bytes = filesystem.cat_file(f"{root}/{path}", start=start, end=end)
            return found

        def late() -> Unreachable:
            return Unreachable(f"network failure: {self.where} was not done after {seconds:.0f} s", asked=asked, todo=_CHECK)

        try:
            return within(seconds, work, late)
        except (KernelSwapError, FileNotFoundError):
            raise
        except PermissionError as e:
            raise Unreachable(f"{self.where} refused our credentials: {wire.line(e)}", asked=asked, todo="check them") from e
        except Exception as e:  # every file system of fsspec has errors of its own
            raise Unreachable(
                f"network failure: {self.where} failed ({type(e).__name__}: {wire.line(e)})", asked=asked, todo=_CHECK
            ) from e

    def _open(self) -> tuple[Any, str]:
        if not self._opened:
            try:
                fsspec = importlib.import_module("fsspec.core")
                filesystem, root = fsspec.url_to_fs(self.url, use_listings_cache=False)
            except ImportError as e:
                raise MissingDependency(
                    f"{self.url} is opened by fsspec, and it lacks something: {wire.line(e)}",
                    todo="pip install 'kernelswap[remote]' for s3://; other file systems have packages of their own",
                ) from e
            except ValueError as e:
                raise TableError(f"fsspec does not know {self.url}: {wire.line(e)}", todo="check the address") from e
            self._opened.append((filesystem, str(root).rstrip("/")))
        return self._opened[0]


def transport(text: str, *, timeout: float = 10.0) -> Transport:
    """`https://...` and `http://...`, `s3://...` and other schemes of fsspec, `dir:///path` or a path.

    Raises:
        TableError: it is none of these.
    """
    scheme, found, rest = text.partition("://")
    if scheme in {"http", "https"} and rest:
        return HttpTransport(text.rstrip("/"), timeout)
    if scheme in {"dir", "file"} and rest:
        return DirectoryTransport(Path(rest).expanduser().absolute())
    if found and rest and scheme.isidentifier():
        return FsspecTransport(text.rstrip("/"))
    if not found and text and not text.isidentifier():
        return DirectoryTransport(Path(text).expanduser().absolute())
    raise TableError(
        f"{strict.quote(text)} is no source of kernels", todo="Write hub, a path, https://..., or s3://... (through fsspec)."
    )
