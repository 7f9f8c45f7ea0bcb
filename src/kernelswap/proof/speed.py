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
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import sites
from ..slots import function, fused
from ..types import Choice, Implementation, Run, Site, Verdict
from . import inputs, keys, memory, norms, rotary, samples
from .agree import Differs
from .check import Check
from .compiled import SPEC, compiled
from .inputs import Subject
from .measure import INPUTS, compare
from .real import Real, accepted
from .trial import Errors
from .verdicts import Verdicts

SPEED_VERSION = 2
"""Raised when measuring changes: older measurements are void then."""
ORDER = (0, 3, 1, 2, 4)
"""Buckets by how soon they are worth knowing: one token, a prompt, then what lies between and beyond."""
HELD = 256 << 20  # bytes of inputs in rotation
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
    module: nn.Module
    original: Callable[..., Any]
    candidates: tuple[tuple[str, Implementation], ...]
    run: Run
    name: str = ""
    """Digest of everything that its measurements depend on, apart from the candidates and the sizes."""

    @property
    def scale(self) -> samples.Scale | None:
        """How its calls are counted; None: there is no recipe for its inputs, so nothing can be measured."""
        return samples.BY_PROBE.get(self.site.row.probe)


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
        scale = samples.BY_PROBE.get(site.row.probe)
        if scale is None or run.compiled:
            return Choice(accepted[0][1], verdict=accepted[0][2]) if accepted else Choice(None)
        name = keys.digest(*_parts(site, module, original, run))
        if self.compile and not site.row.statements:  # compiled code runs these as they stand, among their neighbours
            if name not in self._memo:
                self._memo[name] = compiled(site, original)
            candidates.append((SPEC, self._memo[name]))
        entry = self.entries[name] = Entry(site, module, original, tuple(candidates), run, name)
        named = {keys.digest(keys.kernel(i)): i for _, i in candidates}
        decide = functools.partial(self._decide, entry)
        decided = decide() if self.agree is None else self.agree(f"{name} {sorted(named)}", decide)
        first = accepted[0][1] if accepted else None
        parts = [first if name == UNKNOWN else named.get(name) for name in decided]
        return self._served(entry, scale, parts, verdicts)

    def _decide(self, entry: Entry) -> list[str]:
        """For each bucket the digest of what serves, `""` for the original, `UNKNOWN` where nothing was measured.

        A bucket that cannot be measured is served as the one below, the first ones as the first that can.
        """
        assert entry.scale is not None
        found = [None if self._is_absent(entry, b) else self._fastest(entry, b) for b in range(len(entry.scale.at))]
        last = next((f for f in found if f is not None), UNKNOWN)
        return [last := last if f is None else f for f in found]

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

    def _served(
        self, entry: Entry, scale: samples.Scale, parts: Sequence[Implementation | None], verdicts: Mapping[str, Verdict]
    ) -> Choice:
        passed = tuple((s, why) for s, i in entry.candidates if i not in parts and (why := self._said(entry, i, scale)))
        used = [i for i in parts if i is not None]
        if not used:
            return Choice(None, passed or ((ORIGINAL, "nothing else may serve"),))
        lead = max(dict.fromkeys(used), key=used.count)
        verdict = verdicts.get(keys.digest(keys.kernel(lead))) or _ITSELF
        measured = tuple(
            (scale.name(b), next((s for s, i in entry.candidates if i is part), ""), self._speedup(entry, part, b))
            for b, part in enumerate(parts)
            if not self._is_absent(entry, b)
        )
        return Choice(self._mixture(entry, scale, parts, lead), passed, verdict, measured)

    def _speedup(self, entry: Entry, part: Implementation | None, bucket: int) -> float | None:
        verdict = None if part is None else self.known(entry, part, bucket)
        return None if verdict is None else speedup(verdict)

    def _said(self, entry: Entry, candidate: Implementation, scale: samples.Scale) -> str:
        """What was measured of a candidate that serves nowhere."""
        found = [(b, v) for b in range(len(scale.at)) if (v := self.known(entry, candidate, b)) is not None]
        broken = next((v.reason for _, v in found if v.seconds_kernel is None), None)
        if broken is not None:
            return broken
        return ", ".join(f"{v.reason.partition(' ')[0]} on {scale.name(b)}" for b, v in found)

    def _mixture(
        self, entry: Entry, scale: samples.Scale, parts: Sequence[Implementation | None], lead: Implementation
    ) -> Implementation:
        if all(p is lead for p in parts):
            return lead
        key = (entry.name, *(p and keys.digest(keys.kernel(p)) for p in parts))
        if key not in self._memo:  # equal modules share one: their classes, and what is compiled of them, are the same
            before = function.norms(entry.module, entry.site.name) if entry.site.row.statements else ()
            self._memo[key] = mixture(scale, parts, entry.original, lead, before=len(before))
        return self._memo[key]

    # -- measuring --

    def known(self, entry: Entry, candidate: Implementation, bucket: int) -> Verdict | None:
        """What was measured, if anything was. `accepted`: it beats the original by more than the noise."""
        return self.store.get(self._key(entry, candidate, bucket))

    def missing(self) -> Iterator[tuple[Entry, str, Implementation, int]]:
        """What could be measured and was not: soonest what is worth knowing first, compiled originals last."""
        todo = [
            (spec == SPEC, ORDER.index(bucket), entry, spec, candidate, bucket)
            for entry in self.entries.values()
            if entry.scale is not None
            for spec, candidate in entry.candidates
            for bucket in range(len(entry.scale.at))
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
        subject = Subject(site, entry.module, entry.original, device, getattr(torch, site.dtype.removeprefix("torch.")))
        lasting = True
        with memory.quiet(device), torch.enable_grad() if run.training else torch.no_grad():
            try:
                verdict = self._measured(subject, entry, candidate, bucket, seconds)
            except (MemoryError, torch.OutOfMemoryError):
                verdict, lasting = Verdict(accepted=False, reason="ran out of memory while it was measured"), False
            except Exception as e:  # noqa: BLE001  # a stranger's code may raise anything, and all of it means: not this one
                text = " ".join(str(e).split())[:200]
                verdict = Verdict(accepted=False, reason=f"raises {type(e).__name__}: {text}")
        verdict = dataclasses.replace(verdict, key=self._key(entry, candidate, bucket))
        if lasting:
            self.store.put(verdict)
        return verdict

    def _measured(self, subject: Subject, entry: Entry, candidate: Implementation, bucket: int, seconds: float) -> Verdict:
        assert entry.scale is not None
        given = samples.sample(subject, bucket)
        assert given is not None  # `missing` asked
        site, held, original, called = norms.seen(subject.site, entry.module, entry.original, _behind_guard(entry, candidate))
        module = None
        if site.kind == "module":
            module = inputs.with_parameters(dataclasses.replace(subject, module=held), 1.0).train(entry.run.training)
        before = tuple(module._modules.values()) if module is not None and site.row.statements else ()  # noqa: SLF001  # as `norms.on_module`
        if (why := self._differs(entry, None if before else module, candidate, (*before, *given))) is not None:
            return Verdict(accepted=False, reason=why)
        graded = samples.GRADED.get(site.row.probe, len(given)) if entry.run.training else None
        salts = iter(range(1, 1 << 20))
        size = sum(t.numel() * t.element_size() for t in given)
        found = compare(
            _side(original, module, graded),
            _side(called.forward, module, graded),
            lambda: samples.sample(subject, bucket, next(salts)) or given,
            seconds=seconds,
            device=subject.device,
            cold=True,
            inputs=max(2, min(INPUTS, HELD // max(1, size))),
        )
        word = "faster" if found.faster else "slower" if found.slower else f"within the noise of {found.noise:.0%}"
        return Verdict(
            accepted=found.faster,
            reason=f"{found.ratio:.2f}x as fast as the original on {entry.scale.name(bucket)}: {word}",
            seconds_original=found.median_a,
            seconds_kernel=found.median_b,
            details=(
                ("speedup", f"{found.ratio:.6g}"),
                ("noise", f"{found.noise:.3g}"),
                ("runs", str(found.runs)),
                ("bucket", entry.scale.name(bucket)),
                ("size", str(entry.scale.at[bucket])),
            ),
        )

    def _differs(self, entry: Entry, module: nn.Module | None, candidate: Implementation, given: tuple[Any, ...]) -> str | None:
        """Why the outputs on these inputs are not good enough, or `None`. `module`: in place of the entry's own."""
        site = entry.site
        if candidate.origin.candidate.source == "torch":  # not a stranger's: its outputs are compared, nothing more is asked
            try:
                _, verdict = Real(site, module, entry.original, candidate, given, {}).answered(accepted(Errors()))
            except Differs as e:
                return str(e)
        else:
            held = entry.module if module is None else module
            _, verdict = self._verifier.first_call(site, held, entry.original, candidate, entry.run, given, {})
        return None if verdict.accepted else verdict.reason

    def _is_absent(self, entry: Entry, bucket: int) -> bool:
        """Whether no call of this site is of that size, or the size is too large to measure."""
        what = entry.name, bucket
        if what not in self._present:
            subject = Subject(entry.site, entry.module, entry.original, torch.device("meta"), torch.float32)
            self._present[what] = samples.occurs(subject, bucket)
        return not self._present[what]

    @staticmethod
    def _key(entry: Entry, candidate: Implementation, bucket: int) -> str:
        return keys.digest("speed", SPEED_VERSION, keys.kernel(candidate), bucket, entry.name)


def speedup(verdict: Verdict) -> float | None:
    """Times faster than the original, the median over the turns; None where nothing could be timed."""
    found = dict(verdict.details).get("speedup")
    return None if found is None else float(found)


def _parts(site: Site, module: nn.Module, original: Callable[..., Any], run: Run) -> tuple[Any, ...]:
    device = memory.indexed(torch.device(site.device))
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    about: tuple[Any, ...] = (site.dtype, keys.place(device), threads, keys.run_of(run))
    if site.row.statements:
        held = norms.of(site, module)
        return keys.subject(dataclasses.replace(site, kind="module"), held, original), repr(rotary.heads(module)), *about
    return keys.subject(site, module, original), *about


def _behind_guard(entry: Entry, candidate: Implementation) -> Implementation:
    """What would run: a kernel for statements is called by what asks whether it may answer for the norms."""
    if not entry.site.row.statements:
        return candidate
    classes = tuple(sites.original(norm) for norm in function.norms(entry.module, entry.site.name).values())
    return dataclasses.replace(candidate, forward=fused.standing_back(candidate.forward, entry.original, classes))


def _side(function: Callable[..., Any], module: nn.Module | None, graded: int | None) -> Callable[..., Any]:
    """One call of what is timed; or a forward and backward, to the first `graded` arguments and to the parameters."""
    called = function if module is None else functools.partial(function, module)
    if graded is None:
        return called
    parameters = [] if module is None else [p for p in module.parameters() if p.requires_grad]

    def step(*given: Tensor) -> Any:
        leaves = [t.detach().requires_grad_(i < graded and t.is_floating_point()) for i, t in enumerate(given)]
        roots = [t for t in pytree.tree_leaves(called(*leaves)) if isinstance(t, Tensor) and t.requires_grad]
        wanted = [*(t for t in leaves if t.requires_grad), *parameters]
        return torch.autograd.grad(roots, wanted, [torch.ones_like(t) for t in roots], allow_unused=True)

    return step


# -- one implementation of several ----------------------------------------------------------------------------------


def mixture(
    scale: samples.Scale,
    parts: Sequence[Implementation | None],
    original: Callable[..., Any],
    lead: Implementation,
    *,
    before: int = 0,
) -> Implementation:
    """What `parts` say, by the size of the call's first tensor; None is the original. `lead` gives the mixture its name.

    `before`: norms that a call begins with.

    Where one candidate serves every bucket no such frame is needed. This one costs a comparison or two.
    """
    size = samples.size_of(scale)
    steps: list[tuple[float, Callable[..., Any], bool]] = []
    for bound, part in zip((*scale.bounds, float("inf")), parts, strict=True):
        function = original if part is None else part.forward
        if steps and steps[-1][1] is function:
            steps.pop()
        steps.append((bound, function, part is not None))

    def at(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Callable[..., Any], bool]:
        first = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(first, Tensor):
            n = size(first)
            for bound, function, ours in steps:
                if n <= bound:
                    return function, ours
        return original, False

    skip = before + (lead.kind == "module")  # `self` comes first, and is part of the call

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return at(args[skip:], kwargs)[0](*args, **kwargs)

    def serving(*args: Any, **kwargs: Any) -> bool:
        return at(args[skip:], kwargs)[1]

    forward.serving = serving  # type: ignore[attr-defined]  # asked by whoever counts or checks calls
    used = [p for p in dict.fromkeys(parts) if p is not None]
    return dataclasses.replace(
        lead,
        forward=forward,
        backward=all(p.backward for p in used),
        compiles=all(p.compiles for p in used),
        reads=tuple(dict.fromkeys(read for p in used for read in p.reads)),
        parts=tuple(parts),
    )
