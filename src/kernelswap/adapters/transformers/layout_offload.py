"""Weights that accelerate keeps elsewhere between calls (in other memory, on disk), for layouts.

A layout whose originals are offloaded is offloaded itself: its hook brings the originals' weights from where they are, as the
layout reads them. Nothing of them is written, moved or held twice, so the originals can be put back as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .conversion import Declined, Step, tensors

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor


def hooks(modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """`{path: hook}`: accelerate's hooks that bring weights before a call and take them away after it."""
    inside = [(path, inner) for name, module in modules.items() for path, inner in module.named_modules(prefix=name)]
    return {path: one for path, inner in inside for one in _hooks(inner) if getattr(one, "offload", False)}


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return tuple(getattr(hook, "hooks", (hook,)))


class Kept(Mapping[str, Any]):
    """The weights of modules by name, each from where it is kept; read anew each time."""

    def __init__(self, modules: Mapping[str, nn.Module], found: Mapping[str, Any]) -> None:
        """`found`: their `hooks`.

        Raises:
            Declined: a weight is nowhere to be found, or some are kept elsewhere and others are not.
        """
        self._here: dict[str, Tensor] = {}
        self._there: dict[str, tuple[Mapping[str, Any], str]] = {}
        for name, tensor in tensors(modules).items():
            if not tensor.is_meta:
                self._here[name] = tensor
                continue
            held = next((at for at in _upwards(name) if at in found), None)
            if held is None or name.removeprefix(f"{held}.") not in found[held].weights_map:
                raise Declined(f"{name} is not loaded, and nothing says from where")
            self._there[name] = found[held].weights_map, name.removeprefix(f"{held}.")
        if mixed := [name for name, t in self._here.items() if _is_parameter(t)]:
            raise Declined(f"{', '.join(mixed)} is here while others are kept elsewhere between calls (offloaded)")

    def __getitem__(self, name: str) -> Tensor:
        if name in self._there:
            weights, key = self._there[name]
            return weights[key]  # type: ignore[no-any-return]  # accelerate has no types
        return self._here[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._here, *self._there)

    def __len__(self) -> int:
        return len(self._here) + len(self._there)


class Converted(Mapping[str, Any]):
    """The same weights under a layout's names, made when they are asked for; and under their own, for who saves the model."""

    def __init__(self, kept: Kept, steps: tuple[Step, ...], first: str, config: Any) -> None:
        self.kept, self.steps, self.first, self.config = kept, steps, first, config

    def __getitem__(self, name: str) -> Tensor:
        full = f"{self.first}.{name}"
        for step in self.steps:
            if full in step.targets.values():
                given = {n: self.kept[n] for names in step.sources.values() for n in names}
                return step.forth(given, self.config)[full] if step.operations else next(iter(given.values()))
        return self.kept[full]

    def __iter__(self) -> Iterator[str]:
        yield from (target.removeprefix(f"{self.first}.") for step in self.steps for target in step.targets.values())

    def __len__(self) -> int:
        return sum(len(step.targets) for step in self.steps)


def without_hooks(originals: tuple[nn.Module, ...]) -> tuple[nn.Module, ...]:
    """Modules like `originals`, on the same weights or on none: what their forward is computed with, on weights that are given."""
    from ...proof import reference  # needs torch when it is imported; this file must not

    return tuple(reference.twin(one, lambda _, tensor: tensor) for one in originals)


def follow(
    layout: nn.Module, originals: Mapping[str, nn.Module], weights: Converted, found: Mapping[str, Any]
) -> dict[str, nn.Module]:
    """Offload a layout that holds its weights; what must stand in the places of the other originals is returned.

    Raises:
        Declined: a name would mean one thing to who runs the model and another to who saves it.
    """
    import torch
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    own = {name.removeprefix(f"{weights.first}.") for name in weights.kept if name.startswith(f"{weights.first}.")}
    moved = {t for step in weights.steps for t in step.targets.values() if step.operations or t not in step.sources.get("", ())}
    if twice := sorted(own & {t.removeprefix(f"{weights.first}.") for t in moved}):
        raise Declined(f"its {', '.join(twice)} is another tensor than the one of that name that is kept elsewhere (offloaded)")
    one = next(iter(found.values()))
    hook = AlignDevicesHook(
        execution_device=one.execution_device,
        offload=True,
        io_same_device=any(getattr(h, "io_same_device", False) for m in originals.values() for h in _hooks(m)),
        weights_map=weights,
        offload_buffers=one.offload_buffers,
        place_submodules=True,
        skip_keys=one.skip_keys,
    )
    add_hook_to_module(layout, hook)
    empty: dict[str, nn.Module] = {}
    for name, original in originals.items():
        place = layout if name == weights.first else torch.nn.Identity()
        # whoever saves the model looks for what the originals had, by name, and for the hooks there
        for had, value in (*original.named_children(), *original.named_parameters(recurse=False)):
            if not hasattr(place, had):
                vars(place)[had] = value
        if place is not layout:
            empty[name] = place
            if name in found:
                vars(place)["_hf_hook"] = AlignDevicesHook(weights_map=found[name].weights_map)  # for that look alone
    return empty


def released(layout: nn.Module) -> bool:
    """Whether accelerate's hook was taken off it, and it holds its weights since."""
    return "_hf_hook" not in vars(layout) and not any(p.is_meta for p in layout.parameters())


def release(originals: tuple[nn.Module, ...]) -> None:
    """Take accelerate's hooks off modules, too."""
    from accelerate.hooks import remove_hook_from_module

    for one in originals:
        remove_hook_from_module(one, recurse=True)


def _upwards(name: str) -> Iterator[str]:
    """The paths of the modules that a tensor of that name is in, innermost first."""
    while name := name.rpartition(".")[0]:
        yield name


def _is_parameter(tensor: Any) -> bool:
    import torch

    return isinstance(tensor, torch.nn.Parameter)
