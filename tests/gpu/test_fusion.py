"""Fused statements in whole models on a GPU, through the default table: what tests/ecosystem/test_fusion.py shows on the CPU, with
the kernels that are on by default here, and what only a GPU has.
"""

import pytest
import torch
from tests.contract.slot import same, state_of
from tests.fusion import FUSED, IDS, fused, make, served, step

from kernelswap.api import Swapper
from kernelswap.types import Kept

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning"),
]
TOLERANCES = {torch.float32: (2e-4, 1e-3), torch.float16: (2e-2, 2e-2), torch.bfloat16: (8e-2, 8e-2)}
BIG = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(cache=tmp_path_factory.mktemp("gpu"), offline=True)


def ids():
    return IDS.cuda()


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def close(a, b, dtype=torch.float32):
    atol, rtol = TOLERANCES[dtype]
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", FUSED)
def test_a_model_in_inference(swapper, kind, dtype):
    model = make(kind, "cuda", dtype, **BIG)
    plain, before = logits(model), state_of(model)
    applied = swapper.swap(model)
    assert fused(applied) == FUSED[kind], applied.explain(long=True)
    for _ in range(2):
        close(logits(model), plain, dtype)
    assert applied.refusals == ()
    with applied.counting():
        close(logits(model), plain, dtype)
    assert applied.calls["model.layers.0"] == 1
    assert applied.calls["model.layers.0.post_attention_layernorm"] == (1 if kind.startswith("gemma") else 0)
    applied.undo()
    assert torch.equal(logits(model), plain)
    assert same(before, state_of(model))


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text"])
def test_a_training_step_and_all_its_gradients(swapper, kind, dtype, checkpointing):
    model = make(kind, "cuda", dtype, **BIG).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    plain = step(model, ids())
    applied = swapper.swap(model)
    for _ in range(2):
        for ours, theirs in zip(step(model, ids()), plain, strict=True):
            scale = theirs.float().abs().max().item() + 1e-6
            close(ours.float() / scale, theirs.float() / scale, dtype)
    assert applied.refusals == ()
    assert fused(applied) == FUSED[kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_the_gradients_of_q_and_k_in_one_launch_are_those_of_the_model(swapper, kind, dtype, monkeypatch):
    model = make(kind, "cuda", dtype, **BIG).train()
    plain = step(model, ids())
    applied = swapper.swap(model)
    kernel = next(o.training.implementation for o in applied.outcomes if o.site.layer == "norm_rotary")
    gradients = kernel.forward.__globals__["norm_rope"].__globals__["gradients"].__globals__
    calls, of = [], gradients["_run"]
    monkeypatch.setitem(gradients, "FUSED", True)
    monkeypatch.setitem(gradients, "_run", lambda *args: calls.append(1) or of(*args))
    for _ in range(2):
        for ours, theirs in zip(step(model, ids()), plain, strict=True):
            scale = theirs.float().abs().max().item() + 1e-6
            close(ours.float() / scale, theirs.float() / scale, dtype)
    assert applied.refusals == ()
    assert len(calls) >= 4


def test_the_rotary_embedding_is_inside_and_one_that_has_no_norms_is_not(swapper):
    for kind, inside in (("qwen3", True), ("llama", False)):
        applied = swapper.swap(make(kind, "cuda", torch.bfloat16))
        assert ("rotary_pos_emb" in served(applied)) is not inside
        kept = [o.reason for o in applied.outcomes if isinstance(o, Kept) and o.site.layer == "rotary_pos_emb"]
        assert kept == ["inside norm_rotary, which is swapped"] * (2 if inside else 0)


def test_hooks_on_norms_are_called(swapper):
    model, seen = make("qwen3", "cuda"), []
    plain = logits(model)
    applied = swapper.swap(model)
    logits(model)
    handles = [
        m.register_forward_hook(lambda module, *_: seen.append(module))
        for m in (model.model.layers[0].post_attention_layernorm, model.model.layers[1].self_attn.k_norm)
    ]
    close(logits(model), plain)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    close(logits(model), plain)
    assert len(seen) == 2
    assert applied.refusals == ()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", FUSED)
def test_the_first_norm_of_a_layer_is_made_with_the_last_sum_of_the_layer_before(swapper, kind, dtype, monkeypatch):
    model = make(kind, "cuda", dtype, **{**BIG, "num_hidden_layers": 3})
    plain = logits(model)
    applied = swapper.swap(model)
    for _ in range(3):
        close(logits(model), plain, dtype)
    layers = next(o.inference.implementation for o in applied.outcomes if o.site.layer == "residual_norm").forward.__globals__
    calls, of = [], layers["add_rms_norm"]
    monkeypatch.setitem(layers, "add_rms_norm", lambda *args: calls.append(1) or of(*args))
    close(logits(model), plain, dtype)
    assert len(calls) == 3 + 3  # that to the model's own norm among them
    for _ in range(2):  # a hook on a norm is called; then nothing is left of it
        seen = []
        handle = model.model.layers[1].input_layernorm.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        close(logits(model), plain, dtype)
        handle.remove()
        assert len(seen) == 1


def test_generation_gives_the_same_text(swapper):
    model = make("qwen3", "cuda")
    plain = model.generate(ids(), max_new_tokens=16, do_sample=False)
    swapper.swap(model)
    assert torch.equal(model.generate(ids(), max_new_tokens=16, do_sample=False), plain)


def test_a_captured_graph_holds_the_fused_kernels(swapper):
    model = make("qwen3", "cuda", torch.bfloat16)
    applied = swapper.swap(model)
    plain = logits(model)
    given, graph = ids().clone(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        model(given, use_cache=False)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            out = model(given, use_cache=False).logits
    graph.replay()
    torch.cuda.synchronize()
    close(out, plain, torch.bfloat16)
    assert applied.refusals == ()


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_models_trace_the_statements_in_one_graph(swapper):
    model = make("qwen3", "cuda")
    plain = logits(model)
    applied = swapper.swap(model)
    logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        close(compiled(ids(), use_cache=False).logits, plain)
        applied.undo()
        close(compiled(ids(), use_cache=False).logits, plain)


def test_mixed_precision_training_runs_the_statements(swapper):
    model, plain = make("llama", "cuda").train(), make("llama", "cuda").train()
    swapper.swap(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        ours, theirs = model(ids(), labels=ids()).loss, plain(ids(), labels=ids()).loss
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_devices(swapper):
    from accelerate import dispatch_model

    places = {
        "model.embed_tokens": 0,
        "model.rotary_emb": 0,
        "model.layers.0": 0,
        "model.layers.1": 1,
        "model.norm": 1,
        "lm_head": 1,
    }
    model = make("qwen3")
    with torch.no_grad():
        plain = model(IDS).logits
    model = dispatch_model(model, places)
    swapper.swap(model)
    for _ in range(2):
        close(logits(model).cpu(), plain)
