"""`Device` and the capabilities that a kernel may be registered for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..types import Machine

TYPES = ("cpu", "cuda", "mps", "neuron", "npu", "rocm", "tpu", "xpu")
ALIASES = {"metal": "mps", "cann": "npu"}


@dataclass(frozen=True, slots=True)
class _Capabilities:
    """Inclusive; 9.0 is 90."""

    min_capability: int
    max_capability: int

    def __post_init__(self) -> None:
        for value in (self.min_capability, self.max_capability):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"a capability is {value!r}, expected an integer such as 90")
        if self.min_capability > self.max_capability:
            raise ValueError(f"min_capability {self.min_capability} is above max_capability {self.max_capability}")

    def __contains__(self, capability: object) -> bool:
        return isinstance(capability, int) and self.min_capability <= capability <= self.max_capability

    @property
    def width(self) -> int:
        """The narrowest interval that has a capability wins."""
        return self.max_capability - self.min_capability


class CUDAProperties(_Capabilities):
    """Compute capabilities of CUDA devices, `CUDAProperties(min_capability=80, max_capability=89)`."""

    __slots__ = ()


class ROCMProperties(_Capabilities):
    """Capabilities of ROCm devices, as `torch.cuda.get_device_capability` gives them there."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Device:
    """A type of device, and for `cuda` and `rocm` optionally which capabilities."""

    type: str
    properties: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "type", ALIASES.get(self.type, self.type))
        wanted = {"cuda": CUDAProperties, "rocm": ROCMProperties}.get(self.type)
        if self.properties is not None and (wanted is None or not isinstance(self.properties, wanted)):
            fits = f"takes {wanted.__name__}" if wanted else "takes no properties"
            raise ValueError(f"Device({self.type!r}) {fits}, not {type(self.properties).__name__}")


def read(value: object) -> Device:
    """A key of a mapping.

    Raises:
        ValueError: no such type of device.
    """
    device = value if isinstance(value, Device) else Device(str(value))
    if device.type not in TYPES:
        raise ValueError(f"Unknown device type: {device.type}")
    return device


def of_place(place: str, machine: Machine) -> tuple[str, int | None]:
    """`(type, capability)` of where a module is (`cuda:0`), as far as `machine` knows it."""
    kind, _, index = place.partition(":")
    seen = next((d for d in machine.devices if d.index == int(index or 0) and d.type in {kind, "rocm"}), None)
    if kind == "cuda" and machine.backend == "rocm":
        kind = "rocm"
    if seen is None:
        return kind, None
    if seen.capability is not None:
        return kind, 10 * seen.capability[0] + seen.capability[1]
    if seen.arch is not None and seen.arch.startswith("gfx"):  # gfx942 is 9.4, gfx1151 is 11.5; the last digit is a stepping
        return kind, 10 * int(seen.arch[3:-2]) + int(seen.arch[-2], 16)
    return kind, None
