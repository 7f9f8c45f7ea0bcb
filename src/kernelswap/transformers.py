"""Transformers with kernels: `from kernelswap.transformers import AutoModelForCausalLM, KernelConfig`.

Everything of `transformers`, looked up there when it is asked for; importing this is `kernelswap.install()`.
"""

from __future__ import annotations

import importlib
from typing import Any

from .adapters.transformers.config import KernelConfig as KernelConfig  # noqa: PLC0414  # public here
from .takeover import install

install()


def __getattr__(name: str) -> Any:
    if name.startswith("__") and name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("transformers"), name)


def __dir__() -> list[str]:
    return sorted({*dir(importlib.import_module("transformers")), "KernelConfig"})
