"""plan: another machine, answered without being there."""

import json

import pytest
import torch
from tests import small
from tests.fusion import make
from tests.hub import kernel_files

from kernelswap.bench import subject
from kernelswap.cli import exits

HERE = f"torch={'.'.join(torch.__version__.split('.')[:2])}"
CUDA = f"{HERE},cuda=12.8,sm=90,os=linux,cpu=x86_64,cxx11=1"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A directory that Transformers loads, of the architecture that the GPU kernels are for."""
    return small.checkpoint(
        tmp_path_factory.mktemp("qwen"), subject.tokenizer(), hidden_size=64, intermediate_size=96, head_dim=16
    )


def by_layer(data):
    return {site["layer"]: site for site in data["sites"]}


def test_what_only_the_cpu_has_is_lost_on_a_gpu(call, warm_cache, minilm):
    done = call("plan", minilm, "--machine", CUDA, "--cache", warm_cache, code=exits.NO)
    assert "lost" in done.out
    data = json.loads(call("plan", minilm, "--machine", CUDA, "--cache", warm_cache, "--json", code=exits.NO).out)
    assert (data["served_here"], data["served_there"], data["lost"]) == (19, 0, 19)
    norm = by_layer(data)["LayerNorm"]
    assert norm["here"] == "kernelswap/layers:LayerNorm"
    assert norm["there"] is None
    assert norm["why"]
    assert any("is for cpu" in p["why"] for p in norm["passed"])


def test_what_the_gpu_has_is_served_there_by_another_build(call, warm_cache, qwen):
    data = json.loads(call("plan", qwen, "--machine", CUDA, "--cache", warm_cache, "--json").out)
    sites = by_layer(data)
    assert sites["RMSNorm"]["here"] == sites["RMSNorm"]["there"] == "kernelswap/layers:RMSNorm"
    assert sites["RMSNorm"]["build"] == "torch-cuda"
    assert data["lost"] == 0
    assert data["device"] == "cuda:0"
    text = call("plan", qwen, "--machine", CUDA, "--cache", warm_cache).out
    assert "there: linux x86_64, torch" in text
    assert "sm90" in text


def test_statements_that_are_fused_on_a_gpu_alone_are_proved_here_and_gained_there(call, warm_cache, qwen):
    data = json.loads(call("plan", qwen, "--machine", CUDA, "--cache", warm_cache, "--json").out)
    sites = by_layer(data)
    for layer in ("residual_norm", "norm_rotary"):
        assert sites[layer]["here"] is None
        assert (sites[layer]["there"], sites[layer]["build"]) == (f"kernelswap/layers:{layer}", "torch-cuda")
    assert data["gained"] == sum(site["layer"] in {"residual_norm", "norm_rotary"} for site in data["sites"])


def test_of_statements_the_kernel_for_the_norm_that_they_have_is_forecast(call, warm_cache, tmp_path):
    words = subject.tokenizer()
    make("gemma3_text", vocab_size=len(words)).save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    sites = by_layer(json.loads(call("plan", tmp_path, "--machine", CUDA, "--cache", warm_cache, "--json").out))
    assert sites["residual_norm"]["there"] == "kernelswap/layers:residual_norm_zero_centered"
    assert sites["norm_rotary"]["there"] == "kernelswap/layers:norm_rotary_zero_centered"


@pytest.mark.parametrize(
    ("more", "lost"),
    [(["--skip", "rotary_pos_emb"], {"norm_rotary"}), (["--skip", "RMSNorm"], {"residual_norm", "norm_rotary"})],
    ids=["rotary", "norms"],
)
def test_statements_are_left_alone_there_where_what_they_call_is(call, warm_cache, qwen, more, lost):
    sites = by_layer(json.loads(call("plan", qwen, "--machine", CUDA, "--cache", warm_cache, "--json", *more).out))
    for layer in ("residual_norm", "norm_rotary"):
        assert (sites[layer]["there"] is None) == (layer in lost)
        assert layer not in lost or "would be left as it is: skipped by you" in sites[layer]["why"]


def test_on_another_cpu_no_statements_are_fused_and_nothing_is_lost_by_it(call, warm_cache, qwen):
    data = json.loads(call("plan", qwen, "--machine", "torch=2.14", "--cache", warm_cache, "--json").out)
    assert by_layer(data)["norm_rotary"]["there"] is None
    assert data["lost"] == 0


def test_a_newer_torch_compiles_the_same_sources_there(call, warm_cache, minilm):
    data = json.loads(call("plan", minilm, "--machine", "torch=2.14", "--cache", warm_cache, "--json").out)
    assert data["lost"] == 0
    assert by_layer(data)["LayerNorm"]["build"].startswith("compiled there")


def test_a_torch_that_is_too_old_loses_them_with_that_reason(call, warm_cache, minilm):
    data = json.loads(call("plan", minilm, "--machine", "torch=2.4", "--cache", warm_cache, "--json", code=exits.NO).out)
    assert data["lost"] == 19
    assert "2.4" in by_layer(data)["LayerNorm"]["why"]


LAYER = "import torch\nclass LayerNorm(torch.nn.Module):\n    def forward(self, input):\n        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)\n"
CUBIN = "torch29-cxx11-cu128-x86_64-linux"
PLACE = f"{CUDA.replace(HERE, 'torch=2.9')}"


def test_a_kernel_of_ones_own_is_served_by_the_build_for_there_and_its_layers_are_looked_up(call, warm_cache, minilm, make_repo):
    files = {"code": "from . import layers", "files": {"layers.py": LAYER}}
    other = {"code": "from . import layers", "files": {"layers.py": LAYER.replace("class LayerNorm", "class Other")}}
    root = make_repo("own", {"torch-cpu": files, CUBIN: files})
    lacking = make_repo("lacking", {"torch-cpu": files, CUBIN: other})
    argv = ("plan", minilm, "--machine", PLACE, "--cache", warm_cache, "--only", "LayerNorm", "--json", "--use")
    data = json.loads(call(*argv, f"LayerNorm=dir://{root}:LayerNorm").out)
    assert by_layer(data)["LayerNorm"]["build"] == CUBIN
    data = json.loads(call(*argv, f"LayerNorm=dir://{lacking}:LayerNorm", code=exits.NO).out)
    assert f"its build {CUBIN} has no layer LayerNorm" in by_layer(data)["LayerNorm"]["why"]


def test_no_code_of_a_kernel_for_there_runs(call, warm_cache, minilm, make_repo, tmp_path):
    good = {"code": "from . import layers", "files": {"layers.py": LAYER}}
    loud = {
        "code": f"open({str(tmp_path / 'ran')!r}, 'w')",
        "files": {"layers.py": f"open({str(tmp_path / 'ran')!r}, 'w')\n{LAYER}"},
    }
    root = make_repo("loud", {"torch-cpu": good, CUBIN: loud})
    argv = ("plan", minilm, "--machine", PLACE, "--cache", warm_cache, "--only", "LayerNorm", "--use")
    call(*argv, f"LayerNorm=dir://{root}:LayerNorm")
    assert not (tmp_path / "ran").exists()


def test_offline_there_only_what_was_fetched_counts(call, hub, warm_cache, minilm, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.organization("org", trusted=True)
    repo = hub.repo("org/norms")
    files = {}
    for variant in ("torch-cpu", CUBIN):
        files |= kernel_files(variant, "from . import layers", name="norms", files={"layers.py": LAYER})
    repo.branch("v1", files=files)
    argv = ("plan", minilm, "--cache", warm_cache, "--only", "LayerNorm", "--use", "LayerNorm=org/norms@1:LayerNorm", "--json")
    data = json.loads(call(*argv, "--machine", PLACE + ",offline", code=exits.NO).out)
    assert data["lost"] == 13
    assert by_layer(data)["LayerNorm"]["here"] == "org/norms:LayerNorm"
    assert by_layer(data)["LayerNorm"]["passed"][0]["spec"] == "org/norms@1:LayerNorm"
    data = json.loads(call(*argv, "--machine", PLACE).out)
    assert by_layer(data)["LayerNorm"]["build"] == CUBIN


@pytest.mark.parametrize("columns", [80, 200])
def test_it_fits_the_terminal(call, warm_cache, minilm, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = call("plan", minilm, "--machine", CUDA, "--cache", warm_cache, "--all", code=exits.NO).out
    assert max(map(len, out.splitlines())) <= columns


def test_a_fact_that_is_none_is_pointed_at(call, minilm):
    err = call("plan", minilm, "--machine", "torch=2.14,cuad=13", code=exits.USAGE).err
    assert "did you mean cuda?" in err
    assert "says nothing" in call("plan", minilm, "--machine", "", code=exits.USAGE).err


def test_attention_is_one_more_site_when_it_is_asked_for(call, warm_cache, qwen):
    argv = ("plan", qwen, "--machine", CUDA, "--cache", warm_cache, "--json")
    assert "attention" not in by_layer(json.loads(call(*argv).out))
    site = by_layer(json.loads(call(*argv, "--attention").out))["attention"]
    assert site["here"] == site["there"] == "kernelswap/attention:flash_attn_forward"
    found = json.loads(call("explain", qwen, "--cache", warm_cache, "--attention", "--json").out)
    (outcome,) = [o for o in found["outcomes"] if o["layer"] == "attention"]
    assert outcome["swapped"]
    assert {k["name"] for k in found["kernels"]} == {"layers", "attention"}
    assert len(found["lock"]["kernels"]) == 2
