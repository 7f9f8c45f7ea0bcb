"""Gradients of the RMSNorm of each head of q and k and their rotary embedding: in one launch, or rotated back first.

    a = dy rotated by -sin        g = a * (offset + w)        dx = (g - n * mean(g * n)) * rstd        dw = sum over rows of a * n

with n the normalised head, recomputed from x. Source: the derivative of `rope.py` by hand.
Bytes of the one launch: x and dy read once, dx written once, cos and sin once per token; `a` is in registers, in float32.
Each program sums dw over the heads that it sees, and leaves one row of it: 4 a multiprocessor, q's programs first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import bind, current_stream, multiprocessors, on
from ._stages import stages
from .rms_norm import _run_backward as _norm_backward

FUSED = False
"""Whether one launch serves. Nothing was measured yet: row `K4 q/k-norm+RoPE fwd+bwd` of the benchmark times both ways."""


@triton.jit(do_not_specialize=["S", "tokens", "many", "programs", "eps"])
def _backward(
    Q, K, GQ, GK, DQ, DK, QW, KW, COS, SIN, P, S, tokens, many, programs, eps,
    sqb, sqs, sqh, skb, sks, skh, gqb, gqs, gqh, gkb, gks, gkh, scb, scs,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, HALF: tl.constexpr,
    OFFSET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The first `many` of the programs work on q, the others on k."""
    pid = tl.program_id(0)
    row = P + pid.to(tl.int64) * D
    if pid < many:
        _heads(
            Q, GQ, DQ, QW, COS, SIN, row, pid, many, S, tokens, eps, sqb, sqs, sqh, gqb, gqs, gqh, scb, scs,
            HQ, D, BQ, HALF, OFFSET, STAGES,
        )  # fmt: skip
    else:
        _heads(
            K, GK, DK, KW, COS, SIN, row, pid - many, programs - many, S, tokens, eps, skb, sks, skh, gkb, gks, gkh, scb, scs,
            HK, D, BK, HALF, OFFSET, STAGES,
        )  # fmt: skip


@triton.jit
def _heads(
    X, G, O, W, COS, SIN, P, first, step, S, tokens, eps, sxb, sxs, sxh, sgb, sgs, sgh, scb, scs,
    H: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """HB heads of one token a turn; the outputs lie token by token, contiguously."""
    GROUPS: tl.constexpr = (H + HB - 1) // HB
    i = tl.arange(0, HALF)
    m = i < D // 2
    w1 = tl.load(W + i, mask=m, other=0.0).to(tl.float32)
    w2 = tl.load(W + D // 2 + i, mask=m, other=0.0).to(tl.float32)
    if OFFSET:
        w1 += 1.0
        w2 += 1.0
    dw1 = tl.zeros((HB, HALF), tl.float32)
    dw2 = tl.zeros((HB, HALF), tl.float32)
    for item in tl.range(first, tokens * GROUPS, step, num_stages=STAGES):
        token = item // GROUPS
        h = (item % GROUPS) * HB + tl.arange(0, HB)
        b = (token // S).to(tl.int64)
        s = (token % S).to(tl.int64)
        wide = h[:, None].to(tl.int64)
        inside = (h < H)[:, None] & m[None, :]
        x = X + b * sxb + s * sxs + wide * sxh + i[None, :]
        g = G + b * sgb + s * sgs + wide * sgh + i[None, :]
        c = b * scb + s * scs + i
        x1 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + D // 2, mask=inside, other=0.0).to(tl.float32)
        g1 = tl.load(g, mask=inside, other=0.0).to(tl.float32)
        g2 = tl.load(g + D // 2, mask=inside, other=0.0).to(tl.float32)
        c1 = tl.load(COS + c, mask=m, other=0.0).to(tl.float32)[None, :]
        c2 = tl.load(COS + c + D // 2, mask=m, other=0.0).to(tl.float32)[None, :]
        s1 = tl.load(SIN + c, mask=m, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(SIN + c + D // 2, mask=m, other=0.0).to(tl.float32)[None, :]
        a1 = g1 * c1 + g2 * s2
        a2 = g2 * c2 - g1 * s1
        rstd = (1.0 / tl.sqrt_rn(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps))[:, None]
        n1 = x1 * rstd
        n2 = x2 * rstd
        p1 = a1 * w1[None, :]
        p2 = a2 * w2[None, :]
        mean = (tl.sum(p1 * n1 + p2 * n2, axis=1) / D)[:, None]
        o = O + token.to(tl.int64) * (H * D) + wide * D + i[None, :]
        tl.store(o, (p1 - n1 * mean) * rstd, mask=inside)
        tl.store(o + D // 2, (p2 - n2 * mean) * rstd, mask=inside)
        if OFFSET:
            dw1 += a1 * n1
            dw2 += a2 * n2
        else:  # what the weight was multiplied by
            dw1 += a1 * n1.to(X.dtype.element_ty).to(tl.float32)
            dw2 += a2 * n2.to(X.dtype.element_ty).to(tl.float32)
    tl.store(P + i, tl.sum(dw1, axis=0), mask=m)
    tl.store(P + D // 2 + i, tl.sum(dw2, axis=0), mask=m)


@triton.jit(do_not_specialize=["many", "programs"])
def _sum_both(P, DQW, DKW, many, programs, D: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    BLOCKS: tl.constexpr = (D + BLOCK - 1) // BLOCK
    of_k = tl.program_id(0) // BLOCKS
    col = (tl.program_id(0) % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    first = of_k * many
    last = many + of_k * (programs - many)
    acc = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        acc += tl.load(P + row[:, None] * D + col[None, :], mask=(row < last)[:, None] & (col < D)[None, :], other=0.0)
    dw = tl.sum(acc, axis=0)
    if of_k == 0:
        tl.store(DQW + col, dw, mask=col < D)
    else:
        tl.store(DKW + col, dw, mask=col < D)


# -- host side ----------------------------------------------------------------------------------------------------

_bound: dict[tuple[Any, ...], Any] = {}
Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def gradients(
    back: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor,
    k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, dim: int, offset: int,
) -> Gradients:  # fmt: skip
    """Of q, k and both weights (D,), given those of the outputs of `rope.norm_rope`; q and k as that takes them, heads at `dim`.

    `back(dq, dk)` rotates back, its outputs in memory token by token: the way without the one launch.
    """
    # (B, H, S, D) as the model lays it out is (B, S, H, D) in memory, and so are the gradients: permuted, none is copied
    order = (0, 2, 1, 3) if dim == 1 else (0, 1, 2, 3)
    if FUSED:
        dq, dk, dv, dw = _run(*(x.permute(order) for x in (dq, dk, q, k)), q_weight, k_weight, cos, sin, eps, offset)
        return dq.permute(order), dk.permute(order), dv, dw
    dq, dk = back(dq, dk)
    out = []
    for x, w, d in ((q, q_weight, dq), (k, k_weight, dk)):
        rows = x.permute(order).contiguous()
        dx, dw = _norm_backward(d.permute(order).contiguous(), rows, w, eps, offset, None)
        out.append((dx.permute(order), dw))
    return out[0][0], out[1][0], out[0][1], out[1][1]


def _run(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    offset: int,
) -> Gradients:  # fmt: skip
    """The one launch, and that which sums the weights' rows. dq, q (B, S, HQ, D), dk, k (B, S, HK, D), cos and sin (B or 1, S, D)."""
    dq, dk, q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (dq, dk, q, k))
    if cos.stride(2) != 1 or cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch, seq, heads, dim = q.shape
    kv_heads, tokens = k.shape[2], batch * seq
    a, b = q.new_empty(q.shape), k.new_empty(k.shape)
    dv, dw = torch.empty_like(q_weight), torch.empty_like(k_weight)
    device = q.get_device()
    block, kv_block = (min(16, triton.next_power_of_2(n)) for n in (heads, kv_heads))
    groups, kv_groups = -(-heads // block), -(-kv_heads // kv_block)
    programs = max(2, min(4 * multiprocessors(device), tokens * (groups + kv_groups)))
    share = groups * block / (groups * block + kv_groups * kv_block)
    many = max(1, min(programs - 1, round(programs * share)))
    partial = torch.empty((programs, dim), dtype=torch.float32, device=q.device)
    strides = (
        *q.stride()[:3], *k.stride()[:3], *dq.stride()[:3], *dk.stride()[:3], cos.stride(0) if cos.shape[0] == batch else 0,
        cos.stride(1),
    )  # fmt: skip
    tensors = (q, k, dq, dk, a, b, q_weight, k_weight, cos, sin, partial)
    places = [t.data_ptr() for t in tensors]
    low = tuple(p & 15 for p in places)
    odd, large = any(x & 15 for x in strides), max(strides) > 2147483647
    key = (q.dtype, heads, kv_heads, dim, device, offset, odd, large, low if any(low) else None)
    found = _bound.get(key)
    if found is None:
        example = (1 << 32 if large else 4096) + odd
        launch = bind(
            _backward, (*tensors, 17, 17, 17, 17, 1e-6, *((example,) * 14)), device=device, num_warps=4,
            HQ=heads, HK=kv_heads, D=dim, BQ=block, BK=kv_block, HALF=triton.next_power_of_2(dim // 2), OFFSET=offset,
            STAGES=stages(2 * max(block, kv_block) * dim * q.element_size(), device),
        )  # fmt: skip
        total = bind(_sum_both, (partial, dv, dw, 17, 17), device=device, num_warps=4, D=dim, BLOCK=32, ROWS=64)
        found = _bound[key] = launch, total
    launch, total = found
    with on(device):
        stream = current_stream(device)
        launch(programs, stream, *places, seq, tokens, many, programs, eps, *strides)
        total(2 * -(-dim // 32), stream, partial.data_ptr(), dv.data_ptr(), dw.data_ptr(), many, programs)
    return a, b, dv, dw
