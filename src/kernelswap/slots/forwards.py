"""The forwards that classes of ours carry. With a proven kernel and nothing to guard, that is the kernel's own function.

A frame of ours remains only around a kernel whose verdict is open, that cannot do what a call may ask of it (backward,
compilation), or whose calls are counted. Under torch.compile, torch.export and torch.jit.trace a frame of ours is a plain
choice between two functions, made while tracing: it never breaks a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from . import ahead, fused, passages, rebuild, state
from .state import Norms

if TYPE_CHECKING:
    from ..types import Implementation

MARK = "__kernelswap_frame__"
Forward = Callable[..., Any]


class Kernel(NamedTuple):
    """As much of an Implementation as a class depends on."""

    forward: Forward
    backward: bool
    compiles: bool
    norms: Norms = ()
    """Where it takes the place of statements: the classes of the norms that it is given."""

    @staticmethod
    def of(implementation: Implementation, norms: Norms = ()) -> Kernel:
        """The same kernel, hashed by identity of its function."""
        return Kernel(implementation.forward, implementation.backward, implementation.compiles, norms)


class Form(NamedTuple):
    """Everything that the class of a swapped module depends on."""

    base: type[Any]
    kernel: Kernel | None = None
    functions: tuple[tuple[str, Kernel], ...] = ()
    checking: bool = False
    """A frame of ours sits before the kernel: its verdict is open, or every n-th call is checked."""
    traced: bool = False
    """While checking: compiled code may hold the kernel."""
    counting: bool = False
    watched: frozenset[str] = frozenset()
    """Submodules that a kernel reads into."""
    ahead: bool = False
    """The layer's last sum and the next layer's first norm may be one launch (`ahead.py`)."""
    after: type[Any] | None = None
    """A norm's: the class of layers, one that goes ahead, whose last sum it may be given."""


def make(form: Form) -> Forward | None:
    """The forward for a class; `None`: the inherited one."""
    original: Forward = form.base.forward
    if form.kernel is not None:
        served = guarded(form.kernel, original, counting=form.counting)
        if form.after is not None:
            served = _marked(ahead.taking(rebuild.found(form.after.forward, passages.AHEAD_NORM), served))
        return checking(original, served if form.traced else original) if form.checking else served
    if form.functions:
        both = _ahead(form) if form.ahead else {}
        opened = fused.opened(original, (*(name for name, _ in form.functions), *both))
        names = {name: guarded_function(kernel, rebuild.found(opened, name)) for name, kernel in form.functions} | both
        served = rebuild.rebuilt(opened, names)
        setattr(served, MARK, True)
        return checking(original, served if form.traced else original) if form.checking or form.counting else served
    return _counted(original, original, by_kernel=False) if form.counting else None


def goes_ahead(cls: type[Any]) -> bool:
    """Whether modules of this class of ours make the norm of their last sum as well."""
    return rebuild.looks_up(cls.forward, passages.AHEAD_NORM) is None


def _ahead(form: Form) -> dict[str, Forward]:
    """What the first norm and the last sum of a layer call, by the kernel for the sum inside of it."""
    kernel = next((k for _, k in form.functions if len(k.norms) == 1), None)
    if kernel is None or not fused.goes_ahead(form.base.forward):
        return {}
    total, norm = ahead.pair(kernel.forward, kernel.norms[0])
    return {passages.AHEAD_TOTAL: total, passages.AHEAD_NORM: norm}


def checking(original: Forward, traced: Forward) -> Forward:
    """Each call is the slot's to decide; under tracing, where nothing can be compared, `traced` serves."""
    tracing = tracing_now()

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if tracing():
            return traced(self, *args, **kwargs)
        slot = state.find(self)
        return original(self, *args, **kwargs) if slot is None else slot.conduct.first_call(slot, self, args, kwargs)

    return _marked(forward)


def guarded(kernel: Kernel, original: Forward, *, counting: bool = False) -> Forward:
    """The kernel's forward, with only as much before it as it needs."""
    served: Forward = kernel.forward if hasattr(kernel.forward, "__get__") else _bindable(kernel.forward, original)
    if counting:
        served, original = _counted(served, original, by_kernel=True), _counted(original, original, by_kernel=False)
    if kernel.backward and kernel.compiles:
        return served
    cannot = _cannot(kernel)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if cannot((self, args, kwargs)):
            return original(self, *args, **kwargs)
        return served(self, *args, **kwargs)

    return _marked(forward)


def guarded_function(kernel: Kernel, original: Forward) -> Forward:
    """The same for a function, which has no self; or for statements, whose meaning `original` is."""
    if kernel.norms:
        return fused.standing_back(guarded_function(kernel._replace(norms=()), original), original, kernel.norms)
    if kernel.backward and kernel.compiles:
        return kernel.forward
    cannot, served = _cannot(kernel), kernel.forward

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if cannot((args, kwargs)):
            return original(*args, **kwargs)
        return served(*args, **kwargs)

    if (sizes := getattr(served, "serving", None)) is not None:
        function.serving = lambda *args, **kwargs: not cannot((args, kwargs)) and sizes(*args, **kwargs)  # type: ignore[attr-defined]  # as on the kernel
    return _marked(function)


def _cannot(kernel: Kernel) -> Callable[[tuple[Any, ...]], bool]:
    tracing = tracing_now()
    if kernel.backward:
        return lambda _: tracing()
    if kernel.compiles:
        return wants_gradients
    return lambda values: tracing() or wants_gradients(values)


def wants_gradients(values: Iterable[Any]) -> bool:
    """Whether a backward could follow from a call with these arguments, a module's parameters included."""
    import torch

    return torch.is_grad_enabled() and _any_requires_grad(values, torch.Tensor, torch.nn.Module)


def _any_requires_grad(values: Iterable[Any], tensor: type[Any], module: type[Any]) -> bool:
    for value in values:
        if isinstance(value, tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, module):
            if any(p.requires_grad for p in value.parameters()):
                return True
        elif isinstance(value, (list, tuple)):
            if _any_requires_grad(value, tensor, module):
                return True
        elif isinstance(value, dict) and _any_requires_grad(value.values(), tensor, module):
            return True
    return False


def tracing_now() -> Callable[[], bool]:
    """What says whether code is being traced, by torch.compile, torch.export or torch.jit.trace."""
    import torch

    is_compiling, is_tracing = torch.compiler.is_compiling, torch.jit.is_tracing  # type: ignore[attr-defined]  # public, not in __all__
    return lambda: is_compiling() or bool(is_tracing())  # type: ignore[no-untyped-call]  # torch leaves it untyped


def _counted(function: Forward, named: Forward, *, by_kernel: bool) -> Forward:
    """Counts eager calls; what runs inside compiled code is not seen."""
    tracing, serving = tracing_now(), getattr(function, "serving", None)

    @functools.wraps(named)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not tracing():
            slot = state.find(self)
            part = slot.module_part if slot is not None else None
            if part is not None:
                part.count(by_kernel=by_kernel and (serving is None or serving(self, *args, **kwargs)))
        return function(self, *args, **kwargs)

    return _marked(forward)


def _bindable(function: Forward, named: Forward) -> Forward:
    """A builtin or a callable object does not become a method by itself."""

    @functools.wraps(named)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    return _marked(forward)


def _marked(function: Forward) -> Forward:
    setattr(function, MARK, True)
    return function
