"""The decode kernel, interpreted, against attention in float64: groups, lengths, windows, soft caps, sinks, any strides, pages."""

import pytest
import torch

TOLERANCE = 4e-3
half = torch.float16  # of bfloat16 the interpreter's `tl.dot` multiplies the bits; tests/bundled/test_attention_cuda.py has that


def exact(q, k, v, scale, *, length=None, mask=None, window=0, softcap=0.0, sinks=None):
    """(B, HQ, 1, D) and caches -> (B, 1, HQ, DV) in float64."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    at = torch.arange(k.shape[2])
    length = torch.full((q.shape[0],), k.shape[2]) if length is None else length.long().clamp(max=k.shape[2])
    live = at < length[:, None]
    if window:
        live &= at >= length[:, None] - window
    if mask is not None:
        live = live & (mask != 0)
    scores = scores.masked_fill(~live[:, None, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    p = scores.softmax(-1)[..., : k.shape[2]]
    return (p @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def made(heads=4, kv=2, keys=40, dim=64, value_dim=64, batch=2):
    q, k = torch.randn(batch, heads, 1, dim), torch.randn(batch, kv, keys, dim)
    return [x.to(half) for x in (q, k, torch.randn(batch, kv, keys, value_dim))]


def error(a, b):
    return (a.double() - b).abs().max().item()


OPTIONS = {
    "full": {},
    "window": {"window": 37},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "lengths": {"lengths": True},
    "all at once": {"window": 9, "softcap": 1.3, "sinks": True, "lengths": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 2, 40, 64, 64),
        (8, 8, 70, 96, 64),
        (6, 1, 300, 128, 128),
        (3, 3, 1, 16, 16),
        (20, 1, 130, 80, 48),
        (4, 2, 1000, 32, 32),
    ],
    ids=str,
)
def test_every_option(attention, shape, name):
    q, k, v = made(*shape)
    given = dict(OPTIONS[name])
    if given.pop("sinks", False):
        given["sinks"] = torch.randn(shape[0])
    if given.pop("lengths", False):
        given["length"] = torch.tensor([shape[2], max(1, shape[2] // 3)], dtype=torch.int32)
    assert attention.decode.takes(q, k, v)
    scale = shape[3] ** -0.5
    got = attention.decode.decode(q, k, v, scale=scale, **given)
    assert got.shape == (2, 1, shape[0], shape[4])
    assert error(got, exact(q, k, v, scale, **given)) < TOLERANCE


def test_any_strides_with_the_last_dimension_dense(attention):
    q, k, v = made(keys=130)
    want = exact(q, k, v, 0.1)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(2, 2, 200, 65, dtype=half)
    wide[:, :, 7:137, :64] = v
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert error(attention.decode.decode(q, k, wide[:, :, 7:137, :64], scale=0.1), want) < TOLERANCE


def test_what_lies_past_the_live_length_is_never_read_into_the_sum(attention):
    q, k, v = made(keys=300)
    length = torch.tensor([5, 170])
    want = exact(q, k, v, 0.1, length=length)
    for b in range(2):
        k[b, :, length[b] :] = torch.nan
        v[b, :, length[b] :] = torch.nan
    assert error(attention.decode.decode(q, k, v, scale=0.1, length=length), want) < TOLERANCE


def test_a_window_as_long_as_the_cache_is_no_window(attention):
    q, k, v = made(keys=130)
    whole = attention.decode.decode(q, k, v, scale=0.1)
    assert torch.equal(attention.decode.decode(q, k, v, scale=0.1, window=1000), whole)


@pytest.mark.parametrize("keys", [40, 400])
def test_sinks_of_any_strides(attention, keys):
    q, k, v = made(keys=keys)
    sinks = (5 + torch.randn(4, 2))[:, 0]
    got = attention.decode.decode(q, k, v, scale=0.1, sinks=sinks)
    assert error(got, exact(q, k, v, 0.1, sinks=sinks)) < TOLERANCE


@pytest.mark.parametrize("keys", [40, 400])
def test_a_sequence_with_no_key_at_all_gives_zeros_as_flash_attention_does(attention, keys):
    q, k, v = made(keys=keys)
    got = attention.decode.decode(q, k, v, scale=0.1, length=torch.tensor([0, keys]))
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert error(got[1:], exact(q[1:], k[1:], v[1:], 0.1)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 48)])
def test_a_new_key_and_value_go_into_the_cache_at_the_position_on_the_device(attention, dtype, dim, value_dim):
    k, v = torch.randn(3, 1, 2, dim, dtype=dtype).transpose(1, 2), torch.randn(3, 2, 1, value_dim, dtype=dtype)
    k_cache, v_cache = torch.randn(3, 2, 20, dim, dtype=dtype), torch.randn(3, 20, 2, value_dim, dtype=dtype).transpose(1, 2)
    want_k, want_v = k_cache.clone(), v_cache.clone()
    for at in (torch.tensor(7), torch.tensor([19], dtype=torch.int32)):
        want_k[:, :, int(at)], want_v[:, :, int(at)] = k[:, :, 0], v[:, :, 0]
        assert attention.append.append(k, v, k_cache, v_cache, at)
        assert torch.equal(k_cache, want_k)
        assert torch.equal(v_cache, want_v)
    assert attention.append.append(k, v, k_cache, v_cache, torch.tensor(20))  # no room: nothing is written
    assert torch.equal(k_cache, want_k)


def test_what_does_not_fit_the_cache_is_left_to_the_caller(attention):
    k, cache = torch.randn(1, 2, 1, 16), torch.zeros(1, 2, 8, 16)
    at = torch.tensor(0)
    assert not attention.append.append(k.half(), k.half(), cache, cache, at)
    assert not attention.append.append(k.expand(1, 2, 3, 16), k.expand(1, 2, 3, 16), cache, cache, at)
    assert not attention.append.append(k.requires_grad_(), k, cache, cache, at)
    assert not cache.any()


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("keys", [40, 130, 1000])
def test_keys_that_are_not_seen_take_no_part_wherever_they_lie(attention, keys, window):
    q, k, v = made(keys=keys, batch=3)
    wide = torch.ones(3, 1 + keys, dtype=torch.int32)
    wide[0, 1 : keys // 2] = 0  # padding on the left, whole parts of it
    wide[1, 5:keys:3] = 0
    length = torch.tensor([keys, keys - 3, keys // 2 + 1], dtype=torch.int32)
    wide[:, 0] = length
    for b in range(3):
        wide[b, length[b]] = 1  # the newest
    options = {"length": wide[:, 0], "mask": wide[:, 1:], "window": window}
    got = attention.decode.decode(q, k, v, scale=0.2, **options)
    assert error(got, exact(q, k, v, 0.2, **options)) < TOLERANCE


# -- pages --------------------------------------------------------------------------------------------------------------


def cut(x, size, table, spare=3):
    """(B, HK, L, D) as pages (P, size, HK, D) in the order of `table`, each between others that are NaN."""
    pages = torch.full((int(table.max()) + 1 + spare, size, x.shape[1], x.shape[3]), torch.nan, dtype=x.dtype)
    for b, row in enumerate(table.tolist()):
        for i, page in enumerate(row):
            part = x[b, :, i * size : (i + 1) * size].transpose(0, 1)
            pages[page, : part.shape[0]] = part
    return pages


def tabled(batch, count, dtype=torch.int32):
    """Pages that no order can be read off."""
    return (torch.randperm(batch * count + 5)[: batch * count] + 2).view(batch, count).to(dtype)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "lengths"])  # they always have
@pytest.mark.parametrize("size", [1, 16, 64, 100, 128, 300])
@pytest.mark.parametrize("keys", [40, 300])
def test_pages_are_read_where_they_lie(attention, keys, size, name):
    q, k, v = made(8, 2, keys, 64, 48)
    table = tabled(2, -(-keys // size))
    given = dict(OPTIONS[name])
    lengths = given["length"] = torch.tensor([keys, max(1, keys // 3)], dtype=torch.int32)
    given.pop("lengths", None)
    if given.pop("sinks", False):
        given["sinks"] = torch.randn(8)
    pages = [cut(x, size, table).transpose(1, 2) for x in (k, v)]
    want = exact(q, k, v, 0.125, **given)
    live = torch.arange(table.shape[1]) * size < lengths[:, None]
    forms = (table, table.long(), torch.where(live, table, -1), torch.stack((table, table), -1)[..., 0])
    for one in forms if name == "full" else forms[2:3]:
        got = attention.decode.decode(q, *pages, scale=0.125, table=one, **given)
        assert got.shape == (2, 1, 8, 48)
        assert error(got, want) < TOLERANCE


@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("size", [16, 128])
def test_pages_and_keys_that_are_not_seen(attention, size, window):
    q, k, v = made(keys=400, batch=3)
    table = tabled(3, -(-400 // size))
    length = torch.tensor([400, 397, 201], dtype=torch.int32)
    mask = (torch.rand(3, 400) < 0.6).int()
    mask[0, :250] = 0
    mask[torch.arange(3), length.long() - 1] = 1
    pages = [cut(x, size, table).transpose(1, 2) for x in (k, v)]
    got = attention.decode.decode(q, *pages, scale=0.2, table=table, length=length - 1, plus=1, mask=mask, window=window)
    assert error(got, exact(q, k, v, 0.2, length=length, mask=mask, window=window)) < TOLERANCE


def test_pages_of_any_strides(attention):
    q, k, v = made(keys=150)
    table = tabled(2, 5)
    wide = torch.zeros(2, 20, 4, 40, 70, dtype=half)  # as one memory for two layers
    for layer, x in enumerate((k, v)):
        found = cut(x, 32, table, spare=0)
        wide[layer, : len(found), ::2, 3:35, :64] = found.transpose(1, 2)
    pages = [x[:, ::2, 3:35, :64] for x in wide]
    length = torch.tensor([150, 33])
    got = attention.decode.decode(q, *pages, scale=0.1, table=table, length=length)
    assert error(got, exact(q, k, v, 0.1, length=length)) < TOLERANCE


@pytest.mark.parametrize("size", [5, 64])
@pytest.mark.parametrize("at_dtype", [torch.int32, torch.int64], ids=str)
def test_each_new_key_goes_into_its_page_and_rows_to_spare_write_nothing(attention, size, at_dtype):
    k, v = torch.randn(4, 2, 1, 16), torch.randn(4, 2, 1, 24)
    caches = [torch.randn(12, size, 2, dim) for dim in (16, 24)]
    table = torch.tensor([[7, 2, 9], [0, 5, -1], [-1, -1, -1], [4, -1, -1]], dtype=torch.int32)
    at = torch.tensor([2 * size + 1, size - 1, -1, size], dtype=at_dtype)  # the last: of a page that it does not have
    want = [cache.clone() for cache in caches]
    for new, cache in zip((k, v), want, strict=True):
        cache[9, 1], cache[0, size - 1] = new[0, :, 0], new[1, :, 0]
    assert attention.append.append(k, v, *(c.transpose(1, 2) for c in caches), at, table)
    assert torch.equal(caches[0], want[0])
    assert torch.equal(caches[1], want[1])


def test_each_sequence_has_a_position_of_its_own(attention):
    k, caches = torch.randn(3, 2, 1, 16), torch.zeros(2, 3, 2, 9, 16)
    assert attention.append.append(k, 2 * k, *caches, torch.tensor([4, 0, 9]))
    assert torch.equal(caches[0, 0, :, 4], k[0, :, 0])
    assert torch.equal(caches[1, 1, :, 0], 2 * k[1, :, 0])
    assert not caches[:, 2].any()
    assert caches.count_nonzero() == 4 * 2 * 16


@pytest.fixture
def through(attention, monkeypatch):
    """flash-attention's functions as on a GPU, and what the kernels were asked for."""
    asked = []
    monkeypatch.setattr(attention.dense, "_launches", lambda x: True)
    for name in ("decode", "append"):
        real = getattr(getattr(attention, name), name)

        def noted(*args, name=name, real=real, **more):
            asked.append(name)
            return real(*args, **more)

        monkeypatch.setattr(getattr(attention, name), name, noted)
    return asked


@pytest.mark.parametrize("how", ["dense", "pages", "rows"])
@pytest.mark.parametrize("options", [{}, {"window_size": (19, 0)}, {"softcap": 1.5}, {"s_aux": True}], ids=str)
def test_one_token_over_a_cache_is_one_launch_to_write_and_one_to_read(attention, through, how, options):
    given = {**options, "s_aux": torch.randn(4)} if "s_aux" in options else options
    q, new_k, new_v = (torch.randn(3, 1, heads, 32).to(half) for heads in (4, 2, 2))
    old = torch.randn(2, 3, 2, 48, 32).to(half)
    seen = torch.tensor([0, 20, 47], dtype=torch.int32)
    full = old.clone()
    for b, n in enumerate(seen.tolist()):
        full[0, b, :, n], full[1, b, :, n] = new_k[b, 0], new_v[b, 0]
    if how == "pages":
        table = tabled(3, 3)
        caches, more = [cut(x, 16, table) for x in old], {"block_table": table}
    elif how == "rows":
        rows = torch.tensor([4, 0, 3], dtype=torch.int32)
        caches, more = [torch.full((5, 48, 2, 32), torch.nan, dtype=half) for _ in old], {"cache_batch_idx": rows}
        for cache, x in zip(caches, old, strict=True):
            cache[rows.long()] = x.transpose(1, 2)
    else:
        caches, more = [x.transpose(1, 2).contiguous() for x in old], {}
    got = attention.flash.flash_attn_with_kvcache(q, *caches, new_k, new_v, cache_seqlens=seen, causal=True, **more, **given)
    window = options.get("window_size", (-1, 0))[0] + 1
    rest = {"softcap": options.get("softcap", 0.0), "sinks": given.get("s_aux")}
    want = exact(q.transpose(1, 2), *full, 32**-0.5, length=seen + 1, window=window, **rest)
    assert error(got, want) < TOLERANCE
    assert through == ["append", "decode"]


def test_continuous_batching_reads_pages_in_place(attention, through):
    """As Transformers calls it: every sequence one token, in one row; sequences to spare begin where they end."""
    q, new_k, new_v = (torch.randn(1, heads, 4, 32).to(half) for heads in (4, 2, 2))
    old = torch.randn(2, 4, 2, 96, 32).to(half)
    table = tabled(4, 3)
    caches = [cut(x, 32, table) for x in old]
    seen = torch.tensor([5, 31, 64])
    starts = torch.tensor([0, 6, 38, 103, 103], dtype=torch.int32)
    table[0, 1:], table[3] = -1, -1
    before = [cache.clone() for cache in caches]
    module = torch.nn.Module()
    found, _ = attention.forward.flash_attn_forward(
        module, q, new_k, new_v, None, scaling=0.3, cu_seq_lens_q=torch.arange(5).int(), cu_seq_lens_k=starts, max_length_q=1,
        max_length_k=1, block_table=table, k_cache=caches[0], v_cache=caches[1],
    )  # fmt: skip
    assert through == ["append", "decode"]
    full = old.clone()
    for b, n in enumerate(seen.tolist()):
        full[0, b, :, n], full[1, b, :, n] = new_k[0, :, b], new_v[0, :, b]
    want = exact(q.transpose(0, 2)[:3].transpose(2, 1).reshape(3, 4, 1, 32), *full[:, :3], 0.3, length=seen + 1)
    assert found.shape == (1, 4, 4, 32)
    assert error(found[0, :3, None], want) < TOLERANCE
    changed = [(a.nan_to_num() != b.nan_to_num()).any(-1).any(-1).sum().item() for a, b in zip(caches, before, strict=True)]
    assert changed == [3, 3], "a token of each sequence, and of none to spare"
