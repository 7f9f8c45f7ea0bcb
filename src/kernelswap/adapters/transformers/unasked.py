"""Attention and the loss of causal language models, where a program asks for kernels and not for these: the rows of `table.wins`.

What a program said has the last word: `attn_implementation`, and in a KernelConfig "attention", "LMHead", "ForCausalLMLoss", classes
of attention modules and globs over paths.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from ... import sites, table
from ...types import Machine, Mode, Row, Unasked
from .wanted import Wanted

if TYPE_CHECKING:
    import torch.nn as nn

ATTENTION = "attention"
_LOSS = "ForCausalLMLoss"


def loss_rows() -> tuple[Row, ...]:
    """For the head of a language model, whose loss needs no logits."""
    return tuple(row for row in table.wins() if row.kind != ATTENTION)


def attention(model: nn.Module, wanted: Wanted, machine: Machine, chosen: Callable[[Any], str | None]) -> bool | Unasked:
    """What to ask `Swapper.swap` for.

    Args:
        model: any module.
        wanted: of its KernelConfig.
        machine: that serves.
        chosen: why the setting of a configuration is the program's own choice, or may be, or `None`.
    """
    if wanted.attention:  # a kernel that the config names takes the place of whatever is there
        return False
    (use,) = next(row.use for row in table.wins() if row.kind == ATTENTION)
    alone = _left_alone(model, wanted)

    def keeps(config: Any, device: str) -> str | None:
        if (why := table.misfit(use, device, machine)) is not None:
            return f"by itself it {why}; attn_implementation='kernelswap/attention' asks for it"
        return _said(alone, config, device) or chosen(config)

    return Unasked(keeps, trains=any(Mode.TRAINING in mode for mode in use.modes) or not use.modes)


def _said(alone: list[tuple[str, tuple[str, ...], Any]], config: Any, device: str) -> str | None:
    kind = device.partition(":")[0]
    for name, devices, of in alone:
        if (of is None or of is config) and (not devices or kind in devices):
            return f"left alone: your KernelConfig says so of {name}"
    return None


def _left_alone(model: nn.Module, wanted: Wanted) -> list[tuple[str, tuple[str, ...], Any]]:
    """(name in the config, devices or all, configuration or all) of what computes attention and is to stay as it is."""
    found: list[tuple[str, tuple[str, ...], Any]] = []
    for name, devices in wanted.alone:
        if name == ATTENTION:
            found.append((name, devices, None))
            continue
        for path, module in model.named_modules():
            cls = sites.original(module)
            named = name in {c.__name__ for c in cls.__mro__} or fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}")
            if path and named and "Attention" in cls.__name__:
                found.append((name, devices, getattr(module, "config", None)))
    return found


def the_loss_is_named(wanted: Wanted) -> bool:
    """Whether the config says something else of the loss."""
    return any(row.layer == _LOSS for row in wanted.rows)
