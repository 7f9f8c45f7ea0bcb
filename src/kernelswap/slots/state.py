"""What is known about one swapped module. Kept beside the module, never in its `__dict__`."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..types import Choice, Implementation, Kept, Outcome, Prover, Site, Swap, Verdict

if TYPE_CHECKING:
    import torch.nn as nn

Standing = Literal["open", "accepted", "refused"]
MARK = "__kernelswap__"
"""An attribute of every class of ours, and of no other."""
Norms = tuple[type[Any], ...]
"""Classes of the norms that statements call, in the order in which a kernel for these is given them."""
Place = tuple[str, str]
"""Device and dtype, as text: `cuda:0`, `torch.bfloat16`."""


class Conduct(Protocol):
    """What happens when a swapped module is called, moved or changed; `check.py` has it."""

    def first_call(self, slot: Slot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call whose kernel has no verdict yet, or is checked again and again."""
        ...

    def moved(self, slot: Slot, module: nn.Module, place: Place) -> None:
        """The module's tensors have another device or dtype."""
        ...

    def reconsider(self, slot: Slot, module: nn.Module) -> None:
        """A submodule that a kernel reads into was replaced."""
        ...


@dataclass(slots=True)
class Service:
    """One outcome in one mode: a kernel, and whether it may serve."""

    choice: Choice
    standing: Standing
    reason: str = ""
    verdict: Verdict | None = None
    forward_seen: bool = False
    """Open, but calls that want no gradients may have the kernel."""

    @property
    def kernel(self) -> Implementation | None:
        """What was chosen, whether or not it may serve."""
        return self.choice.implementation

    def settle(self, verdict: Verdict, *, whole: bool) -> None:
        """Take a verdict of a real call; one that did not look at gradients, in training, is not the `whole` of it."""
        if verdict.accepted and not whole:
            self.forward_seen = True
            return
        self.standing = "accepted" if verdict.accepted else "refused"
        self.reason, self.verdict = ("" if verdict.accepted else verdict.reason), verdict

    def reopen(self) -> None:
        """Whatever was found no longer holds."""
        self.standing, self.reason, self.verdict, self.forward_seen = "open", "", None, False

    def now(self) -> Choice:
        """The choice as it stands: a refused kernel counts as passed over."""
        kernel = self.kernel
        if kernel is None or self.standing == "open":
            return self.choice
        if self.standing == "accepted":
            return dataclasses.replace(self.choice, verdict=self.verdict or self.choice.verdict)
        spec = str(kernel.origin.candidate.requirement) if kernel.origin is not None else kernel.layer
        return Choice(None, (*self.choice.passed, (spec, self.reason)), self.verdict)


@dataclass(slots=True)
class Part:
    """One outcome on one module: its forward, or a function that its forward looks up."""

    swap: Swap
    inference: Service
    training: Service
    away: dict[str, str] = field(default_factory=dict)
    """Why the original serves for now in every mode, by cause; empty: it need not."""
    calls: int = 0
    """Seen while checking."""
    by_kernel: int = 0
    by_original: int = 0
    """Both only while counting."""
    norms: Norms = ()
    """Where it is for statements of the forward: the classes of the norms that they call."""
    inside: Part | None = None
    """The part whose statements make the call that this one is for: while that serves, this does not."""
    required: bool = False
    """A call that refuses its kernel is to raise."""

    @property
    def site(self) -> Site:
        """Where."""
        return self.swap.site

    @property
    def reads(self) -> list[str]:
        """What its kernels read of the module, in the notation of `reads.py`."""
        kernels = (self.inference.kernel, self.training.kernel)
        return [read for kernel in kernels if kernel is not None for read in kernel.reads]

    def service(self, *, training: bool) -> Service:
        """The service of one mode."""
        return self.training if training else self.inference

    def serving(self, *, training: bool) -> Implementation | None:
        """The kernel that may serve in this mode, checked or still to be; `None`: the original does."""
        service = self.training if training else self.inference
        kernel = service.choice.implementation
        if self.away or kernel is None or service.standing == "refused" or (training and not kernel.backward):
            return None  # planned or not: without a backward nothing is ever live in training
        if self.inside is not None and self.inside.serving(training=training) is not None:
            return None
        return kernel

    def due(self, every: int | None, *, training: bool, gradients: bool) -> bool:
        """Whether this call is to be checked: no verdict yet, or, with `every`, the n-th one is up again."""
        service = self.training if training else self.inference
        if service.standing == "open":
            return gradients or not service.forward_seen
        return service.standing == "accepted" and bool(every) and self.calls % (every or 1) == 0

    def count(self, *, by_kernel: bool) -> None:
        """One more call."""
        if by_kernel:
            self.by_kernel += 1
        else:
            self.by_original += 1

    def now(self) -> Outcome:
        """The outcome as it stands after the calls so far."""
        if self.away:
            return Kept(self.site, next(iter(self.away.values())))
        inference, training = self._now(training=False), self._now(training=True)
        if inference.implementation is None and training.implementation is None:
            reason = self.inference.reason or self.training.reason or self._why_inside()
            return Kept(self.site, reason, (*dict.fromkeys((*inference.passed, *training.passed)),))
        return Swap(self.site, inference, training)

    def _now(self, *, training: bool) -> Choice:
        now = self.service(training=training).now()
        if now.implementation is not None and self.inside is not None and self.inside.serving(training=training) is not None:
            return Choice(None)  # nothing was passed over: the kernel around it does its work
        return now

    def _why_inside(self) -> str:
        return f"inside {self.inside.site.layer}, which is swapped" if self.inside is not None else ""


class Slot:
    """One swapped module: what it was, what may serve it, and how its kernels are checked."""

    __slots__ = (
        "after", "base", "classes", "compiled", "conduct", "counting", "every", "leftover", "lock", "parts", "place",
        "prover", "ref", "watched",
    )  # fmt: skip

    def __init__(
        self,
        base: type[nn.Module],
        parts: tuple[Part, ...],
        prover: Prover,
        conduct: Conduct,
        *,
        every: int | None,
        compiled: bool,
        classes: dict[Any, Any],
    ) -> None:
        self.base, self.parts, self.prover, self.conduct = base, parts, prover, conduct
        self.every, self.compiled = every, compiled
        self.lock, self.counting = threading.RLock(), False
        self.leftover: Any = None  # an instance attribute `forward` that only hid the class's own; put back by undo
        self.place: Place = parts[0].site.device, parts[0].site.dtype
        self.classes = classes  # of all that was installed with this; keeps both modes' alive, for compiled code guards on them
        self.ref: weakref.ref[nn.Module] | None = None
        self.watched: frozenset[str] = frozenset()  # submodules that a kernel reads into
        self.after: type[Any] | None = None  # a norm's: the class of the layers that it may come after; see `ahead`

    @property
    def module_part(self) -> Part | None:
        """The outcome for the module's forward."""
        for part in self.parts:
            if part.swap.site.kind == "module":
                return part
        return None

    @property
    def function_parts(self) -> tuple[Part, ...]:
        """The outcomes for functions that the forward looks up."""
        return tuple(p for p in self.parts if p.site.kind == "function")

    def whereabouts(self, module: nn.Module, move: Callable[[Any], Any] | None = None) -> Place:
        """Where the module's tensors are. One without tensors is where `move` would take a tensor from where it was."""
        tensor = next((t for held in (module.parameters(), module.buffers()) for t in held if t.is_floating_point()), None)
        if tensor is None and move is not None:
            import torch

            device, dtype = self.place
            device = self.parts[0].site.device if device == "meta" else device  # nothing moves out of meta
            tensor = move(torch.empty(0, device=device, dtype=getattr(torch, dtype.removeprefix("torch."))))
        return self.place if tensor is None else (str(tensor.device), str(tensor.dtype))

    def twin(self) -> Slot:
        """The same knowledge for a copy of the module, from here on on its own."""
        parts = tuple(
            Part(
                p.swap,
                dataclasses.replace(p.inference),
                dataclasses.replace(p.training),
                dict(p.away),
                required=p.required,
                norms=p.norms,
            )
            for p in self.parts
        )
        for mine, theirs in zip(parts, self.parts, strict=True):
            mine.inside = parts[self.parts.index(theirs.inside)] if theirs.inside is not None else None
        twin = Slot(self.base, parts, self.prover, self.conduct, every=self.every, compiled=self.compiled, classes=self.classes)
        twin.place, twin.watched, twin.after = self.place, self.watched, self.after
        return twin


# -- where to find it ---------------------------------------------------------------------------------------------

# By identity: some modules define equality. An entry goes when its module goes.
_SLOTS: dict[int, tuple[weakref.ref[Any], Slot]] = {}


def find(module: object) -> Slot | None:
    """What is known about this module; `None` for one that is not swapped, or a copy that was made behind our back."""
    entry = _SLOTS.get(id(module))
    return entry[1] if entry is not None and entry[0]() is module else None


def remember(module: nn.Module, slot: Slot) -> None:
    """Attach `slot` to `module`; a DataParallel replica shares that of its source."""
    key = id(module)
    ref = weakref.ref(module, lambda gone: _forget_ref(key, gone))
    _SLOTS[key] = ref, slot
    if slot.ref is None:
        slot.ref = ref


def _forget_ref(key: int, gone: weakref.ref[Any]) -> None:
    entry = _SLOTS.get(key)
    if entry is not None and entry[0] is gone:  # not a newer module that got the same address
        del _SLOTS[key]


def forget(module: nn.Module) -> None:
    """The module is plain again."""
    _SLOTS.pop(id(module), None)
