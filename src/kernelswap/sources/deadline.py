"""Wait for something that may never end, but not for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

from ..errors import Unreachable

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T], late: Callable[[], Unreachable]) -> T:
    """`call()`, given up on after `seconds`: then `late()` is raised.

    It runs in a thread of its own, which does not keep the process alive. That of a call given up on ends when the call does.
    """
    box: list[Any] = []
    done = threading.Event()

    def work() -> None:
        try:
            box.extend((call(), None))
        except BaseException as e:  # noqa: BLE001  # handed to the caller's thread, below
            box.extend((None, e))
        done.set()

    threading.Thread(target=work, name="kernelswap-wait", daemon=True).start()
    if not done.wait(seconds):
        raise late()
    found, error = box
    if error is not None:
        raise error
    return cast(T, found)
