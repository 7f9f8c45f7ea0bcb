"""One file with kernels, what was seen of them, verdicts and a lock: a folder (`folder.py`) in a zip, and `bundle.json`.

    bundle.json        what made it, for which machines; publishers that the hub trusted; evidence; verdicts
    kernelswap.lock    its kernels, for people and for `kernelswap verify --lock`
    <org>/<name>/...   as in any folder; `_bundled/<name>/...`: compiled here from the sources that come with kernelswap

It is used as its user's word: whoever names a file vouches that it is the one meant, and for nothing else. Every kernel in it
goes through the same verifiers as one from a hub, and what it says about publishers and verdicts is forgotten with it.
"""

from __future__ import annotations

import re
import threading
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import strict
from ..errors import BadMetadata, Refused, UnknownKernel
from ..types import Candidate, Requirement
from .bundled import BundledSource
from .folder import FolderSource
from .folder_files import MOST_REFS

FORMAT = 1
ABOUT, LOCK, COMPILED = "bundle.json", "kernelswap.lock", "_bundled"
_MOST_ABOUT, _MOST_NAMES = 64 << 20, 200_000
_PUBLISHER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError)
_AGAIN = "copy it again, or write it anew with `kernelswap bundle`"


@dataclass(frozen=True, slots=True)
class About:
    """`bundle.json`."""

    version: str
    """Of the kernelswap that wrote it."""
    model: str = ""
    machines: tuple[str, ...] = ()
    publishers: Mapping[str, bool] = field(default_factory=dict)
    """What the hub said about organisations when the bundle was written."""
    compiled: Mapping[str, str] = field(default_factory=dict)
    """Bundled kernel -> digest of the sources that it was compiled from."""
    kernels: tuple[Mapping[str, Any], ...] = ()
    """`spec`, `name`, `commit`, `variant`, `digest` and `evidence` of each."""
    verdicts: Mapping[str, Any] = field(default_factory=dict)
    """An export of `proof.Verdicts`."""


def parse(data: bytes) -> About:
    """`bundle.json`.

    Raises:
        BadMetadata: it does not parse; all problems at once.
    """
    value = strict.loads(data, what=ABOUT, max_bytes=_MOST_ABOUT)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BadMetadata(
            f"not of format {FORMAT}", asked=ABOUT, todo="read it with the kernelswap that wrote it, or write it anew"
        )
    wrong = [f"{strict.quote(key)} is unknown" for key in value.keys() - _KEYS.keys() - {"format"}]
    found = {}
    for key, check in _KEYS.items():
        if key in value and not check(value[key]):
            wrong.append(f"{key} is not what it should be: {strict.quote(value[key])}")
        elif key in value:
            found[key] = tuple(value[key]) if isinstance(value[key], list) else value[key]
    if "version" not in value:
        wrong.append("version is missing")
    strict.fail(sorted(wrong), what=ABOUT)
    return About(**found)  # type: ignore[arg-type]  # each was looked at above


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _kernels(value: object) -> bool:
    names = {"spec", "name", "commit", "variant", "digest"}
    return isinstance(value, list) and all(
        isinstance(v, dict)
        and v.keys() == {*names, "evidence"}
        and all(isinstance(v[n], str) for n in names)
        and isinstance(v["evidence"], list)
        and all(_texts(e) and len(e) == 2 for e in v["evidence"])
        for v in value
    )


_KEYS: Mapping[str, Any] = {
    "version": lambda v: isinstance(v, str),
    "model": lambda v: isinstance(v, str),
    "machines": _texts,
    "publishers": lambda v: (
        isinstance(v, dict) and all(_PUBLISHER.fullmatch(k) and isinstance(said, bool) for k, said in v.items())
    ),
    "compiled": lambda v: isinstance(v, dict) and all(isinstance(d, str) for d in v.values()),
    "kernels": _kernels,
    "verdicts": lambda v: isinstance(v, dict),
}


@dataclass(frozen=True, slots=True)
class ZipTransport:
    """The bytes in a bundle. Opened once; nothing in it is a path until a listing says so."""

    file: Path
    local: bool = True
    _zip: zipfile.ZipFile = field(init=False, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            opened = zipfile.ZipFile(self.file)
        except FileNotFoundError as e:
            raise UnknownKernel(f"there is no file {self.file}", asked="opening a bundle", todo="check the path") from e
        except (OSError, *_DAMAGED) as e:
            raise self._bad(str(e)) from e
        names = [i.filename for i in opened.infolist()]
        if len(names) > _MOST_NAMES or len({n.casefold() for n in names}) < len(names):
            raise self._bad("it holds a name twice" if len(names) <= _MOST_NAMES else f"it holds {len(names)} files")
        object.__setattr__(self, "_zip", opened)

    @property
    def where(self) -> str:
        """Its path."""
        return f"the bundle {self.file}"

    def read(self, path: str, most: int) -> bytes | None:
        """See `Transport`. A file that lies about its size is damaged."""
        try:
            info = self._zip.getinfo(path)
        except KeyError:
            return None
        if info.file_size > most:
            raise self._bad(f"{path} has {info.file_size} bytes, at most {most} are read")
        try:
            with self._lock, self._zip.open(info) as stream:
                return stream.read(most + 1)[: most + 1]
        except (OSError, *_DAMAGED) as e:
            raise self._bad(f"{path}: {e}") from e

    def copy(self, path: str, target: Path, size: int) -> None:
        """See `Transport`."""
        try:
            with self._lock, self._zip.open(path) as stream, target.open("wb") as out:
                left = size + 1
                while left > 0 and (piece := stream.read(min(1 << 20, left))):
                    out.write(piece)
                    left -= len(piece)
        except (KeyError, *_DAMAGED) as e:
            raise self._bad(f"{path}: {e}") from e

    def _bad(self, why: str) -> BadMetadata:
        return BadMetadata(f"{self.file} is no whole bundle: {why}", asked=f"reading {self.file}", todo=_AGAIN)


class BundleSource(FolderSource):
    """The kernels of a bundle."""

    @classmethod
    def open(cls, file: Path) -> BundleSource:
        """Raises:
        UnknownKernel: there is no such file.
        BadMetadata: it is no bundle, or damaged.
        """
        return cls(ZipTransport(file.expanduser().absolute()), key="bundle")

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """As every folder; who asks for what is not in it is told what is."""
        try:
            return super().find(requirement)
        except UnknownKernel as e:
            has = ", ".join(sorted({str(k["spec"]) for k in self.about.kernels})) or "nothing"
            raise UnknownKernel(e.found, asked=e.asked, todo=f"it has {has}") from e

    @property
    def about(self) -> About:
        """What it says about itself.

        Raises:
            BadMetadata: it does not say it.
        """
        data = self.transport.read(ABOUT, _MOST_ABOUT)
        if data is None:
            raise BadMetadata(f"{self.transport.where} has no {ABOUT}", todo=_AGAIN)
        return parse(data)

    @property
    def lock_text(self) -> bytes:
        """Its lock."""
        return self.transport.read(LOCK, MOST_REFS) or b""

    def _differs(self, paths: Sequence[str], candidate: Candidate) -> Refused:  # type: ignore[override]  # not the network's fault here
        return Refused(
            f"{', '.join(paths)} is not what {self.transport.where} lists",
            asked=f"reading {candidate.requirement} ({candidate.variant})",
            todo=_AGAIN,
        )


@dataclass(frozen=True, slots=True)
class Compiled:
    """Bundled kernels: what is on this machine, and builds in a bundle of exactly the sources that are installed here."""

    source: BundledSource
    bundle: BundleSource
    sources: Mapping[str, str]
    """`About.compiled`."""
    key: str = "bundled"

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """As `BundledSource`, with what the bundle has beyond it.

        Raises:
            UnknownKernel: there is no bundled kernel of that name, or not at that revision.
        """
        found, notes = self.source.find(requirement)
        name = requirement.name.removeprefix("kernelswap/")
        if self.sources.get(name) != self.source.source_digest(self.source.root / name):
            return found, notes
        packed, _ = self.bundle.find(
            replace(requirement, name=f"{COMPILED}/{name}", version=None, constraints=None, revision=None)
        )
        here = {c.variant for c in found}
        more = tuple(replace(c, requirement=requirement, name=name) for c in packed if c.variant not in here)
        return (*found, *more), () if more else notes

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """From wherever the candidate came."""
        if candidate.source == self.bundle.key:
            return self.bundle.read(_packed(candidate), name)
        return self.source.read(candidate, name)

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """From wherever the candidate came."""
        if candidate.source == self.bundle.key:
            self.bundle.fetch(_packed(candidate), into)
        else:
            self.source.fetch(candidate, into)


def _packed(candidate: Candidate) -> Candidate:
    return replace(candidate, name=f"{COMPILED}/{candidate.name}")
