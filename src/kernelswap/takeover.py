"""`install()`: from here on, what asks Transformers or `kernels` for kernels gets them from kernelswap. `uninstall()`: not any more.

The file is not called install.py: importing a submodule of that name would replace the function.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters.transformers.seams import Seams
    from .api import Swapper

_lock = threading.RLock()
_open: list[Seams] = []
_close: list[Callable[[], object]] = []


def install(swapper: Swapper | None = None, *, build: str = "wait") -> None:
    """Serve `use_kernels=True`, `KernelConfig`, `attn_implementation` and `model.kernelize` of Transformers.

    Also `from kernels import ...`, whether that is installed or not, and so diffusers' kernels from the hub. Works before and after `import transformers`, and imports
    neither. A second call changes nothing, unless it brings another Swapper.

    Args:
        swapper: serves everything; default: the one of `kernelswap.swap`, made when first needed.
        build: bundled kernels that are not compiled yet: `wait` for them, compile in the `background`, or `never`.
    """
    from . import compat
    from .adapters.diffusers import Answer
    from .adapters.transformers.seams import Seams
    from .adapters.transformers.switch import Switch

    with _lock:
        if _open and (swapper is None or _open[0].switch.is_by(swapper)):
            return
        uninstall()
        seams, diffusers = Seams(Switch(swapper, build=build)), Answer()
        _open.append(seams)
        _close.append(seams.close)
        try:
            _close.append(diffusers.close)  # runs after `kernels` is gone
            compat.install(swapper)
            _close.append(compat.uninstall)
            diffusers.open()
            seams.open()
        except BaseException:
            uninstall()
            raise


def uninstall() -> None:
    """Give Transformers and `kernels` back as they were. Models keep the kernels that they have; `unkernelize` takes them out."""
    with _lock:
        while _close:
            _close.pop()()
        _open.clear()


def installed() -> bool:
    """Whether `install` is in effect."""
    return bool(_open)
