"""The benchmarks of whole models run, at a size that says nothing, where there is no GPU; and greedy text is judged by its gaps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """Modules of benchmarks/, which import each other by their bare names."""
    import importlib

    sys.path.insert(0, str(BENCHMARKS))
    before = set(sys.modules)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in set(sys.modules) - before:
            if (BENCHMARKS / f"{name}.py").is_file():
                del sys.modules[name]


def script(name, *argv, timeout=280):
    return subprocess.run(
        [sys.executable, BENCHMARKS / name, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the size for machines without a GPU")
def test_every_row_of_the_whole_model_can_be_measured(tmp_path):
    out = tmp_path / "model.json"
    done = script(
        "gpu_model.py", out, "tiny", "--attention", "--only", "accuracy,prefill,decode,training,tokens,generate,train200"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["row"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == [
        "losses over training steps on text", "tiny logits error against float32", "tiny prefill 1x16", "tiny prefill 2x24", "tiny decode step batch 2",
        "tiny generate new lengths batch 2", "tiny greedy 24 tokens batch 2", "tiny training step 2x24",
    ]  # fmt: skip
    assert set(rows["tiny training step 2x24"]["losses"]) == {"original", "swapped", "swapped+attention", "swapped+loss"}
    losses = rows["losses over training steps on text"]
    assert losses["within_seeds"]
    assert all(run[-1] < run[0] - 0.1 for run in losses["losses"].values())
    assert set(rows["tiny prefill 1x16"]["speedup"]) == {"swapped", "swapped+attention"}
    assert rows["tiny greedy 24 tokens batch 2"]["against_original"]["swapped"]["sequences"] == 2
    kept = script("gpu_model.py", out, "tiny", "--only", "accuracy", "--add")
    assert kept.returncode == 0, kept.stderr
    assert {row["row"] for row in json.loads(out.read_text())["rows"]} == set(rows)


@pytest.mark.parametrize(
    ("argv", "said"),
    [(("--attenton",), "--attenton: not known here"), (("--only", "prefil"), "the parts are accuracy"), (("8b",), "needs an NVIDIA GPU")],
)  # fmt: skip
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_a_wrong_word_or_no_gpu_is_one_line(argv, said):
    done = script("gpu_model.py", *argv)
    assert done.returncode != 0
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def small():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        vocab_size=256,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def test_text_that_departs_is_shown_with_the_gap_where_it_does(scripts):
    import copy

    compare = scripts("gpu_generate").compare
    original, wrong = small(), small()
    with torch.no_grad():
        wrong.model.layers[1].mlp.down_proj.weight.mul_(-1)
    prompts = torch.randint(0, 255, (3, 8))
    found = compare({"original": original, "same": copy.deepcopy(original), "wrong": wrong}, prompts, 16, original)
    assert found["same"] == {"sequences": 3, "identical": 3, "tokens_equal": 1.0, "differences": []}
    differences = found["wrong"]["differences"]
    assert {d["sequence"] for d in differences} == {0, 1, 2}
    assert not all(d["below"] for d in differences)
    for d in differences:
        assert d["gap"] == pytest.approx(d["gap_float32"], abs=1e-4)  # the original is its own float32
        assert d["below"] == (d["gap"] <= d["resolution"])


@pytest.mark.parametrize("logit", [0.7, 1.0, 5.3, -5.3, 1000.0])
def test_the_resolution_is_the_distance_to_the_next_bfloat16(scripts, logit):
    here = torch.tensor(abs(logit), dtype=torch.float32).bfloat16()
    lower = here.view(torch.int16) & ~0x7F  # the power of two below, where the same distance holds
    following = (lower + 1).view(torch.bfloat16)
    assert scripts("gpu_generate").resolution(logit) == (following.float() - lower.view(torch.bfloat16).float()).item()
