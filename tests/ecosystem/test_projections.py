"""q, k and v as one call in whole models, on the CPU: served by a kernel of the tests that reads the weights, as the GPU's does, and so
would show what it goes round. The kernel's own numbers are in tests/interpreted/test_projections.py and tests/gpu.
"""

import copy
from dataclasses import replace

import pytest
import torch
from tests.cli.conftest import compiled_cache
from tests.contract.slot import same, state_of
from tests.fusion import IDS, anywhere, make, step
from torch import nn

import kernelswap as ks
from kernelswap import table
from kernelswap.types import Kept, Mode, Swap, Use

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
LAYERS = """
import torch.nn as nn
import torch.nn.functional as F

CALLS = []


def projections(q_proj, k_proj, v_proj, hidden):
    CALLS.append(tuple(hidden.shape))
    return tuple(F.linear(hidden, p.weight, p.bias) for p in (q_proj, k_proj, v_proj))


def transposed(q_proj, k_proj, v_proj, hidden):
    q, k, v = projections(q_proj, k_proj, v_proj, hidden)
    return q, v, k


def without_biases(q_proj, k_proj, v_proj, hidden):
    return tuple(F.linear(hidden, p.weight) for p in (q_proj, k_proj, v_proj))


for one in (projections, transposed, without_biases):
    one.has_backward, one.can_torch_compile = False, True
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    build = tmp_path_factory.mktemp("mine") / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(LAYERS)
    (build / "metadata.json").write_text(
        '{"name": "mine", "id": "mine_1", "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}}'
    )
    return build.parents[1]


@pytest.fixture(scope="module")
def swapper(layers_build, tmp_path_factory):
    return ks.Swapper(cache=compiled_cache(tmp_path_factory.mktemp("cache"), layers_build), offline=True, table=anywhere())


@pytest.fixture
def swap(swapper, folder):
    def swapped(model, kernel="projections", **more):
        return swapper.swap(model, table={"projections": f"dir://{folder}:{kernel}"}, trust=True, **more)

    return swapped


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def logits(model, **more):
    with torch.no_grad():
        return model(IDS, **more).logits


def outcomes(applied):
    return [o for o in applied.outcomes if o.site.layer == "projections"]


def served(applied):
    return [o.site.path for o in outcomes(applied) if isinstance(o, Swap) and o.inference.implementation is not None]


def calls(applied):
    """Of the kernel, from here on."""
    kernel = next(o.inference.implementation for o in outcomes(applied) if isinstance(o, Swap))
    found = kernel.forward.__globals__["CALLS"]
    found.clear()
    return found


BOTH = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_in_inference(swap, kind):
    model = make(kind)
    if kind == "qwen2":
        assert model.model.layers[0].self_attn.k_proj.bias is not None
    plain, before = logits(model), state_of(model)
    applied = swap(model)
    assert served(applied) == BOTH
    for _ in range(2):
        close(logits(model), plain)
    assert applied.refusals == ()
    seen = calls(applied)
    close(logits(model), plain)
    assert seen == [(2, 11, 32)] * 2
    applied.undo()
    assert torch.equal(logits(model), plain)
    assert same(before, state_of(model))


def test_beside_the_norms_and_the_rotary_embedding_of_the_same_statements(swap):
    model = make("qwen3")
    plain = logits(model)
    applied = swap(model)
    assert {o.site.layer for o in applied.outcomes if isinstance(o, Swap) and o.site.path == BOTH[0]} >= {
        "projections",
        "norm_rotary",
    }
    close(logits(model), plain)
    with applied.counting():
        close(logits(model), plain)
    parts = [p for slot, _ in applied._slots() for p in slot.parts if p.norms]
    assert {(p.site.layer, p.by_kernel, p.by_original) for p in parts} == {
        ("projections", 1, 0),
        ("norm_rotary", 1, 0),
        ("residual_norm", 1, 0),
    }


def test_nobody_gets_it_unasked(swapper):
    model = make("qwen3")
    applied = swapper.swap(model)
    assert outcomes(applied) == []
    row = next(row for row in table.default() if row.layer == "projections")
    assert row.use == ()
    assert [use.spec for use in row.rivals] == ["kernelswap/layers:projections"]
    mlps = [row for row in table.default() if row.layer in {"SwiGLUMLP", "GeGLUMLP"}]
    assert not [use for row in mlps for use in row.use if "Fused" in use.spec]


def test_a_rival_is_raced_and_serves_where_it_won(swapper, folder):
    rival = Use(f"dir://{folder}:projections")
    row = replace(next(row for row in table.default() if row.layer == "projections"), rivals=(rival,))
    wanted = {"table": [row], "inherit": False, "trust": True}
    model = make("llama")
    assert outcomes(swapper.swap(model, **wanted)) == []
    found = swapper.measure(model, seconds=20, mode=Mode.INFERENCE, compile=False, **wanted)
    assert found.measured > 0
    plain = logits(model)
    applied = swapper.swap(model, choose="measured", mode=Mode.INFERENCE, **wanted)
    assert len(outcomes(applied)) == 2
    for o in outcomes(applied):
        assert isinstance(o, Swap) or o.reason.startswith("measured, and the original is the fastest"), o
    for _ in range(2):
        close(logits(model), plain)


def test_a_kernel_that_mixes_them_up_or_forgets_the_biases_is_refused(swap):
    for kernel, kind, output in (("transposed", "llama", 1), ("without_biases", "qwen2", 0)):
        model = make(kind)
        if kind == "qwen2":
            with torch.no_grad():
                for layer in model.model.layers:
                    layer.self_attn.q_proj.bias.normal_()
        plain = logits(model)
        applied = swap(model, kernel)
        assert all(isinstance(o, Kept) for o in outcomes(applied))
        assert f"output {output}" in outcomes(applied)[0].reason
        applied.undo()
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_training_is_the_modules_own(swap, checkpointing):
    model = make("qwen2").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    plain = step(model)
    applied = swap(model, only="projections")
    for _ in range(2):
        for ours, theirs in zip(step(model), plain, strict=True):
            close(ours, theirs)
    model.eval()
    close(logits(model), logits(make("qwen2")))
    seen = calls(applied)
    logits(model)
    assert len(seen) == 2
    model(IDS).logits.sum().backward()  # gradients wanted in eval mode
    assert len(seen) == 2


def test_generation_with_a_cache(swap):
    model = make("qwen3")
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False)
    applied = swap(model)
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    seen = calls(applied)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), plain)
    assert seen == [(2, 11, 32)] * 2 + [(2, 1, 32)] * 14


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_recorders_see_what_they_saw(swap, kind):
    model = make(kind, attn_implementation="eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        plain = model(IDS, **more)
        swap(model)
        for _ in range(2):
            found = model(IDS, **more)
            close(found.hidden_states, plain.hidden_states)
            close(found.attentions, plain.attentions)


def test_hooks_on_a_projection_are_called_and_change_what_they_changed(swap):
    model, plain, seen = make("llama"), make("llama"), []
    applied = swap(model)
    logits(model)

    def run(model, hooked):
        seen.clear()
        attention = model.model.layers[1].self_attn
        handles = [
            hooked(attention),
            attention.register_forward_hook(lambda m, args, out: seen.append(out[0].clone())),
        ]
        out = logits(model)
        for handle in handles:
            handle.remove()
        return out, list(seen)

    ways = [
        lambda a: a.q_proj.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
        lambda a: a.k_proj.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()) or out * 2),
        lambda a: a.v_proj.register_forward_hook(lambda m, args, out: out * 2),
    ]
    found = calls(applied)
    for hooked in ways:
        found.clear()
        (out, ours), (want, theirs) = run(model, hooked), run(plain, hooked)
        close(out, want)
        close(ours, theirs)
        assert len(found) == 1  # the layer without hooks
    close(logits(model), logits(plain))
    assert len(found) == 3


def kept(applied):
    return {o.site.path: o.reason.partition(": ")[2] for o in outcomes(applied) if isinstance(o, Kept)}


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def double(linear):
    other = Doubled(linear.in_features, linear.out_features, bias=linear.bias is not None)
    other.load_state_dict(linear.state_dict())
    return other


def hooked(attention):
    attention.q_proj.register_forward_hook(lambda m, args, out: out * 2)


def replaced(attention):
    attention.k_proj = double(attention.k_proj)


def given_a_forward(attention):
    plain = attention.v_proj.forward
    attention.v_proj.forward = lambda x: plain(x) * 2


def one_for_two(attention):
    attention.v_proj = attention.k_proj


def parametrized(attention):
    nn.utils.parametrizations.weight_norm(attention.q_proj)


def given_a_buffer(attention):
    weight = attention.q_proj.weight.detach().clone()
    del attention.q_proj.weight
    attention.q_proj.register_buffer("weight", weight)


REASONS = {
    hooked: "a projection that it calls has hooks",
    replaced: "a projection that it calls is a Doubled (tests), not torch's own Linear",
    given_a_forward: "a projection that it calls has a forward of its own",
    one_for_two: "two of the modules that it calls are one",
    parametrized: "a projection that it calls is a ParametrizedLinear (torch), not torch's own Linear",
    given_a_buffer: "a projection that it calls has a weight that is no parameter, not an ordinary one",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_done_to_a_projection_stays_in_effect_and_is_said(swap, change, when):
    model, plain = make("llama"), make("llama")
    change(plain.model.layers[0].self_attn)
    if when == "before":
        change(model.model.layers[0].self_attn)
        applied = swap(model)
        assert kept(applied) == {BOTH[0]: REASONS[change]}
    else:
        applied = swap(model)
        logits(model)
        change(model.model.layers[0].self_attn)
    for _ in range(2):
        close(logits(model), logits(plain))
    seen = calls(applied)
    close(logits(model), logits(plain))
    assert len(seen) == 1 + (change is one_for_two and when == "after")  # a kernel may read one weight twice


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_a_projection(swap, when):
    from peft import LoraConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], init_lora_weights=False))

    plain, model = adapted(make("qwen2")), make("qwen2")
    if when == "after":
        applied = swap(model)
        logits(model)
        model = adapted(model)
    else:
        model = adapted(model)
        applied = swap(model)
        assert set(kept(applied).values()) == {"a projection that it calls is a Linear (peft), not torch's own Linear"}
    for _ in range(2):
        close(logits(model), logits(plain))
    close(step(model.train()), step(plain.train()))


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_in_memory_of_their_own_are_called_through_accelerate(swap, when):
    from accelerate import cpu_offload

    model = make("qwen2")
    plain = logits(model)
    if when == "after":
        swap(model)
        logits(model)
    cpu_offload(model, execution_device="cpu")
    if when == "before":
        assert set(kept(swap(model)).values()) == {
            "a projection that it calls keeps its weights elsewhere between calls (accelerate)"
        }
    for _ in range(2):
        close(logits(model), plain)


class Linear8bit(nn.Module):
    """As quantisers put them in: weights of eight bits, and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        self.scale = nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale)


def test_quantised_weights_are_left_to_their_modules(swap):
    model = make("llama")
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(layer.self_attn, name, Linear8bit(getattr(layer.self_attn, name)))
    plain = logits(model)
    applied = swap(model, only="projections")
    assert set(kept(applied).values()) == {"a projection that it calls is a Linear8bit (tests), not torch's own Linear"}
    assert torch.equal(logits(model), plain)


def test_compiled_models_trace_the_modules_without_a_break(swap):
    model = make("qwen2")
    plain = logits(model)
    applied = swap(model)
    logits(model)
    seen = calls(applied)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(IDS, use_cache=False).logits, plain)
        assert seen == []
        applied.undo()
        close(compiled(IDS, use_cache=False).logits, plain)


def test_fake_tensors_get_the_modules(swap):
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = make("qwen2")
    applied = swap(model)
    logits(model)
    seen = calls(applied)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert model(IDS, use_cache=False).logits.shape == (2, 11, 64)
    assert seen == []


def test_mixed_precision_runs_the_modules(swap):
    model, plain = make("qwen2"), make("qwen2")
    swap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, atol=2e-2, rtol=2e-2)


def test_copies_are_swapped_on_their_own(swap):
    model = make("qwen3")
    plain = logits(model)
    applied = swap(model)
    logits(model)
    twin = copy.deepcopy(model)
    seen = calls(applied)
    applied.undo()
    assert torch.equal(logits(model), plain)
    assert seen == []
    close(logits(twin), plain)
    assert len(seen) == 2


def test_it_can_be_left_out(swap):
    model = make("qwen3")
    applied = swap(model, skip="projections")
    assert {o.reason for o in outcomes(applied)} == {"skipped by you (skip='projections')"}
