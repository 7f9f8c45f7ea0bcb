"""What HTTP libraries raise when the network fails, and how one line says it."""

from __future__ import annotations

import sys
from typing import cast


def failures() -> tuple[type[BaseException], ...]:
    """What the HTTP library of this `huggingface_hub` raises: httpx up to 1.x, httpx2 since 2.0."""
    loaded = [sys.modules[name] for name in ("httpx2", "httpx") if name in sys.modules]
    return (*(cast(type[BaseException], module.RequestError) for module in loaded), ConnectionError, TimeoutError)


def line(e: BaseException) -> str:
    """The first line of what an exception says."""
    return next((text for text in str(e).splitlines() if text.strip()), "no details")
