"""What attention is, in float64 and one query at a time: what the tests hold the rest to. Slow on purpose."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """q (B, HQ, Sq, D), k (B, HK, Sk, D), v (B, HK, Sk, DV) -> (B, HQ, Sq, DV), float64; see `dense.attend`."""
    q, k, v = (x.double() for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    rows = []
    for i in range(queries):
        at = i + keys - queries
        key = torch.arange(keys)
        seen = torch.ones(keys, dtype=torch.bool)
        if causal:
            seen &= key <= at
        if window[0] >= 0:
            seen &= key >= at - window[0]
        if window[1] >= 0 and not causal:
            seen &= key <= at + window[1]
        allowed = seen.expand(batch, heads, keys)
        if mask is not None:
            allowed = allowed & mask.expand(batch, heads, queries, keys)[:, :, i]
        scores = torch.stack([(q[:, h, i, None] * k[:, h // group]).sum(-1) for h in range(heads)], 1) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi is not None:
            scores = scores - alibi.double().view(-1, heads, 1) * (at - key).abs()
        weights = torch.where(allowed, scores.exp(), 0.0)
        total = weights.sum(-1, keepdim=True)
        if sinks is not None:
            total = total + sinks.double().view(1, heads, 1).exp()
        weights = torch.where(total > 0, weights / total, 0.0)
        rows.append(torch.stack([(weights[:, h, :, None] * v[:, h // group]).sum(1) for h in range(heads)], 1))
    return torch.stack(rows, 2)
