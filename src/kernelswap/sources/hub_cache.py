"""The hub's cache on disk, in the layout that every tool of that family shares, and a small record of our own in it.

    <cache>/kernels--<org>--<name>/refs/<branch or tag>         commit, 40 hex digits
                                   snapshots/<commit>/<path>    links to ../../blobs/<etag>
                                   trees/<commit>.json          files of a commit, written by newer clients
                                   .kernelswap/refs.json        branches and tags when they were last listed
                                   .kernelswap/<commit>.json    files of a commit, with what git calls their contents

Reading never raises for what is not there or does not parse: that is "not cached". Writing is atomic, and best effort: a
cache that cannot be written costs a request next time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from .. import strict
from .files import METADATA, skipped

COMMIT = re.compile(r"[0-9a-f]{40}")
STATUS = "kernel-status.toml"
_DOTTED = re.compile(r"v?\d+\.\d")
_FORMAT = 1
_RECORD = 64 << 20  # bytes; a listing of a hundred thousand files is 20 MB
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a commit, as the hub lists it."""

    size: int
    oid: str
    """git's name of the blob (sha1, hex); of a large file, that of its pointer."""
    sha256: str | None = None
    """Of the content, hex; large files only."""

    def differs(self, stream: BinaryIO) -> str | None:
        """Why `stream` does not hold these bytes, or None."""
        state = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        size = 0
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            state.update(chunk)
        if size != self.size:
            return f"has {size} bytes, the hub lists {self.size}"
        return None if state.hexdigest() == (self.sha256 or self.oid) else "has other bytes than the hub lists"


Listing = Mapping[str, Entry]
"""Path in the repository -> entry: everything below `build/` and `benchmarks/`, and the status file."""


@dataclass(frozen=True, slots=True)
class Refs:
    """Names of commits. Where a branch and a tag have one name, the branch is meant, as on the hub."""

    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    def commit(self, name: str) -> str | None:
        """The commit of a branch or tag."""
        return self.branches.get(name) or self.tags.get(name)

    def versions(self) -> dict[int, str]:
        """API version -> its branch: every branch that is `v` and a number."""
        return {int(b[1:]): b for b in sorted(self.branches, reverse=True) if re.fullmatch(r"v\d{1,9}", b, re.ASCII)}

    def only(self, commits: Iterable[str]) -> Refs:
        """Those names that stand for one of `commits`."""
        kept = set(commits)
        return Refs({n: c for n, c in self.branches.items() if c in kept}, {n: c for n, c in self.tags.items() if c in kept})


def interesting(path: str) -> bool:
    """Whether a listing keeps this path."""
    return (path.startswith(("build/", "benchmarks/")) and not skipped(path)) or path == STATUS


def variants(paths: Iterable[str]) -> dict[str, list[str]]:
    """Variant -> its paths in the repository, of every path below a `build/<variant>/`."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        parts = path.split("/", 2)
        if len(parts) == 3 and parts[0] == "build":
            found.setdefault(parts[1], []).append(path)
    return found


def git_lfs_concat(listing: Listing, variant: str) -> str:
    """What old locks pin of a build: sha256, hex, over the path and the git blob or LFS id (raw) of every file, by path in it."""
    prefix, state = f"build/{variant}/", hashlib.sha256()
    inside = {path.removeprefix(prefix).encode(): entry for path, entry in listing.items() if path.startswith(prefix)}
    for path, entry in sorted(inside.items()):
        state.update(path + bytes.fromhex(entry.sha256 or entry.oid))
    return state.hexdigest()


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """What the cache holds of one kernel repository."""

    cache: Path
    name: str

    @property
    def folder(self) -> Path:
        """Where this repository is; need not exist."""
        return self.cache / f"kernels--{self.name.replace('/', '--')}"

    # -- commits

    def commits(self) -> set[str]:
        """Commits of which at least one file was fetched."""
        with contextlib.suppress(OSError):
            return {p.name for p in (self.folder / "snapshots").iterdir() if COMMIT.fullmatch(p.name)}
        return set()

    def fetched_refs(self) -> Refs:
        """`refs/`: names under which something was fetched, by whatever tool. Nobody can say whether it was branch or tag."""
        root = self.folder / "refs"
        found = {p.relative_to(root).as_posix(): self._text(p).strip() for p in root.rglob("*") if p.is_file()}
        return Refs({n: c for n, c in found.items() if COMMIT.fullmatch(c)})

    def seen_refs(self) -> Refs | None:
        """Branches and tags as they were last listed by us."""
        value = self._json(self.folder / ".kernelswap" / "refs.json")
        if value is None:
            return None
        return Refs(_commits(value.get("branches")), _commits(value.get("tags")))

    def known_refs(self) -> Refs:
        """Names as last listed, and where that commit was never fetched, as last fetched under that name."""
        seen, fetched, here = self.seen_refs() or Refs(), self.fetched_refs(), self.commits()
        current = seen.only(here)
        older = {n: c for n, c in fetched.branches.items() if current.commit(n) is None and c in here}
        # `refs/` does not say what is a tag: what was listed as one is, and what looks like a dotted version.
        tags = {n for n in older if n in seen.tags or (n not in seen.branches and _DOTTED.match(n))}
        return Refs(
            {**current.branches, **{n: c for n, c in older.items() if n not in tags}},
            {**current.tags, **{n: older[n] for n in tags}},
        )

    def usable_refs(self) -> Refs | None:
        """Known names whose commits are here with a whole build or a redirect; None when there is none."""
        known = self.known_refs()
        commits = {*known.branches.values(), *known.tags.values()}
        kept = known.only(c for c in commits if self.file(c, STATUS) or self.complete(c, self.listing(c)))
        return kept if kept.branches or kept.tags else None

    def write_seen_refs(self, refs: Refs) -> None:
        """Remember a listing, for when the hub cannot be asked."""
        if refs != self.seen_refs():
            value = {"format": _FORMAT, "branches": dict(refs.branches), "tags": dict(refs.tags)}
            self._write(self.folder / ".kernelswap" / "refs.json", json.dumps(value))

    def write_fetched_ref(self, ref: str, commit: str) -> None:
        """`refs/<ref>`, as the hub's client does when it fetches by name: other tools resolve the name offline with it."""
        if strict.path_problem(ref) is None and self._text(self.folder / "refs" / ref) != commit:
            self._write(self.folder / "refs" / ref, commit)

    # -- files

    def listing(self, commit: str) -> Listing | None:
        """Files of a commit: our record, else the record of newer hub clients; None when neither is there."""
        own = self._json(self.folder / ".kernelswap" / f"{commit}.json")
        if own is not None:
            return _entries(own.get("files"), lambda e: Entry(int(e[0]), str(e[1]), e[2]))
        theirs = self._json(self.folder / "trees" / f"{commit}.json", key="format_version")
        if theirs is None:
            return None
        return _entries(theirs.get("files"), lambda e: Entry(int(e["size"]), str(e["blob_id"]), e.get("lfs_sha256")))

    def write_listing(self, commit: str, listing: Listing) -> None:
        """Remember the files of a commit, for ever: a commit names bytes."""
        files = {path: [e.size, e.oid, e.sha256] for path, e in listing.items()}
        self._write(self.folder / ".kernelswap" / f"{commit}.json", json.dumps({"format": _FORMAT, "files": files}))

    def file(self, commit: str, path: str) -> Path | None:
        """The cached file, links followed, or None when it is not here or leads out of the cache."""
        if strict.path_problem(path) is not None:
            return None
        pointer = self.folder / "snapshots" / commit / path
        # What nearly every file is, at two system calls: a link to a plain file in blobs/. Anything else is looked at closely.
        with contextlib.suppress(OSError):
            target = Path(os.path.normpath(pointer.parent / pointer.readlink()))
            if target.parent == self.folder / "blobs" and stat.S_ISREG(target.lstat().st_mode):
                return target
        real = Path(os.path.realpath(pointer))
        places = (self.folder, self.cache / "blobs")
        inside = any(real.is_relative_to(os.path.realpath(place)) for place in places)
        return real if inside and real.is_file() else None

    def on_disk(self, commit: str) -> list[str]:
        """Interesting paths of a commit that are here."""
        root = self.folder / "snapshots" / commit
        paths = (Path(at, name).relative_to(root).as_posix() for at, _, names in os.walk(root) for name in names)
        return sorted(path for path in paths if interesting(path) and self.file(commit, path) is not None)

    def complete(self, commit: str, listing: Listing | None) -> list[str]:
        """Variants of which every file is here. Without a listing, those that have something to import."""
        here = variants(self.on_disk(commit))
        if listing is None:
            return [v for v, paths in here.items() if any(p.endswith(("/__init__.py", f"/{METADATA}")) for p in paths)]
        wanted = variants(listing)
        return [v for v in here if v in wanted and all(self._has(commit, p, listing[p].size) for p in wanted[v])]

    def fetched(self, commit: str, variant: str) -> Listing | None:
        """The files of a build as they are here, where nobody listed them: blobs are named after what git or LFS calls them.

        `None` where that cannot be told: without links, as on some systems.
        """
        found: dict[str, Entry] = {}
        for path in variants(self.on_disk(commit)).get(variant, ()):
            file = self.file(commit, path)
            if file is None or len(file.name) not in {40, 64}:
                return None
            data = file.read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
            large = hashlib.sha256(data).hexdigest() if len(file.name) == 64 else None
            found[path] = Entry(len(data), blob, large)
        return found or None

    def forget(self, commit: str, path: str) -> None:
        """Take a damaged file out, so that no tool is served it."""
        pointer = self.folder / "snapshots" / commit / path
        real = self.file(commit, path)
        for file in (pointer, real):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.unlink()

    def _has(self, commit: str, path: str, size: int) -> bool:
        file = self.file(commit, path)
        return file is not None and file.stat().st_size == size

    # -- reading and writing

    def _text(self, file: Path) -> str:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if file.stat().st_size <= _RECORD:
                return file.read_text(encoding="utf-8")
        return ""

    def _json(self, file: Path, *, key: str = "format") -> dict[str, object] | None:
        text = self._text(file)
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(text) if text else None
            if isinstance(value, dict) and value.get(key) == _FORMAT:
                return value
        return None

    def _write(self, file: Path, text: str) -> None:
        temporary = file.with_name(f".{uuid.uuid4().hex}.incomplete")
        with contextlib.suppress(OSError):  # best effort, see the top
            file.parent.mkdir(parents=True, exist_ok=True)
            (self.folder / "snapshots").mkdir(exist_ok=True)  # without it the hub's cache scanner calls the folder corrupt
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(file)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _commits(value: object) -> dict[str, str]:
    items: Iterator[tuple[object, object]] = iter(value.items()) if isinstance(value, dict) else iter(())
    return {str(n): str(c) for n, c in items if COMMIT.fullmatch(str(c))}


def _entries(files: object, read: object) -> Listing | None:
    """Interesting entries, or None when one of them is not what it should be: half a listing is worse than none."""
    if not isinstance(files, dict) or not callable(read):
        return None
    try:
        return {path: read(entry) for path, entry in files.items() if interesting(path)}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return None
