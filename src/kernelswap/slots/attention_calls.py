"""A call of a swapped model's attention: which of original and kernel answers, and what is looked at before it is the kernel."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..types import Implementation, Prover, Run, Verdict
from . import check, forwards
from .attention_kernels import numbered
from .state import Part, Service

if TYPE_CHECKING:
    from torch import Tensor

SMALL = 1 << 22
"""Elements of a tensor, and 16 times as many scores, up to which a call is proved as it is; of a larger one a part."""
ROWS = 512  # of such a part

Function = Callable[..., Any]


class Meeting:
    """Original and kernels, one for each mode or the same: which one answers."""

    def __init__(self, part: Part, original: Function, prover: Prover, *, every: int | None, compiled: bool) -> None:
        self.part, self.original = part, original
        self.prover, self.every, self.compiled = prover, every, compiled
        self.met: set[Any] = set()
        self.counting = False
        self.lock, self.inside = threading.RLock(), threading.local()

    def function(self) -> Function:
        """What Transformers calls."""
        part, original, met = self.part, self.original, self.met
        tracing, never = forwards.tracing_now(), self.every is None
        calm, learning = _Side(part.inference), _Side(part.training)

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
        ) -> Any:
            side = learning if module.training else calm
            service, kernel = side.service, side.forward
            if tracing():
                trusted = side.compiles and service.standing != "refused" and (service.standing == "accepted" or self.compiled)
                served = trusted and (
                    side.serving is None or side.serving(module, query, key, value, attention_mask, *args, **kwargs)
                )
                return (kernel if served and kernel is not None else original)(
                    module, query, key, value, attention_mask, *args, **kwargs
                )
            number = 0
            if kernel is not None and service.standing != "refused" and kwargs.get("cache") is None:
                number = 1 if side.serving is None else side.serving(module, query, key, value, attention_mask, *args, **kwargs)
            if not number or kernel is None:
                if self.counting:
                    part.count(by_kernel=False)
                return original(module, query, key, value, written_out(attention_mask, key), *args, **kwargs)
            part.calls += 1
            if not never and (self.every or _kind(module, query, key, attention_mask, number) not in met):
                return self.meet(service, number, module, (query, key, value, attention_mask, *args), kwargs)
            if self.counting:
                part.count(by_kernel=True)
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)

        return attention

    def meet(self, service: Service, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call, checked where that is due."""
        assert service.kernel is not None  # `function` asked
        gradients, kernel = forwards.wants_gradients(args[:3]), numbered(service.kernel, number)
        kind = _kind(module, args[0], args[1], args[3], number)
        output, by_kernel = check.UNANSWERED, True
        with self.lock:
            due = kind not in self.met or (bool(self.every) and self.part.calls % (self.every or 1) == 0)
            if due and (getattr(self.inside, "a_check", False) or check.nothing_to_compare((args, kwargs))):
                return self.by_original(module, *args, **kwargs)
            if due:
                self.inside.a_check = True
                try:
                    output, verdict = self.verdict(kernel, module, args, kwargs, gradients=gradients, anew=kind in self.met)
                finally:
                    self.inside.a_check = False
                self.met.add(kind)
                service.settle(verdict, whole=True)
                by_kernel = verdict.accepted
                if self.part.required and not by_kernel:
                    raise check.required(self.part, kernel, verdict)
        if self.counting:
            self.part.count(by_kernel=by_kernel)
        if output is not check.UNANSWERED:
            return output
        return (kernel.forward if by_kernel else self.by_original)(module, *args, **kwargs)

    def by_original(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        """What served before, which knows no lengths."""
        return self.original(module, query, key, value, written_out(mask, key), *args, **kwargs)

    def verdict(
        self, kernel: Implementation, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, gradients: bool, anew: bool
    ) -> tuple[Any, Verdict]:
        """The output, where the check has one that may be the answer, and what was found."""
        run, in_the_open = Run(training=gradients), gradients or module.training or bool(check.modes())
        more = {"anew": True} if anew else {}
        calls = looked_at(args, kwargs, gradients=gradients)
        output, verdict = check.UNANSWERED, Verdict(accepted=True, reason="")
        worst = verdict
        try:
            with check.aside(str(args[0].device)):
                for given, named in calls:
                    output, verdict = self.prover.first_call(
                        self.part.site, module, self.by_original, kernel, run, (module, *given), named, **more
                    )
                    if not verdict.accepted:
                        return check.UNANSWERED, verdict
                    worst = verdict if worst.error_kernel is None else worst
        except Exception as e:  # noqa: BLE001  # a kernel, or a check, may raise anything; the reason is kept
            return check.UNANSWERED, Verdict(accepted=False, reason=f"raised {type(e).__name__} while being checked: {e}")
        whole = len(calls) == 1 or not gradients
        return (output if whole and not in_the_open else check.UNANSWERED), worst


class _Side:
    """What serves one mode."""

    def __init__(self, service: Service) -> None:
        kernel = service.kernel
        self.service, self.forward = service, None if kernel is None else kernel.forward
        self.compiles = kernel is not None and kernel.compiles
        self.serving: Callable[..., int] | None = getattr(self.forward, "serving", None)


@functools.lru_cache(maxsize=64)
def understanding(original: Function) -> Function:
    """`original`, which knows no lengths, for masks as a swapped model's are made. The same object for the same function."""

    @functools.wraps(original)
    def by_original(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        return original(module, query, key, value, written_out(mask, key), *args, **kwargs)

    return by_original


def looked_at(args: tuple[Any, ...], kwargs: dict[str, Any], *, gradients: bool) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The calls that stand for one of query, key, value, mask, ...: itself, or, where it is large, a part of it and then itself."""
    return [(args, kwargs)] if _small(args) else [_part(args, kwargs), *([] if gradients else [(args, kwargs)])]


def _kind(module: Any, query: Tensor, key: Tensor, mask: Any, number: int) -> tuple[Any, ...]:
    """What calls have in common that one check stands for. `number`: of the kernel among several."""
    return (
        number,
        query.shape[2] == 1,
        query.shape[2] == key.shape[2],
        None if mask is None else (mask.dtype, mask.shape[-1] == 1),
        query.dtype,
        query.device,
        query.requires_grad,
        module.training,
        getattr(module, "is_causal", True),
        getattr(module, "sliding_window", None) is None,
    )


def written_out(mask: Any, key: Tensor) -> Any:
    """A mask that everybody reads: of lengths, which keys take part, bool (B, 1, 1, keys)."""
    import torch

    if mask is None or mask.dtype is not torch.int32 or mask.ndim != 4:
        return mask
    live = torch.arange(key.shape[2], device=key.device) < mask[..., :1]
    return live if mask.shape[-1] == 1 else live & (mask[..., 1:] != 0)


def _small(args: Sequence[Any]) -> bool:
    query, key = args[0], args[1]
    scores = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return bool(max(query.numel(), key.numel(), args[2].numel()) <= SMALL and scores <= 16 * SMALL)


def _part(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first sequence, the first head of the keys with the query heads that share it, and of a prompt the first rows."""
    query, key, value, mask, *rest = args
    if kwargs.get("position_bias") is not None or kwargs.get("cu_seq_lens_q") is not None:
        return args, kwargs
    group, queries, keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    rows = min(queries, ROWS)
    if rows < queries:
        # as many keys more than queries as there were, if any: which of them a query sees goes by that
        keys = rows if keys == queries else keys if mask is not None else min(keys, rows + 1)
    if mask is not None:  # lengths have a column more than there are keys
        mask = mask[:1] if not mask.is_floating_point() and mask.element_size() > 1 else mask[:1, :group, :rows, :keys]
    named = {**kwargs, "s_aux": kwargs["s_aux"][:group]} if kwargs.get("s_aux") is not None else kwargs
    return (query[:1, :group, :rows], key[:1, :1, :keys], value[:1, :1, :keys], mask, *rest), named
