"""What a row's loss is, as torch computes it: for second derivatives, and for what no kernel takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own spelling
from torch import Tensor


class Terms(NamedTuple):
    """What is done to logits z before the loss, and which loss:

        c = post * tanh(pre * z) where `tanh`, else pre * z
        loss = lse - (1 - smoothing) * c[target] - smoothing * mean(c) + z_loss * lse^2,  lse = logsumexp(c)

    A row whose target is `ignore` has loss 0.
    """

    ignore: int = -100
    smoothing: float = 0.0
    z_loss: float = 0.0
    pre: float = 1.0
    post: float = 1.0
    tanh: bool = False


def shaped(z: Tensor, terms: Terms) -> Tensor:
    """c of z, in z's dtype."""
    if terms.tanh:
        return torch.tanh(z * terms.pre) * terms.post
    return z if terms.pre == 1.0 else z * terms.pre


def losses(z: Tensor, target: Tensor, terms: Terms) -> Tensor:
    """z (rows, V), target (rows,) -> (rows,) in float32, or in float64 where z is."""
    c = shaped(z if z.dtype is torch.float64 else z.float(), terms)
    found = F.cross_entropy(c, target, ignore_index=terms.ignore, reduction="none", label_smoothing=terms.smoothing)
    if terms.z_loss:
        found = found + (terms.z_loss * c.logsumexp(1).square()).masked_fill(target == terms.ignore, 0.0)
    return found
