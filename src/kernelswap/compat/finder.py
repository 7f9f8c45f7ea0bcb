"""The finder behind `import kernels`, and the distribution behind `importlib.metadata.version("kernels")`."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from . import names, version

MAIN = "import sys; from kernels.cli import main; sys.exit(main())"


class Finder(importlib.metadata.DistributionFinder):
    """Answers for `kernels` and everything below it, and for nothing else."""

    def __init__(self) -> None:
        self.modules: dict[str, ModuleType] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  # the protocol's
        target: ModuleType | None = None,  # noqa: ARG002  # same
    ) -> ModuleSpec | None:
        """A module of the table in `names`. Raises for others below `kernels`, so that no other package's files are mixed in."""
        if fullname != "kernels" and not fullname.startswith("kernels."):
            return None
        if fullname not in names.MODULES and fullname != "kernels.__main__":
            offered = ", ".join(sorted(names.MODULES))
            raise ModuleNotFoundError(f"kernelswap serves no module {fullname}; it serves {offered}", name=fullname)
        package = any(other.startswith(fullname + ".") for other in names.MODULES)
        return ModuleSpec(fullname, _Loader(self), origin="kernelswap", is_package=package)

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        """Ours, where `kernels` or everything is asked for."""
        asked = getattr(context, "name", None)
        if asked is None or str(asked).lower() == "kernels":
            yield _Distribution()

    def invalidate_caches(self) -> None:
        """There is none."""

    def leave(self) -> None:
        """As if it had never been there."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in self.modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]


class _Loader(Loader):
    def __init__(self, finder: Finder) -> None:
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:  # noqa: ARG002  # the protocol's
        """As the import system makes them."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Its submodules first, its own names last: `kernels.layer.kernelize` is a module and, asked of its parent, a function."""
        name = module.__name__
        self.finder.modules[name] = module
        for below in names.MODULES:
            if below.rpartition(".")[0] == name:
                importlib.import_module(below)
        for attribute, (home, source) in names.MODULES[name].items():
            value = importlib.import_module(home) if source == "" else getattr(importlib.import_module(home), source)
            setattr(module, attribute, value)
        public = sorted(names.MODULES[name])
        if name == "kernels":
            module.__version__ = version.served()  # type: ignore[attr-defined]  # a module gets its names at run time
            public.append("__version__")
        module.__all__ = public  # type: ignore[attr-defined]  # same
        module.__doc__ = "Served by kernelswap; see its docs/kernels-api.md."

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m kernels`, which runs code instead of a module."""
        return compile(MAIN, "<kernelswap>", "exec") if fullname.endswith("__main__") else None

    def get_source(self, fullname: str) -> str | None:  # noqa: ARG002  # the protocol's
        """There is no file."""
        return None

    def is_package(self, fullname: str) -> bool:
        """As `find_spec` has it."""
        return any(other.startswith(fullname + ".") for other in names.MODULES)


class _Distribution(importlib.metadata.Distribution):
    def read_text(self, filename: str) -> str | None:
        """The little that is asked of it."""
        if filename == "METADATA":
            return f"Metadata-Version: 2.1\nName: kernels\nVersion: {version.served()}\nSummary: Served by kernelswap\n"
        return "kernels\n" if filename == "top_level.txt" else None

    def locate_file(self, path: Any) -> Path:
        """It has no files."""
        return Path(str(path))


def ask_again() -> None:
    """Let Transformers ask anew whether `kernels` is there, unless its integration has been imported with the answer no."""
    integration = sys.modules.get("transformers.integrations.hub_kernels")
    if integration is not None and not hasattr(integration, "LayerRepository"):
        return  # the names that it would need now were not imported; what it remembers is so
    asked = getattr(sys.modules.get("transformers.utils.import_utils"), "is_kernels_available", None)
    forget = getattr(asked, "cache_clear", None)
    if forget is not None:
        forget()
