"""Whether a model is still the one that was recorded. Asked before every replay, so it is a few loops in C over lists made before."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules import module as torch_module

from ..slots import classes, state

if TYPE_CHECKING:
    import torch.nn as nn

_HELD = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OURS = ("torch", "transformers", "kernelswap")
"""Packages whose modules do not change what they compute by an attribute alone; of all others every attribute is watched."""
_PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
_training, _pointer = operator.itemgetter("training"), Tensor.data_ptr


class Watch:
    """What of a model a recording depends on: its modules and their classes, tensors and where they lie, hooks, modes, and its
    configurations. Not watched: other attributes of Transformers' and torch's own modules, and of the root.

    The root is not held, its children are: whoever keeps a Watch must let it go when the root goes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())[1:]
        self.types = list(map(type, self.modules))
        self.held = [vars(module) for module in (model, *self.modules)]
        self.sizes = list(map(len, self.held[1:]))  # generate() keeps things in the root
        self.dicts = [held[name] for held in self.held for name in _HELD]
        self.counts = list(map(len, self.dicts))
        self.values = list(self._values())
        self.tensors = [value for value in self.values if type(value) in _PLAIN]
        self.pointers = list(map(_pointer, self.tensors))
        self.hooks = [held[name] for held in self.held[1:] for name in _HOOKS]
        self.hooks += [getattr(torch_module, f"_global{name}", {}) for name in _HOOKS]
        self.hooked = list(map(len, self.hooks))
        self.strangers = [vars(m) for m in self.modules if not _known(m)]
        self.attributes = [tuple(held.values()) for held in self.strangers]
        self.configs = [vars(config) for config in _configs(model, self.modules)]
        self.settings = [tuple(config.values()) for config in self.configs]

    def _values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(map(dict.values, self.dicts))

    def changed(self) -> str | None:
        """What is not as it was, or `None`."""
        checks = (
            (list(map(len, self.dicts)) == self.counts, "parameters or modules were added or removed"),
            (all(map(operator.is_, self._values(), self.values)), "parameters or modules were replaced"),
            (all(map(operator.is_, map(type, self.modules), self.types)), "modules were swapped, or their swaps undone"),
            (list(map(_pointer, self.tensors)) == self.pointers, "weights were moved"),
            (list(map(len, self.hooks)) == self.hooked, "hooks were added or removed"),
            (not any(map(_training, self.held)), "a part of the model is in training mode"),
            (list(map(len, self.held[1:])) == self.sizes, "attributes were added or removed"),
            (all(map(_all_same, self.strangers, self.attributes)), "attributes were changed"),
            (all(map(_equal, self.configs, self.settings)), "the configuration was changed"),
        )
        return next((why for same, why in checks if not same), None)


def _all_same(held: dict[str, Any], saved: tuple[Any, ...]) -> bool:
    return len(held) == len(saved) and all(map(operator.is_, held.values(), saved))


def _equal(held: dict[str, Any], saved: tuple[Any, ...]) -> bool:
    return tuple(held.values()) == saved


def _known(module: nn.Module) -> bool:
    return classes.original(module).__module__.partition(".")[0] in _OURS


def _configs(model: nn.Module, modules: list[nn.Module]) -> list[Any]:
    found = {id(c): c for m in (model, *modules) if (c := vars(m).get("config")) is not None and hasattr(c, "to_dict")}
    return list(found.values())


def misfit(model: nn.Module, device: torch.device) -> str | None:
    """Why no step of this model can be recorded as it is, or `None`."""
    config = getattr(model, "config", None)
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            return f"the configuration asks for {name}"
    for path, module in model.named_modules():
        why = _misfit(module, root=module is model)
        if why is not None:
            return f"{path or 'the model'} {why}"
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if type(tensor) not in _PLAIN:
            return f"{name} is a {type(tensor).__name__}, whose memory cannot be watched"
        if tensor.device != device:
            return f"{name} is on {tensor.device}, the cache on {device}"
    return None


def _misfit(module: nn.Module, *, root: bool) -> str | None:
    held = vars(module)
    hooks = [hook for name in _HOOKS for hook in held[name].values()]
    slot = state.find(module)
    checks = (
        (held["training"], "is in training mode"),
        (not root and not all(map(_idle, hooks)), "has forward hooks"),
        (not root and "_hf_hook" in held, "has a hook of accelerate"),
        (slot is not None and bool(slot.every), "is checked again and again (check=), which a replay would leave out"),
        (slot is not None and slot.counting, "has its calls counted"),
    )
    return next((why for so, why in checks if so), None)


def _idle(hook: Any) -> bool:
    """Transformers leaves hooks behind that do nothing unless a call asks for hidden states."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
