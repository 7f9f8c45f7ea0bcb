"""A real call: rows of it and shapes derived from it are checked on copies; then the whole output is held against the original's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..types import Implementation, Site, Verdict
from . import calls, head, inputs, keys, memory, recipes, trial
from .agree import Differs
from .calls import Want
from .inputs import Case
from .reference import Reference, tensors, twin
from .tolerance import compare

PART = 1 << 22
"""Elements of a real tensor that are looked at in float64 (32 MiB); larger calls are represented by rows of it."""
WHOLE = 1 << 27
"""Elements up to which a whole output is compared with the original's; of larger ones only the rows of `PART` are."""
OWN = 1 << 30
"""Bytes of weights up to which a check of a real call works on its own copy of them."""
BOTH = 6.0  # between two implementations lie the errors of both, each up to the floors and a multiple of what is usual
SUSPECTS = 64  # rows that stand out in a whole call and are looked at again
OTHERS = 199, 263  # rows in the two size buckets that the shapes below leave out; prime
DERIVED = 13  # rows of the non-contiguous shape made from a real call: prime, and beyond one vector register


ROWWISE = frozenset({"rows", "residual_rows", "gated_rows", "elementwise", "gated", "mlp", "projections", "head"})
"""Probes whose outputs depend, row by row, on the same row of their inputs alone."""
SUMMED = frozenset({"mlp", "projections", "head"})
"""Probes whose outputs are sums of many terms; see `Case.sums`."""
ROTARY = frozenset({"rotary", "norm_rotary"})
"""Probes of q, k, cos and sin, which have positions."""


# -- verdicts in words ---------------------------------------------------------------------------------------------


def accepted(errors: trial.Errors) -> Verdict:
    """What was found, in a sentence."""
    reason = f"as accurate as the original: error {errors.kernel:.1e}, original {errors.original:.1e}"
    if errors.reference != "float64" or not errors.cases:
        reason = "agrees with the original"
    return Verdict(
        accepted=True, reason=reason, error_original=errors.original, error_kernel=errors.kernel, details=_details(errors)
    )


def refused(e: Differs, errors: trial.Errors, case: str) -> Verdict:
    """What was wrong, and on which inputs."""
    where = f" (on {case})" if case else ""
    return Verdict(
        accepted=False,
        reason=f"{e}{where}",
        error_original=errors.original,
        error_kernel=errors.kernel,
        details=(*_details(errors), ("case", case)),
    )


def _details(errors: trial.Errors) -> tuple[tuple[str, str], ...]:
    found = [
        ("reference", errors.reference),
        ("cases", str(errors.cases)),
        ("deterministic", "yes" if errors.deterministic else "no, within tolerance"),
    ]
    if errors.compiled:
        found.append(("compiled", errors.compiled))
    return tuple(found)


# -- the call -------------------------------------------------------------------------------------------------------


def call(function: Callable[..., Any], module: nn.Module | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`function` on the module, when there is one, and the arguments."""
    return function(*args, **kwargs) if module is None else function(module, *args, **kwargs)


class Real:
    """One call of a site, by its original and by a kernel. `module` is None where the site is a function."""

    def __init__(
        self,
        site: Site,
        module: nn.Module | None,
        original: Callable[..., Any],
        candidate: Implementation,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self.site, self.module, self.original, self.candidate = site, module, original, candidate
        self.args, self.kwargs = args, kwargs
        self.leaves = calls.leaves(args, kwargs)
        self.held = [t for t in self.leaves if isinstance(t, Tensor)]
        self.device = memory.indexed(self.held[0].device if self.held else torch.device("cpu"))
        self.size = head.size(site.row.probe, module, self.held)
        self.dim = int(kwargs.get("unsqueeze_dim", args[4] if len(args) == 5 and isinstance(args[4], int) else 1))
        self.graded = torch.is_grad_enabled()  # now: the checks run in a mode of their own
        self.want: Want | None = None
        self.pair: trial.Pair | None = None

    @functools.cached_property
    def spec(self) -> pytree.TreeSpec:
        """What makes arguments of leaves again."""
        return pytree.tree_structure((self.args, dict(self.kwargs)))

    def by_original(self) -> Any:
        """The original's answer, as if nobody had asked a kernel."""
        return call(self.original, self.module, self.args, self.kwargs)

    def by_kernel(self, verdict: Verdict, leaves: list[Any] | None = None) -> tuple[Any, Verdict]:
        """The kernel's answer under an accepting verdict; when it raises, the original's and a refusal. `leaves`: copies of the call's own."""
        args, kwargs = (self.args, self.kwargs) if leaves is None else pytree.tree_unflatten(leaves, self.spec)
        try:
            with memory.on(self.device):
                return call(self.candidate.forward, self.module, args, kwargs), verdict
        except Exception as e:  # noqa: BLE001  # a kernel may raise anything: the original answers, and the reason is kept
            why = f"raises {type(e).__name__}: {' '.join(str(e).split())[:300]}"
        return self.by_original(), Verdict(accepted=False, reason=why, key=verdict.key)

    def on_copies(self) -> tuple[Verdict, bool]:
        """Check rows of the call, and shapes derived from it. The second value: whether the verdict holds tomorrow."""
        if (why := self.untestable()) is not None:
            return Verdict(accepted=False, reason=f"cannot be tested: {why}"), True
        if self.module is not None and not can_copy(self.module):
            return accepted(trial.Errors(reference="the original itself: its weights cannot be copied")), True
        errors, name = trial.Errors(), "this call"
        try:
            self.pair = self.paired()
            for number, case in enumerate(self.cases()):
                name = case.name
                try:
                    trial.examine(self.pair, case, errors, wants=[self.want], slow=False)
                except trial.Skip as e:
                    if number == 0:
                        return Verdict(accepted=False, reason=f"cannot be tested: {e}"), False
        except Differs as e:
            return refused(e, errors, name), e.lasting
        except torch.OutOfMemoryError:
            return Verdict(accepted=False, reason=f"cannot be tested: the check ran out of memory on {name}"), False
        return accepted(errors), True

    def untestable(self) -> str | None:
        """Why this call cannot be repeated, or `None`."""
        if (stranger := next((v for v in self.leaves if not _simple(v)), None)) is not None:
            return f"it is given a {type(stranger).__name__}, which a check cannot copy"
        if self.size > WHOLE and not positions(self.site.row.probe, self.leaves, self.dim):
            return f"it is given {self.size} elements at once, and there are no rows to take from them"
        return None

    def paired(self) -> trial.Pair:
        """Both on a copy of the module whose tensors are its own (up to `OWN` bytes)."""
        module = None if self.module is None else _copy(self.module)
        self.ask(module)
        original, kernel = (head.through(self.site.row.probe, f) for f in (self.original, self.candidate.forward))
        return trial.Pair(original, kernel, module, Reference(original, module, self.device), self.device)

    def ask(self, module: nn.Module | None) -> None:
        """Find out which gradients the call is asked for."""
        trainable = module is not None and any(p.requires_grad for p in module.parameters())
        differentiable = tuple(i for i, t in enumerate(self.held) if t.requires_grad)
        if self.graded and (differentiable or trainable):
            self.want = Want(differentiable, parameters=trainable)

    def cases(self) -> Iterator[Case]:
        """The call, or as many of its rows as `PART` allows; then one row, 13, 13 with gaps between, none; then the sizes left.

        After the first call nothing is checked any more: so it stands for calls of every size, as far as its rows can.
        """
        probe, n = self.site.row.probe, positions(self.site.row.probe, self.leaves, self.dim)
        if self.size <= PART:
            yield self.case("this call", [own(v) for v in self.leaves], counts=True)
        elif n:
            rows = max(1, min(n, PART // max(1, self.size // n)))
            if (picked := self.taken(torch.linspace(0, n - 1, rows, dtype=torch.float64, device="cpu").long())) is not None:
                yield self.case(f"{rows} of the {n} rows of this call", picked, counts=True)
        if n < 1 or probe not in recipes.RECIPES:
            return
        few = [i * n // DERIVED for i in range(DERIVED)]
        for name, index in (("its first row alone", [0]), (f"{DERIVED} of its rows", few), ("none of its rows", [])):
            if (picked := self.taken(torch.tensor(index, dtype=torch.long, device="cpu"))) is not None:
                yield self.case(name, picked)
                if index == few:
                    yield self.case(f"{name}, non-contiguous", [strided(v) for v in picked])
        for rows in OTHERS:
            if keys.size_of(rows) != keys.size_of(n) and rows * (self.size // n) <= PART:
                picked = self.taken(torch.arange(rows, device="cpu") % n)
                if picked is not None:
                    yield self.case(f"{rows} of its rows{', repeated' if rows > n else ''}", picked)

    def taken(self, index: Tensor) -> list[Any] | None:
        """Rows of the call, copied."""
        picked = take(self.site.row.probe, self.leaves, index, self.dim)
        return None if picked is None else [own(v) for v in picked]

    def case(self, name: str, leaves: Sequence[Any], *, counts: bool = False) -> Case:
        """Leaves in the places of the call's own. Never generic: real activations have outliers."""
        args, kwargs = pytree.tree_unflatten(list(leaves), self.spec)
        return Case(name, args, kwargs, counts=counts, sums=self.site.row.probe in SUMMED)

    def answered(self, verdict: Verdict) -> tuple[Any, Verdict]:
        """The kernel's answer. Where only rows of it were checked, all of it is now held against the original's.

        This is the one extra forward that a check costs at full size. It has no gradients; above `WHOLE` it is left out.
        """
        if (self.size <= PART and self.pair is not None) or self.size > WHOLE or self.site.row.probe == "head":
            return self.by_kernel(verdict)
        module = self.module if self.pair is None else self.pair.module  # a copy has no swapped modules and no hooks inside
        with memory.quiet(self.device), torch.no_grad():
            expected = [
                t for t in pytree.tree_leaves(call(self.original, module, self.args, self.kwargs)) if isinstance(t, Tensor)
            ]
        given = memory.Untouched({str(i): t for i, t in enumerate(self.held)})
        output, verdict = self.by_kernel(verdict)
        if not verdict.accepted:
            return output, verdict
        why = None
        if given.changed():
            given.restore()
            why = "changes its input in place (in a call of this size)"
        got = [t.detach() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        if why is None:
            why = self.differs(got, expected)
        return (output, verdict) if why is None else (self.by_original(), Verdict(accepted=False, reason=why))

    def differs(self, kernel: Sequence[Tensor], original: Sequence[Tensor]) -> str | None:
        """Why whole outputs are not good enough, or `None`. Rows that stand out get the benefit of the float64 reference."""
        if len(kernel) != len(original):
            return f"returns {len(kernel)} tensors, the original {len(original)}"
        suspects: list[int] = []
        why = None
        for k, o in zip(kernel, original, strict=True):
            if k.shape != o.shape or k.dtype != o.dtype:
                return f"gives {tuple(k.shape)} {k.dtype}, the original {tuple(o.shape)} {o.dtype} (in the whole call)"
            start = 0
            for some_k, some_o in zip(blocks(k), blocks(o), strict=True):
                wide = some_o if o.device.type == "mps" else some_o.double()
                found = compare(some_k, some_o, wide, sums=self.site.row.probe in SUMMED, slack=BOTH)
                if found.wrong is not None:
                    why = why or f"differs in output, {found.wrong} (in the whole call)"
                    suspects += [start + i for i in _worst(some_k.to(wide), wide)]
                start += len(some_k)
        if why is None or self.site.row.probe not in ROWWISE or any(t.ndim < 2 for t in kernel):
            return why
        rows = torch.tensor(sorted(set(suspects))[:SUSPECTS], device="cpu")
        picked = self.taken(rows)
        if picked is None or self.pair is None:
            return why
        case = self.case("its rows that stand out", picked)
        try:
            with memory.quiet(self.device), torch.no_grad():
                mine = [t.reshape(-1, t.shape[-1])[rows.to(t.device)] for t in kernel]
                trial.rejudge(self.pair, case, mine, trial.Errors())
        except (Differs, trial.Skip) as e:
            return f"{e} (of rows {', '.join(map(str, rows[:3].tolist()))}{', ...' if len(rows) > 3 else ''} of the whole call)"
        return None


def _worst(kernel: Tensor, original: Tensor) -> list[int]:
    """Rows that differ most, in norm or in one element."""
    difference = (kernel - original).nan_to_num(torch.inf).abs()
    few = min(SUSPECTS // 4, len(difference))
    measures = difference.norm(dim=-1) / (original.norm(dim=-1) + 1e-37), difference.amax(-1) / (original.abs().amax(-1) + 1e-37)
    return [int(i) for m in measures for i in m.nan_to_num(torch.inf).topk(few).indices]


def can_copy(module: nn.Module) -> bool:
    """Whether its tensors are all here and ordinary; offloaded, sharded and quantised ones are not."""
    return all(not t.is_meta and type(t) in (Tensor, nn.Parameter, nn.Buffer) for t in tensors(module).values())


def _copy(module: nn.Module) -> nn.Module:
    heavy = sum(t.untyped_storage().nbytes() for t in tensors(module).values()) > OWN
    return twin(module, lambda _, t: _leaf(t.detach() if heavy else t.detach().clone(), t))


def _leaf(tensor: Tensor, like: Tensor) -> Tensor:
    return nn.Parameter(tensor, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def own(value: Any) -> Any:
    """A copy in the same layout; a tensor that was a view with gaps keeps its strides."""
    if not isinstance(value, Tensor):
        return value
    held = value.detach()
    if value.is_contiguous() or held.numel() == 0 or 0 in held.stride():
        return held.clone(memory_format=torch.preserve_format)
    span = sum((n - 1) * s for n, s in zip(held.shape, held.stride(), strict=True)) + 1
    base = torch.empty(span, dtype=held.dtype, device=held.device)
    copy = base.as_strided(held.shape, held.stride())
    return copy.copy_(held)


def strided(value: Any) -> Any:
    """The same numbers, every second row of a tensor that is NaN elsewhere."""
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return value
    wide = torch.full(
        (*value.shape[:-2], 2 * value.shape[-2], value.shape[-1]), torch.nan, dtype=value.dtype, device=value.device
    )
    view = wide[..., ::2, :]
    return view.copy_(value.detach())


def _simple(value: Any) -> bool:
    """Whether a check can call twice with it: a tensor, or something that holds none (a cache would remember the first call)."""
    if isinstance(value, Tensor | nn.Module):
        return True
    held = pytree.tree_leaves(list(getattr(value, "__dict__", {}).values()))
    return not type(value).__name__.endswith("Cache") and not any(isinstance(v, Tensor) for v in held)


def blocks(t: Tensor) -> Iterator[Tensor]:
    """Some rows at a time: float64 copies of them stay within `PART` elements."""
    rows = t.reshape(-1, t.shape[-1]) if t.ndim else t.reshape(1, 1)
    step = max(1, PART // max(1, rows.shape[-1]))
    yield from (rows[start : start + step] for start in range(0, len(rows), step))


# -- rows of a call ------------------------------------------------------------------------------------------------


def take(probe: str, leaves: Sequence[Any], index: Tensor, unsqueeze_dim: int = 1) -> list[Any] | None:
    """The call restricted to some rows (row-wise probes) or positions (rotary); None where that has no meaning."""
    floating = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.ndim]
    if not floating:
        return None
    if probe in ROWWISE:
        lead = floating[0].shape[:-1]
        return [
            t.reshape(-1, t.shape[-1])[index.to(t.device)] if isinstance(t, Tensor) and t.ndim > 1 and t.shape[:-1] == lead else t
            for t in leaves
        ]
    if probe in ROTARY and len(floating) >= 4 and floating[0].ndim == 4 and unsqueeze_dim in (1, 2):
        axes = [3 - unsqueeze_dim] * 2 + [floating[2].ndim - 2] * 2
        if len({t.shape[a] for t, a in zip(floating[:4], axes, strict=True)}) != 1:
            return None
        picked = {id(t): t.index_select(a, index.to(t.device)) for t, a in zip(floating[:4], axes, strict=True)}
        return [picked.get(id(t), t) for t in leaves]
    return None


def positions(probe: str, leaves: Sequence[Any], unsqueeze_dim: int = 1) -> int:
    """How many indices `take` can choose from."""
    floating = [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point() and t.ndim]
    if not floating:
        return 0
    if probe in ROWWISE:
        return inputs.count(floating)
    rotary = probe in ROTARY and floating[0].ndim == 4 and unsqueeze_dim in (1, 2)
    return int(floating[0].shape[3 - unsqueeze_dim]) if rotary else 0
