"""Inputs to measure with: what a call of a given size looks like, for every kind of site that has a recipe.

Sizes come in buckets. Most sites are called with rows; an activation knows no width, so its calls are counted in elements.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..slots import function
from . import inputs, rotary
from .inputs import Subject

MOST = 1 << 25
"""Elements of one input: 128 MiB in float32. Larger calls are not measured."""
WIDE = 1024  # elements of a row where the site does not say


@dataclass(frozen=True, slots=True)
class Scale:
    """What the size of a call is counted in, and the buckets: bucket i holds sizes up to `bounds[i]`, the last all others."""

    unit: str
    bounds: tuple[int, ...]
    at: tuple[int, ...]
    """The size that stands for each bucket."""

    def bucket(self, size: int) -> int:
        """Of a call of that size."""
        return bisect.bisect_left(self.bounds, size)

    def name(self, bucket: int) -> str:
        """`1 row`, `2-16 rows`, `over 4096 rows`."""
        if bucket == len(self.bounds):
            return f"over {_short(self.bounds[-1])} {self.unit}s"
        low, high = (self.bounds[bucket - 1] + 1 if bucket else 1), self.bounds[bucket]
        if low == high:
            return f"{high} {self.unit}"
        return f"up to {_short(high)} {self.unit}s" if low == 1 or high > 4096 else f"{low}-{high} {self.unit}s"


ROWS = Scale("row", (1, 16, 256, 4096), (1, 8, 64, 1024, 8192))
ELEMENTS = Scale("element", (1 << 12, 1 << 16, 1 << 20, 1 << 23), (1 << 11, 1 << 14, 1 << 18, 1 << 21, 1 << 24))
BY_PROBE = {
    "rows": ROWS,
    "gated_rows": ROWS,
    "mlp": ROWS,
    "rotary": ROWS,
    "residual_rows": ROWS,
    "norm_rotary": ROWS,
    "projections": ROWS,
    "elementwise": ELEMENTS,
    "gated": ELEMENTS,
}

GRADED = {"rotary": 2, "norm_rotary": 2}
"""How many of the arguments carry gradients in training, where not all do: cos and sin do not."""


def size_of(scale: Scale) -> Callable[[Tensor], int]:
    """How a call's first tensor is counted. Plain arithmetic: compiled code guards on the comparison that follows it."""
    if scale is ELEMENTS:
        return lambda x: x.numel()
    return lambda x: x.numel() // ((x.shape[-1] if x.dim() else 1) or 1)


Draw = Callable[..., Tensor]
"""`draw(*shape, salt=0)`."""


def sample(subject: Subject, bucket: int, salt: int = 0) -> tuple[Any, ...] | None:
    """Positional arguments of one call in that bucket, or None: no call of this site is in it, or it is too large.

    Of statements that call norms, what follows these; `subject.module` is the module whose statements they are.

    Hidden states are (1, rows, width), as a model gives them; q and k are views (1, heads, tokens, size) of what projections leave.
    """
    return _made(subject, bucket, lambda *shape, salt=salt: subject.normal(*shape, salt=salt), salt)


def occurs(subject: Subject, bucket: int) -> bool:
    """Whether `sample` would give one. Draws nothing."""
    return _made(subject, bucket, lambda *shape, salt=0: torch.empty(*shape, device="meta"), 0) is not None  # noqa: ARG005  # as `Draw`


def _made(subject: Subject, bucket: int, draw: Draw, salt: int) -> tuple[Any, ...] | None:
    probe = subject.site.row.probe
    made = _MADE[probe](subject, BY_PROBE[probe].at[bucket], draw, salt)
    return made if made and BY_PROBE[probe].bucket(size_of(BY_PROBE[probe])(made[0])) == bucket else None


def _hidden(size: int, draw: Draw, salt: int, width: int | None, tensors: int = 1) -> tuple[Any, ...] | None:
    if width is None or size * width > MOST:
        return None
    return tuple(draw(1, size, width, salt=salt + 31 * i) for i in range(tensors))


def _elements(size: int, draw: Draw, salt: int, tensors: int = 1, wider: int = 1) -> tuple[Any, ...]:
    shape = 1, max(1, size // WIDE), min(size, WIDE) * wider
    return tuple(draw(*shape, salt=salt + 31 * i) for i in range(tensors))


def _gated(subject: Subject, size: int, draw: Draw, salt: int) -> tuple[Any, ...]:
    one = len(inputs.required(subject.original)) - (subject.site.kind == "module") == 1
    return _elements(size // 2, draw, salt, 1, 2) if one else _elements(size, draw, salt, 2)


def _rotary(subject: Subject, size: int, draw: Draw, salt: int, width: int | None = None) -> tuple[Any, ...] | None:
    """`width` of a head where something else than the module says it."""
    about = rotary.heads(subject.module)
    (many, few), width = about.whole, width or about.size
    tokens = size // many
    if not tokens or size * width > MOST:
        return None
    q, k = draw(1, tokens, many, width, salt=salt), draw(1, tokens, few, width, salt=salt + 31)
    if q.is_meta:
        return (q.transpose(1, 2),)
    turned = about.rotated[0] if width == about.size else width
    cos, sin = rotary.angles(subject, torch.arange(tokens, device="cpu")[None], turned)
    return q.transpose(1, 2), k.transpose(1, 2), cos, sin


def _first(subject: Subject) -> Any:
    """The first of the modules that some statements call."""
    return next(iter(function.norms(subject.module, subject.site.name).values()))


_MADE: dict[str, Callable[[Subject, int, Draw, int], tuple[Any, ...] | None]] = {
    "rows": lambda s, size, draw, salt: _hidden(size, draw, salt, inputs.width(s.module)),
    "gated_rows": lambda s, size, draw, salt: _hidden(size, draw, salt, inputs.width(s.module), 2),
    "mlp": lambda s, size, draw, salt: _hidden(size, draw, salt, inputs.in_features(s.module)),
    "rotary": _rotary,
    "residual_rows": lambda s, size, draw, salt: _hidden(size, draw, salt, inputs.width(_first(s)), 2),
    "norm_rotary": lambda s, size, draw, salt: _rotary(s, size, draw, salt, inputs.width(_first(s))),
    "projections": lambda s, size, draw, salt: _hidden(size, draw, salt, inputs.in_features(_first(s))),
    "elementwise": lambda _, size, draw, salt: _elements(size, draw, salt),
    "gated": _gated,
}


def _short(count: int) -> str:
    return f"{count >> 20} Mi" if count >= 1 << 20 else f"{count >> 10} Ki" if count >= 1 << 14 else str(count)
