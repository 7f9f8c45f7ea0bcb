"""Attention of one query token per sequence over a key/value cache: split over the cache, heads of a group together.

    o_h = softmax(scale * q_h K^T) V        K, V shared by the G = HQ / HK query heads of a group (GQA, arXiv:2305.13245)

Split-KV ("flash decoding"): every program streams one part of one group's cache and keeps a running maximum, sum and
weighted values; a second kernel joins the parts. The live length may lie in device memory, so that a captured graph
follows it. Bytes: K and V once, whatever G is. Nothing is masked, repeated or planned per length. A cache may be cut into pages
that a table orders (arXiv:2309.06180): they are read where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream, multiprocessors, on
from .tuning import bound, space

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # older Triton
    gdc_launch_dependents = gdc_wait = None
try:
    from triton.errors import TritonError as Unfit
except ImportError:  # older Triton
    from triton.runtime.errors import OutOfResources as Unfit


@triton.jit(do_not_specialize=["L", "splits", "scale", "window", "softcap", "plus", "slb", "smb", "stb"])
def _split(
    Q, K, V, LEN, MASK, SINK, TABLE, O, PM, PA, L, splits, scale, window, softcap, plus, slb, smb, stb,
    sqb, sqh, skb, skh, sks, svb, svh, svs, sob, soh,
    HK: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr,
    BN: tl.constexpr, HAS_LEN: tl.constexpr, HAS_MASK: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINK: tl.constexpr,
    PAGED: tl.constexpr, PAGE: tl.constexpr, SINGLE: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """EVEN: parts differ by one block at most; else all but the last are alike, and last ones may have nothing."""
    if OVERLAP:
        gdc_launch_dependents()  # the join may take its place once every part has begun; it waits there
    split = tl.program_id(0) % splits
    bh = tl.program_id(0) // splits
    b = (bh // HK).to(tl.int64)
    h = (bh % HK).to(tl.int64)
    if HAS_LEN:
        length = tl.minimum(tl.load(LEN + b * slb).to(tl.int32) + plus, L)
    else:
        length = L
    first = 0
    if WINDOW:
        first = tl.maximum(length - window, 0)
    base = first
    if PAGED == 2:
        base = first // BN * BN  # so that no block reaches over the end of a page
    if EVEN:
        blocks = tl.cdiv(length - base, BN)
        lo = base + split * blocks // splits * BN
        hi = tl.minimum(base + (split + 1) * blocks // splits * BN, length)
    else:
        per = tl.cdiv(tl.cdiv(length - base, BN), splits) * BN
        lo = base + split * per
        hi = tl.minimum(lo + per, length)
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    n = tl.arange(0, BN)
    q = tl.load(Q + b * sqb + (h * G + g[:, None]) * sqh + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full((BG,), -1.0e30, tl.float32)
    l = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BDV), tl.float32)
    kp = K + h * skh
    vp = V + h * svh
    if PAGED == 0:
        kp += b * skb
        vp += b * svb
    elif PAGED == 3:
        page = tl.load(TABLE + b * stb).to(tl.int64)
        kp += page * skb
        vp += page * svb
    for start in tl.range(lo, hi, BN, num_stages=STAGES):
        at = (start + n).to(tl.int64)
        inside = start + n < hi
        if WINDOW and PAGED == 2:
            inside = inside & (start + n >= first)
        if PAGED == 1:  # every key asks for its page
            page = tl.load(TABLE + b * stb + (start + n) // PAGE, mask=inside, other=0).to(tl.int64)
            at_page = ((start + n) % PAGE).to(tl.int64)
            k_at = page * skb + at_page * sks
            v_at = page * svb + at_page * svs
        elif PAGED == 2:  # every block of keys does
            page = tl.load(TABLE + b * stb + start // PAGE).to(tl.int64)
            at_page = (start % PAGE + n).to(tl.int64)
            k_at = page * skb + at_page * sks
            v_at = page * svb + at_page * svs
        else:
            k_at = at * sks
            v_at = at * svs
        k = tl.load(kp + k_at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0, eviction_policy=EVICT)
        s = tl.dot(q, k)
        if SOFTCAP:
            x = s * (scale / softcap)
            s = (2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0) * (softcap * 1.4426950408889634)
        else:
            s = s * (scale * 1.4426950408889634)
        seen = inside
        if HAS_MASK:  # keys and values are read all the same: which are seen is known too late to save that
            seen = inside & (tl.load(MASK + b * smb + at, mask=inside, other=0) != 0)
        s = tl.where(seen[None, :], s, -1.0e30)
        top = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - top[:, None])
        if HAS_MASK:
            p = tl.where(seen[None, :], p, 0.0)  # a part of which nothing is seen counts for nothing
        fade = tl.exp2(m - top)
        l = l * fade + tl.sum(p, axis=1)
        v = tl.load(vp + v_at[:, None] + dv[None, :], mask=inside[:, None] & (dv < DV)[None, :], other=0.0, eviction_policy=EVICT)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v)
        m = top
    if SINGLE:
        if HAS_SINK:
            sink = tl.load(SINK + h * G + g, mask=g < G, other=0.0).to(tl.float32) * 1.4426950408889634
            top = tl.maximum(m, sink)
            fade = tl.exp2(m - top)
            l = l * fade + tl.exp2(sink - top)
            acc = acc * fade[:, None]
        l = tl.where(l > 0.0, l, 1.0)  # no key at all: zeros, as flash attention gives
        tl.store(O + b * sob + (h * G + g[:, None]) * soh + dv[None, :], acc / l[:, None], mask=(g < G)[:, None] & (dv < DV)[None, :])
    else:
        row = (bh * splits + split).to(tl.int64) * BG + g
        tl.store(PM + row * 2, m, mask=g < G)
        tl.store(PM + row * 2 + 1, l, mask=g < G)
        tl.store(PA + row[:, None] * BDV + dv[None, :], acc, mask=(g < G)[:, None])


@triton.jit(do_not_specialize=["splits"])
def _join(
    PM, PA, SINK, O, splits, sob, soh,
    HK: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr, HAS_SINK: tl.constexpr,
    OVERLAP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BC columns of one head a program."""
    if OVERLAP:
        gdc_wait()  # for all parts, and for what they wrote
    part = tl.program_id(0) % (BDV // BC)
    g = tl.program_id(0) // (BDV // BC) % G
    bh = tl.program_id(0) // (BDV // BC) // G
    b = (bh // HK).to(tl.int64)
    h = (bh % HK).to(tl.int64)
    s = tl.arange(0, BS)
    dv = part * BC + tl.arange(0, BC)
    row = (bh * splits + s).to(tl.int64) * BG + g
    m = tl.load(PM + row * 2, mask=s < splits, other=-1.0e30)
    l = tl.load(PM + row * 2 + 1, mask=s < splits, other=0.0)
    top = tl.max(m, axis=0)
    if HAS_SINK:
        sink = tl.load(SINK + h * G + g).to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, sink)
    w = tl.where(l > 0.0, tl.exp2(m - top), 0.0)  # a part past the live length counts for nothing
    total = tl.sum(w * l, axis=0)
    if HAS_SINK:
        total += tl.exp2(sink - top)
    a = tl.load(PA + row[:, None] * BDV + dv[None, :], mask=(s < splits)[:, None], other=0.0)
    total = tl.where(total > 0.0, total, 1.0)
    tl.store(O + b * sob + (h * G + g) * soh + dv, tl.sum(a * w[:, None], axis=0) / total, mask=dv < DV)


_plans: dict[tuple[Any, ...], _Plan] = {}
_bound: dict[tuple[Any, ...], tuple[Any, Any]] = {}
_BLOCK = 64
_DTYPES = (torch.bfloat16, torch.float16)


def _may_overlap(device: int) -> bool:
    """Whether the join may be launched while the parts still run: an eighth of the time of a short cache (Hopper on)."""
    return gdc_wait is not None and not INTERPRETED and torch.cuda.get_device_capability(device) >= (9, 0)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """q (B, HQ, 1, D), k (B, HK, L, D), v (B, HK, L, DV), or pages (P, HK, size, D or DV): bf16 or fp16 on a GPU, D contiguous, up to 256, no gradients."""
    return (
        q.is_cuda is not INTERPRETED
        and q.shape[2] == 1
        and q.dtype in _DTYPES
        and k.dtype is q.dtype
        and v.dtype is q.dtype
        and q.shape[-1] <= 256
        and v.shape[-1] <= 256
        and q.shape[1] % k.shape[1] == 0
        and q.shape[1] // k.shape[1] <= 64
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and q.numel() > 0
        and k.shape[2] > 0
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
    )


def decode(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, length: Tensor | None = None, mask: Tensor | None = None,
    window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None, table: Tensor | None = None, plus: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of the newest token over what came before it and itself.

    q (B, HQ, 1, D), k (B, HK, L, D), v (B, HK, L, DV), any strides with the last dimension contiguous -> (B, 1, HQ, DV).
    length (B,) int32 or int64 on the device: how many of the L keys live; None: all. window: the last so many only; 0: all.
    mask (B, L or more) int32, rows of any distance: 0 where a key is not seen; None: all that live are.
    softcap: s -> c tanh(s/c); 0: none. sinks (HQ,): a logit per head that takes part in the sum and has no value.
    table (B, pages) int32 or int64, rows of any distance: k and v are pages (P, HK, size, D or DV) of any size, and L is pages * size;
    pages past the live length may be any number. plus: so many more live than `length` says.
    """
    batch, heads, _, dim = q.shape
    kv_heads, page, value_dim = k.shape[1], k.shape[2], v.shape[3]
    keys, paged = page, 0
    if table is not None:
        table = table if table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()
        keys = page * table.shape[1]
        paged = 3 if table.shape[1] == 1 else 1
    if sinks is not None:
        sinks = sinks.contiguous()  # the kernel reads it as an array
        sinks = sinks.clone() if sinks.data_ptr() & 15 else sinks
    group = heads // kv_heads
    device = q.get_device()
    live = min(keys, window) if window else keys
    out = torch.empty((batch, 1, heads, value_dim), dtype=q.dtype, device=q.device)
    qs, ks, vs = q.stride(), k.stride(), v.stride()
    strides = (qs[0], qs[1], ks[0], ks[1], ks[2], vs[0], vs[1], vs[2], heads * value_dim, value_dim)
    pq, pk, pv = q.data_ptr(), k.data_ptr(), v.data_ptr()
    odd = ((pq | pk | pv) & 15) or any(x & 15 for x in strides)
    key = (
        q.dtype, device, batch, kv_heads, group, dim, value_dim, odd, None if length is None else length.dtype, mask is None,
        window > 0, softcap > 0, None if sinks is None else sinks.dtype, live.bit_length(),
        paged, page if paged == 1 else 0, None if table is None else table.dtype,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _planned(q, k, v, length, mask, sinks, table, window > 0, softcap > 0, paged, int(odd), live)
    # enough parts to fill the chip, none too short; the grid depends on the cache's size, never on `length`
    splits = max(1, min(plan.most, -(-live // plan.least)))
    block_group, block_value = plan.block_group, plan.block_value
    work = None if splits == 1 else torch.empty(
        batch * kv_heads * splits * block_group * (block_value + 2), dtype=torch.float32, device=q.device
    )
    first, second = plan.launches.get(splits) or plan.launch(splits)
    p_len = pq if length is None else length.data_ptr()
    p_mask = pq if mask is None else mask.data_ptr()
    rows = 0 if length is None else length.stride(0), 0 if mask is None else mask.stride(0), 0 if table is None else table.stride(0)
    p_sink = pq if sinks is None else sinks.data_ptr()
    p_table = pq if table is None else table.data_ptr()
    po = out.data_ptr()
    pa = po if work is None else work.data_ptr()
    pm = po if work is None else pa + batch * kv_heads * splits * block_group * block_value * 4
    with on(device):
        stream = current_stream(device)
        first(
            batch * kv_heads * splits, stream, pq, pk, pv, p_len, p_mask, p_sink, p_table, po, pm, pa,
            keys, splits, scale, window, softcap, plus, *rows, *strides,
        )
        if second is not None:
            second(batch * heads * plan.columns, stream, pm, pa, p_sink, po, splits, heads * value_dim, value_dim)
    return out


@dataclass
class _Plan:
    """What decides how a cache is cut into parts, and the launches for as many parts as were met."""

    most: int
    """Parts at most: what fills the chip."""
    least: int
    """Keys of a part at least."""
    block_group: int
    block_value: int
    columns: int
    """Programs of the join for each head."""
    launch: Callable[[int], tuple[Any, Any]]
    """For so many parts; keeps what it makes."""
    launches: dict[int, tuple[Any, Any]]


space(
    "decode", _plans, _bound, BN=(16, 32, 64, 128), num_warps=(1, 2, 4, 8), STAGES=(1, 2, 3, 4, 5, 6),
    WAVES=(1, 2, 3, 4),  # programs on each multiprocessor
    LEAST=(1, 2, 4, 8),  # blocks of a part at least
    EVEN=(0, 1), EVICT=("", "evict_first"),
    COLUMNS=(1, 2, 4), JOIN_WARPS=(1, 2, 4, 8),  # programs of the join for each head, and their warps
    also=(
        {"EVEN": 1},
        {"EVEN": 1, "EVICT": "evict_first", "COLUMNS": 4, "JOIN_WARPS": 2},
        {"BN": 32, "STAGES": 5, "EVEN": 1},
        {"BN": 32, "STAGES": 4, "WAVES": 3, "num_warps": 2, "EVEN": 1},
        {"BN": 32, "STAGES": 3, "WAVES": 4, "num_warps": 2, "EVEN": 1},
        {"BN": 128, "STAGES": 3, "WAVES": 1, "num_warps": 8, "EVEN": 1},
        {"BN": 64, "STAGES": 6, "WAVES": 1, "num_warps": 8, "EVEN": 1},
        {"BN": 64, "STAGES": 3, "num_warps": 2, "EVEN": 1},
        {"BN": 64, "STAGES": 3, "num_warps": 8, "EVEN": 1},
        {"BN": 128, "STAGES": 2, "num_warps": 4, "EVEN": 1},
    ),
)  # fmt: skip


def _planned(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor | None, mask: Tensor | None, sinks: Tensor | None, table: Tensor | None,
    windowed: bool, capped: bool, paged: int, odd: int, live: int,
) -> _Plan:  # fmt: skip
    batch, heads, _, dim = q.shape
    kv_heads, page, value_dim, device = k.shape[1], k.shape[2], v.shape[3], q.get_device()
    group = heads // kv_heads
    block_group, block_value = max(16, triton.next_power_of_2(group)), triton.next_power_of_2(value_dim)
    has = {"length": length is not None, "mask": mask is not None, "window": windowed, "soft cap": capped, "sinks": sinks is not None}
    low = 1 << (live.bit_length() - 1)
    bucket = (
        f"{str(q.dtype).removeprefix('torch.')}; {batch} x {heads} and {kv_heads} heads of {dim} and {value_dim}; "
        f"{low}-{2 * low - 1} keys{'' if table is None else f' in pages of {page}'}{''.join(f', {name}' for name, so in has.items() if so)}"
    )
    # what is kept for later binds are kinds, not memory
    empty = q.new_empty(2)[1:] if odd > 1 else q.new_empty(0)
    floats = q.new_empty(0, dtype=torch.float32)
    of_length, of_mask, of_sink, of_table = (empty if t is None else t.new_empty(0) for t in (length, mask, sinks, table))
    kinds = tuple(t.dtype for t in (empty, of_length, of_mask, of_sink, of_table))
    default = {
        "BN": _BLOCK, "num_warps": 4, "STAGES": 3, "WAVES": 2, "LEAST": 2, "EVEN": 0, "EVICT": "", "COLUMNS": 1, "JOIN_WARPS": 4,
    }  # fmt: skip

    def make(c: dict[str, Any]) -> _Plan:
        columns = min(c["COLUMNS"], block_value // 16) or 1
        limit = 64 if c["WAVES"] <= 2 else 128
        how = paged if paged != 1 or page % c["BN"] else 2  # where blocks end with pages, a block asks for its page, not every key

        def launch(splits: int) -> tuple[Any, Any]:
            parts = triton.next_power_of_2(splits)
            key = (
                kinds, device, kv_heads, group, dim, value_dim, odd, *has.values(), splits == 1, parts, how,
                page if how in {1, 2} else 0, *c.values(),
            )  # fmt: skip
            found = _bound.get(key)
            if found is None:
                found = _bound[key] = both(splits == 1, parts)
            plan.launches[splits] = found
            return found

        def both(single: bool, parts: int) -> tuple[Any, Any]:
            example, overlap = 4096 + bool(odd), _may_overlap(device)
            first = bind(
                _split,
                (empty, empty, empty, of_length, of_mask, of_sink, of_table, empty, floats, floats)
                + (17, 17, 0.1, 17, 0.1, 17, 17, 17, 17)
                + (example,) * 10,
                device=device, num_warps=c["num_warps"], HK=kv_heads, G=group, BG=block_group, D=dim, BD=triton.next_power_of_2(dim),
                DV=value_dim, BDV=block_value, BN=c["BN"], HAS_LEN=int(has["length"]), HAS_MASK=int(has["mask"]), WINDOW=int(windowed),
                SOFTCAP=int(capped), HAS_SINK=int(has["sinks"]), PAGED=how, PAGE=page if how in {1, 2} else 1,
                SINGLE=int(single), STAGES=c["STAGES"], OVERLAP=int(overlap and not single), EVEN=c["EVEN"], EVICT=c["EVICT"],
            )  # fmt: skip
            if single:
                return first, None
            second = bind(
                _join, (floats, floats, of_sink, empty, 17, 4096, 4096 + bool(odd)), device=device, num_warps=c["JOIN_WARPS"],
                HK=kv_heads, G=group, BG=block_group, DV=value_dim, BDV=block_value, BS=parts, HAS_SINK=int(has["sinks"]),
                OVERLAP=int(overlap), BC=block_value // columns, overlap=overlap,
            )  # fmt: skip
            return first, second

        most = min(limit, c["WAVES"] * multiprocessors(device) // (batch * kv_heads))
        plan = _Plan(most, c["LEAST"] * c["BN"], block_group, block_value, columns, launch, {})
        launch(max(1, min(most, -(-live // plan.least))))
        return plan

    return bound("decode", default, bucket, device, make)  # type: ignore[no-any-return]  # what make returns
