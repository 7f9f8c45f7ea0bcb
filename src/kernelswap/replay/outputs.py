"""What a call returned, taken apart into tensors and the rest, and put together again from other tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .step import Unfit

Build = Callable[[Sequence[Tensor], Any], Any]
"""`build(tensors, cache)`: as it was, with these."""


def taken_apart(output: Any, cache: Any) -> tuple[list[Tensor], Build]:
    """The tensors of `output` in order, and what makes another like it. Nothing of it is held, least of all the cache.

    Raises:
        Unfit: it holds something that cannot be copied.
    """
    tensors: list[Tensor] = []
    return tensors, _build(output, cache, tensors)


def _build(value: Any, cache: Any, tensors: list[Tensor]) -> Build:
    if isinstance(value, Tensor):
        at = len(tensors)
        tensors.append(value)
        return lambda given, _: given[at]
    if value is cache:
        return lambda _, now: now
    if value is None or isinstance(value, (bool, int, float, str)):
        return lambda *_: value
    kind: Any = type(value)
    if isinstance(value, dict):  # Transformers' outputs are dicts
        fields = [(name, _build(one, cache, tensors)) for name, one in value.items()]
        return lambda given, now: kind(**{name: build(given, now) for name, build in fields})
    if kind in {tuple, list}:
        parts = [_build(one, cache, tensors) for one in value]
        return lambda given, now: kind(build(given, now) for build in parts)
    raise Unfit(f"the model returns a {kind.__name__}, of which no copy can be made")
