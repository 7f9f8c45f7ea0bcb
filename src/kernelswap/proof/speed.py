"""Which candidate is the fastest at a site, by the size of the call: measured once per machine, kept like verdicts.

A measurement is one candidate against the original, at one bucket of sizes: in turns, on fresh inputs, with cold caches, its
outputs verified first. It is kept under a digest over everything that could change it, signed like every verdict, as soon as
it is made: whoever is stopped half-way goes on from there. Choosing only reads what is kept. A candidate that does not beat
the original by more than the noise serves nowhere; where nothing is known yet, what the table puts first does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..types import Choice, Implementation, Run, Site, Verdict
from . import attention_course, keys, memory, samples
from .check import Check
from .compiled import SPEC, compiled
from .course import ELSEWHERE, Course, Plain, inputs_at_once
from .measure import INPUTS, compare
from .verdicts import Verdicts

SPEED_VERSION = 2
"""Raised when measuring changes: older measurements are void then."""
ORIGINAL = "the original"
UNKNOWN = "table"  # in an agreement: nothing is known, the table decides
_ITSELF = Verdict(accepted=True, reason="is the original, compiled: its outputs agreed where it was measured")

Accepted = Sequence[tuple[str, Implementation, Verdict]]
Agree = Callable[[str, Callable[[], Any]], Any]
"""`agree(about, decide)`: what the first process of a job decided about it."""


@dataclass(frozen=True)
class Entry:
    """One kind of site in one mode, and everything that may serve it."""

    site: Site
    original: Callable[..., Any]
    candidates: tuple[tuple[str, Implementation], ...]
    run: Run
    course: Course
    name: str = ""
    """Digest of everything that its measurements depend on, apart from the candidates and the sizes."""


class Speeds:
    """The `Chooser` over what was measured. Thread-safe as far as its store is.

    Args:
        store: where measurements are kept, beside the verdicts of checks.
        agree: lets the processes of a job decide once; None: this one is alone.
        compile: whether the original under `torch.compile` is a candidate.
        memo: what was made for former choices, so that equal ones share it: what is compiled, above all.
    """

    def __init__(
        self,
        store: Verdicts,
        *,
        agree: Agree | None = None,
        compile: bool = True,  # noqa: A002  # the word that users know
        memo: dict[Any, Implementation] | None = None,
    ) -> None:
        self.store, self.agree, self.compile = store, agree, compile
        self._memo = {} if memo is None else memo
        self.entries: dict[str, Entry] = {}
        """Every entry that a choice was made for, in that order."""
        self._verifier = Check(None, mode="always", contain="never")
        self._present: dict[tuple[str, int], bool] = {}

    # -- choosing --

    def choose(self, site: Site, module: nn.Module, original: Callable[..., Any], accepted: Accepted, run: Run) -> Choice:
        """As `types.Chooser`. Compiled runs are not measured module by module: there the table decides."""
        verdicts = {keys.digest(keys.kernel(i)): v for _, i, v in accepted}
        candidates = [(spec, i) for spec, i, _ in accepted]
        on = course(site, module, original, run)
        if on is None or run.compiled:
            first = _of_the_table(site, accepted)
            return Choice(first, verdict=verdicts[keys.digest(keys.kernel(first))]) if first is not None else Choice(None)
        name = keys.digest(*_parts(site, on, run))
        if self.compile and not site.row.statements:  # compiled code runs these as they stand, among their neighbours
            if name not in self._memo:
                self._memo[name] = compiled(site, original)
            candidates.append((SPEC, self._memo[name]))
        entry = self.entries[name] = Entry(site, original, tuple(candidates), run, on, name)
        named = {keys.digest(keys.kernel(i)): i for _, i in candidates}
        decide = functools.partial(self._decide, entry)
        decided = decide() if self.agree is None else self.agree(f"{name} {sorted(named)}", decide)
        first = _of_the_table(site, accepted)
        parts = [first if name == UNKNOWN else named.get(name) for name in decided]
        return self._served(entry, parts, verdicts)

    def _decide(self, entry: Entry) -> list[str]:
        """For each bucket the digest of what serves, `""` for the original, `UNKNOWN` where nothing was measured."""

        def one(bucket: int) -> str:
            if not self._is_absent(entry, bucket):
                return self._fastest(entry, bucket)
            like = entry.course.like(bucket)
            return UNKNOWN if like is None else one(like)

        return [one(bucket) for bucket in range(len(entry.course.names))]

    def _fastest(self, entry: Entry, bucket: int) -> str:
        known = [(self.known(entry, i, bucket), i) for _, i in entry.candidates]
        best, beaten = "", 0.0
        for verdict, implementation in known:  # in the order of the table: whoever comes later must win by more than the noise
            if verdict is None or not verdict.accepted:
                continue
            times, noise = speedup(verdict) or 0.0, float(dict(verdict.details).get("noise", 0.0))
            if times > beaten * (1 + noise):
                best, beaten = keys.digest(keys.kernel(implementation)), times
        return best or (UNKNOWN if not known or known[0][0] is None else "")

    def _served(self, entry: Entry, parts: Sequence[Implementation | None], verdicts: Mapping[str, Verdict]) -> Choice:
        passed = tuple((s, why) for s, i in entry.candidates if i not in parts and (why := self._said(entry, i)))
        used = [i for i in parts if i is not None]
        if not used:
            return Choice(None, passed or ((ORIGINAL, "nothing else may serve"),))
        lead = max(dict.fromkeys(used), key=used.count)
        verdict = verdicts.get(keys.digest(keys.kernel(lead))) or _ITSELF
        measured = tuple(
            (entry.course.names[b], next((s for s, i in entry.candidates if i is part), ""), self._speedup(entry, part, b))
            for b, part in enumerate(parts)
            if not self._is_absent(entry, b)
        )
        return Choice(self._mixture(entry, parts, lead), passed, verdict, measured)

    def _speedup(self, entry: Entry, part: Implementation | None, bucket: int) -> float | None:
        verdict = None if part is None else self.known(entry, part, bucket)
        return None if verdict is None else speedup(verdict)

    def _said(self, entry: Entry, candidate: Implementation) -> str:
        """What was measured of a candidate that serves nowhere."""
        names = entry.course.names
        found = [(name, v) for b, name in enumerate(names) if (v := self.known(entry, candidate, b)) is not None]
        found = [(name, v) for name, v in found if v.reason != ELSEWHERE] or found
        broken = next((v.reason for _, v in found if v.seconds_kernel is None), None)
        if broken is not None:
            return broken
        return ", ".join(f"{v.reason.partition(' ')[0]} on {name}" for name, v in found)

    def _mixture(self, entry: Entry, parts: Sequence[Implementation | None], lead: Implementation) -> Implementation:
        if all(p is lead for p in parts):
            return lead
        key = (entry.name, *(p and keys.digest(keys.kernel(p)) for p in parts))
        if key not in self._memo:  # equal modules share one: their classes, and what is compiled of them, are the same
            self._memo[key] = entry.course.mixture(parts, lead)
        return self._memo[key]

    # -- measuring --

    def known(self, entry: Entry, candidate: Implementation, bucket: int) -> Verdict | None:
        """What was measured, if anything was. `accepted`: it beats the original by more than the noise."""
        return self.store.get(self._key(entry, candidate, bucket))

    def missing(self) -> Iterator[tuple[Entry, str, Implementation, int]]:
        """What could be measured and was not: soonest what is worth knowing first, compiled originals last."""
        todo = [
            (spec == SPEC, entry.course.order.index(bucket), entry, spec, candidate, bucket)
            for entry in self.entries.values()
            for spec, candidate in entry.candidates
            for bucket in range(len(entry.course.names))
        ]
        for *_, entry, spec, candidate, bucket in sorted(todo, key=lambda t: t[:2]):
            if self.known(entry, candidate, bucket) is None and not self._is_absent(entry, bucket):
                yield entry, spec, candidate, bucket

    def measure(self, entry: Entry, candidate: Implementation, bucket: int, *, seconds: float) -> Verdict:
        """Time one candidate against the original, for about `seconds`, and keep what was found.

        A candidate that raises or whose output differs is refused, and that is kept too. Running out of memory is not.
        """
        site, run = entry.site, entry.run
        device = memory.indexed(torch.device(site.device))
        lasting = True
        with memory.quiet(device), torch.enable_grad() if run.training else torch.no_grad():
            try:
                verdict = self._measured(entry, candidate, bucket, seconds)
            except (MemoryError, torch.OutOfMemoryError):
                verdict, lasting = Verdict(accepted=False, reason="ran out of memory while it was measured"), False
            except Exception as e:  # noqa: BLE001  # a stranger's code may raise anything, and all of it means: not this one
                text = " ".join(str(e).split())[:200]
                verdict = Verdict(accepted=False, reason=f"raises {type(e).__name__}: {text}")
            finally:
                entry.course.release()
        about = dict(keys.about(candidate, site, device, run, None)) | {"tensors": entry.course.names[bucket]}
        details = (*verdict.details, *about.items())
        verdict = dataclasses.replace(verdict, key=self._key(entry, candidate, bucket), details=details)
        if lasting:
            self.store.put(verdict)
        return verdict

    def _measured(self, entry: Entry, candidate: Implementation, bucket: int, seconds: float) -> Verdict:
        course = entry.course
        given = course.given(bucket)
        if (why := course.differs(candidate, given, bucket, self._verifier)) is not None:
            return Verdict(accepted=False, reason=why)
        salts = iter(range(1, 1 << 20))
        found = compare(
            *course.sides(candidate, bucket),
            lambda: course.given(bucket, next(salts)),
            seconds=seconds,
            device=entry.site.device,
            cold=True,
            inputs=inputs_at_once(given, INPUTS),
        )
        word = "faster" if found.faster else "slower" if found.slower else f"within the noise of {found.noise:.0%}"
        return Verdict(
            accepted=found.faster,
            reason=f"{found.ratio:.2f}x as fast as the original on {course.names[bucket]}: {word}",
            seconds_original=found.median_a,
            seconds_kernel=found.median_b,
            details=(
                ("speedup", f"{found.ratio:.6g}"),
                ("noise", f"{found.noise:.3g}"),
                ("runs", str(found.runs)),
                ("bucket", course.names[bucket]),
                ("size", course.at[bucket]),
            ),
        )

    def _is_absent(self, entry: Entry, bucket: int) -> bool:
        """Whether no call of this site is of that size, or the size is too large to measure."""
        what = entry.name, bucket
        if what not in self._present:
            self._present[what] = entry.course.occurs(bucket)
        return not self._present[what]

    @staticmethod
    def _key(entry: Entry, candidate: Implementation, bucket: int) -> str:
        return keys.digest("speed", SPEED_VERSION, keys.kernel(candidate), bucket, entry.name)


def course(site: Site, module: nn.Module, original: Callable[..., Any], run: Run) -> Course | None:
    """The calls to measure a site with; None: there is no recipe for its inputs, so nothing can be measured."""
    if site.kind == "attention":
        return attention_course.of(site, module, original, run)
    return Plain(site, module, original, run) if site.row.probe in samples.BY_PROBE else None


def _of_the_table(site: Site, accepted: Accepted) -> Implementation | None:
    """What serves where nothing was measured: the first that is no rival, which serves where a measurement chose it and nowhere else."""
    rivals = {use.spec for use in site.row.rivals}
    return next((implementation for spec, implementation, _ in accepted if spec not in rivals), None)


def speedup(verdict: Verdict) -> float | None:
    """Times faster than the original, the median over the turns; None where nothing could be timed."""
    found = dict(verdict.details).get("speedup")
    return None if found is None else float(found)


def _parts(site: Site, on: Course, run: Run) -> tuple[Any, ...]:
    device = memory.indexed(torch.device(site.device))
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    return on.about(), site.dtype, keys.place(device), threads, keys.run_of(run)
