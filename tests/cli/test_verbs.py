"""find, load, verify, build, explain, doctor: what they say is so, as text and as JSON."""

import json
import pathlib
import shutil

import pytest

from kernelswap import machine
from kernelswap.cli import exits, health
from kernelswap.types import Candidate, Judged, Requirement, Resolution, Row, Use

CODE = """
import torch
from . import layers

def double(x, times=2):
    return x * times
"""
LAYERS = """
import torch
class Twice(torch.nn.Module):
    def forward(self, x):
        return x * 2
"""


@pytest.fixture
def repo(make_repo, elsewhere):
    return make_repo(
        "demo",
        {
            "torch-cpu": {"code": CODE, "files": {"layers.py": LAYERS}},
            "torch-cuda": {"code": CODE},
            "torch29-cxx11-cu128-x86_64-linux": {"code": CODE},
        },
    )


# -- find ---------------------------------------------------------------------------------------------------------


def test_find_shows_every_build_with_its_reason(call, repo):
    text = call("find", f"dir://{repo}").out
    assert "* torch-cpu" in text
    assert "- torch-cuda" in text
    assert "- torch29-cxx11-cu128-x86_64-linux" in text
    data = json.loads(call("find", f"dir://{repo}", "--json").out)
    assert data["chosen"]["variant"] == "torch-cpu"
    assert [c["rejected"] is None for c in data["candidates"]].count(True) == 1


def test_find_answers_for_another_machine(call, repo):
    data = json.loads(
        call("find", f"dir://{repo}", "--json", "--machine", "torch=2.9,cuda=12.8,sm=90,cpu=x86_64,os=linux,cxx11=1").out
    )
    assert data["chosen"]["variant"] == "torch29-cxx11-cu128-x86_64-linux"


@pytest.mark.parametrize("columns", [80, 200])
def test_find_and_explain_fit_the_terminal(call, repo, warm_cache, monkeypatch, columns, minilm):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = call("find", f"dir://{repo}").out.splitlines()[1:]
    lines += call("explain", minilm, "--cache", warm_cache, "--device", "cpu").out.splitlines()
    assert max(map(len, lines)) <= columns


def test_find_ends_with_1_when_no_build_fits(call, make_repo):
    root = make_repo("gpu-only", {"torch-rocm": "x = 1"})
    assert "none of 1 builds fits" in call("find", f"dir://{root}", code=exits.NO).out


def test_find_points_at_the_character_that_is_wrong(call):
    err = call("find", "org/repo@>=1,<<2", code=exits.USAGE).err.splitlines()
    assert [err[0][:6], err[1][:6], err[-1][:6]] == ["asked:", "found:", "next: "]
    caret = next(i for i, line in enumerate(err) if set(line.strip()) == {"^"})
    assert err[caret - 1][err[caret].index("^") :].startswith("<<2")


def test_find_says_that_the_hub_does_not_answer(call):
    said = json.loads(call("find", "org/repo@1", "--json", code=exits.NETWORK).out)["error"]
    assert (said["type"], said["fault"]) == ("Unreachable", "network")


def test_offline_is_its_own_answer(call):
    said = json.loads(call("find", "org/repo@1", "--offline", "--json", code=exits.NETWORK).out)["error"]
    assert said["type"] == "NotCached"


# -- load and verify ----------------------------------------------------------------------------------------------


def test_load_lists_names_layers_and_evidence(call, repo):
    data = json.loads(call("load", f"dir://{repo}", "--json").out)
    assert data["names"] == {"double": "(x, times=2)"}
    assert data["layers"] == {"Twice": "(self, x)"}
    assert {e["verifier"] for e in data["evidence"]} >= {"contents", "digest"}
    text = call("load", f"dir://{repo}").out
    assert "double(x, times=2)" in text
    assert data["path"] in text


def test_a_layer_that_a_kernel_does_not_have_is_an_error_that_names_those_it_has(call, repo):
    assert "Twice" in call("load", f"dir://{repo}:Twice").out
    assert "double" in call("load", f"dir://{repo}:double").out
    err = call("load", f"dir://{repo}:Twce", code=exits.USAGE).err
    assert "it has no layer Twce; it offers Twice, double" in err
    assert "Did you mean Twice?" in err


def test_a_kernel_that_is_not_on_a_hub_has_no_versions_to_list(call):
    err = call("versions", "kernelswap/layers", code=exits.USAGE).err
    assert "only kernels on a hub have versions" in err
    assert "kernelswap find kernelswap/layers" in err


def test_load_of_a_kernel_that_raises_is_the_kernel_s_fault(call, make_repo):
    root = make_repo("bad", {"torch-cpu": "raise RuntimeError('mine')"})
    err = call("load", f"dir://{root}", code=exits.KERNEL).err
    assert "mine" in err
    assert "Traceback" not in err


def test_load_of_files_that_differ_from_their_digest_is_refused(call, repo):
    (repo / "build" / "torch-cpu" / "layers.py").write_text("x = 1")
    assert "layers.py" in call("load", f"dir://{repo}", code=exits.PUBLISHER).err


def test_verify_names_every_file_that_changed_since(call, repo):
    path = pathlib.Path(json.loads(call("load", f"dir://{repo}", "--json").out)["path"])
    assert json.loads(call("verify", "--json").out)["wrong"] == 0
    assert "1 of 1 intact" in call("verify").out
    for file in (path, path / "layers.py"):
        file.chmod(0o755)
    (path / "layers.py").write_text("import os")
    (path / "more.py").write_text("")
    data = json.loads(call("verify", "--json", code=exits.NO).out)
    assert data["wrong"] == 1
    assert "layers.py" in data["artifacts"][0]["wrong"]
    assert "more.py" in data["artifacts"][0]["wrong"]
    assert "WRONG" in call("verify", code=exits.NO).out


def test_verify_of_one_kernel_leaves_the_others_alone(call, repo, make_repo):
    other = make_repo("other", {"torch-cpu": "x = 1"})
    for root in (repo, other):
        call("load", f"dir://{root}")
    assert len(json.loads(call("verify", "--json").out)["artifacts"]) == 2
    assert len(json.loads(call("verify", f"dir://{other}", "--json").out)["artifacts"]) == 1
    assert "no build of" in call("verify", "dir:///nowhere", code=exits.USAGE).err


# -- build --------------------------------------------------------------------------------------------------------


def test_build_compiles_a_directory_and_says_where(call, tmp_path):
    from tests.kernels import NATIVE

    root = tmp_path / "native"
    shutil.copytree(NATIVE, root)
    data = json.loads(call("build", root, "--into", tmp_path / "into", "--json").out)
    (built,) = data["built"]
    assert pathlib.Path(built["path"]).is_relative_to(tmp_path / "into")
    assert (pathlib.Path(built["path"]) / "metadata.json").is_file()


def test_what_is_compiled_is_not_compiled_again(call, tmp_path):
    from tests.kernels import NATIVE

    argv = ("build", NATIVE, "--into", tmp_path / "into", "--json")
    (first,) = json.loads(call(*argv).out)["built"]
    made = (pathlib.Path(first["path"]) / "metadata.json").stat().st_mtime_ns
    (second,) = json.loads(call(*argv).out)["built"]
    assert second == first
    assert (pathlib.Path(second["path"]) / "metadata.json").stat().st_mtime_ns == made


def test_build_without_a_directory_is_about_the_bundled_kernels(call, warm_cache):
    data = json.loads(call("build", "--cache", warm_cache, "--json").out)
    assert [pathlib.Path(b["path"]).is_relative_to(warm_cache / "built" / "layers") for b in data["built"]] == [True]


def test_build_of_a_directory_without_sources_is_one_sentence(call, tmp_path):
    assert "no build.toml" in call("build", tmp_path, code=exits.MACHINE).err
    assert "there is no directory" in call("build", tmp_path / "nowhere", code=exits.MACHINE).err


# -- explain ------------------------------------------------------------------------------------------------------


def test_explain_says_what_would_serve_a_trained_encoder(call, warm_cache, minilm):
    data = json.loads(call("explain", minilm, "--cache", warm_cache, "--json", "--device", "cpu").out)
    norms = [s for s in data["outcomes"] if s["layer"] == "LayerNorm"]
    assert len(norms) == 13
    assert all(s["swapped"] for s in norms)
    text = call("explain", minilm, "--cache", warm_cache, "--device", "cpu").out
    assert "13" in text
    assert "LayerNorm" in text


def test_explain_all_names_every_module(call, warm_cache, minilm):
    text = call("explain", minilm, "--cache", warm_cache, "--all", "--only", "encoder.layer.3.*").out
    assert "encoder.layer.3.attention.output.LayerNorm" in text
    assert "skipped by you" in text
    assert "chosen as candidate 1 of" in text or "chosen as the only candidate" in text
    assert "build torch-cuda not taken: built for cuda, this is cpu" in text


def test_explain_as_json_says_everything_of_each_module(call, warm_cache, minilm):
    sites = json.loads(call("explain", minilm, "--cache", warm_cache, "--json", "--device", "cpu").out)["outcomes"]
    norm = next(s for s in sites if s["path"] == "encoder.layer.3.attention.output.LayerNorm")
    now = norm[norm["mode"]]
    kernel = now["implementation"]
    assert norm["active"] == f"kernelswap/layers:LayerNorm ({kernel['variant']})"
    assert (norm["device"], norm["mode"], kernel["source"], kernel["name"]) == ("cpu", "inference", "bundled", "layers")
    assert kernel["commit"].startswith("local-")
    assert len(kernel["digest"]) == 64
    assert kernel["other_builds"] == [{"variant": "torch-cuda", "why": "built for cuda, this is cpu"}]
    assert kernel["variant"] in now["why"]
    assert now["verdict"]["accepted"]
    assert {"passed", "not_tried"} <= now.keys()
    assert {s["active"] for s in sites if not s["swapped"]} <= {"the original"}


def test_explain_writes_a_bill_of_materials(call, warm_cache, tmp_path, minilm):
    call("explain", minilm, "--cache", warm_cache, "--device", "cpu", "--sbom", tmp_path / "bill.json")
    (component,) = json.loads((tmp_path / "bill.json").read_text())["components"]
    assert len(component["evidence"]["occurrences"]) >= 13
    err = call("explain", minilm, "--cache", warm_cache, "--skip", "*", "--sbom", tmp_path, code=exits.USAGE).err
    assert "cannot be written" in err


def test_explain_ends_with_1_when_nothing_would_be_swapped(call, warm_cache, minilm):
    call("explain", minilm, "--cache", warm_cache, "--skip", "*", code=exits.NO)


def test_a_device_that_is_not_here_is_one_sentence(call, minilm):
    err = call("explain", minilm, "--device", "warp9", code=exits.USAGE).err
    assert "torch cannot use 'warp9' here" in err


# -- doctor -------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_here_and_what_would_load(call, warm_cache):
    data = json.loads(call("doctor", "--cache", warm_cache, "--json").out)
    assert {line["name"] for line in data["tools"]} == {"driver", "compiler", "kernels", "hub cache", "hub", "tuning"}
    hub = next(line for line in data["tools"] if line["name"] == "hub")
    assert hub["ok"] is False
    kernels = {line["name"]: line for line in data["kernels"]}
    assert kernels["kernelswap/layers"]["ok"] is True
    assert all(line["value"] for line in data["kernels"])
    assert "KERNELSWAP_CACHE" in {line["name"] for line in data["environment"]}


def test_doctor_says_of_kernels_that_are_named_whether_they_would_load(call, hub, repo, monkeypatch, warm_cache):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    asked = {"kernelswap/attention": True, "kernelswap/loss": True, f"dir://{repo}": True, "org/none@2": False}
    data = json.loads(call("doctor", f"dir://{repo}:Twice", "org/none@2:Layer", "--cache", warm_cache, "--json").out)
    kernels = {line["name"]: line for line in data["kernels"]}
    assert {name: kernels[name]["ok"] for name in asked} == asked
    assert "torch-cpu would load" in kernels[f"dir://{repo}"]["value"]
    assert "no such kernel repository" in kernels["org/none@2"]["value"]
    assert "org/" in call("doctor", "org/", "--cache", warm_cache, code=exits.USAGE).err


def test_doctor_fits_80_columns(call, warm_cache):
    lines = call("doctor", "--cache", warm_cache, "--offline").out.splitlines()
    table = lines[lines.index("versions") :]
    assert max(map(len, table)) <= 80


def test_doctor_asks_the_hub_that_is_configured(call, hub, monkeypatch, warm_cache):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    data = json.loads(call("doctor", "--cache", warm_cache, "--json").out)
    line = next(line for line in data["tools"] if line["name"] == "hub")
    assert line["ok"] is True
    assert hub.url in line["value"]


def test_doctor_never_shows_a_token(call, monkeypatch, warm_cache):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    done = call("doctor", "--cache", warm_cache, "--json", "--offline")
    assert "hf_secret" not in done.out + done.err
    assert {"name": "HF_TOKEN", "value": "set", "ok": None} in json.loads(done.out)["environment"]


def test_a_hub_that_never_answers_is_not_waited_for():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        line = health.hub(f"http://127.0.0.1:{silent.getsockname()[1]}", offline=False, seconds=0.3)
    assert line.ok is False
    assert "no answer within 0.3 s" in line.value


def test_without_a_compiler_the_bundled_kernels_cannot_run():
    note = "layers has sources that are not compiled on this machine yet"
    here = machine.look()

    def find(name):
        candidate = Candidate(Requirement("layers", "bundled"), "bundled", "layers", "local-1", "torch-cuda")
        return Resolution(candidate.requirement, here, (Judged(candidate, "built for cuda"),), notes=(note,))

    row = Row("RMSNorm", use=(Use("kernelswap/layers:RMSNorm"),))
    given = {"rows": [row], "machine": here, "find": find, "misfit": lambda *_: None, "hub_down": True, "seconds": 5.0}
    (with_one,) = health.kernels(**given, compiles=True)
    (without,) = health.kernels(**given, compiles=False)
    assert with_one.ok is None
    assert without.ok is False
    assert note in with_one.value
    assert "no C++ compiler" in without.value
