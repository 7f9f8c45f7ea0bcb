"""Intel GPUs: a torch built with SYCL."""

from __future__ import annotations

import re
from typing import Any

from ..types import Device
from .seen import Seen, by_index


def probe(torch: Any) -> Seen:
    """Present when `torch.version.xpu` is set, e.g. `20250301`: four digits of year, then the minor at place 5."""
    xpu = getattr(getattr(torch, "version", None), "xpu", None)
    if not xpu:
        return Seen(False, "torch.version.xpu is not set")
    version = re.match(r"(\d{4}).(\d)", str(xpu))
    devices, reason = by_index(
        torch.xpu.device_count(), lambda i: Device("xpu", i, torch.xpu.get_device_name(i)), "torch.xpu.device_count()"
    )
    return Seen(True, f"torch.version.xpu is {xpu}", (int(version[1]), int(version[2])) if version else None, devices, reason)
