"""LoRA before and after a swap: adapters are never gone round, and kernels that only call what LoRA wrapped stay."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.ecosystem.models import IDS, MLP, MLP_READS, logits, make, plan
from tests.slots.parts import Comparing

from kernelswap.apply import apply
from kernelswap.slots import module as slots
from kernelswap.types import Kept

ON_MLP, ON_ATTENTION = ["gate_proj", "up_proj", "down_proj"], ["q_proj", "v_proj"]


def adapted(model, targets, **more):
    torch.manual_seed(2)
    # weights of B are not zero, so that an adapter that is gone round shows
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **more))


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_a_kernel_that_reads_adapted_weights_declines_and_one_that_calls_them_does_not():
    model = adapted(make("qwen3"), ON_MLP)
    mlp = model.base_model.model.model.layers[0].mlp
    assert "gate_proj, which is wrapped by PEFT (Linear)" in slots.obstacle(mlp, MLP_READS)
    assert slots.obstacle(mlp, ("gate_proj()", "up_proj()", "down_proj()", "act_fn()")) is None
    assert "it is PEFT's" in slots.obstacle(mlp.gate_proj)
    untouched = adapted(make("qwen3"), ON_ATTENTION).base_model.model.model.layers[0].mlp
    assert slots.obstacle(untouched, MLP_READS) is None


@pytest.mark.parametrize("train", [True, False])
def test_lora_after_the_swap_makes_the_kernels_step_aside_that_would_go_round_it(train):
    plain = adapted(make("qwen3"), [*ON_MLP, *ON_ATTENTION]).train(train)
    model = make("qwen3").train(train)
    applied = apply(model, plan(model, mlps=True), Comparing())
    logits(model)
    model = adapted(model, [*ON_MLP, *ON_ATTENTION]).train(train)
    for _ in range(2):
        close(logits(model), logits(plain))
    kept = [o for o in applied.outcomes if isinstance(o, Kept)]
    assert [o.site.layer for o in kept] == ["MLP"] * 2
    assert "wrapped by PEFT" in kept[0].reason
    model.unload()
    assert not [o for o in applied.outcomes if isinstance(o, Kept)]


def test_lora_training_with_swapped_norms_gives_the_same_adapters():
    def train(model):
        torch.manual_seed(3)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    plain, model = (adapted(make("qwen3"), ON_ATTENTION, lora_dropout=0.1) for _ in range(2))
    applied = apply(model, plan(model, mlps=True), Comparing())
    theirs, ours = train(plain), train(model)
    assert applied.refusals == ()
    assert list(ours) == list(theirs)
    for name in ours:
        close(ours[name], theirs[name])


def test_modules_to_save_are_copies_that_stay_swapped():
    model = make("qwen3")
    apply(model, plan(model, rotary=False), Comparing(), check="off")
    model = adapted(model, ON_ATTENTION, modules_to_save=["norm"])
    wrapper = model.base_model.model.model.norm
    assert len(list(slots.swapped(wrapper))) == 2
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert wrapper.modules_to_save["default"].weight.grad is not None


def test_merge_and_unload_leaves_a_swapped_model():
    model = make("qwen3")
    applied = apply(model, plan(model, mlps=True), Comparing())
    tuned = adapted(model, ON_MLP)
    with torch.no_grad():
        expected = logits(tuned)
        merged = tuned.merge_and_unload()
        for _ in range(2):
            close(logits(merged), expected)
        with applied.counting():
            logits(merged)
    assert set(applied.calls.values()) == {1}
    assert MLP.layer == "MLP"


def test_a_swapped_model_saves_the_same_adapter(tmp_path):
    for name, swap_it in (("plain", False), ("ours", True)):
        model = make("qwen3")
        if swap_it:
            apply(model, plan(model), Comparing())
        adapted(model, ON_ATTENTION).save_pretrained(tmp_path / name)
    file = "adapter_model.safetensors"
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
