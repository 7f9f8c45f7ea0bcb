"""The original in float64, and copies of modules to run it on. Never writes to the module that it is given.

`Promote` turns every cast and every allocation that the original asks for in a narrower type into float64, so that
`x.to(torch.float32)` inside a norm does not round. What is left is what the original means, without its roundings.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import sites
from .tolerance import SINGLE

NARROW = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
}
LARGEST_REFERENCE = 4 << 30
"""Bytes of float64 weights above which the reference is float32 (a 4096x14336 MLP needs 1.4 GB)."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class Promote(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own class is untyped
    """Everything narrower than float64 that an operator is asked to make becomes float64 (complex64: complex128)."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See the class."""
        kwargs = {name: _widened(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widened, args), **kwargs)


def _widened(value: Any) -> Any:
    return NARROW.get(value, value) if isinstance(value, torch.dtype) else value


# -- copies -------------------------------------------------------------------------------------------------------

Replace = Callable[[str, Tensor], Tensor]
"""`replace(name, tensor)`: what the copy holds in place of a parameter, a buffer or a tensor attribute."""


def twin(module: nn.Module, replace: Replace, prefix: str = "") -> nn.Module:
    """A module like `module`, of its original class all the way down, with every tensor replaced; shares all else.

    User hooks do not come along, except those that make a weight before the call (`weight_norm`, `spectral_norm`).
    """
    cls: Any = sites.original(module)
    copy: nn.Module = cls.__new__(cls)
    state = dict(vars(module))
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = replace(prefix + name, value)
    state["_parameters"] = {n: None if p is None else replace(prefix + n, p) for n, p in module._parameters.items()}  # noqa: SLF001  # torch has no public way to copy a module shallowly
    state["_buffers"] = {n: None if b is None else replace(prefix + n, b) for n, b in module._buffers.items()}  # noqa: SLF001  # same
    state["_modules"] = {n: None if m is None else twin(m, replace, f"{prefix}{n}.") for n, m in module._modules.items()}  # noqa: SLF001  # same
    for name in _HOOKS:
        state[name] = OrderedDict()
    hooks = module._forward_pre_hooks.items()  # noqa: SLF001  # same
    state["_forward_pre_hooks"] = OrderedDict((n, h) for n, h in hooks if type(h).__module__.startswith("torch.nn.utils."))
    state["_forward_pre_hooks_with_kwargs"] = OrderedDict()
    # accelerate and users put a `forward` on the instance, bound to it: bound to the copy, or left out.
    mine = state.pop("_old_forward", None) or state.pop("forward", None)
    state.pop("forward", None)
    state.pop("_hf_hook", None)
    vars(copy).update(state)
    if isinstance(mine, types.MethodType) and mine.__self__ is module and mine.__func__ is not type(module).forward:
        vars(copy)["forward"] = types.MethodType(mine.__func__, copy)
    return copy


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and tensor attributes by dotted name."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    twin(module, note)
    return found


def widen(value: Any, device: torch.device | None = None) -> Any:
    """`value` with every floating tensor in it as float64 (complex: complex128), detached."""

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.detach().to(device=device or t.device, dtype=NARROW.get(t.dtype, t.dtype))

    return pytree.tree_map(one, value)


# -- the reference ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    """What the reference says about one case. Lists follow the order in which tensors leave the original."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]
    moved: list[Tensor] | None
    """The same for inputs that are off by one rounding of the arithmetic inside; None where the original is the reference."""
    moved_gradients: dict[str, Tensor | None]

    def to(self, device: torch.device) -> Answer:
        """The same on the device of the tensors it is compared with; mps has no float64."""

        def one(t: Tensor) -> Tensor:
            return t.to(device, torch.float32) if device.type == "mps" and t.dtype == torch.float64 else t.to(device)

        def named(d: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
            return {n: None if t is None else one(t) for n, t in d.items()}

        moved = None if self.moved is None else [one(t) for t in self.moved]
        return Answer([one(t) for t in self.outputs], named(self.gradients), moved, named(self.moved_gradients))


class Reference:
    """`original` in float64, on a float64 copy of `module`. `note` says where it is less than that.

    Devices without float64 (mps, npu) get their reference on the CPU.
    """

    def __init__(self, original: Callable[..., Any], module: nn.Module | None, device: torch.device) -> None:
        self.original = original
        self.device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        self.note = "float64"
        self.module = None
        if module is not None:
            held = sum(t.numel() * 8 for t in tensors(module).values() if t.is_floating_point())
            if held > LARGEST_REFERENCE:
                self.note = f"float32: float64 weights would take {held >> 20} MB"
                self.module = twin(module, lambda _, t: t.detach().to(self.device, torch.float32) if t.is_floating_point() else t)
            else:
                self.module = twin(module, lambda _, t: widen(t, self.device))

    @property
    def dtype(self) -> torch.dtype:
        """Of its answers."""
        return torch.float64 if self.note.startswith("float64") else torch.float32

    def _mode(self) -> AbstractContextManager[Any]:
        return Promote() if self.dtype == torch.float64 else nullcontext()  # type: ignore[no-untyped-call]  # torch's own class is untyped

    def __call__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        run: Callable[..., tuple[list[Tensor], dict[str, Tensor | None]]],
        *,
        inside: float = SINGLE,
        seed: int = 0,
    ) -> Answer:
        """`run(function, args, kwargs)` twice: on the inputs, and on inputs moved by one rounding of the arithmetic inside.

        Raises:
            Exception: whatever the original raises on float64 tensors.
        """
        a, k = widen((args, dict(kwargs)), self.device)
        a, k = pytree.tree_map(lambda t: t.to(self.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, (a, k))
        with alone(self.device), self._mode():
            outputs, gradients = run(self.original, a, k)
            moved, moved_gradients = run(self.original, *_moved((a, k), 2 * inside, seed))
        return Answer(outputs, gradients, moved, moved_gradients)


def _moved(value: Any, by: float, seed: int) -> Any:
    source = torch.Generator("cpu").manual_seed(seed)

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.numel() == 0:
            return t
        sign = (
            torch.randint(0, 2, (t.numel(),), generator=source, dtype=torch.int8, device="cpu").mul_(2).sub_(1).reshape(t.shape)
        )
        return t * (1 + by * sign.to(t.device))

    return pytree.tree_map(one, value)


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """No autocast of the caller's inside."""
    with torch.autocast(device.type if device.type in ("cpu", "cuda") else "cpu", enabled=False):
        if device.type != "cpu":
            with torch.autocast("cpu", enabled=False):
                yield
        else:
            yield
