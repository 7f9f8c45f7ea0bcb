"""Locks on disk: made of what a project asks for or of what serves, written beside it, and the ones before kept.

make       what pyproject.toml asks for, at which commits, with the digest of every file of every build
of_model   what serves a model; of_artifacts: any kernels
write      both files, or none; what they replace goes into a history in the cache, from where `before` takes it
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import lock as locks
from . import metadata as metadata_file
from . import spec, tree
from .errors import StoreError, TableError, UnknownKernel
from .lock import Lock, Locked, LockedBuild
from .types import Artifact, Candidate, Outcome, Progress, Requirement, Source, Swap

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

log = logging.getLogger("kernelswap.lock")
OURS, THEIRS = "kernelswap.lock", "kernels.lock"
KEPT = 50
"""Locks of one directory that the history keeps."""


def asked(project: Path) -> tuple[Requirement, ...]:
    """What `pyproject.toml` of a project asks for: `[tool.kernels.dependencies]`, then `[tool.kernelswap.dependencies]`.

    Both are `"org/repo" = 1`, or a text: a version, PEP 440 constraints, a branch, tag or commit.

    Raises:
        TableError: there is no such file, it does not parse, or it asks for nothing.
    """
    file = project / "pyproject.toml"
    try:
        tool = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    except FileNotFoundError as e:
        raise TableError(
            f"there is no {file}", todo="Name the directory of a project; for a model: `kernelswap lock --model MODEL`."
        ) from e
    except ValueError as e:
        raise TableError(f"{file} does not parse: {e}") from e
    found: dict[str, Requirement] = {}
    for table in ("kernels", "kernelswap"):
        for name, version in (tool.get(table, {}).get("dependencies") or {}).items():
            if isinstance(version, bool) or not isinstance(version, int | str):
                raise TableError(
                    f"[tool.{table}.dependencies] {name}: {version!r} is neither a number nor a text", asked=str(file)
                )
            found[name] = replace(spec.parse(f"{name}@{version}"), text=None)
    if not found:
        todo = 'Write, say, "kernels-community/activation" = 1 below it.'
        raise TableError(f"{file} has no kernels in [tool.kernels.dependencies]", todo=todo)
    return tuple(found.values())


def make(source: Source, wanted: Iterable[Requirement], *, former: Lock | None = None, progress: Progress | None = None) -> Lock:
    """A lock of `wanted` and of what every build of them depends on, with the digest of every file of every build.

    What `former` locks for the same spec stays at its commit; without it, everything is looked up anew. Every build is fetched
    once for its digests; none is imported.

    Raises:
        UnknownKernel, Unreachable, NotCached: something cannot be found or fetched.
        Refused: a build has paths that do not stay inside it.
    """
    made, left = Lock(), list(wanted)
    done: set[str] = set()
    while left:
        requirement = left.pop(0)
        if str(requirement) in done:
            continue
        done.add(str(requirement))
        kept = former.find(requirement.name, requirement) if former is not None else None
        at = requirement if kept is None else replace(requirement, version=None, constraints=None, revision=kept.commit)
        candidates, _ = source.find(at)
        if not candidates:
            raise UnknownKernel("it has no builds", asked=f"locking {requirement}")
        builds = []
        for number, candidate in enumerate(candidates):
            if progress is not None:
                progress(f"reading {requirement}", number, len(candidates))
            builds.append(_build(source, candidate))
            left += _depends(source, candidate)
        if progress is not None:
            progress(f"reading {requirement}", len(candidates), len(candidates))
        first = candidates[0]
        asked_for = {"version": requirement.version, "revision": requirement.revision, "constraints": requirement.constraints}
        made = made.with_entry(Locked(first.name, first.commit, "hub", **asked_for, builds=tuple(builds)))  # type: ignore[arg-type]  # each of its own type
    return made


def of_model(outcomes: Iterable[Outcome], former: Lock | None = None) -> Lock:
    """A lock of every kernel that serves a site of a model, bundled ones included, and of what these depend on.

    Entries of `former` for other kernels stay.
    """
    return of_artifacts(serving(outcomes), former)


def serving(outcomes: Iterable[Outcome]) -> list[Artifact]:
    """The kernels behind a plan, each once."""
    swaps = (o for o in outcomes if isinstance(o, Swap))
    served = (choice.implementation for o in swaps for choice in (o.inference, o.training))
    return list({k.origin.digest: k.origin for i in served if i is not None for k in i.kernels}.values())


def of_artifacts(artifacts: Iterable[Artifact], former: Lock | None = None) -> Lock:
    """The same, of kernels at hand."""
    made, left = former or Lock(), list(artifacts)
    done: set[tuple[str, str]] = set()
    while left:
        artifact = left.pop(0)
        found, asked_for = artifact.candidate, artifact.candidate.requirement
        if (artifact.digest, str(asked_for)) in done:
            continue
        done.add((artifact.digest, str(asked_for)))
        left += artifact.depends
        build = LockedBuild(found.variant, tree=artifact.digest, files=tuple(tree.hashes(artifact.path).items()))
        if found.source == "local":  # a directory that stood in for a repository: the lock says what was loaded
            made = made.with_entry(Locked(found.name, found.commit, "dir", builds=(build,)))
            continue
        asked_as = {"version": asked_for.version, "revision": asked_for.revision, "constraints": asked_for.constraints}
        made = made.with_entry(Locked(found.name, found.commit, asked_for.source, **asked_as, builds=(build,)))  # type: ignore[arg-type]  # each of its own type
    return made


# -- files --------------------------------------------------------------------------------------------------------------


def write(lock: Lock, folder: Path, *, theirs: bool = True, cache: Path | None = None) -> list[Path]:
    """`kernelswap.lock` with the digests, and with `theirs` `kernels.lock` for other loaders, in `folder`: both or none.

    What is replaced and says something else is kept in the history in `cache` first.

    Raises:
        StoreError: it cannot be written; everything is as it was.
        BadMetadata: what is there does not parse, and so could not be kept.
    """
    old = former(folder) if cache is not None else None
    if old is not None and old != lock and cache is not None:
        _keep(old, folder, cache)
    texts = {**({THEIRS: lock.dumps_kernels()} if theirs else {}), OURS: lock.dumps()}
    staged: list[tuple[Path, Path]] = []
    try:
        for name, text in texts.items():
            temporary = folder / f".{name}.{uuid.uuid4().hex}"
            staged.append((temporary, folder / name))
            temporary.write_text(text, encoding="utf-8")
        for temporary, target in staged:
            temporary.replace(target)
    except OSError as e:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        raise StoreError(
            f"a lock cannot be written there: {e.strerror or e}",
            asked=f"locking in {folder}",
            todo="Give a directory that is there and can be written to.",
        ) from e
    return [folder / name for name in texts]


def record(artifacts: Iterable[Artifact], folder: Path, *, cache: Path) -> list[str]:
    """Have `kernelswap.lock` in `folder` name these kernels; what changed, in words. Written only where something did.

    Raises:
        As `write`.
    """
    old = former(folder) or Lock()
    new = of_artifacts(artifacts, old)
    changes = locks.diff(old, new)
    if changes:
        write(new, folder, theirs=False, cache=cache)
        log.info("%s: %s", folder / OURS, "; ".join(changes))
    return changes


def former(folder: Path) -> Lock | None:
    """The lock that is in a folder, ours first, in any format; `None` where there is none.

    Raises:
        BadMetadata: it does not parse.
    """
    for name in (OURS, THEIRS):
        if (folder / name).is_file():
            return locks.parse((folder / name).read_bytes(), what=str(folder / name))
    return None


def there(folder: Path) -> tuple[str, Lock | None]:
    """The file that a folder's lock is in, or would be in, and what it says.

    Raises:
        BadMetadata: it does not parse.
    """
    name = next((name for name in (OURS, THEIRS) if (folder / name).is_file()), OURS)
    return str(folder / name), former(folder)


def _build(source: Source, candidate: Candidate) -> LockedBuild:
    with tempfile.TemporaryDirectory() as folder:
        source.fetch(candidate, Path(folder))
        files = tree.hashes(Path(folder))
    return LockedBuild(candidate.variant, tree=tree.digest_of(files), files=tuple(files.items()))


def _depends(source: Source, candidate: Candidate) -> Iterator[Requirement]:
    data = source.read(candidate, "metadata.json")
    about = metadata_file.parse(data if data is not None else b"{}", package=candidate.name, path_hint=candidate.variant)
    for depend in about.kernel_depends:
        yield Requirement(depend.name, version=depend.version, revision=depend.revision)


def fetch_all(source: Source, entry: Locked) -> list[str]:
    """Bring every build of a locked kernel into the hub's cache, compared with the lock; their names. `source` is one with the lock.

    Raises:
        Refused: the bytes are not those of the lock; also what finding and fetching raise.
    """
    candidates, _ = source.find(spec.parse(entry.asked))
    for candidate in candidates:
        with tempfile.TemporaryDirectory() as folder:
            source.fetch(candidate, Path(folder))
    return [candidate.variant for candidate in candidates]


def write_egg_lockfile(cmd: Any, basename: str, filename: str) -> None:
    """For setuptools (`egg_info.writers`): a lock of the project goes into the metadata of what is built of it.

    Args:
        cmd: the running `egg_info` command; its working directory is the project's.
        basename: `kernels.lock` or `kernelswap.lock`.
        filename: where the metadata has it.
    """
    lock = Path(basename)
    cmd.write_or_delete_file(basename, filename, lock.read_text(encoding="utf-8") if lock.is_file() else "")


# -- the ones before ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kept:
    """A lock that was replaced."""

    at: float
    """When, in seconds since 1970."""
    file: Path
    lock: Lock


def history(folder: Path, cache: Path) -> list[Kept]:
    """The locks that `write` replaced in `folder` on this machine, newest first. What does not parse any more is left out."""
    found: list[Kept] = []
    for file in sorted(_shelf(folder, cache).glob("*.lock"), reverse=True):
        try:
            found.append(Kept(int(file.stem) / 1e9, file, locks.parse(file.read_bytes(), what=str(file))))
        except (OSError, ValueError):  # noqa: PERF203  # fifty small files
            continue
    return found


def before(folder: Path, cache: Path, now: Lock) -> list[Kept]:
    """Of the history, what differs from `now`: newest first, and each once."""
    found: list[Kept] = []
    for kept in history(folder, cache):
        if kept.lock not in [now, *(other.lock for other in found)]:
            found.append(kept)
    return found


def _keep(lock: Lock, folder: Path, cache: Path) -> None:
    shelf = _shelf(folder, cache)
    try:
        shelf.mkdir(parents=True, exist_ok=True)
        temporary = shelf / f".{uuid.uuid4().hex}"
        temporary.write_text(lock.dumps(), encoding="utf-8")
        temporary.replace(shelf / f"{time.time_ns():020d}.lock")
        for old in sorted(shelf.glob("*.lock"))[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as e:
        raise StoreError(f"the lock before cannot be kept: {e.strerror or e}", asked=f"locking in {folder}") from e


def _shelf(folder: Path, cache: Path) -> Path:
    """Where the history of a directory is: by its real path, so that one directory has one."""
    return cache / "locks" / hashlib.sha256(os.path.realpath(folder).encode()).hexdigest()[:24]
