"""`swap(model, attention=True)` in models whose layers do not all attend alike: windows, chunks, both in turns, and what they ask for by name."""

import gc
import importlib

import pytest
import torch

from kernelswap.api import Swapper
from kernelswap.slots import attention
from kernelswap.slots import attention_masks as masks
from kernelswap.types import Kept

transformers = pytest.importorskip("transformers")
SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
WINDOW = 6
MODELS = {
    "mistral": {"sliding_window": WINDOW},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "gemma3_text": {
        "sliding_window": WINDOW, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "cohere2": {"sliding_window": WINDOW},
    "llama4_text": {
        "attention_chunk_size": WINDOW, "intermediate_size_mlp": 48, "num_local_experts": 2, "no_rope_layers": [1, 0] * 2,
        "layer_types": ["chunked_attention", "full_attention"] * 2,
    },
    "exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "smollm3": {},
}  # fmt: skip
IDS = torch.arange(2, 22).reshape(2, 10)
PADDED = torch.ones_like(IDS).index_put_((torch.tensor(0), torch.arange(4)), torch.tensor(0))


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(offline=True, cache=tmp_path_factory.mktemp("cache"), table=())


def made(kind, **size):
    size = size or SIZE
    try:
        config = transformers.AutoConfig.for_model(kind, **{**size, **MODELS.get(kind, {})})
    except ValueError:
        pytest.skip(f"this Transformers has no {kind}")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("packed", [False, True], ids=["", "masks as on a GPU"])
@pytest.mark.parametrize("tokens", [3, 10], ids=["within the window", "beyond it"])
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("kind", MODELS)
def test_generated_tokens_are_those_of_the_original(swapper, monkeypatch, kind, cache, tokens, packed):
    if packed:
        if cache is None:
            pytest.skip("lengths are for static caches")
        monkeypatch.setattr(masks, "_reads_packed", lambda *_: True)
    model = made(kind)
    more = {
        "max_new_tokens": 9, "do_sample": False, "cache_implementation": cache, "disable_compile": True, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    for mask in (None, PADDED[:, 10 - tokens - 2 : 8] if tokens == 3 else PADDED):
        given = more if mask is None else {**more, "attention_mask": mask}
        expected = model.generate(IDS[:, :tokens], **given)
        with swapper.swap(model, attention=True) as applied, applied.counting():
            found = model.generate(IDS[:, :tokens], **given)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
        assert applied.refusals == ()
        assert applied.calls[""] == 4 * 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["smollm3", "gemma3_text"])
def test_continuous_batching_goes_on_with_what_was_replaced(swapper, kind):
    """Transformers takes nothing but its own names there; the kernel has `attn_implementation="kernelswap/attention"` for that."""
    pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
    model = made(kind)
    asked = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = transformers.ContinuousBatchingConfig(use_cuda_graph=False, num_blocks=64, max_batch_tokens=64)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21]]
    wanted = [model.generate(torch.tensor([p]), generation_config=asked)[0, len(p) :].tolist() for p in prompts]
    with swapper.swap(model, attention=True):
        setting = model.config._attn_implementation
        found = model.generate_batch(prompts, generation_config=asked, continuous_batching_config=batching, progress_bar=False)
        assert [one.generated_tokens for one in found.values()] == wanted
        assert model.config._attn_implementation is setting


@pytest.mark.slow
def test_a_swap_that_is_undone_while_a_batch_runs_stays_undone(swapper):
    pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
    model = made("smollm3")
    batching = transformers.ContinuousBatchingConfig(use_cuda_graph=False, num_blocks=64, max_batch_tokens=64)
    applied = swapper.swap(model, attention=True)
    manager = model.init_continuous_batching(continuous_batching_config=batching)
    assert model.config._attn_implementation == "sdpa"
    applied.undo()
    manager.stop()
    assert type(model.config._attn_implementation) is str
    assert model.config._attn_implementation == "sdpa"


def test_transformers_is_as_it_was_once_no_model_is_swapped(swapper):
    manager = pytest.importorskip("transformers.generation.continuous_batching.continuous_api").ContinuousBatchingManager
    gc.collect()
    before = dict(vars(manager))
    model = made("smollm3")
    with swapper.swap(model, attention=True):
        assert vars(manager)["stop"] is not before["stop"]
    gc.collect()
    assert dict(vars(manager)) == before


@pytest.mark.parametrize("kind", ["falcon", "deepseek_v32", "gemma4_text"])
def test_a_model_that_asks_for_its_setting_by_name_is_left_alone(swapper, kind):
    """A mask, or which keys are seen, depends on the answer."""
    try:
        name = type(transformers.AutoConfig.for_model(kind)).__module__.replace("configuration_", "modeling_")
    except ValueError:
        pytest.skip(f"this Transformers has no {kind}")
    part = next(c for n, c in vars(importlib.import_module(name)).items() if n.endswith("ForCausalLM") and c.__module__ == name)
    assert attention._asks_by_name(part.__new__(part))


def test_which_models_are_left_alone(swapper):
    model = made("falcon", **{name: n for name, n in SIZE.items() if name not in {"head_dim", "num_key_value_heads"}})
    with swapper.swap(model, attention=True) as applied:
        kept = next(o for o in applied.outcomes if o.site.layer == "attention")
        assert isinstance(kept, Kept)
        assert "its code asks whether the setting is 'sdpa'" in kept.reason
    for kind in MODELS:
        with swapper.swap(made(kind), attention=True) as applied:
            assert not any(isinstance(o, Kept) for o in applied.outcomes if o.site.layer == "attention"), kind


@pytest.mark.parametrize(("kind", "tokens", "causal"), [("smollm3", 10, 4), ("gemma3_text", 4, 4), ("gemma3_text", 10, 2)])
def test_a_compiled_prompt_is_causal_without_a_mask_wherever_its_window_is_not_reached(swapper, kind, tokens, causal):
    """With a cache. Without one, Transformers makes a mask while tracing, since sequences might be packed."""
    model, calls = made(kind), []

    def backend(graph, _):
        nodes = [n for n in graph.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
        calls.extend((n.kwargs.get("attn_mask") is None, n.kwargs.get("is_causal")) for n in nodes)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad(), swapper.swap(model, attention=True) as applied:
        expected = model(IDS[:, :tokens], use_cache=True).logits
        found = torch.compile(model, backend=backend, fullgraph=True)(IDS[:, :tokens], use_cache=True).logits
        assert applied.refusals == ()
    torch.testing.assert_close(found, expected)
    assert len(calls) == 4
    assert calls.count((True, True)) == causal
