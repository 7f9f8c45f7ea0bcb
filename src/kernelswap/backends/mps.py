"""Apple GPUs, `metal` in variant names and `mps` in torch."""

from __future__ import annotations

import platform
from typing import Any

from ..types import Device
from .seen import Seen


def probe(torch: Any) -> Seen:
    """Present when `torch.backends.mps.is_available()`: built with it, and on a macOS that has it."""
    mps = getattr(getattr(torch, "backends", None), "mps", None)
    if mps is None:
        return Seen(False, "torch has no torch.backends.mps")
    if not mps.is_available():
        return Seen(False, "torch.backends.mps.is_available() is False")
    device = Device("mps", 0, platform.processor() or "Apple GPU")
    return Seen(True, "torch.backends.mps.is_available() is True", None, (device,), "Apple GPUs are one device")
