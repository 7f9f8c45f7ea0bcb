"""One call, made by the original, by its float64 reference and by a kernel; and everything in which the kernel may not differ.

Besides the numbers: structure, shape, dtype, device and layout of what comes back, tensors that it must not touch or share,
memory that it must write, memory that it must give back, and the caller's random state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import memory
from .agree import Differs, Result, foreign, name, same, structure
from .inputs import Case
from .reference import Answer, Reference, tensors, widen
from .tolerance import TOLERANCES, Finding, compare

T = TypeVar("T")
SEED = 20260
LIGHT = 1 << 24
"""Bytes of module state up to which it is compared after every call, not only after every case."""


class Skip(Exception):
    """The original itself cannot do this case."""


@dataclass(slots=True)
class Errors:
    """What was measured over all cases of one proof."""

    original: float = 0.0
    """Largest row error, over cases that are not there to be difficult."""
    kernel: float = 0.0
    cases: int = 0
    deterministic: bool = True
    reference: str = "float64"
    compiled: str = ""


class Pair:
    """An original and a kernel, called alike, on one copy of the module (`None` for functions).

    `original` and `candidate` are unbound: with a module they are called as `f(module, *args)`.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        candidate: Callable[..., Any],
        module: nn.Module | None,
        reference: Reference | None,
        device: torch.device,
    ) -> None:
        self.original, self.candidate, self.module, self.reference, self.device = original, candidate, module, reference, device
        held = {} if module is None else tensors(module)
        self.state = memory.Untouched(held)
        self.light = sum(t.untyped_storage().nbytes() for t in self.state.held.values()) <= LIGHT

    def intact(self) -> None:
        """Raise when the module's own tensors changed."""
        if changed := self.state.changed():
            raise Differs(f"changes the module's {', '.join(changed)} in place")


@dataclass(frozen=True, slots=True)
class Want:
    """Which gradients a call is asked for, and from which cotangents."""

    inputs: tuple[int, ...] = ()
    """By their order among the tensors of the call."""
    parameters: bool | None = False
    """None: leave their `requires_grad` alone; they are the user's."""
    kind: str = "random"
    """`random`; `expanded`: one number for all, as `out.sum().backward()` gives; `first`: through the first output alone."""


# -- calling ------------------------------------------------------------------------------------------------------


def names(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, bound: bool) -> list[str]:
    """A name for each tensor of the call: the original's parameter names where they say it."""
    try:
        known = list(inspect.signature(function).parameters)[1 if bound else 0 :]
    except (TypeError, ValueError):  # a builtin without a signature
        known = []
    positional = [(known[i] if i < len(known) else f"argument {i}", value) for i, value in enumerate(args)]
    found = []
    for label, value in [*positional, *kwargs.items()]:
        held = [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        found += [label] if len(held) == 1 else [f"{label}[{j}]" for j in range(len(held))]
    return found


def call(
    function: Callable[..., Any],
    module: nn.Module | None,
    arguments: tuple[Sequence[Any], Mapping[str, Any]],
    device: torch.device,
    want: Want | None = None,
    cotangents: Sequence[Tensor] | None = None,
    labels: Sequence[str] = (),
) -> Result:
    """Call, with gradients when `want` says so. The inputs' storage is used as it is; nothing is accumulated anywhere."""
    leaves, spec = pytree.tree_flatten((tuple(arguments[0]), dict(arguments[1])))
    sources: dict[str, Tensor] = {}
    if want is not None:
        for order, i in enumerate(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)):
            leaves[i] = leaves[i].detach().requires_grad_(order in want.inputs and leaves[i].is_floating_point())
            if leaves[i].requires_grad:
                sources[labels[order]] = leaves[i]
        for path, p in () if module is None or want.parameters is None else module.named_parameters():
            p.requires_grad_(bool(want.parameters) and p.is_floating_point())
            if p.requires_grad:
                sources[path] = p
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    before = memory.seed(device, SEED)
    with torch.enable_grad() if want is not None else nullcontext():
        out = function(*args, **kwargs) if module is None else function(module, *args, **kwargs)
    drew = not memory.same_seed(device, before)
    flat, structure = pytree.tree_flatten(out)
    result = Result([t for t in flat if isinstance(t, Tensor)], structure, drew)
    if want is not None:
        _differentiate(result, sources, want, cotangents)
    return result


def _differentiate(result: Result, sources: dict[str, Tensor], want: Want, cotangents: Sequence[Tensor] | None) -> None:
    outputs = result.outputs
    roots = [i for i, t in enumerate(outputs) if t.is_floating_point()][: 1 if want.kind == "first" else None]
    roots = [i for i in roots if outputs[i].requires_grad]
    given = list(cotangents) if cotangents is not None else [_cotangent(t, i, want.kind) for i, t in enumerate(outputs)]
    found: Sequence[Tensor | None] = [None] * len(sources)
    if roots and sources:
        found = torch.autograd.grad(
            [outputs[i] for i in roots], list(sources.values()), [given[i] for i in roots], allow_unused=True
        )
    result.outputs = [t.detach() for t in outputs]
    result.gradients, result.cotangents = dict(zip(sources, found, strict=True)), given


def _cotangent(like: Tensor, salt: int, kind: str) -> Tensor:
    if kind == "expanded":
        return torch.full((), 0.75, dtype=like.dtype, device=like.device).expand(like.shape)
    source = torch.Generator().manual_seed(SEED + salt)
    return torch.randn(like.shape, generator=source).to(like.device, like.dtype)


def guarded(ask: Callable[[], T]) -> T:
    """Ask the kernel; whatever it raises becomes the finding."""
    try:
        return ask()
    except Exception as e:  # a stranger's code may raise anything, and all of it means: keep the original, with this reason
        wrong = Differs(f"raises {type(e).__name__}: {' '.join(str(e).split())[:300]}")
        wrong.lasting = not isinstance(e, MemoryError | torch.OutOfMemoryError)
        raise wrong from e


# -- one case -----------------------------------------------------------------------------------------------------


def examine(pair: Pair, case: Case, errors: Errors, *, wants: Sequence[Want | None], slow: bool, compiled: str = "") -> None:
    """Everything about one case. `slow`: also leaks. `compiled`: a `torch.compile` backend to compare with too.

    Raises:
        Differs: the kernel may not stand in for the original.
        Skip: the original itself raises here.
    """
    for want in wants:
        one = _One(pair, case, want, errors)
        one.examine()
        if compiled:
            one.compiled(compiled)
    if slow:
        memory_kept(pair, case)
    pair.intact()
    errors.cases += 1


def wants(case: Case, *, training: bool) -> list[Want | None]:
    """What to ask of a case: only the output for inference; in training also gradients, in all the ways they are asked for."""
    if not training or not case.differentiable:
        return [None]
    asked: list[Want | None] = [Want(case.differentiable, parameters=True)]
    if case.thorough:
        asked.append(Want(case.differentiable, parameters=True, kind="expanded"))
        asked.append(Want(case.differentiable, parameters=False, kind="first"))
        asked.append(Want((), parameters=True))
    return asked


class _One:
    """One case asked in one way."""

    def __init__(self, pair: Pair, case: Case, want: Want | None, errors: Errors) -> None:
        self.pair, self.case, self.want, self.errors = pair, case, want, errors
        self.arguments = case.args, dict(case.kwargs)
        self.labels = names(pair.original, *self.arguments, bound=pair.module is not None)
        self.held = [t for t in pytree.tree_leaves(self.arguments) if isinstance(t, Tensor)]
        self.inputs = memory.Untouched(dict(zip(self.labels, self.held, strict=True)))

    def examine(self) -> None:
        original = self.original()
        usual = self.want is None or self.want == Want(self.case.differentiable, parameters=True)
        if not usual and not any(g is not None for g in original.gradients.values()):
            return  # no gradient flows this way: nothing to compare that the usual way did not
        answer, slack = self.reference(original)

        memory.stain([*original.outputs, *(g for g in original.gradients.values() if g is not None)])
        first = self.kernel(original)
        self.compare(first, original, answer, slack)
        snapshot = [t.clone() for t in first.outputs]

        second = self.kernel(original, memory.Poison(), inference=self.want is None)
        try:
            self.compare(second, original, answer, slack)
        except Differs as e:
            raise Differs(f"{e}; only when called again or where it has not written its output") from None
        if not same(first.outputs, second.outputs) or not same([*first.gradients.values()], [*second.gradients.values()]):
            self.errors.deterministic = False
        if memory.storages(first.outputs) & memory.storages(second.outputs) - memory.storages(self.held):
            raise Differs("returns the same memory from two calls: the second overwrites the result of the first")

        other = pytree.tree_map(lambda t: t * 0.5 if isinstance(t, Tensor) and t.is_floating_point() else t, self.arguments)
        self.kernel(original, arguments=other)
        if not same(first.outputs, snapshot):
            raise Differs("changes the result of an earlier call")

    def original(self) -> Result:
        try:
            with torch.no_grad() if self.want is None else nullcontext():
                result = call(
                    self.pair.original, self.pair.module, self.arguments, self.pair.device, self.want, None, self.labels
                )
        except Exception as e:  # the original is a stranger's code too: what it cannot do is not asked of the kernel
            raise Skip(f"the original raises {type(e).__name__} on {self.case.name}: {' '.join(str(e).split())[:200]}") from e
        if changed := [*self.inputs.changed(), *self.pair.state.changed()]:
            self.inputs.restore()
            self.pair.state.restore()
            raise Differs(f"cannot be tested: the original changes {', '.join(changed)} in place")
        return result

    def kernel(
        self,
        original: Result,
        mode: AbstractContextManager[Any] | None = None,
        *,
        inference: bool = False,
        arguments: Any = None,
        function: Callable[..., Any] | None = None,
    ) -> Result:
        """One call of the kernel, after which nothing may have changed that is not its own."""
        given = memory.Untouched({f"the gradient of output {i}": t for i, t in enumerate(original.cotangents or ())})
        with ExitStack() as stack:
            if self.want is None:
                stack.enter_context(torch.inference_mode() if inference else torch.no_grad())
            if mode is not None:
                stack.enter_context(mode)
            result = guarded(
                lambda: call(
                    function or self.pair.candidate,
                    self.pair.module,
                    self.arguments if arguments is None else arguments,
                    self.pair.device,
                    self.want,
                    original.cotangents,
                    self.labels,
                )
            )
            guarded(lambda: memory.settle(self.pair.device))
        if changed := self.inputs.changed():
            self.inputs.restore()
            raise Differs(f"changes its input {', '.join(changed)} in place")
        if changed := given.changed():
            raise Differs(f"changes {', '.join(changed)} in place, which other parts of a model may share")
        if self.pair.light:
            self.pair.intact()
        if result.drew and not original.drew:
            raise Differs("draws random numbers, which the original does not: everything random after it would change")
        return result

    def reference(self, original: Result) -> tuple[Answer, float]:
        """The reference's answer; or the original's own, with wider limits, where there is none."""
        reference, device = self.pair.reference, self.pair.device
        limits = next((TOLERANCES[t.dtype] for t in original.outputs if t.dtype in TOLERANCES), None)
        why: str | None = "its weights cannot be copied" if reference is None else None
        if reference is not None and limits is not None:

            def run(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[list[Tensor], dict[str, Tensor | None]]:
                given = None if original.cotangents is None else widen(original.cotangents, reference.device)
                result = call(function, reference.module, (args, kwargs), device, self.want, given, self.labels)
                return result.outputs, result.gradients

            try:
                with torch.no_grad() if self.want is None else nullcontext():
                    answer = reference(*self.arguments, run, inside=limits.inside, seed=SEED)
                why = foreign(answer, original, reference.dtype)
            except Exception as e:  # noqa: BLE001  # an original need not know float64: it is its own reference then, and the verdict says so
                why = f"in float64 it raises {type(e).__name__}: {' '.join(str(e).split())[:120]}"
            if why is None:
                return answer.to(device), 1.0
        if why is not None:
            self.errors.reference = f"the original itself: {why}"
        outputs = [t.double() if t.is_floating_point() and t.device.type != "mps" else t for t in original.outputs]
        return Answer(outputs, dict(original.gradients), None, None), 4.0

    def compare(self, kernel: Result, original: Result, answer: Answer, slack: float) -> None:
        """Structure, then numbers, then gradients."""
        structure(kernel, original, self.held)
        generic = self.case.generic and slack == 1.0
        for i, (k, o) in enumerate(zip(kernel.outputs, original.outputs, strict=True)):
            spread = None if answer.spread is None else answer.spread[i]
            finding = compare(k, o, answer.outputs[i], spread=spread, generic=generic, slack=slack)
            self.judge(finding, name(original, i))
        for source, theirs in original.gradients.items():
            mine = kernel.gradients.get(source)
            if theirs is None or mine is None:
                if mine is not None and bool(mine.any()):
                    raise Differs(f"gives {source} a gradient where the original gives none")
                if theirs is not None and bool(theirs.any()):
                    raise Differs(f"gives no gradient of {source}")
                continue
            k, o = mine, theirs
            if k.shape != o.shape or k.dtype != o.dtype:
                raise Differs(
                    f"the gradient of {source} is {tuple(k.shape)} {k.dtype}, the original's {tuple(o.shape)} {o.dtype}"
                )
            reference = answer.gradients.get(source)
            spread = None if answer.gradient_spread is None else answer.gradient_spread.get(source)
            reference = o.double() if reference is None else reference
            # A row of a matrix's gradient is one number (an output's cotangent) times the input: where that one cancels, all do.
            level = 1.0 if o.ndim > 1 and source not in self.labels else 0.0
            finding = compare(
                k, o, reference, spread=spread, generic=generic and not level, gradient=True, level=level, slack=slack
            )
            self.judge(finding, f"the gradient of {source}")

    def judge(self, finding: Finding, name: str) -> None:
        if self.case.generic or self.case.counts:
            self.errors.original = max(self.errors.original, finding.original)
            self.errors.kernel = max(self.errors.kernel, finding.kernel)
        if finding.wrong is not None:
            raise Differs(f"differs in {name}, {finding.wrong}")

    def compiled(self, backend: str) -> None:
        """The kernel traced by `torch.compile`, held to the same limits."""
        original = self.original()
        answer, slack = self.reference(original)
        function, graphs = memory.compiled(self.pair.candidate, backend)
        try:
            for _ in range(2):  # traced, then from the cache
                self.compare(self.kernel(original, function=function), original, answer, slack)
        except Differs as e:
            raise Differs(f"under torch.compile it {e}") from None
        self.errors.compiled = f"{len(graphs)} graph{'s' if len(graphs) != 1 else ''} by {backend}"


def rejudge(pair: Pair, case: Case, outputs: Sequence[Tensor]) -> None:
    """Hold `outputs`, which a kernel gave for these inputs as part of a larger call, against the reference for them alone.

    Raises:
        Differs, Skip: as `examine`.
    """
    one = _One(pair, case, None, Errors())
    original = one.original()
    answer, slack = one.reference(original)
    one.compare(Result(list(outputs), original.structure, drew=False), original, answer, slack)


def memory_kept(pair: Pair, case: Case) -> None:
    """A kernel may keep workspaces; one that keeps something new on every equal call leaks.

    Raises:
        Differs: it does.
    """

    def ask() -> Result:
        fresh = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (case.args, dict(case.kwargs)))
        with torch.no_grad():
            return call(pair.candidate, pair.module, fresh, pair.device)

    if found := memory.leak(lambda: guarded(ask), pair.device):
        raise Differs(f"leaks memory: {found}")
