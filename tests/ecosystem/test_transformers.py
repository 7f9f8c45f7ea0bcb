"""Models as Transformers builds them: their decorators, caches, generation, checkpoints and files."""

import pickle
import subprocess
import sys

import pytest
import torch
from tests.contract.slot import same, state_of
from tests.ecosystem.models import CAUSAL, IDS, NORM, ROTARY, gemma_norm_kernel, layer_norm_kernel, logits, make, plan
from tests.slots.parts import Comparing, Prover, kernel, swap

from kernelswap.apply import apply
from kernelswap.slots import function as function_slot
from kernelswap.slots import module as module_slot
from kernelswap.types import Kept, Swap

pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def norms_of(kind):
    return kernel(gemma_norm_kernel, reads=("weight", "eps")) if kind.startswith("gemma") else NORM


@pytest.mark.parametrize("kind", CAUSAL)
def test_norms_and_rotary_embeddings_of_a_causal_model(kind):
    model = make(kind)
    with torch.no_grad():
        plain, before = logits(model), state_of(model)
        for path, module in model.named_modules():
            if path.endswith("self_attn"):
                assert function_slot.obstacle(module, "apply_rotary_pos_emb") is None
            if "norm" in path:
                assert module_slot.obstacle(module, ("weight",)) is None
        swaps = plan(model, norms=norms_of(kind))
        prover = Comparing()
        applied = apply(model, swaps, prover)
        for _ in range(2):
            close(logits(model), plain)
        assert len(prover.calls) == len(swaps)
        assert applied.refusals == ()
        assert all(isinstance(o, Swap) for o in applied.outcomes)
        with applied.counting():
            logits(model)
        assert set(applied.calls.values()) == {1}
        applied.undo()
        assert torch.equal(logits(model), plain)
    assert same(before, state_of(model))


def test_gemma_under_a_plain_norm_is_refused_and_stays_right():
    model = make("gemma")
    with torch.no_grad():
        plain = logits(model)
        applied = apply(model, plan(model, norms=NORM, rotary=False), Comparing())
        for _ in range(2):
            assert torch.equal(logits(model), plain)
    assert len(applied.refusals) == 5
    assert not [o for o in applied.outcomes if isinstance(o, Kept)]  # training is not refused before it was tried


def test_bert_with_its_layer_norms():
    model = make("bert")
    one = kernel(layer_norm_kernel)
    swaps = [swap(path, one) for path, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)]
    with torch.no_grad():
        plain = logits(model)
        with apply(model, swaps, Comparing()) as applied:
            close(logits(model), plain)
            assert applied.refusals == ()
        assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_generation_with_a_cache_gives_the_same_tokens(kind):
    model = make(kind)
    more = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = model.generate(IDS, **more)
    applied = apply(model, plan(model), Comparing())
    assert torch.equal(model.generate(IDS, **more), plain)
    with applied.counting():
        assert torch.equal(model.generate(IDS, **more), plain)
    assert set(applied.calls.values()) == {8}
    applied.undo()
    assert torch.equal(model.generate(IDS, **more), plain)


def test_another_model_of_the_same_file_keeps_its_rotary_embedding():
    from transformers.models.qwen3 import modeling_qwen3

    one, other = make("qwen3"), make("qwen3")
    before = modeling_qwen3.apply_rotary_pos_emb
    loud = kernel(lambda q, k, cos, sin, unsqueeze_dim=1: (q * 0, k * 0), kind="function")
    plain = logits(other)
    apply(one, [swap("model.layers.0.self_attn", loud, name="apply_rotary_pos_emb")], Prover(), check="off")
    assert not torch.allclose(logits(one), plain)
    assert torch.equal(logits(other), plain)
    assert modeling_qwen3.apply_rotary_pos_emb is before


@pytest.mark.parametrize("decorator", ["deprecate_kwarg", "no_grad", "both"])
def test_a_forward_decorated_as_transformers_does_is_reached(decorator):
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.utils.deprecation import deprecate_kwarg

    forward = LlamaAttention.forward
    if decorator != "no_grad":
        forward = deprecate_kwarg("past_key_value", new_name="past_key_values", version="9.9")(forward)
    if decorator != "deprecate_kwarg":
        forward = torch.no_grad()(forward)
    decorated = type("LlamaAttention", (LlamaAttention,), {"forward": forward})
    model = make("llama")
    plain = logits(model)
    for layer in model.model.layers:
        layer.self_attn.__class__ = decorated
    assert function_slot.obstacle(model.model.layers[0].self_attn, "apply_rotary_pos_emb") is None
    prover = Comparing()
    swaps = [swap(f"model.layers.{i}.self_attn", ROTARY, name="apply_rotary_pos_emb") for i in range(2)]
    applied = apply(model, swaps, prover)
    for _ in range(2):
        close(logits(model), plain)
    assert len(prover.calls) == 2
    applied.undo()
    assert type(model.model.layers[0].self_attn) is decorated


# -- training -----------------------------------------------------------------------------------------------------


def train(model, steps=3):
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_training_loop_with_and_without_gradient_checkpointing(kind, checkpointing):
    plain, model = make(kind, attention_dropout=0.1), make(kind, attention_dropout=0.1)
    for one in (plain, model):
        if checkpointing is not None:
            one.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    prover = Comparing()
    applied = apply(model, plan(model), prover)
    close(train(model), train(plain))
    assert applied.refusals == ()
    # reentrant checkpointing runs its first pass without gradients
    assert {run.training for _, run in prover.calls} == ({True, False} if checkpointing else {True})
    with torch.no_grad():
        close(logits(model.eval()), logits(plain.eval()))
    assert {run.training for _, run in prover.calls} == {True, False}
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        close(ours, theirs)


def test_a_forward_only_kernel_rests_in_training_and_serves_generation_between():
    model = make("qwen3")
    applied = apply(model, plan(model, norms=kernel(NORM.forward, backward=False), rotary=False), Comparing())
    with applied.counting():
        train(model, steps=1)
    assert sum(applied.calls.values()) == 0
    model.eval()
    with torch.no_grad(), applied.counting():
        logits(model)
    assert set(applied.calls.values()) == {1}


# -- files --------------------------------------------------------------------------------------------------------


def test_save_pretrained_is_the_same_files_and_loads_plain(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make("qwen3")
    plain = logits(model)
    model.save_pretrained(tmp_path / "before")
    apply(model, plan(model), Comparing())
    logits(model)
    model.save_pretrained(tmp_path / "after")
    names = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "after").iterdir())
    for name in names:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    assert not list(module_slot.swapped(back))
    assert torch.equal(logits(back), plain)


LOAD = """
import sys, torch
sys.modules["kernelswap"] = None
model = torch.load(sys.argv[1], weights_only=False)
out = model(torch.load(sys.argv[2])).logits
assert torch.equal(out, torch.load(sys.argv[3])), "other numbers"
assert type(model.model.norm).__mro__[1] is torch.nn.Module
assert "kernelswap" not in [m.split(".")[0] for m, v in sys.modules.items() if v is not None]
"""


def test_a_whole_saved_model_loads_where_kernelswap_is_not_installed(tmp_path):
    model = make("qwen3")
    with torch.no_grad():
        plain = logits(model)
        apply(model, plan(model), Comparing())
        logits(model)
    for name, value in (("model", model), ("ids", IDS), ("plain", plain)):
        torch.save(value, tmp_path / name)
    assert b"kernelswap" not in (tmp_path / "model").read_bytes()
    files = [str(tmp_path / name) for name in ("model", "ids", "plain")]
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_pickled_model_is_plain():
    model = make("llama")
    apply(model, plan(model), Comparing(), check="off")
    back = pickle.loads(pickle.dumps(model))
    assert not list(module_slot.swapped(back))


# -- the rest of the world ----------------------------------------------------------------------------------------


def test_torch_compile_of_a_whole_model_without_a_graph_break():
    torch._dynamo.reset()
    model = make("qwen3")
    with torch.no_grad():
        plain = logits(model)
        apply(model, plan(model), Comparing())
        logits(model)
        fast = torch.compile(model.model, fullgraph=True, backend="eager")
        close(model.lm_head(fast(IDS, use_cache=False).last_hidden_state), plain)
    torch._dynamo.reset()


def test_attention_implementations_can_be_changed_under_a_swap():
    model = make("qwen3")
    with torch.no_grad():
        plain = logits(model)
        apply(model, plan(model), Comparing())
        for name in ("eager", "sdpa"):
            model.set_attn_implementation(name)
            close(logits(model), plain)


def test_outputs_that_hooks_collect_are_still_collected():
    model = make("qwen3")
    with torch.no_grad():
        plain = model(IDS, output_hidden_states=True, output_attentions=True)
        apply(model, plan(model), Comparing())
        for _ in range(2):
            ours = model(IDS, output_hidden_states=True, output_attentions=True)
            assert len(ours.hidden_states) == len(plain.hidden_states)
            for a, b in zip(ours.hidden_states, plain.hidden_states, strict=True):
                close(a, b)
            assert len(ours.attentions or ()) == len(plain.attentions or ())
