"""Second derivatives, through the formula: a kernel's launch leaves no history that autograd could go back through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def recorded() -> bool:
    """Whether this backward pass is itself being recorded (`create_graph=True`)."""
    return torch.is_grad_enabled()


def differentiable(formula: Callable[..., Any], inputs: tuple[Tensor, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `formula` at `inputs`, themselves with a history; None for an input that wants none."""
    wanted = [t for t in inputs if t.requires_grad]
    out = formula(*inputs)
    found = iter(torch.autograd.grad(out, wanted, grads, create_graph=True))
    return tuple(next(found) if t.requires_grad else None for t in inputs)
