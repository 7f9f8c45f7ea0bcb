"""What decides how a module computes: two modules with equal signatures share a decision."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from .slots import module as module_slot

if TYPE_CHECKING:
    import torch.nn as nn


def of(module: nn.Module, *, deep: bool = True) -> object:
    """What decides how a module computes, short of its weights' values: class, settings, shapes, and the same below it.

    Two modules with equal signatures share a decision. A layer's number does not count; a `config` counts as the object
    that it is; other objects (caches, dicts) do not. Not `deep`: settings alone, which is what a function may be told.
    """
    settings = tuple(
        (name, value if type(value) in _PLAIN else _setting(name, value))
        for name, value in vars(module).items()
        if name[0] != "_" and name not in _NOT_SETTINGS
    )
    if not deep:
        return module_slot.original(module), settings
    tensors = tuple(
        (name, None if t is None else (t.shape, t.dtype, t.requires_grad))
        for held in (module._parameters, module._buffers)  # noqa: SLF001  # the public iterators walk the whole tree
        for name, t in held.items()
    )
    below = tuple((name, None if child is None else of(child)) for name, child in module._modules.items())  # noqa: SLF001  # same
    return module_slot.original(module), settings, tensors, below


_PLAIN = {bool, int, float, str, type(None)}
_NOT_SETTINGS = {"training", "layer_idx", "layer_id", "layer_number"}


def _setting(name: str, value: object) -> object:
    if isinstance(value, functools.partial):
        return "partial", value.func, repr(value.args), repr(value.keywords)
    if isinstance(value, tuple):
        return repr(value)
    if callable(value):
        return getattr(value, "__func__", None) or getattr(value, "__qualname__", type(value))
    return id(value) if name == "config" else type(value)
