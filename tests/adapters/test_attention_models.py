"""Real models with attention kernels, held to eager attention in float32."""

import pytest
import torch
from packaging.version import Version
from tests.adapters import attention_world as world
from tests.adapters.attention_world import CAUSAL, MODELS, out, pair

KERNELS = ["kernelswap/attention", "kernels-community/flash-attn2", "kernels-community/itself"]
IDS = torch.arange(3 * 11).reshape(3, 11) % 61 + 2
PADDED = {
    "left": torch.tensor([[0] * 4 + [1] * 7, [1] * 11, [0] * 9 + [1] * 2]),
    "right": torch.tensor([[1] * 7 + [0] * 4, [1] * 11, [1] * 2 + [0] * 9]),
}

pytestmark = pytest.mark.usefixtures("kernels")


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("kind", MODELS)
def test_prefill_and_padded_batches(kind, attention):
    eager, model = pair(kind, attention)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        close(out(model, IDS), out(eager, IDS))
        for mask in PADDED.values():
            alive = mask.bool()
            close(out(model, IDS, attention_mask=mask)[alive], out(eager, IDS, attention_mask=mask)[alive])


def test_attention_is_what_these_models_are_about():
    """The comparison would not see a wrong kernel if attention hardly mattered."""
    eager, _ = pair("qwen3", "eager")
    with torch.no_grad():
        wanted = out(eager, IDS)
        for layer in eager.model.layers:
            layer.self_attn.scaling *= 1.05
        assert (out(eager, IDS) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("kind", CAUSAL)
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_left_padding_and_without(kind, attention, cache):
    eager, model = pair(kind, attention)
    for mask in (PADDED["left"], torch.ones_like(IDS)):
        asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
        asked |= {"output_logits": True, "return_dict_in_generate": True}
        found, wanted = model.generate(IDS, **asked), eager.generate(IDS, **asked)
        close(torch.stack(found.logits), torch.stack(wanted.logits))
        assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3"])
def test_sequences_packed_into_one_row(kind, attention):
    eager, model = pair(kind, attention)
    ids, lengths = IDS[:1], (4, 1, 6)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    told = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": 6, "max_length_k": 6}
    with torch.no_grad():
        wanted = torch.cat([out(eager, one) for one in ids.split(lengths, dim=1)], dim=1)
        if kind != "gpt_oss" or "flash" in attention:  # it tells its masks nothing of positions: eager mixes the sequences, too
            close(out(model, ids, position_ids=positions, use_cache=False), wanted)
        close(out(model, ids, position_ids=positions, use_cache=False, **told), wanted)


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt_oss", "deepseek_v3", "bert"])
def test_training_gradients(kind, attention):
    eager, model = pair(kind, attention)
    weight = torch.randn_like(out(eager, IDS))
    mask = PADDED["right"]
    grads = []
    for each in (eager, model):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        (out(each, IDS, attention_mask=mask) * weight * mask[..., None]).sum().backward()
        grads.append({name: p.grad for name, p in each.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        torch.testing.assert_close(grads[1][name], wanted, atol=1e-4 * max(1.0, wanted.abs().max().item()), rtol=1e-3)


@pytest.mark.parametrize("attention", KERNELS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_tokens_may_come_in_pieces(attention, side):
    eager, model = pair("gemma2", attention)
    mask = PADDED[side] if side else torch.ones_like(IDS)
    with torch.no_grad():
        wanted, cache, found, seen = out(eager, IDS, attention_mask=mask), None, [], 0
        for piece in IDS.split([5, 3, 1, 2], dim=1):
            seen += piece.shape[1]
            result = model(piece, past_key_values=cache, use_cache=True, attention_mask=mask[:, :seen])
            cache, found = result.past_key_values, [*found, result.logits]
    close(torch.cat(found, 1)[mask.bool()], wanted[mask.bool()])


def test_one_token_of_a_static_cache_reads_what_lives_and_builds_no_mask(kernels, monkeypatch):
    import transformers
    from transformers import StaticCache

    seen = []
    registered = world.registered("kernelswap/attention")
    real = registered.mask
    world.replace_mask("kernelswap/attention", lambda **kw: seen.append(real(**kw)) or seen[-1], monkeypatch)
    eager, model = pair("qwen3", "kernelswap/attention")
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=32)
        first = model(IDS[:, :10], past_key_values=cache, use_cache=True).logits
        last = model(IDS[:, 10:], past_key_values=cache, use_cache=True).logits
        close(torch.cat([first, last], 1), out(eager, IDS))
    if Version(transformers.__version__) >= Version("5.15"):  # before, it forbade to leave the mask of a static cache out
        assert seen[0] is None
    assert (seen[1].dtype, seen[1].flatten().tolist()) == (torch.int32, [11, 11, 11])
    assert seen[1].is_contiguous(), "a kernel reads it as an array"


def test_a_window_that_is_full_takes_no_mask_for_one_token(kernels, monkeypatch):
    seen = []
    registered = world.registered("kernelswap/attention")
    real = registered.mask
    world.replace_mask("kernelswap/attention", lambda **kw: seen.append((kw["q_length"], real(**kw))) or seen[-1][1], monkeypatch)
    eager, model = pair("gemma2", "kernelswap/attention")
    asked = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **asked), eager.generate(IDS, **asked))
    assert {mask for length, mask in seen if length == 1} == {None}


def test_queries_in_float32_take_the_models_dtype():
    """Norms kept in float32 (PEFT) next to half-precision weights."""
    eager, model = pair("llama", "kernels-community/flash-attn2")
    for each in (eager, model):
        each.to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = out(model, IDS)
        for layer in model.model.layers:
            layer.self_attn.q_proj.to(torch.float32)
        assert out(model, IDS).dtype is found.dtype
    assert (found.float() - out(eager, IDS).float()).abs().max() < 0.5


@pytest.mark.parametrize("attention", KERNELS[:2])
def test_a_model_compiles_in_one_graph(attention):
    _, model = pair("qwen3", attention)
    with torch.no_grad():
        wanted = out(model, IDS)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(out(compiled, IDS), wanted)


def test_a_compiled_prefill_stays_causal_without_a_mask():
    """Where Transformers itself makes a mask as soon as something traces, attention would take its slow path.

    With a cache: without one, Transformers takes what it may not read while tracing for sequences that could be packed.
    """
    _, model = pair("llama", "kernelswap/attention")
    calls = []

    def backend(graph, _):
        nodes = [n for n in graph.graph.nodes if n.target is torch.nn.functional.scaled_dot_product_attention]
        calls.extend((n.kwargs.get("attn_mask"), n.kwargs.get("is_causal")) for n in nodes)
        return graph.forward

    with torch.no_grad():
        wanted = out(model, IDS, use_cache=True)
        close(out(torch.compile(model, backend=backend, fullgraph=True), IDS, use_cache=True), wanted)
    assert calls == [(None, True)] * model.config.num_hidden_layers
