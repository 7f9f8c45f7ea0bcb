"""Rotary position embedding of q and k in one launch, with or without the RMSNorm of each head before it.

    out[:, :d/2] = x1 * cos1 - x2 * sin1        out[:, d/2:] = x2 * cos2 + x1 * sin2        (half-split)

Source: Su et al. 2021, arXiv:2104.09864, in the half-split form of GPT-NeoX that Transformers uses; q/k norm: Qwen3.
Backward is the same rotation with -sin. Bytes: q, k read once and written once, cos and sin once per token.
Layout: tokens by heads by d, with any strides over batch, sequence and head; d contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import bind, current_device, current_stream


@triton.jit(do_not_specialize=["S", "tokens", "eps"])
def _forward(
    Q, K, COS, SIN, QO, KO, QW, KW, tokens, S, sqb, sqs, sqh, skb, sks, skh, oqb, oqs, oqh, okb, oks, okh, scb, scs, eps,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One token a program: every q head, then every k head."""
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    i = tl.arange(0, HALF)
    m = i < D // 2
    c1 = tl.load(COS + b * scb + s * scs + i, mask=m, other=0.0).to(tl.float32)
    s1 = tl.load(SIN + b * scb + s * scs + i, mask=m, other=0.0).to(tl.float32)
    c2 = tl.load(COS + b * scb + s * scs + D // 2 + i, mask=m, other=0.0).to(tl.float32)
    s2 = tl.load(SIN + b * scb + s * scs + D // 2 + i, mask=m, other=0.0).to(tl.float32)
    _rotate(Q, QO, QW, b * sqb + s * sqs, sqh, b * oqb + s * oqs, oqh, i, m, c1, s1, c2, s2, eps, HQ, BQ, D, NORM, INVERSE)
    _rotate(K, KO, KW, b * skb + s * sks, skh, b * okb + s * oks, okh, i, m, c1, s1, c2, s2, eps, HK, BK, D, NORM, INVERSE)


@triton.jit
def _rotate(
    X, O, W, base, sh, obase, oh, i, m, c1, s1, c2, s2, eps,
    H: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    h = tl.arange(0, BH)
    inside = (h < H)[:, None] & m[None, :]
    at = base + h[:, None] * sh + i[None, :]
    x1 = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(X + at + D // 2, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        w1 = tl.load(W + i, mask=m, other=0.0).to(tl.float32)
        w2 = tl.load(W + D // 2 + i, mask=m, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)
        dt = X.dtype.element_ty
        x1 = ((x1 * rstd[:, None]).to(dt).to(tl.float32) * w1[None, :]).to(dt).to(tl.float32)
        x2 = ((x2 * rstd[:, None]).to(dt).to(tl.float32) * w2[None, :]).to(dt).to(tl.float32)
    if INVERSE:
        y1 = x1 * c1[None, :] + x2 * s2[None, :]
        y2 = x2 * c2[None, :] - x1 * s1[None, :]
    else:
        y1 = x1 * c1[None, :] - x2 * s1[None, :]
        y2 = x2 * c2[None, :] + x1 * s2[None, :]
    to = obase + h[:, None] * oh + i[None, :]
    tl.store(O + to, y1, mask=inside)
    tl.store(O + to + D // 2, y2, mask=inside)


_PLAIN = (Tensor, torch.nn.Parameter)
_bound: dict[tuple[Any, ...], Any] = {}


def _half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """The same in plain torch: for tracing, for tensor subclasses, for shapes the kernel does not take, and to read."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate q (B, HQ, S, D) and k (B, HK, S, D) by cos, sin (B or 1, S, D); `unsqueeze_dim` 2: (B, S, H, D).

    Any strides with D contiguous; the outputs have the inputs' layout. Inputs are not written.
    """
    if (
        torch.compiler.is_compiling()
        or type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or not q.is_cuda
        or q.dim() != 4
        or cos.dim() != 3
        or cos.shape[-1] != q.shape[-1]
        or q.dtype is not k.dtype
        or cos.dtype is not q.dtype
        or q.shape[-1] & 15
        or q.shape[1] > 256
        or q.numel() == 0
        or unsqueeze_dim not in (1, 2)
    ):
        return formula(q, k, cos, sin, unsqueeze_dim)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rope.apply(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return _run(q, k, cos, sin, unsqueeze_dim, 0)


def _run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, inverse: int) -> tuple[Tensor, Tensor]:
    h_dim, s_dim = (1, 2) if unsqueeze_dim == 1 else (2, 1)
    qs, ks, cs = q.stride(), k.stride(), cos.stride()
    if qs[3] != 1:
        q = q.contiguous()
        qs = q.stride()
    if ks[3] != 1:
        k = k.contiguous()
        ks = k.stride()
    if cs[2] != 1 or sin.stride() != cs:
        cos, sin = cos.contiguous(), sin.contiguous()
        cs = cos.stride()
    qo, ko = torch.empty_like(q), torch.empty_like(k)
    qos, kos = qo.stride(), ko.stride()
    shape = q.shape
    batch, seq = shape[0], shape[s_dim]
    device = q.get_device()
    pq, pk, pc, ps, pqo, pko = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr(), qo.data_ptr(), ko.data_ptr()
    bits = (
        qs[0] | qs[1] | qs[2] | ks[0] | ks[1] | ks[2] | cs[0] | cs[1] | qos[0] | qos[1] | qos[2] | kos[0] | kos[1] | kos[2]
    )
    heads, kv_heads, dim = shape[h_dim], k.shape[h_dim], shape[3]
    key = (q.dtype, heads, kv_heads, dim, device, inverse, (pq | pk | pc | ps) & 15, bits & 15, bits > 2147483647)
    cb = cs[0] if cos.shape[0] == batch else 0
    strides = (
        qs[0], qs[s_dim], qs[h_dim], ks[0], ks[s_dim], ks[h_dim],
        qos[0], qos[s_dim], qos[h_dim], kos[0], kos[s_dim], kos[h_dim], cb, cs[1],
    )  # fmt: skip
    launch = _bound.get(key)
    if launch is None:
        example = (1 << 32 if bits > 2147483647 else 4096) + (bits & 15 != 0)
        launch = _bound[key] = bind(
            _forward, (q, k, cos, sin, qo, ko, q, k, 17, 17, *((example,) * 14), 1e-6), device=device, num_warps=4,
            HQ=heads, HK=kv_heads, D=dim, BQ=triton.next_power_of_2(heads), BK=triton.next_power_of_2(kv_heads),
            HALF=triton.next_power_of_2(dim // 2), NORM=0, INVERSE=inverse,
        )  # fmt: skip
    tokens = batch * seq
    if device == current_device():
        launch(tokens, current_stream(device), pq, pk, pc, ps, pqo, pko, pq, pk, tokens, seq, *strides, 1e-6)
    else:
        with torch.cuda.device(device):
            launch(tokens, current_stream(device), pq, pk, pc, ps, pqo, pko, pq, pk, tokens, seq, *strides, 1e-6)
    return qo, ko


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim = unsqueeze_dim
        return _run(q, k, cos, sin, unsqueeze_dim, 0)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]  # torch types *Any
        cos, sin = ctx.saved_tensors
        return *_run(dq, dk, cos, sin, ctx.unsqueeze_dim, 1), None, None, None
