"""Sites to outcomes: which kernel serves each, in each mode, or why the original stays. Reads the model; changes nothing.

Everything that can fail, fails here, before the first write: kernels are found, brought to disk, imported and proved on
random tensors. Per site and mode the candidates of its row are tried in order, and each one passed over leaves its reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from . import layers, reads, signature, sites, table
from . import mode as modes
from .errors import KernelSwapError, Refused, Tampered
from .slots import function as function_slot
from .slots import module as module_slot
from .types import Choice, Chooser, Implementation, Kept, Machine, Mode, Outcome, Prover, Run, Site, SiteKind, Swap, Use, Verdict

if TYPE_CHECKING:
    import torch.nn as nn

_log = logging.getLogger(__name__)

Provide = Callable[[str, str, SiteKind], Implementation]
"""`provide(spec, device, kind)`: the implementation, imported and verified, or any `KernelSwapError`."""

Verdicts = MutableMapping[object, Verdict]
"""Verdicts of one model, by what they hold for. Whoever keeps the mapping keeps 28 equal layers at one proof."""


class NotAsked(Refused):
    """A hub kernel in the default table, and nobody asked for the hub. Becomes a reason; never reaches a caller."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller wants, apart from the table."""

    mode: Mode | None = None
    """`None`: both modes are served, live. `INFERENCE`: training keeps the original. `TRAINING`: only kernels with a
    backward, and they serve inference too. `| TORCH_COMPILE`: only kernels that compile. `TORCH_COMPILE` alone: both modes,
    live, with kernels that compile."""
    prefer: Mapping[str, Sequence[str | Use]] = field(default_factory=dict)
    """Glob over paths or layers to what is tried first there."""
    named: Collection[str] = ()
    """Specs that the user wrote: for them `Refused` is raised instead of becoming a reason."""
    replacing: Collection[int] = ()
    """`id()` of modules whose present swap is going to be undone before this plan is applied."""
    chooser: Chooser | None = None
    """Picks among all candidates that may serve, those of `Row.rivals` included; `None`: the first one serves."""


def plan(
    model: nn.Module,
    sites: Sequence[Site],
    provide: Provide,
    prover: Prover,
    *,
    machine: Machine,
    wish: Wish | None = None,
    verdicts: Verdicts | None = None,
) -> tuple[Outcome, ...]:
    """One outcome per site, in their order.

    Raises:
        Tampered: bytes of a kernel differ from what was verified before.
        Refused: a kernel that the user named was refused by a verifier.
        ModeError: `wish.mode` makes no sense.
    """
    planner = _Planner(model, provide, prover, machine, wish or Wish(), {} if verdicts is None else verdicts)
    return planner.beside(tuple(planner.outcome(site) for site in sites))


# -- the decision -------------------------------------------------------------------------------------------------

# The table describes what a row is good for, not what every row's inputs look like. Without a recipe the kernel is installed
# unproved and meets the original at the first real call, whose output is the original's if they differ.
_ON_REAL_TENSORS = Verdict(accepted=True, reason="no recipe for random inputs: to be proved on its first real call")

# How telling a reason is, when one must stand for the site: the first of the lowest rank.
MEASURED, TRIED, UNABLE, NOT_ASKED, ELSEWHERE = range(5)


FASTEST = "measured, and the original is the fastest"
"""How such a reason begins."""


@dataclass(frozen=True, slots=True)
class _Passed:
    rank: int
    spec: str
    why: str


_Asked = list[tuple[Implementation, str | None]]
"""What was asked of one module while choosing for it: an implementation, and what stands in its way there."""


class _Planner:
    def __init__(
        self, model: nn.Module, provide: Provide, prover: Prover, machine: Machine, wish: Wish, verdicts: Verdicts
    ) -> None:
        self.modules = sites.modules(model)
        self.provide, self.prover, self.machine, self.wish, self.verdicts = provide, prover, machine, wish, verdicts
        self.provided: dict[tuple[str, str, SiteKind], Implementation | _Passed] = {}
        self.fits: dict[tuple[int, object], Implementation | str] = {}
        self.signatures: dict[tuple[int, str], object] = {}
        self.choices: dict[object, list[tuple[Choice, list[_Passed], _Asked]]] = {}
        self.obstacles: dict[tuple[int, int, SiteKind], str | None] = {}
        self.replaced: dict[str, tuple[str, frozenset[str]]] = {}  # path -> layer, children that its kernel still calls
        self.runs = runs(wish.mode)

    def outcome(self, site: Site) -> Outcome:
        module = self.modules[site.path]
        why = self.left_alone(site)
        if why is not None:
            return Kept(site, why)
        uses = self.uses(site)
        if not uses and self.wish.chooser is None:
            return Kept(site, f"no kernel in the table serves {site.layer}")
        inference, not_in_inference = self.choose(site, module, uses, self.runs[False])
        training, not_in_training = self.choose(site, module, uses, self.runs[True])
        served = [i for i in (inference.implementation, training.implementation) if i is not None]
        if not served:
            passed = not_in_inference or not_in_training
            return Kept(site, _one_reason(passed, site), tuple((p.spec, p.why) for p in passed))
        called = {reads.root(read) for implementation in served for read in implementation.reads}
        wanted = sum(run is not None for run in self.runs.values())
        if site.kind == "module" and len(served) == wanted and reads.ANYTHING not in called:
            self.replaced[site.path] = site.layer, frozenset(called)
        return Swap(site, inference, training)

    def beside(self, outcomes: tuple[Outcome, ...]) -> tuple[Outcome, ...]:
        """Statements are left alone where what they call is: what serves a norm, or is not to, was decided for that norm."""
        by_place = {(o.site.path, o.site.name): o for o in outcomes}
        found = []
        for outcome in outcomes:
            if isinstance(outcome, Swap) and outcome.site.row.statements:
                site, module = outcome.site, self.modules[outcome.site.path]
                norms = [(norm, (f"{site.path}.{norm}".lstrip("."), "")) for norm in function_slot.norms(module, site.name)]
                inside = [(name, (site.path, name)) for name in function_slot.inside(module, site.name)]
                called = [(name, by_place[place]) for name, place in (*norms, *inside) if place in by_place]
                found.append(_with_those(outcome, called))
            else:
                found.append(outcome)
        return tuple(found)

    def left_alone(self, site: Site) -> str | None:
        if site.left_out:
            return site.left_out
        if site.row.off:
            return "left alone: you asked for it"
        if site.device.partition(":")[0] == "meta":
            return "its weights are on the meta device, not loaded yet"
        if site.kind == "function" and site.path in self.replaced:
            return f"inside {self.replaced[site.path][0]}, which is swapped"
        parts = site.path.split(".") if site.path else []
        for depth in range(len(parts)):
            layer, called = self.replaced.get(".".join(parts[:depth]), ("", frozenset()))
            if layer and parts[depth] not in called:
                return f"inside {parts[depth - 1] if depth else layer}, which is swapped"
        return None

    def uses(self, site: Site) -> tuple[Use, ...]:
        rivals = site.row.rivals if self.wish.chooser is not None else ()
        if not self.wish.prefer:
            return (*site.row.use, *rivals) if rivals else site.row.use
        given = [one for glob, specs in self.wish.prefer.items() if sites.named_by(glob, site) for one in specs]
        preferred = dict.fromkeys(one if isinstance(one, Use) else Use(one) for one in given)
        first = {use.spec for use in preferred}
        return (*preferred, *(use for use in (*site.row.use, *rivals) if use.spec not in first))

    def choose(self, site: Site, module: nn.Module, uses: tuple[Use, ...], run: Run | None) -> tuple[Choice, list[_Passed]]:
        """One mode. Equal modules are decided once; what is asked of each is whether something stands in the way there."""
        if run is None:
            return Choice(None, ((site.layer, f"only {modes.name(self.wish.mode or Mode(0))} was asked for"),)), []
        which: object = uses if self.wish.prefer else id(site.row)
        key = run, which, site.device, site.dtype, site.target, self.signature(site, module)
        known = self.choices.setdefault(key, [])
        for choice, passed, asked in known:
            if all(self.obstacle(implementation, site, module) == why for implementation, why in asked):
                return choice, passed
        allowed, passed = _allowed(uses, run)
        asked = []
        accepted: list[tuple[str, Implementation, Verdict]] = []
        later: tuple[str, ...] = ()
        for i, use in enumerate(allowed, 1):
            try:
                found = self.judge(use, site, module, run, asked)
            except Refused:
                raise  # it is about trust
            except Exception as e:  # noqa: BLE001  # a kernel may do anything when it is looked at; the reason is kept
                _log.warning("%s raised while it was looked at for %s", use.spec, site.path, exc_info=True)
                found = _Passed(TRIED, use.spec, f"raised {type(e).__name__} while it was looked at: {e}")
            if isinstance(found, _Passed):
                passed.append(found)
                continue
            accepted.append((use.spec, *found))
            if self.wish.chooser is None:
                later = tuple(one.spec for one in allowed[i:])
                break
        best = Choice(accepted[0][1], verdict=accepted[0][2]) if accepted else Choice(None)
        if self.wish.chooser is not None and self.takes_any(site, module):
            best = self.wish.chooser.choose(site, module, _original(site, module), accepted, run)
            passed += [_Passed(MEASURED, spec, why) for spec, why in best.passed]
        choice = replace(best, passed=tuple((p.spec, p.why) for p in passed), later=later)
        known.append((choice, passed, asked))
        return choice, passed

    def judge(  # noqa: PLR0911  # one return for each reason to pass it over
        self, use: Use, site: Site, module: nn.Module, run: Run, asked: _Asked
    ) -> tuple[Implementation, Verdict] | _Passed:
        """One candidate against one site, cheapest question first."""
        why = table.misfit(use, site.device, self.machine)
        if why is not None:
            return _Passed(ELSEWHERE, use.spec, why)
        implementation = self.implementation(use.spec, site)
        if isinstance(implementation, _Passed):
            return implementation
        if implementation.kind != site.kind:
            return _Passed(TRIED, use.spec, f"is a {implementation.kind}, this is a {site.kind}")
        if (why := implementation.cannot(run)) is not None:
            return _Passed(UNABLE, use.spec, why)
        original = _original(site, module)
        fitted = self.fitted(implementation, original)
        if isinstance(fitted, str):
            return _Passed(TRIED, use.spec, fitted)
        why = self.obstacle(fitted, site, module)
        asked.append((fitted, why))
        if why is not None:
            return _Passed(TRIED, use.spec, why)
        verdict = self.prove(fitted, site, module, original, run)
        if dict(verdict.details).get("compiled", "").startswith("no: "):
            fitted = replace(fitted, compiles=False)  # whatever it says of itself: compiled code gets the original
        return (fitted, verdict) if verdict.accepted else _Passed(TRIED, use.spec, verdict.reason)

    def implementation(self, spec: str, site: Site) -> Implementation | _Passed:
        """Asked once per plan, failures included: 28 layers do not ask an unreachable hub 28 times."""
        key = spec, site.device, site.kind
        if key not in self.provided:
            try:
                self.provided[key] = self.provide(*key)
            except Tampered:
                raise
            except NotAsked as e:
                self.provided[key] = _Passed(NOT_ASKED, spec, e.reason)
            except KernelSwapError as e:
                if isinstance(e, Refused) and spec in self.wish.named:
                    raise
                self.provided[key] = _Passed(TRIED, spec, e.reason)
        return self.provided[key]

    def fitted(self, implementation: Implementation, original: Callable[..., Any]) -> Implementation | str:
        """The implementation with the original's parameter names, or why it cannot be called as the original is."""
        key = id(implementation), original  # `provided` keeps every implementation alive
        if key not in self.fits:
            self.fits[key] = layers.mismatch(implementation, original) or layers.fit(implementation, original)
        return self.fits[key]

    def obstacle(self, implementation: Implementation, site: Site, module: nn.Module) -> str | None:
        key = id(implementation), id(module), site.kind
        if key not in self.obstacles:
            replacing = id(module) in self.wish.replacing
            self.obstacles[key] = (
                function_slot.obstacle(module, site.name, replacing=replacing)
                if site.kind == "function"
                else module_slot.obstacle(module, implementation.reads, replacing=replacing)
            )
        return self.obstacles[key]

    def takes_any(self, site: Site, module: nn.Module) -> bool:
        """Whether nothing about the module itself stands in the way of a swap."""
        replacing = id(module) in self.wish.replacing
        if site.kind == "function":
            return function_slot.obstacle(module, site.name, replacing=replacing) is None
        return module_slot.obstacle(module, replacing=replacing) is None

    def signature(self, site: Site, module: nn.Module) -> object:
        key = id(module), site.name if site.row.statements else site.kind
        if key not in self.signatures:
            self.signatures[key] = (
                tuple((norm, signature.of(found)) for norm, found in function_slot.norms(module, site.name).items())
                if site.row.statements
                else signature.of(module, deep=site.kind == "module")
            )
        return self.signatures[key]

    def prove(
        self, implementation: Implementation, site: Site, module: nn.Module, original: Callable[..., Any], run: Run
    ) -> Verdict:
        if not site.row.probe:
            return _ON_REAL_TENSORS
        subject = site.layer, site.name, site.device, site.dtype, original, self.signature(site, module)
        key = subject, implementation.origin.digest, implementation.layer, run
        if key not in self.verdicts:
            self.verdicts[key] = self.prover.equivalent(site, module, original, implementation, run)
        return self.verdicts[key]


def _with_those(outcome: Swap, called: Sequence[tuple[str, Outcome]]) -> Outcome:
    """The swap of statements in those modes in which a bundled kernel, or the same build, serves all that they call."""
    whole: dict[bool, Choice] = {}
    why = ""
    for training in (False, True):
        choice = outcome.serving(training=training)
        kernel = choice.implementation
        timed = any(times is not None for _, _, times in choice.measured)
        asked = (_not_by(kernel, name, o, training, timed=timed) for name, o in called) if kernel is not None else ()
        found = next(filter(None, asked), None)
        if kernel is not None and found is not None:
            why = why or found
            choice = Choice(None, (*choice.passed, (str(kernel.origin.candidate.requirement), found)))
        whole[training] = choice
    if all(choice.implementation is None for choice in whole.values()):
        return Kept(outcome.site, why)  # it was decided elsewhere: no kernel was tried here and found wanting
    return replace(outcome, inference=whole[False], training=whole[True])


def _not_by(
    kernel: Implementation,
    name: str,
    other: Outcome,
    training: bool,  # noqa: FBT001  # one caller
    *,
    timed: bool,
) -> str | None:
    """Why `kernel` may not do the work of what `other` is about, or `None`.

    `timed`: the statements were measured, and that a norm by itself lost, or won at some sizes, is nobody's wish.
    """
    if isinstance(other, Kept):
        asked_for = other.site.left_out.startswith(sites.NOT_ASKED_FOR)  # these statements were asked for, and by name
        lost = timed and other.reason.startswith(FASTEST)
        return None if asked_for or lost else f"its {name} is left as it is: {other.reason}"
    its = other.serving(training=training).implementation
    parts = (its,) if its is None or not its.parts else its.parts
    for part in parts if timed else (its,):
        if part is None and timed:
            continue
        if part is None or part.parts or not (_nobody_asked_for(part, timed=timed) or part.origin.digest == kernel.origin.digest):
            return f"its {name} is served by {'the original' if part is None else part.origin.candidate.requirement}"
    return None


def _nobody_asked_for(implementation: Implementation, *, timed: bool) -> bool:
    source = implementation.origin.candidate.requirement.source
    return source == "bundled" or (timed and source == "torch")  # the original, compiled


def runs(mode: Mode | None) -> dict[bool, Run | None]:
    """What a kernel must be able to do, by the `training` of the module that it serves."""
    if mode is None:
        return {False: Run(training=False), True: Run(training=True)}
    if mode == Mode.TORCH_COMPILE:
        return {False: Run(training=False, compiled=True), True: Run(training=True, compiled=True)}
    run = modes.to_run(mode)
    return {False: run, True: run if run.training else None}


def _allowed(uses: Sequence[Use], run: Run) -> tuple[list[Use], list[_Passed]]:
    """Registered modes in the field's order; a use without modes goes by what its implementation says that it can do."""
    order = modes.order(modes.from_run(run))
    ranked, passed = [], []
    for use in uses:
        ranks = [order.index(mode) for mode in use.modes if mode in order]
        if use.modes and not ranks:
            names = ", ".join(modes.name(mode) for mode in use.modes)
            passed.append(_Passed(UNABLE, use.spec, f"is registered for {names} only"))
        else:
            ranked.append((min(ranks, default=0), use))
    return [use for _, use in sorted(ranked, key=lambda entry: entry[0])], passed


def _original(site: Site, module: nn.Module) -> Callable[..., Any]:
    """What the kernel would replace: the forward of the module's own class, unbound, or the function."""
    if site.kind == "function":
        found = function_slot.original(module, site.name)
        # A function that is decorated for kernels has become a module, and only its forward has the function's signature.
        return cast(Callable[..., Any], getattr(found, "forward", found))
    return cast(Callable[..., Any], sites.original(module).forward)


def _one_reason(passed: Sequence[_Passed], site: Site) -> str:
    best = min(passed, key=lambda p: p.rank)
    if best.rank == MEASURED:
        return f"{FASTEST}: " + "; ".join(f"{p.spec}: {p.why}" for p in passed if p.rank == MEASURED)
    if best.rank == ELSEWHERE:
        return f"no kernel in the table is for {site.device.partition(':')[0]}"
    if best.rank == NOT_ASKED:
        return best.why
    return f"{best.spec} {best.why}" if best.why.startswith(("is ", "has ", "differs ")) else f"{best.spec}: {best.why}"
