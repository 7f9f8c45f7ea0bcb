"""What candidates are timed on: calls of a module or function, one for each size that its calls come in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import sites
from ..slots import function, fused
from ..types import Implementation, Run, Site
from . import inputs, keys, norms, rotary, samples
from .agree import Differs
from .check import Check
from .inputs import Subject
from .real import Real, accepted
from .trial import Errors

HELD = 256 << 20  # bytes of inputs in rotation
TORCH = "torch"
"""The source of what is no stranger's: its outputs are compared, nothing more is asked."""

ELSEWHERE = "does not serve such calls"
"""Of a candidate that was not made for a bucket's calls: the original goes on there."""

Given = tuple[Any, ...]
Sides = tuple[Callable[..., Any], Callable[..., Any]]


class Course(Protocol):
    """The calls of one kind of site in one mode. Bucket i of them is called `names[i]`."""

    unit: str
    """What the size of a call is counted in."""
    names: tuple[str, ...]
    at: tuple[str, ...]
    """The size that stands for each bucket, as text."""
    order: tuple[int, ...]
    """Buckets by how soon they are worth knowing."""

    def about(self) -> Any:
        """What its measurements depend on, apart from machine, dtype and mode: values whose `repr` says it."""
        ...

    def occurs(self, bucket: int) -> bool:
        """Whether a call of this site can be of that size, and is small enough to measure. Draws nothing."""
        ...

    def like(self, bucket: int) -> int | None:
        """The bucket whose winner serves this one, where it cannot be measured."""
        ...

    def given(self, bucket: int, salt: int = 0) -> Given:
        """Fresh inputs of one call of a bucket that occurs."""
        ...

    def sides(self, candidate: Implementation, bucket: int) -> Sides:
        """What is timed on such inputs, the original and the candidate; in training forward and backward."""
        ...

    def differs(self, candidate: Implementation, given: Given, bucket: int, verifier: Check) -> str | None:
        """Why the outputs on these inputs are not good enough, or `None`."""
        ...

    def release(self) -> None:
        """Let go of what was made to measure with."""
        ...

    def mixture(self, parts: Sequence[Implementation | None], lead: Implementation) -> Implementation:
        """What `parts` say, by bucket; None is the original. `lead` gives it its name."""
        ...


def inputs_at_once(given: Given, most: int) -> int:
    """How many sets of such inputs are held in rotation: two at least."""
    size = sum(t.numel() * t.element_size() for t in given if isinstance(t, Tensor))
    return max(2, min(most, HELD // max(1, size)))


class Plain:
    """Of a module, a function or statements whose row has a recipe: `samples` says how their calls look."""

    order: tuple[int, ...] = (0, 3, 1, 2, 4)
    """One token, a prompt, then what lies between and beyond."""

    def __init__(self, site: Site, module: nn.Module, original: Callable[..., Any], run: Run) -> None:
        self.site, self.original, self.run, self.held = site, original, run, module
        self.scale = samples.BY_PROBE[site.row.probe]
        self.unit, self.names = self.scale.unit, tuple(map(self.scale.name, range(len(self.scale.at))))
        self.at = tuple(map(str, self.scale.at))
        self._copy: nn.Module | None = None

    @functools.cached_property
    def subject(self) -> Subject:
        """What recipes look at, on the device of the site."""
        device = torch.device(self.site.device)
        return Subject(self.site, self.held, self.original, device, getattr(torch, self.site.dtype.removeprefix("torch.")))

    def about(self) -> Any:
        """See `Course`."""
        if self.site.row.statements:
            held = norms.of(self.site, self.held)
            seen = keys.subject(dataclasses.replace(self.site, kind="module"), held, self.original)
            return seen, repr(rotary.heads(self.held))
        return keys.subject(self.site, self.held, self.original)

    def occurs(self, bucket: int) -> bool:
        """See `Course`."""
        return samples.occurs(Subject(self.site, self.held, self.original, torch.device("meta"), torch.float32), bucket)

    def like(self, bucket: int) -> int | None:
        """See `Course`: the one below, and for the first ones the first that can be measured."""
        if any(self.occurs(b) for b in range(bucket)):
            return bucket - 1
        return next((b for b in range(bucket, len(self.names)) if self.occurs(b)), None)

    def given(self, bucket: int, salt: int = 0) -> Given:
        """See `Course`."""
        made = samples.sample(self.subject, bucket, salt)
        assert made is not None  # it occurs
        return made

    def sides(self, candidate: Implementation, bucket: int) -> Sides:  # noqa: ARG002  # every size alike
        """See `Course`."""
        site, held, original, called = norms.seen(self.site, self.held, self.original, self._behind_guard(candidate))
        module = self._module(site, held)

        def side(function: Callable[..., Any]) -> Callable[..., Any]:
            bound = function if module is None else functools.partial(function, module)
            if not self.run.training:
                return bound
            parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]
            return backward(bound, samples.GRADED.get(self.site.row.probe), parameters)

        return side(original), side(called.forward)

    def differs(self, candidate: Implementation, given: Given, bucket: int, verifier: Check) -> str | None:  # noqa: ARG002  # as `sides`
        """See `Course`."""
        site, seen, _, _ = norms.seen(self.site, self.held, self.original, self._behind_guard(candidate))
        module = self._module(site, seen)
        if module is not None and self.site.row.statements:
            given, module = (*module._modules.values(), *given), None  # noqa: SLF001  # as `norms.on_module`
        if candidate.origin.candidate.source == TORCH:
            return by_torch(self.site, module, self.original, candidate, given, {})
        held = self.held if module is None else module
        _, verdict = verifier.first_call(self.site, held, self.original, candidate, self.run, given, {})
        return None if verdict.accepted else verdict.reason

    def _module(self, site: Site, held: nn.Module) -> nn.Module | None:
        """A copy with parameters of its own; None where the site is a function."""
        if self._copy is None and site.kind == "module":
            subject = dataclasses.replace(self.subject, module=held)
            self._copy = inputs.with_parameters(subject, 1.0).train(self.run.training)
        return self._copy

    def _behind_guard(self, candidate: Implementation) -> Implementation:
        """What would run: a kernel for statements is called by what asks whether it may answer for the norms."""
        if not self.site.row.statements:
            return candidate
        classes = tuple(sites.original(norm) for norm in function.norms(self.held, self.site.name).values())
        return dataclasses.replace(candidate, forward=fused.standing_back(candidate.forward, self.original, classes))

    def release(self) -> None:
        """See `Course`."""
        self._copy = None

    def mixture(self, parts: Sequence[Implementation | None], lead: Implementation) -> Implementation:
        """See `Course`."""
        before = function.norms(self.held, self.site.name) if self.site.row.statements else ()
        return mixture(self.scale, parts, self.original, lead, before=len(before))


def by_torch(
    site: Site,
    module: nn.Module | None,
    original: Callable[..., Any],
    candidate: Implementation,
    given: Given,
    named: Mapping[str, Any],
) -> str | None:
    """Why the output of the original, compiled, differs from its own, or `None`."""
    try:
        _, verdict = Real(site, module, original, candidate, given, named).answered(accepted(Errors()))
    except Differs as e:
        return str(e)
    return None if verdict.accepted else verdict.reason


def backward(called: Callable[..., Any], graded: int | None, parameters: Sequence[Tensor]) -> Callable[..., Any]:
    """A forward and backward: to the first `graded` arguments, or all, and to the parameters."""

    def step(*given: Tensor) -> Any:
        most = len(given) if graded is None else graded
        leaves = [t.detach().requires_grad_(i < most and t.is_floating_point()) for i, t in enumerate(given)]
        roots = [t for t in pytree.tree_leaves(called(*leaves)) if isinstance(t, Tensor) and t.requires_grad]
        wanted = [*(t for t in leaves if t.requires_grad), *parameters]
        return torch.autograd.grad(roots, wanted, [torch.ones_like(t) for t in roots], allow_unused=True)

    return step


# -- one implementation of several ----------------------------------------------------------------------------------


def mixture(
    scale: samples.Scale,
    parts: Sequence[Implementation | None],
    original: Callable[..., Any],
    lead: Implementation,
    *,
    before: int = 0,
) -> Implementation:
    """What `parts` say, by the size of the call's first tensor; None is the original. `lead` gives the mixture its name.

    `before`: norms that a call begins with.

    Where one candidate serves every bucket no such frame is needed. This one costs a comparison or two.
    """
    size = samples.size_of(scale)
    steps: list[tuple[float, Callable[..., Any], bool]] = []
    for bound, part in zip((*scale.bounds, float("inf")), parts, strict=True):
        function = original if part is None else part.forward
        if steps and steps[-1][1] is function:
            steps.pop()
        steps.append((bound, function, part is not None))

    def at(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Callable[..., Any], bool]:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor):
            n = size(first)
            for bound, function, ours in steps:
                if n <= bound:
                    return function, ours
        return original, False

    skip = before + (lead.kind == "module")  # `self` comes first, and is part of the call

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return at(args[skip:], kwargs)[0](*args, **kwargs)

    def serving(*args: Any, **kwargs: Any) -> bool:
        return at(args[skip:], kwargs)[1]

    forward.serving = serving  # type: ignore[attr-defined]  # asked by whoever counts or checks calls
    used = [p for p in dict.fromkeys(parts) if p is not None]
    return dataclasses.replace(
        lead,
        forward=forward,
        backward=all(p.backward for p in used),
        compiles=all(p.compiles for p in used),
        reads=tuple(dict.fromkeys(read for p in used for read in p.reads)),
        parts=tuple(parts),
    )
