"""The values that `kernels` hands out, with its names for their parts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from .. import metadata as metadata_file
from .. import types
from ..variant import Variant


@dataclass(frozen=True)
class RepoInfo:
    """Where a kernel came from on the hub; `revision` is the commit."""

    repo_id: str
    revision: str


@dataclass(frozen=True)
class Backend:
    """`metadata.backend`."""

    backend_type: str
    archs: list[str] | None = None


@dataclass(frozen=True)
class KernelDependency:
    """One of `metadata.kernel_depends`: a repository at a version or a revision."""

    repo_id: str
    version: int | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Digest:
    """`metadata.digest`: `{path: base64 of its hash}`."""

    algorithm: str
    files: dict[str, str]


@dataclass(frozen=True)
class GitStatus:
    """A commit, and whether files were changed since."""

    commit: str | None
    dirty: bool | None


@dataclass(frozen=True)
class KernelBuilderVersion:
    """What built it."""

    version: str
    git: GitStatus | None = None


@dataclass(frozen=True)
class Provenance:
    """`metadata.provenance`: the builder, and the sources."""

    kernel_builder: KernelBuilderVersion
    kernel: GitStatus | None = None

    @classmethod
    def of(cls, found: types.Provenance) -> Provenance:
        """From the value that the rest of kernelswap uses."""
        builder = GitStatus(found.builder_commit, found.builder_dirty) if found.builder_commit is not None else None
        kernel = GitStatus(found.commit, found.dirty) if found.commit is not None else None
        return cls(KernelBuilderVersion(found.builder_version, builder), kernel)


@dataclass(frozen=True)
class Metadata:
    """`metadata.json` of a build."""

    id: str
    name: str
    version: int
    license: str
    backend: Backend
    kernels_minver: str | None = None
    upstream: str | None = None
    source: str | None = None
    python_depends: list[str] = field(default_factory=list)
    kernel_depends: list[KernelDependency] = field(default_factory=list)
    digest: Digest | None = None
    provenance: Provenance | None = None

    @classmethod
    def of(cls, found: types.Metadata) -> Metadata:
        """From the value that the rest of kernelswap uses."""
        return cls(
            id=found.id,
            name=found.name,
            version=found.version,
            license=found.license,
            backend=Backend(found.backend, list(found.archs) or None),
            kernels_minver=".".join(map(str, found.minver)) if found.minver is not None else None,
            upstream=found.upstream,
            source=found.source,
            python_depends=list(found.python_depends),
            kernel_depends=[KernelDependency(d.name, d.version, d.revision) for d in found.kernel_depends],
            digest=Digest(found.digest.algorithm, dict(found.digest.files)) if found.digest is not None else None,
            provenance=Provenance.of(found.provenance) if found.provenance is not None else None,
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Metadata:
        """Read the file's content.

        Raises:
            BadMetadata: a ValueError; every problem at once.
        """
        return cls.of(metadata_file.parse(data))

    @classmethod
    def read_from_file(cls, path: str | os.PathLike[str]) -> Metadata:
        """Read the file.

        Raises:
            OSError: it cannot be read.
            BadMetadata: as `from_bytes`.
        """
        return cls.from_bytes(Path(path).read_bytes())


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that this process has imported; `repo_info` is `None` for one that is not from the hub."""

    metadata: Metadata
    module: ModuleType = field(repr=False)
    repo_info: RepoInfo | None = None


@dataclass(frozen=True)
class VariantName:
    """A build, by its name."""

    variant_str: str
    parsed: Variant | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        return self.variant_str


@dataclass(frozen=True)
class VariantAccepted:
    """A build that would run here."""

    variant: VariantName


@dataclass(frozen=True)
class VariantRejected:
    """A build that would not, and why."""

    variant: VariantName
    reason: str
