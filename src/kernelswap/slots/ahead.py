"""The sum that ends one layer, and the norm with which the next begins, in one launch. For calls without gradients.

The last statement of a layer computes the norm of its sum as well, and returns the sum, as ever: hooks, recorders and outputs
see no difference. The norm waits beside it until the next layer asks its own norm for that very tensor, unmodified, and gets
what waits. Which norm comes next is not read off the model: it is the one that was last asked for the sum of this layer. A guess
that fails costs a launch; one that goes on failing is given up. What waits goes when it is taken, when another sum
comes, or when the sum goes.

The norm after the last layer is called by a forward that nothing is changed in, the model's. It takes what waits in its own
forward instead: `taking` stands before its kernel. Which norms may be such is structure (`behind`), and a wrong guess costs a frame.

The kernel is that of the `residual_norm` inside the layer, proved for norms of its class. A norm takes part only while its own
swap serves it, by a kernel of the same build: who leaves that norm alone, or prefers another kernel for it, is heeded.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import fused, state
from .state import MARK

if TYPE_CHECKING:
    import torch.nn as nn

Function = Callable[..., Any]
MISSES = 3
"""Norms in a row that nobody took, after which a layer stops making them."""


class _Link:
    """A layer, and the norm that its sum went to."""

    __slots__ = ("layer", "misses", "norm")

    def __init__(self, layer: weakref.ref[Any]) -> None:
        self.layer, self.misses = layer, 0
        self.norm: weakref.ref[Any] | None = None


class _Links(dict[int, _Link]):
    """By the identity of layers; an entry goes with its layer."""

    def of(self, layer: nn.Module) -> _Link:
        """The layer's own."""
        key = id(layer)
        link = self.get(key)
        if link is None or link.layer() is not layer:
            link = self[key] = _Link(weakref.ref(layer, lambda _: self.pop(key, None)))
        return link


class _Waiting:
    """The sum that a layer made last; its norm, where it made that too."""

    __slots__ = ("link", "normed", "of", "total", "version")

    def __init__(self, link: _Link, total: Any, normed: Any, of: Any, gone: Function) -> None:
        self.link, self.normed, self.of = link, normed, of
        self.version = total._version  # noqa: SLF001  # torch's word for it; what autograd itself asks
        self.total = weakref.ref(total, gone)


def pair(kernel: Function, cls: type[Any]) -> tuple[Function, Function]:
    """What a forward calls for its last sum, `total(layer, residual, hidden)`, and for its first norm, `first(norm, hidden)`.

    `kernel(norm, residual, hidden)` gives norm and sum; it is proved for norms of the class `cls`. `first.take(norm, hidden)` is
    what waits for this norm, or None.
    """
    lonely, unhooked, served = _lonely(), fused.idle(cls), _served(kernel)
    links = _Links()
    last: list[_Waiting | None] = [None]

    def gone(total: object) -> None:
        if (waiting := last[0]) is not None and waiting.total is total:
            waiting.link.misses += waiting.normed is not None
            last[0] = None

    def total(layer: nn.Module, residual: Any, hidden: Any) -> Any:
        if not lonely(residual, hidden) or layer.__dict__["_forward_hooks"]:
            return residual + hidden
        if (before := last[0]) is not None:
            before.link.misses += before.normed is not None
        link = links.of(layer)
        norm = link.norm() if link.norm is not None and link.misses < MISSES else None
        if norm is not None and unhooked(norm, hidden) and served(norm):
            normed, made = kernel(norm, residual, hidden)
        else:
            normed, made, norm = None, residual + hidden, None
        last[0] = _Waiting(link, made, normed, norm, gone)
        return made

    def take(norm: nn.Module, hidden: Any) -> Any:
        waiting: Any = last[0]
        if waiting is None or waiting.total() is not hidden or not lonely(hidden, hidden):
            return None
        last[0] = None
        if waiting.of is norm and waiting.version == hidden._version and unhooked(norm, hidden):  # noqa: SLF001  # as above
            waiting.link.misses = 0
            return waiting.normed
        waiting.link.misses += waiting.normed is not None
        waiting.link.norm = weakref.ref(norm)
        return None

    def first(norm: nn.Module, hidden: Any) -> Any:
        normed = take(norm, hidden)
        return norm(hidden) if normed is None else normed

    first.take = take  # type: ignore[attr-defined]  # for `taking`
    return total, first


def taking(first: Function, served: Function) -> Function:
    """The forward of a norm that gets what waits for it, and else is `served`. `first` is that of a `pair`."""
    take, (_, elsewhere) = first.take, fused.asked()  # type: ignore[attr-defined]  # see `pair`

    @functools.wraps(served)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if elsewhere() or len(args) != 1 or kwargs:  # before anything that a tracer would have to follow
            return served(self, *args, **kwargs)
        normed = take(self, args[0])
        return served(self, args[0]) if normed is None else normed

    return forward


def behind(parent: nn.Module) -> type[Any] | None:
    """The class of layers in a list of `parent`, if they are swapped and may go ahead: to a norm that `parent` holds as well."""
    for child in parent._modules.values():  # noqa: SLF001  # as in `sites`: `named_children` keeps a set of what it has seen
        layers = tuple(child._modules.values()) if child is not None else ()  # noqa: SLF001  # same
        slot = state.find(layers[-1]) if layers else None
        if slot is not None and any(len(p.norms) == 1 for p in slot.function_parts) and fused.goes_ahead(slot.base.forward):
            return slot.base
    return None


def _lonely() -> Callable[[Any, Any], bool]:
    """Whether two tensors are ordinary and alike, and nobody records or traces what is done with them.

    Not in inference mode: tensors that are made there do not count their versions.
    """
    import torch

    tensor, elsewhere = fused.asked()
    grad, inference = torch.is_grad_enabled, torch.is_inference_mode_enabled

    def lonely(residual: Any, hidden: Any) -> bool:
        return (
            not grad()
            and not elsewhere()
            and not inference()  # after it: a tracer cannot follow this one
            and type(hidden) is tensor
            and type(residual) is tensor
            and hidden.dtype is residual.dtype
            and hidden.shape == residual.shape
        )

    return lonely


def _served(kernel: Function) -> Callable[[nn.Module], bool]:
    """Whether a norm's own swap serves it, proved, by a kernel of the same build."""
    build = kernel.__module__.partition(".")[0]

    def served(norm: nn.Module) -> bool:
        form = vars(type(norm)).get(MARK)
        own = form.kernel if form is not None and not form.checking else None
        return own is not None and getattr(own.forward, "__module__", "").partition(".")[0] == build

    return served
