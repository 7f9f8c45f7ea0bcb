"""One probe per backend. Each gets the torch module (or None) and says what it sees, with the reason.

`PROBES` is in detection order: the first one that says yes is the backend of this process. Detection asks how torch
was built, not whether a device is present; the devices are a separate answer. To add a backend, add a file and a row.
"""

from __future__ import annotations

from . import cpu, cuda, mps, neuron, npu, rocm, tpu, xpu
from .seen import Probe, Seen

PROBES: tuple[tuple[str, Probe], ...] = (
    ("tpu", tpu.probe),
    ("neuron", neuron.probe),
    ("cuda", cuda.probe),
    ("rocm", rocm.probe),
    ("metal", mps.probe),
    ("xpu", xpu.probe),
    ("cann", npu.probe),
    ("cpu", cpu.probe),
)

__all__ = ["PROBES", "Probe", "Seen"]
