"""What would serve a model on a machine that is not here: chosen from what builds say about themselves, proved when one gets there.

Everything is asked that can be answered without running a kernel: rows of the table, builds and their metadata, names in a
build's `layers.py`. Whether a kernel computes what the original does is taken from the plan made here.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from . import build as building
from . import render, sites, spec, table
from .errors import KernelSwapError
from .slots import function as function_slot
from .sources.bundled import BundledSource
from .types import Candidate, Machine, Outcome, Requirement, Row, Site, Swap, Use

if TYPE_CHECKING:
    import torch.nn as nn

    from .api import Swapper

_DEVICES = {"metal": "mps", "cann": "npu"}


@dataclass(frozen=True, slots=True)
class Forecast:
    """One site, here and there."""

    site: Site
    """As it is here."""
    here: str
    """What serves it in inference: `kernelswap/layers:RMSNorm`; empty: the original."""
    there: str
    build: str
    """The build that would be taken there, or how one comes to be."""
    why: str
    """Why the original would stay there; empty when it would not."""
    passed: tuple[tuple[str, str], ...] = ()
    """Candidates that would not serve there, with the reason, in order."""

    @property
    def lost(self) -> bool:
        """Served here, and not there."""
        return bool(self.here) and not self.there

    @property
    def gained(self) -> bool:
        """The other way round."""
        return bool(self.there) and not self.here


def device_of(machine: Machine) -> str:
    """Where a model would be on that machine: `cuda:0`, `cpu`."""
    kind = _DEVICES.get(machine.backend, machine.backend)
    return "cpu" if kind == "cpu" else f"{kind}:0"


def everywhere(rows: Sequence[Row]) -> tuple[Row, ...]:
    """A table to plan with for a forecast: its rows for statements are for every device, so that they are found, and proved, here."""
    return tuple(replace(row, use=tuple(replace(use, on=()) for use in row.use)) if row.statements else row for row in rows)


def forecast(
    swapper: Swapper,
    model: nn.Module,
    outcomes: Sequence[Outcome],
    machine: Machine,
    *,
    hub: bool = False,
    named: Collection[str] = (),
    refused: Mapping[tuple[str, str], Collection[tuple[str, str | None]]] | None = None,
) -> tuple[Forecast, ...]:
    """One forecast for each outcome of a plan made here.

    Args:
        swapper: asks its sources; offline if there is no network there. What its table says of devices holds, here as there.
        model: that the plan was made for.
        outcomes: of a plan on this machine, by the table `everywhere`; nothing of them is changed.
        machine: the other one.
        hub: count in kernels of the table that are on the hub.
        named: specs that count in any case, because somebody wrote them.
        refused: `(layer, original) -> (name, layer)` of kernels that the proof here found to compute something else.

    Fetches lists and small files, no kernel; runs nothing.
    """
    there = _There(swapper, machine, hub=hub, named=named, refused=refused or {})
    return there.beside(model, [there.outcome(o) for o in outcomes])


class _There:
    def __init__(
        self,
        swapper: Swapper,
        machine: Machine,
        *,
        hub: bool,
        named: Collection[str],
        refused: Mapping[tuple[str, str], Collection[tuple[str, str | None]]],
    ) -> None:
        self.swapper, self.machine, self.hub, self.named, self.refused = swapper, machine, hub, named, refused
        self.device = device_of(machine)
        self.builds: dict[str, tuple[Candidate | None, str]] = {}
        self.names: dict[Candidate, frozenset[str] | None] = {}
        self.uses = {(row.layer, use.spec): use for row in swapper.table if row.statements for use in row.use}

    def outcome(self, outcome: Outcome) -> Forecast:
        site = self.as_in_table(outcome.site)
        serving = outcome.inference.implementation if isinstance(outcome, Swap) else None
        if serving is not None and site.row.statements and not self.may_be_here(site, serving.layer):
            serving = None  # it was only proved here
        here = render.named(serving.origin, serving.layer) if serving is not None else ""
        if site.row.off or site.left_out:
            return Forecast(site, here, "", "", site.left_out or "left alone: you asked for it")
        if not isinstance(outcome, Swap) and outcome.reason.startswith("inside "):
            return Forecast(site, here, "", "", outcome.reason)
        passed: list[tuple[str, str]] = []
        for use in self.in_order(site, serving.layer if serving is not None else None):
            found = self.judge(use, site)
            if isinstance(found, tuple):
                return Forecast(site, here, *found, "", tuple(passed))
            passed.append((use.spec, found))
        return Forecast(site, here, "", "", _telling(passed, site, self.device), tuple(passed))

    def as_in_table(self, site: Site) -> Site:
        """For the devices again that the table names, where `everywhere` widened it."""
        if not site.row.statements:
            return site
        return replace(site, row=replace(site.row, use=tuple(self.uses.get((site.layer, u.spec), u) for u in site.row.use)))

    def may_be_here(self, site: Site, layer: str) -> bool:
        """Whether a use that gives this layer is for this machine."""
        of = (use for use in site.row.use if spec.parse(use.spec).layer == layer)
        return any(table.misfit(use, site.device, self.swapper.machine) is None for use in of)

    def beside(self, model: nn.Module, found: Sequence[Forecast]) -> tuple[Forecast, ...]:
        """As in a plan, statements are left alone where what they call would be."""
        modules = sites.modules(model)
        by_place = {(f.site.path, f.site.name): f for f in found}
        return tuple(_with_those(f, modules[f.site.path], by_place) if f.there and f.site.row.statements else f for f in found)

    def in_order(self, site: Site, proved: str | None) -> list[Use]:
        """The table's order; of one kernel's layers the one first that was proved here."""
        return sorted(site.row.use, key=lambda use: proved is not None and spec.parse(use.spec).layer != proved)

    def judge(self, use: Use, site: Site) -> tuple[str, str] | str:
        """What would serve and its build, or why this use would not."""
        requirement = spec.parse(use.spec)
        why = table.misfit(use, self.device, self.machine)
        if why is not None:
            return why
        if (requirement.name, requirement.layer) in self.refused.get((site.layer, site.target), ()):
            return "computes something else than this original, as was found here"
        if requirement.source == "hub" and not self.hub and use.spec not in self.named:
            return "is on the hub, and nothing is fetched unless you ask: hub=True"
        candidate, build = self.build(requirement)
        if candidate is None and not build.startswith("compiled"):
            return build
        if candidate is not None and requirement.layer is not None:
            names = self.layers(candidate)
            if names is not None and requirement.layer not in names:
                return f"its build {candidate.variant} has no layer {requirement.layer}"
        prefix = "kernelswap/" if requirement.source == "bundled" else ""
        return f"{prefix}{requirement.name.removeprefix('kernelswap/')}:{requirement.layer}", build

    def build(self, requirement: Requirement) -> tuple[Candidate | None, str]:
        """The build that would be taken there; `None` with the reason, or with `compiled ...` where one can be made there."""
        text = str(replace(requirement, layer=None, text=None))
        if text not in self.builds:
            self.builds[text] = self._build(requirement, text)
        return self.builds[text]

    def _build(self, requirement: Requirement, text: str) -> tuple[Candidate | None, str]:
        try:
            found = self.swapper.find(text, machine=self.machine, device=self.device)
        except KernelSwapError as e:
            return None, e.reason
        if found.chosen is not None:
            return found.chosen, found.chosen.variant
        source = self.swapper.sources.get(requirement.source)
        if isinstance(source, BundledSource):
            root = source.root / requirement.name.removeprefix("kernelswap/")
            file = building.sources(root)
            if file is not None and building.misfit(file, self.machine) is None:
                return None, "compiled there, by its C++ compiler"
        nearest = found.judged[0] if found.judged else None
        return (
            None,
            f"no build fits; the nearest, {nearest.candidate.variant}: {nearest.rejected}" if nearest else "has no builds",
        )

    def layers(self, candidate: Candidate) -> frozenset[str] | None:
        """Names that the build's layers and its package define; `None` where they cannot be told without running it."""
        if candidate not in self.names:
            source = self.swapper.sources[candidate.requirement.source]
            self.names[candidate] = _names(lambda name: source.read(candidate, name))
        return self.names[candidate]


def _with_those(found: Forecast, module: nn.Module, by_place: Mapping[tuple[str, str], Forecast]) -> Forecast:
    site = found.site
    called = [(norm, (f"{site.path}.{norm}".lstrip("."), "")) for norm in function_slot.norms(module, site.name)]
    called += [(name, (site.path, name)) for name in function_slot.inside(module, site.name)]
    for name, place in called:
        other = by_place.get(place)
        if other is None or other.site.left_out.startswith(sites.NOT_ASKED_FOR):
            continue
        if not other.there:
            return replace(found, there="", build="", why=f"its {name} would be left as it is: {other.why}")
        if not other.there.startswith("kernelswap/") and other.there.partition(":")[0] != found.there.partition(":")[0]:
            return replace(found, there="", build="", why=f"its {name} would be served by {other.there}")
    return found


def _names(read: Callable[[str], bytes | None]) -> frozenset[str] | None:
    """What `layers.py` or `layers/__init__.py`, and the package, name at their top level; `None` where a star hides some."""
    found: set[str] = set()
    seen = False
    for file in ("layers.py", "layers/__init__.py", "__init__.py"):
        try:
            data = read(file)
            tree = ast.parse(data) if data is not None else None
        except (KernelSwapError, OSError, SyntaxError, ValueError):
            return None
        if tree is None:
            continue
        seen = seen or file != "__init__.py"
        for node in tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = {(a.asname or a.name).partition(".")[0] for a in node.names}
                if "*" in names:
                    return None
                found |= names
            elif isinstance(node, ast.Assign):
                found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            elif not isinstance(node, ast.Expr | ast.AnnAssign | ast.AugAssign | ast.Delete | ast.Pass):
                return None  # a condition, a loop: what it defines depends on where it runs
    return frozenset(found) if seen else None


def _telling(passed: Sequence[tuple[str, str]], site: Site, device: str) -> str:
    """The reason that says most: that of a candidate for that device, before those for others."""
    if not passed:
        return f"no kernel in the table serves {site.layer}"
    for text, why in passed:
        if not why.startswith(("is for ", "is on the hub")):
            return f"{text}: {why}"
    if any(why.startswith("is on the hub") for _, why in passed):
        return next(why for _, why in passed if why.startswith("is on the hub"))
    return f"no kernel in the table is for {device.partition(':')[0]}"
