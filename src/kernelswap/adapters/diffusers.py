"""diffusers: whether there is a `kernels`. It asks when it is imported, and keeps the answer; here it is asked again.

Nothing else of diffusers needs an adapter: its attention backends (`set_attention_backend("flash_hub")` and the like) and quantisers
take their kernels from `kernels`, and its norms and gated projections are rows of the default table.
"""

from __future__ import annotations

import sys
from typing import Any

_WHERE, _NAMES = "diffusers.utils.import_utils", ("_kernels_available", "_kernels_version")


class Answer:
    """What diffusers knows about `kernels`, while kernelswap serves it."""

    def __init__(self) -> None:
        self._before: tuple[Any, ...] | None = None

    def open(self) -> None:
        """To be called when `kernels` is served. A diffusers that is imported later asks by itself."""
        module = _module()
        if module is not None:
            self._before = tuple(getattr(module, name) for name in _NAMES)
            _ask(module)

    def close(self) -> None:
        """To be called when it is not served any more: what it knew before, by identity, or what it would find out now."""
        module = _module()
        if module is None:
            return
        if self._before is None:
            _ask(module)
        else:
            for name, value in zip(_NAMES, self._before, strict=True):
                setattr(module, name, value)
            self._before = None


def _module() -> Any:
    """The module that asks, where it is imported and has what is needed; in another diffusers, nothing is touched."""
    module: Any = sys.modules.get(_WHERE)
    return module if all(hasattr(module, name) for name in (*_NAMES, "_is_package_available")) else None


def _ask(module: Any) -> None:
    for name, value in zip(_NAMES, module._is_package_available("kernels"), strict=True):  # noqa: SLF001  # a test says if it moves
        setattr(module, name, value)
