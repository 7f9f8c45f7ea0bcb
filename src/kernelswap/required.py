"""`require=`: what must be served by a kernel, or the swap is an error. Reads outcomes; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import sites
from .errors import Required
from .types import Kept, Outcome

if TYPE_CHECKING:
    import torch.nn as nn


def require(outcomes: Sequence[Outcome], wanted: Sequence[str], model: nn.Module | None = None) -> frozenset[int]:
    """Every site that a glob of `wanted` names (a layer, a path, the end of a path) must be served by a kernel in the mode that
    it is in, and there must be one. `attention` names what `model` computes attention with, which its own setting decides.

    Returns:
        The numbers of the outcomes that are named.

    Raises:
        Required: some are not; every distinct reason is listed with its count.
    """
    problems = []
    numbers: set[int] = set()
    for glob in wanted:
        found = [i for i, o in enumerate(outcomes) if sites.named_by(glob, o.site)]
        numbers.update(found)
        named = [outcomes[i] for i in found]
        reasons: dict[str, list[str]] = {}
        for outcome in named:
            if (why := _unserved(outcome)) is not None:
                reasons.setdefault(why, []).append(outcome.site.path)
        if not named and (why := _attention(glob, model)) is not None:
            problems.append(f"{glob}: {why}")
        problems += [
            f"{glob}: {len(paths)} of {len(named)} stay as they are ({paths[0] or 'the model itself'}, ...): {why}"
            for why, paths in reasons.items()
        ]
    if problems:
        raise Required(
            "\n".join(problems),
            asked=f"require={list(wanted)!r}",
            todo="The model is as it was. Take the name out of `require`, or remove what stands in the way.",
        )
    return frozenset(numbers)


def _unserved(outcome: Outcome) -> str | None:
    """Why the original serves it now, or `None`."""
    if isinstance(outcome, Kept):
        return outcome.reason
    choice = outcome.serving(training=outcome.site.training)
    if choice.implementation is not None:
        return None
    mode = "training" if outcome.site.training else "inference"
    return f"in {mode}, which it is in: " + ("; ".join(f"{text}: {why}" for text, why in choice.passed) or "no kernel serves it")


def _attention(glob: str, model: nn.Module | None) -> str | None:
    """Why what no site is called is not there; `None` where it is `attention`, and a kernel computes that."""
    setting = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if glob != "attention" or not isinstance(setting, str):
        return "this model has no such site"
    if "/" in setting:  # as a spec is written; the names of PyTorch's and Transformers' own have none
        return None
    return f"is computed by {setting!r}, which is no kernel; attn_implementation='kernelswap/attention' asks for one"
