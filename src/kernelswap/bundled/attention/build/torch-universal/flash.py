"""The functions of flash-attention 2, with its argument names, defaults and alignment, over `dense.attend`.

Layouts: (batch, tokens, heads, dim), or (tokens, heads, dim) for sequences laid end to end. Besides what flash-attention has:
`s_aux` (also `sinks`) of shape (heads,), values with a head size of their own, any dtype, any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .dense import _HALF, _has_varlen, append_token, attend, decode, explicit, is_compiling, packed

Window = tuple[int, int]
NONE = (-1, -1)


def flash_attn_func(  # noqa: PLR0913  # flash-attention's
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002
    window_size: Window = NONE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,  # noqa: ARG001, FBT001, FBT002  # PyTorch has its own switch for that
    return_attn_probs: bool = False,  # noqa: FBT001, FBT002
    *,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """q (B, Sq, HQ, D), k (B, Sk, HK, D), v (B, Sk, HK, DV) -> (B, Sq, HQ, DV).

    With `return_attn_probs`: (out, log-sum-exp of the scores (B, HQ, Sq) in float32, None).
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    sinks = s_aux if sinks is None else sinks
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if return_attn_probs:
        right = 0 if causal else window_size[1]
        out, lse = explicit(
            q, k, v, scale, bounds=(window_size[0], right), softcap=softcap, sinks=sinks, alibi=alibi_slopes,
            dropout=dropout_p, with_lse=True,
        )  # fmt: skip
        assert lse is not None  # asked for
        return out.transpose(1, 2), lse, None
    return attend(
        q, k, v, scale=scale, causal=causal, window=tuple(window_size), softcap=softcap, sinks=sinks,  # type: ignore[arg-type]  # lists come, too
        alibi=alibi_slopes, dropout=dropout_p,
    ).transpose(1, 2)  # fmt: skip


def flash_attn_varlen_func(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002
    window_size: Window = NONE,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,  # noqa: ARG001, FBT001, FBT002
    return_attn_probs: bool = False,  # noqa: FBT001, FBT002
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Sequences laid end to end: q (Tq, HQ, D), k (Tk, HK, D), v (Tk, HK, DV) -> (Tq, HQ, DV).

    cu_seqlens (N + 1,) int32: where each sequence begins, and the last ends; tokens after that come out as 0.
    block_table (N, pages) int32: k and v are pages (P, size, HK, D) of a cache.
    With `return_attn_probs`: (out, log-sum-exp (HQ, Tq) in float32, None).
    """
    sinks = s_aux if sinks is None else sinks
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    plain = not softcap and sinks is None and alibi_slopes is None and dropout_p == 0.0 and not return_attn_probs
    if plain and block_table is None and _has_varlen(q, v):
        window = (window_size[0], 0 if causal else window_size[1])
        return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), scale, window)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1], dtype=v.dtype)
    sums = torch.zeros((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device) if return_attn_probs else None
    parts: list[Tensor] = []
    done = 0
    for i, (a, b) in enumerate(zip(starts_q, starts_q[1:])):  # noqa: B905  # one shorter, on purpose
        c, d = starts_k[i], starts_k[i + 1]
        if b == a:
            continue
        if block_table is not None:
            pages = block_table[i, : -(-(d - c) // k.shape[1])]
            ks, vs = (x[pages].flatten(0, 1)[: d - c] for x in (k, v))
        else:
            ks, vs = k[c:d], v[c:d]
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[i : i + 1]
        one = flash_attn_func(
            q[None, a:b], ks[None], vs[None], dropout_p, scale, causal, window_size, softcap, slopes,
            return_attn_probs=return_attn_probs, sinks=sinks,
        )  # fmt: skip
        if sums is not None:
            one, lse, _ = one
            sums[:, a:b] = lse[0]
        if a > done:
            parts.append(out[done:a])
        parts.append(one[0])  # type: ignore[index]  # a tensor: the tuple was taken apart
        done = b
    if done < q.shape[0]:
        parts.append(out[done:])
    joined = torch.cat(parts) if parts else out
    return joined if sums is None else (joined, sums, None)


def flash_attn_with_kvcache(  # noqa: PLR0913
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002
    window_size: Window = NONE,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,  # noqa: FBT001, FBT002
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,  # noqa: ARG001  # chosen by the kernel
    return_softmax_lse: bool = False,  # noqa: FBT001, FBT002
    *,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """q (B, Sq, HQ, D) over a cache (B, max, HK, D), or pages (P, size, HK, D) with a block_table -> (B, Sq, HQ, DV).

    New keys and values (B, Sn, HK, D) are written into the cache at `cache_seqlens` first, in place. Nothing waits for the device.
    What lies beyond the live length is never looked at: it may be uninitialised, and pages of the table there may be -1. With a
    block_table, a row whose cache_seqlens is negative only fills up the batch (a captured graph has rows to spare): it writes
    nothing, and its output means nothing; one row at least is no such row. Forward only.
    """
    if alibi_slopes is not None and alibi_slopes.ndim == 1:
        alibi_slopes = alibi_slopes[None]
    batch, queries = q.shape[:2]
    device = q.device
    size = k_cache.shape[1]
    lengths = torch.as_tensor(size if cache_seqlens is None else cache_seqlens, device=device).expand(batch)
    if rotary_cos is not None and rotary_sin is not None:
        seen = lengths.to(torch.int64)
        steps = seen[:, None] + torch.arange(queries, device=device) if causal or window_size != NONE else seen[:, None]
        q = _rotate(q, rotary_cos, rotary_sin, steps, interleaved=rotary_interleaved)
        if k is not None:
            steps = seen[:, None] + torch.arange(k.shape[1], device=device)
            k = _rotate(k, rotary_cos, rotary_sin, steps, interleaved=rotary_interleaved)
    # A cache whose rows are others than the batch's is one of long pages, one page for each sequence.
    table = block_table if block_table is not None or cache_batch_idx is None else cache_batch_idx[:, None]
    new = 0
    if k is not None and v is not None:
        new = k.shape[1]
        keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        if new != 1 or not append_token(k.transpose(1, 2), v.transpose(1, 2), keys, values, lengths, table):
            _write(k, v, k_cache, v_cache, lengths.to(torch.int64), table)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    sinks = s_aux if sinks is None else sinks
    left, right = window_size[0], 0 if causal else window_size[1]
    q = q.transpose(1, 2)
    if queries == 1 and cache_leftpad is None and alibi_slopes is None and not return_softmax_lse and q.dtype in _HALF:
        last, keys, values = left + 1 if left >= 0 else 0, k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        out = decode(q, keys, values, lengths, scale, window=last, softcap=softcap, sinks=sinks, table=table, plus=new)
        if out is not None:
            return out
    keys, values = (x if table is None else x[table.long()].flatten(1, 2) for x in (k_cache, v_cache))
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    seen = lengths.to(torch.int64) + new
    keys, values = _without_the_dead(keys, values, seen, cache_leftpad)
    mask = _live(seen, queries, keys.shape[2], left, right, cache_leftpad)
    if alibi_slopes is not None:  # distances are from each sequence's own end
        place = torch.arange(queries, device=device)[None, :, None] + (seen - queries)[:, None, None]
        distance = (place - torch.arange(keys.shape[2], device=device)).abs()[:, None]
        bias = -alibi_slopes.float()[..., None, None] * distance
        mask = bias.masked_fill(~mask, float("-inf"))
    if return_softmax_lse:
        out, lse = explicit(q, keys, values, scale, softcap=softcap, sinks=sinks, mask=mask, with_lse=True)
        assert lse is not None  # asked for
        return out.transpose(1, 2), lse
    return attend(q, keys, values, scale=scale, softcap=softcap, sinks=sinks, mask=mask).transpose(1, 2)


def _write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, seen: Tensor, table: Tensor | None) -> None:  # noqa: PLR0913
    """k and v (B, Sn, HK, D) at positions `seen` and on: of row b of the caches (B, max, HK, D), or of the pages that `table` has for b."""
    batch, size = k.shape[0], k_cache.shape[1]
    rows = torch.arange(batch, device=k.device)
    at = seen[:, None] + torch.arange(k.shape[1], device=k.device)
    where = (rows[:, None].expand_as(at), at)
    if table is not None:
        table = table.long()
        if batch > 1:  # a row that writes nothing writes once more what another one writes: shapes never depend on values
            alive = seen >= 0
            same = torch.where(alive, rows, alive.int().argmax())
            at, k, v, table = at[same], k[same], v[same], table[same]
        where = (table.gather(1, at // size), at % size)
    k_cache.index_put_(where, k.to(k_cache.dtype))
    v_cache.index_put_(where, v.to(v_cache.dtype))


def _without_the_dead(keys: Tensor, values: Tensor, seen: Tensor, leftpad: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values (B, H, max, D) with zeros where no token lives: a mask alone would let a NaN there through, since 0 * NaN is NaN.

    On a CPU, where lengths are read without waiting, they are cut at the longest first, and copied only if one is shorter.
    """
    if seen.device.type == "cpu" and seen.numel() and not is_compiling():
        longest, shortest = max(1, int(seen.max())), int(seen.min())
        keys, values = keys[:, :, :longest], values[:, :, :longest]
        if shortest >= keys.shape[2] and leftpad is None:
            return keys, values
    place = torch.arange(keys.shape[2], device=seen.device)
    dead = place >= seen[:, None]
    if leftpad is not None:
        dead = dead | (place < leftpad[:, None])
    dead = dead[:, None, :, None]
    return keys.masked_fill(dead, 0.0), values.masked_fill(dead, 0.0)


def _live(seen: Tensor, queries: int, keys: int, left: int, right: int, leftpad: Tensor | None) -> Tensor:  # noqa: PLR0913
    """(B, 1, Sq, max), True where the query may look: the last query stands at the last live key."""
    key = torch.arange(keys, device=seen.device)
    place = torch.arange(queries, device=seen.device)[None, :, None] + (seen - queries)[:, None, None]
    mask = (key < seen[:, None])[:, None, :].expand(-1, queries, -1)
    if right >= 0:
        mask = mask & (key <= place + right)
    if left >= 0:
        mask = mask & (key >= place - left)
    if leftpad is not None:
        mask = mask & (key >= leftpad[:, None])[:, None, :]
    return mask[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, at: Tensor, *, interleaved: bool) -> Tensor:
    """x (B, S, H, D) turned at positions `at` (B, S or 1); cos, sin (positions, R / 2), R <= D."""
    half = cos.shape[-1]
    cos, sin = (table[at][:, :, None].to(x.dtype) for table in (cos, sin))
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned, rest), dim=-1)
