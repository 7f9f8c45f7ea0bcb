"""The kernels for projections of few rows in whole models, interpreted: a copy of the build that says it is for every device."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tests.fusion import IDS, make
from tests.interpreted.conftest import BUNDLED

import kernelswap as ks
from kernelswap import table
from kernelswap.types import Kept, Mode, Swap, Use

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    build = tmp_path_factory.mktemp("layers") / "build" / "torch-universal"
    shutil.copytree(BUNDLED / "layers" / "build" / "torch-cuda", build, ignore=shutil.ignore_patterns("__pycache__"))
    about = json.loads((build / "metadata.json").read_text())
    (build / "metadata.json").write_text(json.dumps({**about, "backend": {"type": "cpu"}}))
    return f"dir://{build.parents[1]}:"


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return ks.Swapper(cache=tmp_path_factory.mktemp("cache"), offline=True, table=[])


NAMES = {"projections": ["projections"], "SwiGLUMLP": ["SwiGLUMLPFused", "SwiGLUMLP"], "GeGLUMLP": ["GeGLUMLPFused"]}


@pytest.fixture
def swap(swapper, spec):
    def swapped(model):
        rows = [row for row in table.default() if row.layer in NAMES]
        rows = [replace(row, use=tuple(Use(spec + name) for name in NAMES[row.layer]), rivals=()) for row in rows]
        return swapper.swap(model, table=rows, trust=True, mode=Mode.INFERENCE)  # two proofs less

    return swapped


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def launched(applied, monkeypatch):
    """Calls that the kernels answered, from here on."""
    seen = []
    for layer, name in (("projections", "project"), ("MLP", "gate_up")):
        found = next(o.inference.implementation for o in applied.outcomes if o.site.layer.endswith(layer) and isinstance(o, Swap))
        scope = found.forward.__globals__

        def noted(*args, _of=scope[name], _name=name):
            answer = _of(*args)
            seen.extend([_name] * (answer is not None))
            return answer

        monkeypatch.setitem(scope, name, noted)
    return seen


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_a_model_of_few_rows_and_of_many(swap, kind, monkeypatch):
    model = make(kind)
    few, many = IDS[:, :5], IDS.repeat(2, 1)
    plain = [logits(model, given) for given in (few, many)]
    applied = swap(model)
    for _ in range(2):
        for given, want in zip((many, few), plain[::-1], strict=True):
            torch.testing.assert_close(logits(model, given), want, atol=2e-5, rtol=2e-4)
    assert applied.refusals == (), applied.explain()
    seen = launched(applied, monkeypatch)
    logits(model, many)
    assert seen == []
    logits(model, few)
    assert seen == ["project", "gate_up"] * 2
    applied.undo()
    assert torch.equal(logits(model, few), plain[0])


def test_generation_gives_the_same_text(swap, monkeypatch):
    model, more = make("qwen2"), {"max_new_tokens": 5, "do_sample": False}
    prompt = IDS.repeat(2, 1)
    plain = model.generate(prompt, **more)
    applied = swap(model)
    model.generate(prompt, **more)
    seen = launched(applied, monkeypatch)
    assert torch.equal(model.generate(prompt, **more), plain)
    assert seen == ["project", "gate_up"] * 2 * 4  # the prompt has more rows
    assert applied.refusals == ()


def test_an_adapter_keeps_the_kernels_that_read_weights_off_and_the_one_that_calls_serves(swap):
    from peft import LoraConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], init_lora_weights=False))

    model, plain = adapted(make("qwen2")), adapted(make("qwen2"))
    applied = swap(model)
    for _ in range(2):
        torch.testing.assert_close(logits(model, IDS[:, :5]), logits(plain, IDS[:, :5]), atol=2e-5, rtol=2e-4)
    found = {o.site.layer: o for o in applied.outcomes}
    assert isinstance(found["projections"], Kept)
    assert found["SwiGLUMLP"].inference.implementation.layer == "SwiGLUMLP"
    assert "gate_proj, which is wrapped by PEFT" in dict(found["SwiGLUMLP"].inference.passed).popitem()[1]


def test_what_is_done_to_a_projection_later_has_its_effect(swap, monkeypatch):
    model, plain = make("qwen2"), make("qwen2")
    applied = swap(model)
    logits(model, IDS[:, :5])
    seen = launched(applied, monkeypatch)
    for one in (model, plain):
        layer = one.model.layers[0]
        for projection in (layer.self_attn.k_proj, layer.mlp.up_proj):
            projection.register_forward_hook(lambda m, args, out: out * 2)
    torch.testing.assert_close(logits(model, IDS[:, :5]), logits(plain, IDS[:, :5]), atol=2e-5, rtol=2e-4)
    assert seen == ["project", "gate_up"]  # of the other layer
