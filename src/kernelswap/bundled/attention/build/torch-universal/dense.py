"""Attention over (batch, heads, tokens, dim): which of PyTorch's kernels computes it.

Query i stands at position i + (Sk - Sq) among the keys ("bottom right"), as in flash-attention 2.1 and later.
A mask is built only where no kernel has a switch for what is asked: never for the plain causal case, never for one token.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # what everybody calls it
from torch.nn.attention import SDPBackend, sdpa_kernel

try:  # torch 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

_HALF = (torch.float16, torch.bfloat16)
_CHUNK = 1 << 24
"""Scores held at once where they are computed one by one: 64 MiB in float32."""
_NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_UNBOUND = -1

try:
    from torch.compiler import is_compiling
except ImportError:  # pragma: no cover  # every torch that is supported has it

    def is_compiling() -> bool:
        return False


_refused: set[tuple[object, ...]] = set()
"""What the decode kernel could not be compiled for on this GPU."""


def attend(  # noqa: PLR0913  # what attention has
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (_UNBOUND, _UNBOUND),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of q (B, HQ, Sq, D) over k (B, HK, Sk, D) and v (B, HK, Sk, DV) -> (B, HQ, Sq, DV); HQ a multiple of HK.

    window: keys from position - left to position + right; -1: no bound. softcap: s -> c tanh(s / c); 0: none.
    sinks (HQ,): a logit per head that joins the sum and has no value. alibi (HQ,) or (B, HQ): slopes.
    mask: broadcastable to (B, HQ, Sq, Sk); bool (True: takes part) or added to the scores. A query that no key may serve gives 0
    (under a mask that is added: what the sums give).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.dtype != v.dtype:  # norms kept in float32 next to half-precision weights
        q = q.to(v.dtype)
    if k.dtype != v.dtype:
        k = k.to(v.dtype)
    left, right = window
    right = 0 if causal else right
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        right = _UNBOUND
        if _UNBOUND < left < keys - 1:
            k, v = k[:, :, keys - 1 - left :], v[:, :, keys - 1 - left :]
            mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., keys - 1 - left :]
            keys = left + 1
        left = _UNBOUND
    left = left if left < keys - 1 else _UNBOUND
    right = right if right < queries - 1 else _UNBOUND
    if queries == 1 and mask is None and alibi is None and dropout == 0.0:
        out = decode(q, k, v, None, scale, softcap=softcap, sinks=sinks)
        if out is not None:
            return out.transpose(1, 2)
    if softcap or sinks is not None or alibi is not None:
        return explicit(
            q, k, v, scale, bounds=(left, right), softcap=softcap, sinks=sinks, alibi=alibi, mask=mask, dropout=dropout
        )[0]
    return _sdpa(q, k, v, scale, left, right, mask, dropout)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    length: Tensor | None,
    scale: float,
    *,
    mask: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    table: Tensor | None = None,
    plus: int = 0,
) -> Tensor | None:
    """One token per sequence by the Triton kernel: q (B, HQ, 1, D) -> (B, 1, HQ, DV), or `None` where it does not serve.

    length (B,), on the device: how many of the keys live, less `plus`; `None`: all. mask (B, Sk) int32: 0 where a key is not seen.
    window: the last so many of the live ones; 0: all. table (B, pages): k and v are pages (P, HK, size, D or DV).
    """
    if not _launches(q):
        return None
    module, _ = _triton_kernels()
    if module is None or not module.takes(q, k, v):
        return None
    if sinks is not None and sinks.requires_grad and torch.is_grad_enabled():
        return None
    key = (q.get_device(), q.dtype, q.shape[-1], v.shape[-1], table is None)
    if key in _refused:
        return None
    try:
        out: Tensor = module.decode(
            q, k, v, scale=scale, length=length, mask=mask, window=window, softcap=softcap, sinks=sinks, table=table, plus=plus
        )
    except module.Unfit:  # too little shared memory, a GPU that Triton does not know: PyTorch's kernels go on
        _refused.add(key)
        return None
    return out


def append_token(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, at: Tensor, table: Tensor | None = None) -> bool:
    """Write one token's k (B, HK, 1, D) and v (B, HK, 1, DV) into caches (B, HK, L, D or DV) at position `at`, on the device: one, or (B,).

    With a table (B, pages), caches are pages (P, HK, size, D or DV). One launch. False, and nothing done, where the Triton kernel does
    not serve: write with `index_copy_` then.
    """
    if not _launches(k):
        return False
    _, module = _triton_kernels()
    return module is not None and bool(module.append(k, v, k_cache, v_cache, at, table))


def _launches(x: Tensor) -> bool:
    """Whether kernels of ours may run on `x`: on an NVIDIA GPU, and nobody traces."""
    return x.is_cuda and not is_compiling() and not torch.jit.is_tracing() and torch.version.hip is None


_modules: list[tuple[Any, Any]] = []


def _triton_kernels() -> tuple[Any, Any]:
    """`decode.py` and `append.py`; (None, None) where there is no Triton."""
    if not _modules:
        try:
            from . import append, decode
        except ImportError:
            _modules.append((None, None))
        else:
            _modules.append((decode, append))
    return _modules[0]


# -- scaled_dot_product_attention -----------------------------------------------------------------------------------


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, mask: Tensor | None, dropout: float) -> Tensor:  # noqa: PLR0911, PLR0913
    queries, keys = q.shape[2], k.shape[2]
    if mask is None and left == right == _UNBOUND:
        return _one(q, k, v, scale, dropout) if queries == 1 else _call(q, k, v, scale, None, dropout)
    if mask is None and left == _UNBOUND and right == 0 and queries == keys:
        return _call(q, k, v, scale, None, dropout, causal=True)
    if mask is None and dropout == 0.0 and _has_varlen(q, v):
        return _flash(q, k, v, scale, left, right)
    if mask is None and _UNBOUND not in (left, right) and 4 * (left + right + 1) <= keys and not is_compiling():
        return _in_blocks(q, k, v, scale, left, right, dropout)
    if left != _UNBOUND or right != _UNBOUND:
        mask = _with(mask, allowed(queries, keys, left, right, q.device))
    if queries == 1 and mask is not None and (mask.ndim < 4 or mask.shape[1] == 1):
        return _one(q, k, v, scale, dropout, mask)
    return _call(q, k, v, scale, mask, dropout)


def _call(  # noqa: PLR0913
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, dropout: float, *, causal: bool = False
) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    # On a GPU the kernels with grouped heads take no mask and one size of heads up to 256; else PyTorch would take its slow path.
    grouped = groups > 1 and (q.device.type == "cpu" or (mask is None and k.shape[-1] == v.shape[-1] <= 256))
    if groups > 1 and not grouped:
        k, v = _repeat(k, groups), _repeat(v, groups)
    if mask is not None and mask.dtype is not torch.bool and mask.dtype != q.dtype:
        mask = mask.to(q.dtype)
    more = {"enable_gqa": True} if grouped else {}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, **more)


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, mask: Tensor | None = None) -> Tensor:  # noqa: PLR0913
    """One token: the heads of a group are the rows of one query, so that no key is repeated; cuDNN plans anew for every length."""
    batch, heads, _, dim = q.shape
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1], dim)
    if mask is not None and mask.dtype is not torch.bool and mask.dtype != q.dtype:
        mask = mask.to(q.dtype)
    with sdpa_kernel(_NOT_CUDNN) if q.is_cuda and not is_compiling() else nullcontext():
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    return out.reshape(batch, heads, 1, v.shape[-1])


def _has_varlen(q: Tensor, v: Tensor) -> bool:
    return (
        varlen_attn is not None
        and q.is_cuda
        and torch.version.hip is None
        and q.dtype in _HALF
        and q.shape[-1] == v.shape[-1] <= 256
        and q.numel() > 0
        and v.numel() > 0
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int) -> Tensor:  # noqa: PLR0913
    """Bounds without a mask: PyTorch's flash kernel, over the batch laid end to end."""
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    rows_q = torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=q.device)
    rows_k = rows_q if keys == queries else torch.arange(0, (batch + 1) * keys, keys, dtype=torch.int32, device=q.device)
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
    out = packed(q, k, v, rows_q, rows_k, queries, keys, scale, (left, right))
    return out.view(batch, queries, *out.shape[1:]).transpose(1, 2)


def packed(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int],
) -> Tensor:
    """`varlen_attn` with heads in groups where this PyTorch has that, else repeated."""
    more = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in varlen_attn.__kwdefaults__:
            more = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window, **more)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int, dropout: float) -> Tensor:  # noqa: PLR0913
    """A narrow window over a long sequence: blocks of queries, each with the keys that it can see and a small mask."""
    queries, keys = q.shape[2], k.shape[2]
    offset, step = keys - queries, max(64, left + right + 1)
    parts = []
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        first, last = min(max(0, start + offset - left), keys - 1), max(1, min(keys, stop + offset + right))
        mask = allowed(stop - start, last - first, left, right, q.device, offset=start + offset - first)
        parts.append(_call(q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], scale, mask, dropout))
    return torch.cat(parts, dim=2)


# -- scores, one by one ---------------------------------------------------------------------------------------------


def explicit(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    bounds: tuple[int, int] = (_UNBOUND, _UNBOUND),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    alibi: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    with_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What no kernel of PyTorch has a switch for: soft caps, sinks, slopes, log-sum-exp (B, HQ, Sq). A part of the queries at a time."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    step = queries if is_compiling() else max(16, _CHUNK // max(1, batch * heads * keys))
    outs, sums = [], []
    for start in range(0, max(queries, 1), step):
        stop = min(start + step, queries)
        piece = None if mask is None else (mask if mask.shape[-2] == 1 else mask[..., start:stop, :])
        if bounds != (_UNBOUND, _UNBOUND):
            piece = _with(piece, allowed(stop - start, keys, *bounds, q.device, offset=start + keys - queries))
        scores = _scores(q[:, :, start:stop], k, scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi is not None:
            scores = scores + _slopes(alibi, start + keys - queries, stop - start, keys, scores)
        out, lse = _weigh(scores, v, piece, sinks, dropout, with_lse=with_lse)
        outs.append(out)
        sums.append(lse)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)), (torch.cat(sums, dim=2) if with_lse else None)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale * q k^T in float32 (float64 for float64), heads of a group as rows of one product."""
    batch, heads, queries, dim = q.shape
    if q.device.type == "cpu" and q.dtype in _HALF:
        q, k = q.float(), k.float()
    rows = q.reshape(batch, k.shape[1], heads // k.shape[1] * queries, dim)
    scores = torch.matmul(rows, k.transpose(2, 3)).view(batch, heads, queries, k.shape[2])
    return (scores if scores.dtype is torch.float64 else scores.float()) * scale


def _weigh(
    scores: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, dropout: float, *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    batch, heads, queries, keys = scores.shape
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, dim=-1) if with_lse else None
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, -1, queries, -1)
        weights = torch.softmax(torch.cat([scores, extra], dim=-1), dim=-1)[..., :keys]
    else:
        weights = torch.softmax(scores, dim=-1)
    if mask is not None and mask.dtype is torch.bool:
        weights = weights.masked_fill(~mask, 0.0)  # a row that nothing may serve is uniform until here
    weights = F.dropout(weights, dropout) if dropout else weights
    rows = weights.to(v.dtype).reshape(batch, v.shape[1], heads // v.shape[1] * queries, keys)  # -1 is no size of nothing
    return torch.matmul(rows, v).view(batch, heads, queries, v.shape[-1]), lse


def _slopes(alibi: Tensor, first: int, queries: int, keys: int, like: Tensor) -> Tensor:
    at = torch.arange(first, first + queries, device=like.device)
    distance = (at[:, None] - torch.arange(keys, device=like.device)[None, :]).abs().to(like.dtype)
    slopes = alibi.to(like.dtype).view(-1, alibi.shape[-1], 1, 1)
    return -slopes * distance


# -- masks ------------------------------------------------------------------------------------------------------------


def allowed(queries: int, keys: int, left: int, right: int, device: torch.device, *, offset: int | None = None) -> Tensor:
    """(queries, keys), True where query i, at position i + offset, may look; by default the last query is at the last key."""
    offset = keys - queries if offset is None else offset
    at = torch.arange(offset, offset + queries, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    fits = torch.ones((queries, keys), dtype=torch.bool, device=device)
    if left != _UNBOUND:
        fits &= key >= at - left
    if right != _UNBOUND:
        fits &= key <= at + right
    return fits


def _with(mask: Tensor | None, more: Tensor) -> Tensor:
    if mask is None:
        return more
    return mask & more if mask.dtype is torch.bool else mask.masked_fill(~more, -math.inf)


def _repeat(x: Tensor, times: int) -> Tensor:
    batch, heads, tokens, dim = x.shape
    return x[:, :, None].expand(batch, heads, times, tokens, dim).reshape(batch, heads * times, tokens, dim)
