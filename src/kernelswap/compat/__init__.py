"""`from kernels import ...`, served from here: the names of Hugging Face's `kernels`, over `kernelswap`.

`install()` puts a finder first in line: `import kernels` and its submodules give ours, and `importlib.metadata.version("kernels")`
a version that the installed Transformers accepts. `uninstall()` takes everything back. Nothing heavy is imported by either.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import TYPE_CHECKING

from . import finder as finders
from . import state

if TYPE_CHECKING:
    from ..api import Swapper

log = logging.getLogger("kernelswap.kernels")

_lock = threading.RLock()
_finders: list[finders.Finder] = []


def install(swapper: Swapper | None = None) -> None:
    """Serve the module `kernels`. A second call changes nothing, unless it brings another Swapper.

    Where another `kernels` was imported before, that one stays, with a warning that says what to do.

    Args:
        swapper: finds and loads everything; default: the one of `kernelswap.load`, made when first needed.
    """
    with _lock:
        state.use(swapper)
        if _finders:
            return
        there = sys.modules.get("kernels")
        if there is not None:
            log.warning(
                "kernels %s was imported before kernelswap was installed over it (%s), and stays in use in this process. "
                "Call kernelswap.install() before anything imports kernels, or start the script with `kernelswap run`.",
                getattr(there, "__version__", ""),
                getattr(there, "__file__", None) or "no file",
            )
            return
        finder = finders.Finder()
        sys.meta_path.insert(0, finder)
        _finders.append(finder)
        finders.ask_again()


def uninstall() -> None:
    """Serve it no longer: `sys.meta_path` and `sys.modules` are as they were. Names that somebody imported go on working."""
    with _lock:
        while _finders:
            _finders.pop().leave()
            finders.ask_again()
        state.use(None)


def installed() -> bool:
    """Whether `import kernels` gives ours."""
    return bool(_finders)
