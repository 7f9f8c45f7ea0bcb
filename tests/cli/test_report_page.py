"""explain --html and --measure, from the command line."""

import json
import re

from kernelswap.cli import exits

PART = ("--only", "encoder.layer.0.*", "--device", "cpu")


def inside(page):
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_page_and_the_json_of_one_run_hold_the_same(call, warm_cache, minilm, tmp_path):
    argv = ("explain", minilm, *PART, "--cache", warm_cache, "--html", tmp_path / "a.html", "--json")
    data = json.loads(call(*argv).out)
    assert inside(tmp_path / "a.html") == data
    assert data["observed"] is None
    assert data["serving"] == data["swapped"] == 3


def test_measured_it_has_errors_times_and_shares_and_the_model_of_later_verbs_is_whole(call, warm_cache, minilm, tmp_path):
    argv = ("explain", minilm, *PART, "--cache", warm_cache, "--html", tmp_path / "a.html", "--measure", "--seconds", "0.3")
    done = call(*argv)
    assert "whole model" in done.out
    assert f"The report is in {tmp_path / 'a.html'}" in done.out
    data = inside(tmp_path / "a.html")
    assert [s["phase"] for s in data["observed"]["steps"]] == ["forward"]
    assert data["calls"]["encoder.layer.0.output.LayerNorm"] == 1
    assert {k["layer"] for k in data["kinds"] if k["share"]} == {"LayerNorm", "GeLU"}


def test_all_says_in_words_what_the_page_shows(call, warm_cache, minilm):
    out = call("explain", minilm, *PART, "--cache", warm_cache, "--all").out
    assert "this machine" in out
    assert "kernelswap/layers (torch" in out
    assert re.search(r"digest [0-9a-f]{64}", out)


def test_a_page_that_cannot_be_written_is_one_sentence(call, warm_cache, minilm, tmp_path):
    err = call("explain", minilm, *PART, "--cache", warm_cache, "--html", tmp_path / "no" / "a.html", code=exits.USAGE).err
    assert "cannot be written" in err
    assert "--html" in err


def test_a_choice_that_was_measured_is_asked_for_by_name(call, warm_cache, minilm):
    argv = ("explain", minilm, *PART, "--cache", warm_cache, "--json", "--choose")
    data = json.loads(call(*argv, "measured").out)
    assert all("measured" in o["inference"] for o in data["outcomes"] if o["swapped"])
    call(*argv, "luck", code=exits.USAGE)
