"""`dir://`: a kernel repository in a folder, a folder of builds, or one build.

The commit of a candidate is `local-` and the digest of its files, so that an edited file is another candidate.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .. import spec
from ..errors import NoDirectory, UnknownKernel
from ..types import Candidate, Requirement
from .files import METADATA, Fingerprints, beside, check_copy, copy, is_variant, listing, read_small


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """Finds builds below the directory that the requirement names. Reads nothing but that directory."""

    key: str = "dir"
    _seen: Fingerprints = field(default_factory=Fingerprints, repr=False, compare=False)

    def find(self, requirement: Requirement) -> tuple[Sequence[Candidate], Sequence[str]]:
        """Builds in the folder itself, else in its `build/`, else the folder as one build. None, with a note, where there are only sources.

        A version (`@1`) is compared by `resolve` with what the metadata says. A revision must be a commit as given here.

        Raises:
            UnknownKernel: no such directory, nothing in it is a build, or it is not at that revision.
            Refused: a build has a link that leads out of the repository.
        """
        root = _absolute(requirement.name)
        if not root.is_dir():
            raise _missing(requirement, root)
        found = builds(root)
        if not found and (root / "build.toml").is_file():
            return (), (f"{root} has sources but no builds; `kernelswap build` compiles them",)
        if not found:
            raise UnknownKernel(
                f"{root} has no build: no build/<variant>/, no <variant>/, no {METADATA}",
                asked=f"looking for {requirement}",
                todo="name the directory of a kernel repository, or that of one build",
            )
        return candidates(requirement, self.key, str(root), found, root, self._seen), ()

    def read(self, candidate: Candidate, name: str) -> bytes | None:
        """One file of the build, or None.

        Raises:
            UnknownKernel: the build is gone.
        """
        file = self._files(candidate).get(name)
        return read_small(file) if file else None

    def fetch(self, candidate: Candidate, into: Path) -> None:
        """Copy the build.

        Raises:
            UnknownKernel: the build is gone, or changed since it was found.
            Refused: a link leads out of the repository.
        """
        copy(self._files(candidate), into)
        check_copy(into, candidate.commit, candidate.name)

    def _files(self, candidate: Candidate) -> dict[str, Path]:
        root = Path(candidate.name)
        at = builds(root).get(candidate.variant) if root.is_dir() else None
        if at is None:
            raise UnknownKernel(f"{root} has no build {candidate.variant} any more", asked=f"reading {candidate.requirement}")
        return listing(at, list(beside(root.resolve())))


def builds(root: Path) -> dict[str, Path]:
    """`{variant: directory}` of a repository, a folder of builds, or a build; empty when it is none of them."""
    for parent in (root, root / "build"):
        if not parent.is_dir():
            continue
        inside = {p.name: p.resolve() for p in sorted(parent.iterdir()) if p.is_dir() and is_variant(p.name)}
        if inside:
            return inside
    return {_name_of(root): root.resolve()} if (root / METADATA).is_file() else {}


def candidates(
    requirement: Requirement, key: str, name: str, found: dict[str, Path], root: Path, seen: Fingerprints
) -> tuple[Candidate, ...]:
    """One candidate per build, with the digest of its files for a commit, as far as the requirement allows them."""
    within = list(beside(root.resolve()))
    every = [Candidate(requirement, key, name, f"local-{seen.of(at, within)}", v) for v, at in found.items()]
    if requirement.revision is not None:
        fit = [c for c in every if c.commit == requirement.revision]
    elif requirement.constraints is not None:
        versions = {c: _version(found[c.variant]) for c in every}
        known = {f"v{v}" for v in versions.values() if v is not None}
        best = spec.matching(requirement.constraints, (), known)
        fit = [c for c in every if best is not None and f"v{versions[c]}" == best]
    else:
        return tuple(every)
    if not fit:
        here = sorted({c.commit for c in every} if requirement.revision else {f"version {_version(at)}" for at in found.values()})
        raise UnknownKernel(
            f"{name} has {', '.join(here)}",
            asked=f"looking for {requirement}",
            todo="a directory has no branches: leave the revision out, or name one of these",
        )
    return tuple(fit)


def stand_in(requirement: Requirement, path: Path) -> Requirement:
    """The requirement for a directory that stands in for `requirement`, whatever version that asked for."""
    return replace(requirement, name=str(path), source="dir", version=None, revision=None, constraints=None)


def _absolute(name: str) -> Path:
    return Path(name).expanduser().absolute()


def _missing(requirement: Requirement, root: Path) -> NoDirectory:
    near: Iterable[str] = ()
    if root.parent.is_dir():
        near = difflib.get_close_matches(root.name, [p.name for p in root.parent.iterdir() if p.is_dir()], n=1)
    hints = [f"did you mean {root.parent / name}?" for name in near]
    return NoDirectory(
        f"there is no directory {root}",
        asked=f"looking for {requirement}",
        todo=next(iter(hints), "name an existing directory; a relative one is seen from where the process runs"),
    )


def _metadata(build: Path) -> dict[str, object]:
    """What metadata.json holds, without judging it: `metadata.parse` does that, later and for the chosen build."""
    try:
        value = json.loads(read_small(build / METADATA))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _version(build: Path) -> int | None:
    version = _metadata(build).get("version")
    return version if isinstance(version, int) else None


def _name_of(build: Path) -> str:
    """The variant of a directory that is a build: its own name, else what its metadata says about the backend."""
    if is_variant(build.name):
        return build.name
    backend = _metadata(build).get("backend")
    kind = backend.get("type") if isinstance(backend, dict) else None
    name = f"torch-{'npu' if kind == 'cann' else kind}"
    return name if isinstance(kind, str) and is_variant(name) else "torch-universal"
