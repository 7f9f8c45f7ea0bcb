"""docs/performance.md says what benchmarks/results holds, and its pictures are of those rows."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def performance(monkeypatch):
    """docs/performance.py, which finds benchmarks/ by itself."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    before, path = set(sys.modules), list(sys.path)
    yield importlib.import_module("performance")
    sys.path[:] = path
    for name in {"performance", "plots", "targets"} - before:
        sys.modules.pop(name, None)


def test_the_page_is_what_the_results_say(performance):
    assert (ROOT / "docs" / "performance.md").read_text(encoding="utf-8") == performance.page(), "run: python3 dev.py docs"


def test_every_picture_is_there_and_drawn_from_these_rows(performance):
    shown = set(re.findall(r"\]\((img/[^)]+)\)", performance.page()))
    assert shown
    assert {f"img/{path.name}" for path in (ROOT / "docs" / "img").iterdir()} == shown
    for gpu, files in performance.runs().items():
        drawn = performance.plots.drawable(performance.rows_of(files))
        for name, rows in zip(("kernels", "models"), drawn, strict=True):
            if rows:
                text = (ROOT / "docs" / "img" / f"{performance.slug(gpu)}-{name}.svg").read_text(encoding="utf-8")
                assert f"<!-- rows {performance.plots.digest(rows)} -->" in text, "run: python3 dev.py docs"


def test_the_page_says_which_configurations_were_measured(performance, tmp_path):
    row = {
        "row": "K1",
        "kernel": "rms_norm.forward",
        "bucket": "b",
        "shape": "16384x4096",
        "default": {"ROWS": 1},
        "complete": True,
        "tried": 31,
    }
    won = {**row, "config": {"ROWS": 2, "EVICT": ""}, "us": 64.1, "default_us": 66.4, "times": 1.0359, "noise": 0.002}
    lost = {**row, "row": "K8", "kernel": "decode", "shape": "1x32768", "config": None, "complete": False}
    (tmp_path / "tuning.json").write_text(json.dumps({"machine": {"gpu": "NVIDIA Made Up"}, "rows": [], "tuned": [lost, won]}))
    said = performance.page(tmp_path)
    assert "2 buckets of calls, in 1 of which" in said
    assert "| K1 | rms_norm.forward | 16384x4096 | 66.40 | 64.10 | 1.036 | 0.002 | 31 | ROWS 2, EVICT none |" in said
    assert "| K8 | decode | 1x32768 |  |  |  |  | 31, not all | the default |" in said


def test_the_page_has_every_target_and_says_who_was_faster(performance, tmp_path):
    rows = [
        {"kernel": "K1 RMSNorm fwd", "shape": "4096x4096", "floor_us": 87.0, "error": 1e-3, "us": {"kernelswap": 100.0, "Liger": 80.0},
         "tolerance": 4e-3, "out": {"QuACK": "wrong: relative error 2.0e-01"}},
    ]  # fmt: skip
    rows.append({"kernel": "H1 host cost", "us": {"RMSNorm": 7.25, "RMSNorm with grad": 16.0, "eager RMSNorm": 60.0}})
    more = [
        {"row": "0.6b prefill 1x16", "ms": {"original": 20.0, "swapped": 10.0}, "speedup": {"swapped": 2.0, "Liger": 0.5}},
        {"row": "0.6b static batch 1 in generate()", "ms": {"original": 20.0, "graphs": 2.0}, "speedup": 10.0},
        {"row": "0.6b greedy", "against_original": {"swapped": {"sequences": 2, "identical": 1, "differences": [
            {"sequence": 1, "token": 7, "gap": 0.5, "resolution": 0.03, "below": False}]}}},
    ]  # fmt: skip
    machine = {"gpu": "NVIDIA Made Up", "torch": "2.11", "python": "3.12"}
    for name, some in (("kernels", rows), ("model", more)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine, "rows": some}))
    (tmp_path / "cpu.json").write_text(json.dumps({"machine": "a CPU", "rows": []}))
    said = performance.page(tmp_path)
    assert "## NVIDIA Made Up" in said
    assert "| K1 | RMSNorm forward, 4096x4096: 0.87 | 0.870 | met |" in said
    assert said.count("| not measured |") == len(performance.targets.TARGETS) - 5
    assert "| RMSNorm | 7.2 | 16.0 |" in said
    assert "| eager RMSNorm | 60.0 |  |" in said
    assert "- K1 RMSNorm fwd, 4096x4096: Liger by 25%" in said
    assert "QuACK took no part (wrong: relative error 2.0e-01)" in said
    assert "| 0.6b prefill 1x16 | 20.00 | swapped 2.00x, Liger 0.50x |" in said
    assert "| 0.6b static batch 1 in generate() | 20.00 | 10.00x |" in said
    assert "sequence 1 parts at token 7: top-2 gap 0.5000, bfloat16 resolves 0.0300 (**above**)" in said
    assert "a CPU" not in said


@pytest.mark.slow
def test_the_pictures_are_drawn_for_light_and_dark(performance, tmp_path, browser):
    rows = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200-kernels.json").read_text())["rows"]
    rows += [{"row": "a", "ms": {}, "speedup": {"swapped": 1.5}}]
    drawn = performance.plots.save(rows, tmp_path, "x")
    assert [path.name for path in drawn] == ["x-kernels.svg", "x-models.svg"]
    for scheme, ink in (("light", "rgb(36, 41, 47)"), ("dark", "rgb(230, 237, 243)")):
        page = browser.new_page(color_scheme=scheme)
        for path in drawn:
            page.goto(path.as_uri())
            inks = "[...document.querySelectorAll('g[id^=text_] g')].map(g => getComputedStyle(g).fill)"
            assert set(page.evaluate(inks)) == {ink}, (scheme, path.name)
        page.close()
