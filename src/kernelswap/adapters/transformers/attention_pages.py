"""Continuous batching of Transformers before 5.20, whose pages attention functions had to ask for in other words.

Since 5.20 `cache.update(..., kwargs=kwargs)` writes the new keys, gives all of them as (1, heads, tokens, dim) and leaves what
belongs to the layer in `kwargs`. Before, a function found the indices of its layer by itself; here that is done for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

SINCE = (5, 20)


def understood(forward: Callable[..., Any], release: str) -> Callable[..., Any]:
    """`forward`, for attention interfaces of today, as the Transformers of that release calls one."""
    if tuple(int(part) for part in release.split(".")[:2]) >= SINCE:
        return forward

    @functools.wraps(forward)
    def with_pages(module: Any, query: Any, key: Any, value: Any, mask: Any, *args: Any, cache: Any = None, **kwargs: Any) -> Any:
        if cache is not None and _asks_for_indices(type(cache).update):
            key, value, kwargs = _looked_up(module, key, value, cache, kwargs)
            cache = None
        return forward(module, query, key, value, mask, *args, **({} if cache is None else {"cache": cache}), **kwargs)

    return with_pages


@functools.cache
def _asks_for_indices(update: Callable[..., Any]) -> bool:
    return "read_index" in inspect.signature(update).parameters


def _looked_up(module: Any, key: Any, value: Any, cache: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Keys and values of all tokens, or the pages with them, and the arguments under today's names."""
    kind = "sliding_attention" if getattr(module, "sliding_window", None) else "full_attention"
    old = {name: kwargs[name] for name in _NAMES if name in kwargs}
    of_layer = {name: found[kind] if isinstance(found, dict) else found for name, found in old.items()}
    read, write = kwargs.get("read_index"), kwargs.get("write_index")
    kwargs = {name: one for name, one in kwargs.items() if name not in {*_NAMES, "read_index", "write_index"}}
    kwargs |= {_NAMES[name]: found for name, found in of_layer.items()}
    if kwargs.get("block_table") is None:
        found = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, read_index=read, write_index=write)
        key, value = (one.transpose(0, 1).unsqueeze(0) for one in found)
        return key, value, kwargs
    if hasattr(cache, "get_cache_for_block_table"):
        table, keys, values = cache.get_cache_for_block_table(module.layer_idx)
    else:
        table, layer = cache.layer_index_to_group_indices[module.layer_idx]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        keys, values = cache.key_cache[layer].view(shape), cache.value_cache[layer].view(shape)
    return key, value, {**kwargs, "block_table": kwargs["block_table"][table], "k_cache": keys, "v_cache": values}


_NAMES = {
    "cu_seq_lens_q": "cu_seq_lens_q",
    "cu_seq_lens_k": "cu_seq_lens_k",
    "max_seqlen_q": "max_length_q",
    "max_seqlen_k": "max_length_k",
}
"""Then and now."""
