"""Two outputs of the same thing, computed twice: whether the second may stand for the first."""

from __future__ import annotations

from torch import Tensor

from .real import BOTH, blocks
from .tolerance import compare


def differs(mine: Tensor, original: Tensor) -> str | None:
    """Why `mine` is not as good as `original`, or `None`. Shapes and dtypes equal, any rank; a row is the last dimension."""
    if mine.shape != original.shape or mine.dtype != original.dtype:
        return f"{tuple(mine.shape)} {mine.dtype} instead of {tuple(original.shape)} {original.dtype}"
    for m, o in zip(blocks(mine), blocks(original), strict=True):
        found = compare(m, o, o if o.device.type == "mps" else o.double(), slack=BOTH)
        if found.wrong is not None:
            return found.wrong
    return None
