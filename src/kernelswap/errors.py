"""Every error kernelswap raises, and whose fault it is.

* KernelSwapError
  - SpecError         the text does not parse                              caller
  - TableError        a table, config or policy file is wrong              caller
  - ModeError         the combination of modes means nothing               caller
  - UnknownKernel     no source knows this name, version or layer          caller
  - NotOnHub          the same, of a hub: no such repository or revision   caller
  - NoDirectory       the same, of a directory                             caller
  - PlanConflict      two rows claim one site                              caller
  - UndoConflict      someone wrapped the module after we did              caller
  - Required          `require=` named a swap that did not happen          caller
  - NoVariant         published, but no build fits this machine            machine
  - Unsuited          the same; a build was left out by its metadata       machine
  - MissingDependency a Python package that the kernel needs is absent     machine
  - BuildFailed       compiling sources failed, or there is no compiler    machine
  - StoreError        cache unreadable, read-only or out of space          machine
  - Unreachable       the source could not be asked                        network
  - NotCached         offline, and this was never fetched                  network
  - BadMetadata       metadata.json, lock or status file does not parse    publisher
  - Refused           a verifier said no, or policy forbids it             publisher
  - Tampered          bytes differ from what was verified before           publisher
  - LoadFailed        the code raised while being imported                 kernel
  - DependencyError   it asked for another kernel that it did not declare  kernel
  - LayerMismatch     its forward cannot stand in for the original         kernel
  - CallFailed        it raised at its first call                          kernel

`fault` is what a fallback policy looks at: by default every fault keeps the original layer with the reason (design
decision D8), except `Tampered`, always raised, and `Refused` for a kernel that the user named.

Errors also inherit from the built-in type that callers of other loaders already catch (`FileNotFoundError` for "no
build", `ValueError` for "no such version", ...), so that `except` clauses in the wild keep working.

The message has up to three parts, printed on a line each: what was asked, what was found, what to do next.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Fault = Literal["caller", "machine", "network", "publisher", "kernel"]


class KernelSwapError(Exception):
    """Base of all. `found` is what is so; `asked` and `todo` complete the three lines where they are known."""

    fault: ClassVar[Fault] = "caller"

    def __init__(self, found: str, *, asked: str | None = None, todo: str | None = None) -> None:
        self.found, self.asked, self.todo = found, asked, todo
        super().__init__("\n".join(line for line in (asked, found, todo) if line))

    @property
    def reason(self) -> str:
        """One line: the finding alone, for tables and logs."""
        return self.found.splitlines()[0] if self.found else type(self).__name__

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by state: subclasses may have other constructors, and errors cross process borders."""
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[KernelSwapError], args: tuple[object, ...], state: dict[str, object]) -> KernelSwapError:
    layout = next((base for base in (OSError, ImportError) if issubclass(cls, base)), Exception)
    error: KernelSwapError = layout.__new__(cls)  # the first `__new__` in the order of bases need not be the one that fits
    error.args = args
    error.__dict__.update(state)
    return error


class SpecError(KernelSwapError, ValueError):
    """Points at the character, the way a compiler does. `span` is half-open, in characters of `text`."""

    def __init__(self, message: str, *, text: str, span: tuple[int, int], todo: str | None = None) -> None:
        start, end = span
        caret = f"{message}\n    {text}\n    {' ' * start}{'^' * max(1, end - start)}"
        super().__init__(caret, todo=todo)
        self.text, self.span = text, span


class TableError(KernelSwapError, ValueError):
    """A table, KernelConfig or policy file is wrong; all problems at once, one a line."""


class ModeError(KernelSwapError, ValueError):
    """The combination of modes means nothing."""


class UnknownKernel(KernelSwapError, ValueError, LookupError):
    """No source knows this name, version or layer."""


class NotOnHub(UnknownKernel, OSError):
    """A hub has no such repository, or not at this revision; an OSError, as the hub's own client raises."""


class NoDirectory(UnknownKernel, FileNotFoundError):
    """There is no directory of that name."""


class PlanConflict(KernelSwapError, ValueError):
    """Two rows claim one site."""


class UndoConflict(KernelSwapError, RuntimeError):
    """Someone wrapped the module after we did; undo that first."""


class Required(KernelSwapError, RuntimeError):
    """`require=` named a swap that did not happen."""


class NoVariant(KernelSwapError, FileNotFoundError):
    """Published, but no build fits this machine; the message carries every variant with its reason."""

    fault = "machine"


class Unsuited(NoVariant, RuntimeError):
    """No build fits, and one that would is for other chips, or for a newer loader: what its name does not say, its metadata does."""


class MissingDependency(KernelSwapError, ImportError):
    """A Python package that the kernel declares is not installed."""

    fault = "machine"


class BuildFailed(KernelSwapError, RuntimeError):
    """Compiling sources failed, or there is no compiler."""

    fault = "machine"


class StoreError(KernelSwapError, OSError):
    """The cache is unreadable, read-only, or out of space."""

    fault = "machine"


class Unreachable(KernelSwapError, ConnectionError):
    """The source could not be asked."""

    fault = "network"


class NotCached(KernelSwapError, FileNotFoundError):
    """Offline, and this was never fetched."""

    fault = "network"


class BadMetadata(KernelSwapError, ValueError):
    """metadata.json, a lock or a status file does not parse; all problems at once, one a line."""

    fault = "publisher"


class Refused(KernelSwapError, ValueError):
    """A verifier said no, or policy forbids it."""

    fault = "publisher"


class Tampered(Refused):
    """Bytes differ from what was verified before. Always raised, never a fallback."""


class LoadFailed(KernelSwapError, ImportError, RuntimeError):
    """The kernel's own code raised while being imported; its exception, mostly a RuntimeError, is the cause."""

    fault = "kernel"


class DependencyError(KernelSwapError, RuntimeError):
    """A kernel dependency was asked for outside an import, or by a kernel that does not declare it."""

    fault = "kernel"


class LayerMismatch(KernelSwapError, TypeError):
    """Its forward cannot stand in for the original."""

    fault = "kernel"


class CallFailed(KernelSwapError, RuntimeError):
    """The kernel raised at its first call."""

    fault = "kernel"
