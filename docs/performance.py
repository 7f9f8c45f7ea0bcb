"""The page about speed, docs/performance.md, from benchmarks/results: targets, figures, and where others were faster.

`docs/generate.py` writes it and draws its pictures. Results are all files there with a GPU's name in them; a newer file of the same
name is a newer figure. tests/bench/test_performance_page.py holds page, pictures and results together.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "results"
PAGE = HERE / "performance.md"
PICTURES = HERE / "img"

sys.path.insert(0, str(HERE.parent / "benchmarks"))
import plots  # noqa: E402  # of benchmarks/, found by the line above
import targets  # noqa: E402

Row = dict[str, Any]


def runs(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """By GPU: what each file of its holds, the file's name under `file`."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        gpu = data.get("machine", {}).get("gpu") if isinstance(data, dict) and isinstance(data.get("machine"), dict) else None
        if gpu:
            found.setdefault(gpu, []).append({**data, "file": path.name})
    return found


def slug(gpu: str) -> str:
    """A GPU's name in a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def rows_of(files: list[dict[str, Any]]) -> list[Row]:
    """All rows of a GPU."""
    return [row for data in files for row in data["rows"]]


def page(folder: Path = RESULTS) -> str:
    """The whole page."""
    lines = [
        "# Performance",
        "",
        "Written by `python3 dev.py docs` from the files in `benchmarks/results`; do not edit.",
        "",
        "Every candidate's output, and in backward its gradients, is compared with float64 before anything is timed; what is wrong is",
        "not timed. Candidates take turns in one process, over rotated buffers of random data, in alternating order; figures are medians.",
        "The floor of a kernel is the bytes that must move over the element-wise bandwidth measured in the same run (decode attention, projections:",
        "over the read bandwidth), or the operations over the measured rate of a bfloat16 product. *Original* is the model as Transformers",
        "makes it, in bfloat16. Predictions, and what was tried and lost, are in",
        "[benchmarks/LOG.md](../benchmarks/LOG.md).",
        "",
        "On your own GPU:",
        "",
        "```",
        "kernelswap bench kernels --out kernels.json",
        "kernelswap bench model --out model.json",
        "```",
        "",
    ]
    for gpu, files in runs(folder).items():
        lines += one(gpu, files)
    return "\n".join(lines).rstrip() + "\n"


def one(gpu: str, files: list[dict[str, Any]]) -> list[str]:
    """What one GPU gave."""
    rows = rows_of(files)
    verdicts = targets.judge(rows)
    met, missed = (sum(v.met is want for v in verdicts) for want in (True, False))
    lines = [f"## {gpu}", "", "| results | with |", "| --- | --- |"]
    lines += [f"| [{data['file']}](../benchmarks/results/{data['file']}) | {_with(data['machine'])} |" for data in files]
    if any("floor_us" in row and "tolerance" not in row for row in rows):
        lines += [
            "",
            "Some rows are of an earlier form of the benchmark: only our own output was checked there, of K7 against eager's.",
        ]
    for note in dict.fromkeys(row["note"] for row in rows if "note" in row):
        names = dict.fromkeys(
            row["kernel"].split()[0] if "kernel" in row else row["row"] for row in rows if row.get("note") == note
        )
        lines += ["", f"{', '.join(names)}: {note}."]
    lines += ["", f"Of {len(verdicts)} targets {met} are met, {missed} missed, {len(verdicts) - met - missed} not measured.", ""]
    lines += ["| | target | measured | |", "| --- | --- | --- | --- |"]
    said = {True: "met", False: "**missed**", None: ""}
    lines += [f"| {v.row} | {_cell(v.target)} | {_cell(v.measured)} | {said[v.met]} |" for v in verdicts]
    lines += [""]
    kernels, models = plots.drawable(rows)
    if models:
        lines += ["### Whole models", "", f"![Speed of whole models](img/{slug(gpu)}-models.svg)", "", *_models(rows)]
    if kernels:
        ordered = sorted(kernels, key=lambda row: row["kernel"])
        lines += ["### Kernels", "", f"![Share of the floor](img/{slug(gpu)}-kernels.svg)", "", *_kernels(ordered)]
    if hosts := [row["us"] for row in rows if row.get("kernel") == "H1 host cost"]:
        lines += ["### Host", "", "Microseconds of CPU that one call costs, at one token.", "", *_hosts(hosts[-1])]
    if tuned := [row for data in files for row in data.get("tuned", ()) if isinstance(row, dict)]:
        lines += ["### Configurations", "", *_tuned(tuned)]
    if behind := targets.losers(rows):
        lines += [
            "### Where others were faster",
            "",
            "By more than 1 %, ours over theirs:",
            "",
            *(f"- {one}" for one in behind),
            "",
        ]
    if texts := _texts(rows):
        lines += ["### Greedy text", "", *texts]
    return lines


def _with(machine: dict[str, Any]) -> str:
    names = {"torch": "torch", "triton": "Triton", "transformers": "Transformers", "python": "Python"}
    return ", ".join(f"{shown} {machine[name]}" for name, shown in names.items() if machine.get(name))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def _kernels(rows: list[Row]) -> list[str]:
    """Ours, and the others by their times over ours, the fastest first."""
    lines = ["Microseconds; of others, their time over ours.", ""]
    lines += ["| kernel | shape | us | of the floor | error | others |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        ours = row["us"][targets.OURS]
        others = sorted((us / ours, name) for name, us in row["us"].items() if name != targets.OURS)
        told = ", ".join(f"{_cell(name)} {ratio:.2f}x" for ratio, name in others)
        share = f"{row['floor_us'] / ours:.2f}" if row["floor_us"] >= 1 else ""
        lines.append(f"| {_cell(row['kernel'])} | {row['shape']} | {ours:.2f} | {share} | {row['error']:.1e} | {told} |")
    for row in rows:
        for name, why in row.get("out", {}).items():
            lines += ["", f"{_cell(row['kernel'])}, {row['shape']}: {_cell(name)} took no part ({_cell(why[:100])})."]
    return [*lines, ""]


def _tuned(rows: list[Row]) -> list[str]:
    """What was found by `bench kernels --tune`, in the order of the benchmark's rows."""
    won = sum(row["config"] is not None for row in rows)
    lines = [
        f"Measured by `kernelswap bench kernels --tune` ([tuning.md](tuning.md)): {len(rows)} buckets of calls, in {won} of which something",
        "beats the default by more than the noise. Microseconds, both in turns.",
        "",
        "| | kernel | shape | default | best | times as fast | noise | tried | kept |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in sorted(rows, key=lambda row: row["row"]):
        kept = ", ".join(f"{name} {value or 'none'}" for name, value in (row["config"] or {}).items()) or "the default"
        us, times, noise = (f"{row[n]:.{d}f}" if n in row else "" for n, d in (("us", 2), ("times", 3), ("noise", 3)))
        before = f"{row['default_us']:.2f}" if "default_us" in row else ""
        tried = f"{row['tried']}{'' if row['complete'] else ', not all'}"
        lines.append(
            f"| {row['row']} | {row['kernel']} | {_cell(row['shape'])} | {before} | {us} | {times} | {noise} | {tried} | {_cell(kept)} |"
        )
    return [*lines, ""]


def _hosts(costs: dict[str, float]) -> list[str]:
    """Each call without a gradient and, where that was measured, with one."""
    lines = ["| call | us | with gradient |", "| --- | ---: | ---: |"]
    for name, us in costs.items():
        if not name.endswith(" with grad"):
            graded = costs.get(f"{name} with grad")
            lines.append(f"| {_cell(name)} | {us:.1f} | {'' if graded is None else f'{graded:.1f}'} |")
    return [*lines, ""]


def _models(rows: list[Row]) -> list[str]:
    """Milliseconds of the original, and speeds over it."""
    lines = ["| row | original, ms | times as fast |", "| --- | ---: | --- |"]
    for row in rows:
        if isinstance(row.get("speedup"), dict) and row["speedup"]:
            told = ", ".join(f"{_cell(name)} {ratio:.2f}x" for name, ratio in row["speedup"].items())
            if "peak_gib" in row:
                told += "; peak GiB " + ", ".join(f"{_cell(name)} {gib}" for name, gib in row["peak_gib"].items())
            lines.append(f"| {row['row']} | {row['ms']['original']:.2f} | {told} |")
    for row in rows:
        if isinstance(row.get("speedup"), float):
            ms = row["ms"] if isinstance(row["ms"], dict) else {}
            base = f"{ms['original']:.2f}" if "original" in ms else ""
            lines.append(f"| {row['row']} | {base} | {row['speedup']:.2f}x |")
    return [*lines, ""]


def _texts(rows: list[Row]) -> list[str]:
    """Where tokens part from the original's, with the gap there."""
    lines = []
    for row in rows:
        for name, found in row.get("against_original", {}).items():
            lines.append(f"- {row['row']}, {_cell(name)}: {found['identical']} of {found['sequences']} sequences identical")
            for d in found["differences"]:
                exact = f", in float32 {d['gap_float32']:+.4f}" if "gap_float32" in d else ""
                lines.append(
                    f"  - sequence {d['sequence']} parts at token {d['token']}: top-2 gap {d['gap']:.4f}{exact}, bfloat16 resolves "
                    f"{d['resolution']:.4f}" + ("" if d["below"] else " (**above**)")
                )
    return [*lines, ""] if lines else []


def write() -> list[Path]:
    """The page and its pictures; pictures that no results stand behind go."""
    PAGE.write_text(page(), encoding="utf-8")
    drawn = [path for gpu, files in runs().items() for path in plots.save(rows_of(files), PICTURES, slug(gpu))]
    for path in PICTURES.glob("*.svg"):
        if path not in drawn:
            path.unlink()
    return [PAGE, *drawn]
