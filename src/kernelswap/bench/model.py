"""`kernelswap bench MODEL`: every candidate of every site, by size of call; then the whole model with what won, against itself without."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..proof.speed import Entry, Speeds, speedup
from ..types import Kept, Mode, Outcome, Swap
from . import job, kinds

if TYPE_CHECKING:
    from ..api import Swapper
    from ..proof.contest import Contest
    from ..types import Progress
    from .subject import Subject

SHARE = 0.6  # of the time is for the candidates, the rest for the whole model
ORIGINAL = "the original"
ATTENTION = "attention"


@dataclass(frozen=True)
class Lap:
    """One candidate at one size of call. Times are seconds per call."""

    candidate: str
    size: str
    speedup: float | None
    """Times faster than the original, the median over the turns; None: it could not be timed."""
    noise: float | None
    """The share that a difference must exceed to count."""
    seconds_original: float | None
    seconds: float | None
    wins: bool
    """It beats the original by more than the noise."""
    reason: str


@dataclass(frozen=True)
class Race:
    """One kind of site in one mode."""

    layer: str
    original: str
    width: str
    count: int
    dtype: str
    device: str
    mode: str
    unit: str
    """What the size of a call is counted in: `row`, `element`."""
    sizes: tuple[str, ...]
    laps: tuple[Lap, ...]
    serves: tuple[tuple[str, str, float | None], ...]
    """As `Choice.measured`."""
    passed: tuple[tuple[str, str], ...]
    """Candidates that could not take part, with the reason."""


@dataclass
class Report:
    """What was found: the candidates, and the whole model (None where nothing won, or nobody asked)."""

    races: tuple[Race, ...]
    measured: int
    known: int
    """Measurements that were kept from before."""
    left: int
    """Not measured: the time was up. The same command goes on."""
    whole: job.Report

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        counts = {"measured": self.measured, "known": self.known, "left": self.left}
        return {**counts, "candidates": [asdict(race) for race in self.races], "model": self.whole.to_json()}


def run(  # noqa: PLR0913  # what a user may want, each under its name
    subject: Subject,
    swapper: Swapper,
    *,
    device: str = "cpu",
    new_tokens: int = 16,
    seconds: float = 120.0,
    train: bool = True,
    compile: bool = True,  # noqa: A002  # the word that users know
    hub: bool = False,
    attention: bool = False,
    use: Mapping[str, Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Candidates first, for `SHARE` of `seconds` or less; then the model as it is against the model with what won.

    `use`: kernels of the caller's by layer, `attention` among them; they come before those of the table.

    The model is as it was afterwards, also when something raises half-way.
    """
    mode = None if train else Mode.INFERENCE
    tell = progress or (lambda *_: None)
    given = dict(use or {})
    named = {ATTENTION: given.pop(ATTENTION)} if ATTENTION in given else {}
    wanted: dict[str, Any] = {"hub": hub, "attention": attention or bool(named) or None, "table": given or None, "prefer": named}
    contest = swapper.measure(subject.model, seconds=SHARE * seconds, mode=mode, compile=compile, progress=progress, **wanted)
    swap = functools.partial(swapper.swap, choose="measured", **wanted)
    rest = (1 - SHARE) * seconds
    whole = job.Job(subject, swap, device, new_tokens, rest / 2 if train else rest, tell, mode)
    try:
        whole.before()
        whole.swap()
        if whole.report.swapped:
            whole.compare()
            if train:
                whole.train(rest / 2)
    finally:
        whole.undo()
    whole.after()
    races = tuple(_races(contest, subject))
    laps = sum(len(race.laps) for race in races)
    return Report(races, contest.measured, laps - contest.measured, contest.left, whole.report)


def _races(contest: Contest, subject: Subject) -> list[Race]:
    found = kinds.group(contest.outcomes, subject.model)
    where = {(o.site.path, o.site.layer, o.site.name): (kind, o) for kind in found for o in kind.outcomes}
    races = []
    for entry in contest.speeds.entries.values():
        kind, outcome = where.get((entry.site.path, entry.site.layer, entry.site.name), (None, None))
        if kind is None or outcome is None:
            continue
        laps = tuple(_laps(contest.speeds, entry))
        choice = outcome.serving(training=entry.run.training) if isinstance(outcome, Swap) else None
        taking_part = {spec for spec, _ in entry.candidates}
        races.append(
            Race(
                layer=kind.key[0],
                original=kind.key[1],
                width=kind.key[2],
                count=len(kind.sites),
                dtype=entry.site.dtype.removeprefix("torch."),
                device=entry.site.device,
                mode="training" if entry.run.training else "inference",
                unit=entry.course.unit,
                sizes=entry.course.names,
                laps=laps,
                serves=choice.measured if choice is not None else (),
                passed=tuple(
                    (spec, why) for spec, why in _passed(outcome, training=entry.run.training) if spec not in taking_part
                ),
            )
        )
    return races


def _passed(outcome: Outcome, *, training: bool) -> tuple[tuple[str, str], ...]:
    return outcome.passed if isinstance(outcome, Kept) else outcome.serving(training=training).passed


def _laps(speeds: Speeds, entry: Entry) -> list[Lap]:
    laps = []
    for bucket in range(len(entry.course.names)):
        for spec, candidate in entry.candidates:
            verdict = speeds.known(entry, candidate, bucket)
            if verdict is None:
                continue
            noise = dict(verdict.details).get("noise")
            laps.append(
                Lap(
                    spec,
                    entry.course.names[bucket],
                    speedup(verdict),
                    None if noise is None else float(noise),
                    verdict.seconds_original,
                    verdict.seconds_kernel,
                    verdict.accepted,
                    verdict.reason,
                )
            )
    return laps
