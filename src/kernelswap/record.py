"""What the store writes down about an artifact, to JSON and back. Pure; whatever does not read back raises `ValueError`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from .types import Artifact, Candidate, Dependency, Digest, Evidence, Metadata, Provenance, Requirement

FORMAT = 1


def key(candidate: Candidate) -> str:
    """The name of its record: the same for every spelling of the requirement that leads to it."""
    return hashlib.sha256(json.dumps(_named(candidate), sort_keys=True).encode()).hexdigest()[:40]


def dump(artifact: Artifact) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        "format": FORMAT,
        **_candidate(artifact.candidate),
        "digest": artifact.digest,
        # Of a build that says everything itself nothing is copied: two copies could disagree.
        "metadata": asdict(artifact.metadata) if artifact.metadata.synthesised else None,
        "evidence": [[e.verifier, e.statement] for e in artifact.evidence],
        "depends": [_candidate(below.candidate) for below in artifact.depends],
    }


def digest(value: Mapping[str, Any], candidate: Candidate) -> str:
    """The digest in a record, which must be the record of `candidate`."""
    found = value.get("digest")
    if value.get("format") != FORMAT or value.get("candidate") != _named(candidate) or not is_digest(found):
        raise ValueError("not a record of this candidate")
    return str(found)


def candidate(value: Mapping[str, Any]) -> Candidate:
    """Whose record it is."""
    names, asked = value.get("candidate"), value.get("requirement")
    if not isinstance(names, dict) or set(names) != _NAMED or not all(isinstance(v, str) for v in names.values()):
        raise ValueError("no candidate")
    if not isinstance(asked, dict) or not set(asked) <= _ASKED or not isinstance(asked.get("name"), str):
        raise ValueError("no requirement")
    return Candidate(requirement=Requirement(**asked), **names)


def depends(value: Mapping[str, Any]) -> tuple[Candidate, ...]:
    """The candidates it depends on, in their order."""
    found = value.get("depends")
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError("no list of dependencies")
    return tuple(candidate(entry) for entry in found)


def evidence(value: Mapping[str, Any]) -> tuple[Evidence, ...]:
    """What the verifiers saw."""
    found = value.get("evidence")
    if not isinstance(found, list) or not all(isinstance(e, list) and len(e) == 2 for e in found):
        raise ValueError("no evidence")
    return tuple(Evidence(str(verifier), str(statement)) for verifier, statement in found)


def metadata(value: Mapping[str, Any]) -> Metadata | None:
    """Of a build whose own file does not say everything; `None` where it does."""
    found = value.get("metadata")
    if found is None:
        return None
    if not isinstance(found, dict) or set(found) != {f.name for f in fields(Metadata)}:
        raise ValueError("no metadata")
    try:
        read: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        read["kernel_depends"] = tuple(Dependency(**entry) for entry in found["kernel_depends"])
        if found["digest"] is not None:
            listed = tuple((str(path), str(content)) for path, content in found["digest"]["files"])
            read["digest"] = Digest(str(found["digest"]["algorithm"]), listed)
        if found["provenance"] is not None:
            read["provenance"] = Provenance(**found["provenance"])
    except (KeyError, TypeError) as e:
        raise ValueError("no metadata") from e
    if not str(read["id"]).isidentifier() or not read["synthesised"]:
        raise ValueError("no metadata")
    return Metadata(**read)


def is_digest(name: object) -> bool:
    """Whether `name` is the hex sha256 that names an artifact, and so names no path."""
    return isinstance(name, str) and len(name) == 64 and not set(name) - set("0123456789abcdef")


_NAMED = {"source", "name", "commit", "variant"}
_ASKED = {f.name for f in fields(Requirement)}


def _named(candidate: Candidate) -> dict[str, str]:
    return {"source": candidate.source, "name": candidate.name, "commit": candidate.commit, "variant": candidate.variant}


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {"candidate": _named(candidate), "requirement": asdict(candidate.requirement)}
