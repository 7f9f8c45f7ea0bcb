"""One set of facts, in three forms: JSON, text, page."""

import json
import re

import pytest
import torch.nn as nn

from kernelswap import Swapper
from kernelswap.report import text
from kernelswap.report.facts import facts as collect
from kernelswap.types import Kept, Row, Site


def test_the_facts_are_plain_json(facts):
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_every_site_every_kind_every_kernel_every_module_is_there(measured, facts):
    about, applied, _ = measured
    assert [o["path"] for o in facts["outcomes"]] == [o.site.path for o in applied.outcomes]
    assert sum(k["count"] for k in facts["kinds"]) == len(facts["outcomes"])
    assert [m["path"] for m in facts["modules"]] == [path for path, _ in about.model.named_modules()]
    (kernel,) = facts["kernels"]
    assert set(kernel["layers"]) == {"RMSNorm", "SwiGLUMLP", "apply_rotary_pos_emb"}
    assert kernel["sites"] == facts["swapped"] == 13
    assert facts["serving"] == 9, "four are refused in the mode that they are in"
    assert sum(k["serving"] for k in facts["kinds"]) == 9
    assert len(kernel["digest"]) == 64
    assert facts["machine"]["backend"]
    assert facts["model"]["attention"] == "sdpa"


def test_what_real_tensors_refused_is_told_with_the_size_of_the_error(facts):
    assert {r["path"].rpartition(".")[2] for r in facts["refusals"]} == {"q_norm", "k_norm"}
    assert all("differs in output" in r["reason"] and "error" in r["reason"] for r in facts["refusals"])
    (kind,) = [k for k in facts["kinds"] if k["refused"]]
    assert (kind["count"], kind["serving"]) == (4, 0), "alike but for the numbers: one kind"
    refused = [o for o in facts["outcomes"] if o["path"].endswith("q_norm")]
    assert all(o["inference"]["implementation"] is None for o in refused)
    assert all(o["training"]["implementation"] is not None for o in refused), "which has not been seen to be wrong"


def test_errors_are_those_of_each_site_and_not_of_its_kind(facts):
    """On random tensors equal layers share a verdict; the run checks each on what it is given."""
    errors = [o["inference"]["verdict"]["error_original"] for o in facts["outcomes"] if o["layer"] == "SwiGLUMLP"]
    assert len(set(errors)) == len(errors) == 2


def test_shares_are_parts_of_a_whole(facts):
    shares = facts["observed"]["shares"]
    assert {s["phase"] for s in shares} == {"prefill", "decode"}
    assert all(0 < s["share"] <= 1 for s in shares)
    inner = [s for s in shares if s["phase"] == "prefill" and re.fullmatch(r"model\.layers\.\d", s["path"])]
    outer = next(s for s in shares if s["phase"] == "prefill" and s["path"] == "model")
    assert sum(s["share"] for s in inner) <= outer["share"] * 1.05
    assert any(s["name"] == "apply_rotary_pos_emb" and s["calls"] == 1 for s in shares), "functions are timed, too"


def test_times_are_by_kind_phase_and_shape(facts):
    speeds = facts["observed"]["speeds"]
    assert {s["shape"] for s in speeds if s["layer"] == "RMSNorm"} >= {"prefill", "decode", "1 row", "4096 rows"}
    assert {s["rows"] for s in speeds if s["shape"] == "128 rows"} == {128}
    for s in speeds:
        assert s["low"] <= s["speedup"] <= s["high"]
        assert (s["bytes"] is None) == (s["layer"] == "SwiGLUMLP" or s["shape"] in {"prefill", "decode"})
    assert facts["observed"]["bandwidth"] > 1e8


def test_calls_are_counted(facts):
    assert facts["calls"]["model.norm"] == 8  # tokens
    assert next(k for k in facts["kinds"] if k["layer"] == "SwiGLUMLP")["calls"] == 16


def test_a_run_leaves_the_model_as_it_was(measured):
    about, applied, _ = measured
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in about.model.modules())
    assert not any("forward" in vars(m) for m in about.model.modules())
    assert applied.explain()


# -- three forms, one content ---------------------------------------------------------------------------------------


def leaves(value, at=()):
    """Every number and every string, with the way to it."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*at, key))
    elif isinstance(value, list):
        for one in value:
            yield from leaves(one, at)
    elif value is not None and not isinstance(value, bool):
        yield at, value


def said(at, value):
    """How the text says it."""
    key = at[-1] if at else ""
    if key.startswith("error_"):
        return text.error(value)
    if key.startswith("seconds_"):
        from kernelswap import render

        return render.seconds(value)
    if key in {"share", "prefill", "decode"}:
        return text.share(value)
    if key in {"speedup", "low", "high"}:
        return f"{value:.2f}"
    if key == "bandwidth":
        return f"{value / 1e9:.1f} GB/s"
    if key == "parameters":
        return text.count(value)
    if key == "commit":
        return str(value)[:12]
    if key == "reason" and "verdict" in at:
        return value.partition(":")[0]  # its numbers are said beside it
    return str(value)


# What a person finds under another name, or need not: keys of verdicts and modules that are no site.
NOT_IN_WORDS = {"modules", "key", "details", "kind", "mode", "reads", "evidence", "backward", "compiles"}


def test_the_text_says_what_the_json_holds(measured, facts):
    _, applied, _ = measured
    words = applied.explain(long=True) + "\n" + text.sections(facts)
    missing = [
        (at, value)
        for at, value in leaves(facts)
        if not NOT_IN_WORDS & set(at) and at[-1:] not in {("id",), ("requirement",)} and said(at, value) not in words
    ]
    assert not missing
    evidence = [e["statement"] for k in facts["kernels"] for e in k["evidence"]]
    assert evidence
    assert all(e in words for e in evidence)


def test_the_page_holds_the_same_json(facts, page):
    data = re.search(r'<script type="application/json" id="facts">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    assert json.loads(data) == facts


def test_a_name_cannot_break_out_of_the_page(facts, page):
    assert "<script>alert" in facts["model"]["name"]
    assert "<script>alert" not in page.read_text()


def test_the_page_asks_nobody_for_anything(page):
    outside = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#|data:)([^"')\s>]+)""", page.read_text())
    assert not [address for address in outside if "//" in address]
    assert "http://" not in page.read_text()
    assert "https://" not in page.read_text()


# -- little to say --------------------------------------------------------------------------------------------------


def test_a_report_without_a_run_says_less_and_stands(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    swapper = Swapper(cache=tmp_path, table=(), offline=True)
    with swapper.swap(model) as applied:
        assert applied.report["observed"] is None
        assert applied.report["kinds"] == []
        page = applied.html(tmp_path / "empty.html").read_text()
    assert "This model has no sites." in page
    assert "<figure" not in page


def test_what_was_not_measured_is_null_and_a_number_that_is_none_is_a_word():
    site = Site("a", "module", "RMSNorm", "x.RMSNorm", "cpu", "torch.float32", False, Row("RMSNorm"))
    found = collect([Kept(site, "because")])
    assert found["calls"] is None
    assert found["machine"] is None
    assert found["kinds"][0] | {"error_kernel": None, "share": None, "calls": None} == found["kinds"][0]
    assert text.error(None) == "-"
    assert text.error("inf") == "inf"
    assert text.headline(found) == "Nothing is served by a kernel: all 1 sites keep the original."


def test_without_jinja_or_matplotlib_one_sentence_says_what_to_install(facts, monkeypatch):
    import sys

    from kernelswap.errors import MissingDependency
    from kernelswap.report.page import page

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"kernelswap\[cli\]"):
        page(facts)


def test_a_model_of_thousands_of_sites_has_a_page_of_bearable_size(facts):
    """A mixture of experts: the plot shows the worst and a sample; the table draws what is open."""
    from kernelswap.report import plots
    from kernelswap.report.page import page

    norm = next(o for o in facts["outcomes"] if o["path"] == "model.norm")
    many, worst = [], 1234
    for i in range(5000):
        verdict = {
            **norm["inference"]["verdict"],
            "error_original": 1e-7,
            "error_kernel": 3e-7 if i == worst else 1e-7 - i * 1e-13,
        }
        many.append({**norm, "path": f"experts.{i}", "inference": {**norm["inference"], "verdict": verdict}})
    wide, narrow = plots.both(plots.errors, {**facts, "outcomes": many}, "many")
    assert len(wide) + len(narrow) < 400_000
    assert f'data-site="{worst}"' in wide
    drawn = set(re.findall(r'data-site="(\d+)"', wide))
    assert 150 < len(drawn) <= plots.MOST
    assert drawn == set(re.findall(r'data-site="(\d+)"', narrow))
    big = {**facts, "outcomes": many, "kinds": [{**facts["kinds"][0], "count": 5000}]}
    assert "the worst among them" in page(big)


def test_what_was_replayed_is_said_in_words():
    graphs = {"recorded": 2, "held": 1, "replayed": 510, "bytes": 3 << 20, "not_replayed": {"labels is asked for": 7},
              "refused": {"it cannot be recorded: X": 1}, "renewed": {"weights were moved": 4}}  # fmt: skip
    found = collect([], graphs=graphs)
    words = text.sections(found)
    assert all(str(value) in words for _, value in leaves(found["graphs"]))
    assert all(why in words for name in ("not_replayed", "refused", "renewed") for why in graphs[name])


# -- the lock -------------------------------------------------------------------------------------------------------


def test_the_lock_that_there_would_be_names_every_build_that_serves(facts):
    (kernel,) = facts["kernels"]
    (locked,) = facts["lock"]["kernels"]
    assert (locked["commit"], locked["digest"], locked["variant"]) == (kernel["commit"], kernel["digest"], kernel["variant"])
    assert locked["matches"] is None
    assert not facts["lock"]["exists"]


def test_the_report_says_whether_the_lock_there_is_still_holds(measured, tmp_path):
    from dataclasses import replace

    from kernelswap import locking

    _, applied, _ = measured
    folder = tmp_path / "project"
    folder.mkdir()
    lock = locking.of_model(applied.outcomes)
    (entry,) = lock.entries
    (build,) = entry.builds
    says = [
        (lock, True, "as in the lock"),
        (replace(lock, entries=(replace(entry, commit="f" * 40),)), False, "the lock has commit ffffffffffff"),
        (
            replace(lock, entries=(replace(entry, builds=(replace(build, tree="0" * 64),)),)),
            False,
            f"the lock has digest {'0' * 64}",
        ),
        (replace(lock, entries=(replace(entry, builds=()),)), None, "as in the lock, which has no digest of this build"),
        (replace(lock, entries=()), False, "the lock does not name it"),
    ]
    assert f"A lock of what serves has 1 entry; there is no {folder / 'kernelswap.lock'}." in text.sections(
        applied.facts(lock=folder)
    )
    for there, matches, words in says:
        (folder / "kernelswap.lock").write_text(there.dumps())
        found = applied.facts(lock=folder)["lock"]
        assert (found["kernels"][0]["matches"], found["kernels"][0]["says"]) == (matches, words)
        said = text.sections(applied.facts(lock=folder))
        assert words in said
        assert ("says something else of 1 of 1 builds" in said) == (matches is False)
        page = applied.html(tmp_path / "page.html", lock=folder).read_text()
        assert words in page


def test_a_swap_that_writes_a_lock_is_reported_with_it(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    swapper = Swapper(cache=tmp_path / "cache", table=(), offline=True)
    with swapper.swap(model, lock=tmp_path) as applied:
        assert applied.report["lock"]["file"] == str(tmp_path / "kernelswap.lock")
        assert applied.report["lock"]["kernels"] == []
