"""Google TPUs: a torch build that has `torch.backends.tpu`."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..types import Device
from .seen import Seen, by_index


def probe(torch: Any) -> Seen:
    """Present when `torch.backends.tpu` exists. Devices through `torch.tpu` where that module is."""
    if not hasattr(getattr(torch, "backends", None), "tpu"):
        hint = " (torch_xla is installed, which kernels do not target)" if _has("torch_xla") else ""
        return Seen(False, f"torch has no torch.backends.tpu{hint}")
    count = getattr(getattr(torch, "tpu", None), "device_count", None)
    if count is None:
        return Seen(True, "torch.backends.tpu exists", devices_reason="torch.tpu.device_count does not exist")
    devices, reason = by_index(count(), lambda i: Device("tpu", i, "TPU"), "torch.tpu.device_count()")
    return Seen(True, "torch.backends.tpu exists", None, devices, reason)


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
