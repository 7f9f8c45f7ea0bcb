"""NVIDIA GPUs. Looks without initialising CUDA where it can: a process that did cannot fork workers that use it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

from ..types import Device
from .seen import Seen, by_index, major_minor


def probe(torch: Any) -> Seen:
    """Present when `torch.version.cuda` is set, or, without torch, when a CUDA runtime library answers."""
    if torch is None:
        return _runtime()
    cuda = getattr(torch.version, "cuda", None)
    if not cuda:
        return Seen(False, "torch.version.cuda is not set: torch was built without CUDA")
    count = torch.cuda.device_count()
    devices, reason = _devices(torch, count)
    return Seen(True, f"torch.version.cuda is {cuda}", major_minor(cuda), devices, reason)


def _devices(torch: Any, count: int) -> tuple[tuple[Device, ...], str]:
    if count and not torch.cuda.is_initialized():
        managed = _managed()
        # The management library knows nothing of CUDA_VISIBLE_DEVICES and its order is not CUDA's. Where all GPUs are
        # of one kind neither matters; elsewhere CUDA itself is asked.
        if managed and len(set(managed)) == 1 and len(managed) >= count:
            name, capability = managed[0]
            devices = tuple(device(i, name, capability) for i in range(count))
            return devices, f"torch.cuda.device_count() is {count}; described by NVML, so that CUDA stays uninitialised"

    def one(index: int) -> Device:
        return device(index, torch.cuda.get_device_name(index), tuple(torch.cuda.get_device_capability(index)))

    return by_index(count, one, "torch.cuda.device_count()")


def device(index: int, name: str, capability: tuple[int, int]) -> Device:
    """A CUDA device with its SM name: (9, 0) is `sm90`, (12, 1) is `sm121`."""
    major, minor = capability
    return Device("cuda", index, name, (major, minor), f"sm{major}{minor}")


def _library(*names: str) -> ctypes.CDLL | None:
    for name in names:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    return None


def _managed() -> list[tuple[str, tuple[int, int]]]:
    """(name, capability) of every GPU of the host by NVML, MIG slices not split; empty when it cannot say."""
    nvml = _library("nvml.dll") if sys.platform == "win32" else _library("libnvidia-ml.so.1")
    if nvml is None or nvml.nvmlInit_v2() != 0:
        return []
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return []
        seen = [_one_managed(nvml, i) for i in range(count.value)]
        return [s for s in seen if s is not None] if all(seen) else []
    finally:
        nvml.nvmlShutdown()


def _one_managed(nvml: ctypes.CDLL, index: int) -> tuple[str, tuple[int, int]] | None:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(96)
    if (
        nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0
        or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != 0
        or nvml.nvmlDeviceGetName(handle, name, ctypes.c_uint(len(name))) != 0
    ):
        return None
    return name.value.decode(errors="replace"), (major.value, minor.value)


def _runtime() -> Seen:
    """Without torch: what the CUDA runtime library says, 1000 * major + 10 * minor."""
    names = (
        ("cudart64_13.dll", "cudart64_12.dll")
        if sys.platform == "win32"
        else ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
    )
    cudart = _library(*names)
    version = ctypes.c_int()
    if cudart is None or cudart.cudaRuntimeGetVersion(ctypes.byref(version)) != 0:
        return Seen(False, "torch is not installed and there is no CUDA runtime library")
    major, minor = version.value // 1000, version.value % 1000 // 10
    managed = _managed()
    devices = tuple(device(i, name, capability) for i, (name, capability) in enumerate(managed))
    return Seen(True, f"no torch; the CUDA runtime says {major}.{minor}", (major, minor), devices, f"NVML sees {len(devices)}")
