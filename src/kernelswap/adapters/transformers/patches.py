"""Attributes of other people's modules and classes, replaced and given back: identical by `is` afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

_ABSENT: Any = object()


@dataclass
class Patches:
    """What was replaced, in order. `undo` gives everything back, last first."""

    library: str = "transformers"
    """The package whose modules are searched for copies of what is replaced everywhere."""
    _done: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    _everywhere: list[tuple[Any, Any]] = field(default_factory=list)

    def put(self, holder: Any, name: str, value: Any) -> Any:
        """`holder.name = value`; gives what was there itself (not what it inherits), or None."""
        former = vars(holder).get(name, _ABSENT)
        setattr(holder, name, value)
        self._done.append((holder, name, former, value))
        return None if former is _ABSENT else former

    def replace(self, former: Any, value: Any) -> None:
        """Put `value` wherever a module of the library holds `former` under any name."""
        self._everywhere.append((former, value))
        _exchange(self.library, former, value)

    def undo(self) -> tuple[str, ...]:
        """Give everything back. What somebody replaced after us stays as it is, and is named in the answer."""
        overtaken = []
        while self._done:
            holder, name, former, value = self._done.pop()
            if vars(holder).get(name, _ABSENT) is not value:
                overtaken.append(f"{getattr(holder, '__name__', holder)}.{name}")
            elif former is _ABSENT:
                delattr(holder, name)
            else:
                setattr(holder, name, former)
        while self._everywhere:
            former, value = self._everywhere.pop()
            _exchange(self.library, value, former)
        return tuple(overtaken)


def _exchange(library: str, former: Any, value: Any) -> None:
    for module in list(_modules(library)):
        for name in [name for name, held in vars(module).copy().items() if held is former]:
            setattr(module, name, value)


def _modules(library: str) -> Iterator[ModuleType]:
    for name, module in sys.modules.copy().items():  # one step: another thread may be importing
        if isinstance(module, ModuleType) and (name == library or name.startswith(f"{library}.")):
            yield module
