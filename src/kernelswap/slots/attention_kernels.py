"""Attention functions of kernels, as Transformers calls them: those that are made for that, and those of flash-attention.

`forward.serving(module, query, key, value, mask, ...)`, where a function has it, says whether a call is one that it can compute.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..types import Implementation

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., Any]
FACE = ("module", "query")
"""How the arguments of a function of Transformers begin."""
_OTHERS = ("position_bias", "s_aux", "cu_seq_lens_q", "cache")
"""Arguments that functions of flash-attention do not have."""


def understood(kernel: Implementation) -> Implementation | str:
    """`kernel` with a forward of Transformers' face, or why it cannot compute attention."""
    try:
        named = inspect.signature(kernel.forward).parameters
    except (TypeError, ValueError):  # a builtin without a signature
        return "does not say which arguments it takes"
    if tuple(named)[: len(FACE)] == FACE:
        return dataclasses.replace(kernel, compiles=True) if kernel.origin.candidate.source == "bundled" else kernel
    if {"softmax_scale", "causal"} <= set(named) and len(named) > 4:
        return dataclasses.replace(kernel, forward=_flash(kernel.forward, frozenset(named)))
    return f"takes ({', '.join(named)}), which is neither flash-attention's way to be called nor Transformers'"


def serves(kernel: Implementation, *args: Any, **kwargs: Any) -> int:
    """Whether it can compute such a call; of several, the number of that one."""
    ask = getattr(kernel.forward, "serving", None)
    return 1 if ask is None else int(ask(*args, **kwargs))


def numbered(kernel: Implementation, number: int) -> Implementation:
    """Of several, the one that `serves` gave the number of."""
    return [p for p in dict.fromkeys(kernel.parts) if p is not None][number - 1] if kernel.parts else kernel


def _flash(function: Function, named: frozenset[str]) -> Function:
    def serving(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> bool:
        window = kwargs.get("sliding_window")
        return (
            mask is None
            and not args
            and query.shape[-1] == value.shape[-1]
            and all(kwargs.get(name) is None for name in _OTHERS)
            and ("window_size" in named or window is None or key.shape[2] <= window)
            and ("softcap" in named or not kwargs.get("softcap"))
            and ("dropout_p" in named or not kwargs.get("dropout"))
        )

    def flash_attn_forward(  # noqa: PLR0913, PLR0917  # Transformers' signature
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,  # noqa: ARG001  # `serving` asked
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,  # noqa: FBT001  # Transformers' signature
        **_: Any,
    ) -> tuple[Tensor, None]:
        causal, queries = _causal(module, is_causal), query.shape[2]
        if causal and 1 < queries < key.shape[2]:  # the first tokens of a static cache; what follows them is empty
            key, value = key[:, :, :queries], value[:, :, :queries]
        more: dict[str, Any] = {"dropout_p": dropout} if dropout else {}
        if sliding_window is not None and key.shape[2] > sliding_window:
            more["window_size"] = (sliding_window - 1, 0 if causal else sliding_window - 1)
        if softcap:
            more["softcap"] = softcap
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        out = function(q, k, v, softmax_scale=scaling, causal=causal and queries > 1, **more)
        return (out[0] if isinstance(out, tuple) else out).contiguous(), None

    flash_attn_forward.serving = serving  # type: ignore[attr-defined]  # see the top of the file
    return flash_attn_forward


def _causal(module: Any, said: bool | None) -> bool:  # noqa: FBT001  # same
    return bool(getattr(module, "is_causal", True) if said is None else said)
