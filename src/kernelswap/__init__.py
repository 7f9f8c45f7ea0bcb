"""Find a kernel, verify it, prove it, swap it in, and be able to take it back.

    spec -> Requirement -> Resolution -> Artifact -> Kernel -> Implementation -> Swap -> Applied
    spec.py              resolve.py     store.py    loader.py layers.py         plan.py apply.py

Read `api.py` and `provider.py` first: they are that line, in code. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from ._version import __version__

TYPE_CHECKING = False  # type checkers take it for typing's; importing that would be most of what importing us costs
if TYPE_CHECKING:
    from typing import Any

    from .api import Swapper, explain, find, kernelize, load, measure, swap, unkernelize
    from .apply import Applied
    from .errors import KernelSwapError
    from .takeover import install, installed, uninstall
    from .types import Machine, Mode

_WHERE = {
    "Applied": "apply",
    "KernelSwapError": "errors",
    "Machine": "types",
    "Mode": "types",
    "Swapper": "api",
    "explain": "api",
    "find": "api",
    "install": "takeover",
    "installed": "takeover",
    "kernelize": "api",
    "load": "api",
    "measure": "api",
    "swap": "api",
    "uninstall": "takeover",
    "unkernelize": "api",
}

__all__ = [
    "Applied",
    "KernelSwapError",
    "Machine",
    "Mode",
    "Swapper",
    "__version__",
    "explain",
    "find",
    "install",
    "installed",
    "kernelize",
    "load",
    "measure",
    "swap",
    "uninstall",
    "unkernelize",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    # A public name may equal its own module's (`load`, `explain`): bind the value over the submodule, once and for all.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
