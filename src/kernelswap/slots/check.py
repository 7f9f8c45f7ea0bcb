"""The first real call of a kernel, beside the model's own run: which one answers, and what is remembered of it.

Where gradients may be wanted, the check runs aside and the call is answered by the implementation that will serve from
now on, run once more in the open: what autograd and gradient checkpointing record is then exactly what every later call,
and the recomputation of this one, records. Elsewhere the check's own output is the answer.

A training call that wants no gradients (the first pass of reentrant checkpointing, a frozen layer) proves the forward
only: the kernel answers such calls, and the verdict stays open for the first call that does want them.

Nothing is compared, and the original serves, where there are no numbers to compare: under torch.func transforms, with
fake or meta tensors, while a CUDA graph is captured. The verdict stays open.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Required
from ..types import Implementation, Run, Verdict
from . import classes, forwards, fused, rebuild
from .state import Part, Place, Slot

if TYPE_CHECKING:
    import torch.nn as nn

Function = Callable[..., Any]


class Conduct:
    """How swapped modules behave; `bypass(module, reads)` says why a kernel that reads these must step aside."""

    def __init__(self, bypass: Callable[[nn.Module, Iterable[str]], str | None]) -> None:
        self.bypass = bypass
        self.inside = threading.local()  # `.a_check`, while this thread runs one

    def first_call(self, slot: Slot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve one call of a module that has a kernel with an open verdict, or whose calls are watched or counted."""
        part, original = slot.module_part, slot.base.forward
        if part is not None and part.serving(training=module.training) is not None:
            return self._serve(slot, part, module, original, (module, *args), kwargs, lambda: classes.unchecked(slot, module))
        names = {
            one.site.name: self._stand_in(slot, one, module)
            for one in slot.function_parts
            if one.serving(training=module.training) is not None
        }
        return (rebuild.rebuilt(fused.opened(original, names), names) if names else original)(module, *args, **kwargs)

    def moved(self, slot: Slot, module: nn.Module, place: Place) -> None:
        """Verdicts hold for a dtype and a device: ask for them again. A kernel chosen for another type of device rests."""
        slot.place = place
        kind = place[0].partition(":")[0]
        for part in slot.parts:
            chosen_for = part.site.device.partition(":")[0]
            part.away.pop("moved", None)
            if kind != chosen_for:
                part.away["moved"] = f"was chosen for {chosen_for}, and the module has moved to {kind} since; swap again"
            for service in (part.inference, part.training):
                if slot.every is not None:
                    service.reopen()
        classes.place(slot, module)

    def reconsider(self, slot: Slot, module: nn.Module) -> None:
        """What a kernel reads may be wrapped by now, or unwrapped again."""
        for part in slot.parts:
            why = self.bypass(module, part.reads)
            part.away.pop("bypass", None)
            if why is not None:
                part.away["bypass"] = why
        classes.place(slot, module)

    def _stand_in(self, slot: Slot, part: Part, module: nn.Module) -> Function:
        """What one call of the module's forward finds instead of the function."""
        original = rebuild.found(fused.opened(slot.base.forward, [part.site.name]), part.site.name)
        training = module.training

        def settled() -> Function:
            kernel = part.serving(training=training)
            return original if kernel is None else forwards.guarded_function(forwards.Kernel.of(kernel, part.norms), original)

        def function(*args: Any, **kwargs: Any) -> Any:
            return self._serve(slot, part, module, original, args, kwargs, settled)

        return function

    def _serve(
        self,
        slot: Slot,
        part: Part,
        module: nn.Module,
        original: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        settled: Callable[[], Function],
    ) -> Any:
        """`args` include the module where the site is one."""
        output = UNANSWERED
        gradients = forwards.wants_gradients((*args, kwargs))
        if part.due(slot.every, training=module.training, gradients=gradients):
            output = self._check(slot, part, module, original, args, kwargs, gradients=gradients)
        part.calls += 1
        if output is not UNANSWERED:
            return output
        served = settled()
        if slot.counting and part.site.kind == "function":  # a module's forward counts itself
            part.count(by_kernel=served is not original and getattr(served, "serving", _always)(*args, **kwargs))
        return served(*args, **kwargs)

    def _check(
        self,
        slot: Slot,
        part: Part,
        module: nn.Module,
        original: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        gradients: bool,
    ) -> Any:
        """The output, or `UNANSWERED`: whatever serves from now on is to answer."""
        if getattr(self.inside, "a_check", False):
            return original(*args, **kwargs)  # called by a check of this or another module: the plain model is the measure
        with slot.lock:  # a second thread waits here, and finds the verdict
            service = part.service(training=module.training)
            kernel = part.serving(training=module.training)
            if kernel is None or not part.due(slot.every, training=module.training, gradients=gradients):
                return UNANSWERED
            if (
                nothing_to_compare((args, kwargs))
                or (gradients and not kernel.backward)
                or not getattr(kernel.forward, "serving", _always)(*args, **kwargs)  # a call of a size that the original serves
            ):
                part.count(by_kernel=False)
                return original(*args, **kwargs)
            self.inside.a_check = True
            try:
                output, verdict = self._verdict(slot, part, module, original, kernel, args, kwargs, gradients=gradients)
            finally:
                self.inside.a_check = False
            service.settle(verdict, whole=gradients or not module.training)
            source = slot.ref() if slot.ref is not None else None  # the module may be a replica of it
            for one in (module, source):
                if one is not None:
                    classes.place(slot, one)
        if part.required and not verdict.accepted:
            raise required(part, kernel, verdict)
        if output is not UNANSWERED and slot.counting:
            part.count(by_kernel=verdict.accepted)
        return output

    def _verdict(
        self,
        slot: Slot,
        part: Part,
        module: nn.Module,
        original: Function,
        kernel: Implementation,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        gradients: bool,
    ) -> tuple[Any, Verdict]:
        served = forwards.guarded_function(forwards.Kernel.of(kernel, part.norms), original)
        if part.norms and not getattr(served, "serving", _always)(*args, **kwargs):
            found = (fused.obstacle(norm, part.site.name) for norm in args[: len(part.norms)])
            why = next(filter(None, found), "it is given tensors or norms of another kind")
            return UNANSWERED, Verdict(accepted=False, reason=f"cannot take the place of the statements: {why}")
        run = Run(training=gradients, compiled=slot.compiled)  # what can be looked at, whatever the module's mode
        given = args[1:] if part.site.kind == "module" else args
        in_the_open = gradients or module.training or bool(modes())
        anew = slot.every == 1 or part.service(training=module.training).standing == "accepted"  # as `check=` picked it
        known = getattr(slot.prover, "known", None)
        earlier = None if anew or known is None else known(part.site, module, original, kernel, run, given, kwargs)
        if earlier is not None:  # nothing to run aside: the call itself is the only one
            return (
                (UNANSWERED, earlier) if in_the_open or not earlier.accepted else _tried(kernel, original, args, kwargs, earlier)
            )
        try:
            with aside(slot.place[0]):
                more = {"anew": True} if anew else {}
                output, verdict = slot.prover.first_call(part.site, module, original, kernel, run, given, kwargs, **more)
        except Exception as e:  # noqa: BLE001  # a kernel, or a check, may raise anything; the reason is kept below
            answer = original(*args, **kwargs)  # raises in turn what the caller did wrong, and then nothing is decided
            return answer, Verdict(accepted=False, reason=f"raised {type(e).__name__} while being checked: {e}")
        return (UNANSWERED if in_the_open else output), verdict


def _tried(
    kernel: Implementation, original: Function, args: tuple[Any, ...], kwargs: dict[str, Any], verdict: Verdict
) -> tuple[Any, Verdict]:
    """The kernel's answer under an accepting verdict; when it raises, the original's and a refusal."""
    try:
        return kernel.forward(*args, **kwargs), verdict
    except Exception as e:  # noqa: BLE001  # a kernel may raise anything: the original answers, and the reason is kept
        why = f"raises {type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return original(*args, **kwargs), Verdict(accepted=False, reason=why, key=verdict.key)


def required(part: Part, kernel: Implementation, verdict: Verdict) -> Required:
    """The kernel of a site that `require=` names was refused just now."""
    spec = str(kernel.origin.candidate.requirement) if kernel.origin is not None else kernel.layer
    return Required(
        f"{part.site.path or 'the model itself'} ({part.site.layer}): {spec} was refused at this call: {verdict.reason}",
        asked=f"require={part.site.layer!r}, and this is its first real call, or one that is checked again",
        todo="The original serves it from now on: call again to go on without the kernel, or take the name out of `require`.",
    )


def _always(*_: Any, **__: Any) -> bool:
    return True


UNANSWERED = object()
_WITHOUT_NUMBERS = {"FakeTensorMode", "ProxyTorchDispatchMode", "FunctionalTensorMode"}


def modes() -> list[Any]:
    """Dispatch modes that look on: selective checkpointing, a FLOP counter, ..."""
    from torch.utils import _python_dispatch

    return list(_python_dispatch._get_current_dispatch_mode_stack())  # noqa: SLF001  # there is no public way to ask


def nothing_to_compare(values: Any) -> bool:
    """Whether the tensors have no numbers, or the check could not read them here."""
    import torch

    if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001  # inside grad, vmap, jvp, ...
        return True
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]  # torch's own
        return True
    if any(type(mode).__name__ in _WITHOUT_NUMBERS for mode in modes()):
        return True
    return any(t.is_meta or type(t).__name__ in {"FakeTensor", "FunctionalTensor"} for t in _tensors(values, torch.Tensor))


def _tensors(value: Any, kind: type[Any]) -> Iterator[Any]:
    if isinstance(value, kind):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one, kind)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one, kind)


@contextlib.contextmanager
def aside(device: str) -> Iterator[None]:
    """Out of sight of gradient checkpointing and dispatch modes, and without a trace in the random number generators."""
    import torch
    from torch.utils import _python_dispatch

    kind, _, index = device.partition(":")
    accelerated = kind not in {"cpu", "meta"} and hasattr(torch, kind)
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            torch.random.fork_rng([int(index or 0)], device_type=kind) if accelerated else torch.random.fork_rng([])
        )
        if modes():
            stack.enter_context(_python_dispatch._disable_current_modes())  # noqa: SLF001  # as torch's own checkers do
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        yield


def _same(tensor: Any) -> Any:
    return tensor
