"""A function that a module's forward looks up as a global, swapped for that module alone (design decision D4).

The module's class gets a copy of its forward whose globals hold the kernel under that one name. The module-level name,
which every model of the process shares, is not touched. A module whose forward itself is served by a kernel looks
nothing up any more: there the function swap is moot for as long as that kernel serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import module as module_slot
from . import rebuild

if TYPE_CHECKING:
    import torch.nn as nn


def original(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the forward of `module`'s own class finds under the global `name`, decorators looked through.

    Raises:
        LookupError: it looks no such name up.
    """
    return rebuild.found(module_slot.original(module).forward, name)


def obstacle(module: nn.Module, name: str, *, replacing: bool = False) -> str | None:
    """Why `name` cannot be swapped for this module alone, or `None`; `replacing` as in `module.obstacle`."""
    why = module_slot.obstacle(module, replacing=replacing)
    return why if why is not None else rebuild.looks_up(module_slot.original(module).forward, name)
