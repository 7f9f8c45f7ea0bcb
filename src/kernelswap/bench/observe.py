"""A short run of a model for its report: errors on real tensors site by site, times by kind and shape, shares of a step, calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from ..apply import Applied, apply
from ..proof import Check
from ..proof.inputs import count
from ..proof.real import positions, take
from ..report.observed import Observed, Refusal, Share, Speed, Step
from ..slots import fused, rebuild
from ..types import Machine, Outcome, Site
from . import ab, kinds

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

    from ..types import Progress
    from .subject import Subject

SECONDS = 12.0
ROWS = (1, 16, 128, 1024, 4096)
LARGEST = 1 << 24  # elements of a call that is timed: 64 MiB in float32
COPIED = 128 << 20  # bytes that are copied to see the bandwidth: beyond any cache
NEW = 8  # tokens that are generated while calls are counted
ROWWISE = frozenset({"rows", "gated_rows", "elementwise", "gated", "mlp", "rotary"})


def observe(
    subject: Subject,
    outcomes: Sequence[Outcome],
    machine: Machine,
    *,
    device: str = "cpu",
    seconds: float = SECONDS,
    progress: Progress | None = None,
) -> tuple[Applied, Observed]:
    """Run `subject` with `outcomes` (of a plan for its model) and without. The handle is applied, with calls counted.

    Every site is checked on the tensors that this run gives it, whatever was found before, and the outcomes of the handle
    carry these verdicts; a kernel that is refused here does not take part in the timing. The caller undoes.
    """
    tell = progress or (lambda *_: None)
    original = ab.twin(subject.model)
    tell("checking every site on real tensors", 0, 0)
    checked = apply(subject.model, outcomes, Check(None, machine, mode="always"), check="always")
    try:
        subject.generate(2)
        subject.forward()  # last: the verdicts that stay are those of the longest call
        found = checked.outcomes
        refusals = tuple(Refusal(site.path, site.layer, reason) for site, reason in checked.refusals)
    finally:
        checked.undo()
    tell("checking every site on real tensors", 1, 1)
    applied = apply(subject.model, found, Check(None, machine, mode="off"), check="off", machine=machine)
    try:
        groups = kinds.group(found, subject.model)
        before = _with(subject, original)
        calls = _record(before, groups)
        speeds = [*_phases(subject, groups, original, calls, seconds / 4, device, tell)]
        speeds += _shapes(groups, original, subject.model, calls, seconds / 4, device, tell)
        whole = ab.whole(subject, original, subject.model, seconds=seconds / 2, device=device, progress=progress)
        tell("where the time goes", 0, 0)
        shares = tuple(_shares(before, found, device))
        tell("where the time goes", 1, 1)
        with applied.counting():
            subject.generate(NEW)
    except BaseException:
        applied.undo()
        raise
    n = torch.get_num_threads()
    threads = f" with {n} {'thread' if n == 1 else 'threads'}" if device == "cpu" else ""
    calls_of = f" Calls are those of {NEW} generated tokens." if subject.kind == "causal" else ""
    how = f"Measured on {subject.tokens} tokens of text{threads}; medians of runs in which original and kernel take turns.{calls_of}"
    steps = tuple(Step(n, p.original.median, p.kernel.median, p.speedup, p.low, p.high) for n, p in whole.items())
    return applied, Observed(how, tuple(speeds), steps, shares, refusals, bandwidth(device))


def bandwidth(device: str = "cpu") -> float:
    """Bytes a second of copying memory, read and written counted each; the best of some runs."""
    a, b = (torch.empty(COPIED, dtype=torch.uint8, device=device).zero_() for _ in range(2))
    wait = ab.waiter(device)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        b.copy_(a)
        wait()
        best = min(best, time.perf_counter() - start)
    return 2 * COPIED / best


def _with(subject: Subject, model: nn.Module) -> Subject:
    return dataclasses.replace(subject, model=model)


def _record(subject: Subject, groups: Sequence[kinds.Kind]) -> dict[str, dict[kinds.Key, list[kinds.Call]]]:
    """A call of each kind in each phase, from the original."""
    if subject.kind == "encoder":
        return {"forward": kinds.record(subject.model, groups, subject.forward)}
    calls = kinds.record(subject.model, groups, lambda: subject.generate(2))
    return {
        "prefill": {key: seen[: len(seen) // 2] for key, seen in calls.items()},
        "decode": {key: seen[len(seen) // 2 :] for key, seen in calls.items()},
    }


# -- times --------------------------------------------------------------------------------------------------------


def _phases(
    subject: Subject,
    groups: Sequence[kinds.Kind],
    original: nn.Module,
    calls: dict[str, dict[kinds.Key, list[kinds.Call]]],
    seconds: float,
    device: str,
    tell: Progress,
) -> Iterator[Speed]:
    for row in kinds.measure(groups, original, subject.model, calls, seconds=seconds, device=device, progress=tell):
        for phase, pair in row.pairs.items():
            yield _speed(row.kind, phase, pair, calls[phase][row.kind.key][-1], None)


def _shapes(
    groups: Sequence[kinds.Kind],
    original: nn.Module,
    swapped: nn.Module,
    calls: dict[str, dict[kinds.Key, list[kinds.Call]]],
    seconds: float,
    device: str,
    tell: Progress,
) -> Iterator[Speed]:
    """Each kind whose rows do not depend on each other, at several numbers of rows taken from its longest call."""
    longest = next(iter(calls.values()))
    work = []
    for kind in groups:
        seen = longest.get(kind.key)
        if not kind.swapped or not seen or kind.sites[0].row.probe not in ROWWISE:
            continue
        for rows in ROWS:
            call = _resized(kind.sites[0], seen[-1], rows)
            if call is not None and all(t.numel() <= LARGEST for t in _tensors(call)):
                work.append((kind, rows, call))
    for done, (kind, rows, call) in enumerate(work):
        tell("timing by shape", done, len(work))
        before, after = kinds.sides(kind, original, swapped)
        with torch.no_grad():
            output = before(*call[0], **call[1])
            pair = ab.interleave(_bound(before, call), _bound(after, call), seconds=seconds / len(work), device=device)
        yield _speed(kind, f"{rows} rows" if rows > 1 else "1 row", pair, call, _traffic(kind, original, call, output))
    if work:
        tell("timing by shape", len(work), len(work))


def _bound(side: Callable[..., Any], call: kinds.Call) -> Callable[[], Any]:
    return lambda: side(*call[0], **call[1])


def _speed(kind: kinds.Kind, shape: str, pair: ab.Pair, call: kinds.Call, traffic: int | None) -> Speed:
    layer, target, _ = kind.key
    held = [t for t in _tensors(call) if t.is_floating_point()]
    return Speed(
        layer=layer,
        original=target,
        kernel=kind.serves,
        shape=shape,
        rows=_rows(kind.sites[0], held),
        seconds_original=pair.original.median,
        seconds_kernel=pair.kernel.median,
        speedup=pair.speedup,
        low=pair.low,
        high=pair.high,
        bytes=traffic,
        width=held[0].shape[-1] if held and held[0].ndim else None,
    )


def _rows(site: Site, held: Sequence[Tensor]) -> int:
    """Rows of a call; of a rotation, positions."""
    if site.row.probe == "rotary" and held and held[0].ndim == 4:
        return int(held[0].shape[2])
    return count(held)


def _resized(site: Site, call: kinds.Call, rows: int) -> kinds.Call | None:
    """The call with `rows` rows of its own, repeated as needed; None where that has no meaning."""
    args, kwargs = call
    leaves, spec = pytree.tree_flatten((args, kwargs))
    held = positions(site.row.probe, leaves)
    if not held:
        return None
    picked = take(site.row.probe, leaves, torch.arange(rows) % held)
    return None if picked is None else pytree.tree_unflatten(picked, spec)


def _traffic(kind: kinds.Kind, original: nn.Module, call: kinds.Call, output: Any) -> int | None:
    """Bytes that have to move; None for products of matrices."""
    site = kind.sites[0]
    if site.row.probe == "mlp":
        return None
    held = [*_tensors(call), *_tensors(output)]
    if site.kind == "module":
        held += original.get_submodule(site.path).parameters()
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in held}.values())


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


# -- shares -------------------------------------------------------------------------------------------------------


def _shares(subject: Subject, outcomes: Sequence[Outcome], device: str) -> Iterator[Share]:
    """Of every module and of every function that is a site, in each phase; the median of three runs. Subject: the original."""
    runs: dict[str, list[dict[tuple[str, str], tuple[float, int]]]] = {}
    with _clocks(subject.model, outcomes, device) as clock:
        for _ in range(4):
            for phase in _steps(subject):
                runs.setdefault(phase, []).append(clock.read())
    for phase, seen in runs.items():
        warm = seen[1:]
        for key in warm[0]:
            parts = sorted(one[key][0] / one["", ""][0] for one in warm if key in one and one["", ""][0])
            if key != ("", "") and parts:
                yield Share(*key, phase, parts[len(parts) // 2], warm[0][key][1])


def _steps(subject: Subject) -> Iterator[str]:
    """One step of each phase, its name after it has run."""
    with torch.no_grad():
        if subject.kind == "encoder":
            subject.model(**subject.inputs)
            yield "forward"
            return
        out = subject.model(**subject.inputs, use_cache=True)
        yield "prefill"
        token = out.logits[:, -1:].argmax(-1)
        subject.model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        yield "decode"


class _Clock:
    """Time inside each module and function since the last reading. On an accelerator by its own events."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.spans: dict[tuple[str, str], list[tuple[Any, Any]]] = {}
        self.open: list[Any] = []

    def now(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
            event.record()
            return event
        return time.perf_counter()

    def enter(self) -> None:
        self.open.append(self.now())

    def leave(self, key: tuple[str, str]) -> None:
        self.spans.setdefault(key, []).append((self.open.pop(), self.now()))

    def read(self) -> dict[tuple[str, str], tuple[float, int]]:
        """Seconds and calls by path and function; the model itself is `("", "")`."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            took = {k: (sum(a.elapsed_time(b) for a, b in v) / 1e3, len(v)) for k, v in self.spans.items()}
        else:
            took = {k: (sum(b - a for a, b in v), len(v)) for k, v in self.spans.items()}
        self.spans = {}
        return took


@contextmanager
def _clocks(model: nn.Module, outcomes: Sequence[Outcome], device: str) -> Iterator[_Clock]:
    """Hooks on every module, and a stand-in for every function that is a site; gone afterwards."""
    clock = _Clock(device)
    undo: list[Callable[[], Any]] = []

    def before(*_: Any) -> None:
        clock.enter()

    try:
        for path, module in model.named_modules():
            undo.append(module.register_forward_pre_hook(before).remove)
            undo.append(module.register_forward_hook(lambda *_, key=(path, ""): clock.leave(key)).remove)
        functions = [o.site for o in outcomes if o.site.kind == "function"]
        undo += [_time_function(model.get_submodule(site.path), site, clock) for site in functions]
        yield clock
    finally:
        for back in reversed(undo):
            back()


def _time_function(module: nn.Module, site: Site, clock: _Clock) -> Callable[[], Any]:
    function = rebuild.found(fused.opened(type(module).forward, [site.name]), site.name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        clock.enter()
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave((site.path, site.name))

    return kinds.stand_in(module, {site.name: timed})
