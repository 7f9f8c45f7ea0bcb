"""Kernels that bring a layout of their own (spec: fused layouts): for one model, proved, and taken back."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from tests.adapters.layouts import KERNEL
from tests.adapters.world import IDS, close, logits, plain, serving
from tests.hub import kernel_files

from kernelswap.adapters.transformers import layouts
from kernelswap.adapters.transformers.config import KernelConfig
from kernelswap.errors import TableError, UndoConflict

PAIRS = (("RMSNorm", "model.layers.*.post_attention_layernorm"), ("MLP", "model.layers.*.mlp"))
FUSED = "kernels-community/fused"
PLACES = [f"model.layers.{i}.post_attention_layernorm" for i in range(2)]


@pytest.fixture(autouse=True)
def fused(published):
    published.repo(FUSED).branch("v1", kernel_files("torch-cpu", KERNEL, name="fused"))


def config(layer="RMSNormMLP", key=PAIRS, **more):
    return KernelConfig({key: f"{FUSED}:{layer}", **more})


def calls(installed):
    return sys.modules[installed.load(FUSED).__name__].CALLS


def state(model):
    return {name: (t.data_ptr(), t.clone()) for name, t in model.state_dict().items()}


def same(model, reference):
    mine, theirs = model.state_dict(), reference.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_one_kernel_takes_the_place_of_a_norm_and_the_mlp_after_it(qwen, installed, said):
    model = qwen(use_kernels=True, kernel_config=config())
    found = serving(installed, model)
    assert [found[path] for path in PLACES] == [f"{FUSED}:RMSNormMLP"] * 2
    assert found["model.norm"] == "layers:RMSNorm"  # the rest of the table goes on
    layer = model.model.layers[0]
    assert type(layer.mlp) is torch.nn.Identity
    assert layer.post_attention_layernorm.gate_up_proj.weight.shape == (96, 32)
    before = len(calls(installed))
    close(logits(model), logits(plain()))
    assert len(calls(installed)) > before
    assert not [line for line in said() if "fused" in line]


def test_the_models_state_has_its_own_names_and_bits(qwen):
    same(qwen(kernel_config=config()), plain())


def test_one_module_is_made_anew_as_it_was_made(qwen, installed):
    model = qwen(kernel_config=config("ScaledNorm", "RMSNorm"))
    norms = {path: served for path, served in serving(installed, model).items() if "norm" in path}
    assert len(norms) == 9
    assert set(norms.values()) == {f"{FUSED}:ScaledNorm"}
    assert model.model.layers[0].self_attn.q_norm.scale.shape == (8,)
    assert model.model.norm.epsilon == model.config.rms_norm_eps
    close(logits(model), logits(plain()))
    same(model, plain())


def test_a_glob_over_paths_names_what_is_made_anew(qwen, installed):
    model = qwen(kernel_config=config("ScaledNorm", "model.layers.1.*layernorm"))
    assert sorted(path for path, served in serving(installed, model).items() if served.endswith("ScaledNorm")) == [
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
    ]
    close(logits(model), logits(plain()))


@pytest.mark.parametrize(("layer", "key"), [("RMSNormMLP", PAIRS), ("ScaledNorm", "RMSNorm")])
def test_switching_off_gives_the_very_modules_and_weights_back(qwen, layer, key):
    model = qwen()
    before = {path: (module, type(module)) for path, module in model.named_modules()}
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    expected = logits(model)
    model.set_use_kernels(True, config(layer, key))
    assert len(list(layouts.layouts(model))) in {2, 9}
    logits(model)
    model.use_kernels = False
    assert {path: (module, type(module)) for path, module in model.named_modules()} == before
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, (p, _) in weights.items()}
    assert all(torch.equal(p, was) for p, was in weights.values())
    assert torch.equal(logits(model), expected)


def test_d4_nothing_is_registered_with_transformers_and_other_models_are_as_ever(qwen, installed):
    import transformers.conversion_mapping as conversions

    before = {kind: repr(conversions.get_checkpoint_conversion_mapping(kind)) for kind in ("qwen3", "llama")}
    qwen(kernel_config=config())
    assert {kind: repr(conversions.get_checkpoint_conversion_mapping(kind)) for kind in before} == before
    patching = sys.modules.get("transformers.monkey_patching")
    assert patching is None or not patching.get_patch_mapping()
    other = qwen(use_kernels=True)
    assert type(other.model.layers[0].mlp).__name__ == "Qwen3MLP"
    assert serving(installed, other)["model.layers.0.mlp"] == "layers:SwiGLUMLP"
    close(logits(other), logits(plain()))


def test_what_is_saved_loads_without_kernels(qwen, tmp_path):
    from transformers import AutoModelForCausalLM

    model = qwen(kernel_config=config())
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not list(layouts.layouts(again))
    same(again, plain())
    torch.save(model.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = qwen(kernel_config=config())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    assert not other.load_state_dict(torch.load(file)).missing_keys
    same(other, plain())
    close(logits(other), logits(plain()))


def gradients(model):
    model.train()
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("layer", ["RMSNormMLP", "OnlyInfers"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_original_with_the_kernel_and_where_it_cannot_serve(qwen, installed, layer, checkpointing):
    model, expected = qwen(kernel_config=config(layer)), gradients(plain())
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = len(calls(installed))
    found = gradients(model)
    assert (len(calls(installed)) > before) == (layer == "RMSNormMLP")
    at = "model.layers.0."
    joined = torch.cat([expected[f"{at}mlp.gate_proj.weight"], expected[f"{at}mlp.up_proj.weight"]])
    torch.testing.assert_close(found[f"{PLACES[0]}.gate_up_proj.weight"], joined, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[f"{PLACES[0]}.scale"], expected[f"{PLACES[0]}.weight"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["model.embed_tokens.weight"], expected["model.embed_tokens.weight"], atol=1e-5, rtol=1e-4)
    model.eval()
    before = len(calls(installed))
    logits(model)
    assert len(calls(installed)) > before


def test_a_trained_layout_gives_trained_originals_back(qwen):
    model, reference = qwen(kernel_config=config()), plain()
    for one in (model, reference):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        gradients(one)
        optimizer.step()
    model.use_kernels = False
    for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_kernel_that_computes_something_else_is_refused_at_its_first_call(make_swapper, published):
    """With the prover of users: on the tensors of the first real call, against a float64 reference."""
    import kernelswap

    swapper = make_swapper(prover=None)
    kernelswap.install(swapper)
    try:
        from transformers import AutoModelForCausalLM

        for layer, served in (("Wrong", False), ("RMSNormMLP", True)):
            model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B", kernel_config=config(layer))
            close(logits(model), logits(plain()))
            before = len(calls(swapper))
            close(logits(model), logits(plain()))
            assert (len(calls(swapper)) > before) == served, swapper.explain(model)
    finally:
        kernelswap.uninstall()


REASONS = {
    "Forgets": "its conversion_mapping takes mlp.gate_proj.weight to model.layers.0.mlp.gate_proj.weight, which is not in",
    "Raises": "RaisesLayout raised ValueError: only silu is supported; PyTorch goes on for Raises (2)",
    "Plain": "it brings no PlainLayout; PyTorch goes on",
    "Absent": "it has no layer Absent",
}


@pytest.mark.parametrize("layer", REASONS)
def test_a_layout_that_cannot_be_had_is_one_line_and_changes_nothing(qwen, installed, said, layer):
    model = qwen(kernel_config=config(layer))
    about = [line for line in said() if "fused" in line]
    assert [REASONS[layer] in line for line in about][:1] == [True], about
    assert len({line.replace("layers.1", "layers.0") for line in about}) == 1
    assert not list(layouts.layouts(model))
    assert serving(installed, model)["model.layers.0.mlp"] == "layers:SwiGLUMLP"
    same(model, plain())
    close(logits(model), logits(plain()))


def test_a_repository_that_is_not_there_is_one_line(qwen, said):
    model = qwen(kernel_config={PAIRS: "kernels-community/none:RMSNormMLP"})
    assert len([line for line in said() if "kernels-community/none" in line]) == 1
    close(logits(model), logits(plain()))


PROBLEMS = [
    ((("A", "model.layers.*.mlp"), ("B", "model.norm")), "have one parent"),
    ((("A", "mlp"), ("B", "norm")), "have one parent"),
    ((("A", "model.blocks.*.mlp"), ("B", "model.blocks.*.norm")), "no module of this model is at model.blocks.*"),
    ((("A", "model.layers.*.mlp"), ("B", "model.layers.*.post_norm")), "model.layers.1 has no post_norm"),
]


@pytest.mark.parametrize(("pairs", "problem"), PROBLEMS)
def test_pairs_that_make_no_sense_are_an_error(qwen, pairs, problem):
    with pytest.raises(TableError) as e:
        qwen(kernel_config=config(key=pairs))
    assert problem in str(e.value)


def test_a_config_that_fails_leaves_the_model_as_it_was(qwen, installed):
    model = qwen(kernel_config=config())
    with pytest.raises(TableError):
        model.set_use_kernels(True, {"Nonsense": "org/repo:Layer"})
    assert serving(installed, model)[PLACES[0]] == f"{FUSED}:RMSNormMLP"
    close(logits(model), logits(plain()))


def test_another_config_starts_from_the_originals(qwen, installed):
    model = qwen(use_kernels=True)
    model.set_use_kernels(True, config())
    model.set_use_kernels(True, config("ScaledNorm", "RMSNorm"))
    assert serving(installed, model)["model.layers.0.mlp"] == "layers:SwiGLUMLP"
    assert len(list(layouts.layouts(model))) == 9
    model.set_use_kernels(True, KernelConfig({}))
    assert not list(layouts.layouts(model))
    same(model, plain())
    close(logits(model), logits(plain()))


def test_a_layer_that_is_left_alone_is_not_replaced(qwen, installed):
    model = qwen(kernel_config=config(**{"model.layers.0.*": ""}))
    assert [path for path, _ in layouts.layouts(model)] == PLACES[1:]
    assert type(model.model.layers[0].mlp).__name__ == "Qwen3MLP"
    close(logits(model), logits(plain()))


def test_a_kernel_for_another_device_replaces_nothing(qwen, said):
    model = qwen(kernel_config={PAIRS: {"cuda": f"{FUSED}:RMSNormMLP"}})
    assert not list(layouts.layouts(model))
    close(logits(model), logits(plain()))


def test_a_copy_has_the_kernel_and_is_given_back_by_itself(qwen, installed):
    model = qwen(kernel_config=config())
    twin = copy.deepcopy(model)
    twin.use_kernels = False
    assert not list(layouts.layouts(twin))
    assert len(list(layouts.layouts(model))) == 2
    same(twin, plain())
    close(logits(twin), logits(plain()))
    close(logits(model), logits(plain()))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].post_attention_layernorm.gate_up_proj.weight.zero_()
    close(logits(model), logits(plain()))
    before = len(calls(installed))
    assert not torch.allclose(logits(other), logits(model))
    assert len(calls(installed)) > before


def test_a_pickle_is_the_plain_model(qwen):
    model = qwen(kernel_config=config())
    model.kernel_config = None  # a value of ours, which the model keeps
    data = pickle.dumps(model)
    assert b"kernelswap" not in data
    assert b"RMSNormMLPLayout" not in data
    again = pickle.loads(data)
    assert not list(layouts.layouts(again))
    same(again, plain())
    close(logits(again), logits(plain()))
    close(logits(model), logits(plain()))


def test_adapters_and_hooks_are_not_gone_round(qwen, said):
    model = qwen()
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.set_use_kernels(True, config())
    assert [path for path, _ in layouts.layouts(model)] == PLACES[1:]
    assert any("has forward hooks" in line for line in said())
    handle.remove()


def test_lora_on_other_layers_trains_on_top(qwen):
    peft = pytest.importorskip("peft")
    model = qwen(kernel_config=config())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    adapted.train()
    adapted(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    with torch.no_grad():
        close(adapted.eval()(IDS).logits, logits(plain()))


def test_tied_weights_are_not_torn_apart(qwen, said):
    model = qwen()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    expected = logits(model)
    model.set_use_kernels(True, config())
    assert not list(layouts.layouts(model))
    assert any("mlp.up_proj.weight is shared with another module" in line for line in said())
    close(logits(model), expected)


def test_what_was_wrapped_since_is_a_conflict_that_says_so(qwen):
    model = qwen(kernel_config=config())
    layer = model.model.layers[0]
    layer.__class__ = type("Wrapped", (type(layer),), {})
    with pytest.raises(UndoConflict) as e:
        model.use_kernels = False
    assert "Wrapped" in str(e.value)


@pytest.mark.parametrize("layer", ["RMSNormMLP", "OnlyInfers"])
def test_compiled(qwen, layer):
    model = qwen(kernel_config=config(layer))
    if layer == "OnlyInfers":
        model.train()  # the original's forward, on the layout's weights
    compiled = torch.compile(model, backend="eager")
    close(compiled(IDS).logits.detach(), logits(plain()))


def test_generation_gives_the_same_tokens(qwen):
    model = qwen(kernel_config=config())
    for cache in ("dynamic", "static"):
        more = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
        assert torch.equal(model.generate(IDS, **more), plain().generate(IDS, **more))


def test_two_models_two_layouts_two_threads(qwen, installed):
    models = [qwen(), qwen()]
    configs = [config(), config("ScaledNorm", "RMSNorm")]
    threads = [threading.Thread(target=m.set_use_kernels, args=(True, c)) for m, c in zip(models, configs, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(list(layouts.layouts(m))) for m in models] == [2, 9]
    results = [None, None]

    def run(i):
        results[i] = [logits(models[i]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in results:
        for one in found:
            close(one, logits(plain()))


def test_a_model_made_from_its_config_and_a_base_model_take_layouts(installed, qwen):
    from transformers import AutoModel, AutoModelForCausalLM

    fresh = AutoModelForCausalLM.from_config(qwen().config, kernel_config=config())
    assert [path for path, _ in layouts.layouts(fresh)] == PLACES
    base = AutoModel.from_pretrained(
        "Qwen/Qwen3-0.6B", kernel_config=config(key=tuple((a, b.removeprefix("model.")) for a, b in PAIRS))
    )
    assert [path for path, _ in layouts.layouts(base)] == [path.removeprefix("model.") for path in PLACES]
    with torch.no_grad():
        close(base(IDS).last_hidden_state, plain().model(IDS).last_hidden_state)


@pytest.mark.parametrize(("name", "members"), layouts.USED)
def test_what_is_used_of_transformers_conversions_is_there(name, members):
    import transformers.core_model_loading as module

    made = {
        "WeightRenaming": lambda: module.WeightRenaming("a", "b"),
        "WeightConverter": lambda: module.WeightConverter(["a", "b"], "c", operations=[module.Concatenate(0)]),
        "Concatenate": lambda: module.Concatenate(0),
    }[name]()
    assert [member for member in members if not hasattr(made, member)] == []
