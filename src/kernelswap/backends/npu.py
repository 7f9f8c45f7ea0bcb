"""Huawei Ascend: torch's private-use backend, renamed to `npu` by torch_npu. `cann` in variant names."""

from __future__ import annotations

from typing import Any

from ..types import Device
from .seen import Seen, by_index, major_minor


def probe(torch: Any) -> Seen:
    """Present when torch's private-use backend is called `npu`; the version is CANN's, major and minor."""
    utils = getattr(torch, "utils", None)
    name = getattr(getattr(torch, "_C", None), "_get_privateuse1_backend_name", lambda: None)()
    if utils is None or name != "npu":
        return Seen(False, f"torch's private-use backend is {name!r}, not 'npu'")
    import torch_npu

    devices, reason = by_index(
        torch.npu.device_count(), lambda i: Device("npu", i, torch.npu.get_device_name(i)), "torch.npu.device_count()"
    )
    cann = torch_npu.utils.get_cann_version()
    return Seen(True, f"torch's private-use backend is 'npu', with CANN {cann}", major_minor(cann), devices, reason)
