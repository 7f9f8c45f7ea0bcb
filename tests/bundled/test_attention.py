"""`kernelswap/attention` against attention in float64, one query at a time, for everything that can be asked of it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.kernels import opened

BUILD = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "attention" / "build" / "torch-universal"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [  # heads, kv heads, queries, keys, dim, value dim
    pytest.param((4, 4, 7, 7, 16, 16), id="as many heads"),
    pytest.param((6, 2, 13, 13, 8, 8), id="grouped"),
    pytest.param((4, 1, 5, 5, 16, 16), id="one kv head"),
    pytest.param((4, 2, 1, 11, 16, 16), id="one token"),
    pytest.param((4, 2, 3, 11, 16, 16), id="a few tokens after others"),
    pytest.param((4, 2, 11, 3, 16, 16), id="more queries than keys"),
    pytest.param((4, 4, 9, 9, 24, 16), id="mla"),
    pytest.param((1, 1, 1, 1, 1, 1), id="nothing to choose"),
]
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (3, 0)},
    "two-sided window": {"window": (2, 3)},
    "softcap": {"causal": True, "softcap": 0.7},
    "sinks": {"causal": True, "sinks": True},
    "alibi": {"causal": True, "alibi": True},
    "scale": {"causal": True, "scale": 0.9},
    "all at once": {"causal": True, "window": (4, 0), "softcap": 1.3, "sinks": True, "scale": 0.4},
}


@pytest.fixture(scope="module")
def kernel():
    with opened("attention_under_test", BUILD) as module:
        importlib.import_module("attention_under_test.reference")
        yield module


def tensors(shape, dtype=torch.float32, *, batch=2, grad=False, seed=0):
    heads, kv, queries, keys, dim, value_dim = shape
    torch.manual_seed(seed)
    made = (torch.randn(batch, queries, heads, dim), torch.randn(batch, keys, kv, dim), torch.randn(batch, keys, kv, value_dim))
    return [x.to(dtype).requires_grad_(grad) for x in made]


def both_forms(options, heads, dtype=torch.float32):
    """Keywords of the reference, and of the kernel."""
    torch.manual_seed(1)
    ours = dict(options)
    if ours.pop("sinks", False):
        ours["sinks"] = torch.randn(heads)
    if ours.pop("alibi", False):
        ours["alibi"] = torch.rand(heads)
    names = {"scale": "softmax_scale", "window": "window_size", "alibi": "alibi_slopes", "sinks": "s_aux"}
    theirs = {names.get(key, key): value for key, value in ours.items()}
    return ours, theirs


def expected(kernel, q, k, v, **options):
    q, k, v = (x.detach().transpose(1, 2) for x in (q, k, v))
    return kernel.reference.attention(q, k, v, **options).transpose(1, 2)


def error(found, wanted):
    return ((found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1)).item() if wanted.numel() else 0.0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option_is_what_it_is_in_float64(kernel, shape, options):
    q, k, v = tensors(shape)
    ours, theirs = both_forms(options, shape[0])
    found = kernel.flash_attn_func(q, k, v, **theirs)
    assert found.shape == (2, shape[2], shape[0], shape[5])
    assert error(found, expected(kernel, q, k, v, **ours)) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", ["causal", "window", "all at once"])
def test_every_dtype(kernel, dtype, options):
    shape = (6, 2, 33, 47, 24, 24)
    q, k, v = tensors(shape, dtype)
    ours, theirs = both_forms(OPTIONS[options], 6)
    found = kernel.flash_attn_func(q, k, v, **theirs)
    assert found.dtype is dtype
    assert error(found, expected(kernel, q, k, v, **ours)) < TOLERANCES[dtype]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4], SHAPES[5], SHAPES[6]])
def test_gradients_are_those_of_the_formula(kernel, shape, options):
    q, k, v = tensors(shape, torch.float64, grad=True)
    ours, theirs = both_forms(options, shape[0])
    weight = torch.randn(2, shape[2], shape[0], shape[5], dtype=torch.float64)
    learned = [theirs["s_aux"].double().requires_grad_()] if "s_aux" in theirs else []
    if learned:
        theirs["s_aux"], ours["sinks"] = learned[0], learned[0]
    found = torch.autograd.grad((kernel.flash_attn_func(q, k, v, **theirs) * weight).sum(), [q, k, v, *learned])
    out = kernel.reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), **ours).transpose(1, 2)
    wanted = torch.autograd.grad((out * weight).sum(), [q, k, v, *learned])
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) < 1e-9


@pytest.mark.parametrize(("queries", "keys"), [(700, 700), (300, 900)])
@pytest.mark.parametrize("window", [(19, 0), (30, 11)])
def test_a_narrow_window_over_a_long_sequence_is_computed_in_blocks(kernel, queries, keys, window):
    q, k, v = tensors((2, 1, queries, keys, 8, 8), torch.float64, batch=1)
    mask = kernel.dense.allowed(queries, keys, *window, torch.device("cpu"))
    wanted = kernel.dense.attend(*(x.transpose(1, 2) for x in (q, k, v)), mask=mask).transpose(1, 2)
    found = kernel.flash_attn_func(q, k, v, window_size=window, causal=window[1] == 0)
    assert error(found, wanted) < 1e-12


def test_plain_causal_attention_builds_no_mask(kernel, monkeypatch):
    called = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **kw: called.append(kw) or real(*a, **kw))
    q, k, v = tensors((4, 2, 64, 64, 16, 16))
    kernel.flash_attn_func(q, k, v, causal=True)
    kernel.flash_attn_func(q[:, :1], k, v, causal=True, window_size=(9, 0))
    assert [(kw["attn_mask"], kw.get("is_causal", False)) for kw in called] == [(None, True), (None, False)]


def test_compiling_keeps_the_causal_path(kernel):
    seen = []

    def look(graph, _):
        seen.extend(node.kwargs for node in graph.graph.nodes if "scaled_dot_product" in str(node.target))
        return graph.forward

    q, k, v = tensors((4, 2, 64, 64, 16, 16))
    out = torch.compile(kernel.flash_attn_func, backend=look, fullgraph=True)(q, k, v, causal=True)
    assert [(kw["attn_mask"], kw["is_causal"]) for kw in seen] == [(None, True)]
    assert torch.equal(out, kernel.flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("options", ["full", "causal", "window", "softcap", "sinks", "alibi"])
def test_sequences_laid_end_to_end_do_not_see_each_other(kernel, options):
    lengths = [(5, 5), (1, 9), (0, 4), (4, 4), (3, 7)]
    ours, theirs = both_forms(OPTIONS[options], 4)
    parts = [tensors((4, 2, a, b, 8, 8), batch=1, seed=i) for i, (a, b) in enumerate(lengths)]
    q, k, v = (torch.cat([part[i][0] for part in parts]) for i in range(3))
    cu_q, cu_k = (torch.tensor([0, *[pair[i] for pair in lengths]]).cumsum(0).int() for i in range(2))
    q = torch.cat([q, torch.randn(2, 4, 8)])  # tokens that belong to none
    found = kernel.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 5, 9, **theirs)
    wanted = torch.cat([expected(kernel, *part, **ours)[0] for part in parts if part[0].numel()])
    assert error(found[:13], wanted) < 2e-5
    assert (found[13:] == 0).all()


def test_the_log_sum_exp_comes_with_the_output_when_asked(kernel):
    q, k, v = tensors((4, 2, 5, 8, 16, 16))
    out, lse, _ = kernel.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 4
    scores = scores.masked_fill(~torch.ones(5, 8, dtype=torch.bool).tril(3), float("-inf"))
    assert torch.allclose(lse, scores.logsumexp(-1), atol=1e-5)
    assert torch.allclose(out, kernel.flash_attn_func(q, k, v, causal=True), atol=1e-5)
    cu = torch.tensor([0, 5, 10], dtype=torch.int32), torch.tensor([0, 8, 16], dtype=torch.int32)
    laid = kernel.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), *cu, 5, 8, causal=True, return_attn_probs=True)
    assert torch.allclose(laid[1].view(4, 2, 5).transpose(0, 1), lse, atol=1e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("options", ["causal", "window", "softcap", "sinks", "alibi"])
def test_a_cache_is_written_and_read_up_to_its_live_length(kernel, paged, queries, options):
    lengths, size, pages = torch.tensor([0, 4, 9]), 4, 4
    ours, theirs = both_forms(OPTIONS[options], 4)
    q, k, v = tensors((4, 2, queries, queries, 8, 8), batch=3)
    old_k, old_v = torch.randn(3, pages * size, 2, 8), torch.randn(3, pages * size, 2, 8)
    table = torch.randperm(3 * pages).view(3, pages).int()
    if paged:
        caches = []
        for old in (old_k, old_v):
            cache = torch.empty(3 * pages, size, 2, 8)
            cache[table.long()] = old.view(3, pages, size, 2, 8)
            caches.append(cache)
        theirs["block_table"] = table
    else:
        caches = [old_k.clone(), old_v.clone()]
    found = kernel.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths.int(), **theirs)
    for i, n in enumerate(lengths.tolist()):
        keys, values = torch.cat([old_k[i, :n], k[i]])[None], torch.cat([old_v[i, :n], v[i]])[None]
        assert error(found[i : i + 1], expected(kernel, q[i : i + 1], keys, values, **ours)) < 2e-5
        held = caches[0][table[i].long()].flatten(0, 1) if paged else caches[0][i]
        assert torch.equal(held[: n + queries], keys[0])
        assert torch.equal(held[n + queries :], old_k[i, n + queries :]), "what lies behind is left alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [(2, 7, 4), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("options", ["causal", "window", "softcap", "sinks", "alibi"])
def test_what_lies_behind_the_live_length_may_be_anything(kernel, paged, queries, lengths, options, dtype):
    """A cache is often `torch.empty`, and a page that a sequence does not have yet is -1."""
    size, pages = 4, 4
    _, theirs = both_forms(OPTIONS[options], 4)
    q, k, v = (x.to(dtype) for x in tensors((4, 2, queries, queries, 8, 8), batch=3))
    old = torch.randn(2, 3, pages * size, 2, 8, dtype=dtype)
    seen = torch.tensor(lengths, dtype=torch.int32)

    def found(behind):
        live = torch.arange(pages * size) < seen[:, None]
        caches = torch.where(live[None, :, :, None, None], old, behind)
        if not paged:
            return kernel.flash_attn_with_kvcache(q, *caches.clone(), k, v, cache_seqlens=seen, **theirs)
        table = torch.arange(3 * pages).view(3, pages)
        theirs["block_table"] = torch.where(table % pages * size < seen[:, None] + queries, table, -1).int()
        return kernel.flash_attn_with_kvcache(q, *caches.view(2, 3 * pages, size, 2, 8), k, v, cache_seqlens=seen, **theirs)

    assert torch.equal(found(float("nan")), found(0.0))
    assert torch.equal(found(float("inf")), found(0.0))


def test_rows_that_only_fill_up_the_batch_write_nothing(kernel):
    """Transformers captures graphs for round numbers of sequences: rows to spare have length -1, and no pages."""
    q, k, v = tensors((4, 2, 1, 1, 8, 8), batch=4)
    caches = torch.randn(2, 3, 4, 2, 8)
    table = torch.tensor([[-1, -1], [2, 0], [1, -1], [-1, -1]]).int()
    seen = torch.tensor([-1, 5, 2, -1]).int()
    alone, together = caches.clone(), caches.clone()
    wanted = kernel.flash_attn_with_kvcache(
        q[1:3], *alone, k[1:3], v[1:3], cache_seqlens=seen[1:3], block_table=table[1:3], causal=True
    )
    found = kernel.flash_attn_with_kvcache(q, *together, k, v, cache_seqlens=seen, block_table=table, causal=True)
    assert torch.allclose(found[1:3], wanted, atol=1e-6)
    assert torch.equal(alone, together)
    assert (alone != caches).any(-1).any(-1).sum() == 4, "two tokens, each a key and a value"


def test_a_cache_may_have_rows_of_its_own_left_padding_and_rotation(kernel):
    q, k, v = tensors((4, 2, 1, 6, 8, 8), batch=2)
    spare_k, spare_v = torch.randn(5, 6, 2, 8), torch.randn(5, 6, 2, 8)
    spare_k[[3, 1]], spare_v[[3, 1]] = k, v
    found = kernel.flash_attn_with_kvcache(
        q,
        spare_k,
        spare_v,
        cache_seqlens=6,
        cache_batch_idx=torch.tensor([3, 1]),
        cache_leftpad=torch.tensor([2, 0]),
        causal=True,
    )
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]).bool()[:, None, None]
    assert error(found, expected(kernel, q, k, v, mask=mask)) < 2e-5
    angles = torch.rand(6, 4)
    turned = kernel.flash_attn_with_kvcache(
        q, k.clone(), v.clone(), rotary_cos=angles.cos(), rotary_sin=angles.sin(), cache_seqlens=3
    )
    z = torch.view_as_complex(q.view(2, 1, 4, 4, 2)) * torch.polar(torch.ones(4), angles[3])
    wanted = kernel.flash_attn_with_kvcache(torch.view_as_real(z).flatten(-2), k.clone(), v.clone(), cache_seqlens=3)
    assert torch.allclose(turned, wanted, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 3), (2, 0, 0)])
def test_nothing_in_is_nothing_out(kernel, shape):
    batch, queries, keys = shape
    q, k, v = torch.randn(batch, queries, 4, 8), torch.randn(batch, keys, 2, 8), torch.randn(batch, keys, 2, 8)
    for more in ({}, {"softcap": 1.0}, {"s_aux": torch.zeros(4)}):
        found = kernel.flash_attn_func(q, k, v, causal=True, **more)
        assert found.shape == (batch, queries, 4, 8)


def test_a_query_without_keys_gives_zeros(kernel):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 0, 2, 8)
    for more in ({}, {"softcap": 1.0}, {"s_aux": torch.zeros(4)}):
        assert torch.equal(kernel.flash_attn_func(q, k, k, causal=True, **more), torch.zeros(1, 2, 4, 8))


def test_inputs_are_read_only_and_may_have_any_strides(kernel):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors((4, 2, 9, 9, 16, 16)))
    before = [x.clone() for x in (q, k, v)]
    found = kernel.flash_attn_func(q, k, v, causal=True, softcap=1.0)
    assert torch.allclose(found, kernel.flash_attn_func(*before, causal=True, softcap=1.0), atol=1e-6)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_dropout_drops(kernel):
    q, k, v = tensors((2, 2, 8, 8, 8, 8))
    for more in ({}, {"softcap": 1.0}):
        kept = kernel.flash_attn_func(q, k, v, dropout_p=0.0, **more)
        assert not torch.allclose(kernel.flash_attn_func(q, k, v, dropout_p=0.5, **more), kept)


class Layer(torch.nn.Module):
    is_causal = True
    layer_idx = 0


def test_as_an_attention_function_it_takes_every_kind_of_mask(kernel):
    q, k, v = (x.transpose(1, 2) for x in tensors((4, 2, 6, 6, 8, 8)))
    plain, weights = kernel.flash_attn_forward(Layer(), q, k, v, None)
    assert weights is None
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    added = torch.zeros(1, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    for mask in (causal, added, torch.nn.functional.pad(causal, (0, 3))):
        assert torch.allclose(kernel.flash_attn_forward(Layer(), q, k, v, mask)[0], plain, atol=1e-6)
    bias = torch.randn(1, 4, 6, 6)
    biased = kernel.flash_attn_forward(Layer(), q, k, v, None, position_bias=bias)[0]
    assert torch.allclose(biased, kernel.flash_attn_forward(Layer(), q, k, v, (bias + added))[0], atol=1e-5)
    room = torch.nn.functional.pad(k, (0, 0, 0, 4)), torch.nn.functional.pad(v, (0, 0, 0, 4))
    assert torch.allclose(kernel.flash_attn_forward(Layer(), q, *room, None)[0], plain, atol=1e-6), (
        "a static cache's first tokens"
    )
    lengths = torch.full((2, 1, 1, 1), 6, dtype=torch.int32)
    assert torch.allclose(kernel.flash_attn_forward(Layer(), q[:, :, -1:], *room, lengths)[0], plain[:, -1:], atol=1e-6)


def test_a_request_for_weights_is_answered_once(kernel):
    q, k, v = (x.transpose(1, 2) for x in tensors((4, 2, 6, 6, 8, 8)))
    with pytest.warns(UserWarning, match="gives no attention weights"):
        kernel.flash_attn_forward(Layer(), q, k, v, None, output_attentions=True)
    kernel.flash_attn_forward(Layer(), q, k, v, None, output_attentions=True)


def test_sequences_end_to_end_win_over_a_mask(kernel):
    q, k, v = (x.transpose(1, 2) for x in tensors((4, 2, 6, 6, 8, 8), batch=1))
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    given = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 4, "max_length_k": 4}
    blocks = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().tril()[None, None]
    found = kernel.flash_attn_forward(Layer(), q, k, v, None, **given)[0]
    assert torch.allclose(found, kernel.flash_attn_forward(Layer(), q, k, v, blocks)[0], atol=1e-6)
