"""Install and restore a swap on one module, and why one cannot be installed.

`install` is the last step: everything that could fail was asked before, by `obstacle`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from ..errors import PlanConflict, UndoConflict
from ..types import Prover, Swap
from . import classes, fused, rebuild, state
from .check import Conduct
from .classes import original
from .obstacles import bypass, obstacle, watched
from .state import Part, Service, Slot, Standing

if TYPE_CHECKING:
    import torch.nn as nn


def install(
    module: nn.Module,
    swaps: Sequence[Swap],
    prover: Prover,
    *,
    every: int | None = 0,
    compiled: bool = False,
    shared: dict[Any, Any] | None = None,
) -> Slot:
    """Swap `module`'s forward, or functions that it looks up, as the `swaps` say; all of them are for this module.

    Args:
        module: with no `obstacle`.
        swaps: at most one of kind module, any number of kind function.
        prover: asked at the first call; at every n-th too where `every` is n > 0; never where it is None.
        every: see `prover`.
        compiled: compiled code may hold a kernel that was only proven on random tensors.
        shared: one dict for everything that is installed together, with the same `every` and `compiled`.

    Raises:
        PlanConflict: two swaps for one place, or the module is swapped already. Nothing was changed.
        LookupError: a function is not looked up. Nothing was changed.
    """
    path = swaps[0].site.path or "the model itself"
    if classes.ours(type(module)) is not None:
        raise PlanConflict(f"{path} is swapped already", todo="Undo that swap first.")
    if len(swaps) > 1 and len({(s.site.kind, s.site.name) for s in swaps}) < len(swaps):
        raise PlanConflict(f"two swaps claim {path}", todo="Leave one of them out.")
    standing: Standing = "accepted" if every is None else "open"
    parts = tuple(Part(s, Service(s.inference, standing), Service(s.training, standing)) for s in swaps)
    _fused(module, parts)
    shared = {} if shared is None else shared
    slot = Slot(type(module), parts, prover, CONDUCT, every=every, compiled=compiled, classes=shared)
    slot.watched = watched(module, [read for part in parts for read in part.reads]) if module._modules else slot.watched  # noqa: SLF001  # without children there is nothing to watch
    both = [classes.class_for_mode(slot, training=training) for training in (False, True)]  # all that can fail, now
    held = vars(module)
    if "forward" in held and "_old_forward" not in held:
        slot.leftover = held.pop("forward")
    state.remember(module, slot)
    classes.assign(module, both[held.get("training", True)])
    return slot


def _fused(module: nn.Module, parts: tuple[Part, ...]) -> None:
    """Say of parts that are for statements which norms these call, and which other part's function.

    Raises:
        LookupError: the forward has no such statements.
    """
    forward = type(module).forward
    for part in parts:
        names = fused.norms(forward, part.site.name)
        if not names:
            continue
        part.norms = tuple(original(getattr(module, name)) for name in names)
        opened = fused.opened(forward, [part.site.name])
        for other in parts:
            name = other.site.name
            if other.site.kind == "function" and not other.site.row.statements and rebuild.looks_up(opened, name) is not None:
                other.inside = part


def conflict(slot: Slot) -> str | None:
    """Why `restore` would not leave the module as it was, or `None`."""
    module = slot.ref() if slot.ref is not None else None
    if module is None or state.find(module) is not slot:
        return None
    path = slot.parts[0].site.path or "the model itself"
    now, mine = type(module), classes.ours(type(module))
    if now is slot.base:
        return None
    if mine is None:
        return f"{path} is now a {now.__module__}.{now.__qualname__}, which is not what was installed"
    if mine is not now:
        return f"{path} is now a {now.__name__}, wrapped around the {slot.base.__name__} after the swap"
    wrapper = vars(module).get("_old_forward", vars(module).get("forward"))  # below accelerate's hook, if there is one
    if wrapper is not None and _holds(wrapper, module):
        return f"{path} has a forward of its own now, set after the swap, which calls what it found then"
    return None


def restore(slot: Slot) -> None:
    """Give the module back as it was. One that is gone, or plain again, is left alone.

    Raises:
        UndoConflict: something wrapped the module after the swap; undo that first. Nothing was changed.
    """
    why = conflict(slot)
    if why is not None:
        raise UndoConflict(why, todo="Undo what wrapped it first, then this swap.")
    module = slot.ref() if slot.ref is not None else None
    if module is None or state.find(module) is not slot:
        return
    state.forget(module)
    if type(module) is not slot.base:
        classes.assign(module, slot.base)
    if slot.leftover is not None:
        vars(module).setdefault("forward", slot.leftover)


def release(module: nn.Module) -> None:
    """Take the swap off this one module, whoever installed it; for copies, which no handle knows.

    Raises:
        UndoConflict: as `restore`.
    """
    slot = state.find(module)
    if slot is not None:
        restore(slot)


def _holds(wrapper: Any, module: nn.Module) -> bool:
    """Whether an instance-level forward holds one that the class had while it was swapped."""
    inside = [getattr(wrapper, "__wrapped__", None), getattr(wrapper, "func", None), *getattr(wrapper, "args", ())]
    function = wrapper.__func__ if isinstance(wrapper, MethodType) else wrapper
    if isinstance(function, FunctionType):
        inside += [content for _, content in rebuild.cells(function)]
        inside += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    base = original(module).forward
    return any(classes.own(held, module) and held.__func__ is not base for held in (wrapper, *inside))


def swapped(model: nn.Module) -> Iterator[nn.Module]:
    """Every swapped module of `model`."""
    for module in model.modules():
        if classes.ours(type(module)) is not None:
            yield module


CONDUCT = Conduct(bypass)

__all__ = ["conflict", "install", "obstacle", "original", "release", "restore", "swapped"]
