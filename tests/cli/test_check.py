"""check and verdicts: what is proved ahead of time is not proved again, and what is refused is the exit code."""

import json
import pathlib
import shutil

import pytest
import torch

from kernelswap import Swapper
from kernelswap.bench import checking, subject
from kernelswap.cli import exits
from kernelswap.proof.ledger import Ledger

LAYER_NORM = """
import torch
class LayerNorm(torch.nn.Module):
    def forward(self, input):
        out = torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        return {wrong}
"""
WHOLE = "out * 1.01 if input.numel() // input.shape[-1] == 1020 else out"  # rows of the text that comes with kernelswap
ONLY = ("--only", "LayerNorm", "--device", "cpu")


@pytest.fixture
def cache(warm_cache, tmp_path):
    """With the bundled kernels compiled, and no verdict."""
    shutil.copytree(warm_cache / "built", tmp_path / "own" / "built")
    return tmp_path / "own"


def own(make_repo, wrong):
    root = make_repo(
        "own", {"torch-cpu": {"code": "from . import layers", "files": {"layers.py": LAYER_NORM.format(wrong=wrong)}}}
    )
    return f"LayerNorm=dir://{root}:LayerNorm"


def start(minilm, cache):
    """A later start: the checks of its first calls, on real tensors."""
    loaded = subject.load(str(minilm))
    base = Swapper(cache=cache, offline=True)
    ledger = Ledger(base.prover)
    swapper = Swapper(cache=cache, offline=True, prover=ledger)
    with swapper.swap(loaded.model, only="LayerNorm", build="wait") as applied:
        loaded.forward()
        assert applied.calls is not None
    return [e for e in ledger.entries if e.tensors != "random"]


def test_what_was_checked_ahead_of_time_costs_a_later_start_nothing(call, cache, minilm):
    data = json.loads(call("check", minilm, *ONLY, "--cache", cache, "--json").out)
    assert data["refused"] == []
    assert data["ran"] > 0
    real = {c["tensors"] for c in data["checks"]} - {"random"}
    assert real == {"1 row", "2-16 rows", "17-256 rows", "over 256 rows"}, "a call of every size"
    assert all(c["accepted"] and c["key"] and c["error_kernel"] is not None for c in data["checks"])
    later = start(minilm, cache)
    assert len(later) == 13
    assert all(e.known for e in later)
    assert json.loads(call("check", minilm, *ONLY, "--cache", cache, "--json").out)["ran"] == 0
    assert json.loads(call("check", minilm, *ONLY, "--cache", cache, "--json", "--anew").out)["ran"] > 0


def test_without_it_the_same_start_does_check(cache, minilm):
    later = start(minilm, cache)
    assert sum(not e.known for e in later) >= 1


def test_training_checks_gradients_and_leaves_the_model_alone(call, cache, minilm):
    data = json.loads(call("check", minilm, *ONLY, "--cache", cache, "--json", "--training", "--prompt", "Hello there.").out)
    assert {(c["tensors"], c["mode"]) for c in data["checks"]} >= {("1 row", "training"), ("2-16 rows", "training")}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [("out * 1.01", "differs in output"), (WHOLE, "this call"), ("out.double()", "dtype")],
    ids=["everywhere", "on the model's own tensors only", "another dtype"],
)
def test_a_kernel_that_is_refused_is_named_with_its_error_and_ends_with_1(call, cache, minilm, make_repo, wrong, says):
    argv = ("check", minilm, *ONLY, "--cache", cache, "--use", own(make_repo, wrong))
    if wrong != WHOLE:
        argv = (*argv, "--prompt", "Hello.")
    done = call(*argv, code=exits.NO)
    assert "refused" in done.out
    assert "A kernel was refused at" in done.out
    data = json.loads(call(*argv, "--json", code=exits.NO).out)
    assert {r["layer"] for r in data["refused"]} == {"LayerNorm"}
    assert all(says in r["reason"] for r in data["refused"])
    if wrong == WHOLE:
        assert len(data["refused"]) == 13
        assert all("error" in r["reason"] and "limit" in r["reason"] for r in data["refused"])


def test_a_candidate_that_another_one_stands_in_for_is_no_refusal(cache):
    """Gemma's norm multiplies by 1 + weight: the proof refuses the first layer of the row, and takes the second."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )  # fmt: skip
    ids = torch.arange(20)[None]
    about = subject.Subject("gemma", Gemma2ForCausalLM(config).eval(), "causal", {"input_ids": ids})
    ledger = Ledger(Swapper(cache=cache, offline=True).prover)
    swapper = Swapper(cache=cache, offline=True, prover=ledger)
    found = checking.check(about, swapper.plan(about.model, only="RMSNorm", build="wait"), ledger, swapper.machine)
    assert {e.kernel.partition(":")[2] for e in found.entries if not e.verdict.accepted} == {"RMSNorm"}
    assert {e.kernel.partition(":")[2] for e in found.entries if e.verdict.accepted} == {"RMSNormZeroCentered"}
    assert found.refused == ()


@pytest.mark.parametrize("columns", [80, 200])
def test_it_fits_the_terminal(call, warm_cache, minilm, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = call("check", minilm, *ONLY, "--cache", warm_cache, "--prompt", "Hello.").out
    assert "kernelswap/layers:LayerNorm" in out
    assert "Nothing was refused." in out
    out += call("verdicts", "--cache", warm_cache).out
    assert max(len(line) for line in out.splitlines() if str(warm_cache) not in line) <= columns


# -- inputs ---------------------------------------------------------------------------------------------------------


def test_inputs_come_from_a_file_of_any_of_four_kinds(tmp_path, minilm):
    import numpy as np
    from safetensors.torch import save_file

    from kernelswap.bench.given import with_file

    about = subject.load(str(minilm))
    ids = torch.tensor([[101, 7592, 102]])
    (tmp_path / "a.json").write_text(json.dumps({"input_ids": ids.tolist()}))
    save_file({"input_ids": ids}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", input_ids=ids.numpy())
    torch.save({"input_ids": ids}, tmp_path / "a.pt")
    for suffix in ("json", "safetensors", "npz", "pt"):
        given = with_file(about, tmp_path / f"a.{suffix}")
        assert torch.equal(given.inputs["input_ids"], ids)
        assert given.forward().shape == (1, 3, 384)


class Bomb:
    def __reduce__(self):
        return (pathlib.Path.write_text, (pathlib.Path("/tmp/ran"), ""))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "x", "ends in none of"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "[1]", "no tensors by name"),
        ("a.json", '{"input_ids": ["a"]}', "a.json"),
        ("missing.json", None, "cannot be read"),
        ("a.safetensors", "x", "a.safetensors"),
        ("a.pt", "pickle", "holds more than tensors"),
    ],
)
def test_a_file_that_holds_no_tensors_is_one_sentence(call, tmp_path, minilm, name, text, says):
    if text == "pickle":
        torch.save({"input_ids": Bomb()}, tmp_path / name)
    elif text is not None:
        (tmp_path / name).write_text(text)
    err = call("check", minilm, "--inputs", tmp_path / name, code=exits.USAGE).err
    assert says in err
    assert "Traceback" not in err
    assert not pathlib.Path("/tmp/ran").exists()


def test_two_kinds_of_input_or_a_use_without_a_spec_are_said_before_anything_is_loaded(call, minilm):
    assert "Give one of them" in call("check", minilm, "--inputs", "a.json", "--prompt", "b", code=exits.USAGE).err
    assert "is not LAYER=SPEC" in call("check", minilm, "--use", "RMSNorm", code=exits.USAGE).err


# -- verdicts -------------------------------------------------------------------------------------------------------


def test_verdicts_can_be_read_taken_along_and_taken_over(call, cache, minilm, tmp_path):
    call("check", minilm, *ONLY, "--cache", cache, "--prompt", "Hello.", "--export", tmp_path / "v.json")
    listed = json.loads(call("verdicts", "--cache", cache, "--json").out)["verdicts"]
    taken = json.loads((tmp_path / "v.json").read_text())["verdicts"]
    assert {v["key"] for v in taken} == {v["key"] for v in listed}
    assert all(v["details"]["kernel"] == "kernelswap/layers:LayerNorm" for v in listed)
    assert {"random", "1 row", "2-16 rows"} <= {v["details"]["tensors"] for v in listed}
    assert all(torch.__version__ in v["details"]["machine"] for v in listed)
    text = call("verdicts", "*:LayerNorm", "--cache", cache).out
    assert "kernelswap/layers:LayerNorm" in text
    assert "0 verdicts" in call("verdicts", "*:RMSNorm", "--cache", cache).out

    other = tmp_path / "other"
    shutil.copytree(cache / "built", other / "built")
    assert json.loads(call("verdicts", "--cache", other, "--import", tmp_path / "v.json", "--json").out)["imported"] == len(taken)
    assert json.loads(call("check", minilm, *ONLY, "--cache", other, "--prompt", "Hello.", "--json").out)["ran"] == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 9}'])
def test_what_is_no_export_is_not_taken_over(call, cache, tmp_path, text):
    (tmp_path / "v.json").write_text(text)
    done = call(
        "verdicts", "--cache", cache, "--import", tmp_path / "v.json", code=exits.PUBLISHER if "format" in text else exits.USAGE
    )
    assert "Traceback" not in done.err
