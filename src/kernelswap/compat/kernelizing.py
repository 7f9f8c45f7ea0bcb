"""`kernelize`: what is registered, for the places of a model that are marked, as rows of a table for a Swapper.

What the mapping says is decided here (which repository for this device, capability and mode, and what it means if there is none);
everything else is the Swapper's: proof, installation per module, taking back.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import layers, sites
from .. import mode as modes
from .. import table as tables
from ..errors import KernelSwapError, Refused, Tampered
from ..provider import Terms
from ..types import Implementation, Kept, Mode, Prover, Row, Run, Site, SiteKind, Swap, Use, Verdict
from . import devices, mapping, state
from .repositories import Repository

if TYPE_CHECKING:
    import torch.nn as nn

    from ..api import Swapper

log = logging.getLogger("kernelswap.kernels")
_said: set[str] = set()


class KernelizeFallback(enum.Flag):
    """When a module keeps its own forward instead of `kernelize` raising."""

    NONE = 0
    NO_LAYER = enum.auto()
    """Nothing is registered for the layer."""
    NO_DEVICE = enum.auto()
    """Nothing for this type of device."""
    NO_COMPATIBLE_PROPERTIES = enum.auto()
    """Nothing for this device's capability."""
    NO_COMPATIBLE_MODE = enum.auto()
    """Nothing that can do what the mode asks for."""
    CANNOT_LOAD = enum.auto()
    """There is something, and it cannot be loaded, for whatever reason but trust."""
    DEFAULT = NO_LAYER | NO_DEVICE | NO_COMPATIBLE_PROPERTIES | NO_COMPATIBLE_MODE
    ALL = DEFAULT | CANNOT_LOAD


def kernelize(model: nn.Module, *, mode: Mode, device: Any = None, use_fallback: bool | KernelizeFallback = True) -> nn.Module:
    """Give the marked modules and functions of `model` the kernels that are registered for them. What it had before is taken back.

    Args:
        model: any module. Each of its modules is served for the device that it is on.
        mode: `Mode.INFERENCE` or `Mode.TRAINING`, each with or without `Mode.TORCH_COMPILE`.
        device: serve only what is on this type of device; text, or something with a `type`.
        use_fallback: when modules keep their own forward; True: `DEFAULT`, False: `NONE`.

    Raises:
        ValueError: mode or device make no sense, or a case that `use_fallback` does not cover; an untrusted publisher.
        FileNotFoundError: no build fits, and `use_fallback` does not cover `CANNOT_LOAD`; also what else loading raises.
        In all cases the model is as it was.
    """
    wanted, flags, only = modes.wanted(mode_of(mode)), _flags(use_fallback), _device_type(device)
    swapper = state.for_layers(OnRealTensors)
    if swapper.environment.disabled is not None:
        return swapper.unkernelize(model)
    planner = _Planner(swapper, wanted, flags, only)
    rows = planner.rows(model)
    if state.swapper().applied(model) is not None or swapper.applied(model) is None:
        state.swapper().unkernelize(model)
    applied = swapper.swap(model, table=rows, mode=wanted, trust=planner.trust)
    for outcome in applied.outcomes:
        if isinstance(outcome, Kept) and outcome.passed and not outcome.site.left_out:
            spec, why = outcome.passed[0]
            _say(f"{outcome.site.layer} keeps its own forward: {spec} {why}", logging.WARNING)
        elif isinstance(outcome, Swap):
            served = outcome.inference.implementation or outcome.training.implementation
            _say(f"{outcome.site.layer} is served by {served.origin.candidate.requirement if served else ''}", logging.INFO)
    return model


def mode_of(value: Any) -> Mode:
    """A Mode of ours, also from flags of another library with the same names.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, Mode):
        return value
    if isinstance(value, enum.Flag) and all(hasattr(type(value), m.name or "") for m in Mode):
        return Mode(sum(m.value for m in Mode if getattr(type(value), m.name or "") in value))
    raise TypeError(f"mode is {value!r}, expected Mode.INFERENCE or Mode.TRAINING")


class OnRealTensors:
    """A Prover that lets pass what nobody has a recipe of random tensors for: that is proven on the first real call.

    Who registers a kernel for a layer of their own has asked for it; the default table asks for more.
    """

    def __init__(self, inner: Prover) -> None:
        self.inner = inner

    def equivalent(
        self, site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, run: Run
    ) -> Verdict:
        """As `Prover.equivalent`."""
        if site.row.probe:
            return self.inner.equivalent(site, module, original, candidate, run)
        why = candidate.cannot(run)
        return Verdict(why is None, why or "is compared with the original on its first call")

    def first_call(  # the protocol's
        self,
        site: Site,
        module: nn.Module,
        original: Callable[..., Any],
        candidate: Implementation,
        run: Run,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        anew: bool = False,
    ) -> tuple[Any, Verdict]:
        """As `Prover.first_call`."""
        return self.inner.first_call(site, module, original, candidate, run, args, kwargs, **({"anew": True} if anew else {}))


# -- from what is registered to rows --------------------------------------------------------------------------------------


@dataclass
class _Planner:
    swapper: Swapper
    mode: Mode
    flags: KernelizeFallback
    only: str | None

    def __post_init__(self) -> None:
        self.registered = mapping.current()
        self.trust: list[str] = []
        self.made: dict[tuple[str, SiteKind, str], tuple[Use, ...]] = {}

    def rows(self, model: nn.Module) -> list[Row]:
        """One row for each marked layer, with what may serve it on each device where the model has it.

        Raises:
            As `kernelize`.
        """
        known = {row.layer: row for row in tables.default()}
        marked = [
            Row(layer, kind, probe=known[layer].probe if layer in known else "")
            for layer, kind in _marked(model, self.registered)
        ]
        uses: dict[tuple[str, SiteKind], list[Use]] = {}
        for site in sites.find(model, marked):
            if not site.left_out:
                found = uses.setdefault((site.layer, site.kind), [])
                found += [use for use in self.uses(site) if use not in found]
        return [replace(row, use=tuple(uses.get((row.layer, row.kind), ()))) for row in marked]

    def uses(self, site: Site) -> tuple[Use, ...]:
        """What may serve a site, best first."""
        key = (site.layer, site.kind, site.device)
        if key not in self.made:
            self.made[key] = self._uses(site)
        return self.made[key]

    def _uses(self, site: Site) -> tuple[Use, ...]:  # noqa: PLR0911  # one return for each case that the reference names
        kind, capability = devices.of_place(site.device, self.swapper.machine)
        if self.only is not None and kind != self.only:
            return ()
        by_device = self.registered.get(site.layer)
        if by_device is None:
            return self.lacks(KernelizeFallback.NO_LAYER, f"No layer mapping for `{site.layer}`")
        of_type = {device: by_mode for device, by_mode in by_device.items() if device.type == kind}
        if not of_type:
            text = f"No layer mapping for `{site.layer}` with device type `{kind}`"
            return self.lacks(KernelizeFallback.NO_DEVICE, text)
        fits = [d for d in of_type if d.properties is None or (capability is not None and capability in d.properties)]
        if not fits:
            text = f"No repository for `{site.layer}` with the capability {capability} of {site.device}"
            return self.lacks(KernelizeFallback.NO_COMPATIBLE_PROPERTIES, text)
        by_mode = of_type[min(fits, key=lambda d: d.properties.width if d.properties is not None else 1 << 62)]
        on = f"cuda:sm{capability}" if kind == "cuda" and capability is not None and len(of_type) > 1 else kind
        uses: list[Use] = []
        reasons: list[str] = []
        for registered in modes.order(self.mode):
            if registered not in by_mode:
                continue
            repository = by_mode[registered]
            if repository is None:
                return tuple(uses)
            if uses:  # looked at, and fetched, only where the better one turns out to compute something else
                if type(repository).check is Repository.check:  # not one whose lock is to be compared first
                    self.trust += [name for name in repository.trust if name not in self.trust]
                    uses.append(Use(repository.spec, on=(on,)))
                continue
            why = self.cannot(repository, registered, site)
            if why is None:
                uses.append(Use(repository.spec, on=(on,)))
            else:
                reasons.append(why)
        if not uses and not any(why is _UNLOADABLE for why in reasons):
            text = "; ".join(reasons) or f"No repository for `{site.layer}` and mode {modes.name(self.mode)}"
            return self.lacks(KernelizeFallback.NO_COMPATIBLE_MODE, text)
        return tuple(uses)

    def lacks(self, flag: KernelizeFallback, text: str) -> tuple[Use, ...]:
        if flag not in self.flags:
            raise ValueError(text)
        _say(f"{text}; it keeps its own forward", logging.WARNING if flag == KernelizeFallback.NO_LAYER else logging.INFO)
        return ()

    def cannot(self, repository: Repository, registered: Mode, site: Site) -> str | None:
        """Why a repository does not serve, or `None`. Loads it.

        Raises:
            ValueError: it is registered for what it cannot do. Also what loading raises, unless that is covered.
        """
        self.trust += [name for name in repository.trust if name not in self.trust]
        device = "cpu" if site.device == "cpu" else site.device
        try:
            repository.check()
            found = self.swapper.provide(repository.spec, device, site.kind, terms=Terms(trust=self.trust))
        except (Refused, Tampered):
            raise
        except KernelSwapError as e:
            if KernelizeFallback.CANNOT_LOAD not in self.flags:
                raise
            _say(f"{site.layer} keeps its own forward: {repository.spec} cannot be loaded: {e.reason}", logging.WARNING)
            return _UNLOADABLE
        for flag, can, what in (
            (Mode.TRAINING, found.backward, "backward"),
            (Mode.TORCH_COMPILE, found.compiles, "torch.compile"),
        ):
            if flag in registered and not can:
                raise ValueError(f"Layer from repo {repository.spec} does not support {what}, and is registered for it")
            if flag in self.mode and not can:
                return f"Available kernel does not support mode: {repository.spec} does not support {what}"
        return None


_UNLOADABLE = "cannot be loaded"


def _marked(model: nn.Module, registered: mapping.Registered) -> list[tuple[str, SiteKind]]:
    """Layers that classes of the model are marked for, and functions: those that a class lists, or that are registered."""
    classes: dict[str, None] = {}
    functions: dict[str, None] = {}
    for module in model.modules():
        if (name := layers.declared(sites.original(module))) is not None:
            classes[name] = None
        for function in (vars(module).get("_kernel_funcs") or {}).values():
            if isinstance(name := getattr(function, "kernel_layer_name", None), str):
                functions[name] = None
    functions |= dict.fromkeys(name for name in registered if name not in classes)
    return [*((name, "module") for name in classes), *((name, "function") for name in functions if name not in classes)]


def _flags(use_fallback: bool | KernelizeFallback) -> KernelizeFallback:  # noqa: FBT001  # what `kernelize` was given
    if isinstance(use_fallback, KernelizeFallback):
        return use_fallback
    return KernelizeFallback.DEFAULT if use_fallback else KernelizeFallback.NONE


def _device_type(device: Any) -> str | None:
    """The type of what `kernelize` was given.

    Raises:
        ValueError: there is no such type.
    """
    if device is None:
        return None
    kind = str(getattr(device, "type", device)).partition(":")[0]
    kind = devices.ALIASES.get(kind, kind)
    if kind not in devices.TYPES:
        if not isinstance(device, str):
            return kind  # a device of a backend that nobody has kernels for: nothing is served there
        supported = ", ".join(devices.TYPES)
        raise ValueError(f"Unsupported device type '{kind}'. Supported device types are: {supported}")
    if kind == "cuda" and state.swapper().machine.backend == "rocm":
        return "rocm"
    return kind


def _say(text: str, level: int) -> None:
    """Each line once in a process: forty modules without a kernel are one line."""
    if text not in _said:
        _said.add(text)
        log.log(level, text)
