"""`kernels.lockfile`, which releases up to 0.16 had: entries of the locks of that time, as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import lock


@dataclass(frozen=True)
class VariantLock:
    """What is pinned of one build."""

    hash: str
    hash_type: str = "git_lfs_concat"


@dataclass(frozen=True)
class KernelLock:
    """One entry: a repository at a commit, and its builds. `install_kernel(variant_locks=entry.variants)` compares them."""

    repo_id: str
    sha: str
    variants: dict[str, VariantLock]

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> KernelLock:
        """From an entry of `kernels.lock`, parsed.

        Raises:
            BadMetadata: a ValueError; every problem at once.
        """
        read = lock.parse(json.dumps([dict(entry)]), what="an entry of kernels.lock").entries[0]
        builds = {b.variant: VariantLock(f"sha256-{b.git_lfs_concat}") for b in read.builds}
        return cls(read.name, read.commit, builds)
