"""Call a function on a module and arguments, with gradients when asked, and without a trace anywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import memory
from .agree import Differs, Result

T = TypeVar("T")
SEED = 20260
PERIOD = 65521  # of periodic cotangents: prime, so that no two rows get the same


@dataclass(frozen=True, slots=True)
class Want:
    """Which gradients a call is asked for, and from which cotangents."""

    inputs: tuple[int, ...] = ()
    """By their order among the tensors of the call."""
    parameters: bool = False
    kind: str = "random"
    """`random`; `periodic`: random numbers again and again, where there are many; `expanded`: one number for all, as
    `out.sum().backward()` gives; `first`: through the first output alone."""


def leaves(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a call is given, containers opened: as pytree does, which takes ten times as long where there are none."""
    if all(isinstance(v, _WHOLE) for v in (*args, *kwargs.values())):
        return [*args, *kwargs.values()]
    return pytree.tree_leaves((tuple(args), dict(kwargs)))


_WHOLE = (Tensor, int, float, bool, str, type(None))


def names(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, bound: bool) -> list[str]:
    """A name for each tensor of the call: the original's parameter names where they say it."""
    try:
        known = list(inspect.signature(function).parameters)[1 if bound else 0 :]
    except (TypeError, ValueError):  # a builtin without a signature
        known = []
    positional = [(known[i] if i < len(known) else f"argument {i}", value) for i, value in enumerate(args)]
    found = []
    for label, value in [*positional, *kwargs.items()]:
        held = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        found += [label] if len(held) == 1 else [f"{label}[{j}]" for j in range(len(held))]
    return found


def call(
    function: Callable[..., Any],
    module: nn.Module | None,
    arguments: tuple[Sequence[Any], Mapping[str, Any]],
    device: torch.device,
    want: Want | None = None,
    cotangents: Sequence[Tensor] | None = None,
    labels: Sequence[str] = (),
) -> Result:
    """Call, with gradients when `want` says so. The inputs' storage is used as it is; nothing is accumulated anywhere."""
    args, kwargs = arguments
    sources: dict[str, Tensor] = {}
    if want is not None:
        flat, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        for order, i in enumerate(i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)):
            flat[i] = flat[i].detach().requires_grad_(order in want.inputs and flat[i].is_floating_point())
            if flat[i].requires_grad:
                sources[labels[order]] = flat[i]
        for path, p in () if module is None else module.named_parameters():
            p.requires_grad_(want.parameters and p.is_floating_point())
            if p.requires_grad:
                sources[path] = p
        args, kwargs = pytree.tree_unflatten(flat, spec)
    before = memory.seed(device, SEED)
    with torch.enable_grad() if want is not None else nullcontext():
        settings = memory.settings(device)
        try:
            out = function(*args, **kwargs) if module is None else function(module, *args, **kwargs)
        finally:
            changed = memory.changed(settings, device)
    found = result(out, drew=not memory.same_seed(device, before))
    found.settings = changed
    if want is not None:
        _differentiate(found, sources, want, cotangents)
    return found


def result(output: Any, *, drew: bool) -> Result:
    """What a call returned, as a `Result`."""
    if isinstance(output, Tensor):
        return Result([output], _ONE, drew)
    flat, structure = pytree.tree_flatten(output)
    return Result([t for t in flat if isinstance(t, Tensor)], structure, drew)


_ONE = pytree.tree_structure(0)


def _differentiate(found: Result, sources: dict[str, Tensor], want: Want, cotangents: Sequence[Tensor] | None) -> None:
    outputs = found.outputs
    roots = [i for i, t in enumerate(outputs) if t.is_floating_point()][: 1 if want.kind == "first" else None]
    roots = [i for i in roots if outputs[i].requires_grad]
    given = list(cotangents) if cotangents is not None else [_cotangent(t, i, want.kind) for i, t in enumerate(outputs)]
    gradients: Sequence[Tensor | None] = [None] * len(sources)
    if roots and sources:
        gradients = torch.autograd.grad(
            [outputs[i] for i in roots], list(sources.values()), [given[i] for i in roots], allow_unused=True
        )
    found.outputs = [t.detach() for t in outputs]
    found.gradients, found.cotangents = dict(zip(sources, gradients, strict=True)), given


def _cotangent(like: Tensor, salt: int, kind: str) -> Tensor:
    if kind == "expanded":
        return torch.full((), 0.75, dtype=like.dtype, device=like.device).expand(like.shape)
    source = torch.Generator("cpu").manual_seed(SEED + salt)
    if kind == "random" or like.numel() <= PERIOD:
        return torch.randn(like.shape, generator=source, dtype=torch.float32, device="cpu").to(like.device, like.dtype)
    few = torch.randn(PERIOD, generator=source, dtype=torch.float32, device="cpu").to(like.device, like.dtype)
    return few.repeat(-(-like.numel() // PERIOD))[: like.numel()].reshape(like.shape)


def guarded(ask: Callable[[], T]) -> T:
    """Ask the kernel; whatever it raises becomes the finding."""
    try:
        return ask()
    except Exception as e:  # a stranger's code may raise anything, and all of it means: keep the original, with this reason
        wrong = Differs(f"raises {type(e).__name__}: {' '.join(str(e).split())[:300]}")
        wrong.lasting = not isinstance(e, MemoryError | torch.OutOfMemoryError)
        raise wrong from e
