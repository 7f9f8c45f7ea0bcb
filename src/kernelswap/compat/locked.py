"""Kernels at the commits that a lock states: from a file, or from the metadata of the distribution that asks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from .. import loader
from .. import lock as locks
from ..errors import Refused
from ..lock import Lock, Locked
from ..provider import Terms
from ..sources.pinned import check_old
from ..types import Artifact, Source
from . import state
from .loading import Trust, _device, _trust, spec_of

FILES = ("kernelswap.lock", "kernels.lock")
"""In a distribution's metadata, the first of them that is there."""
Lockfile = str | os.PathLike[str] | None


def load_kernel(
    repo_id: str,
    lockfile: Lockfile = None,
    backend: str | None = None,
    *,
    revision: str | None = None,
) -> ModuleType:
    """A locked kernel, from the cache alone.

    Args:
        repo_id: `org/repo`.
        lockfile: `kernels.lock` of either format, or `kernelswap.lock`; default: in the metadata of the calling package.
        backend: see `get_kernel`.
        revision: without a lockfile, what to load instead of what a lock says; of releases 0.15 and 0.16.

    Raises:
        ValueError: there is no lock, it does not parse, or it does not name the kernel.
        FileNotFoundError: the kernel is not in the cache.
    """
    if revision is not None and lockfile is None:
        swapper = state.varied(offline=True)
        return swapper.kernel(spec_of(repo_id, revision, None), device=_device(swapper, backend)).module
    return _load(repo_id, read(lockfile), backend=backend, offline=True, trust=False)


def get_locked_kernel(
    repo_id: str,
    local_files_only: bool = False,  # noqa: FBT001, FBT002  # positional in the reference up to 0.16
    *,
    lockfile: Lockfile = None,
    backend: str | None = None,
    trust_remote_code: Trust = False,
    user_agent: Any = None,  # noqa: ARG001  # see loading.py
) -> ModuleType:
    """As `load_kernel`, and fetched where it is not in the cache, unless `local_files_only`."""
    return _load(repo_id, read(lockfile), backend=backend, offline=local_files_only, trust=trust_remote_code)


def _load(repo_id: str, lock: Lock, *, backend: str | None, offline: bool, trust: Trust) -> ModuleType:
    entry = locked(lock, repo_id)
    swapper = state.varied(offline=offline, lock=lock)
    artifact = swapper.artifact(entry.asked, device=_device(swapper, backend), terms=Terms(trust=_trust(trust)))
    compare(entry, artifact, swapper.sources["hub"])
    return loader.load(artifact, reverify=swapper.store.reverify).module


def compare(entry: Locked, artifact: Artifact, source: Source) -> None:
    """What was in the store before the lock was read is compared with it, too.

    Raises:
        Refused: the lock pins other bytes.
    """
    build = entry.build(artifact.candidate.variant)
    if build is not None:
        check_old(source, artifact.candidate, build)
    if build is not None and build.tree is not None and build.tree != artifact.digest:
        raise Refused(
            f"the lock states the tree {build.tree}, this is {artifact.digest}",
            asked=f"loading {entry.asked} ({artifact.candidate.variant}) as locked",
            todo="If the change is meant, write the lock anew; otherwise somebody changed what was published.",
        )


def locked(lock: Lock, repo_id: str) -> Locked:
    """The entry for a repository.

    Raises:
        ValueError: there is none.
    """
    entry = lock.find(repo_id)
    if entry is None:
        names = ", ".join(sorted({e.name for e in lock.entries})) or "no kernel"
        raise ValueError(f"Kernel `{repo_id}` is not locked. The lock has {names}; add it with `kernelswap lock`.")
    return entry


def read(lockfile: Lockfile) -> Lock:
    """The lock in a file, or that of the calling package.

    Raises:
        ValueError: there is none, or it does not parse.
        FileNotFoundError: there is no such file.
    """
    if lockfile is not None:
        return locks.parse(Path(lockfile).read_bytes(), what=str(lockfile))
    caller = _caller()
    for distribution in _owners(caller):
        for name in FILES:
            text = distribution.read_text(name)
            if text is not None:
                return locks.parse(text, what=f"{name} of {distribution.metadata['Name']}")
    raise ValueError(
        f"Could not find a `kernels.lock` file in the caller's package metadata. The caller is {caller}; "
        "`kernelswap lock` writes one, or name a file with `lockfile=`."
    )


def _caller() -> str:
    """The module that called into `kernels`: the first that is not ours."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001  # `inspect.stack` reads source files
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] not in {"kernelswap", "kernels"}:
            return name
        frame = frame.f_back
    return "nobody"


def _owners(module: str) -> Iterator[importlib.metadata.Distribution]:
    """The distributions that a module may be of: the one of its name, then those that say they contain it."""
    top = module.partition(".")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
        yield importlib.metadata.distribution(top)
    for name in dict.fromkeys(importlib.metadata.packages_distributions().get(top, ())):
        yield importlib.metadata.distribution(name)
