"""The sites of a model by kind, and each kind measured by itself, on the tensors that the model gave it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import render
from ..slots import fused, rebuild
from ..types import Implementation, Kept, Outcome, Site, Swap, Verdict
from . import ab

if TYPE_CHECKING:
    import torch.nn as nn

    from ..types import Progress

Call = tuple[tuple[Any, ...], dict[str, Any]]
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Kind:
    """Sites of one layer, one original and one width, which are served alike."""

    key: Key
    """Layer, name of the original, width of its own parameters (`768`, or empty)."""
    outcomes: tuple[Outcome, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where they are."""
        return tuple(o.site for o in self.outcomes)

    @property
    def swapped(self) -> bool:
        """Whether a kernel serves it in the mode that the model is in."""
        return self.implementation is not None

    @property
    def implementation(self) -> Implementation | None:
        """What serves the first of them now; None: the original."""
        first = self.outcomes[0]
        return first.serving(training=first.site.training).implementation if isinstance(first, Swap) else None

    @property
    def serves(self) -> str:
        """`kernelswap/layers:RMSNorm`, or empty."""
        found = self.implementation
        if found is None:
            return ""
        return render.named(found.origin, found.layer)

    @property
    def reason(self) -> str:
        """Why the original stays; empty when it does not. Where sites differ, the first one's."""
        first = self.outcomes[0]
        if isinstance(first, Kept):
            return first.reason
        choice = first.serving(training=first.site.training)
        return "" if choice.implementation else "; ".join(f"{spec}: {why}" for spec, why in choice.passed)

    @property
    def names(self) -> tuple[str, ...]:
        """What `skip=` calls them: paths, or for a function, which shares its path with a module, the layer."""
        return tuple(dict.fromkeys(s.path if s.kind == "module" else s.layer for s in self.sites))

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """Of those that are swapped."""
        choices = (o.serving(training=o.site.training) for o in self.outcomes if isinstance(o, Swap))
        return tuple(c.verdict for c in choices if c.verdict is not None)

    def error(self, side: str) -> float | None:
        """The largest error against float64 that a check of this kind saw; `side` is `original` or `kernel`."""
        found = [e for v in self.verdicts if (e := getattr(v, f"error_{side}")) is not None]
        return max(found, default=None)


def group(outcomes: Iterable[Outcome], model: nn.Module) -> tuple[Kind, ...]:
    """By layer, original, width and whether swapped; in the order of the model."""
    modules = dict(model.named_modules())
    found: dict[tuple[Any, ...], list[Outcome]] = {}
    for outcome in outcomes:
        site = outcome.site
        width = _width(modules[site.path]) if site.kind == "module" else ""
        found.setdefault((site.layer, site.target.rpartition(".")[2], width, isinstance(outcome, Swap)), []).append(outcome)
    return tuple(Kind(key[:3], tuple(members)) for key, members in found.items())


def _width(module: nn.Module) -> str:
    own = [p.shape[-1] for p in module._parameters.values() if p is not None and p.dim()]  # noqa: SLF001  # as nn.Module does
    return str(own[0]) if own else ""


# -- what the model gives to each kind ----------------------------------------------------------------------------


def record(model: nn.Module, kinds: Sequence[Kind], run: Callable[[], Any]) -> dict[Key, list[Call]]:
    """Every call that `run` makes to the first site of each kind. `model` is unswapped, and is as it was afterwards."""
    calls: dict[Key, list[Call]] = {kind.key: [] for kind in kinds}
    undo: list[Callable[[], Any]] = []
    try:
        for kind in kinds:
            site, into = kind.sites[0], calls[kind.key]
            module = model.get_submodule(site.path)
            if site.kind == "module":
                hook = module.register_forward_pre_hook(
                    lambda _, args, kwargs, into=into: into.append((args, dict(kwargs))),
                    with_kwargs=True,
                )
                undo.append(hook.remove)
            elif site.kind == "function":
                undo.append(_listen(module, site.name, into))
        run()
    finally:
        for back in reversed(undo):
            back()
    return calls


def _listen(module: nn.Module, name: str, into: list[Call]) -> Callable[[], Any]:
    """Give this instance a forward that notes what it passes to the function `name`."""
    function = rebuild.found(fused.opened(type(module).forward, [name]), name)

    def heard(*args: Any, **kwargs: Any) -> Any:
        into.append((args, kwargs))
        return function(*args, **kwargs)

    return stand_in(module, {name: heard})


def stand_in(module: nn.Module, names: Mapping[str, Callable[..., Any]]) -> Callable[[], Any]:
    """Let this instance's forward find these functions under those names; what undoes it is returned."""
    former = module.__dict__.get("forward")
    forward = former.__func__ if isinstance(former, types.MethodType) else type(module).forward
    module.__dict__["forward"] = types.MethodType(rebuild.rebuilt(fused.opened(forward, names), dict(names)), module)

    def undo() -> None:
        if former is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = former

    return undo


# -- each by itself -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One kind and its times by phase (`prefill`, `decode`, `forward`), per call."""

    kind: Kind
    pairs: Mapping[str, ab.Pair] = field(default_factory=dict)
    tried: Kind | None = None
    """The same kind while a kernel served it, where the measurement then took the kernel out."""

    @property
    def loses(self) -> str | None:
        """Why the original should stay, or stayed: the kernel is slower in a phase, or faster in none; or `None`."""
        slow = [f"{p.speedup:.2f}x in {phase}" for phase, p in self.pairs.items() if p.slower]
        if slow:
            return f"the kernel is slower here ({', '.join(slow)})"
        if self.pairs and not any(p.faster for p in self.pairs.values()):
            return "the kernel is not faster here"
        return None

    def error(self, side: str) -> float | None:
        """As `Kind.error`, also where the kernel was taken out again."""
        return (self.tried or self.kind).error(side)


def measure(
    kinds: Sequence[Kind],
    original: nn.Module,
    swapped: nn.Module,
    calls: Mapping[str, Mapping[Key, Sequence[Call]]],
    *,
    seconds: float,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[Measured, ...]:
    """Original and kernel of each swapped kind, in turns, on a recorded call of each phase. `seconds` for all together."""
    import torch

    work = [(k, phase) for k in kinds if k.swapped for phase in calls if calls[phase].get(k.key)]
    pairs: dict[Key, dict[str, ab.Pair]] = {}
    for done, (kind, phase) in enumerate(work):
        if progress:
            progress("timing each kind of site", done, len(work))
        args, kwargs = calls[phase][kind.key][-1]
        before, after = sides(kind, original, swapped)
        with torch.no_grad():
            pairs.setdefault(kind.key, {})[phase] = ab.interleave(
                lambda f=before, a=args, k=kwargs: f(*a, **k),  # type: ignore[misc]  # bound now
                lambda f=after, a=args, k=kwargs: f(*a, **k),  # type: ignore[misc]  # bound now
                seconds=seconds / len(work),
                device=device,
            )
    if progress and work:
        progress("timing each kind of site", len(work), len(work))
    return tuple(Measured(kind, pairs.get(kind.key, {}) if kind.swapped else {}) for kind in kinds)


def sides(kind: Kind, original: nn.Module, swapped: nn.Module) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What to call without and with the kernel, for the first site of a kind."""
    site = kind.sites[0]
    if site.kind == "module":
        return original.get_submodule(site.path), swapped.get_submodule(site.path)
    implementation = kind.implementation
    assert implementation is not None
    forward = type(original.get_submodule(site.path)).forward
    return rebuild.found(fused.opened(forward, [site.name]), site.name), implementation.forward
