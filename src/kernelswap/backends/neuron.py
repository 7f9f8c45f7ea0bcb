"""AWS Neuron: a torch that has `torch.neuron`."""

from __future__ import annotations

from typing import Any

from ..types import Device
from .seen import Seen, by_index


def probe(torch: Any) -> Seen:
    """Present when `torch.neuron` exists."""
    neuron = getattr(torch, "neuron", None)
    if neuron is None:
        return Seen(False, "torch has no torch.neuron")
    count = getattr(neuron, "device_count", None)
    if count is None:
        return Seen(True, "torch.neuron exists", devices_reason="torch.neuron.device_count does not exist")
    devices, reason = by_index(count(), lambda i: Device("neuron", i, "Neuron"), "torch.neuron.device_count()")
    return Seen(True, "torch.neuron exists", None, devices, reason)
