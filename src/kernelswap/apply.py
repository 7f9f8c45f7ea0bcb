"""A plan to a handle that can take it back. All or nothing: what fails, fails before the first write or is undone."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from . import locking, render
from .errors import KernelSwapError, PlanConflict, UndoConflict
from .report import text
from .report.facts import facts
from .report.observed import Observed
from .slots import ahead, attention, classes
from .slots import module as module_slot
from .slots.state import Part, Slot
from .types import Machine, Outcome, Prover, Site, Swap

if TYPE_CHECKING:
    import torch.nn as nn

    from .replay.replays import Replays


class Installed(Protocol):
    """Something that was put into a model and can be taken out again."""

    def conflict(self) -> str | None:
        """Why `restore` would not leave the model as it was, or `None`."""
        ...

    def restore(self) -> None:
        """Take it out. Twice is fine."""
        ...


def apply(
    model: nn.Module,
    outcomes: Sequence[Outcome],
    prover: Prover,
    *,
    check: str = "first-use",
    compile: bool = False,  # noqa: A002  # the word that users know
    machine: Machine | None = None,
    required: Collection[int] = (),
) -> Applied:
    """Write a plan into `model`.

    Args:
        model: the very model that was planned for.
        outcomes: of `plan`; every `Swap` is installed.
        prover: compares a kernel with the original, when `check` says.
        check: `first-use`: the first call of each module in each mode. `sample:N`: that, and every N-th call after it.
            `always`: every call. `off`: none.
        compile: the model is going to be compiled without an eager call before. Compiled code never checks, so there
            the proof on random tensors must do; without this, compiled code holds a kernel once an eager call has
            proven it.
        machine: what was planned for; the report shows it.
        required: numbers of outcomes. A call that refuses the kernel of one raises `Required`; the original serves calls after it.

    Raises:
        PlanConflict: two swaps for one place, or a module that is swapped already.
        KernelSwapError: `check` says nothing, or a path does not exist.
        Whatever a slot raises. In all cases the model is as it was.
    """
    every = how_often(check)
    swaps: dict[str, list[tuple[int, Swap]]] = {}
    settings: list[tuple[int, Swap]] = []
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, Swap):
            (settings if outcome.site.kind == "attention" else swaps.setdefault(outcome.site.path, [])).append((i, outcome))
    modules = {path: _module(model, path) for path in swaps}
    if len({id(m) for m in modules.values()}) < len(modules):
        raise PlanConflict("two paths of the plan lead to one module", todo="Plan with the sites that `sites.find` gives.")
    applied = Applied(tuple(outcomes), model, machine)
    shared: dict[Any, Any] = {}
    try:
        for i, swap in settings:
            switched = attention.install(model, swap, prover, every=every, compiled=compile)
            switched.part.required = i in required
            applied.add(switched)
            applied.follow({i: switched.part})
        for path, numbered in swaps.items():
            given = [s for _, s in numbered]
            found = _recordings(given[0])
            if found is not None:  # it proves itself, at each recording
                slot = module_slot.install(modules[path], given, prover, every=None, compiled=compile)
                applied.add(_Recorded(model, found))
            else:
                slot = module_slot.install(modules[path], given, prover, every=every, compiled=compile, shared=shared)
            for (i, _), part in zip(numbered, slot.parts, strict=True):
                part.required = i in required
            applied.add(_OnModule(slot))
            applied.follow({i: part for (i, _), part in zip(numbered, slot.parts, strict=True)})
        applied.join()
    except BaseException:
        applied.undo()
        raise
    return applied


def how_often(check: str) -> int | None:
    """What `check` of `apply` means: None never, 0 once, n every n-th call.

    Raises:
        KernelSwapError: it says nothing.
    """
    known = {"first-use": 0, "always": 1, "off": None}
    if check in known:
        return known[check]
    match = re.fullmatch(r"sample:([1-9][0-9]*)", check)
    if match is None:
        raise KernelSwapError(f"check={check!r} says nothing", todo="Use 'first-use', 'always', 'sample:100' or 'off'.")
    return int(match[1])


def _module(model: nn.Module, path: str) -> nn.Module:
    module: nn.Module | None = model
    for name in path.split(".") if path else ():
        module = None if module is None else module._modules.get(name)  # noqa: SLF001  # `get_submodule` takes ten times as long
    if module is None:
        raise KernelSwapError(f"the model has no module {path}", todo="Plan for this model again.")
    return module


def _recordings(swap: Swap) -> Replays | None:
    kernel = swap.inference.implementation
    return None if kernel is None else getattr(kernel.forward, "replays", None)


class _Recorded:
    """The recordings of a model's steps, and their memory."""

    def __init__(self, model: nn.Module, replays: Replays) -> None:
        from .replay import replays as recordings  # needs torch when it is imported; this file must not

        self.model, self.replays = weakref.ref(model), recordings.attach(model, replays)

    def conflict(self) -> str | None:
        return None

    def restore(self) -> None:
        self.replays.clear()
        model = self.model()
        if model is not None:
            from .replay import replays as recordings  # same

            recordings.detach(model)


class _OnModule:
    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def conflict(self) -> str | None:
        return module_slot.conflict(self.slot)

    def restore(self) -> None:
        module_slot.restore(self.slot)


class Applied:
    """What was done to one model. `undo()`, or use as a context manager."""

    def __init__(self, outcomes: tuple[Outcome, ...], model: nn.Module | None = None, machine: Machine | None = None) -> None:
        self._planned, self._machine = outcomes, machine
        self._model = weakref.ref(model) if model is not None else lambda: None
        self._parts: dict[int, Part] = {}
        self._installed: list[Installed] = []
        self._counted = False
        self.lock_folder: Path | None = None
        """The directory whose lock names what serves, where there is one."""

    def add(self, installed: Installed) -> None:
        """Take over something that is in the model now; `undo` takes it out, last in first."""
        self._installed.append(installed)

    def follow(self, parts: Mapping[int, Part]) -> None:
        """The outcome of that number is what has become of it in the model."""
        self._parts.update(parts)

    def join(self) -> None:
        """Let norms beside a list of layers have what the last of these makes ahead."""
        model = self._model()
        for slot, module in self._slots():
            part = slot.module_part
            if model is not None and part is not None and part.site.row.probe == "rows":
                slot.after = ahead.behind(_module(model, part.site.path.rpartition(".")[0]))
                if slot.after is not None:
                    classes.place(slot, module)

    # -- what is so ----------------------------------------------------------------------------------------------

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """One for each site, as of now: a kernel that was refused at its first call is not a swap any more."""
        return tuple(self._parts[i].now() if i in self._parts else o for i, o in enumerate(self._planned))

    @property
    def refusals(self) -> tuple[tuple[Site, str], ...]:
        """Kernels that a real call refused, with the reason; one entry for each mode."""
        return tuple(
            (part.site, service.reason)
            for part in self._parts.values()
            for service in (part.inference, part.training)
            if service.standing == "refused"
        )

    @property
    def calls(self) -> dict[str, int]:
        """Calls that a kernel served while `counting()` was open, by module path."""
        return self._sum("by_kernel")

    @property
    def calls_of_original(self) -> dict[str, int]:
        """Calls of swapped sites that the original served all the same: a mode or a call that the kernel cannot serve."""
        return self._sum("by_original")

    def _sum(self, which: str) -> dict[str, int]:
        sums: dict[str, int] = {}
        for part in self._parts.values():
            sums[part.site.path] = sums.get(part.site.path, 0) + getattr(part, which)
        return sums

    @property
    def report(self) -> dict[str, Any]:
        """Everything as plain JSON values; see `report.facts.facts`. `calls` once counted, times only in `facts`."""
        return self.facts()

    def facts(self, *, name: str = "", observed: Observed | None = None, lock: str | Path | None = None) -> dict[str, Any]:
        """`report`, with a name for the model, with what a run measured, and with the lock of a directory (else: `swap(lock=)`).

        Raises:
            BadMetadata: the lock does not parse.
        """
        folder = self.lock_folder if lock is None else Path(lock)
        return facts(
            self.outcomes,
            graphs=self._graphs(),
            model=self._model(),
            name=name,
            machine=self._machine,
            refusals=self.refusals,
            calls=self.calls if self._counted else None,
            calls_of_original=self.calls_of_original if self._counted else None,
            observed=observed,
            lock=locking.there(folder) if folder is not None else None,
        )

    def html(self, path: str | Path, *, name: str = "", observed: Observed | None = None, lock: str | Path | None = None) -> Path:
        """Write the report as one page that needs no network, to read in a browser and to send to somebody. Returns its path.

        Args:
            path: of a file; one that is there is replaced.
            name: what to call the model; by default its class.
            observed: what a run measured (`kernelswap explain MODEL --html FILE --measure` makes one).
            lock: a directory whose lock is compared with what serves; by default that of `swap(lock=)`.

        Raises:
            MissingDependency: Jinja or matplotlib is not installed.
            OSError: the file cannot be written.
        """
        from .report.page import page

        path = Path(path)
        path.write_text(page(self.facts(name=name, observed=observed, lock=lock)), encoding="utf-8")
        return path

    def explain(self, *, long: bool = False) -> str:
        """What serves each site and why; `long`: module by module, then refusals, the kernels with their evidence, the machine."""
        short = render.outcomes(self.outcomes, long=long, calls=self.calls if self._counted else None)
        graphs = self._graphs()
        if graphs is not None and not long:
            short = "\n".join([short, *text.graphs(graphs)])
        return f"{short}\n\n{text.sections(self.facts())}" if long else short

    def _graphs(self) -> dict[str, Any] | None:
        return next((one.replays.facts() for one in self._installed if isinstance(one, _Recorded)), None)

    # -- what can be done ----------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Restore every module, last swap first. Twice is fine, and what has left the model is left alone.

        Raises:
            UndoConflict: something wrapped a module after the swap; nothing was changed. Undo that first.
        """
        conflicts = [why for one in self._installed if (why := one.conflict()) is not None]
        if conflicts:
            raise UndoConflict("\n".join(conflicts), todo="Undo what wrapped these first, then this swap.")
        while self._installed:
            self._installed[-1].restore()
            self._installed.pop()

    @contextlib.contextmanager
    def counting(self) -> Iterator[Applied]:
        """Count calls while open, into `calls`; starts at zero. Costs a frame a call for as long as it is open."""
        for part in self._parts.values():
            part.by_kernel = part.by_original = 0
        self._counted = True
        self._count(on=True)
        try:
            yield self
        finally:
            self._count(on=False)

    def _count(self, *, on: bool) -> None:
        for one in self._installed:
            if isinstance(one, attention.Switched):
                one.meeting.counting = on
        for slot, module in self._slots():
            slot.counting = on
            classes.place(slot, module)

    def refresh(self) -> None:
        """Look again at what kernels read, after changes that nobody could see, and give every module its right class.

        Recorded steps are let go, too; the next ones are recorded anew.
        """
        for one in self._installed:
            if isinstance(one, _Recorded):
                one.replays.clear()
        for slot, module in self._slots():
            slot.conduct.reconsider(slot, module)

    @property
    def in_place(self) -> bool:
        """Whether `undo` would give something back."""
        return any(self.modules()) or any(not isinstance(one, _OnModule) for one in self._installed)

    def modules(self) -> Iterator[nn.Module]:
        """The modules that `undo` would give back."""
        for _, module in self._slots():
            yield module

    def _slots(self) -> Iterator[tuple[Slot, nn.Module]]:
        for one in self._installed:
            if isinstance(one, _OnModule):
                module = one.slot.ref() if one.slot.ref is not None else None
                if module is not None:
                    yield one.slot, module

    def __enter__(self) -> Applied:  # noqa: PYI034  # typing.Self is 3.11's
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.undo()

    def __repr__(self) -> str:
        now = self.outcomes
        return f"<Applied: {sum(isinstance(o, Swap) for o in now)} of {len(now)} sites swapped>"
