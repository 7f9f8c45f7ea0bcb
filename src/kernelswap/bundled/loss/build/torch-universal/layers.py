"""What stands in for a module's forward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .lazy import head, plain


class LMHead(nn.Module):
    """`x @ weight.T + bias`, computed when it is read, where a gradient may be wanted. Reads `weight` (V, H), `bias` (V,) or None.

    Without gradients, under tracing, in a replica of DataParallel, under FSDP and for weights that are no plain tensors: at once.
    """

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (..., H) -> (..., V): a Tensor, or a LazyLogits."""
        if not self.training or not torch.is_grad_enabled() or not plain(self, input, self.weight, self.bias):
            return nn.functional.linear(input, self.weight, self.bias)
        return head(input, self.weight, self.bias)
