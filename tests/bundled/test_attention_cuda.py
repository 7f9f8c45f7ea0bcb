"""`kernelswap/attention` on a GPU: half precision, the decode kernel, PyTorch's flash kernels, capture and compile."""

import pytest
import torch
from tests.bundled.test_attention import kernel  # noqa: F401  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs a CUDA GPU"),
]
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2.5e-2, torch.float32: 2e-3}
OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (37, 0)},
    "softcap": {"causal": True, "softcap": 2.0},
    "sinks": {"causal": True, "sinks": True},
}


def made(shape, dtype, batch=2, *, grad=False):
    heads, kv, queries, keys, dim, value_dim = shape
    torch.manual_seed(0)
    sizes = (queries, heads, dim), (keys, kv, dim), (keys, kv, value_dim)
    return [torch.randn(batch, *size, device="cuda", dtype=dtype).requires_grad_(grad) for size in sizes]


def options(name, heads):
    given = dict(OPTIONS[name])
    if given.pop("sinks", False):
        given["s_aux"] = torch.randn(heads, device="cuda")
    return given


def exact(kernel, q, k, v, given):  # noqa: F811
    given = dict(given)
    bounds = given.get("window_size", (-1, -1))[0], 0 if given.get("causal") else -1
    q, k, v = (x.detach().double().transpose(1, 2) for x in (q, k, v))
    more = {"softcap": given.get("softcap", 0.0), "sinks": given.get("s_aux")}
    return kernel.dense.explicit(q, k, v, q.shape[-1] ** -0.5, bounds=bounds, **more)[0].transpose(1, 2)


def error(a, b):
    return (a.double() - b).abs().max().item()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (8, 2, 200, 200, 64, 64),
        (8, 2, 1, 333, 128, 128),
        (8, 8, 1, 70, 96, 64),
        (4, 2, 50, 333, 64, 64),
        (4, 4, 65, 65, 192, 128),
    ],
    ids=str,
)
def test_every_option_in_half_precision(kernel, shape, dtype, name):  # noqa: F811
    q, k, v = made(shape, dtype)
    given = options(name, shape[0])
    assert error(kernel.flash_attn_func(q, k, v, **given), exact(kernel, q, k, v, given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients(kernel, name):  # noqa: F811
    shape = (8, 2, 150, 150, 64, 64)
    given = options(name, 8)
    q, k, v = made(shape, torch.bfloat16, grad=True)
    weight = torch.randn(2, 150, 8, 64, device="cuda")
    found = torch.autograd.grad((kernel.flash_attn_func(q, k, v, **given) * weight).sum(), [q, k, v])
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    bounds = given.get("window_size", (-1, -1))[0], 0 if given.get("causal") else -1
    more = {"softcap": given.get("softcap", 0.0), "sinks": given.get("s_aux")}
    out = kernel.dense.explicit(*(x.transpose(1, 2) for x in (q, k, v)), 64**-0.5, bounds=bounds, **more)[0].transpose(1, 2)
    for one, other in zip(found, torch.autograd.grad((out * weight).sum(), [q, k, v]), strict=True):
        assert error(one, other) < 0.03 * other.abs().max().item()


def test_one_token_goes_to_the_decode_kernel_and_gradients_do_not(kernel, monkeypatch):  # noqa: F811
    answers, real = [], kernel.dense.decode
    monkeypatch.setattr(kernel.dense, "decode", lambda *a, **kw: answers.append(real(*a, **kw)) or answers[-1])
    q, k, v = made((8, 2, 1, 100, 64, 64), torch.bfloat16)
    kernel.flash_attn_func(q, k, v, causal=True)
    kernel.flash_attn_func(q.requires_grad_(), k, v, causal=True)
    assert [answer is None for answer in answers] == [False, True]


@pytest.mark.parametrize("name", OPTIONS)
def test_sequences_end_to_end(kernel, name):  # noqa: F811
    lengths = [37, 1, 100, 62]
    given = options(name, 8)
    q, k, v = made((8, 2, 200, 200, 64, 64), torch.bfloat16, batch=1)
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    found = kernel.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 100, 100, **given)
    for a, b in zip(cu.tolist(), cu.tolist()[1:]):  # noqa: B905  # one shorter, on purpose
        assert error(found[a:b], exact(kernel, q[:, a:b], k[:, a:b], v[:, a:b], given)[0]) < 2.5e-2


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["causal", "window", "softcap", "sinks"])
def test_a_cache_is_read_up_to_its_live_length(kernel, name, paged):  # noqa: F811
    given = options(name, 8)
    q, k, v = made((8, 2, 1, 1, 64, 64), torch.bfloat16, batch=3)
    old_k, old_v = (torch.randn(3, 256, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.tensor([0, 100, 255], dtype=torch.int32, device="cuda")
    caches, more = [old_k.clone(), old_v.clone()], {}
    if paged:
        caches, more = [c.view(12, 64, 2, 64) for c in caches], {"block_table": torch.arange(12, device="cuda").view(3, 4).int()}
    found = kernel.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, **more, **given)
    for i, n in enumerate(lengths.tolist()):
        keys, values = torch.cat([old_k[i, :n], k[i]])[None], torch.cat([old_v[i, :n], v[i]])[None]
        assert error(found[i], exact(kernel, q[i : i + 1], keys, values, given)[0]) < 2.5e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
def test_what_lies_behind_the_live_length_and_rows_to_spare_change_nothing(kernel, queries, dtype):  # noqa: F811
    q, k, v = made((8, 2, queries, queries, 64, 64), dtype, batch=3)
    table = torch.tensor([[3, -1, -1], [2, 0, -1], [-1, -1, -1]], device="cuda").int()
    seen = torch.tensor([5, 20, -queries], device="cuda").int()
    found = []
    for behind in (0.0, float("nan")):
        caches = torch.full((2, 4, 16, 2, 64), behind, device="cuda", dtype=dtype)
        caches[:, 3, :5] = caches[:, 2] = caches[:, 0, :4] = 0.5
        out = kernel.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=seen, block_table=table, causal=True)
        found.append((out[:2], caches[:, 3, : 5 + queries], caches[:, 2], caches[:, 0, : 4 + queries]))
        assert torch.equal(caches[:, 1].isnan(), torch.full((2, 16, 2, 64), behind, device="cuda").isnan()), (
            "nothing was written there"
        )
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_one_length_for_all_rows_may_be_an_expanded_scalar(kernel):  # noqa: F811
    q, k, v = (x.transpose(1, 2) for x in made((8, 2, 1, 256, 64, 64), torch.bfloat16, batch=4))
    lengths = torch.tensor(77, dtype=torch.int32, device="cuda").expand(4)
    found = kernel.dense.decode(q, k, v, lengths, 0.125)
    assert error(found, exact(kernel, *(x.transpose(1, 2) for x in (q, k[:, :, :77], v[:, :, :77])), {})) < 2.5e-2


def test_capture_keeps_the_causal_path(kernel):  # noqa: F811
    q, k, v = made((8, 2, 256, 256, 64, 64), torch.bfloat16)
    wanted = kernel.flash_attn_func(q, k, v, causal=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel.flash_attn_func(q, k, v, causal=True)
        kernel.flash_attn_func(q[:, :1], k, v, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.flash_attn_func(q, k, v, causal=True)
        one = kernel.flash_attn_func(q[:, -1:], k, v, causal=True)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)
    assert error(one, exact(kernel, q[:, -1:], k, v, {})) < 2.5e-2


@pytest.mark.parametrize("size", [1, 16, 64, 100, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "softcap", "sinks"])
def test_pages_of_any_size_are_read_and_written_in_place(kernel, monkeypatch, size, dtype, name):  # noqa: F811
    """Two kernels; what would gather the pages raises."""
    monkeypatch.setattr(kernel.flash, "_write", None)
    monkeypatch.setattr(kernel.flash, "_without_the_dead", None)
    given = options(name, 8)
    q, k, v = made((8, 2, 1, 1, 128, 128), dtype, batch=3)
    keys = 700
    count = -(-keys // size)
    table = torch.randperm(3 * count, device="cuda").view(3, count).int()
    old = torch.randn(2, 3, count * size, 2, 128, device="cuda", dtype=dtype)
    pages = torch.empty(2, 3 * count, size, 2, 128, device="cuda", dtype=dtype)
    pages[:, table.long()] = old.view(2, 3, count, size, 2, 128)
    lengths = torch.tensor([0, 333, keys - 1], dtype=torch.int32, device="cuda")
    before = pages.clone()
    found = kernel.flash_attn_with_kvcache(q, *pages, k, v, cache_seqlens=lengths, block_table=table, **given)
    for i, n in enumerate(lengths.tolist()):
        at, inside = int(table[i, n // size]), n % size
        assert torch.equal(pages[0, at, inside], k[i, 0])
        assert torch.equal(pages[1, at, inside], v[i, 0])
        before[:, at, inside] = pages[:, at, inside]
        keys_i, values = torch.cat([old[0, i, :n], k[i]])[None], torch.cat([old[1, i, :n], v[i]])[None]
        assert error(found[i], exact(kernel, q[i : i + 1], keys_i, values, given)[0]) < TOLERANCE[dtype]
    assert torch.equal(pages, before), "nothing else was written"


def test_a_captured_step_over_pages_follows_lengths_and_tables(kernel):  # noqa: F811
    q, k, v = made((8, 2, 1, 1, 64, 64), torch.bfloat16, batch=4)
    pages = torch.randn(2, 40, 16, 2, 64, device="cuda", dtype=torch.bfloat16)
    table, lengths = torch.zeros(4, 8, device="cuda").int(), torch.zeros(4, device="cuda").int()

    def step():
        return kernel.flash_attn_with_kvcache(q, *pages, k, v, cache_seqlens=lengths, block_table=table, causal=True)

    def steps(seed, count):
        generator = torch.Generator(device="cuda").manual_seed(seed)
        table.copy_(torch.randperm(40, device="cuda", generator=generator)[:32].view(4, 8))
        lengths.copy_(torch.tensor([count, 3 * count, 7, -1], device="cuda"))

    steps(0, 20)
    with torch.cuda.stream(torch.cuda.Stream()):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed, count in ((1, 2), (2, 40)):
        steps(seed, count)
        kept = pages.clone()
        graph.replay()
        torch.cuda.synchronize()
        found = out.clone()
        pages.copy_(kept)
        assert torch.equal(found[:3], step()[:3])
        for i, n in enumerate(lengths.tolist()[:3]):
            rows = [x[table[i].long()].flatten(0, 1)[None, : n + 1] for x in pages]
            assert error(found[i], exact(kernel, q[i : i + 1], *rows, {})[0]) < 2.5e-2
