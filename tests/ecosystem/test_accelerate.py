"""Whole models under accelerate: weights in memory of their own, on disk, and hooks that come and go."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from tests.ecosystem.models import IDS, MLP_READS, logits, make, plan
from tests.slots.parts import Comparing

from kernelswap.apply import apply
from kernelswap.slots import module as slots


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def offload(model, kind, folder):
    if kind == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif kind == "disk":
        disk_offload(model, str(folder), execution_device="cpu")
    else:
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
        places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(2)}
        dispatch_model(model, places, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatch"])
def test_an_offloaded_model_is_served_and_keeps_its_hooks_through_train_and_eval(kind, when, tmp_path):
    model = make("qwen3")
    with torch.no_grad():
        plain = logits(model)
        if when == "before":
            offload(model, kind, tmp_path)
        applied = apply(model, plan(model), Comparing())
        if when == "after":
            offload(model, kind, tmp_path)
        for _ in range(2):
            close(logits(model), plain)
        model.train()
        close(logits(model), plain)
        model.eval()
        assert model.model.norm.weight.is_meta
        assert applied.refusals == ()
        with applied.counting():
            close(logits(model), plain)
        assert set(applied.calls.values()) == {1}
        applied.undo()
        assert torch.equal(logits(model), plain)
        remove_hook_from_module(model, recurse=True)
        assert torch.equal(logits(model), plain)


def test_hooks_that_go_leave_the_kernels(tmp_path):
    model = make("qwen3")
    with torch.no_grad():
        plain = logits(model)
        cpu_offload(model, execution_device="cpu")
        applied = apply(model, plan(model), Comparing())
        close(logits(model), plain)
        remove_hook_from_module(model, recurse=True)
        with applied.counting():
            close(logits(model), plain)
    assert set(applied.calls.values()) == {1}
    assert not [m for m in slots.swapped(model) if "forward" in vars(m) or "_old_forward" in vars(m)]


def test_a_kernel_that_reads_weights_which_are_elsewhere_between_calls_declines():
    model = make("qwen3")
    cpu_offload(model, execution_device="cpu")
    assert "keeps its weights elsewhere" in slots.obstacle(model.model.layers[0].mlp, MLP_READS)


def test_offloading_after_the_swap_is_noticed_by_refresh():
    model = make("qwen3")
    applied = apply(model, plan(model, mlps=True), Comparing(), check="off")
    with torch.no_grad():
        plain = logits(make("qwen3"))
        cpu_offload(model, execution_device="cpu")
        applied.refresh()
        close(logits(model), plain)
        with applied.counting():
            logits(model)
    assert {path: n for path, n in applied.calls.items() if path.endswith("mlp")} == {
        "model.layers.0.mlp": 0,
        "model.layers.1.mlp": 0,
    }


@pytest.mark.filterwarnings("ignore:.*generate.*on a device type different:UserWarning")  # Transformers before 5.15
def test_generation_under_offload():
    model = make("llama")
    more = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **more)
    cpu_offload(model, execution_device="cpu")
    apply(model, plan(model), Comparing())
    assert torch.equal(model.generate(IDS, **more), plain)
