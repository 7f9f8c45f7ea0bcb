"""`swap(model, graphs=True)` on a GPU: what tests/replay shows of the machinery, here with captured CUDA graphs."""

import copy
import gc

import pytest
import torch
from tests.swapping import frozen

from kernelswap.api import Swapper
from kernelswap.types import Swap

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]
STATIC = {"cache_implementation": "static", "do_sample": False}


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(cache=tmp_path_factory.mktemp("gpu"), offline=True)


def qwen3(dtype=torch.float32, **more):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, initializer_range=0.1, pad_token_id=0, bos_token_id=1, eos_token_id=None, **more,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval().to("cuda", dtype)


@pytest.fixture
def model():
    return qwen3()


def prompt(batch=2, length=33):
    return (torch.arange(2, 2 + batch * length).reshape(batch, length) % 500).cuda()


def generated(model, ids=None, tokens=24, **more):
    ids = prompt() if ids is None else ids
    return model.generate(ids, max_new_tokens=tokens, **{**STATIC, **more})


def eager(model, ids=None, tokens=24, **more):
    return generated(model, ids, tokens, **more, disable_compile=True)


def facts(applied):
    return applied.report["graphs"]


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_tokens_are_those_of_eager_and_one_graph_serves_two_calls(model, swapper, batch, attention):
    ids, mask = prompt(batch), torch.ones(batch, 33, dtype=torch.long, device="cuda")
    mask[0, :5] = 0
    expected = eager(model, ids), eager(model, ids, attention_mask=mask), eager(model, prompt(batch, 21), 12)
    with swapper.swap(model, graphs=True, attention=attention) as applied:
        assert any(o.site.layer == "attention" and isinstance(o, Swap) for o in applied.outcomes) is attention
        assert torch.equal(generated(model, ids), expected[0]), applied.explain()
        assert facts(applied)["recorded"] == 1, applied.explain()
        assert torch.equal(generated(model, ids), expected[0])
        assert torch.equal(generated(model, prompt(batch, 21), 12), expected[2])
        assert facts(applied)["recorded"] == 1
        assert facts(applied)["replayed"] == 23 - 2 + 23 + 11
        assert torch.equal(generated(model, ids, attention_mask=mask), expected[1])
        assert applied.refusals == ()


def test_in_half_precision_logits_are_as_close_as_those_of_eager_kernels(swapper):
    model = qwen3(torch.bfloat16)
    more = {"output_logits": True, "return_dict_in_generate": True}
    expected = eager(model, **more)
    with swapper.swap(model, graphs=True) as applied:
        found = generated(model, **more)
        assert facts(applied)["replayed"] == 21, applied.explain()
        for mine, theirs in zip(found.logits[:4], expected.logits[:4], strict=True):
            torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.05)


def test_padded_prompts_in_half_precision_and_no_step_waits_for_the_gpu(swapper, monkeypatch):
    from kernelswap.slots import attention_masks

    model = qwen3(torch.bfloat16)
    mask = torch.ones(2, 33, dtype=torch.long, device="cuda")
    mask[0, :7] = 0
    more = {"output_logits": True, "return_dict_in_generate": True, "attention_mask": mask}
    expected = eager(model, **more)
    packed, made = attention_masks.packed, []

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            made.append(packed(*args))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return made[-1]

    monkeypatch.setattr(attention_masks, "packed", watched)
    with swapper.swap(model, graphs=True) as applied:
        found = generated(model, **more)
        assert facts(applied)["replayed"] == 21, applied.explain()
        assert applied.refusals == ()
    assert len(made) == 23
    for mine, theirs in zip(found.logits[:4], expected.logits[:4], strict=True):
        torch.testing.assert_close(mine, theirs, atol=0.1, rtol=0.05)


def test_weights_that_change_in_place_are_followed_and_others_recorded_anew(model, swapper):
    with swapper.swap(model, graphs=True) as applied:
        before = generated(model)
        layer = model.model.layers[0].mlp.up_proj
        with torch.no_grad():
            layer.weight.mul_(-1.5)
        found = generated(model)
        assert facts(applied)["recorded"] == 1
        layer.weight = torch.nn.Parameter(layer.weight.detach() * -1.0)
        again = generated(model)
        assert facts(applied)["recorded"] == 2, facts(applied)
    assert torch.equal(again, eager(model))
    with torch.no_grad():
        layer.weight.mul_(-1.0)
    assert torch.equal(found, eager(model))
    assert not torch.equal(found, before)


def test_a_lora_adapter(model, swapper):
    peft = pytest.importorskip("peft")
    with swapper.swap(model, graphs=True):
        generated(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
        found = generated(adapted)
    assert torch.equal(found, eager(adapted))


def test_training_mode_undo_and_a_copy(model, swapper):
    expected = eager(model)
    before = frozen(model)
    applied = swapper.swap(model, graphs=True)
    generated(model)
    model.train()(prompt(), labels=prompt()).loss.backward()
    model.zero_grad()
    model.eval()
    twin = copy.deepcopy(model)
    assert torch.equal(generated(model), expected)
    applied.undo()
    assert frozen(model) == before
    assert torch.equal(eager(model), expected)
    assert torch.equal(generated(twin), expected)
    swapper.unkernelize(twin)


def test_memory_is_told_and_comes_back_with_undo(model, swapper):
    eager(model, prompt(8))
    with swapper.swap(model, graphs=True):
        generated(model, prompt(1))  # what cuBLAS keeps for the stream that records, for good
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    applied = swapper.swap(model, graphs=True)
    for batch in (2, 4, 8):
        generated(model, prompt(batch))
    assert facts(applied)["held"] == 3
    assert facts(applied)["bytes"] > 2 * 3 * 14 * 2 * 57 * 64 * 4, "at least keys and values of three layers"
    applied.undo()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


class Synchronises(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.float().sum().item() else x


def test_a_capture_that_fails_leaves_the_model_and_cuda_working(model, swapper):
    model.model.layers[1].mlp = Synchronises(model.model.layers[1].mlp).eval()
    expected = eager(model)
    with swapper.swap(model, graphs=True) as applied:
        for _ in range(2):
            assert torch.equal(generated(model), expected)
        assert facts(applied)["recorded"] == 0
        (why,) = facts(applied)["refused"]
        assert why.startswith("it cannot be recorded: ")
        torch.manual_seed(3)
        first = torch.rand(4, device="cuda")
        torch.manual_seed(3)
        assert torch.equal(torch.rand(4, device="cuda"), first)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        model.model.layers[1].mlp = model.model.layers[1].mlp.inner
        assert torch.equal(generated(model), expected)
        assert facts(applied)["recorded"] == 1, applied.explain()
        graph, x = torch.cuda.CUDAGraph(), torch.zeros(4, device="cuda")
        with torch.cuda.graph(graph):
            y = x + torch.rand(4, device="cuda")
        graph.replay()
        assert bool((y > 0).any())


def test_streams_and_sampling(model, swapper):
    with swapper.swap(model, graphs=True):
        expected = generated(model)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            assert torch.equal(generated(model), expected)
        torch.cuda.synchronize()
        assert torch.equal(generated(model), expected)
        torch.manual_seed(0)
        found = generated(model, do_sample=True)
        torch.manual_seed(0)
        assert torch.equal(generated(model, do_sample=True), found)
