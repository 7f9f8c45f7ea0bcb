"""Which attention settings a program chose, and which Transformers took because nobody said anything."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

_asked: ContextVar[bool] = ContextVar("kernelswap_attention_asked", default=False)
_ours: ContextVar[bool] = ContextVar("kernelswap_attention_ours", default=False)


class Choices:
    """What is known of configurations, by identity: they compare by content, and copies are nobody's default."""

    def __init__(self) -> None:
        self._by_default: dict[int, weakref.ref[Any]] = {}

    def resolved(self, config: Any) -> None:
        """Transformers is about to take its own default for `config`."""
        if not _asked.get():
            key = id(config)
            self._by_default[key] = weakref.ref(config, lambda gone: self._gone(key, gone))

    def _gone(self, key: int, gone: Any) -> None:
        if self._by_default.get(key) is gone:  # not another configuration that got the same address
            del self._by_default[key]

    def chose(self, configs: Iterable[Any]) -> None:
        """The program set these; what we set ourselves is no choice of its."""
        if not _ours.get():
            for config in configs:
                self._by_default.pop(id(config), None)

    def chosen(self, config: Any) -> str | None:
        """Why what `config` says is the program's own choice, or may be; `None`: Transformers took its default."""
        known = self._by_default.get(id(config))
        if known is not None and known() is config:
            return None
        what = "the program chose it, or made the model before kernelswap was there to see"
        return f"{what}; attn_implementation='kernelswap/attention' asks for a kernel"


@contextlib.contextmanager
def asked(attn_implementation: Any) -> Iterator[None]:
    """While a model is made for which the program said what computes attention, if it did: also where that cannot be had."""
    was = _asked.set(_asked.get() or attn_implementation is not None)
    try:
        yield
    finally:
        _asked.reset(was)


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """While we set what computes attention ourselves."""
    was = _ours.set(True)
    try:
        yield
    finally:
        _ours.reset(was)
