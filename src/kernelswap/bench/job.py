"""The main job: a model without kernels, with them, and without them again; everything measured in the one run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..types import Mode
from . import ab, kinds, state

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

    from ..apply import Applied
    from ..types import Progress
    from .subject import Subject

LONGEST, SHORTEST, IN_ALL = 15.0, 6.0, 38.0  # seconds: for timing at most, at least, and up to the end of it
ROUNDS = 3  # of taking losers out: an original that goes back in may hold modules that have kernels of their own
EXACT_LIMIT = 600_000_000  # parameters; beyond it a float64 copy of the whole model is too much to ask for


@dataclass
class Report:
    """What was found. Times in seconds, memory in bytes, errors as `ab.distance` has them."""

    model: str
    family: str
    parameters: int
    dtype: str
    device: str
    threads: int
    tokens: int
    new_tokens: int
    prompt: str
    rows: tuple[kinds.Measured, ...] = ()
    unclaimed: tuple[tuple[str, int], ...] = ()
    """Module classes with work of their own that no row of the table names, with their count."""
    kept_out: tuple[str, ...] = ()
    """Kinds that a kernel could serve and that lost the measurement, as `layer width: reason`."""
    whole: dict[str, ab.Pair] = field(default_factory=dict)
    error_original: float | None = None
    """Of the logits (or last hidden states) for the prompt, against the model in float64."""
    error_kernel: float | None = None
    memory_original: int | None = None
    memory_kernel: int | None = None
    step_memory_original: int | None = None
    """The same of a training step, where one was made."""
    step_memory_kernel: int | None = None
    text_original: str = ""
    text_kernel: str = ""
    same_until: int = 0
    """New tokens for which both agree."""
    swapped: int = 0
    sites: int = 0
    outputs_equal: bool = False
    """After the undo: logits and generated tokens equal those of before, bit for bit."""
    left_behind: tuple[str, ...] = ()
    """What differs after the undo: classes, `__dict__`, hooks; empty: nothing."""
    modules: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def undone(self) -> bool:
        """The model is as it was."""
        return self.outputs_equal and not self.left_behind

    def to_json(self) -> dict[str, Any]:
        """Plain values; one object per kind of site."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in {"rows", "whole"}}
        return {
            **plain,
            "undone": self.undone,
            "kinds": [_row_json(row) for row in self.rows],
            "whole": {name: _pair_json(pair) for name, pair in self.whole.items()},
        }


def _pair_json(pair: ab.Pair) -> dict[str, Any]:
    return dataclasses.asdict(pair)


def _row_json(row: kinds.Measured) -> dict[str, Any]:
    kind, (layer, target, width) = row.kind, row.kind.key
    return {
        "layer": layer,
        "original": target,
        "width": int(width) if width else None,
        "count": len(kind.sites),
        "swapped": kind.swapped,
        "serves": kind.serves or None,
        "reason": (row.loses if row.tried else kind.reason) or None,
        "tried": row.tried.serves if row.tried else None,
        "error_original": row.error("original"),
        "error_kernel": row.error("kernel"),
        "times": {phase: _pair_json(pair) for phase, pair in row.pairs.items()},
    }


def run(
    subject: Subject,
    swap: Callable[..., Applied],
    *,
    device: str = "cpu",
    new_tokens: int = 32,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Report:
    """`swap(model, **options)` is `Swapper.swap`; `seconds` is what the timing may take, a third of it for the kinds.

    Without `seconds`, `LONGEST`, or less where compiling took long, but `SHORTEST` at least.

    The model is as it was afterwards, also when something raises half-way.
    """
    job = Job(subject, swap, device, new_tokens, seconds, progress or (lambda *_: None))
    try:
        job.before()
        job.swap()
        if job.report.swapped:
            job.choose()
        if job.report.swapped:
            job.compare()
    finally:
        job.undo()
    job.after()
    return job.report


class Job:
    """The steps, in order; holds what one hands to the next. `mode`: what kernels are wanted for, as in `Swapper.swap`."""

    def __init__(
        self,
        subject: Subject,
        swapping: Callable[..., Applied],
        device: str,
        new_tokens: int,
        seconds: float | None,
        progress: Progress,
        mode: Mode | None = Mode.INFERENCE,  # proving backward passes, too, would take longer than all that follows
    ) -> None:
        import torch

        self.mode = mode
        self.subject, self.swapping, self.device, self.new_tokens = subject, swapping, device, new_tokens
        self.budget, self.progress = seconds or LONGEST, progress
        self.fixed = seconds is not None
        self.applied: Applied | None = None
        self.lost: dict[kinds.Key, kinds.Measured] = {}
        self.report = Report(
            model=subject.name,
            family=type(subject.model).__name__,
            parameters=subject.parameters,
            dtype=str(getattr(subject.model, "dtype", torch.float32)).removeprefix("torch."),
            device=device,
            threads=torch.get_num_threads(),
            tokens=subject.tokens,
            new_tokens=new_tokens if subject.kind == "causal" else 0,
            prompt=subject.prompt,
        )

    def undo(self) -> None:
        """Take it back, if anything is in."""
        if self.applied is not None:
            self.applied.undo()
            self.applied = None

    def before(self) -> None:
        """What the model is and answers, before anything."""
        with self.clock("original"):
            self.progress("running the original", 0, 0)
            self.state = state.take(self.subject.model)
            self.logits = self.subject.forward().clone()
            self.tokens = self.subject.generate(self.new_tokens).clone()
            self.report.text_original = self.text(self.tokens)
            self.report.memory_original = ab.peak(self.subject.forward, self.device)
            self.twin = ab.twin(self.subject.model)
            self.report.modules = len(self.state)
            self.progress("running the original", 1, 1)

    def swap(self, **options: Any) -> None:
        """The ordinary path; then one real run, whose tensors every kernel is checked on."""
        with self.clock("swap"):
            self.progress("finding, verifying and proving kernels", 0, 0)
            self.applied = self.swapping(self.subject.model, mode=self.mode, build="wait", progress=self.progress, **options)
            self.subject.generate(self.new_tokens)
            self.subject.forward()
            self.progress("finding, verifying and proving kernels", 1, 1)
            found = kinds.group(self.applied.outcomes, self.subject.model)
            self.report.rows = tuple(kinds.Measured(kind) for kind in found)
            self.report.swapped = sum(len(k.sites) for k in found if k.swapped)
            self.report.sites = sum(len(k.sites) for k in found)
            self.report.unclaimed = _unclaimed(self.subject.model, found)
        if not self.fixed:
            self.budget = max(SHORTEST, min(LONGEST, IN_ALL - sum(self.report.seconds.values())))

    def choose(self) -> None:
        """Measure each kind; where the kernel loses, the original goes back in, and what that uncovers is measured, too."""
        known: dict[kinds.Key, kinds.Measured] = {}
        with self.clock("kinds"):
            calls = self.record([row.kind for row in self.report.rows])
        for turn in range(1, ROUNDS + 1):
            new = [row.kind for row in self.report.rows if row.kind.swapped and row.kind.key not in known]
            if not new:
                break
            with self.clock("kinds"):
                known |= {m.kind.key: m for m in self.measure(new, calls, self.budget / 3 / turn)}
            lost = {m.kind.key: m for m in known.values() if m.loses}
            if lost.keys() - self.lost.keys():
                self.lost = lost
                self.undo()
                self.swap(skip=[name for m in lost.values() for name in m.kind.names])
        self.report.rows = tuple(_with(row.kind, known.get(row.kind.key)) for row in self.report.rows)
        self.report.kept_out = tuple(f"{' '.join(filter(None, k[::2]))}: {m.loses}" for k, m in self.lost.items())

    def measure(
        self, found: list[kinds.Kind], calls: dict[str, dict[kinds.Key, list[kinds.Call]]], seconds: float
    ) -> tuple[kinds.Measured, ...]:
        """Each kind, original and kernel in turns."""
        return kinds.measure(
            found, self.twin, self.subject.model, calls, seconds=seconds, device=self.device, progress=self.progress
        )

    def record(self, found: list[kinds.Kind]) -> dict[str, dict[kinds.Key, list[kinds.Call]]]:
        """A call of each kind in each phase, from the original."""
        original = dataclasses.replace(self.subject, model=self.twin)
        if self.subject.kind == "encoder":
            return {"forward": kinds.record(self.twin, found, original.forward)}
        calls = kinds.record(self.twin, found, lambda: original.generate(2))
        return {
            "prefill": {key: seen[: len(seen) // 2] for key, seen in calls.items()},
            "decode": {key: seen[len(seen) // 2 :] for key, seen in calls.items()},
        }

    def compare(self) -> None:
        """The whole model, both sides."""
        with self.clock("whole"):
            self.report.memory_kernel = ab.peak(self.subject.forward, self.device)
            self.report.whole = ab.whole(
                self.subject,
                self.twin,
                self.subject.model,
                seconds=self.budget * 2 / 3,
                device=self.device,
                progress=self.progress,
            )
        with self.clock("float64"):
            tokens = self.subject.generate(self.new_tokens)
            self.report.text_kernel = self.text(tokens)
            self.report.same_until = _agree(self.tokens, tokens) - (self.subject.tokens if self.subject.kind == "causal" else 0)
            if self.report.parameters <= EXACT_LIMIT and self.device in {"cpu", "cuda"}:
                self.progress("the float64 reference", 0, 0)
                exact = dataclasses.replace(self.subject, model=ab.exact(self.twin)).forward()
                self.report.error_original = ab.distance(self.logits, exact)
                self.report.error_kernel = ab.distance(self.subject.forward(), exact)
                self.progress("the float64 reference", 1, 1)

    def train(self, seconds: float) -> None:
        """Training steps, both sides, and what they need."""
        with self.clock("training"):
            model = self.subject.model
            self.report.step_memory_original = ab.peak(lambda: ab.step(self.subject, self.twin), self.device)
            self.report.step_memory_kernel = ab.peak(lambda: ab.step(self.subject, model), self.device)
            self.report.whole["training"] = ab.training(
                self.subject, self.twin, model, seconds=seconds, device=self.device, progress=self.progress
            )

    def after(self) -> None:
        """Undone: is it what it was?"""
        import torch

        with self.clock("undo"):
            same = torch.equal(self.subject.forward(), self.logits)
            self.report.outputs_equal = same and torch.equal(self.subject.generate(self.new_tokens), self.tokens)
            self.report.left_behind = tuple(state.differences(self.state, self.subject.model))

    def text(self, tokens: torch.Tensor) -> str:
        """The new tokens as text; empty for an encoder."""
        if self.subject.kind == "encoder":
            return ""
        return str(self.subject.tokenizer.decode(tokens[0, self.subject.tokens :]))

    def clock(self, step: str) -> _Clock:
        """Adds the time of a block to `report.seconds[step]`."""
        return _Clock(self.report.seconds, step)


def _with(kind: kinds.Kind, was: kinds.Measured | None) -> kinds.Measured:
    if was is None:
        return kinds.Measured(kind)
    return kinds.Measured(kind, was.pairs, was.kind if was.kind.swapped and not kind.swapped else None)


class _Clock:
    def __init__(self, into: dict[str, float], step: str) -> None:
        self.into, self.step = into, step

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.into[self.step] = self.into.get(self.step, 0.0) + time.perf_counter() - self.start


def _agree(a: torch.Tensor, b: torch.Tensor) -> int:
    """Leading elements of the first row that are equal."""
    n = min(a.shape[-1], b.shape[-1])
    unequal = (a.reshape(-1, a.shape[-1])[0, :n] != b.reshape(-1, b.shape[-1])[0, :n]).nonzero()
    return int(unequal[0, 0]) if len(unequal) else n


def _unclaimed(model: nn.Module, found: tuple[kinds.Kind, ...]) -> tuple[tuple[str, int], ...]:
    """Classes that are no site: of leaves, and of attention, which computes between its leaves."""
    claimed = {site.path for kind in found for site in kind.sites if site.kind == "module"}
    counted: dict[str, int] = {}
    for path, module in model.named_modules():
        name = type(module).__name__
        if path not in claimed and (name.endswith("Attention") or not any(True for _ in module.children())):
            counted[name] = counted.get(name, 0) + 1
    return tuple(sorted(counted.items()))
