"""A bill of materials (CycloneDX 1.6) of the kernels that serve a model: outcomes to plain JSON values. Pure.

    json.dumps(sbom.bill(applied.outcomes, model="Qwen/Qwen3-0.6B"), indent=2)

One component per kernel, with its licence, its files and their digests, what the verifiers saw, and the places in the
model that it serves; `dependencies` says what needs what. Equal outcomes give equal bytes: nothing in it is random, and
the time is in it only when given.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterable
from typing import Any

from ._version import __version__
from .types import Artifact, Outcome, Swap

SPEC_VERSION = "1.6"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://cyclonedx.org/schema/bom-1.6/kernelswap")
_HASHES = {"sha256": "SHA-256", "sha512": "SHA-512"}
# What kernels state as their licence, as SPDX spells it; anything else goes by its name.
_SPDX = {
    name.lower(): name
    for name in (
        "0BSD", "AFL-3.0", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "Artistic-2.0", "BSD-2-Clause", "BSD-3-Clause",
        "BSD-3-Clause-Clear", "BSL-1.0", "CC-BY-4.0", "CC-BY-NC-4.0", "CC-BY-SA-4.0", "CC0-1.0", "ECL-2.0", "EPL-2.0", "EUPL-1.2",
        "GPL-2.0-only", "GPL-2.0-or-later", "GPL-3.0-only", "GPL-3.0-or-later", "ISC", "LGPL-2.1-only", "LGPL-2.1-or-later",
        "LGPL-3.0-only", "LGPL-3.0-or-later", "MIT", "MPL-2.0", "MS-PL", "NCSA", "OSL-3.0", "PostgreSQL", "Unlicense", "WTFPL", "Zlib",
    )
}  # fmt: skip  # one glance is enough for a list of names


def bill(outcomes: Iterable[Outcome], *, model: str = "model", time: str | None = None) -> dict[str, Any]:
    """The kernels of `outcomes` that serve a site in any mode, and what they depend on.

    Args:
        outcomes: `Applied.outcomes` for what is active now; those of a plan for what would be.
        model: what the model is called.
        time: when, as `2026-01-31T12:00:00Z`; left out, the bill does not say.
    """
    sites = _sites(outcomes)
    kernels = _with_depends(artifact for artifact, _ in sites.values())
    components = [_component(kernels[d], sites[d][1] if d in sites else ()) for d in sorted(kernels)]
    depends = [{"ref": "model", "dependsOn": [_ref(d) for d in sorted(sites)]}]
    depends += [{"ref": _ref(d), "dependsOn": sorted({_ref(b.digest) for b in kernels[d].depends})} for d in sorted(kernels)]
    identity = "\n".join([model, time or "", *(f"{d} {name} {mode}" for d in sorted(sites) for name, _, mode in sites[d][1])])
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "serialNumber": f"urn:uuid:{uuid.uuid5(_SPACE, identity)}",
        "version": 1,
        "metadata": {
            **({"timestamp": time} if time is not None else {}),
            "tools": {"components": [{"type": "application", "name": "kernelswap", "version": __version__}]},
            "component": {"type": "machine-learning-model", "bom-ref": "model", "name": model},
        },
        "components": components,
        "dependencies": depends,
    }


Sites = dict[str, tuple[Artifact, list[tuple[str, str, str]]]]
"""By digest: the artifact, and (path, layer, modes) of each site that it serves."""


def _sites(outcomes: Iterable[Outcome]) -> Sites:
    found: Sites = {}
    for swap in outcomes:
        if isinstance(swap, Swap):
            serving: dict[tuple[str, str], tuple[Artifact, list[str]]] = {}
            for mode, choice in (("inference", swap.inference), ("training", swap.training)):
                for kernel in choice.implementation.kernels if choice.implementation is not None else ():
                    serving.setdefault((kernel.origin.digest, kernel.layer), (kernel.origin, []))[1].append(mode)
            for (digest, layer), (origin, modes) in serving.items():
                found.setdefault(digest, (origin, []))[1].append((swap.site.path, layer, " and ".join(modes)))
    return {digest: (origin, sorted(where)) for digest, (origin, where) in found.items()}


def _with_depends(artifacts: Iterable[Artifact]) -> dict[str, Artifact]:
    found: dict[str, Artifact] = {}
    todo = list(artifacts)
    while todo:
        artifact = todo.pop()
        if artifact.digest not in found:
            found[artifact.digest] = artifact
            todo.extend(artifact.depends)
    return found


def _ref(digest: str) -> str:
    return f"kernel:{digest}"


def _component(artifact: Artifact, sites: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    c, metadata = artifact.candidate, artifact.metadata
    org, slash, name = c.name.rpartition("/") if c.source == "hub" else ("", "", metadata.name)
    component: dict[str, Any] = {"type": "library", "bom-ref": _ref(artifact.digest)}
    if slash:
        component["group"] = org
    component |= {"name": name, "version": c.commit, "hashes": [{"alg": "SHA-256", "content": artifact.digest}]}
    if "license" not in metadata.synthesised:
        spdx = _SPDX.get(metadata.license.lower())
        component["licenses"] = [{"license": {"id": spdx} if spdx else {"name": metadata.license}}]
    if c.source == "hub":
        component["purl"] = f"pkg:huggingface/{c.name}@{c.commit}"
    references = [("vcs", metadata.source), ("website", metadata.upstream)]
    if linked := [{"type": kind, "url": url} for kind, url in references if url and _is_url(url)]:
        component["externalReferences"] = linked
    if metadata.digest is not None and metadata.digest.algorithm in _HASHES:
        alg = _HASHES[metadata.digest.algorithm]
        component["components"] = [
            {"type": "file", "name": path, "hashes": [{"alg": alg, "content": base64.b64decode(raw).hex()}]}
            for path, raw in sorted(metadata.digest.files)
        ]
    if where := [{"location": path or ".", "symbol": layer, "additionalContext": modes} for path, layer, modes in sites]:
        component["evidence"] = {"occurrences": where}
    component["properties"] = [
        {"name": f"kernelswap:{key}", "value": value}
        for key, value in (
            ("hash", "sha256 over the names and the sha256 of all files"),
            ("spec", str(c.requirement)),
            ("source", c.source),
            ("variant", c.variant),
            ("id", metadata.id),
            *(("python-depends", package) for package in metadata.python_depends),
            *((f"evidence:{e.verifier}", e.statement) for e in artifact.evidence),
        )
    ]
    return component


def _is_url(text: str) -> bool:
    return text.startswith("https://") and text.isascii() and text.isprintable() and not set(text) & set(' "<>\\^`{|}')
