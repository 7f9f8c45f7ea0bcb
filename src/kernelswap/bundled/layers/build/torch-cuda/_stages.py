"""How deep a loop may be pipelined on the GPU at hand."""

from __future__ import annotations

import torch

from ._launch import INTERPRETED


def stages(loaded: int, device: int) -> int:
    """How many turns of a loop are in flight: 3 where shared memory holds the loads of two of them, `loaded` bytes each, else 1."""
    if device not in _shared:
        found = None if INTERPRETED else torch.cuda.get_device_properties(device)
        _shared[device] = getattr(found, "shared_memory_per_block_optin", 48 << 10)
    return 3 if 2 * loaded + _SCRATCH <= _shared[device] else 1


_SCRATCH = 16 << 10  # what the sums over rows and warps need besides, at most
_shared: dict[int, int] = {}
