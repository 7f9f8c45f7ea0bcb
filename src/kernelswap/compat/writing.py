"""Make a lock: what a project asks for, at which commits, and which bytes every build of them has."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .. import lock as locks
from .. import metadata as metadata_file
from .. import spec, tree
from ..errors import TableError, UnknownKernel
from ..lock import Lock, Locked, LockedBuild
from ..types import Candidate, Outcome, Progress, Requirement, Source, Swap

if TYPE_CHECKING:
    from ..api import Swapper

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OURS, THEIRS = "kernelswap.lock", "kernels.lock"


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
        raise TableError(f"there is no {file}", todo="Name the directory of a project.") from e
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


def make(
    swapper: Swapper, wanted: Iterable[Requirement], *, former: Lock | None = None, progress: Progress | None = None
) -> Lock:
    """A lock of `wanted` and of what every build of them depends on, with the digest of every file of every build.

    What `former` locks for the same spec stays at its commit; without it, everything is looked up anew. Every build is fetched
    once for its digests; none is imported.

    Raises:
        UnknownKernel, Unreachable, NotCached: something cannot be found or fetched.
        Refused: a build has paths that do not stay inside it.
    """
    source, made, left = swapper.sources["hub"], Lock(), list(wanted)
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
    made = former or Lock()
    for outcome in outcomes:
        for choice in (outcome.inference, outcome.training) if isinstance(outcome, Swap) else ():
            left = [choice.implementation.origin] if choice.implementation is not None else []
            while left:
                artifact = left.pop()
                left += artifact.depends
                found, asked_for = artifact.candidate, artifact.candidate.requirement
                build = LockedBuild(found.variant, tree=artifact.digest, files=tuple(tree.hashes(artifact.path).items()))
                made = made.with_entry(
                    Locked(
                        found.name,
                        found.commit,
                        asked_for.source,
                        asked_for.version,
                        asked_for.revision,
                        asked_for.constraints,
                        (build,),
                    )
                )
    return made


def write(lock: Lock, folder: Path, *, theirs: bool = True) -> list[Path]:
    """`kernelswap.lock` with the digests, and with `theirs` `kernels.lock` for other loaders, in `folder`."""
    texts = {**({THEIRS: lock.dumps_kernels()} if theirs else {}), OURS: lock.dumps()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def former(folder: Path) -> Lock | None:
    """The lock that is in a folder, ours first, in any format; `None` where there is none.

    Raises:
        BadMetadata: it does not parse.
    """
    for name in (OURS, THEIRS):
        if (folder / name).is_file():
            return locks.parse((folder / name).read_bytes(), what=str(folder / name))
    return None


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


def fetch_all(swapper: Swapper, entry: Locked) -> list[str]:
    """Bring every build of a locked kernel into the hub's cache, compared with the lock; their names. `swapper` is one with the lock.

    Raises:
        Refused: the bytes are not those of the lock; also what finding and fetching raise.
    """
    source = swapper.sources["hub"]
    candidates, _ = source.find(spec.parse(entry.asked))
    for candidate in candidates:
        with tempfile.TemporaryDirectory() as folder:
            source.fetch(candidate, Path(folder))
    return [candidate.variant for candidate in candidates]
