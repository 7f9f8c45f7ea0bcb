"""A prover that passes every question on and writes down the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .. import render
from ..types import Implementation, Prover, Run, Site, Verdict
from . import inputs, keys

if TYPE_CHECKING:
    import torch.nn as nn


@dataclass(frozen=True, slots=True)
class Entry:
    """One question and its answer."""

    site: Site
    kernel: str
    asked: tuple[str, str]
    """Name of the repository that was asked for, and the layer."""
    digest: str
    training: bool
    tensors: str
    """`random`, or the size of the real call: `2-16 rows`."""
    verdict: Verdict
    known: bool
    """Answered from an earlier verdict, without running anything anew."""


class Ledger:
    """Over a prover. `anew`: real calls are checked whatever is known; else the prover goes by what it knows."""

    def __init__(self, inner: Prover, *, anew: bool = False) -> None:
        self.inner, self.anew = inner, anew
        self.entries: list[Entry] = []

    def equivalent(
        self, site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, run: Run
    ) -> Verdict:
        """As `Prover.equivalent`."""
        verdict = self.inner.equivalent(site, module, original, candidate, run)
        self._note(site, candidate, run, "random", verdict, known=False)
        return verdict

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
        anew: bool = False,  # noqa: ARG002  # `self.anew` decides: whoever keeps a ledger asks at every call
    ) -> tuple[Any, Verdict]:
        """As `Prover.first_call`."""
        known = getattr(self.inner, "known", None)
        before = None if known is None or self.anew else known(site, module, original, candidate, run, args, kwargs)
        output, verdict = self.inner.first_call(site, module, original, candidate, run, args, kwargs, anew=self.anew)
        rows = inputs.count([t for t in pytree.tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)])
        self._note(site, candidate, run, keys.SIZES[keys.size_of(rows)][1], verdict, known=before is not None)
        return output, verdict

    def _note(self, site: Site, candidate: Implementation, run: Run, tensors: str, verdict: Verdict, *, known: bool) -> None:
        origin, layer = candidate.origin, candidate.layer
        asked = origin.candidate.requirement.name, layer
        name = render.named(origin, layer)
        self.entries.append(Entry(site, name, asked, origin.digest, run.training, tensors, verdict, known))
