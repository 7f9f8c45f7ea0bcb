"""The newest key and value into a cache, in one launch, at a position that lies on the device.

    K_b,h[at_b] = k_b,h        V_b,h[at_b] = v_b,h

What a captured decode step needs before its attention: the position may change between two replays, the launch does not. A cache may be
cut into pages that a table orders (arXiv:2309.06180). Bytes: k and v read once and written once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream, on


@triton.jit(do_not_specialize=["L", "sab", "stb"])
def _append(
    K, V, KC, VC, AT, TABLE, L, sab, stb, skb, skh, svb, svh, ckb, ckh, cks, cvb, cvh, cvs,
    HK: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, PAGED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // HK).to(tl.int64)
    h = (tl.program_id(0) % HK).to(tl.int64)
    at = tl.load(AT + b * sab).to(tl.int64)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    room = (at >= 0) & (at < L)
    row = b
    if PAGED:
        row = tl.load(TABLE + b * stb + at // PAGE, mask=room, other=0).to(tl.int64)
        room = room & (row >= 0)
        at = at % PAGE
    k = tl.load(K + b * skb + h * skh + d, mask=d < D, other=0.0)
    v = tl.load(V + b * svb + h * svh + dv, mask=dv < DV, other=0.0)
    tl.store(KC + row * ckb + h * ckh + at * cks + d, k, mask=(d < D) & room)
    tl.store(VC + row * cvb + h * cvh + at * cvs + dv, v, mask=(dv < DV) & room)


_appends: dict[tuple[Any, ...], Any] = {}


def append(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor, table: Tensor | None = None) -> bool:
    """Write k (B, HK, 1, D) and v (B, HK, 1, DV) at position `at` of caches (B, HK, L, D) and (B, HK, L, DV), in one launch.

    at: int32 or int64 on the device, one, or (B,); before or beyond the cache nothing is written. table (B, pages) int32 or int64: the
    caches are pages (P, HK, size, D or DV), and nothing is written where the page is negative. False, and nothing done, where the
    kernel does not take these: dtypes that differ, another device, a last dimension that is not dense, gradients wanted.
    """
    if (
        k.is_cuda is INTERPRETED
        or not k.dtype is v.dtype is k_cache.dtype is v_cache.dtype
        or k.shape[2] != 1
        or not k.stride(3) == v.stride(3) == k_cache.stride(3) == v_cache.stride(3) == 1
        or (torch.is_grad_enabled() and (k.requires_grad or v.requires_grad))
        or not at.device == k.device == k_cache.device
        or at.numel() not in {1, k.shape[0]}
        or k.numel() == 0
        or k_cache.numel() == 0
        or (table is not None and table.device != k.device)
    ):
        return False
    batch, heads, _, dim = k.shape
    page, value_dim, device = k_cache.shape[2], v.shape[3], k.get_device()
    if table is not None:
        table = table if table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()
    room = page if table is None else page * table.shape[1]
    ks, vs, kc, vc = k.stride(), v.stride(), k_cache.stride(), v_cache.stride()
    rows = 0 if at.numel() == 1 else at.stride(0), 0 if table is None else table.stride(0)
    strides = (ks[0], ks[1], vs[0], vs[1], *kc[:3], *vc[:3])
    pointers = (k.data_ptr(), v.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(), at.data_ptr())
    pointers = (*pointers, pointers[4] if table is None else table.data_ptr())
    odd = any(x & 15 for x in (*pointers[:4], *strides))
    paged = None if table is None else (table.dtype, page)
    key = (k.dtype, at.dtype, device, heads, dim, value_dim, paged, odd, max(strides) > 2147483647)
    launch = _appends.get(key)
    if launch is None:
        example = (1 << 32 if key[-1] else 4096) + odd
        launch = _appends[key] = bind(
            _append, (k, v, k_cache, v_cache, *(t.new_empty(0) for t in (at, at if table is None else table)), 17, 17, 17, *(example,) * 10),
            device=device, num_warps=1, HK=heads, D=dim, BD=triton.next_power_of_2(dim), DV=value_dim,
            BDV=triton.next_power_of_2(value_dim), PAGED=int(table is not None), PAGE=page if table is not None else 1,
        )  # fmt: skip
    with on(device):
        launch(batch * heads, current_stream(device), *pointers, room, *rows, *strides)
    return True
