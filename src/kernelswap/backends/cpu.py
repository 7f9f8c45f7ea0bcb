"""The CPU is always there, so this probe is last and always says yes."""

from __future__ import annotations

from typing import Any

from .seen import Seen


def probe(torch: Any) -> Seen:
    """Present. The reason says whether a CPU build of torch was seen, or no torch at all."""
    if torch is None:
        return Seen(True, "torch is not installed and no CUDA runtime was found")
    return Seen(True, "torch was built for no accelerator that is known here")
