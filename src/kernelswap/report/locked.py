"""What a lock of the kernels in use says, and whether the lock that there is says the same. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .. import render
from ..lock import Lock, Locked
from ..types import Artifact


def locked(kernels: Iterable[Artifact], lock: Lock | None, file: str | None) -> dict[str, Any]:
    """`file`: where the lock is, or would be; `lock`: None where there is none.

    `matches` is null without a lock, and where the lock names the commit and has no digest to compare. What the kernels depend on counts, too.
    """
    rows, left, seen = [], list(kernels), set()
    while left:
        kernel = left.pop(0)
        left += kernel.depends
        key = kernel.digest, str(kernel.candidate.requirement)
        if key in seen:
            continue
        seen.add(key)
        found, wanted = kernel.candidate, kernel.candidate.requirement
        source = "dir" if found.source == "local" else wanted.source  # as `locking.of_artifacts` has it
        matches, says = (None, "") if lock is None else _compared(kernel, lock.find(found.name, wanted))
        rows.append(
            {
                "asked": Locked(found.name, "", source, wanted.version, wanted.revision, wanted.constraints).asked,
                "commit": found.commit,
                "variant": found.variant,
                "digest": kernel.digest,
                "matches": matches,
                "says": says,
            }
        )
    return {"file": file, "exists": lock is not None, "kernels": rows}


def _compared(kernel: Artifact, entry: Locked | None) -> tuple[bool | None, str]:
    if entry is None:
        return False, "the lock does not name it"
    if entry.commit != kernel.candidate.commit:
        return False, f"the lock has commit {render.short(entry.commit)}"
    build = entry.build(kernel.candidate.variant)
    if build is None:
        return None, "as in the lock, which has no digest of this build"
    if build.tree is None:
        return None, "as in the lock, whose old form has no digest to compare"
    return (True, "as in the lock") if build.tree == kernel.digest else (False, f"the lock has digest {build.tree}")
