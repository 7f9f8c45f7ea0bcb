"""The classes of layouts and of their parents: what is computed, saved and copied speaks of the modules that were replaced."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...slots.classes import as_original
from .conversion import Step, tensors

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

PARENT, HELD = "__kernelswap_fused__", "_kernelswap_fusion"
"""On the class of a parent: the class that it had; in the `__dict__` of a layout: its Fusion."""


@dataclass(eq=False)
class Fusion:
    """What one layout replaced."""

    names: tuple[str, ...]
    """Of the children of the parent; the layout has the first one's place."""
    originals: tuple[Any, ...]
    """The modules themselves. Weights that were converted are empty in them meanwhile."""
    steps: tuple[Step, ...]
    config: Any
    plain: tuple[Any, ...]
    """The originals as their forward is computed: themselves, or ones without the hooks that would bring their weights."""
    lock: Any = field(default_factory=threading.RLock)

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        originals, config = copy.deepcopy(self.originals, memo), copy.deepcopy(self.config, memo)
        plain = originals if self.plain is self.originals else copy.deepcopy(self.plain, memo)
        return Fusion(self.names, originals, self.steps, config, plain)

    def taken_apart(self, layout: nn.Module) -> dict[str, Tensor]:
        """The weights of the originals, in their order, by their names below the parent."""
        held = tensors({self.names[0]: layout})
        found: dict[str, Tensor] = {}
        for step in self.steps:
            found |= step.back(held, self.config)
        return {name: found[name] for name in tensors(dict(zip(self.names, self.originals, strict=True)))}

    def forward(self, layout: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the originals compute, one after the other."""
        import torch

        if torch.compiler.is_compiling():
            return self._forward(layout, args, kwargs)
        with self.lock:  # torch.func.functional_call lends the weights to the module itself
            return self._forward(layout, args, kwargs)

    def _forward(self, layout: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from torch.func import functional_call

        weights = self.taken_apart(layout)
        for name, original in zip(self.names, self.plain, strict=True):
            own = {n.removeprefix(f"{name}."): t for n, t in weights.items() if n.startswith(f"{name}.")}
            if original.training != layout.training:
                original.train(layout.training)
            args, kwargs = (functional_call(original, own, args, kwargs),), {}
        return args[0]


# -- classes ----------------------------------------------------------------------------------------------------------

_PARENTS: weakref.WeakValueDictionary[type[Any], type[Any]] = weakref.WeakValueDictionary()
_LAYOUTS: weakref.WeakValueDictionary[tuple[type[Any], type[Any]], type[Any]] = weakref.WeakValueDictionary()


def layout_class(layout: type[Any], original: nn.Module) -> type[Any]:
    """`layout` with the forward of what it replaces; instances for equal originals share it."""
    key = layout, type(original)
    cls = _LAYOUTS.get(key)
    if cls is None:

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return vars(self)[HELD].forward(self, args, kwargs)

        forward.__signature__ = inspect.signature(type(original).forward)  # type: ignore[attr-defined]  # what inspect looks for
        body = {"forward": forward, "__module__": layout.__module__, "__qualname__": layout.__qualname__}
        cls = _LAYOUTS[key] = _made(type(layout), layout.__name__, layout, body)
    return cls


def parent_class(base: Any) -> type[Any]:
    """`base`, whose files name what it was made of."""
    cls = _PARENTS.get(base)
    if cls is None:

        def state_dict(self: Any, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
            given = {"destination": destination, "prefix": prefix, "keep_vars": keep_vars}
            given |= dict(zip(given, args, strict=False))
            destination, prefix, keep_vars = given.values()
            found: Any = OrderedDict()
            found._metadata = OrderedDict()  # noqa: SLF001  # where torch looks for it
            base.state_dict(self, destination=found, prefix=prefix, keep_vars=keep_vars)
            destination = OrderedDict() if destination is None else destination
            if not hasattr(destination, "_metadata"):
                destination._metadata = OrderedDict()  # noqa: SLF001  # same
            destination._metadata.update(found._metadata)  # noqa: SLF001  # same
            destination.update(_renamed(self, found, prefix, keep_vars=keep_vars))
            return destination

        def _load_from_state_dict(self: Any, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            _rename(self, state_dict, prefix)
            base._load_from_state_dict(self, state_dict, prefix, *args)  # noqa: SLF001  # what torch calls on each module

        def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807  # becomes the method of that name
            return as_original(base.__reduce_ex__(_plain(self, base), protocol), base, base)

        def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807  # same
            cls: Any = type(self)
            twin = cls.__new__(cls)
            memo[id(self)] = twin
            vars(twin).update(copy.deepcopy(vars(self), memo))
            return twin

        body: dict[str, Any] = {f.__name__: f for f in (state_dict, _load_from_state_dict, __reduce_ex__, __deepcopy__)}
        body |= {PARENT: base, "__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
        cls = _PARENTS[base] = _made(type(base), base.__name__, base, body)
    return cls


def _made(metaclass: Any, name: str, base: Any, body: dict[str, Any]) -> Any:
    return metaclass(name, (base,), body)


def _fusions(parent: nn.Module) -> list[tuple[Any, Fusion]]:
    return [(child, vars(child)[HELD]) for child in parent.children() if HELD in vars(child)]


def _renamed(parent: nn.Module, found: Mapping[str, Any], prefix: str, *, keep_vars: bool) -> dict[str, Any]:
    """A state of `parent` with the names of the originals, in their order."""
    import torch

    apart: dict[str, Any] = {}
    replaced: set[str] = set()
    for layout, fusion in _fusions(parent):
        with torch.set_grad_enabled(keep_vars):
            apart |= {name: t if keep_vars else t.detach() for name, t in fusion.taken_apart(layout).items()}
        replaced |= set(fusion.names)
    ordered = {key: value for key, value in found.items() if key.removeprefix(prefix).partition(".")[0] not in parent._modules}  # noqa: SLF001  # names, in order
    for name in parent._modules:  # noqa: SLF001  # same
        if name in replaced:
            ordered |= {f"{prefix}{n}": t for n, t in apart.items() if n.startswith(f"{name}.")}
        else:
            ordered |= {key: value for key, value in found.items() if key.startswith(f"{prefix}{name}.")}
    return ordered


def _rename(parent: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """The names of the originals in `state` to those of the layouts, where all that makes a tensor is there."""
    for _, fusion in _fusions(parent):
        for step in fusion.steps:
            names = [n for names in step.sources.values() for n in names]
            if any(prefix + n not in state for n in names):
                continue
            given = {n: state.pop(prefix + n) for n in names}
            made = step.forth(given, fusion.config) if step.operations else {step.targets[""]: given[names[0]]}
            state.update({prefix + name: t for name, t in made.items()})


def _plain(parent: nn.Module, base: Any) -> nn.Module:
    """A `base` that holds copies of the originals with today's weights, and all else of `parent`."""
    import torch

    twin: nn.Module = base.__new__(base)
    modules = dict(parent._modules)  # noqa: SLF001  # a shallow copy, which torch has no public way to make
    for layout, fusion in _fusions(parent):
        with torch.no_grad():
            weights = fusion.taken_apart(layout)
        copies = {n: copy.deepcopy(m) for n, m in zip(fusion.names, fusion.originals, strict=True)}
        for name, tensor in tensors(copies).items():
            tensor.data = weights[name].detach()
        modules |= copies
    vars(twin).update({**vars(parent), "_modules": modules})
    return twin
