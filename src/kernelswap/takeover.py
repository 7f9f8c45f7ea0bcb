"""`install()`: from here on, what asks Transformers or `kernels` for kernels gets them from kernelswap. `uninstall()`: not any more.

The file is not called install.py: importing a submodule of that name would replace the function.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING

from .types import Mode

if TYPE_CHECKING:
    from .adapters.transformers.seams import Seams
    from .api import Swapper

_lock = threading.RLock()
_open: list[Seams] = []
_close: list[Callable[[], object]] = []


def install(swapper: Swapper | None = None, *, build: str = "wait") -> None:
    """Serve `use_kernels=True`, `KernelConfig`, `attn_implementation` and `model.kernelize` of Transformers.

    Works before and after `import transformers`, with any version of `kernels` and without; imports neither. A second call
    changes nothing, unless it brings another Swapper.

    Args:
        swapper: serves everything; default: the one of `kernelswap.swap`, made when first needed.
        build: bundled kernels that are not compiled yet: `wait` for them, compile in the `background`, or `never`.
    """
    from .adapters.transformers.seams import Seams
    from .adapters.transformers.switch import Switch

    with _lock:
        if _open and (swapper is None or _open[0].switch.is_by(swapper)):
            return
        uninstall()
        seams = Seams(Switch(swapper, build=build))
        _open.append(seams)
        _close.append(seams.close)
        try:
            seams.open()
            _close.append(_serve_kernels(swapper))
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


# -- `from kernels import Mode` ---------------------------------------------------------------------------------------


def _serve_kernels(swapper: Swapper | None) -> Callable[[], object]:
    """Serve the module `kernels`; gives what undoes that."""
    try:
        compat = importlib.import_module(".compat", __package__)
    except ModuleNotFoundError as e:
        if e.name != f"{__package__}.compat":
            raise
        finder = _StandIn()
        sys.meta_path.append(finder)
        return finder.leave
    compat.install(swapper)
    undo: Callable[[], object] = compat.uninstall
    return undo


class _StandIn(MetaPathFinder, Loader):
    """`kernels` where there is none: `Mode`, which Transformers' guide imports from there. Last in line: a real one is taken.

    It has neither a file nor a version, so that whoever looks for the package finds that it is not installed.
    """

    def __init__(self) -> None:
        self.module: ModuleType | None = None

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  # the protocol's
        target: ModuleType | None = None,  # noqa: ARG002  # same
    ) -> ModuleSpec | None:
        """For `kernels` alone."""
        return ModuleSpec("kernels", self) if fullname == "kernels" else None

    def exec_module(self, module: ModuleType) -> None:
        """What the guide asks of it."""
        module.Mode = Mode  # type: ignore[attr-defined]  # a module gets its names at run time
        self.module = module

    def leave(self) -> None:
        """As if it had never been there."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self.module is not None and sys.modules.get("kernels") is self.module:
            del sys.modules["kernels"]
