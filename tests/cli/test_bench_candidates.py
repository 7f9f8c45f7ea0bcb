"""What `kernelswap bench` races besides the table: attention, kernels of a hub over HTTP, and a kernel that the user names."""

import json

import pytest
from tests import small
from tests.cli.test_demo import environment, run
from tests.hub import kernel_files
from tests.swapping import LAYERS

from kernelswap.bench import subject

SLOWER = (
    LAYERS
    + """

class Wasteful(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        for _ in range(20):
            out = RMSNorm.forward(self, hidden_states)
        return out
"""
)
FLASH = """
import torch


def flash_attn_func(q, k, v, softmax_scale=None, causal=False):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    for _ in range(20):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    size = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return small.checkpoint(tmp_path_factory.mktemp("checkpoint"), subject.tokenizer(), **size)


def bench(checkpoint, where, cache, *more, **environ):
    argv = ("-m", "kernelswap", "bench", checkpoint, "--device", "cpu", "--threads", "1", "--no-compile", "--no-train", *more)
    return run(*argv, env=environment(cache, where, OMP_NUM_THREADS="1", **environ), cwd=where)


def race(data, layer):
    return next(r for r in data["candidates"] if r["layer"] == layer)


@pytest.mark.slow
def test_attention_is_raced_by_the_form_of_the_call_and_each_form_is_a_line(checkpoint, warm_cache, tmp_path):
    process = bench(checkpoint, tmp_path, warm_cache, "--attention", "--time-budget", "30", "--json", "--out", "a.json")
    assert process.returncode == 0, process.stderr
    found = race(json.loads(process.stdout), "attention")
    assert {"1 token, cache to 1024", "prompts to 64"} <= {lap["size"] for lap in found["laps"]}
    assert {lap["candidate"] for lap in found["laps"]} == {"kernelswap/attention:flash_attn_forward"}
    assert ["installed://flash-attn:flash_attn_func", "is for cuda, this is cpu"] in found["passed"]
    for size, serves, times in found["serves"]:
        won = {lap["candidate"] for lap in found["laps"] if lap["size"] == size and lap["wins"]}
        assert times is None or serves in won, "what nobody measured is as the table has it"
    process = bench(checkpoint, tmp_path, warm_cache, "--attention", "--time-budget", "3")
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    (line,) = [one for one in lines if one.strip().startswith("1 token, cache to 1024")]
    assert line.count("x") == 1
    assert line.count("*") == 1, "what serves it"


@pytest.mark.slow
def test_kernels_of_a_hub_are_fetched_under_its_rules_raced_and_named_in_the_report(checkpoint, hub, tmp_path, warm_cache):
    files = {"layers.py": SLOWER}
    hub.organization("org", trusted=True)
    hub.organization("stranger", trusted=False)
    hub.repo("org/norm").branch("v1", kernel_files("torch-cpu", "from . import layers", name="norm", files=files))
    hub.repo("org/flash").branch("v1", kernel_files("torch-cpu", FLASH, name="flash"))
    hub.repo("stranger/norm").branch("v1", kernel_files("torch-cpu", "from . import layers", name="norm", files=files))
    at = {"HF_ENDPOINT": hub.url}
    use = ("--use", "RMSNorm=org/norm@1:Wasteful", "--use", "attention=org/flash@1:flash_attn_func")
    process = bench(checkpoint, tmp_path, warm_cache, *use, "--time-budget", "40", "--json", **at)
    assert process.returncode == 0, process.stderr
    data = json.loads(process.stdout)
    norm = race(data, "RMSNorm")
    theirs = [lap for lap in norm["laps"] if lap["candidate"] == "org/norm@1:Wasteful"]
    assert theirs
    assert not any(lap["wins"] for lap in theirs), "it takes twenty times as long"
    assert {lap["candidate"] for lap in norm["laps"]} > {"org/norm@1:Wasteful"}, "the bundled one takes part, too"
    assert "org/norm@1:Wasteful" not in {serves for _, serves, times in norm["serves"] if times is not None}
    flash = [lap for lap in race(data, "attention")["laps"] if lap["candidate"] == "org/flash@1:flash_attn_func"]
    assert any(lap["speedup"] is not None for lap in flash)
    assert not any(lap["wins"] for lap in flash)
    assert any("/api/" in path for path in map(str, hub.requests()))
    process = bench(checkpoint, tmp_path, warm_cache, "--use", "RMSNorm=stranger/norm@1:RMSNorm", "--time-budget", "3", **at)
    assert process.returncode != 0
    assert "stranger" in process.stderr
    assert "trust" in process.stderr
    assert "Traceback" not in process.stderr
