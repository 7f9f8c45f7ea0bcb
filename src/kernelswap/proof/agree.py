"""What must agree besides numbers: structure, shapes, memory; and whether a float64 run is the same computation at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import memory
from .reference import Answer
from .tolerance import TOLERANCES

INSANE = 256.0
"""A usual error of the original above this many roundings: its float64 run is another computation (dropout, say)."""


class Differs(Exception):
    """The kernel may not stand in for the original; the text completes "this kernel ..."."""

    lasting = True
    """Whether the same would be found tomorrow; running out of memory is not."""


@dataclass(slots=True)
class Result:
    """What came out of one call. `gradients` by name; None where there is none."""

    outputs: list[Tensor]
    structure: Any
    drew: bool
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    cotangents: list[Tensor] | None = None
    settings: list[str] = field(default_factory=list)
    """Of torch, that the call changed."""


def name(result: Result, i: int) -> str:
    """What to call the i-th output."""
    return "output" if len(result.outputs) == 1 else f"output {i}"


def structure(kernel: Result, original: Result, owned: Sequence[Tensor]) -> None:
    """What comes back has the shape and the memory that the original's has. `owned`: the inputs and the module's own tensors.

    Raises:
        Differs: it has not.
    """
    if kernel.structure != original.structure or len(kernel.outputs) != len(original.outputs):
        raise Differs(f"returns {kernel.structure} where the original returns {original.structure}")
    for i, (k, o) in enumerate(zip(kernel.outputs, original.outputs, strict=True)):
        for what, mine, theirs in (
            ("shape", tuple(k.shape), tuple(o.shape)),
            ("dtype", k.dtype, o.dtype),
            ("device", k.device, o.device),
            ("layout", k.layout, o.layout),
        ):
            if mine != theirs:
                raise Differs(f"gives {name(original, i)} the {what} {mine}, the original {theirs}")
        if o.is_contiguous() and not k.is_contiguous():
            raise Differs(f"gives a {name(original, i)} that is not contiguous (strides {k.stride()}); the original's is")
    inputs = memory.storages(owned)
    if inputs & memory.storages(kernel.outputs) and not inputs & memory.storages(original.outputs):
        raise Differs("returns memory of its input or of the module, which the original does not")
    if memory.overlap(kernel.outputs) and not memory.overlap(original.outputs):
        raise Differs("returns tensors that share memory with each other")


def foreign(answer: Answer, original: Result, dtype: torch.dtype) -> str | None:
    """Why these answers cannot be a reference for the original, or `None`."""
    if [t.shape for t in answer.outputs] != [t.shape for t in original.outputs]:
        return "in float64 it returns other shapes"
    for r, o in zip(answer.outputs, original.outputs, strict=True):
        limits = TOLERANCES.get(o.dtype)
        if limits is None or not o.numel():
            continue
        if r.dtype != dtype:
            return f"in float64 it returns {r.dtype}"
        o = o.to(r)  # noqa: PLW2901  # the same tensor, where the reference is
        fine = o.isfinite() & r.isfinite()
        size, wrong = torch.where(fine, r, 0).abs().sum(), torch.where(fine, o - r, 0).abs().sum()
        if float(wrong) > INSANE * max(limits.unit, 2.0**-20) * float(size):
            return "its own float64 run computes something else"
    return None


def same(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """Whether two lists of tensors are equal, bit for bit."""
    for x, y in zip(a, b, strict=True):
        if x is None or y is None:
            if x is not y:
                return False
        elif x.shape != y.shape or x.dtype != y.dtype or not torch.equal(_bits(x), _bits(y)):
            return False
    return True


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.detach().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])
