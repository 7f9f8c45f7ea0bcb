"""The decode kernel, interpreted, against attention in float64: groups, lengths, windows, soft caps, sinks, any strides."""

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
        assert attention.decode.append(k, v, k_cache, v_cache, at)
        assert torch.equal(k_cache, want_k)
        assert torch.equal(v_cache, want_v)
    assert attention.decode.append(k, v, k_cache, v_cache, torch.tensor(20))  # no room: nothing is written
    assert torch.equal(k_cache, want_k)


def test_what_does_not_fit_the_cache_is_left_to_the_caller(attention):
    k, cache = torch.randn(1, 2, 1, 16), torch.zeros(1, 2, 8, 16)
    at = torch.tensor(0)
    assert not attention.decode.append(k.half(), k.half(), cache, cache, at)
    assert not attention.decode.append(k.expand(1, 2, 3, 16), k.expand(1, 2, 3, 16), cache, cache, at)
    assert not attention.decode.append(k.requires_grad_(), k, cache, cache, at)
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
