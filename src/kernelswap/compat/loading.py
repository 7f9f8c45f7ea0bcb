"""`get_kernel` and its like: arguments of `kernels` to specs and terms of a Swapper.

Arguments that were positional in some release may be positional, in that order. `user_agent` is taken and not sent: nothing about
the caller leaves the machine. Where neither version nor revision is given, it is the newest version, as up to release 0.14.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .. import loader
from ..errors import KernelSwapError, SpecError, Tampered
from ..lock import LockedBuild
from ..provider import Terms
from ..sources.pinned import check_old
from ..types import Artifact, Requirement
from . import state
from .values import LoadedKernel, Metadata, RepoInfo, VariantAccepted, VariantName, VariantRejected

if TYPE_CHECKING:
    from ..api import Swapper

log = logging.getLogger("kernelswap.kernels")
Trust = bool | str | Sequence[str]
_BACKENDS = {"mps": "metal", "npu": "cann"}
BACKENDS = {None, "cpu", "cuda", "rocm", "metal", "mps", "xpu", "npu", "cann", "neuron", "tpu"}


def get_kernel(  # the reference's
    repo_id: str,
    revision: str | None = None,
    version: int | str | None = None,
    backend: str | None = None,
    user_agent: Any = None,  # noqa: ARG001  # see the file's docstring
    trust_remote_code: Trust = False,  # noqa: FBT002  # positional in the reference up to 0.16
    check_arch: bool = True,  # noqa: FBT001, FBT002  # same
) -> ModuleType:
    """Fetch, verify and import a kernel of the hub.

    Args:
        repo_id: `org/repo`; also `kernelswap/NAME`, a bundled one.
        revision: branch, tag or commit.
        version: API version N, which is branch `vN`; or PEP 440 constraints. Not together with `revision`.
        backend: `cpu`, or the backend of the installed torch; default: the best that fits.
        user_agent: ignored.
        trust_remote_code: vouch for the publisher: True, or a list of `org` and `org/repo`.
        check_arch: refuse builds whose code is not for the visible devices.

    Raises:
        ValueError: version and revision together, a repository or version that does not exist, a publisher that nobody vouches
            for, an unknown backend, metadata that does not parse.
        FileNotFoundError: no build fits, or offline and not in the cache.
        ImportError: a Python package is missing, or the kernel's code raised, which is the cause.
    """
    swapper = state.varied(check_arch=check_arch)
    text, device = spec_of(repo_id, revision, version), _device(swapper, backend)
    return swapper.kernel(text, device=device, terms=Terms(trust=_trust(trust_remote_code))).module


def get_local_kernel(
    repo_path: str | os.PathLike[str],
    backend: str | None = None,
    *,
    package_name: str | None = None,  # noqa: ARG001  # of releases before 0.14; the metadata says it
    trust_remote_code: Trust = False,
    user_agent: Any = None,  # noqa: ARG001  # see the file's docstring
) -> ModuleType:
    """Import a kernel from a directory: a repository, its `build`, or one build. Text and `Path` will do.

    Releases before 0.14 had the name of the package in second place; it is understood there.

    Raises:
        ValueError: no such directory, or nothing in it is a build.
        FileNotFoundError: no build fits.
    """
    swapper = state.swapper()
    terms = Terms(trust=_trust(trust_remote_code))
    if backend not in BACKENDS:
        name = swapper.artifact(local_spec(repo_path), terms=terms).metadata.name
        backend = None if backend == name.replace("-", "_") else backend
    return swapper.kernel(local_spec(repo_path), device=_device(swapper, backend), terms=terms).module


def has_kernel(
    repo_id: str,
    revision: str | None = None,
    version: int | str | None = None,
    backend: str | None = None,
    check_arch: bool = True,  # noqa: FBT001, FBT002  # positional in 0.16
    *,
    trust_remote_code: Trust = False,  # noqa: ARG001  # asked when it is loaded
) -> bool:
    """Whether there is a build for this machine. What cannot be found, for whatever reason, is not there: that is False.

    Raises:
        ValueError: the question makes no sense (version and revision together, a malformed name, an unknown backend).
    """
    swapper = state.varied(check_arch=check_arch)
    text, device = spec_of(repo_id, revision, version), _device(swapper, backend)
    try:
        return swapper.find(text, device=device).chosen is not None
    except (SpecError, Tampered):
        raise
    except KernelSwapError as e:
        log.info("has_kernel(%r): no: %s", repo_id, e.reason)
        return False


def install_kernel(  # noqa: PLR0913  # the reference's, of every release
    repo_id: str,
    revision: str | None = None,
    local_files_only: bool = False,  # noqa: FBT001, FBT002  # positional up to 0.12
    variant_locks: Mapping[str, Any] | None = None,
    user_agent: Any = None,  # noqa: ARG001  # see the file's docstring
    *,
    version: int | str | None = None,
    backend: str | None = None,
    validate_dependencies: bool = True,  # noqa: ARG001  # of 0.16; what does not resolve is an error always
    trust_remote_code: Trust = False,
) -> Path:
    """Fetch and verify a kernel and what it depends on, without importing it; the directory of the build.

    `variant_locks`, of releases up to 0.16, is `{build: an object with .hash}`, as in locks of that time.

    Raises:
        As `get_kernel`, except for what an import may raise. ValueError: the build is not the one of `variant_locks`.
    """
    swapper = state.varied(offline=local_files_only)
    text, device = spec_of(repo_id, revision, version), _device(swapper, backend)
    artifact = swapper.artifact(text, device=device, terms=Terms(trust=_trust(trust_remote_code)))
    if variant_locks is not None:
        variant = artifact.candidate.variant
        if variant not in variant_locks:
            raise ValueError(f"`variant_locks` has no {variant}; it has {', '.join(sorted(variant_locks)) or 'nothing'}")
        pinned = str(getattr(variant_locks[variant], "hash", "")).removeprefix("sha256-")
        check_old(swapper.sources["hub"], artifact.candidate, LockedBuild(variant, git_lfs_concat=pinned))
    return artifact.path


def get_kernel_variants(
    repo_id: str, revision: str | None = None, version: int | str | None = None, backend: str | None = None
) -> list[VariantAccepted | VariantRejected]:
    """Every build, best first, those that do not fit last and with the reason.

    Raises:
        As `get_kernel`, for what cannot be found; no build that fits is no error here.
    """
    swapper = state.swapper()
    found = swapper.find(spec_of(repo_id, revision, version), device=_device(swapper, backend))
    return [
        VariantAccepted(VariantName(j.candidate.variant))
        if j.rejected is None
        else VariantRejected(VariantName(j.candidate.variant), j.rejected)
        for j in found.judged
    ]


def get_loaded_kernels() -> list[LoadedKernel]:
    """Every kernel that this process has imported, in order."""
    return [LoadedKernel(Metadata.of(k.artifact.metadata), k.module, _origin(k.artifact)) for k in loader.loaded()]


def get_kernel_dep(repo_id: str) -> ModuleType:
    """A kernel that the one being imported depends on.

    Raises:
        RuntimeError: nothing is being imported here, or it does not declare `repo_id`.
    """
    return loader.dependency(repo_id)


# -- arguments ----------------------------------------------------------------------------------------------------------


def spec_of(repo_id: str, revision: str | None, version: int | str | None, layer: str | None = None) -> str:
    """The spec for what `kernels` says in arguments.

    Raises:
        ValueError: version and revision together, or a revision that would be read as a version.
    """
    if revision is not None and version is not None:
        raise ValueError("Only one of `revision` or `version` must be specified.")
    if revision is not None and revision.isdigit() and len(revision) < 40:  # a commit's digits
        raise ValueError(f"revision={revision!r} is a number; a version is asked for by version={revision}")
    at = revision if revision is not None else version
    if isinstance(version, str) and version.isdigit():
        at = int(version)
    return f"{repo_id}" + (f"@{at}" if at is not None else "") + (f":{layer}" if layer else "")


def local_spec(path: str | os.PathLike[str], layer: str | None = None) -> str:
    """The spec for a directory, absolute: one directory is one kernel, however it is written."""
    return str(Requirement(str(Path(path).expanduser().absolute()), source="dir", layer=layer))


def trusted(trust: Trust, repo_id: str) -> list[str]:
    """The publishers that `trust` vouches for, as a list: True is the repository itself."""
    found = _trust(trust)
    return ([repo_id] if found else []) if isinstance(found, bool) else list(found)


def _trust(trust: Trust) -> bool | Sequence[str]:
    return [trust] if isinstance(trust, str) else trust


def _device(swapper: Swapper, backend: str | None) -> str | None:
    """The Swapper's word for a backend.

    Raises:
        ValueError: this machine has no such backend.
    """
    if backend is None or backend == "cpu":
        return backend
    here = swapper.machine.backend
    if _BACKENDS.get(backend, backend) != here:
        supported = ", ".join(sorted({"cpu", here}))
        raise ValueError(f"Invalid backend '{backend}', system supported backends: {supported}")
    return None


def _origin(artifact: Artifact) -> RepoInfo | None:
    found = artifact.candidate
    return RepoInfo(found.name, found.commit) if found.source == "hub" else None
