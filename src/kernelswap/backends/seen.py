"""What a probe answers, and the two helpers that every probe needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..types import Device


@dataclass(frozen=True, slots=True)
class Seen:
    """One probe's answer. `present` is about torch's build; `devices` is about the hardware."""

    present: bool
    reason: str
    """Why present or why not, e.g. `torch.version.cuda is 12.8`."""
    version: tuple[int, int] | None = None
    devices: tuple[Device, ...] = ()
    devices_reason: str = "no device of this kind is visible"


Probe = Callable[[Any], Seen]
"""`probe(torch) -> Seen`; torch is the module or None. May raise: the caller turns that into a reason."""


def major_minor(text: object) -> tuple[int, int] | None:
    """The first two numbers of a dotted version, `2.13.0+cu130` -> (2, 13); `26` -> (26, 0); None when there are none."""
    found = re.match(r"\s*v?(\d+)(?:\.(\d+))?", str(text))
    return (int(found[1]), int(found[2] or 0)) if found else None


def by_index(count: int, one: Callable[[int], Device], asked: str) -> tuple[tuple[Device, ...], str]:
    """Describe `count` devices. A device that cannot be described is left out, and the reason says so."""
    devices: list[Device] = []
    trouble: list[str] = []
    for index in range(count):
        try:
            devices.append(one(index))
        except Exception as e:  # noqa: BLE001, PERF203 -- a broken driver raises anything; the device is left out with this reason
            trouble.append(f"device {index} left out: {type(e).__name__}: {e}")
    said = f"{asked} is {count}"
    return tuple(devices), "; ".join([said, *trouble])
