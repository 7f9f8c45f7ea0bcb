"""Locks: which bytes stand for which spec. Three formats are read, two are written. Pure.

* `kernels.lock`, current: `[{"dependency": {"repo-id", "version" | "revision"}, "lock": {"commit"}}]`, sorted, strict. Written by
  `Lock.dumps_kernels()`; other loaders read it.
* `kernels.lock` up to the reference's 0.16: `[{"repo_id", "sha", "variants": {variant: {"hash", "hash_type"}}}]`. Read only.
* `kernelswap.lock`: `{"format_version": 1, "entries": [...]}`, with source, spec and the digest of every file. Written by `dumps()`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from . import strict
from .errors import BadMetadata
from .strict import quote
from .types import Requirement

FORMAT_VERSION = 1
MAX_BYTES = 16 << 20
MAX_ENTRIES = 2000
Format = Literal["kernels.lock", "kernels.lock (old)", "kernelswap.lock"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
_SRI = re.compile(r"sha(256|384|512)-[A-Za-z0-9+/]{1,100}={0,2}")
_OLD_HASH = re.compile(r"sha256-[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class LockedBuild:
    """The bytes of one build."""

    variant: str
    tree: str | None = None
    """sha256 of the tree, hex, as `Artifact.digest`; None in an old lock, whose hash is of another kind."""
    files: tuple[tuple[str, str], ...] = ()
    """`/`-separated path and sha256, hex."""
    git_lfs_concat: str | None = None
    """The old format's hash: sha256, hex, over path and git-blob or LFS id of every file. Needs the hub's tree to be checked."""


@dataclass(frozen=True, slots=True)
class Locked:
    """One spec and the commit it stands for. At most one of `version`, `revision` and `constraints` is set."""

    name: str
    commit: str
    source: str = "hub"
    version: int | None = None
    revision: str | None = None
    constraints: str | None = None
    builds: tuple[LockedBuild, ...] = ()

    @property
    def asked(self) -> str:
        """The spec, without a layer."""
        return str(Requirement(self.name, self.source, self.version, self.revision, self.constraints))

    def build(self, variant: str) -> LockedBuild | None:
        """The build of that name, where the lock has its digests."""
        return next((b for b in self.builds if b.variant == variant), None)


@dataclass(frozen=True, slots=True)
class Lock:
    """Entries in the order of the file. Equal locks mean the same, whatever format they were read from."""

    entries: tuple[Locked, ...] = ()

    def find(self, name: str, requirement: Requirement | None = None) -> Locked | None:
        """The entry for `name`: the one locked for what `requirement` asks, or without one the first.

        An entry that does not say what was asked (the old format) stands for every version; so does a requirement that
        names none, or that names the commit itself.
        """
        named = [e for e in self.entries if e.name == name and (requirement is None or e.source == requirement.source)]
        if requirement is None:
            return next(iter(named), None)
        wanted = requirement.version, requirement.revision, requirement.constraints
        exact = next((e for e in named if (e.version, e.revision, e.constraints) == wanted), None)
        if exact is not None or wanted == (None, None, None):
            return exact or next(iter(named), None)
        return next(
            (e for e in named if (e.version, e.revision, e.constraints) == (None, None, None) or e.commit == wanted[1]), None
        )

    def dumps(self) -> str:
        """`kernelswap.lock`: sorted, one entry after the other, the same text for the same entries."""
        entries = [_entry_json(e) for e in sorted(self.entries, key=_sort_key)]
        return json.dumps({"format_version": FORMAT_VERSION, "entries": entries}, indent=2) + "\n"

    def dumps_kernels(self) -> str:
        """`kernels.lock` in the current format, for other loaders: hub entries, without digests.

        What was asked by constraints, or not recorded, becomes the commit itself: the format knows version and revision only.
        Of several entries for one repository the format keeps the first, as its readers would.
        """
        entries: dict[str, dict[str, Any]] = {}
        for e in sorted(self.entries, key=_sort_key):
            if e.source != "hub" or e.name in entries:
                continue
            at = {"version": e.version} if e.version is not None else {"revision": e.revision or e.commit}
            entries[e.name] = {"dependency": {"repo-id": e.name, **at}, "lock": {"commit": e.commit}}
        return json.dumps(list(entries.values()), indent=2) + "\n"

    def with_entry(self, entry: Locked) -> Lock:
        """A copy in which `entry` stands in place of the one for the same spec; digests of its other builds at the same commit stay."""
        same = next((e for e in self.entries if e.asked == entry.asked), None)
        if same is not None and same.commit == entry.commit:
            new = {b.variant for b in entry.builds}
            kept = tuple(b for b in same.builds if b.variant not in new)
            entry = replace(entry, builds=(*kept, *entry.builds))
        return Lock((*(e for e in self.entries if e.asked != entry.asked), entry))


def parse(text: str | bytes, *, what: str = "the lock") -> Lock:
    """Read a lock in any of the three formats; `what` is what messages call it.

    Raises:
        BadMetadata: every problem at once, one a line.
    """
    root = strict.loads(text, what=what, max_bytes=MAX_BYTES)
    reader = _Reader()
    lock = reader.lock(root)
    strict.fail(reader.problems, what=what)
    return lock


def format_of(text: str | bytes, *, what: str = "the lock") -> Format:
    """Which format `text` is in; an empty list is the current one.

    Raises:
        BadMetadata: it is not JSON, or neither a list nor an object.
    """
    root = strict.loads(text, what=what, max_bytes=MAX_BYTES)
    if isinstance(root, dict):
        return "kernelswap.lock"
    if not isinstance(root, list):
        raise BadMetadata(f"expected a list or an object, found {strict.kind(root)}", asked=what)
    old = any(isinstance(item, dict) and "repo_id" in item for item in root)
    return "kernels.lock (old)" if old else "kernels.lock"


def diff(old: Lock, new: Lock) -> list[str]:
    """What changed, in words, sorted by spec; empty when nothing did.

    A build whose content changed under the same commit is said as such: no honest source does that.
    """
    before, after = {e.asked: e for e in old.entries}, {e.asked: e for e in new.entries}
    lines: list[str] = []
    for asked in sorted({*before, *after}):
        if asked not in before:
            lines.append(f"{asked}: added at {after[asked].commit[:12]}")
        elif asked not in after:
            lines.append(f"{asked}: removed, was at {before[asked].commit[:12]}")
        else:
            a, b = before[asked], after[asked]
            if a.commit != b.commit:
                lines.append(f"{asked}: {a.commit[:12]} -> {b.commit[:12]}")
            lines += _build_lines(asked, a, b)
    return lines


def _build_lines(asked: str, a: Locked, b: Locked) -> Iterable[str]:
    same_commit = a.commit == b.commit
    for variant in sorted({x.variant for x in (*a.builds, *b.builds)}):
        old, new = a.build(variant), b.build(variant)
        if old is None:
            yield f"{asked} {variant}: added"
        elif new is None:
            yield f"{asked} {variant}: removed"
        elif old != new:
            files = {f"{'changed' if path in dict(old.files) else 'added'} {path}" for path, _ in {*new.files} - {*old.files}}
            files |= {f"removed {path}" for path, _ in old.files if path not in dict(new.files)}
            changed = ", ".join(sorted(files)) or "digest changed"
            yield f"{asked} {variant}: {changed}" + (", though the commit is the same" if same_commit else "")


def _sort_key(entry: Locked) -> tuple[str, str, str]:
    return entry.name, entry.source, entry.asked


def _entry_json(entry: Locked) -> dict[str, Any]:
    asked = {"version": entry.version, "revision": entry.revision, "constraints": entry.constraints}
    builds = {b.variant: _build_json(b) for b in sorted(entry.builds, key=lambda b: b.variant)}
    return {
        "name": entry.name,
        "source": entry.source,
        **{key: value for key, value in asked.items() if value is not None},
        "commit": entry.commit,
        "builds": builds,
    }


def _build_json(build: LockedBuild) -> dict[str, Any]:
    found: dict[str, Any] = {"files": dict(sorted(build.files))} if build.files else {}
    for key in ("tree", "git_lfs_concat"):
        if (value := getattr(build, key)) is not None:
            found[key] = value
    return dict(sorted(found.items(), reverse=True))


class _Reader:
    """One lock being read; problems collect."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def lock(self, root: object) -> Lock:
        if isinstance(root, dict):
            return self.ours(root)
        if not isinstance(root, list):
            self.problems.append(f"expected a list or an object, found {strict.kind(root)}")
            return Lock()
        old = any(isinstance(item, dict) and "repo_id" in item for item in root)
        return self.entries(root, "", self.old if old else self.current)

    def ours(self, root: dict[str, Any]) -> Lock:
        self.unknown(root, "top level", ("format_version", "entries"))
        version = root.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            self.problems.append(f"format_version: {quote(version)}, this release reads {FORMAT_VERSION}")
            return Lock()
        entries = root.get("entries")
        if not isinstance(entries, list):
            self.problems.append(f"entries: expected a list, found {strict.kind(entries)}")
            return Lock()
        return self.entries(entries, "entries", self.our)

    def entries(self, items: list[Any], where: str, read: Any) -> Lock:
        if len(items) > MAX_ENTRIES:
            self.problems.append(f"{len(items)} entries, at most {MAX_ENTRIES} are read")
            return Lock()
        found: dict[str, Locked] = {}
        for i, item in enumerate(items):
            at = f"{where}[{i}]"
            if not isinstance(item, dict):
                self.problems.append(f"{at}: expected an object, found {strict.kind(item)}")
                continue
            entry: Locked = read(item, at)
            # The reference refuses a repository that is listed twice; our own format may hold several versions of one.
            key = entry.asked if read == self.our else entry.name
            if key in found and entry.name:
                self.problems.append(f"{at}: {quote(key)} is listed twice")
            found.setdefault(key, entry)
        return Lock(tuple(found.values()))

    # one method per format

    def current(self, item: dict[str, Any], at: str) -> Locked:
        self.unknown(item, at, ("dependency", "lock"))
        dependency = self.object(item, at, "dependency")
        self.unknown(dependency, f"{at}.dependency", ("repo-id", "version", "revision"))
        if ("version" in dependency) is ("revision" in dependency):
            self.problems.append(f"{at}.dependency: exactly one of version and revision is needed")
        lock = self.object(item, at, "lock")
        self.unknown(lock, f"{at}.lock", ("commit", "hash"))
        if "hash" in lock:  # written by the Nix tooling, over its own packing of the files; nothing here can check it
            self.text(lock, f"{at}.lock", "hash", _SRI)
        return Locked(
            name=self.text(dependency, f"{at}.dependency", "repo-id", _NAME),
            commit=self.text(lock, f"{at}.lock", "commit", _COMMIT),
            version=self.version(dependency, f"{at}.dependency"),
            revision=self.revision(dependency, f"{at}.dependency", "revision"),
        )

    def old(self, item: dict[str, Any], at: str) -> Locked:
        self.unknown(item, at, ("repo_id", "sha", "variants"))
        variants = self.object(item, at, "variants")
        builds = []
        for variant in variants:
            where = f"{at}.variants[{quote(variant)}]"
            self.variant(variant, where)
            build = self.object(variants, f"{at}.variants", variant)
            self.unknown(build, where, ("hash", "hash_type"))
            self.text(build, where, "hash_type", re.compile("git_lfs_concat"))
            hash_ = self.text(build, where, "hash", _OLD_HASH)
            builds.append(LockedBuild(variant, git_lfs_concat=hash_.removeprefix("sha256-")))
        return Locked(
            name=self.text(item, at, "repo_id", _NAME), commit=self.text(item, at, "sha", _COMMIT), builds=tuple(builds)
        )

    def our(self, item: dict[str, Any], at: str) -> Locked:
        self.unknown(item, at, ("name", "source", "version", "revision", "constraints", "commit", "builds"))
        if sum(key in item for key in ("version", "revision", "constraints")) > 1:
            self.problems.append(f"{at}: at most one of version, revision and constraints")
        source = self.text(item, at, "source", re.compile("[a-z]{1,20}"))
        builds = self.object(item, at, "builds")
        return Locked(
            name=self.text(item, at, "name", _NAME if source == "hub" else None),
            commit=self.text(item, at, "commit", _COMMIT if source == "hub" else None),
            source=source or "hub",
            version=self.version(item, at),
            revision=self.revision(item, at, "revision"),
            constraints=self.revision(item, at, "constraints"),
            builds=tuple(self.our_build(builds, variant, f"{at}.builds") for variant in builds),
        )

    def our_build(self, builds: dict[str, Any], variant: str, at: str) -> LockedBuild:
        where = f"{at}[{quote(variant)}]"
        self.variant(variant, where)
        build = self.object(builds, at, variant)
        self.unknown(build, where, ("tree", "files", "git_lfs_concat"))
        files = self.object(build, where, "files") if "files" in build else {}
        for path in files:
            if (why := strict.path_problem(path)) is not None:
                self.problems.append(f"{where}.files: the path {quote(path)} {why}")
            self.text(files, f"{where}.files", path, _SHA256)
        return LockedBuild(
            variant,
            tree=self.text(build, where, "tree", _SHA256) if "tree" in build else None,
            files=tuple((path, str(digest)) for path, digest in sorted(files.items())),
            git_lfs_concat=self.text(build, where, "git_lfs_concat", _SHA256) if "git_lfs_concat" in build else None,
        )

    # values by type

    def unknown(self, item: dict[str, Any], at: str, known: Sequence[str]) -> None:
        self.problems += [f"{at}: unknown key {quote(key)}" for key in item if key not in known]

    def object(self, item: dict[str, Any], at: str, key: str) -> dict[str, Any]:
        value = item.get(key)
        if isinstance(value, dict):
            return value
        self.problems.append(
            f"{at}: {quote(key)} is missing" if key not in item else f"{at}: {quote(key)} is {strict.kind(value)}, not an object"
        )
        return {}

    def text(self, item: dict[str, Any], at: str, key: str, form: re.Pattern[str] | None) -> str:
        value = item.get(key)
        if key not in item:
            self.problems.append(f"{at}: {quote(key)} is missing")
        elif not isinstance(value, str):
            self.problems.append(f"{at}: {quote(key)} is {strict.kind(value)}, not a string")
        elif not value or not value.isprintable() or (form is not None and not form.fullmatch(value)):
            self.problems.append(f"{at}: {quote(key)} has the wrong form: {quote(value)}")
        else:
            return value
        return ""

    def version(self, item: dict[str, Any], at: str) -> int | None:
        value = item.get("version")
        if "version" in item and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 31):
            self.problems.append(f"{at}: 'version' is {quote(value)}, not a whole number from 0 on")
            return None
        return value

    def revision(self, item: dict[str, Any], at: str, key: str) -> str | None:
        return self.text(item, at, key, None) if key in item else None

    def variant(self, variant: str, at: str) -> None:
        if not _VARIANT.fullmatch(variant):
            self.problems.append(f"{at}: not a variant name")
