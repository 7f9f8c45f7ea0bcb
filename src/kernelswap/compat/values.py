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
    archs: tuple[str, ...] = ()


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
    python_depends: tuple[str, ...] = ()
    kernel_depends: tuple[types.Dependency, ...] = ()
    digest: types.Digest | None = None
    provenance: types.Provenance | None = None

    @classmethod
    def of(cls, found: types.Metadata) -> Metadata:
        """From the value that the rest of kernelswap uses."""
        return cls(
            id=found.id,
            name=found.name,
            version=found.version,
            license=found.license,
            backend=Backend(found.backend, found.archs),
            kernels_minver=".".join(map(str, found.minver)) if found.minver is not None else None,
            upstream=found.upstream,
            source=found.source,
            python_depends=found.python_depends,
            kernel_depends=found.kernel_depends,
            digest=found.digest,
            provenance=found.provenance,
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
