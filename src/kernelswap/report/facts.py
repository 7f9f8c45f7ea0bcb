"""Everything about one model and what serves it, as plain JSON values. The text and the page are made of these and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import render
from .._version import __version__
from ..lock import Lock
from ..types import Artifact, Choice, Kept, Machine, Outcome, Site, Swap
from .locked import locked
from .observed import Observed, Share

if TYPE_CHECKING:
    import torch.nn as nn


def facts(  # noqa: PLR0913  # what a report is made of
    outcomes: Sequence[Outcome],
    *,
    model: nn.Module | None = None,
    name: str = "",
    machine: Machine | None = None,
    refusals: Sequence[tuple[Site, str]] = (),
    calls: Mapping[str, int] | None = None,
    calls_of_original: Mapping[str, int] | None = None,
    observed: Observed | None = None,
    graphs: Mapping[str, Any] | None = None,
    lock: tuple[str, Lock | None] | None = None,
) -> dict[str, Any]:
    """What `Applied.report` holds and every form of the report shows.

    Args:
        outcomes: one for each site, as of now.
        model: for its tree; None leaves `modules` empty.
        name: what to call it; by default its class.
        machine: what was decided for.
        refusals: kernels that a real call refused.
        calls: that a kernel served, by path; None where they were not counted.
        calls_of_original: of swapped sites that the original served all the same.
        observed: times and shares, where they were measured.
        graphs: what was recorded and replayed; None where nothing is to be.
        lock: the file that locks kernels here, and what it says, or None where there is no such file.

    `swapped` sites have a kernel in some mode, `serving` ones in the mode that they are in. `outcomes` has one object a site, `kinds` one for each group of sites of which the same was found, `kernels` one for
    each build in use, `lock` what a lock of these says and whether the one there is says it, `modules` one for each module in the order of `named_modules`. What was not measured is null.
    """
    refused = _refusals(refusals, observed)
    return {
        "kernelswap": __version__,
        "model": _model(model, name),
        "swapped": sum(isinstance(o, Swap) for o in outcomes),
        "kept": sum(isinstance(o, Kept) for o in outcomes),
        "serving": sum(_serves(o) for o in outcomes),
        "kinds": _kinds(outcomes, calls, observed, {r["path"] for r in refused}),
        "outcomes": render.outcomes_json(outcomes, calls=calls),
        "refusals": refused,
        "kernels": _kernels(outcomes),
        "lock": _lock(outcomes, lock),
        "modules": _modules(model),
        "calls": dict(calls) if calls is not None else None,
        "calls_of_original": dict(calls_of_original) if calls_of_original is not None else None,
        "observed": _observed(observed),
        "graphs": dict(graphs) if graphs is not None else None,
        "machine": render.machine_json(machine) if machine is not None else None,
    }


def now(outcome: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The choice for the mode that the module is in; None where the original stays in every mode."""
    return outcome[outcome["mode"]] if outcome["swapped"] else None


# -- parts --------------------------------------------------------------------------------------------------------


def _model(model: nn.Module | None, name: str) -> dict[str, Any]:
    if model is None:
        return {"name": name, "class": None, "parameters": None, "dtype": None, "device": None, "attention": None}
    tensor = next((p for p in model.parameters() if p.is_floating_point()), None)
    family = _class(model)
    setting = getattr(getattr(model, "config", None), "_attn_implementation", None)  # as Transformers calls it
    return {
        "name": name or family,
        "class": family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(tensor.dtype).removeprefix("torch.") if tensor is not None else None,
        "device": str(tensor.device) if tensor is not None else None,
        "attention": setting if isinstance(setting, str) else None,
    }


def _observed(observed: Observed | None) -> dict[str, Any] | None:
    if observed is None:
        return None
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(observed).items()}


def _refusals(refusals: Sequence[tuple[Site, str]], observed: Observed | None) -> list[dict[str, str]]:
    found = [(site.path, site.layer, reason) for site, reason in refusals]
    found += [(r.path, r.layer, r.reason) for r in (observed.refusals if observed is not None else ())]
    return [{"path": path, "layer": layer, "reason": reason} for path, layer, reason in dict.fromkeys(found)]


def _modules(model: nn.Module | None) -> list[dict[str, Any]]:
    if model is None:
        return []
    return [
        {
            "path": path,
            "class": _class(module),
            "parameters": sum(p.numel() for p in module.parameters(recurse=False)),
            "width": next((p.shape[-1] for p in module.parameters(recurse=False) if p.ndim), None),
        }
        for path, module in model.named_modules()
    ]


def _class(module: nn.Module) -> str:
    return type(module).__name__  # a swapped module's class has the original's name


def _serves(outcome: Outcome) -> bool:
    return isinstance(outcome, Swap) and outcome.serving(training=outcome.site.training).implementation is not None


def _kinds(
    outcomes: Sequence[Outcome], calls: Mapping[str, int] | None, observed: Observed | None, refused: set[str]
) -> list[dict[str, Any]]:
    """Groups of sites, in the order in which the model has the first of each."""
    groups: dict[tuple[str, str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(render.group(outcome), []).append(outcome)
    found = []
    for (layer, original, _, why), members in groups.items():
        swapped = isinstance(members[0], Swap)
        by, build = _served(members[0])
        verdicts = [v for m in members for c in _choices(m) if (v := c.verdict) is not None and v.accepted]
        found.append(
            {
                "layer": layer,
                "original": original,
                "count": len(members),
                "swapped": swapped,
                "serving": sum(map(_serves, members)),
                "refused": sum(m.site.path in refused for m in members),
                "served_by": by,
                "build": build,
                "why": why,
                "error_original": _largest(v.error_original for v in verdicts),
                "error_kernel": _largest(v.error_kernel for v in verdicts),
                "calls": sum(calls.get(m.site.path, 0) for m in members) if calls is not None and swapped else None,
                "share": _share(members, observed),
                "paths": [m.site.path for m in members],
            }
        )
    return found


def _served(outcome: Outcome) -> tuple[str, str]:
    """What serves it, with the mode where the modes differ, and of which builds."""
    if isinstance(outcome, Kept):
        return "the original", ""
    found = {side: getattr(outcome, side).implementation for side in ("inference", "training")}
    names = {side: "the original" if i is None else render.named(i.origin, i.layer) for side, i in found.items()}
    builds = dict.fromkeys(i.origin.candidate.variant for i in found.values() if i is not None)
    return render.both(names), ", ".join(builds)


def _choices(outcome: Outcome) -> tuple[Choice, ...]:
    return (outcome.inference, outcome.training) if isinstance(outcome, Swap) else ()


def _largest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None and abs(v) < float("inf")), default=None)


def _share(members: Sequence[Outcome], observed: Observed | None) -> dict[str, float] | None:
    """By phase, all of them together; None where nothing was measured."""
    if observed is None or not observed.shares:
        return None
    where = {(m.site.path, m.site.name) for m in members}
    mine: list[Share] = [s for s in observed.shares if (s.path, s.name) in where]
    sums: dict[str, float] = {}
    for share in mine:
        sums[share.phase] = sums.get(share.phase, 0.0) + share.share
    return sums


def _kernels(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Every build that serves, with what it serves; those it depends on are named."""
    found: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        served = {k for c in _choices(outcome) if c.implementation is not None for k in c.implementation.kernels}
        for kernel in sorted(served, key=lambda k: k.layer):
            origin: Artifact = kernel.origin
            entry = found.setdefault(
                origin.digest,
                {**render.artifact_json(origin), "depends": [d.candidate.name for d in origin.depends], "layers": [], "sites": 0},
            )
            if kernel.layer not in entry["layers"]:
                entry["layers"].append(kernel.layer)
        for digest in {k.origin.digest for k in served}:
            found[digest]["sites"] += 1
    return list(found.values())


def _lock(outcomes: Sequence[Outcome], lock: tuple[str, Lock | None] | None) -> dict[str, Any]:
    chosen = (c.implementation for o in outcomes for c in _choices(o))
    kernels = {k.origin.digest: k.origin for i in chosen if i is not None for k in i.kernels}
    file, there = lock or (None, None)
    return locked(kernels.values(), there, file)
