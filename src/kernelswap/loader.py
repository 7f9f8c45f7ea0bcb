"""`Artifact` to `Kernel`: import a verified directory under a name of its own.

The package is called `<metadata.id>_<first 12 digits of the digest>`. The id alone would be what compiled code expects
of *its own* name, and all that it expects is the last part of it: `from . import <id>` finds `<id>.abi3.so` and its
`PyInit_<id>` below any package. With the digest in the name, two versions, or two directories that claim one id, are two
modules whose late imports never meet. What they would share is `torch.ops.<id>`, which torch registers once per process;
so a second kernel that would register there again is refused instead of killing the process.

Modules come from a finder of our own, which answers for these packages only, reads each file once, compares it with the
hash that was verified, and compiles exactly those bytes, also when a function of the kernel imports a submodule an hour
later. It never reads or writes bytecode.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import CodeType, ModuleType

from . import tree
from .errors import BadMetadata, DependencyError, LoadFailed, MissingDependency, StoreError, Tampered
from .types import Artifact, Kernel

# The curated Python packages that a kernel may declare: key -> (what to install, what to import; None: cannot be probed).
_GENERAL: Mapping[str, tuple[str, str | None]] = {
    "einops": ("einops", "einops"),
    "helion": ("helion", "helion"),
    "tvm-ffi": ("apache-tvm-ffi", "tvm_ffi"),
}
_OF_BACKEND: Mapping[str, Mapping[str, tuple[str, str | None]]] = {
    "cuda": {"nvidia-cutlass-dsl": ("nvidia-cutlass-dsl", "cutlass")},
    "neuron": {"nki": ("nki", "nki")},
    "xpu": {"onednn": ("onednn-devel", None)},
}
_NATIVE = tuple({*importlib.machinery.EXTENSION_SUFFIXES, ".so", ".dylib", ".dll", ".pyd"})


def load(artifact: Artifact, *, reverify: Callable[[Artifact], Mapping[str, str]] | None = None) -> Kernel:
    """Import the kernel, once per digest and process; its dependencies first. Nothing of it has run before this.

    `reverify(artifact)` gives `{path: hex sha256}` of files that are as they were verified (`Store.reverify`); without it
    all files are hashed here. It is asked before the first import only.

    Raises:
        Tampered: files changed since they were verified.
        MissingDependency: a Python package that the kernel declares is not installed; its code has not run.
        LoadFailed: the kernel's own code raised, which is the cause; `sys.modules` is as it was.
        StoreError: the artifact is gone.
    """
    loaded = _loaded.get(artifact.digest)
    if loaded is not None:
        return loaded if loaded.artifact == artifact else Kernel(artifact, loaded.module)
    depends = [(below, load(below, reverify=reverify)) for below in artifact.depends]
    with _registry_lock:
        lock = _locks.setdefault(artifact.digest, threading.RLock())
    with lock:
        loaded = _loaded.get(artifact.digest)
        if loaded is None:
            _require(artifact)
            files = (reverify or _hash)(artifact)
            loaded = Kernel(artifact, _import(artifact, files, depends))
            _loaded[artifact.digest] = loaded
    return Kernel(artifact, loaded.module)


def loaded() -> tuple[Kernel, ...]:
    """Every kernel that this process has imported, in order."""
    return tuple(_loaded.values())


def dependency(name: str) -> ModuleType:
    """The module of a declared kernel dependency, for the code of a kernel while it is being imported.

    Raises:
        DependencyError: nothing is being imported here, or the kernel does not declare `name`, or declares two of them.
    """
    importing = _importing.get()
    asked = f"kernel dependency {name!r}"
    if importing is None:
        raise DependencyError("no kernel is being imported here", asked=asked, todo="Ask at the top level of the kernel.")
    artifact, depends = importing
    found = [kernel.module for below, kernel in depends if name in {below.candidate.requirement.name, below.candidate.name}]
    if len(found) != 1:
        names = ", ".join(str(below.candidate.requirement) for below, _ in depends) or "none"
        how = "does not declare it" if not found else f"declares {len(found)} versions of it"
        raise DependencyError(f"{artifact.candidate.requirement} {how}; it declares: {names}", asked=asked)
    return found[0]


_loaded: dict[str, Kernel] = {}
_locks: dict[str, threading.RLock] = {}  # type: ignore[valid-type,unused-ignore]  # RLock is a function before 3.13
_registry_lock = threading.Lock()
_importing: ContextVar[tuple[Artifact, Sequence[tuple[Artifact, Kernel]]] | None] = ContextVar("importing", default=None)


# -- one import -------------------------------------------------------------------------------------------------------


def _import(artifact: Artifact, files: Mapping[str, str], depends: Sequence[tuple[Artifact, Kernel]]) -> ModuleType:
    name = f"{artifact.metadata.id}_{artifact.digest[:12]}"
    package = _Package(artifact, _entry(artifact, files), dict(files))
    _refuse_shared_ops(artifact)
    if name in sys.modules:
        raise LoadFailed(f"something else is imported as {name}", asked=_named(artifact))
    with _registry_lock:
        _finder.packages[name] = package
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)  # before the others: nobody else may answer for these names
    token = _importing.set((artifact, depends))
    try:
        return importlib.import_module(name)
    except BaseException as e:
        _forget(name)
        if isinstance(e, Tampered):
            raise
        if not isinstance(e, Exception | SystemExit):
            raise  # an interrupt is the user's, not the kernel's
        failed = LoadFailed(f"{type(e).__name__} while importing it: {e}", asked=_named(artifact))
        if sys.version_info >= (3, 11):
            e.add_note(f"while importing {_named(artifact)} from {artifact.path}")
        raise failed from e
    finally:
        _importing.reset(token)


def _forget(name: str) -> None:
    """No trace: not the package, not its submodules, not our answer for it."""
    with _registry_lock:
        _finder.packages.pop(name, None)
        if not _finder.packages:
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _finder]
    for module in [m for m in sys.modules.copy() if m == name or m.startswith(name + ".")]:
        del sys.modules[module]


def _entry(artifact: Artifact, files: Mapping[str, str]) -> str:
    """Where the package is, relative to the artifact: in it, or (before 2025-11) one directory below."""
    if "__init__.py" in files:
        return ""
    nested = artifact.metadata.name.replace("-", "_")
    if f"{nested}/__init__.py" in files:
        return f"{nested}/"
    # A build without metadata has a made-up name, but only one package in it.
    found = [path for path in files if path.count("/") == 1 and path.endswith("/__init__.py")]
    if len(found) == 1:
        return found[0].removesuffix("__init__.py")
    raise LoadFailed(f"neither __init__.py nor {nested}/__init__.py is in it", asked=_named(artifact))


def _refuse_shared_ops(artifact: Artifact) -> None:
    """`torch.ops.<id>` exists once. A second library that registers there ends the process, so it is not opened."""
    id_ = artifact.metadata.id
    torch = sys.modules.get("torch")
    if torch is None:
        return
    if any(op.startswith(id_ + "::") for op in torch._C._dispatch_get_all_op_names()):  # noqa: SLF001  # there is no public list
        other = next((k.artifact for k in list(_loaded.values()) if k.artifact.metadata.id == id_), None)
        if other is None and not any(p.name.endswith(_NATIVE) for p in artifact.path.rglob("*")):
            return  # Python that registers where somebody else does raises by itself
        owner = f"{_named(other)} with digest {other.digest[:12]}" if other else "something else in this process"
        raise LoadFailed(
            f"its operators would be torch.ops.{id_}, which {owner} has registered",
            asked=f"{_named(artifact)} with digest {artifact.digest[:12]}",
            todo="Load it in a process of its own.",
        )


def _require(artifact: Artifact) -> None:
    metadata = artifact.metadata
    backends = _OF_BACKEND if metadata.backend == "universal" else {metadata.backend}
    known = {**_GENERAL, **{name: package for key in backends for name, package in _OF_BACKEND.get(key, {}).items()}}
    unknown = [name for name in metadata.python_depends if name not in known]
    if unknown:
        raise BadMetadata(
            f"python-depends: {', '.join(unknown)} is not a package that kernels may ask for", asked=_named(artifact)
        )
    missing = [known[name][0] for name in metadata.python_depends if not _importable(known[name][1])]
    if missing:
        names = " ".join(missing)
        raise MissingDependency(f"it needs {names}, not installed", asked=_named(artifact), todo=f"pip install {names}")


def _importable(name: str | None) -> bool:
    try:
        return name is None or importlib.util.find_spec(name) is not None
    except ValueError:  # in sys.modules, put there by hand
        return True


def _hash(artifact: Artifact) -> Mapping[str, str]:
    try:
        files = tree.hashes(artifact.path)
    except FileNotFoundError as e:
        raise StoreError(f"{artifact.path} is gone", asked=_named(artifact)) from e
    except OSError as e:
        raise Tampered(f"{e.filename or artifact.path} cannot be read: {e.strerror}", asked=_named(artifact)) from e
    if artifact.path.is_symlink() or tree.digest_of(files) != artifact.digest:
        raise Tampered(f"{artifact.path} was changed since it was verified", asked=_named(artifact))
    return files


def _named(artifact: Artifact) -> str:
    return f"{artifact.candidate.requirement} ({artifact.candidate.variant})"


# -- the finder -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Package:
    """One artifact as the import system sees it."""

    artifact: Artifact
    base: str
    """`""` or `nested_name/`."""
    files: dict[str, str] = field(repr=False)

    def read(self, path: str) -> bytes:
        """The bytes that were verified, or Tampered; there is no moment between looking and using."""
        try:
            data = (self.artifact.path / path).read_bytes()
        except OSError as e:
            raise Tampered(f"{path} cannot be read any more: {e.strerror}", asked=_named(self.artifact)) from e
        if hashlib.sha256(data).hexdigest() != self.files.get(path):
            raise Tampered(f"{path} was changed since it was verified", asked=_named(self.artifact))
        return data

    def spec(self, name: str, inside: str) -> importlib.machinery.ModuleSpec | None:
        """`inside` is the dotted name below the package, empty for the package itself. Only files that were verified are seen."""
        stem = self.base + inside.replace(".", "/")
        directory = stem if inside else self.base.rstrip("/")
        init = f"{directory}/__init__.py" if directory else "__init__.py"
        if init in self.files:
            return self._source(name, init, [str(self.artifact.path / directory)])
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if stem + suffix in self.files:
                self.read(stem + suffix)
                path = str(self.artifact.path / (stem + suffix))
                loader = importlib.machinery.ExtensionFileLoader(name, path)
                return importlib.util.spec_from_file_location(name, path, loader=loader)
        if stem + ".py" in self.files:
            return self._source(name, stem + ".py", None)
        if any(path.startswith(stem + "/") for path in self.files):
            spec = importlib.machinery.ModuleSpec(name, None, is_package=True)  # a directory without __init__.py
            spec.submodule_search_locations = [str(self.artifact.path / stem)]
            return spec
        return None

    def _source(self, name: str, path: str, search: list[str] | None) -> importlib.machinery.ModuleSpec | None:
        location = str(self.artifact.path / path)
        loader = _Loader(name, location, self, path)
        return importlib.util.spec_from_file_location(name, location, loader=loader, submodule_search_locations=search)


class _Loader(importlib.machinery.SourceFileLoader):
    """Compiles the verified bytes; no bytecode is read or written."""

    def __init__(self, name: str, location: str, package: _Package, path: str) -> None:
        super().__init__(name, location)
        self._package, self._path = package, path

    def get_data(self, path: str | os.PathLike[str]) -> bytes:
        """Of the module's own file, the verified bytes."""
        return self._package.read(self._path) if os.fspath(path) == self.path else super().get_data(os.fspath(path))

    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002  # the import system's signature
        """Without looking for a cached one."""
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder:
    """Answers for kernels, and for nothing else."""

    def __init__(self) -> None:
        self.packages: dict[str, _Package] = {}

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002  # the import system's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Raises for a module that a kernel does not have, so that nobody else looks for it in the artifact's directory."""
        top, _, inside = name.partition(".")
        package = self.packages.get(top)
        if package is None:
            return None
        spec = package.spec(name, inside)
        if spec is None:
            raise ModuleNotFoundError(f"{_named(package.artifact)} has no module {inside}", name=name)
        return spec

    def invalidate_caches(self) -> None:
        """There is none."""


_finder = _Finder()
