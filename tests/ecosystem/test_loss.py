"""`swap(model, loss=True)` on real Transformers models: losses and gradients as before, logits when they are read, memory saved."""

import subprocess
import sys
import textwrap

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.ecosystem.models import CAUSAL, IDS, make

from kernelswap import api
from kernelswap.types import Kept, Swap

LABELS = IDS.clone()
LABELS[0, :4] = -100


@pytest.fixture
def swapper(tmp_path):
    return api.Swapper(cache=tmp_path, offline=True)


def step(model, **more):
    """Loss, logits, and gradients by name."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=LABELS, **more)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(found, want):
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], atol=1e-6, rtol=1e-4, msg=name)


def head(applied):
    return next(o for o in applied.outcomes if o.site.layer == "LMHead")


@pytest.mark.parametrize("kind", CAUSAL)
def test_loss_gradients_and_logits_are_the_models_own_and_undo_leaves_no_trace(swapper, kind):
    model = make(kind).train()
    before = {name: (type(m), dict(vars(m))) for name, m in model.named_modules()}
    want, gradients = step(model)
    applied = swapper.swap(model, loss=True, only="LMHead", require="LMHead", build="never")
    for _ in range(2):  # the first call checks, the second does not
        out, found = step(model)
        close(found, gradients)
        torch.testing.assert_close(out.loss, want.loss, atol=1e-6, rtol=1e-5)
        assert type(out.logits) is not torch.Tensor  # nothing read them, Gemma's soft cap included
        torch.testing.assert_close(out.logits, want.logits)
    with torch.no_grad():
        assert type(model(input_ids=IDS).logits) is torch.Tensor
    assert type(model.eval()(input_ids=IDS).logits) is torch.Tensor
    model.train()
    applied.undo()
    assert all(type(m) is before[n][0] and vars(m).keys() == before[n][1].keys() for n, m in model.named_modules())
    again, found = step(model)
    assert type(again.logits) is torch.Tensor
    assert torch.equal(again.loss, want.loss)
    assert all(torch.equal(found[n], gradients[n]) for n in gradients)


def test_nothing_of_it_happens_unless_asked_for(swapper):
    model = make("qwen3").train()
    applied = swapper.swap(model, build="never")
    assert all(o.site.layer != "LMHead" for o in applied.outcomes)
    assert type(step(model)[0].logits) is torch.Tensor


def test_with_a_number_of_items_checkpointing_and_accumulation(swapper):
    model = make("llama").train()
    model.gradient_checkpointing_enable()
    want = step(model, num_items_in_batch=torch.tensor(7), use_cache=False)
    applied = swapper.swap(model, loss=True, only="LMHead", build="never")
    _out, found = step(model, num_items_in_batch=torch.tensor(7), use_cache=False)
    close(found, want[1])
    assert isinstance(head(applied), Swap)
    model(input_ids=IDS, labels=LABELS, num_items_in_batch=torch.tensor(7), use_cache=False).loss.backward()
    close({n: p.grad / 2 for n, p in model.named_parameters()}, want[1])


def test_hooks_on_the_head_see_logits(swapper):
    model = make("qwen3").train()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    _want, gradients = step(model)
    swapper.swap(model, loss=True, only="LMHead", build="never")
    _, found = step(model)
    close(found, gradients)
    torch.testing.assert_close(seen[-1], seen[0])


def test_a_backward_hook_on_the_head_is_given_the_gradients_that_it_would_be(swapper):
    seen = []
    model = make("qwen3").train()
    model.lm_head.register_full_backward_hook(lambda module, given, made: seen.append((given, made)))
    _, gradients = step(model)
    swapper.swap(model, loss=True, only="LMHead", build="never")
    for _ in range(2):
        close(step(model)[1], gradients)
    for found in seen[1:]:
        for mine, theirs in zip([*found[0], *found[1]], [*seen[0][0], *seen[0][1]], strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)


def test_lora_keeps_its_adapters_whether_the_head_is_adapted_or_not(swapper):
    for targets, swapped in ((["q_proj"], True), (["q_proj", "lm_head"], False)):
        torch.manual_seed(2)
        model = get_peft_model(make("qwen3"), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).train()
        want, gradients = step(model)
        applied = swapper.swap(model, loss=True, only="LMHead", build="never")
        out, found = step(model)
        close(found, gradients)
        torch.testing.assert_close(out.loss, want.loss, atol=1e-6, rtol=1e-5)
        sites = [o for o in applied.outcomes if o.site.layer == "LMHead"]
        assert [isinstance(o, Swap) for o in sites] == [swapped] * len(sites)
        assert swapped is False or len(sites) == 1


def test_a_head_that_is_parametrized_is_left_alone_with_the_reason(swapper):
    model = make("llama").train()
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)
    sites = [o for o in swapper.swap(model, loss=True, build="never").outcomes if o.site.layer == "LMHead"]
    assert all(isinstance(o, Kept) and "parametrized" in o.reason for o in sites)


def test_bfloat16_training_follows_the_originals_losses(swapper):
    losses = []
    for swap in (False, True):
        model = make("qwen3").to(torch.bfloat16).train()
        if swap:
            swapper.swap(model, loss=True, only="LMHead", require="LMHead", build="never")
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        run = []
        for _ in range(12):
            run.append(step(model)[0].loss.item())
            optimizer.step()
        losses.append(run)
    assert losses[0][-1] < losses[0][0] - 0.2
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.03


def test_under_ddp(swapper, tmp_path):
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = make("llama").train()
        _, gradients = step(model)
        swapper.swap(model, loss=True, only="LMHead", require="LMHead", build="never")
        step(model)
        for more in ({}, {"find_unused_parameters": True}):
            _out, found = step(DistributedDataParallel(model, **more))
            close({n.removeprefix("module."): g for n, g in found.items()}, gradients)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak of resident memory")
def test_a_training_step_holds_a_fraction_of_the_logits(tmp_path):
    """1536 tokens of a vocabulary of 65536: 384 MiB of logits, which the original holds about three times."""
    code = """
        import sys
        from pathlib import Path
        import torch
        from kernelswap import api
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=65536, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=2048,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).train()
        if sys.argv[1] == "kernel":
            api.Swapper(cache=Path(sys.argv[2]), offline=True).swap(
                model, loss=True, only="LMHead", require="LMHead", build="never", check="off"
            )
        ids = torch.arange(1536)[None]
        model(input_ids=ids[:, :64], labels=ids[:, :64]).loss.backward()
        peak = lambda: int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x).split()[1])
        Path("/proc/self/clear_refs").write_text("5")
        before = peak()
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        print(peak() - before)
    """
    used = [
        int(subprocess.check_output([sys.executable, "-c", textwrap.dedent(code), which, tmp_path], text=True).split()[-1])
        for which in ("original", "kernel")
    ]
    assert used[0] > 2 * 384 * 1024
    assert used[1] < used[0] / 3
