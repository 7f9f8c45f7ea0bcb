"""Which swap broke a number: the first n swaps of a plan are applied, n is halved, and what is found is tried alone and left out."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..apply import Applied
from ..errors import KernelSwapError
from ..types import Outcome, Swap

if TYPE_CHECKING:
    import torch.nn as nn

    from ..types import Progress
    from .subject import Subject

METRICS = ("logits", "loss", "perplexity")
USUAL = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Relative change that rounding alone may cause in a whole model, by dtype: without a threshold of the user's, more is broken."""

Metric = Callable[["nn.Module"], float]


@dataclass(frozen=True, slots=True)
class Step:
    """The metric with the first `swaps` swaps."""

    swaps: int
    value: float
    broken: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What came of it."""

    before: float
    """Without any swap."""
    limit: float
    """How far from that is still fine; absolute."""
    swaps: int
    """In the plan."""
    steps: tuple[Step, ...]
    """In the order in which they were tried."""
    number: int | None = None
    """Of the swap that broke it, from 1; None: with all of them it is fine."""
    culprit: Swap | None = None
    alone: Step | None = None
    """With this swap and no other."""
    without: Step | None = None
    """With all others: still broken where there is another culprit."""


def bisect(
    model: nn.Module,
    outcomes: Sequence[Outcome],
    apply: Callable[[Sequence[Outcome]], Applied],
    metric: Metric,
    *,
    threshold: float | None = None,
    relative: bool = False,
    scale: float | None = None,
    progress: Progress | None = None,
) -> Found:
    """The first swap of a plan, in its order, with which `metric` is no longer what it was. log2(n) + 5 runs of the metric.

    Args:
        model: for which `outcomes` was planned; it is as it was afterwards.
        outcomes: of a plan.
        apply: applies some of them to the model.
        metric: of the model, a number; NaN is broken, and so is raising where the unswapped model does not.
        threshold: largest distance from the unswapped model's number; None: what rounding may cause.
        relative: `threshold` is a share of `scale`.
        scale: what a share is of; None: the unswapped model's number.
        progress: told about each run.

    Raises:
        KernelSwapError: the metric raises, or is no number, or varies by more than the limit, without any swap.
    """
    swaps = [o for o in outcomes if isinstance(o, Swap)]
    hunt = _Hunt(model, swaps, apply, metric, progress)
    before = hunt.plainly()
    again = hunt.plainly()
    if threshold is None:
        threshold, relative = usual(model), True
    limit = threshold * abs(before if scale is None else scale) if relative else threshold
    if not abs(again - before) <= limit:
        raise KernelSwapError(
            f"without any swap the metric is {before:.6g}, and {again:.6g} when asked again: it varies by more than {limit:.3g}",
            todo="Make it repeatable (eval mode, a seed), or raise --threshold.",
        )
    hunt.before, hunt.limit = before, limit
    if not swaps or not hunt.first(len(swaps)).broken:
        return Found(before, limit, len(swaps), tuple(hunt.steps))
    fine, broken = 0, len(swaps)
    while broken - fine > 1:
        middle = (fine + broken) // 2
        if hunt.first(middle).broken:
            broken = middle
        else:
            fine = middle
    culprit = swaps[broken - 1]
    alone = hunt.with_([culprit])
    without = hunt.with_([s for s in swaps if s is not culprit])
    return Found(before, limit, len(swaps), tuple(hunt.steps), broken, culprit, alone, without)


def usual(model: nn.Module) -> float:
    """`USUAL` of the model's dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return USUAL.get(dtype, USUAL[torch.bfloat16])


class _Hunt:
    def __init__(
        self,
        model: nn.Module,
        swaps: Sequence[Swap],
        apply: Callable[[Sequence[Outcome]], Applied],
        metric: Metric,
        progress: Progress | None,
    ) -> None:
        self.model, self.swaps, self.apply, self.metric = model, swaps, apply, metric
        self.tell = progress or (lambda *_: None)
        self.before = self.limit = 0.0
        self.steps: list[Step] = []
        self.runs, self.most = 0, math.ceil(math.log2(max(2, len(swaps)))) + 5

    def plainly(self) -> float:
        """Without any swap."""
        self.told()
        try:
            value = float(self.metric(self.model))
        except KernelSwapError:
            raise
        except Exception as e:
            raise KernelSwapError(
                f"the metric raises {type(e).__name__} without any swap: {e}", todo="It must work for the unswapped model."
            ) from e
        if math.isnan(value):
            raise KernelSwapError("the metric is NaN without any swap", todo="There is nothing to compare with.")
        return value

    def first(self, count: int) -> Step:
        """With the first `count`."""
        self.steps.append(self.with_(self.swaps[:count]))
        return self.steps[-1]

    def with_(self, swaps: Sequence[Swap]) -> Step:
        """With these."""
        self.told()
        with self.apply(swaps):
            try:
                value = float(self.metric(self.model))
            except KernelSwapError:
                raise
            except Exception:  # noqa: BLE001  # it did not without swaps: this is a way to be broken
                value = math.nan
        return Step(len(swaps), value, broken=not abs(value - self.before) <= self.limit)

    def told(self) -> None:
        self.runs += 1
        self.tell("looking for the swap", min(self.runs, self.most), self.most)


# -- metrics ------------------------------------------------------------------------------------------------------


def metric(text: str, subject: Subject) -> tuple[Metric, float | None]:
    """A metric by its name, or `file.py:function`; with what a relative threshold is a share of, where that is not its own value.

    `logits`: largest difference of a logit (an encoder: of its last hidden state) from the unswapped model's.
    `loss`: cross entropy of the next token, in nats. `perplexity`: its exponential. All on the subject's inputs.

    Raises:
        KernelSwapError: no such metric; the model has no next token; the file or the function is not there.
    """
    if text == "logits":
        reference = subject.forward().float().clone()
        return lambda _: float((subject.forward().float() - reference).abs().max()), float(reference.abs().max())
    if text in METRICS:
        if subject.kind != "causal":
            raise KernelSwapError(f"an encoder has no {text}", todo="Take logits, or a function of your own: file.py:function.")
        return (lambda _: _loss(subject)) if text == "loss" else (lambda _: math.exp(min(_loss(subject), 700.0))), None
    return _own(text), None


def _loss(subject: Subject) -> float:
    logits = subject.forward().float()
    ids = subject.inputs["input_ids"]
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def _own(text: str) -> Metric:
    file, colon, name = text.rpartition(":")
    path = Path(file)
    if not colon or path.suffix != ".py":
        raise KernelSwapError(f"{text!r} is no metric", todo=f"One of {', '.join(METRICS)}, or file.py:function.")
    if not path.is_file():
        raise KernelSwapError(f"there is no file {path}", asked=f"the metric {text!r}", todo="Name a Python file.")
    spec = importlib.util.spec_from_file_location(f"_kernelswap_metric_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  # it ends in .py and is there
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as an import does: dataclasses and pickles in it look it up
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        del sys.modules[spec.name]
        raise KernelSwapError(f"{path} raises {type(e).__name__} when imported: {e}", asked=f"the metric {text!r}") from e
    found: Any = getattr(module, name, None)
    if not callable(found):
        raise KernelSwapError(
            f"{path} has no function {name}", asked=f"the metric {text!r}", todo="It takes the model and gives a number."
        )
    return found  # type: ignore[no-any-return]  # the user's own
