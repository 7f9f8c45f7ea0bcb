"""From Transformers' attention interface to functions with the names and layouts of flash-attention.

In: q (B, HQ, Sq, D), k and v (B, HK, Sk, D), a 2-D padding mask or none, and whatever a model passes besides. Out: (B, Sq, HQ, DV).
What a kernel's signature lacks (soft caps, sinks, windows, dropout) is known once, when it is registered; calls that need it
are served by the bundled kernel, and one line says so.
"""

from __future__ import annotations

import functools
import inspect
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

Function = Callable[..., Any]


@dataclass
class Functions:
    """The flash-attention functions of a kernel, and which options they take."""

    func: Function | None
    varlen: Function | None
    kvcache: Function | None
    takes: frozenset[str] = field(init=False)
    takes_paged: frozenset[str] = field(init=False)

    NAMES: ClassVar[tuple[str, ...]] = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")

    def __post_init__(self) -> None:
        given = [_parameters(f) for f in (self.varlen, self.func) if f is not None]
        self.takes = frozenset.intersection(*given) if given else frozenset()
        self.takes_paged = _parameters(self.kvcache) if self.kvcache is not None else frozenset()

    @classmethod
    def of(cls, module: ModuleType) -> Functions | None:
        """Those of a kernel, or None if it has neither a plain one nor one for sequences end to end."""
        func, varlen, kvcache = (getattr(module, name, None) for name in cls.NAMES)
        return cls(func, varlen, kvcache) if callable(func) or callable(varlen) else None


@dataclass
class Packing:
    """Sequences laid end to end: where they begin, and which tokens they are."""

    cu_q: Any
    cu_k: Any
    max_q: int
    max_k: int
    rows_q: Any = None
    rows_k: Any = None


class Flash:
    """The attention function of one kernel: `forward`. It holds everything that it needs; nothing is looked up by name at a call.

    Args:
        key: what the user wrote, for messages.
        functions: the kernel's.
        fallback: gives those of the bundled kernel, for what `functions` cannot do.
        say: a line for the user.
    """

    def __init__(self, key: str, functions: Functions, fallback: Callable[[], Functions], say: Callable[[str], None]) -> None:
        self.key, self.functions, self.say = key, functions, say
        self.fallback = functools.cache(fallback)
        self.of_mask, self.of_positions = _Memory(), _Memory()

    def forward(  # noqa: PLR0913, PLR0917  # Transformers' attention interface
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,  # noqa: FBT001
        s_aux: Any = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[Any, None]:
        """Shapes: see above. No weights come back."""
        if kwargs.get("output_attentions"):
            self.say(f"{self.key}: gives no attention weights; use attn_implementation='eager' for those")
        if cache is not None:  # pages of continuous batching
            key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        q, k, v = (x.transpose(1, 2) for x in _in_one_dtype(module, query, key, value))
        batch, queries, keys, size = q.shape[0], q.shape[1], k.shape[1], v.shape[-1]
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        shared = {"causal": causal, "softmax_scale": q.shape[-1] ** -0.5 if scaling is None else scaling}
        wanted = {
            "dropout": dropout or None,
            "window": (sliding_window - 1, sliding_window - 1) if sliding_window is not None and keys > sliding_window else None,
            "softcap": softcap or None,
            "sinks": s_aux.to(q.dtype) if s_aux is not None else None,
        }
        q, k, v = _of_one_size(q, k, v)
        if all(kwargs.get(name) is not None for name in ("block_table", "k_cache", "v_cache", "cu_seq_lens_k")):
            chosen, options = self._choose(wanted, "kvcache")
            out = _paged(chosen, q, k, v, kwargs, {**shared, **options})
        elif attention_mask is not None and attention_mask.ndim == 2:
            packing = self.of_mask(attention_mask, (queries, keys), lambda: _from_mask(attention_mask, queries))
            chosen, options = self._choose(wanted, "varlen")
            live = attention_mask.shape[1]
            out = _padded(chosen, q, k[:, :live], v[:, :live], packing, {**shared, **options})
        else:
            packing = self._packing(batch, queries, keys, kwargs, q.device)
            chosen, options = self._choose(wanted, "func" if packing is None else "varlen")
            out = _dense(chosen, q, k, v, packing, {**shared, **options})
        return out.reshape(batch, queries, *out.shape[-2:])[..., :size], None

    def _packing(self, batch: int, queries: int, keys: int, kwargs: dict[str, Any], device: Any) -> Packing | None:
        """Where sequences begin that were laid end to end; `None` where none were, and the plain function serves."""
        given = [kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
        if all(one is not None for one in given):
            return Packing(*given)  # type: ignore[arg-type]  # none of them is None
        positions = kwargs.get("position_ids")
        if batch == 1 and 1 < queries == keys and positions is not None and positions.ndim == 2:
            found: Packing | None = self.of_positions(positions, (), lambda: _from_positions(positions))
            if found is not None:
                return found
        return _uniform(batch, queries, keys, device) if self.functions.func is None else None

    def _choose(self, wanted: dict[str, Any], kind: str) -> tuple[Functions, dict[str, Any]]:
        """Who serves, and the options under the names that it knows."""
        takes = self.functions.takes_paged if kind == "kvcache" else self.functions.takes
        lacking = [_SPOKEN[name] for name, value in wanted.items() if value is not None and not _NAMES[name] & takes]
        if getattr(self.functions, kind) is None:
            lacking.append(_SPOKEN[kind])
        chosen = self.functions
        if lacking:
            self.say(f"{self.key}: has no {', '.join(lacking)}; kernelswap/attention serves where that is needed")
            chosen = self.fallback()
            takes = chosen.takes_paged if kind == "kvcache" else chosen.takes
        options = {min(_NAMES[name] & takes): value for name, value in wanted.items() if value is not None}
        if "deterministic" in takes:
            options["deterministic"] = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"
        return chosen, options


_NAMES = {
    "dropout": {"dropout_p"},
    "window": {"window_size"},
    "softcap": {"softcap"},
    "sinks": {"s_aux", "learnable_sink", "sinks"},
}
"""Our options by the names under which kernels have them."""
_SPOKEN = {
    "dropout": "dropout",
    "window": "sliding window",
    "softcap": "soft cap",
    "sinks": "attention sinks",
    "func": "function for whole batches",
    "varlen": "function for sequences of different lengths",
    "kvcache": "function for a paged cache",
}


def _dense(chosen: Functions, q: Any, k: Any, v: Any, packing: Packing | None, options: dict[str, Any]) -> Any:
    if packing is None:
        assert chosen.func is not None  # `choose` saw to that
        return _first(chosen.func(q, k, v, **options))
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    return _varlen(chosen, q, k, v, packing, options)


def _padded(chosen: Functions, q: Any, k: Any, v: Any, packing: Packing, options: dict[str, Any]) -> Any:
    """Tokens only, end to end, and back to rows: padding comes out as 0."""
    batch, queries = q.shape[:2]
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    out = _varlen(chosen, q[packing.rows_q], k[packing.rows_k], v[packing.rows_k], packing, options)
    rows = out.new_zeros(batch * queries, *out.shape[1:])
    return rows.index_copy(0, packing.rows_q, out)


def _varlen(chosen: Functions, q: Any, k: Any, v: Any, packing: Packing, options: dict[str, Any]) -> Any:
    assert chosen.varlen is not None  # `choose` saw to that
    about = {"cu_seqlens_q": packing.cu_q, "cu_seqlens_k": packing.cu_k}
    about |= {"max_seqlen_q": packing.max_q, "max_seqlen_k": packing.max_k}
    return _first(chosen.varlen(q, k, v, **about, **options))


def _paged(chosen: Functions, q: Any, k: Any, v: Any, kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
    assert chosen.kvcache is not None  # `choose` saw to that
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    starts = kwargs["cu_seq_lens_k"]
    seen = starts[1 : q.shape[0] + 1] - starts[: q.shape[0]] - 1
    table = "page_table" if "page_table" in chosen.takes_paged else "block_table"
    options = {**options, table: kwargs["block_table"], "cache_seqlens": seen}
    return _first(chosen.kvcache(q, kwargs["k_cache"], kwargs["v_cache"], k, v, **options))


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _from_mask(mask: Any, queries: int) -> Packing:
    """Padding mask (B, keys) -> where the tokens are; of the queries, the last `queries` columns."""
    import torch

    alive = mask.bool()
    asking = alive[:, -queries:] if queries > 1 else torch.ones_like(alive[:, -1:])
    (cu_q, max_q, rows_q), (cu_k, max_k, rows_k) = _tokens(asking), _tokens(alive)
    return Packing(cu_q, cu_k, max_q, max_k, rows_q, rows_k)


def _tokens(alive: Any) -> tuple[Any, int, Any]:
    import torch

    lengths = alive.sum(dim=1, dtype=torch.int32)
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return starts, int(lengths.max()), alive.flatten().nonzero().flatten()


def _from_positions(positions: Any) -> Packing | None:
    """Position ids (1, S) that begin anew -> where; `None` where they do not."""
    import torch

    flat = positions.flatten()
    begins = (flat.diff() != 1).nonzero().flatten() + 1
    if begins.numel() == 0:
        return None
    edges = torch.tensor([0, *begins.tolist(), flat.numel()], dtype=torch.int32)
    longest = int(edges.diff().max())
    starts = edges.to(flat.device)
    return Packing(starts, starts, longest, longest)


def _uniform(batch: int, queries: int, keys: int, device: Any) -> Packing:
    import torch

    starts_q, starts_k = (torch.arange(0, batch * n + 1, n, dtype=torch.int32, device=device) for n in (queries, keys))
    return Packing(starts_q, starts_k, queries, keys)


def _in_one_dtype(module: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Queries in float32 next to a model in half precision (autocast, PEFT's norms, quantised weights) take the model's dtype."""
    import torch

    target = q.dtype
    if q.dtype == torch.float32:
        if torch.is_autocast_enabled(q.device.type):
            target = torch.get_autocast_dtype(q.device.type)
        elif hasattr(module.config, "_is_quantized"):
            target = module.config.dtype
        else:
            weights = (m.weight.dtype for m in module.modules() if isinstance(m, torch.nn.Linear))
            target = next((dtype for dtype in weights if dtype.is_floating_point), q.dtype)
    return tuple(x if x.dtype == target else x.to(target) for x in (q, k, v))


def _of_one_size(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Heads of queries and values of one size (MLA has two): zeros change neither scores nor what is read of the output."""
    import torch

    more = q.shape[-1] - v.shape[-1]
    if more > 0:
        return q, k, torch.nn.functional.pad(v, (0, more))
    if more < 0:
        return torch.nn.functional.pad(q, (0, -more)), torch.nn.functional.pad(k, (0, -more)), v
    return q, k, v


def _parameters(function: Function) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature: what every flash kernel takes
        return frozenset({"causal", "softmax_scale", "window_size"})


class _Memory:
    """The last answer for one tensor: layers of one forward ask about the same, and each answer waits for the device."""

    def __init__(self) -> None:
        self.last: tuple[Any, Any, Any, Any] = (lambda: None, None, None, None)

    def __call__(self, tensor: Any, about: Any, make: Callable[[], Any]) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return make()
        ref, version, asked, answer = self.last
        if ref() is tensor and version == tensor._version and asked == about:  # noqa: SLF001  # written to since?
            return answer
        answer = make()
        self.last = (weakref.ref(tensor), tensor._version, about, answer)  # noqa: SLF001  # same
        return answer
