"""Being told when a module is imported, without importing it: so that `install()` costs nothing where it is not used."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Then = Callable[[ModuleType], None]


class Arrivals(MetaPathFinder):
    """Calls `then[name](module)` for each module when its code has run; at once for those that are there already."""

    def __init__(self, then: Mapping[str, Then]) -> None:
        self.then = dict(then)
        self._looking: set[str] = set()

    def start(self) -> None:
        """Watch from now on."""
        sys.meta_path.insert(0, self)
        for name, then in self.then.items():
            module = sys.modules.get(name)
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                then(module)

    def stop(self) -> None:
        """Watch no more."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  # the protocol's
        target: ModuleType | None = None,  # noqa: ARG002  # same
    ) -> ModuleSpec | None:
        """The spec that others find, with a loader that tells us."""
        if fullname not in self.then or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Telling(spec.loader, self.then[fullname])
        return spec


class _Telling(Loader):
    """A loader that does what the real one does, and then says so. The module keeps the real one."""

    def __init__(self, loader: Any, then: Then) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the real one."""
        module: ModuleType | None = self.loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """As the real one; then tell."""
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.then(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
