"""Values to plain text and to plain JSON. Pure; no colour, no terminal: those are the CLI's.

Each `x` has an `x_json` that returns what `json.dumps` takes.
"""

# long: a value's text and its JSON stand side by side, so that one is not changed without the other.

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .types import (
    Artifact,
    Candidate,
    Choice,
    Implementation,
    Kept,
    Machine,
    Metadata,
    Outcome,
    Requirement,
    Resolution,
    Swap,
    Verdict,
)

_CHOSEN = "chosen"
_FITS = "fits"

# -- resolution ---------------------------------------------------------------------------------------------------


def resolution(r: Resolution) -> str:
    """One line for what was asked, one for each candidate with its reason, one for each note."""
    rows = [(mark, j.candidate.variant, why) for j, mark, why in _marked(r)]
    lines = [_asked(r), *_table(rows, indent="  ")]
    if not r.judged:
        lines.append("  no builds were found")
    elif r.chosen is None:
        lines.append(f"  none of {len(r.judged)} builds fits {_short_machine(r.machine)}")
    return "\n".join([*lines, *(f"  note: {note}" for note in r.notes)])


def resolution_json(r: Resolution) -> dict[str, Any]:
    """`chosen` is the candidate or null; `candidates` are best first."""
    return {
        "requirement": requirement_json(r.requirement),
        "machine": machine_json(r.machine),
        "chosen": candidate_json(r.chosen) if r.chosen is not None else None,
        "metadata": metadata_json(r.metadata) if r.metadata is not None else None,
        "candidates": [{**candidate_json(j.candidate), "rejected": j.rejected} for j in r.judged],
        "notes": list(r.notes),
    }


def requirement_json(r: Requirement) -> dict[str, Any]:
    """The parts, and `text`."""
    return {
        "text": str(r),
        "source": r.source,
        "name": r.name,
        "version": r.version,
        "revision": r.revision,
        "constraints": r.constraints,
        "layer": r.layer,
    }


def candidate_json(c: Candidate) -> dict[str, Any]:
    """Without the requirement: the Resolution has it once."""
    return {"source": c.source, "name": c.name, "commit": c.commit, "variant": c.variant}


def metadata_json(m: Metadata) -> dict[str, Any]:
    """What a person or a script wants of it; the list of file digests is left out, its algorithm stays."""
    return {
        "name": m.name,
        "id": m.id,
        "version": m.version,
        "license": m.license,
        "backend": m.backend,
        "archs": list(m.archs),
        "python_depends": list(m.python_depends),
        "kernel_depends": [{"name": d.name, "version": d.version, "revision": d.revision} for d in m.kernel_depends],
        "minver": ".".join(map(str, m.minver)) if m.minver is not None else None,
        "upstream": m.upstream,
        "source": m.source,
        "digest": m.digest.algorithm if m.digest is not None else None,
        "commit": m.provenance.commit if m.provenance is not None else None,
        "synthesised": list(m.synthesised),
    }


def _marked(r: Resolution) -> Iterable[tuple[Any, str, str]]:
    chosen = r.chosen
    for j in r.judged:
        if j.rejected is not None:
            yield j, "-", j.rejected
        elif j.candidate is chosen:
            yield j, "*", f"{_CHOSEN}, {j.candidate.source} {j.candidate.name} at {short(j.candidate.commit)}"
        else:
            yield j, "+", _FITS


def _asked(r: Resolution) -> str:
    chosen = r.chosen
    return f"{r.requirement}: {chosen.variant if chosen is not None else 'no build fits'}"


# -- machine ------------------------------------------------------------------------------------------------------


def machine(m: Machine) -> str:
    """One line for each field: name, value, reason."""
    why = dict(m.why)
    rows = [(name, _value(value), why.get(name, "")) for name, value in _machine_fields(m)]
    rows += [(f"{d.type}:{d.index}", _device(d), why.get(f"{d.type}:{d.index}", "")) for d in m.devices]
    return "\n".join(_table(rows))


def machine_json(m: Machine) -> dict[str, Any]:
    """Fields, `devices`, and `why` by field."""
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in _machine_fields(m)}
    devices = [
        {
            "type": d.type,
            "index": d.index,
            "name": d.name,
            "capability": list(d.capability) if d.capability is not None else None,
            "arch": d.arch,
        }
        for d in m.devices
    ]
    return {**fields, "devices": devices, "why": dict(m.why)}


def _machine_fields(m: Machine) -> list[tuple[str, Any]]:
    names = ("os", "cpu", "python", "free_threaded", "torch", "cxx11", "tvm_ffi", "backend", "backend_version", "macos")
    return [(name, getattr(m, name)) for name in names]


def _value(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ".".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _device(d: Any) -> str:
    more = [_value(d.capability) if d.capability is not None else "", d.arch or ""]
    return " ".join([d.name, *(f"({m})" for m in [", ".join(x for x in more if x)] if m)])


def _short_machine(m: Machine) -> str:
    backend = m.backend + (f" {_value(m.backend_version)}" if m.backend_version is not None else "")
    return f"{m.cpu} {m.os}, torch {_value(m.torch)}, {backend}"


# -- outcomes -----------------------------------------------------------------------------------------------------


def outcomes(rows: Iterable[Outcome], *, long: bool = False, calls: Mapping[str, int] | None = None) -> str:
    """What was decided for a model: grouped with counts, or with `long` one block for each module.

    `calls` is the number of calls that a kernel served, by path; None where they were not counted.
    """
    rows = list(rows)
    if not rows:
        return "no sites"
    if long:
        return "\n".join(_block(row, calls) for row in rows)
    table = [("count", "layer", "original", "served by", "why"), *outcome_groups(rows, calls=calls)]
    swapped = sum(isinstance(row, Swap) for row in rows)
    return "\n".join([*_table(table), f"{swapped} of {len(rows)} swapped"])


def outcome_groups(rows: Iterable[Outcome], *, calls: Mapping[str, int] | None = None) -> list[tuple[str, str, str, str, str]]:
    """Count, layer, original, what serves it and why: one for each group of sites of which the same was found."""
    groups: dict[tuple[str, str, str, str], list[Outcome]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    found = []
    for (layer, target, by, why), members in groups.items():
        more = [_worst(members)] if isinstance(members[0], Swap) else []
        if calls is not None and isinstance(members[0], Swap):
            more.append(f"{sum(calls.get(m.site.path, 0) for m in members)} calls")
        found.append((str(len(members)), layer, target, by, "; ".join(filter(None, (why, *more)))))
    return found


def outcomes_json(rows: Iterable[Outcome], *, calls: Mapping[str, int] | None = None) -> list[dict[str, Any]]:
    """One object for each site, in order; `calls` as in `outcomes`."""
    return [_outcome_json(row, calls) for row in rows]


def group(row: Outcome) -> tuple[str, str, str, str]:
    """Layer, original, what serves it and why: sites of which all four agree are shown as one."""
    target = row.site.target.rpartition(".")[2]
    if isinstance(row, Kept):
        return row.site.layer, target, "the original", general(row.reason)
    sides = {side: getattr(row, side) for side in ("inference", "training")}
    by = {side: _by(choice) for side, choice in sides.items()}
    why = {side: _why(choice) for side, choice in sides.items()}
    return row.site.layer, target, both(by), both(why)


def _worst(members: Iterable[Outcome]) -> str:
    """The largest errors of a group: the numbers differ from module to module, the finding does not."""
    verdicts = [c.verdict for m in members if isinstance(m, Swap) for c in (m.inference, m.training) if c.verdict is not None]
    pairs = [(v.error_kernel, v.error_original) for v in verdicts if v.error_kernel is not None and v.error_original is not None]
    return f"error {max(k for k, _ in pairs):.1e}, original {max(o for _, o in pairs):.1e}" if pairs else ""


def both(texts: Mapping[str, str]) -> str:
    """`x` if both modes say `x`, else each with its mode."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "; ".join(f"{side}: {text}" for side, text in texts.items() if text)


def _by(choice: Choice) -> str:
    return (
        "the original"
        if choice.implementation is None
        else _implementation(choice.implementation.origin, choice.implementation.layer)
    )


def _implementation(a: Artifact, layer: str) -> str:
    return f"{named(a, layer)} ({a.candidate.variant})"


def named(a: Artifact, layer: str) -> str:
    """`kernelswap/layers:RMSNorm`: what a person would write to ask for it, without a version."""
    return f"{'kernelswap/' if a.candidate.source == 'bundled' else ''}{a.candidate.name}:{layer}"


def _why(choice: Choice) -> str:
    if choice.implementation is None:
        whys = dict.fromkeys(f"{spec}: {general(why)}" for spec, why in choice.passed)
        return "; ".join(whys) or "nothing is registered for it"
    found = _finding(choice.verdict) if choice.verdict is not None else "not checked"
    return f"{found}; {measured(choice)}" if choice.measured else found


FEW = 3  # sizes that the original keeps, which are listed one by one


def measured(choice: Choice) -> str:
    """`measured: 2.20x on 1 row, 3.10x on 2-16 rows; the original on over 4096 rows`. Empty where nothing was measured."""
    several = len({serves for _, serves, _ in choice.measured if serves}) > 1
    said: dict[str, list[str]] = {}
    for size, serves, times in choice.measured:
        what = "the original" if not serves else serves if several else ""
        said.setdefault(what, []).append(
            f"{times:.2f}x on {size}" if times else f"{'' if not serves else 'not measured '}on {size}"
        )
    if len(said) > 1 and len(others := said.get("the original", [])) > FEW:
        said["the original"] = [f"on the {len(others)} others"]
    return "measured: " + "; ".join(f"{what} {', '.join(texts)}".strip() for what, texts in said.items()) if said else ""


def general(reason: str) -> str:
    """Without the element that differs and by how much: sites that were refused for the same reason stand together."""
    for place in (", element [", ", row [", ", every row is off", ", all is off"):
        reason = reason.partition(place)[0]
    return reason


def _block(row: Outcome, calls: Mapping[str, int] | None) -> str:
    site = row.site
    lines = [f"{site.path or '(the model)'}: {site.layer}, {site.target}, {site.device}, {site.dtype}"]
    if isinstance(row, Kept):
        lines.append(f"  kept: {row.reason}")
        lines += [f"    passed over {spec}: {why}" for spec, why in row.passed]
        return "\n".join(lines)
    for side in ("inference", "training"):
        choice: Choice = getattr(row, side)
        now = " (now)" if site.training is (side == "training") else ""
        lines.append(f"  {side}{now}: {_by(choice)}")
        if choice.implementation is not None:
            lines.append(f"    chosen as {why_chosen(choice, side)}")
        if choice.implementation is not None:
            a = choice.implementation.origin
            lines.append(
                f"    from {a.candidate.source} {a.candidate.name} at {short(a.candidate.commit)}, digest {short(a.digest)}"
            )
        if choice.implementation is not None and choice.implementation.tuned:
            lines.append(f"    configurations measured on this device: {', '.join(choice.implementation.tuned)}")
        lines += [f"    {text}" for text in ([_verdict(choice.verdict)] if choice.verdict is not None else [])]
        lines += [f"    {measured(choice)}"] if choice.measured else []
        lines += [f"    passed over {spec}: {why}" for spec, why in choice.passed]
        lines += [f"    not tried, since this serves: {spec}" for spec in choice.later]
        lines += [f"    build {variant} not taken: {why}" for variant, why in _other_builds(choice.implementation)]
    if calls is not None:
        lines.append(f"  calls served: {calls.get(site.path, 0)}")
    return "\n".join(lines)


def why_chosen(choice: Choice, side: str) -> str:
    """Why this candidate and this build: `candidate 2 of 3, the first that serves inference here; build X, the only one that fits`."""
    count = len(choice.passed) + 1 + len(choice.later)
    if choice.measured:
        which = "the fastest that was measured"
    elif count == 1:
        which = "the only candidate"
    else:
        which = f"candidate {len(choice.passed) + 1} of {count}, the first that serves {side} here"
    fit = [j for j in choice.implementation.builds if j.rejected is None] if choice.implementation is not None else []
    if not fit:
        return which
    return f"{which}; build {fit[0].candidate.variant}, {f'the best of {len(fit)} that fit' if len(fit) > 1 else 'the only one that fits'}"


def _other_builds(found: Implementation | None) -> list[tuple[str, str]]:
    """Builds that were considered and not taken, with the reason."""
    if found is None:
        return []
    chosen = next((j for j in found.builds if j.rejected is None), None)
    return [
        (j.candidate.variant, j.rejected or f"fits, but {chosen.candidate.variant} is preferred")
        for j in found.builds
        if chosen is not None and j is not chosen
    ]


def _outcome_json(row: Outcome, calls: Mapping[str, int] | None) -> dict[str, Any]:
    s = row.site
    site = {
        "path": s.path,
        "kind": s.kind,
        "layer": s.layer,
        "target": s.target,
        "device": s.device,
        "dtype": s.dtype,
        "mode": "training" if s.training else "inference",
        "name": s.name or None,
    }
    if isinstance(row, Kept):
        return {**site, "active": "the original", "swapped": False, "reason": row.reason, "passed": _passed(row.passed)}
    return {
        **site,
        "active": _by(row.serving(training=s.training)),
        "swapped": True,
        "inference": _choice_json(row.inference, "inference"),
        "training": _choice_json(row.training, "training"),
        "calls": calls.get(s.path, 0) if calls is not None else None,
    }


def _choice_json(choice: Choice, side: str) -> dict[str, Any]:
    found = choice.implementation
    return {
        "implementation": None
        if found is None
        else {
            "spec": named(found.origin, found.layer),
            **artifact_json(found.origin),
            "layer": found.layer,
            "backward": found.backward,
            "compiles": found.compiles,
            "reads": list(found.reads),
            "other_builds": [{"variant": variant, "why": why} for variant, why in _other_builds(found)],
            "tuned": list(found.tuned),
        },
        "why": why_chosen(choice, side) if found is not None else None,
        "verdict": verdict_json(choice.verdict) if choice.verdict is not None else None,
        "measured": [{"size": s, "serves": by or None, "speedup": times} for s, by, times in choice.measured],
        "passed": _passed(choice.passed),
        "not_tried": list(choice.later),
    }


def artifact_json(a: Artifact) -> dict[str, Any]:
    """Where it came from, what it is, and the evidence."""
    return {
        "requirement": str(a.candidate.requirement),
        **candidate_json(a.candidate),
        "digest": a.digest,
        "id": a.metadata.id,
        "version": a.metadata.version,
        "license": a.metadata.license,
        "evidence": [{"verifier": e.verifier, "statement": e.statement} for e in a.evidence],
    }


def verdict_json(v: Verdict) -> dict[str, Any]:
    """Errors are relative, times are seconds; null where nothing was measured."""
    return {
        "accepted": v.accepted,
        "reason": v.reason,
        "key": v.key or None,
        "error_original": _finite(v.error_original),
        "error_kernel": _finite(v.error_kernel),
        "seconds_original": v.seconds_original,
        "seconds_kernel": v.seconds_kernel,
        "details": dict(v.details),
    }


def _finite(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: those go as text."""
    return value if value is None or abs(value) < float("inf") else str(value)


def _finding(v: Verdict) -> str:
    """The reason, without the numbers where they are shown apart: `as accurate as the original: error ...`."""
    return v.reason.partition(":")[0] if v.accepted and v.error_kernel is not None else v.reason


def _verdict(v: Verdict) -> str:
    parts = [_finding(v)]
    if v.error_original is not None and v.error_kernel is not None:
        parts.append(f"error {v.error_kernel:.1e}, original {v.error_original:.1e}")
    if v.seconds_original is not None and v.seconds_kernel is not None:
        parts.append(f"{seconds(v.seconds_kernel)}, original {seconds(v.seconds_original)}")
    if (traced := dict(v.details).get("compiled", "")).startswith("no: "):
        parts.append(f"not under torch.compile, where the original serves: {traced.removeprefix('no: ')}")
    return ("checked: " if v.accepted else "refused: ") + "; ".join(parts)


def _passed(passed: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"spec": spec, "why": why} for spec, why in passed]


# -- small things -------------------------------------------------------------------------------------------------


def short(commit: str) -> str:
    """Twelve characters of a digest or commit; a shorter name as it is."""
    return commit[:12]


def seconds(value: float) -> str:
    """A duration with three digits and its unit."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _table(rows: Sequence[tuple[str, ...]], indent: str = "") -> list[str]:
    """Columns padded to their widest cell, two spaces between; the last one is free."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return [(indent + "".join(f"{cell:<{w}}  " for cell, w in zip(row, widths, strict=False)) + row[-1]).rstrip() for row in rows]
