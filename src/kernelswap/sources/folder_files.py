"""The two small files of a folder of kernels: which names mean which commits, and what a commit holds. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import strict
from ..errors import BadMetadata
from ..types import Requirement
from .hub_cache import Refs
from .hub_index import choose

FORMAT = 1
REFS = "refs.json"
MOST_REFS, MOST_LISTING = 4 << 20, 16 << 20
"""Bytes that are read of each."""
MOST_FILES, MOST_BYTES = 20_000, 8 << 30
"""As for a hub."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}|local-[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Names:
    """`refs.json` of a repository."""

    refs: Refs = field(default_factory=Refs)
    asked: Mapping[str, str] = field(default_factory=dict)
    """What stands after the `@` of a spec, or nothing, and the commit that it stood for when the folder was written."""
    moved: str | None = None
    """The repository that this one redirects to; it is in the same folder."""

    def commit(self, requirement: Requirement) -> str | None:
        """The commit that a requirement means."""
        at = after_at(requirement)
        if at in self.asked:
            return self.asked[at]
        ref = choose(requirement, self.refs)
        if ref is not None:
            return self.refs.commit(ref)
        return requirement.revision if requirement.revision and COMMIT.fullmatch(requirement.revision) else None


Files = Mapping[str, tuple[int, str]]
"""Path in the repository -> size and sha256 (hex)."""


def after_at(requirement: Requirement) -> str:
    """What stands after the `@` of a spec; empty where there is none."""
    found = (requirement.version, requirement.revision, requirement.constraints)
    return next((str(v) for v in found if v is not None), "")


def parse_names(data: bytes) -> Names:
    """`refs.json`.

    Raises:
        BadMetadata: it does not parse.
    """
    value = _object(data, "the names of commits", MOST_REFS)
    moved = value.get("moved")
    found = {key: value.get(key, {}) for key in ("branches", "tags", "asked")}
    wrong = [
        f"{key}: {strict.quote(name)} does not name a commit"
        for key, names in found.items()
        for name, commit in (names.items() if isinstance(names, dict) else [("?", None)])
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit)
    ]
    if moved is not None and not is_name(moved):
        wrong.append(f"moved: {strict.quote(moved)} is no repository")
    strict.fail(wrong, what="the names of commits")
    return Names(Refs(found["branches"], found["tags"]), found["asked"], moved)


def parse_files(data: bytes) -> Files:
    """`<commit>.json`.

    Raises:
        BadMetadata: it does not parse, or lists more than any honest build has.
    """
    files = _object(data, "the files of a commit", MOST_LISTING).get("files")
    if not isinstance(files, dict) or len(files) > MOST_FILES:
        raise BadMetadata(f"no list of at most {MOST_FILES} files", asked="the files of a commit")
    found: dict[str, tuple[int, str]] = {}
    wrong = []
    for path, entry in files.items():
        why = strict.path_problem(path)
        if why is None and not (
            isinstance(entry, list)
            and len(entry) == 2
            and type(entry[0]) is int
            and 0 <= entry[0] <= MOST_BYTES
            and isinstance(entry[1], str)
            and _SHA256.fullmatch(entry[1])
        ):
            why = "has no size and sha256"
        if why is not None:
            wrong.append(f"{strict.quote(path)} {why}")
        else:
            found[path] = (entry[0], entry[1])
    strict.fail(wrong, what="the files of a commit")
    return found


def is_name(name: object) -> bool:
    """Whether it is `org/name`, and so a path that stays inside the folder."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and ".." not in name


def _object(data: bytes, what: str, most: int) -> dict[str, Any]:
    value = strict.loads(data, what=what, max_bytes=most)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise BadMetadata(f"not of format {FORMAT}", asked=what)
    return value
