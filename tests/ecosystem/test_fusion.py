"""Residual sums with their norms, and norms of q and k with their rotary embedding, fused in whole models: on the CPU, where the
default table leaves them alone, with the rows for GPUs made rows for everything.
"""

import copy
import pickle

import pytest
import torch
from tests.cli.conftest import compiled_cache
from tests.contract.slot import same, state_of
from tests.fusion import FUSED, IDS, anywhere, fused, make, served, step
from torch import nn

import kernelswap as ks
from kernelswap.slots import classes, state
from kernelswap.types import Kept

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")


@pytest.fixture(scope="module")
def swapper(layers_build, tmp_path_factory):
    cache = compiled_cache(tmp_path_factory.mktemp("cache"), layers_build)
    return ks.Swapper(cache=cache, offline=True, table=anywhere())


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)


def logits(model, **more):
    with torch.no_grad():
        return model(IDS, **more).logits


def counted(applied, run):
    """What `run` gives, and how many fused sites a kernel and the original served in it."""
    with applied.counting():
        result = run()
    parts = [p for slot, _ in applied._slots() for p in slot.parts if p.norms]
    return result, sum(p.by_kernel for p in parts), sum(p.by_original for p in parts)


@pytest.mark.parametrize("kind", FUSED)
def test_a_model_in_inference(swapper, kind):
    model = make(kind)
    plain, before = logits(model), state_of(model)
    applied = swapper.swap(model)
    assert fused(applied) == FUSED[kind]
    for _ in range(2):
        close(logits(model), plain)
    assert applied.refusals == ()
    out, by_kernel, by_original = counted(applied, lambda: logits(model))
    close(out, plain)
    assert (by_kernel, by_original) == (sum(FUSED[kind].values()), 0)
    applied.undo()
    assert torch.equal(logits(model), plain)
    assert same(before, state_of(model))


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_a_training_step_and_all_its_gradients(swapper, kind, checkpointing):
    model = make(kind).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    plain = step(model)
    applied = swapper.swap(model)
    for _ in range(2):
        close(step(model), plain)
    assert applied.refusals == ()
    found, by_kernel, by_original = counted(applied, lambda: step(model))
    close(found, plain)
    assert by_kernel >= sum(FUSED[kind].values())
    assert by_original == 0
    model.eval()
    close(logits(model), logits(make(kind)))


def test_generation_with_a_cache(swapper):
    model = make("qwen3")
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False)
    swapper.swap(model)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), plain)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_recorders_see_what_they_saw(swapper, kind):
    model = make(kind, attn_implementation="eager")
    more = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        plain = model(IDS, **more)
        applied = swapper.swap(model)
        for _ in range(2):
            found = model(IDS, **more)
            close(found.hidden_states, plain.hidden_states)
            close(found.attentions, plain.attentions)
    assert applied.refusals == ()


def test_hooks_on_layers_and_attention_see_what_they_saw_and_hooks_on_norms_are_called(swapper):
    model, seen = make("qwen3"), []
    layer = model.model.layers[0]
    plain = logits(model)
    applied = swapper.swap(model)
    close(logits(model), plain)

    def hook(module, args, out):
        seen.append((type(module).__name__, (out[0] if isinstance(out, tuple) else out).clone()))

    def run(model):
        layer = model.model.layers[0]
        hooked = (layer, layer.self_attn, layer.post_attention_layernorm, layer.self_attn.q_norm)
        handles = [m.register_forward_hook(hook) for m in hooked]
        seen.clear()
        out = logits(model)
        for handle in handles:
            handle.remove()
        return out, list(seen)

    (out, ours), by_kernel, by_original = counted(applied, lambda: run(model))
    close(out, plain)
    _, theirs = run(make("qwen3"))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    close([t for _, t in ours], [t for _, t in theirs])
    assert (by_kernel, by_original) == (2, 2)  # those of the other layer; those of the one with hooks
    assert counted(applied, lambda: logits(model))[1:] == (4, 0)
    assert not layer._forward_hooks


def test_hooks_that_were_there_before_keep_the_statements_and_say_so(swapper):
    model = make("qwen3")
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: None)
    applied = swapper.swap(model)
    kept = [o for o in applied.outcomes if isinstance(o, Kept) and o.site.layer == "residual_norm"]
    assert [(o.site.path, o.reason) for o in kept] == [
        ("model.layers.0", "kernelswap/layers:residual_norm: a norm that it calls has hooks")
    ]


def test_a_hook_that_changes_a_norm_changes_the_model(swapper):
    model, plain = make("qwen3"), make("qwen3")
    swapper.swap(model)
    logits(model)
    for one in (model, plain):
        one.model.layers[1].post_attention_layernorm.register_forward_hook(lambda module, args, out: out * 2)
    close(logits(model), logits(plain))


class Doubled(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm, self.weight = norm, norm.weight

    def forward(self, x):
        return self.norm(x) * 2


def test_a_norm_that_is_replaced_later_is_called(swapper):
    model, plain = make("qwen3"), make("qwen3")
    swapper.swap(model)
    logits(model)
    for one in (model, plain):
        one.model.layers[0].post_attention_layernorm = Doubled(one.model.layers[0].post_attention_layernorm)
        one.model.layers[1].self_attn.k_norm = Doubled(one.model.layers[1].self_attn.k_norm)
    close(logits(model), logits(plain))


def test_a_forward_that_is_set_on_a_norm_is_called(swapper):
    model, plain = make("llama"), make("llama")
    swapper.swap(model)
    logits(model)
    for one in (model, plain):
        norm = one.model.layers[0].post_attention_layernorm
        norm.forward = lambda x: x * 0.5
    close(logits(model), logits(plain))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_on_projections_and_on_norms(swapper, when):
    from peft import LoraConfig, get_peft_model

    def adapted(model):
        torch.manual_seed(2)
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "gate_proj"], modules_to_save=["q_norm"], init_lora_weights=False
        )
        model = get_peft_model(model, config)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "modules_to_save" in name:
                    p.mul_(1.5)
        return model

    plain = adapted(make("qwen3"))
    model = make("qwen3")
    if when == "after":
        applied = swapper.swap(model)
        logits(model)
        model = adapted(model)
    else:
        model = adapted(model)
        applied = swapper.swap(model)
    for _ in range(2):
        close(logits(model), logits(plain))
    close(step(model.train()), step(plain.train()))
    assert fused(applied)["residual_norm"] == 2


def test_weights_in_memory_of_their_own_are_called_through_accelerate(swapper):
    from accelerate import cpu_offload

    model = make("qwen3")
    plain = logits(model)
    applied = swapper.swap(model)
    logits(model)
    cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        close(logits(model), plain)
    applied.undo()
    close(logits(model), plain)


def test_compiled_models_trace_the_statements_without_a_break(swapper):
    model = make("qwen3")
    plain = logits(model)
    applied = swapper.swap(model)
    logits(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        close(compiled(IDS, use_cache=False).logits, plain)
        applied.undo()
        close(compiled(IDS, use_cache=False).logits, plain)


def test_copies_are_fused_on_their_own_and_pickles_are_plain(swapper):
    model = make("qwen3")
    plain = logits(model)
    applied = swapper.swap(model)
    logits(model)
    twin = copy.deepcopy(model)
    applied.undo()
    assert classes.ours(type(twin.model.layers[0])) is not None
    assert twin.model.layers[0].self_attn is not model.model.layers[0].self_attn
    parts = [p for m in twin.modules() if (slot := state.find(m)) for p in slot.parts]
    assert {p.inside.site.layer for p in parts if p.inside is not None} == {"norm_rotary"}
    close(logits(twin), plain)
    again = pickle.loads(pickle.dumps(twin))  # our own
    assert not any(classes.ours(type(m)) for m in again.modules())
    assert torch.equal(logits(again), plain)


def test_two_models_of_one_class_do_not_meet(swapper):
    one, other = make("qwen3"), make("qwen3")
    plain = logits(other)
    applied = swapper.swap(one)
    logits(one)
    assert torch.equal(logits(other), plain)
    second = swapper.swap(other, only="residual_norm")
    assert served(second) == {"residual_norm": 2}
    close(logits(other), plain)
    applied.undo()
    close(logits(other), plain)
    second.undo()
    assert torch.equal(logits(other), plain)


def test_layers_of_one_class_share_their_subclass(swapper):
    model = make("qwen3", num_hidden_layers=4)
    swapper.swap(model)
    logits(model)
    assert len({type(layer) for layer in model.model.layers}) == 1
    assert len({type(layer.self_attn) for layer in model.model.layers}) == 1


# -- beside other rows ----------------------------------------------------------------------------------------------


def test_the_rotary_embedding_inside_is_said_to_be_inside_and_serves_where_the_fused_kernel_is_refused(swapper):
    model = make("qwen3")
    plain = logits(model)
    applied = swapper.swap(model)
    rotary = [o for o in applied.outcomes if o.site.layer == "rotary_pos_emb"]
    assert [o.reason for o in rotary] == ["inside norm_rotary, which is swapped"] * 2
    for slot, module in applied._slots():
        for part in slot.parts:
            if part.site.layer == "norm_rotary":
                part.inference.standing, part.inference.reason = "refused", "because a test says so"
                classes.place(slot, module)
    close(logits(model), plain)
    assert served(applied)["rotary_pos_emb"] == 2
    with applied.counting():
        logits(model)
    assert applied.calls["model.layers.0.self_attn"] == 1


@pytest.mark.parametrize(
    ("more", "lost"),
    [
        ({"skip": "RMSNorm"}, {"residual_norm", "norm_rotary"}),
        ({"skip": "post_attention_layernorm"}, {"residual_norm"}),
        ({"skip": "rotary_pos_emb"}, {"norm_rotary"}),
        ({"skip": "norm_rotary"}, {"norm_rotary"}),
        ({"only": "norm_rotary"}, {"residual_norm"}),
    ],
    ids=["the norms", "one norm", "rotary", "norm and rotary", "nothing else"],
)
def test_what_the_user_says_of_a_norm_holds_for_the_statements_that_call_it(swapper, more, lost):
    model = make("qwen3")
    plain = logits(model)
    applied = swapper.swap(model, **more)
    assert set(fused(applied)) == {"residual_norm", "norm_rotary"} - lost
    close(logits(model), plain)


def written(folder, layers):
    """A kernel repository with these layers."""
    build = folder / "build" / "torch-universal"
    build.mkdir(parents=True)
    (build / "__init__.py").write_text("from . import layers\n")
    (build / "layers.py").write_text(f"import torch.nn as nn\n\n\n{layers}")
    (build / "metadata.json").write_text(
        '{"name": "mine", "id": "mine_1", "version": 1, "license": "MIT", "python-depends": [], "backend": {"type": "cpu"}}'
    )
    return folder


def test_a_kernel_of_ones_own_serves_the_statements_between_bundled_norms(swapper, tmp_path):
    folder = written(
        tmp_path / "mine",
        "def residual_norm(norm, residual, hidden):\n    s = residual + hidden\n"
        "    return nn.functional.rms_norm(s, norm.weight.shape, norm.weight, norm.variance_epsilon), s\n",
    )
    model = make("llama")
    plain = logits(model)
    applied = swapper.swap(model, table={"residual_norm": f"dir://{folder}:residual_norm"}, trust=True)
    assert served(applied)["residual_norm"] == 2
    assert served(applied)["RMSNorm"] == 5
    serving = {
        str(o.inference.implementation.origin.candidate.requirement) for o in applied.outcomes if o.site.layer == "residual_norm"
    }
    assert serving == {f"dir://{folder}"}
    for _ in range(3):
        close(logits(model), plain)
    assert applied.refusals == ()


def test_a_norm_for_which_another_kernel_was_preferred_is_not_gone_round(swapper, tmp_path):
    folder = written(
        tmp_path / "mine",
        "class RMSNorm(nn.Module):\n    can_torch_compile = True\n\n"
        "    def forward(self, hidden_states):\n"
        "        return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)\n",
    )
    model = make("llama")
    applied = swapper.swap(model, prefer={"post_attention_layernorm": [f"dir://{folder}:RMSNorm"]}, trust=True)
    kept = {o.reason for o in applied.outcomes if isinstance(o, Kept) and o.site.layer == "residual_norm"}
    assert len(kept) == 1, applied.explain(long=True)
    assert "its post_attention_layernorm is served by" in kept.pop()
    assert served(applied)["RMSNorm"] == 5


def test_mixed_dtypes_run_the_statements_and_the_reason_is_kept(swapper):
    model, plain = make("llama").train(), make("llama").train()
    applied = swapper.swap(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(IDS, labels=IDS).loss, plain(IDS, labels=IDS).loss
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-2)
    reasons = {reason for site, reason in applied.refusals if site.layer == "residual_norm"}
    assert reasons == {"cannot take the place of the statements: it is given tensors or norms of another kind"}
    model.eval()
    logits(model)
    assert counted(applied, lambda: logits(model))[1:] == (2, 0)  # without autocast there is one dtype


def test_functional_transforms_run_the_statements(swapper):
    model, plain = make("llama"), make("llama")
    swapper.swap(model)
    logits(model)
    x = torch.randn(1, 3, 32)
    norms = [m.model.layers[0] for m in (model, plain)]
    cos, sin = model.model.rotary_emb(x, torch.arange(3)[None])

    def squared(layer):
        return lambda x: layer(x, position_embeddings=(cos, sin)).pow(2).sum()

    close(torch.func.grad(squared(norms[0]))(x), torch.func.grad(squared(norms[1]))(x))


def test_on_a_cpu_the_default_table_leaves_the_statements_alone(layers_build, tmp_path):
    swapper = ks.Swapper(cache=compiled_cache(tmp_path, layers_build), offline=True)
    applied = swapper.swap(make("qwen3"), skip=["residual_norm", "norm_rotary"])  # no mistake: a script may run on either device
    assert not {o.site.layer for o in applied.outcomes} & {"residual_norm", "norm_rotary"}


# -- across the border of layers ------------------------------------------------------------------------------------


def counted_kernels(applied, monkeypatch):
    """A list that grows by `norm` or `both` with every call of the bundled functions, whoever calls them."""
    layers = next(o.inference.implementation for o in applied.outcomes if o.site.layer == "residual_norm").forward.__globals__
    calls = []
    for name, said in (("rms_norm", "norm"), ("add_rms_norm", "both")):

        def noted(*args, of=layers[name], said=said, **more):
            calls.append(said)
            return of(*args, **more)

        monkeypatch.setitem(layers, name, noted)
    return calls


def settled(swapper, kind, **more):
    model = make(kind, **more)
    plain = logits(model)
    applied = swapper.swap(model)
    for _ in range(3):  # the norms are proved, and it is seen which one follows which sum
        close(logits(model), plain)
    return model, plain, applied


@pytest.mark.parametrize("kind", FUSED)
def test_the_first_norm_of_a_layer_is_made_with_the_last_sum_of_the_layer_before(swapper, kind, monkeypatch):
    model, plain, applied = settled(swapper, kind, num_hidden_layers=3)
    calls = counted_kernels(applied, monkeypatch)
    close(logits(model), plain)
    sums = calls.count("both")
    assert sums == 3 + 3  # one inside of each layer, one across each border, that to the model's own norm among them
    norms = {"llama": 1, "mistral": 1, "qwen2": 1, "qwen3": 1 + 6, "gemma2": 1 + 6, "gemma3_text": 1 + 6 + 6}[kind]
    assert calls.count("norm") == norms  # the first of all, and those inside of the layers


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_sums_that_are_recorded_are_the_sums(swapper, kind):
    model, _, _ = settled(swapper, kind)
    with torch.no_grad():
        close(model(IDS, output_hidden_states=True).hidden_states, make(kind)(IDS, output_hidden_states=True).hidden_states)


def in_place(module, args):
    args[0].mul_(1.5)


def test_a_hook_that_changes_a_sum_in_place_or_replaces_it_changes_what_follows(swapper):
    model, _, _ = settled(swapper, "llama")
    plain = make("llama")

    def other(module, args):
        return (args[0] * 1.5, *args[1:])

    for hook in (in_place, other):
        handles = [m.model.layers[1].register_forward_pre_hook(hook) for m in (model, plain)]
        close(logits(model), logits(plain))
        for handle in handles:
            handle.remove()
    close(logits(model), logits(plain))


@pytest.mark.parametrize("where", ["layer", "norm"])
def test_hooks_on_a_layer_or_on_its_first_norm_see_what_they_saw(swapper, where):
    model, _, _ = settled(swapper, "qwen3")
    plain, seen = make("qwen3"), []
    for one in (model, plain):
        hooked = one.model.layers[0] if where == "layer" else one.model.layers[1].input_layernorm
        hooked.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone())) or out * 2)
    close(logits(model), logits(plain))
    close(seen[0], seen[1])


def test_a_first_norm_that_is_replaced_is_called(swapper):
    model, _, _ = settled(swapper, "llama")
    plain = make("llama")
    for one in (model, plain):
        one.model.layers[1].input_layernorm = Doubled(one.model.layers[1].input_layernorm)
    close(logits(model), logits(plain))


def test_with_gradients_nothing_goes_ahead(swapper, monkeypatch):
    model, _, applied = settled(swapper, "llama")
    calls = counted_kernels(applied, monkeypatch)
    close(step(model), step(make("llama")))
    assert calls.count("both") == 2


def test_in_inference_mode_where_nobody_counts_versions_nothing_goes_ahead(swapper, monkeypatch):
    model, _, applied = settled(swapper, "llama")
    calls = counted_kernels(applied, monkeypatch)
    model.model.layers[1].register_forward_pre_hook(in_place)
    other = make("llama")
    other.model.layers[1].register_forward_pre_hook(in_place)
    with torch.inference_mode():
        close(model(IDS).logits, other(IDS).logits)
    assert calls.count("both") == 2


def test_a_norm_that_is_left_alone_is_not_made_ahead(swapper, monkeypatch):
    model = make("llama")
    plain = logits(model)
    applied = swapper.swap(model, skip="input_layernorm")
    for _ in range(3):
        close(logits(model), plain)
    calls = counted_kernels(applied, monkeypatch)
    close(logits(model), plain)
    assert calls == ["both", "both", "both"]  # of the three, the last is the model's own norm


def test_layers_that_change_their_order_are_right_and_a_guess_that_fails_is_given_up(swapper, monkeypatch):
    model, _, applied = settled(swapper, "llama", num_hidden_layers=4)
    plain = make("llama", num_hidden_layers=4)
    for one in (model, plain):
        layers = one.model.layers
        one.model.layers = nn.ModuleList([layers[2], layers[0], layers[3], layers[1]])
    close(logits(model), logits(plain))
    calls = counted_kernels(applied, monkeypatch)
    for _ in range(3):
        calls.clear()
        close(logits(model), logits(plain))
    assert calls.count("both") == 4 + 4


def test_hooks_on_the_norm_after_the_last_layer_see_what_they_saw_and_change_the_model(swapper):
    model, _, _ = settled(swapper, "qwen3")
    plain, seen = make("qwen3"), []
    for one in (model, plain):
        one.model.norm.register_forward_hook(lambda module, args, out: seen.append((args[0].clone(), out.clone())) or out * 2)
    close(logits(model), logits(plain))
    close(seen[0], seen[1])
    for one in (model, plain):
        one.model.norm.register_forward_pre_hook(in_place)
    close(logits(model), logits(plain))


def test_the_norm_after_the_last_layer_is_its_own_when_it_is_called_with_something_else(swapper):
    model, _, _ = settled(swapper, "llama")
    plain, x = make("llama"), torch.randn(1, 5, 32)
    with torch.no_grad():
        close(model.model.norm(x), plain.model.norm(x))
        close(model.model.norm(hidden_states=x), plain.model.norm(x))


def test_the_norm_after_the_last_layer_that_is_replaced_moved_or_left_alone_is_called(swapper, monkeypatch):
    model, _, _ = settled(swapper, "llama")
    plain = make("llama")
    for one in (model, plain):
        one.model.norm = Doubled(one.model.norm)
    close(logits(model), logits(plain))
    model, plain = make("llama"), make("llama")
    applied = swapper.swap(model, skip="model.norm")
    for _ in range(3):
        close(logits(model), logits(plain))
    calls = counted_kernels(applied, monkeypatch)
    close(logits(model), logits(plain))
    assert calls.count("both") == 2 + 1
    assert calls.count("norm") == 1
    again = model.double()
    torch.testing.assert_close(logits(again), logits(plain.double()))


def test_modes_that_change_and_copies_keep_the_norm_after_the_last_layer_with_its_layers(swapper, monkeypatch):
    model, plain, applied = settled(swapper, "llama")
    close(step(model.train()), step(make("llama")))
    model.eval()
    calls = counted_kernels(applied, monkeypatch)
    close(logits(model), plain)
    assert calls.count("both") == 2 + 2
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)  # which the copy must not notice
    calls.clear()
    for _ in range(2):
        close(logits(twin), plain)
    assert calls.count("both") >= 2 * (2 + 1)
    applied.undo()
    assert classes.ours(type(model.model.norm)) is None


def test_compiled_code_does_not_see_what_waits(swapper):
    model, plain, _ = settled(swapper, "qwen3")
    torch._dynamo.reset()
    compiled = torch.compile(model.model.norm, backend="eager", fullgraph=True)
    x = torch.randn(2, 3, 32)
    with torch.no_grad():
        close(compiled(x), make("qwen3").model.norm(x))
        close(logits(model), plain)


def test_what_waits_does_not_outlive_its_sum(swapper, monkeypatch):
    import gc
    import weakref as weak

    model, _, applied = settled(swapper, "llama")
    calls = counted_kernels(applied, monkeypatch)
    layer = model.model.layers[0]
    x = torch.randn(1, 3, 32)
    embeddings = model.model.rotary_emb(x, torch.arange(3)[None])
    gc.collect()
    gc.disable()
    try:
        before = {id(t) for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == x.shape}
        with torch.no_grad():
            out = layer(x, position_embeddings=embeddings)
        gone = weak.ref(out)
        del out
        assert gone() is None
        after = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == x.shape and id(t) not in before]
        assert after == []
        assert calls.count("both") == 2  # there was something that waited
    finally:
        gc.enable()


def test_two_models_in_two_threads_do_not_take_from_each_other(swapper):
    import threading

    models = [settled(swapper, "llama", num_hidden_layers=3)[0] for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(1.1)
    plain = [logits(m) for m in models]
    wrong = []

    def run(model, want):
        wrong.extend(model for _ in range(20) if not torch.allclose(logits(model), want, atol=2e-5, rtol=2e-4))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(models, plain, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("more", [{}, {"skip": "RMSNorm"}, {"skip": "rotary_pos_emb"}], ids=str)
def test_what_was_decided_elsewhere_is_no_news_to_a_user_of_transformers(swapper, more):
    from kernelswap.adapters.transformers.switch import lines

    applied = swapper.swap(make("qwen3"), **more)
    assert lines(applied.outcomes, set()) == []
