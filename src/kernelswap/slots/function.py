"""A function that a module's forward looks up as a global, swapped for that module alone (design decision D4).

The module's class gets a copy of its forward whose globals hold the kernel under that one name. The module-level name,
which every model of the process shares, is not touched. A module whose forward itself is served by a kernel looks
nothing up any more: there the function swap is moot for as long as that kernel serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import fused, rebuild
from . import module as module_slot

if TYPE_CHECKING:
    import torch.nn as nn


def original(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the forward of `module`'s own class finds under the global `name`, decorators looked through.

    Raises:
        LookupError: it looks no such name up.
    """
    return rebuild.found(fused.opened(module_slot.original(module).forward, [name]), name)


def obstacle(module: nn.Module, name: str, *, replacing: bool = False) -> str | None:
    """Why `name` cannot be swapped for this module alone, or `None`; `replacing` as in `module.obstacle`."""
    why = module_slot.obstacle(module, replacing=replacing)
    if why is not None:
        return why
    forward = module_slot.original(module).forward
    norms = [getattr(module, norm) for norm in fused.norms(forward, name)]
    why = fused.twice(norms) or next(filter(None, (fused.obstacle(norm, name) for norm in norms)), None)
    return why or rebuild.looks_up(fused.opened(forward, [name]), name)


def inside(module: nn.Module, name: str) -> tuple[str, ...]:
    """The functions that the statements behind `name` call themselves, and that the forward looks up nowhere else."""
    forward = module_slot.original(module).forward
    opened = fused.opened(forward, [name])
    called = rebuild.found(opened, name).__code__.co_names
    return tuple(n for n in called if rebuild.looks_up(forward, n) is None and rebuild.looks_up(opened, n) is not None)


def norms(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The norms that the statements behind `name` call, in the order in which a kernel for them is given them."""
    return {norm: getattr(module, norm) for norm in fused.norms(module_slot.original(module).forward, name)}
