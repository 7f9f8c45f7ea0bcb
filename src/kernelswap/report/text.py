"""The report in words and numbers: for a terminal, and for the places of the page that are text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import render

Facts = Mapping[str, Any]


# -- small things -------------------------------------------------------------------------------------------------


def error(value: Any) -> str:
    """A relative error; `-` where nothing was measured, the word itself where it is no number."""
    return "-" if value is None else value if isinstance(value, str) else f"{value:.1e}"


def share(value: float) -> str:
    """A part of the time."""
    return "<0.1%" if value < 0.0005 else f"{value:.0%}" if value >= 0.095 else f"{value:.1%}"


def count(value: int) -> str:
    """A number of parameters."""
    for scale, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return str(value)


def value(found: Any) -> str:
    """A fact of a machine."""
    if found is None:
        return "-"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return ".".join(map(str, found)) if isinstance(found, list | tuple) else str(found)


def phases(facts: Facts) -> list[str]:
    """The phases of which shares or kinds were timed, in order."""
    observed = facts["observed"] or {}
    found = [s["phase"] for s in observed.get("steps", ())] + [s["phase"] for s in observed.get("shares", ())]
    return list(dict.fromkeys(found))


def speed_of(facts: Facts) -> dict[str, dict[str, str]]:
    """`{"layer original": {phase: "3.2x"}}`; kinds of several widths have a range."""
    spans: dict[str, dict[str, list[float]]] = {}
    for speed in (facts["observed"] or {}).get("speeds", ()):
        if speed["shape"] in phases(facts):
            spans.setdefault(f"{speed['layer']} {speed['original']}", {}).setdefault(speed["shape"], []).append(speed["speedup"])
    return {kind: {phase: _span(found) for phase, found in by.items()} for kind, by in spans.items()}


def _span(found: Sequence[float]) -> str:
    low, high = f"{min(found):.2f}x", f"{max(found):.2f}x"
    return low if low == high else f"{low[:-1]}-{high}"


def sections(facts: Facts) -> str:
    """What the lists of sites do not say: the model, what was measured, refusals, kernels and their evidence, the machine."""
    model, observed = facts["model"], facts["observed"] or {}
    size = f"{count(model['parameters'])} parameters" if model["parameters"] else ""
    attention = f"attention by {model['attention']}" if model["attention"] else ""
    about = [model["class"], size, model["dtype"], model["device"], attention]
    parts = [
        [f"{model['name'] or 'a model'}: {', '.join(filter(None, about))}; kernelswap {facts['kernelswap']}", headline(facts)]
    ]
    parts.append([_kind(k) for k in facts["kinds"]])
    parts.append([f"refused: {r['path']} ({r['layer']}): {r['reason']}" for r in facts["refusals"]])
    parts.append(graphs(facts["graphs"]) if facts["graphs"] is not None else [])
    parts.append(_measured(facts, observed))
    parts += [_kernel(k) for k in facts["kernels"]]
    parts.append(_lock(facts["lock"]))
    if facts["machine"] is not None:
        parts.append(["this machine", *_machine(facts["machine"])])
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _kind(k: Facts) -> str:
    errors = f"; error {error(k['error_kernel'])}, original {error(k['error_original'])}" if k["error_kernel"] is not None else ""
    calls = f"; {_calls(k['calls'])}" if k["calls"] is not None else ""
    build = f" ({k['build']})" if k["build"] else ""
    return f"{k['layer']} ({k['original']}) x{k['count']}: {k['served_by']}{build}: {k['why']}{errors}{calls}"


def _measured(facts: Facts, observed: Facts) -> list[str]:
    if not observed:
        return []
    lines = [observed["how"]]
    lines += [f"  {s['phase']}: {_pair(s)}" for s in observed["steps"]]
    if observed["bandwidth"]:
        lines.append(f"  copying memory: {observed['bandwidth'] / 1e9:.1f} GB/s")
    for kind in facts["kinds"]:
        for phase, part in (kind["share"] or {}).items():
            lines.append(f"  {kind['layer']} ({kind['original']}) x{kind['count']}: {share(part)} of {phase}")
    for s in observed["speeds"]:
        moved = f", {s['bytes']} bytes moved" if s["bytes"] else ""
        width = f" {s['width']}" if s["width"] else ""
        lines.append(
            f"  {s['layer']} ({s['original']}){width}, {s['shape']} ({s['rows']} rows), {s['kernel']}: {_pair(s)}{moved}"
        )
    lines += [
        f"  {s['path']}{' ' + s['name'] if s['name'] else ''}: {share(s['share'])} of {s['phase']}, {_calls(s['calls'])}"
        for s in observed["shares"]
    ]
    return lines


def graphs(found: Facts) -> list[str]:
    """What became of decode steps, and why some ran as ever."""
    size = f"{found['bytes'] / 2**20:.1f} MiB" if found["bytes"] else "no memory"
    lines = [
        f"decode steps: {found['replayed']} replayed, of {found['recorded']} recorded; {found['held']} held, with {size} ({found['bytes']} bytes)"
    ]
    lines += [f"  {n} ran as ever: {why}" for why, n in found["not_replayed"].items()]
    lines += [f"  {n} {'kind is' if n == 1 else 'kinds are'} not recorded: {why}" for why, n in found["refused"].items()]
    lines += [f"  let go and begun anew, {n}x: {why}" for why, n in found["renewed"].items()]
    return lines


def _pair(s: Facts) -> str:
    both = f"{render.seconds(s['seconds_original'])} to {render.seconds(s['seconds_kernel'])}"
    return f"{both}, {s['speedup']:.2f}x ({s['low']:.2f} to {s['high']:.2f})"


def _calls(n: int) -> str:
    return "1 call" if n == 1 else f"{n} calls"


def _kernel(k: Facts) -> list[str]:
    name = f"{'kernelswap/' if k['source'] == 'bundled' else ''}{k['name']}"
    lines = [f"{name} ({k['variant']}), asked for as {k['requirement']}: {', '.join(k['layers'])} at {k['sites']} sites"]
    lines.append(f"  from {k['source']}, commit {k['commit']}, digest {k['digest']}")
    lines.append(f"  id {k['id']}, version {k['version']}, licence {k['license']}")
    lines += [f"  needs {name}" for name in k["depends"]]
    return lines + [f"  {e['verifier']}: {e['statement']}" for e in k["evidence"]]


def lock_line(lock: Facts) -> str:
    """Whether what serves is locked, in a sentence."""
    n = len(lock["kernels"])
    if not lock["exists"]:
        where = f"; there is no {lock['file']}" if lock["file"] else ""
        return f"A lock of what serves has {n} {'entry' if n == 1 else 'entries'}{where}."
    wrong = sum(k["matches"] is False for k in lock["kernels"])
    return f"{lock['file']} " + ("says the same." if not wrong else f"says something else of {wrong} of {n} builds.")


def _lock(lock: Facts) -> list[str]:
    if not lock["kernels"]:
        return []
    rows = [
        f"  {k['asked']} {k['variant']}: commit {k['commit']}, digest {k['digest']}{': ' + k['says'] if k['says'] else ''}"
        for k in lock["kernels"]
    ]
    return [lock_line(lock), *rows]


def _machine(machine: Facts) -> list[str]:
    why = machine["why"]
    rows = [(name, value(found), why.get(name, "")) for name, found in machine.items() if name not in {"why", "devices"}]
    rows += [
        (f"{d['type']}:{d['index']}", d["name"], ", ".join(filter(None, (d["arch"], value(d["capability"])))))
        for d in machine["devices"]
    ]
    if not machine["devices"]:
        rows.append(("devices", "-", why.get("devices", "")))
    wide = max(len(name) for name, *_ in rows)
    return [f"  {name:<{wide}}  {found}{f' ({reason})' if reason else ''}" for name, found, reason in rows]


# -- sentences ----------------------------------------------------------------------------------------------------


def headline(facts: Facts) -> str:
    """What there is to know, in one or two sentences."""
    sites = facts["swapped"] + facts["kept"]
    steps = (facts["observed"] or {}).get("steps", ())
    said = f"{facts['serving']} of {sites} sites are served by kernels" if facts["serving"] else _nothing(sites)
    if steps:
        said += ": " + ", ".join(f"{s['phase']} {s['speedup']:.2f}x" for s in steps)
    if facts["refusals"]:
        n = len({r["path"] for r in facts["refusals"]})
        said += f". {n} {'kernel was' if n == 1 else 'kernels were'} refused on the model's own tensors"
    return said + "."


def _nothing(sites: int) -> str:
    return f"Nothing is served by a kernel: all {sites} sites keep the original" if sites else "This model has no sites"


def tiles(facts: Facts) -> list[dict[str, str]]:
    """The numbers at the top: `value`, `label`, `note`, `tone` (good, bad or empty)."""
    sites = facts["swapped"] + facts["kept"]
    found = [{"value": f"{facts['serving']} of {sites}", "label": "sites served by a kernel", "note": "", "tone": ""}]
    observed = facts["observed"] or {}
    for step in observed.get("steps", ()):
        both = f"{render.seconds(step['seconds_original'])} to {render.seconds(step['seconds_kernel'])}"
        spread = f"; half of the turns {step['low']:.2f}-{step['high']:.2f}x"
        sooner = step["seconds_kernel"] < step["seconds_original"]  # a few noisy turns can contradict themselves
        tone = "good" if step["low"] > 1.0 and sooner else "bad" if step["high"] < 1.0 and not sooner else ""
        found.append({"value": f"{step['speedup']:.2f}x", "label": step["phase"], "note": both + spread, "tone": tone})
    for phase in phases(facts)[:1]:
        part = sum(k["share"].get(phase, 0.0) for k in facts["kinds"] if k["share"] and k["serving"])
        if any(k["share"] for k in facts["kinds"]):
            found.append({"value": share(part), "label": f"of {phase} is what they replace", "note": "", "tone": ""})
    pairs = [(k["error_kernel"], k["error_original"]) for k in facts["kinds"] if k["error_kernel"] is not None and k["serving"]]
    if pairs:
        worst = max(a for a, _ in pairs)
        note = f"the originals' {error(max((b for _, b in pairs if b is not None), default=None))}"
        found.append({"value": error(worst), "label": "largest error of a kernel", "note": note, "tone": ""})
    refused = len({r["path"] for r in facts["refusals"]})
    found.append({"value": str(refused), "label": "refused on real tensors", "note": "", "tone": "bad" if refused else ""})
    return found
