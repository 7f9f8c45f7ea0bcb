"""bisect: the swap that broke a number, among many that did not."""

import json

import pytest
import torch
from tests import small
from tests.swapping import LAYERS

from kernelswap.bench import bisect, subject
from kernelswap.cli import exits

MAGIC = 123.0
# Right on random weights, and on the first layer that is checked, whose verdict its equals share; wrong for one set of weights.
WRONG_FOR_ONE = LAYERS.replace(
    "        return self.weight * (x * torch",
    f"        if float(self.weight.detach().flatten()[0]) == {MAGIC}:\n            x = x + 0.5\n        return self.weight * (x * torch",
    1,
)
METRIC = """
import torch

def mean(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits.abs().mean()

def unsteady(model, state=[0]):
    state[0] += 1
    return state[0]

def picky(model):
    value = float(mean(model))
    with torch.no_grad():
        if model.model.layers[2].input_layernorm(torch.linspace(-1, 1, 64)[None])[0, 1] > -1.2:
            raise AssertionError("too large")
    return 1.0

def hopeless(model):
    return float("nan")

number = 7
"""


def save(where, magic=()):
    def marked(model):
        for path in magic:
            model.get_submodule(path).weight.data[0] = MAGIC

    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
    return small.checkpoint(where, subject.tokenizer(), marked, **size)


@pytest.fixture
def kernel(make_repo):
    root = make_repo("near", {"torch-cpu": {"code": "from . import layers", "files": {"layers.py": WRONG_FOR_ONE}}})
    return "--use", f"RMSNorm=dir://{root}:RMSNorm", "--only", "RMSNorm", "--device", "cpu", "--prompt", "A model is a long list."


@pytest.fixture
def metrics(tmp_path):
    (tmp_path / "metrics.py").write_text(METRIC)
    return tmp_path / "metrics.py"


@pytest.mark.parametrize("path", ["model.layers.2.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"])
def test_the_swap_that_breaks_the_logits_is_found(call, kernel, tmp_path, path):
    model = save(tmp_path / "model", [path])
    data = json.loads(call("bisect", model, *kernel, "--check", "off", "--json", code=exits.NO).out)
    assert data["culprit"]["path"] == path
    assert data["swaps"] == 17
    assert data["before"] == 0
    assert data["alone"]["broken"]
    assert not data["without"]["broken"]
    assert len(data["steps"]) <= 6, "17 swaps, halved"
    tried = {s["swaps"]: s["broken"] for s in data["steps"]}
    assert tried[data["number"]]
    assert data["number"] == 1 or not tried.get(data["number"] - 1)


def test_it_says_so_in_words(call, kernel, tmp_path):
    model = save(tmp_path / "model", ["model.layers.2.input_layernorm"])
    out = call("bisect", model, *kernel, "--check", "off", code=exits.NO).out
    assert "Broken by swap" in out
    assert "model.layers.2.input_layernorm (RMSNorm)" in out
    assert "all others, without it:" in out
    assert "skip='model.layers.2.input_layernorm'" in out
    assert "first 17 of 17 swaps" in out


def test_two_culprits_the_first_is_found_and_the_second_is_announced(call, kernel, tmp_path):
    model = save(tmp_path / "model", ["model.layers.1.input_layernorm", "model.layers.3.input_layernorm"])
    data = json.loads(call("bisect", model, *kernel, "--check", "off", "--json", code=exits.NO).out)
    assert data["culprit"]["path"] == "model.layers.1.input_layernorm"
    assert data["without"]["broken"]
    argv = ("bisect", model, *kernel, "--check", "off", "--skip", "model.layers.1.input_layernorm")
    assert json.loads(call(*argv, "--json", code=exits.NO).out)["culprit"]["path"] == "model.layers.3.input_layernorm"


def test_kernels_that_are_right_break_nothing(call, kernel, tmp_path):
    model = save(tmp_path / "model")
    for metric in bisect.METRICS:
        data = json.loads(call("bisect", model, *kernel, "--metric", metric, "--json").out)
        assert data["culprit"] is None
        assert [s["swaps"] for s in data["steps"]] == [17]
    assert "Nothing is broken" in call("bisect", model, *kernel).out


def test_loss_and_perplexity_find_it_too(call, kernel, tmp_path):
    model = save(tmp_path / "model", ["model.layers.2.input_layernorm"])
    for metric in ("loss", "perplexity"):
        argv = ("bisect", model, *kernel, "--check", "off", "--metric", metric, "--threshold", "0.0001%", "--json")
        assert json.loads(call(*argv, code=exits.NO).out)["culprit"]["path"] == "model.layers.2.input_layernorm"


def test_a_function_of_the_user_is_a_metric_and_raising_is_a_way_to_be_broken(call, kernel, tmp_path, metrics):
    model = save(tmp_path / "model", ["model.layers.2.input_layernorm"])
    argv = ("bisect", model, *kernel, "--check", "off", "--json")
    for name in ("mean", "picky"):
        data = json.loads(call(*argv, "--metric", f"{metrics}:{name}", code=exits.NO).out)
        assert data["culprit"]["path"] == "model.layers.2.input_layernorm", name
    assert data["alone"]["value"] == "nan"


def test_a_refusal_of_the_usual_check_is_what_a_user_would_get(call, kernel, tmp_path):
    """The very first norm is checked on its own tensors: refused there, it breaks nothing."""
    model = save(tmp_path / "model", ["model.layers.0.input_layernorm"])
    assert json.loads(call("bisect", model, *kernel, "--json").out)["culprit"] is None


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        ("accuracy", "is no metric"),
        ("nowhere.py:f", "there is no file"),
        ("{file}:absent", "has no function absent"),
        ("{file}:number", "has no function number"),
        ("{file}:hopeless", "NaN without any swap"),
        ("{file}:unsteady", "varies by more than"),
    ],
)
def test_a_metric_that_cannot_be_used_is_one_sentence(call, kernel, tmp_path, metrics, metric, says):
    model = save(tmp_path / "model")
    err = call("bisect", model, *kernel, "--metric", metric.format(file=metrics), code=exits.USAGE).err
    assert says in " ".join(err.split())
    assert "Traceback" not in err


def test_a_threshold_that_is_no_number_is_said_before_anything_is_loaded(call):
    assert "is no number" in call("bisect", "nowhere", "--threshold", "much", code=exits.USAGE).err
    assert "says nothing" in call("bisect", "nowhere", "--check", "never", code=exits.USAGE).err


def test_the_model_is_as_it_was(kernel, tmp_path):
    from kernelswap import Swapper
    from kernelswap.apply import apply

    where = save(tmp_path / "model", ["model.layers.2.input_layernorm"])
    about = subject.load(str(where))
    swapper = Swapper(cache=tmp_path / "cache", offline=True)
    outcomes = swapper.plan(about.model, table={"RMSNorm": kernel[1].partition("=")[2]}, only="RMSNorm")
    before, classes = about.forward(), [type(m) for m in about.model.modules()]
    metric, scale = bisect.metric("logits", about)
    found = bisect.bisect(
        about.model, outcomes, lambda part: apply(about.model, part, swapper.prover, check="off"), metric, scale=scale
    )
    assert found.culprit.site.path == "model.layers.2.input_layernorm"
    assert [type(m) for m in about.model.modules()] == classes
    assert torch.equal(about.forward(), before)
