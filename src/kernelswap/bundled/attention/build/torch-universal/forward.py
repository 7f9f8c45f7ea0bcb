"""Attention as Transformers calls it: (batch, heads, tokens, dim) in, (batch, tokens, heads, dim) out."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .dense import attend, decode
from .flash import flash_attn_varlen_func, flash_attn_with_kvcache

supports_flash_attn = True
supports_lengths = True
"""A mask may also be int32, for one-token queries over a static cache: (B, 1, 1, 1), how many keys live, or (B, 1, 1, 1 + Sk), that and
then for each key whether it is seen."""

_said: set[str] = set()


def flash_attn_forward(  # noqa: PLR0913  # Transformers' attention interface
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,  # noqa: FBT001
    s_aux: Tensor | None = None,
    cache: Any = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """q (B, HQ, Sq, D), k (B, HK, Sk, D), v (B, HK, Sk, DV) -> (B, Sq, HQ, DV), no weights.

    attention_mask: `None` (causal where the module is), bool or added (B, 1 or HQ, Sq, Sk) with everything in it, or lengths.
    `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k`: sequences laid end to end; the mask is not read then.
    """
    if kwargs.get("output_attentions") and "weights" not in _said:
        _said.add("weights")
        warnings.warn("kernelswap/attention gives no attention weights; use attn_implementation='eager' for those", stacklevel=2)
    if cache is not None:  # pages of continuous batching
        key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    window = (-1, -1)
    if sliding_window is not None and key.shape[2] > sliding_window:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    options: dict[str, Any] = {"softcap": softcap or 0.0, "sinks": s_aux}
    if kwargs.get("cu_seq_lens_q") is not None and kwargs.get("cu_seq_lens_k") is not None:
        return _end_to_end(query, key, value, scaling, causal, window, dropout, options, kwargs), None
    queries, keys = query.shape[2], key.shape[2]
    mask = attention_mask
    if mask is not None and mask.dtype is torch.int32 and mask.ndim == 4 and mask.shape[-1] in {1, 1 + keys}:
        seen = mask[:, 0, 0, 1:] if mask.shape[-1] > 1 else None
        out = decode(query, key, value, mask[:, 0, 0, 0], scaling or query.shape[-1] ** -0.5, mask=seen, **_last(options, window))
        if out is not None:
            return out, None
        mask = written_out(mask, keys)
    if mask is not None:
        mask = mask[..., :keys] if mask.shape[-1] > keys else mask
        causal, window = False, (-1, -1)
    elif causal and 1 < queries < keys:
        # No mask, and more keys than queries: the first tokens of a static cache. What follows them is empty.
        key, value = key[:, :, :queries], value[:, :, :queries]
    if position_bias is not None:
        mask, causal = _with_bias(position_bias, mask, causal=causal, keys=key.shape[2]), False
    out = attend(
        query, key, value, scale=scaling, causal=causal and queries > 1, window=window, mask=mask, dropout=dropout, **options
    )
    return out.transpose(1, 2).contiguous(), None


def written_out(lengths: Tensor, keys: int) -> Tensor:
    """A mask of lengths as others read it: bool (B, 1, 1, Sk), True where a key takes part."""
    mask = torch.arange(keys, device=lengths.device) < lengths[..., :1]
    return mask if lengths.shape[-1] == 1 else mask & (lengths[..., 1:] != 0)


def _last(options: dict[str, Any], window: tuple[int, int]) -> dict[str, Any]:
    return {**options, "window": window[0] + 1 if window[0] >= 0 else 0}


def _end_to_end(  # noqa: PLR0913
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    causal: bool,  # noqa: FBT001
    window: tuple[int, int],
    dropout: float,
    options: dict[str, Any],
    kwargs: dict[str, Any],
) -> Tensor:
    batch, queries = query.shape[0], query.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if all(kwargs.get(name) is not None for name in ("block_table", "k_cache", "v_cache")):
        q, k, v = (x.reshape(-1, 1, *x.shape[-2:]) for x in (query, key, value))
        starts = kwargs["cu_seq_lens_k"]
        seen = starts[1 : q.shape[0] + 1] - starts[: q.shape[0]] - 1
        out = flash_attn_with_kvcache(
            q, kwargs["k_cache"], kwargs["v_cache"], k, v, cache_seqlens=seen, block_table=kwargs["block_table"],
            softmax_scale=scaling, causal=causal, window_size=window, **options,
        )  # fmt: skip
    else:
        q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (query, key, value))
        out = flash_attn_varlen_func(
            q, k, v, kwargs["cu_seq_lens_q"], kwargs["cu_seq_lens_k"], kwargs.get("max_length_q") or queries,
            kwargs.get("max_length_k") or k.shape[0], dropout, scaling, causal, window, **options,
        )  # fmt: skip
    return out.reshape(batch, queries, *out.shape[-2:])  # type: ignore[union-attr]  # nothing else was asked for


def _with_bias(bias: Tensor, mask: Tensor | None, *, causal: bool, keys: int) -> Tensor:
    """A bias that is learned, and what may not be seen, as one mask that is added."""
    bias = bias[..., :keys]
    if mask is None and causal:
        queries = bias.shape[-2]
        mask = torch.ones((queries, keys), dtype=torch.bool, device=bias.device).tril(keys - queries)
    if mask is None:
        return bias
    return bias.masked_fill(~mask, torch.finfo(bias.dtype).min) if mask.dtype is torch.bool else bias + mask
