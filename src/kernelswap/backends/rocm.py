"""AMD GPUs: a torch built with HIP, which calls its devices `cuda`."""

from __future__ import annotations

from typing import Any

from ..types import Device
from .seen import Seen, by_index, major_minor


def probe(torch: Any) -> Seen:
    """Present when `torch.version.hip` is set. The architecture is `gcnArchName` up to the first colon."""
    hip = getattr(getattr(torch, "version", None), "hip", None)
    if not hip:
        return Seen(False, "torch.version.hip is not set")

    def one(index: int) -> Device:
        seen = torch.cuda.get_device_properties(index)
        return Device("rocm", index, seen.name, None, str(seen.gcnArchName).split(":", 1)[0])

    devices, reason = by_index(torch.cuda.device_count(), one, "torch.cuda.device_count()")
    return Seen(True, f"torch.version.hip is {hip}", major_minor(str(hip).split("-", 1)[0]), devices, reason)
