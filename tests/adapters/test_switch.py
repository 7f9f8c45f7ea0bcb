"""One model: kernels on, in another mode, off. Every gap of the reference that concerns this has its row."""

import copy
import pickle

import pytest
import torch
from tests.adapters import world
from tests.adapters.world import IDS, close, logits, plain, serving

from kernelswap.errors import ModeError, Refused
from kernelswap.types import Mode

NORMS = ["model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"]


def test_use_kernels_swaps_what_the_table_knows_and_computes_the_same(qwen, installed):
    model = qwen(use_kernels=True)
    found = serving(installed, model)
    assert {found[path] for path in NORMS} == {"layers:RMSNorm"}
    assert found["model.layers.0.mlp"] == "layers:SwiGLUMLP"
    assert found["model.layers.0.self_attn|apply_rotary_pos_emb"] == "layers:apply_rotary_pos_emb"
    assert model.use_kernels
    close(logits(model), logits(plain()))


def test_without_use_kernels_nothing_changes(qwen, installed, hub):
    model = qwen()
    assert not model.use_kernels
    assert serving(installed, model) == {}
    assert not hub.requests("/api/kernels/*")


def test_loading_info_is_handed_through(qwen):
    model, info = qwen(use_kernels=True, output_loading_info=True)
    assert model.use_kernels
    assert not info["missing_keys"]


def test_a17_use_kernels_false_really_gives_the_originals_back(qwen, installed):
    model = qwen()
    before = {path: (type(m), dict(vars(m))) for path, m in model.named_modules()}
    expected = logits(model)
    model.use_kernels = True
    assert serving(installed, model)
    logits(model)
    model.use_kernels = False
    assert not model.use_kernels
    assert {path: type(m) for path, m in model.named_modules()} == {path: cls for path, (cls, _) in before.items()}
    assert all("forward" not in vars(m) for m in model.modules())
    assert torch.equal(logits(model), expected)


def test_switching_on_again_keeps_the_config(qwen, installed):
    model = qwen(use_kernels=True, kernel_config={"RMSNorm": "kernels-community/liger-kernels:LigerRMSNorm"})
    model.use_kernels = False
    model.use_kernels = True
    assert serving(installed, model)["model.norm"] == "kernels-community/liger-kernels:LigerRMSNorm"


def test_a2_kernelize_is_a_method_and_takes_the_modes_of_the_guide(qwen, installed):
    model = qwen()
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.TRAINING | Mode.TORCH_COMPILE):
        model.kernelize(mode=mode)
        assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
    import transformers

    if hasattr(transformers, "kernelize"):  # a function since 5.15
        transformers.kernelize(model)
        transformers.kernelize(model, mode=Mode.INFERENCE)
    assert model.use_kernels


def test_modes_of_another_library_with_the_same_names_are_understood(qwen, installed):
    import enum

    theirs = enum.Flag("Mode", ["NONE_OF_OURS", "TORCH_COMPILE", "INFERENCE", "TRAINING", "FALLBACK"])
    model = qwen()
    model.kernelize(mode=theirs.TRAINING | theirs.TORCH_COMPILE)
    assert "model.layers.0.mlp" not in serving(installed, model)  # SwiGLUMLP of these tests does not compile
    with pytest.raises(ModeError, match="exclude"):
        model.kernelize(mode=theirs.TRAINING | theirs.INFERENCE)
    with pytest.raises(ModeError, match="is not a mode"):
        model.kernelize(mode="fast")


PER_MODE = {
    "RMSNorm": {
        "inference": "kernels-community/liger-kernels@3:OnlyInfers",
        Mode.TRAINING: "kernels-community/liger-kernels@3:Trains",
    }
}


def test_a11_train_and_eval_switch_between_the_kernels_of_a_config(qwen, installed):
    model = qwen(kernel_config=PER_MODE)
    classes = []
    for _ in range(2):
        assert serving(installed, model.eval())["model.norm"].endswith(":OnlyInfers")
        logits(model)
        classes.append(type(model.model.norm))
        assert serving(installed, model.train())["model.norm"].endswith(":Trains")
        model(IDS, labels=IDS).loss.backward()
        classes.append(type(model.model.norm))
    reference = plain().train()
    reference(IDS, labels=IDS).loss.backward()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_an_inference_only_kernel_is_never_live_in_training(qwen, installed):
    config = {"RMSNorm": "kernels-community/liger-kernels:OnlyInfers"}
    model = qwen(kernel_config=config)
    for mode in (None, Mode.INFERENCE, Mode.INFERENCE | Mode.TORCH_COMPILE):
        model.kernelize(mode=mode)
        assert serving(installed, model.eval())["model.norm"].endswith(":OnlyInfers")
        assert not serving(installed, model.train()).get("model.norm", "").endswith(":OnlyInfers")


def test_a_part_of_the_model_follows_its_own_mode(qwen, installed):
    model = qwen(kernel_config=PER_MODE)
    model.model.layers[0].train()
    with installed.applied(model).counting() as counted:
        logits(model)
    assert counted.calls["model.layers.0.input_layernorm"] == counted.calls["model.layers.1.input_layernorm"] == 1
    assert model.model.layers[0].input_layernorm.training
    assert not model.model.layers[1].input_layernorm.training


@pytest.mark.parametrize("mode", [Mode.INFERENCE, Mode.TRAINING])
def test_a12_d9_compile_mode_is_asked_for_and_kept_over_train_and_eval(qwen, installed, mode):
    config = {"RMSNorm": ["kernels-community/liger-kernels:LigerRMSNorm", "kernels-community/liger-kernels:Compiles"]}
    model = qwen(kernel_config=config)
    assert serving(installed, model)["model.norm"].endswith(":LigerRMSNorm")
    model.kernelize(mode=mode | Mode.TORCH_COMPILE)
    for _ in range(2):
        assert serving(installed, model.train())["model.norm"].endswith(":Compiles")
        assert serving(installed, model.eval())["model.norm"].endswith(":Compiles")


def test_a14_the_environment_switches_everything_off_and_nothing_is_fetched(qwen, installed, hub, monkeypatch, said):
    for value in ("0", "OFF", "NO", "FALSE", "off"):
        monkeypatch.setenv("USE_HUB_KERNELS", value)
        model = qwen(use_kernels=True, kernel_config={"RMSNorm": "kernels-community/liger-kernels:LigerRMSNorm"})
        model.kernelize(mode=Mode.INFERENCE)
        assert not model.use_kernels
        assert serving(installed, model) == {}
        with pytest.raises(Refused, match=f"USE_HUB_KERNELS is {value}"):
            _hub_kernels().get_kernel("kernels-community/liger-kernels", version=3)
    assert not hub.requests("*kernels*")
    assert sum("kernels are switched off" in line for line in said()) == 5


def _hub_kernels():
    import transformers.integrations.hub_kernels as module

    return module


def test_get_kernel_and_lazy_loading_go_through_us(installed, published):
    module = _hub_kernels()
    assert module.get_kernel("kernels-community/liger-kernels", version=3).layers.LigerRMSNorm
    with pytest.raises(Refused, match="stranger is not a trusted publisher"):
        module.get_kernel("stranger/norms", version=1)
    assert module.get_kernel("stranger/norms", version=1, allow_all_kernels=True).layers.LigerRMSNorm
    version = module._HUB_KERNEL_MAPPING["finegrained-fp8"]["version"]
    published.repo("kernels-community/finegrained-fp8").branch(
        f"v{version}", world.kernel("fp8", f"VALUE = {version}", version=version)
    )
    assert version == module.lazy_load_kernel("finegrained-fp8", {}).layers.VALUE
    assert module.lazy_load_kernel("deep-gemm", {}) is None  # not published here; no package of that name either


def test_c1_hooks_of_accelerate_survive_switching_and_modes(qwen, installed, tmp_path):
    from accelerate import cpu_offload

    from kernelswap.proof import Check

    installed._prover = Check(None)

    model = qwen()
    cpu_offload(model, execution_device="cpu")
    expected = logits(model)
    hooked = [p for p, m in model.named_modules() if hasattr(m, "_hf_hook")]
    model.use_kernels = True
    for _ in range(2):
        model.train()
        model.eval()
        close(logits(model), expected)
    assert serving(installed, model)["model.norm"] == "layers:RMSNorm"
    assert [p for p, m in model.named_modules() if hasattr(m, "_hf_hook")] == hooked
    model.use_kernels = False
    close(logits(model), expected)


def test_c2_function_kernels_are_of_one_model(qwen, installed):
    swapped, other = qwen(use_kernels=True), qwen()
    with installed.applied(swapped).counting() as counted:
        logits(other)
        assert not any(counted.calls.values())
        logits(swapped)
    assert counted.calls["model.layers.0.self_attn"] == 1


def test_c8_a_forward_that_the_user_replaced_is_kept(qwen, installed):
    model = qwen()
    calls = []
    original = model.model.norm.forward
    model.model.norm.forward = lambda *a, **k: calls.append(1) or original(*a, **k)
    patched = model.model.norm.forward
    model.use_kernels = True
    expected = logits(plain())
    close(logits(model), expected)
    assert calls
    model.use_kernels = False
    assert model.model.norm.forward is patched


def test_d1_models_do_not_share_what_was_asked_for(qwen, installed):
    first = qwen(use_kernels=True, kernel_config={"RMSNorm": "kernels-community/liger-kernels:LigerRMSNorm"})
    second = qwen(use_kernels=True)
    first.train()
    first.eval()
    assert serving(installed, second)["model.norm"] == "layers:RMSNorm"
    assert serving(installed, first)["model.norm"].endswith(":LigerRMSNorm")


def test_d5_from_config_takes_the_keywords(installed, published):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained("Qwen/Qwen3-0.6B")
    assert AutoModelForCausalLM.from_config(config, allow_all_kernels=True).use_kernels is False
    norms = {"RMSNorm": "stranger/norms:LigerRMSNorm"}
    model = AutoModelForCausalLM.from_config(config, use_kernels=True, kernel_config=norms, allow_all_kernels=True)
    assert serving(installed, model)["model.norm"] == "stranger/norms:LigerRMSNorm"


def test_a_copy_has_kernels_and_can_be_given_back_by_itself(qwen, installed):
    model = qwen(use_kernels=True)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert twin.use_kernels
    close(logits(twin), expected)
    twin.use_kernels = False
    assert not twin.use_kernels
    assert model.use_kernels
    close(logits(twin), expected)


def test_a_pickled_model_comes_back_as_the_original(qwen):
    model = qwen(use_kernels=True)
    functions = [f for m in model.modules() for f in vars(m).get("_kernel_funcs", {}).values()]
    if any("<locals>" in type(f).__qualname__ for f in functions):
        pytest.skip("`kernels` put functions into the model that cannot be pickled, with us or without")
    expected = logits(model)
    loaded = pickle.loads(pickle.dumps(model))
    close(logits(loaded), expected)
