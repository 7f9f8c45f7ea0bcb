"""`kernelswap load`: fetch, verify and import a kernel, and say what it offers."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Annotated, Any

import typer

from ... import layers as contract
from ...spec import parse
from .. import session
from ..output import Answer, plain

PANEL = "Kernels"


def command(
    spec: Annotated[str, typer.Argument(help="[source://]name[@version][:Layer]", metavar="SPEC")],
    cache: session.Cache = None,
    offline: session.Offline = False,
    bundle: session.Bundle = None,
) -> Answer:
    """Fetch, verify and import a kernel; list its public names, its layers, and what it was verified by. A layer must be there.

    Its code is run by the import, after it was verified.
    """
    kernel = session.swapper(cache=cache, offline=offline, bundle=bundle).kernel(spec)
    layer = parse(spec).layer
    if layer is not None and layer not in contract.offers(kernel):
        contract.implementation(kernel, layer)  # says which there are
    artifact, metadata = kernel.artifact, kernel.artifact.metadata
    names = {name: _describe(value) for name, value in _public(kernel.module)}
    layers = {name: _describe(value) for name, value in _public(getattr(kernel.module, "layers", None))}
    evidence = [{"verifier": e.verifier, "statement": e.statement} for e in artifact.evidence]
    data: dict[str, Any] = {
        "spec": spec,
        "name": artifact.candidate.name,
        "version": metadata.version,
        "license": metadata.license,
        "variant": artifact.candidate.variant,
        "commit": artifact.candidate.commit,
        "digest": artifact.digest,
        "path": str(artifact.path),
        "names": names,
        "layers": layers,
        "evidence": evidence,
    }
    lines = [
        f"{spec}: {artifact.candidate.variant} of {artifact.candidate.name} at {artifact.candidate.commit[:12]}",
        f"  in {artifact.path}",
        *(f"  {e['verifier']}: {e['statement']}" for e in evidence),
        *_section("names", names),
        *_section("layers", layers),
    ]
    return Answer(data, plain("\n".join(lines)))


def _public(module: ModuleType | None) -> list[tuple[str, Any]]:
    if module is None:
        return []
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = [(n, getattr(module, n, None)) for n in sorted(names)]
    return [
        (n, v)
        for n, v in found
        if callable(v) and not inspect.ismodule(v) and not getattr(v, "__module__", "").startswith("torch")
    ]


def _describe(value: Any) -> str:
    """`(x, weight, eps=1e-06)` of a function, or of a layer's forward."""
    target = getattr(value, "forward", value) if inspect.isclass(value) else value
    try:
        return str(inspect.signature(target))
    except (TypeError, ValueError):
        return "(...)"


def _section(title: str, rows: dict[str, str]) -> list[str]:
    return [f"  {title}:", *(f"    {name}{signature}" for name, signature in rows.items())] if rows else []
