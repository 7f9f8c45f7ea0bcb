"""One call, made by the original, by its float64 reference and by a kernel; and everything in which the kernel may not differ.

Besides the numbers: structure, shape, dtype, device and layout of what comes back, tensors that it must not touch or share,
memory that it must write, memory that it must give back, and the caller's random state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent import futures
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import memory
from .agree import Differs, Result, foreign, name, same, structure
from .calls import SEED, Want, call, guarded, names
from .inputs import Case
from .reference import Answer, Reference, tensors, widen
from .tolerance import TOLERANCES, Finding, compare


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

    `original` and `candidate` are unbound: with a module they are called as `f(module, *args)`. `watched`: whether the
    module's own tensors may change is looked at, which costs a copy of them.
    """

    def __init__(
        self,
        original: Callable[..., Any],
        candidate: Callable[..., Any],
        module: nn.Module | None,
        reference: Reference,
        device: torch.device,
        *,
        watched: bool = True,
    ) -> None:
        self.original, self.candidate, self.module, self.reference, self.device = original, candidate, module, reference, device
        held = {} if module is None or not watched else tensors(module)
        self.state = memory.Untouched(held)
        self.seen = False
        """Whether the original was watched on its own state once."""
        self.light = sum(t.untyped_storage().nbytes() for t in self.state.held.values()) <= memory.LIGHT

    def intact(self) -> None:
        """Raises `Differs` when the module's own tensors changed."""
        if changed := self.state.changed():
            raise Differs(f"changes the module's {', '.join(changed)} in place")


# -- one case -----------------------------------------------------------------------------------------------------


def examine(pair: Pair, case: Case, errors: Errors, *, wants: Sequence[Want | None], slow: bool, compiled: str = "") -> None:
    """Everything about one case. `slow`: also in another thread. `compiled`: a `torch.compile` backend to compare with too.

    Raises:
        Differs: the kernel may not stand in for the original.
        Skip: the original itself raises here.
    """
    for number, want in enumerate(wants):
        one = _One(pair, case, want, errors)
        one.examine(elsewhere=slow and number == 0)
        if compiled:
            one.compiled(compiled)
    pair.intact()
    errors.cases += 1


def traced(pair: Pair, case: Case, want: Want | None, errors: Errors, backend: str) -> None:
    """The kernel under `torch.compile`, for one case that it is known to do right without.

    Raises:
        Differs, Skip: as `examine`.
    """
    _One(pair, case, want, errors).compiled(backend)
    pair.intact()


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
        self.owned = [*self.held, *pair.state.held.values()]
        self.inputs = memory.Untouched(dict(zip(self.labels, self.held, strict=True)))

    def examine(self, *, elsewhere: bool) -> None:
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
        structure(second, original, self.owned)
        if not same([*first.outputs, *first.gradients.values()], [*second.outputs, *second.gradients.values()]):
            self.errors.deterministic = False
            try:
                self.compare(second, original, answer, slack)
            except Differs as e:
                raise Differs(f"{e}; only when called again or where it has not written its output") from None
        own = memory.storages(self.owned)
        for one, two in ((first.outputs, second.outputs), (first.gradients.values(), second.gradients.values())):
            if memory.storages(one) & memory.storages(two) - own:
                raise Differs("returns the same memory from two calls: the second overwrites the result of the first")

        if elsewhere:
            self.elsewhere(original, answer, slack)
        other = pytree.tree_map(lambda t: t * 0.5 if isinstance(t, Tensor) and t.is_floating_point() else t, self.arguments)
        with_gradients, self.want = self.want, None
        self.kernel(original, arguments=other)
        self.want = with_gradients
        if not same(first.outputs, snapshot):
            raise Differs("changes the result of an earlier call")

    def elsewhere(self, original: Result, answer: Answer, slack: float) -> None:
        """As a server's worker or a replica's thread calls it."""
        count = memory.users_count()

        def ask() -> Result:
            memory.set_threads(count)
            with memory.on(self.pair.device):
                memory.settle(self.pair.device)  # a new thread has no context of CUDA, and a caller's has
                return self.kernel(original)

        with futures.ThreadPoolExecutor(1) as pool:
            try:
                self.compare(pool.submit(ask).result(), original, answer, slack)
            except Differs as e:
                wrong = Differs(f"{e}; only in another thread than the first")
                wrong.lasting = e.lasting
                raise wrong from None

    def original(self) -> Result:
        try:
            with torch.no_grad() if self.want is None else nullcontext(), memory.users_threads():
                result = call(
                    self.pair.original, self.pair.module, self.arguments, self.pair.device, self.want, None, self.labels
                )
        except Exception as e:  # the original is a stranger's code too: what it cannot do is not asked of the kernel
            raise Skip(f"the original raises {type(e).__name__} on {self.case.name}: {' '.join(str(e).split())[:200]}") from e
        changed = self.inputs.changed()
        if self.pair.light or not self.pair.seen:
            changed += self.pair.state.changed()
            self.pair.seen = True
        if changed:
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
            stack.enter_context(memory.users_threads())
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
        if meddled := [name for name in result.settings if name not in original.settings]:
            raise Differs(f"changes torch's {', '.join(meddled)}, for all code that runs after it")
        if result.drew and not original.drew:
            raise Differs("draws random numbers, which the original does not: everything random after it would change")
        return result

    def reference(self, original: Result) -> tuple[Answer, float]:
        """The reference's answer; or the original's own, with wider limits, where there is none."""
        reference, device = self.pair.reference, self.pair.device
        limits = next((TOLERANCES[t.dtype] for t in original.outputs if t.dtype in TOLERANCES), None)
        why: str | None = None
        if limits is not None:

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
            self.errors.reference = f"the original itself: {why}"
        outputs = [t.double() if t.is_floating_point() and t.device.type != "mps" else t for t in original.outputs]
        return Answer(outputs, dict(original.gradients), None, {}), 4.0

    def compare(self, kernel: Result, original: Result, answer: Answer, slack: float, most: int = 0) -> None:
        """Structure, then numbers, then gradients. `most`: only so many rows of each, those that differ most."""
        structure(kernel, original, self.owned)
        generic = self.case.generic and slack == 1.0
        for i, (k, o) in enumerate(zip(kernel.outputs, original.outputs, strict=True)):
            moved = None if answer.moved is None else answer.moved[i]
            finding = compare(k, o, answer.outputs[i], moved=moved, generic=generic, sums=self.case.sums, slack=slack, most=most)
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
            moved = answer.moved_gradients.get(source)
            reference = o if reference is None else reference  # its rows are made wide where they are compared
            # A row of a matrix's gradient is one number (an output's cotangent) times the input: where that one cancels, all do.
            matrix = o.ndim > 1 and source not in self.labels
            level = 0.25 if self.case.vanishing and not matrix else 0.0
            finding = compare(
                k,
                o,
                reference,
                moved=moved,
                generic=generic and not matrix and not self.case.vanishing,
                gradient=True,
                matrix=matrix,
                level=level,
                slack=slack,
                most=most,
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


def rejudge(pair: Pair, case: Case, outputs: Sequence[Tensor], errors: Errors) -> list[Tensor]:
    """Hold `outputs`, which a kernel gave for these inputs as part of a larger call, against the reference for them alone.

    Returns:
        What the reference says.

    Raises:
        Differs, Skip: as `examine`.
    """
    one = _One(pair, case, None, errors)
    original = one.original()
    answer, slack = one.reference(original)
    one.compare(Result(list(outputs), original.structure, drew=False), original, answer, slack)
    errors.cases += 1
    return answer.outputs


def glance(pair: Pair, case: Case, *, want: Want | None = None, errors: Errors | None = None) -> list[Tensor]:
    """The kernel's outputs for a case, after which nothing may have changed that is not its own; with `errors`, held against the
    reference as `want` says.

    Raises:
        Differs, Skip: as `examine`.
    """
    one = _One(pair, case, want, errors or Errors())
    if errors is None:
        return one.kernel(Result([], None, drew=False)).outputs
    original = one.original()
    answer, slack = one.reference(original)
    kernel = one.kernel(original)
    one.compare(kernel, original, answer, slack)
    errors.cases += 1
    return kernel.outputs


def against_original(pair: Pair, case: Case, want: Want | None, *, slack: float, most: int) -> tuple[Result, Result]:
    """Outputs and gradients of both, one against the other, in `most` rows each that differ most. For calls too large for float64.

    Single small elements are not judged. What the kernel gave, and the original.

    Raises:
        Differs, Skip: as `examine`.
    """
    one = _One(pair, case, want and dataclasses.replace(want, kind="periodic"), Errors())
    original = one.original()
    kernel = one.kernel(original)
    structure(kernel, original, one.owned)
    one.compare(kernel, original, Answer(original.outputs, {}, None, {}), slack, most=most)
    return kernel, original
