"""`Check`, the Prover: may this kernel stand in for that original, here?

Two questions, asked once per machine and kept as verdicts. Before a swap (`equivalent`), on random tensors, parameters and
layouts: do the two compute the same thing? This decides Gemma's `1 + weight` and the place of eps; names never do. On the first
real call (`first_call`), on the user's own tensors and on shapes derived from them: is it as accurate as the original?

What a first call costs where random tensors have accepted the kernel and no verdict is known: one more forward of the original, and
a few rows in float64 (`quick`). Where nothing was proved before, or who asks wants to know, everything is looked at, on up to
`PART` elements (`Real.on_copies`). With a verdict: a dictionary lookup.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..types import Artifact, Implementation, Machine, Run, Site, Verdict
from . import circumstances, head, inputs, keys, memory, norms, quick, recipes, trial
from .agree import Differs
from .child import Contact, Contain
from .inputs import Case, Subject
from .real import Real, accepted, refused
from .reference import Reference, alone
from .verdicts import Verdicts


class Check:
    """Prover over a verdict store.

    Args:
        store: where verdicts are kept; None keeps them in this object.
        machine: what the rest of the program decided by; it is part of no key, the real devices are.
        mode: `first-use`; `always` checks every call of `first_call` anew; `sample:N` likewise, for a caller that asks at
            every N-th call; `off` lets `first_call` pass what `equivalent` accepted.
        contain: which kernels meet this machine in a child process first: `native` (those that bring compiled code or
            Triton and did not ship with kernelswap), `always`, `never`.
        time_limit: seconds that the child may take for one kernel; Triton compiles within.
        traced: kernels that say that they compile, and did not ship with kernelswap, are held against the original under
            `torch.compile` even where nobody asked for it: a user may compile later. One that differs only there is accepted,
            and the detail `compiled` begins with `no: `.
        backend: what `torch.compile` is asked to use when a run is compiled. The default traces as every other does and is
            quick; `inductor` also tests the code that it generates.
        seed: of the random tensors.
    """

    def __init__(
        self,
        store: Verdicts | None,
        machine: Machine | None = None,
        *,
        mode: str = "first-use",
        contain: Contain = "native",
        time_limit: float = 120.0,
        traced: bool = False,
        backend: str = "aot_eager",
        seed: int = 0,
    ) -> None:
        self.store, self.machine, self.mode, self.backend, self.seed = store, machine, mode, backend, seed
        self.traced = traced
        self.thorough = False
        """Set to look at real calls as if nothing had been found on random tensors: `first_call` then never is `quick`."""
        self.contact = Contact(contain, time_limit)
        self._memo: dict[tuple[Any, ...], Verdict] = {}
        self._lock = threading.RLock()
        self._busy = threading.local()
        _every(mode)

    @property
    def every(self) -> int | None:
        """How often a swapped module is to ask again: 0 never after the first, 1 always, N for `sample:N`, None for off."""
        return _every(self.mode)

    def close(self) -> None:
        """End the child process, if one runs."""
        self.contact.close()

    # -- before it is imported here --

    def meets(self, artifact: Artifact) -> str | None:
        """Why a kernel must not be imported in this process: it took a child process down with it; `None`: it may.

        Asked once per artifact and machine, of the kernels that `contain` names.
        """
        if not self.contact.wanted(artifact):
            return None
        parts = ("import", keys.artifact(artifact), keys.place(torch.device("cpu")))
        with self._lock:
            known = self._known(parts)
            if known is None:
                why, note = self.contact.imports(artifact)
                known = Verdict(
                    accepted=why is None, reason=f"its import {why}" if why else note or "was imported in a child process"
                )
                known = self._keep(parts, known, lasting=not note)
        return None if known.accepted else known.reason

    # -- before the swap --

    def equivalent(
        self, site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, run: Run
    ) -> Verdict:
        """On random tensors made by `site.row.probe`: do the two compute the same thing? Touches nothing of the user's."""
        if (why := candidate.cannot(run)) is not None:
            return Verdict(accepted=False, reason=why)
        site, module, original, candidate = norms.seen(site, module, original, candidate)
        recipe = recipes.RECIPES.get(site.row.probe)
        if recipe is None:
            return Verdict(accepted=False, reason=f"there is no way to test it: no recipe {site.row.probe!r} for its inputs")
        try:
            device = memory.indexed(torch.device(site.device))
            dtype = getattr(torch, site.dtype.removeprefix("torch."))
            place = keys.place(device)
        except (RuntimeError, AttributeError, AssertionError):  # torch asserts that it was built for the device
            return Verdict(accepted=False, reason=f"there is no way to test it on {site.device} in {site.dtype}")
        parts = self._random_parts(site, module, original, candidate, run, dtype, place)
        with self._lock:
            known = self._known(parts)
            if known is not None:
                return known
            subject = Subject(site, module, original, device, dtype, self.seed)
            light = site.kind == "function" or memory.light(module)
            with self._alone(), memory.quiet(device), alone(device), memory.one_thread(wanted=light):
                try:
                    verdict, lasting = self._random(subject, candidate, run, recipe(subject))
                except Exception as e:  # noqa: BLE001  # whatever stands in the way of a proof: the original stays, with this reason
                    why = f"there is no way to test it: {type(e).__name__}: {' '.join(str(e).split())[:300]}"
                    verdict, lasting = Verdict(accepted=False, reason=why), False
                return self._keep(parts, _holding(verdict, keys.about(candidate, site, device, run, None)), lasting=lasting)

    def _random_parts(
        self,
        site: Site,
        module: nn.Module,
        original: Callable[..., Any],
        candidate: Implementation,
        run: Run,
        dtype: torch.dtype,
        place: Any,
    ) -> tuple[Any, ...]:
        """What the verdict on random tensors holds for."""
        return (
            "random",
            self.seed,
            keys.kernel(candidate),
            keys.subject(site, module, original),
            str(dtype),
            place,
            (run.training, run.compiled, self.backend if run.compiled else ""),
            self._asks_for_traces(candidate, run),
        )

    def _random_accepted(
        self, site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, run: Run, real: Real
    ) -> bool:
        """Whether random tensors have accepted the kernel for this kind of call: in its dtype, here, with gradients if it wants them."""
        if not real.held or not site.row.probe or torch.is_autocast_enabled(real.device.type):
            return False
        dtype = real.held[0].dtype
        if str(dtype).removeprefix("torch.") != site.dtype.removeprefix("torch."):
            return False
        place = keys.place(real.device)
        runs = dict.fromkeys(
            (run, *(dataclasses.replace(run, training=t, compiled=c) for t in (run.training, True) for c in (False, True)))
        )
        with self._lock:
            verdicts = (self._known(self._random_parts(site, module, original, candidate, r, dtype, place)) for r in runs)
            return any(v is not None and v.accepted for v in verdicts)

    def _random(self, subject: Subject, candidate: Implementation, run: Run, cases: Iterator[Case]) -> tuple[Verdict, bool]:
        errors, skipped, pairs = trial.Errors(), "", _Pairs(subject, candidate, run)
        name = ""
        if (crash := self._survives(subject, candidate, run, pairs)) is not None:
            return Verdict(accepted=False, reason=crash), True
        try:
            for case in cases:
                name = case.name
                asked = trial.wants(case, training=run.training)
                backend = self.backend if run.compiled and case.thorough else ""
                try:
                    trial.examine(pairs(case.centre), case, errors, wants=asked, slow=case.thorough, compiled=backend)
                    circumstances.examine(pairs(case.centre), case, subject.site.row.probe, training=run.training)
                except trial.Skip as e:
                    skipped = skipped or str(e)
                except torch.OutOfMemoryError:
                    skipped = skipped or f"the check ran out of memory on {name}"
        except Differs as e:
            return refused(e, errors, name), e.lasting
        if not errors.cases:
            why = skipped or f"the recipe {subject.site.row.probe!r} finds no sizes in {subject.site.target}"
            return Verdict(accepted=False, reason=f"there is no way to test it: {why}"), not skipped
        if self._asks_for_traces(candidate, run):
            errors.compiled = self._under_trace(subject, run, pairs, errors)
        return accepted(errors), True

    def _asks_for_traces(self, candidate: Implementation, run: Run) -> bool:
        """Whether to compare under `torch.compile` as well, though the run is not compiled."""
        origin = candidate.origin.candidate
        ours = origin.requirement.source == "bundled" or origin.source == "torch"  # wherever its bytes came from
        return self.traced and candidate.compiles and not run.compiled and not ours

    def _under_trace(self, subject: Subject, run: Run, pairs: _Pairs, errors: trial.Errors) -> str:
        """What came of it, in words; `no: ...` where the kernel does not do under `torch.compile` what it does without."""
        case = next((c for c in recipes.RECIPES[subject.site.row.probe](subject) if c.thorough), None)
        if case is None:
            return ""
        try:
            trial.traced(pairs(case.centre), case, trial.wants(case, training=run.training)[0], errors, self.backend)
        except trial.Skip:
            return ""
        except Differs as e:
            return f"no: {e}"
        return errors.compiled

    def _survives(self, subject: Subject, candidate: Implementation, run: Run, pairs: _Pairs) -> str | None:
        """Why the kernel took a child process down with it, or `None`. Asked once per kernel, layer and machine."""
        if not self.contact.wanted(candidate.origin):
            return None
        cases = list(recipes.RECIPES[subject.site.row.probe](subject))
        if not cases:
            return None
        parts = ("contact", keys.kernel(candidate), subject.site.row.probe, run.training, keys.place(subject.device))
        known = self._known(parts)
        if known is None:
            why, note = self.contact.first(candidate, subject, pairs.module, cases, run)
            known = Verdict(accepted=why is None, reason=why or note or "survived first contact in a child process")
            known = self._keep(parts, known, lasting=not note)
        return None if known.accepted else known.reason

    # -- the first real call --

    def first_call(
        self,
        site: Site,
        module: nn.Module,
        original: Callable[..., Any],
        candidate: Implementation,
        run: Run,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        anew: bool = False,
    ) -> tuple[Any, Verdict]:
        """On the real tensors. The output is the kernel's, part of the caller's autograd graph; the original's when refused."""
        site, module, original, candidate, args = _of_call(site, module, original, candidate, args)
        real = Real(site, module if site.kind == "module" else None, original, candidate, args, kwargs)
        if getattr(self._busy, "now", False):  # a swapped module inside of one that is being checked
            return real.by_original(), Verdict(accepted=False, reason="was called by a check of another kernel")
        if self.mode == "off":
            return real.by_kernel(Verdict(accepted=True, reason="not checked: check is off"))
        parts = _real_parts(site, module, original, candidate, run, real)
        with self._lock:
            known = self._known(parts) if self.mode == "first-use" and not anew else None
        if known is not None:
            return real.by_kernel(known) if known.accepted else (real.by_original(), known)
        about = keys.about(candidate, site, real.device, run, inputs.count(real.held))
        if (
            not (anew or self.thorough)
            and self.mode == "first-use"
            and self._random_accepted(site, module, original, candidate, run, real)
        ):
            found = quick.answer(real, functools.partial(self._aside, real))
            if found is not None:
                output, verdict, lasting = found
                return output, self._keep(parts, _holding(verdict, about), lasting=lasting)
        with self._aside(real, small=real.module is None or memory.light(module)):
            verdict, lasting = real.on_copies()
        if not verdict.accepted:
            return real.by_original(), self._keep(parts, _holding(verdict, about), lasting=lasting)
        output, verdict = real.answered(verdict)
        return output, self._keep(parts, _holding(verdict, about), lasting=True)

    @contextmanager
    def _aside(self, real: Real, *, small: bool) -> Iterator[None]:
        """One check at a time, and nothing of the caller's state in it."""
        with self._lock, self._alone(), memory.quiet(real.device), memory.one_thread(wanted=small):
            yield

    def known(
        self,
        site: Site,
        module: nn.Module,
        original: Callable[..., Any],
        candidate: Implementation,
        run: Run,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Verdict | None:
        """What `first_call` would go by without running anything; `None`: it would have to look."""
        if self.mode != "first-use" or getattr(self._busy, "now", False):
            return None
        site, module, original, candidate, args = _of_call(site, module, original, candidate, args)
        real = Real(site, module if site.kind == "module" else None, original, candidate, args, kwargs)
        with self._lock:
            return self._known(_real_parts(site, module, original, candidate, run, real))

    # -- verdicts --

    def _known(self, parts: tuple[Any, ...]) -> Verdict | None:
        if (found := self._memo.get(parts)) is None and self.store is not None:
            found = self.store.get(keys.digest(*parts))
            if found is not None:
                self._memo[parts] = found
        return found

    def _keep(self, parts: tuple[Any, ...], verdict: Verdict, *, lasting: bool) -> Verdict:
        verdict = dataclasses.replace(verdict, key=keys.digest(*parts))
        self._memo[parts] = verdict
        if self.store is not None and lasting and self.store.get(verdict.key) != verdict:
            self.store.put(verdict)
        return verdict

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._busy.now = True
        try:
            yield
        finally:
            self._busy.now = False


def _of_call(
    site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, args: tuple[Any, ...]
) -> tuple[Site, nn.Module, Callable[..., Any], Implementation, tuple[Any, ...]]:
    """`norms.seen`, and the arguments that are left."""
    return *norms.seen(site, module, original, candidate, args), norms.rest(site, module, args)


def _real_parts(
    site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, run: Run, real: Real
) -> tuple[Any, ...]:
    """What the verdict of a real call holds for."""
    return (
        "real",
        keys.kernel(candidate),
        keys.subject(site, module, original),
        keys.place(real.device),
        (run.training, run.compiled),
        keys.bucket(real.args, real.kwargs),
    )


def _holding(verdict: Verdict, about: tuple[tuple[str, str], ...]) -> Verdict:
    """The verdict with what it holds for, after what was found."""
    named = {name for name, _ in about}
    return dataclasses.replace(verdict, details=(*(d for d in verdict.details if d[0] not in named), *about))


def _every(mode: str) -> int | None:
    """As `Check.every`.

    Raises:
        ValueError: no such mode.
    """
    plain: dict[str, int | None] = {"first-use": 0, "always": 1, "off": None}
    if mode in plain:
        return plain[mode]
    word, _, number = mode.partition(":")
    if word == "sample" and number.isdigit() and int(number):
        return int(number)
    raise ValueError(f"check={mode!r} is none of first-use, always, sample:N, off")


# -- random: one copy of the module per way of drawing its parameters ----------------------------------------------


class _Pairs:
    def __init__(self, subject: Subject, candidate: Implementation, run: Run) -> None:
        self.subject, self.candidate, self.run = subject, candidate, run
        self.made: dict[float, trial.Pair] = {}

    def module(self, centre: float) -> nn.Module | None:
        if self.subject.site.kind != "module":
            return None
        return inputs.with_parameters(self.subject, centre).train(self.run.training)

    def __call__(self, centre: float) -> trial.Pair:
        if centre not in self.made:
            module, device = self.module(centre), self.subject.device
            original, kernel = (
                head.through(self.subject.site.row.probe, f) for f in (self.subject.original, self.candidate.forward)
            )
            self.made[centre] = trial.Pair(original, kernel, module, Reference(original, module, device), device)
        return self.made[centre]
