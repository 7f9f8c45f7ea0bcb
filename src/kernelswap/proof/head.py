"""The head of a language model is proved together with the loss that follows it: that is where a kernel for it does something else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own spelling
from torch import Tensor, nn

IGNORED = -100


def through(probe: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """What is compared in place of `function`: for a head, its output and the cross entropy of it as Transformers computes that."""
    if probe != "head":
        return function

    @functools.wraps(function)
    def both(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = function(module, x)
        rows = logits.float().view(-1, logits.shape[-1])
        target = torch.arange(rows.shape[0], device=x.device) * 7919 % rows.shape[1]
        return logits, F.cross_entropy(rows, target.masked_fill(target % 5 == 1, IGNORED), ignore_index=IGNORED)

    return both


def size(probe: str, module: nn.Module | None, held: list[Tensor]) -> int:
    """Elements of the largest tensor of a call; for a head that is its output, which nobody should make to check it."""
    largest = max((t.numel() for t in held), default=0)
    if probe != "head" or module is None or not held:
        return largest
    weight = getattr(module, "weight", None)
    columns = weight.shape[0] if isinstance(weight, Tensor) else 1
    return max(largest, largest // max(1, held[0].shape[-1]) * columns)
