"""The tensors of Transformers' static cache. Nothing of Transformers is imported: who has such a cache has done that."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .step import Unfit

Append = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], bool]
"""`append(k, v, k_cache, v_cache, at)`: written at that position, or False and nothing done."""
_NAMES = ("keys", "values", "cumulative_length")
"""Tensors of a `StaticLayer`; the length is one since 5.13, before it the caller says the position."""


def misfit(cache: Any) -> str | None:
    """Why the layers of a cache do not let a step be replayed, or `None`. Asked of a cache that may still be empty."""
    module = sys.modules.get("transformers.cache_utils")
    static = getattr(module, "StaticLayer", None)
    layers = getattr(cache, "layers", None)
    if static is None or not isinstance(layers, list) or not layers:
        return f"the cache is a {type(cache).__name__}; generate(..., cache_implementation='static') makes one whose steps can be"
    other = next((type(layer).__name__ for layer in layers if type(layer) is not static), None)
    if other is not None and getattr(cache, "is_compileable", False):
        return f"the cache has a {other}, which counts in Python what a recording cannot"
    if other is not None:
        return f"the cache is a {type(cache).__name__}; generate(..., cache_implementation='static') makes one whose steps can be"
    return "the cache is offloaded" if getattr(cache, "offloading", False) else None


def shape(cache: Any) -> tuple[Any, ...]:
    """What a recording depends on.

    Raises:
        Unfit: see `misfit`; or nothing has been written yet.
    """
    if (why := misfit(cache)) is not None:
        raise Unfit(why)
    if not all(layer.is_initialized for layer in cache.layers):
        raise Unfit("the cache is empty")
    first = cache.layers[0].keys
    return first.device, first.dtype, tuple((layer.keys.shape, layer.values.shape) for layer in cache.layers)


class Buffers:
    """The tensors of one cache, which a recording reads and writes, and to whom they belong."""

    def __init__(self, cache: Any) -> None:
        first = cache.layers[0]
        self.names = tuple(name for name in _NAMES if isinstance(getattr(first, name, None), Tensor))
        self.tensors = self._of(cache)
        self.moved = 0
        """How often one cache came with other tensors than it had."""
        self._own(cache)

    def _of(self, cache: Any) -> list[Tensor]:
        return [vars(layer)[name] for layer in cache.layers for name in self.names]

    def _own(self, cache: Any) -> None:
        self.owner = weakref.ref(cache)
        self.layers = [weakref.ref(layer) for layer in cache.layers]

    @property
    def free(self) -> bool:
        """Whether nobody has them any more: no cache, and no layer of one."""
        return self.owner() is None and all(layer() is None for layer in self.layers)

    def belong_to(self, cache: Any) -> bool:
        """Whether `cache` is their owner. Where that has other tensors by now (a beam search reorders), these take those in."""
        if self.owner() is not cache:
            return False
        held = self._of(cache)
        if not all(map(_same, held, self.tensors)):
            self.moved += 1
            self._take_in(cache, held)
        return True

    def adopt(self, cache: Any) -> None:
        """Take in what a new cache of the same shape holds, and be its tensors from now on."""
        self._take_in(cache, self._of(cache))
        self._own(cache)

    def _take_in(self, cache: Any, held: list[Tensor]) -> None:
        with torch.no_grad():
            pairs = [(mine, theirs) for mine, theirs in zip(self.tensors, held, strict=True) if mine is not theirs]
            torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs])  # as torch's optimisers do
        mine = iter(self.tensors)
        for layer in cache.layers:
            for name in self.names:
                setattr(layer, name, next(mine))

    def stand_in(self, cache: Any, append: Append | None = None) -> tuple[Any, Callable[[], None]]:
        """A cache with the same tensors, for a recording to run on: that must not keep its owner alive.

        The second value is to be called at the end of the run: with `append`, a layer's update is one launch instead of five,
        and the lengths of all layers move together, then.
        """
        twin = copy.copy(cache)
        twin.layers = [copy.copy(layer) for layer in cache.layers]
        grown: list[Tensor] = []
        if append is not None and _NAMES[2] in self.names:
            for layer in twin.layers:
                layer.update = _updating(layer, append, grown)

        def end() -> None:
            if grown:
                torch._foreach_add_(grown, 1)  # as torch's optimisers do
                grown.clear()

        return twin, end

    # -- one step back ----------------------------------------------------------------------------------------------

    def lengths(self) -> list[Tensor]:
        """How much every layer holds now, copied. Empty where the caller says the position."""
        at = self.names.index(_NAMES[2]) if _NAMES[2] in self.names else None
        return [] if at is None else [t.clone() for t in self.tensors[at :: len(self.names)]]

    def go_to(self, lengths: list[Tensor]) -> None:
        """As `lengths` found it. What lies beyond is dead: no mask lets it be read before it is written again."""
        if lengths:
            at = self.names.index(_NAMES[2])
            torch._foreach_copy_(self.tensors[at :: len(self.names)], lengths)  # same

    def written(self, position: list[Tensor]) -> list[Tensor]:
        """Keys and values at one position of every layer, (batch, heads, 1, dim) each, copied."""
        return [t.index_select(2, p.reshape(1)) for t, p in self._at(position)]

    def write(self, position: list[Tensor], values: list[Tensor]) -> None:
        """Put back what `written` gave."""
        for (t, p), value in zip(self._at(position), values, strict=True):
            t.index_copy_(2, p.reshape(1), value)

    def _at(self, position: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        step = len(self.names)
        return [(t, p) for i, p in enumerate(position) for t in self.tensors[i * step : i * step + 2]]


def _updating(layer: Any, append: Append, grown: list[Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`layer.update`, its one token written by `append`. Its length goes to `grown`, and is one short until somebody adds to that."""
    plain = type(layer).update

    def update(key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = layer.cumulative_length
        if any(length is t for t in grown):  # a second token in one step
            length.add_(1)
            grown[:] = [t for t in grown if t is not length]
        if append(key_states, value_states, layer.keys, layer.values, length):
            grown.append(length)
            return layer.keys, layer.values
        found: tuple[Tensor, Tensor] = plain(layer, key_states, value_states, *args, **kwargs)
        return found

    return update


def _same(a: Any, b: Any) -> bool:
    return a is b
