"""`build.toml` of a kernel repository with sources, read strictly. Text in, value out; no I/O.

Edition 5 of the format, and edition 4 brought up to it. Paths in it stay below the repository, because compiling follows them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import strict
from .errors import BadMetadata
from .types import Dependency

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 18  # lists sources by name: a quarter of a megabyte is four thousand of them
BACKENDS = ("cann", "cpu", "cuda", "metal", "neuron", "rocm", "tpu", "xpu")
Framework = Literal["torch", "torch-noarch", "tvm-ffi"]

_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")
_VERSION = re.compile(r"[0-9]+(\.[0-9]+){0,2}")
_FLAG = re.compile(r"[^\x00-\x1f\x7f]{1,512}")
_DEPENDS = {
    "torch", "sycl_tla", "metal-cpp",
    *(f"cutlass_{v}" for v in ("2_10", "3_5", "3_6", "3_8", "3_9", "4_0", "4_4", "4_5")),
}  # fmt: skip
_SECTION_KEYS = {
    "cpu": (),
    "metal": (),
    "cuda": ("cuda-capabilities", "cuda-flags", "cuda-minver"),
    "rocm": ("rocm-archs", "hip-flags"),
    "xpu": ("sycl-flags",),
}


@dataclass(frozen=True, slots=True)
class Section:
    """`[kernel.<id>]`: translation units with flags of their own."""

    id: str
    backend: str
    depends: tuple[str, ...] = ()
    src: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    cxx_flags: tuple[str, ...] = ()
    device_flags: tuple[str, ...] = ()
    """`cuda-flags`, `hip-flags` or `sycl-flags`."""
    archs: tuple[str, ...] = ()
    """`cuda-capabilities` or `rocm-archs`."""
    minver: str | None = None
    """`cuda-minver`."""


@dataclass(frozen=True, slots=True)
class BuildFile:
    """One `build.toml`. Made by `parse` only."""

    name: str
    version: int
    license: str
    backends: tuple[str, ...]
    framework: Framework
    src: tuple[str, ...] = ()
    """Of the framework table: the binding."""
    include: tuple[str, ...] = ()
    cxx_flags: tuple[str, ...] = ()
    pyext: tuple[str, ...] = ("py", "pyi")
    """Extensions of the files of the Python package that are shipped."""
    stable_abi: tuple[tuple[str, str], ...] = ()
    """`(backend, torch version)` for the backends that are built against torch's stable ABI."""
    minver: str | None = None
    """Of torch, inclusive, as `maxver`."""
    maxver: str | None = None
    cuda_minver: str | None = None
    cuda_maxver: str | None = None
    sections: tuple[Section, ...] = ()
    archs: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """torch-noarch: what it runs on, per backend."""
    python_depends: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Per backend; `""` holds for every one."""
    kernel_depends: tuple[tuple[str, tuple[Dependency, ...]], ...] = ()
    upstream: str | None = None
    source: str | None = None
    repository: str | None = None
    """`general.hub.repo-id`."""
    branch: str | None = None
    edition: int = 5

    @property
    def python_name(self) -> str:
        """The name of its Python package."""
        return self.name.replace("-", "_")

    def python_depends_on(self, backend: str) -> tuple[str, ...]:
        """Python packages that the build for `backend` needs."""
        return tuple(dict.fromkeys(d for key, found in self.python_depends if key in {"", backend} for d in found))

    def kernel_depends_on(self, backend: str) -> tuple[Dependency, ...]:
        """Kernel repositories that the build for `backend` needs."""
        return tuple(dict.fromkeys(d for key, found in self.kernel_depends if key in {"", backend} for d in found))

    def sections_for(self, backend: str) -> tuple[Section, ...]:
        """The sections that are compiled for `backend`."""
        return tuple(s for s in self.sections if s.backend == backend)


def parse(text: str, *, where: str = "build.toml") -> BuildFile:
    """Read `text`; unknown keys are problems, because a misspelt flag would otherwise be a build that differs in silence.

    Raises:
        BadMetadata: every problem at once, one a line.
    """
    if len(text) > MAX_BYTES:
        raise BadMetadata(f"{len(text)} characters, at most {MAX_BYTES} are read", asked=where)
    try:
        root = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise BadMetadata(f"not TOML: {e}", asked=where) from e
    reader = _Reader()
    parsed = reader.file(root)
    strict.fail(reader.problems, what=where)
    return parsed


class _Table:
    """One table being read. What was not asked for by the end is an unknown key."""

    def __init__(self, reader: _Reader, values: Mapping[str, Any], where: str) -> None:
        self.reader, self.values, self.where = reader, values, where
        self.asked: set[str] = set()

    def at(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def get(self, key: str, type_: type | tuple[type, ...], wanted: str, default: Any, *, required: bool = False) -> Any:
        self.asked.add(key)
        if key not in self.values:
            if required:
                self.reader.problems.append(f"{self.at(key)}: missing")
            return default
        value = self.values[key]
        if not isinstance(value, type_) or (isinstance(value, bool) and type_ is not bool):
            self.reader.problems.append(f"{self.at(key)}: expected {wanted}, found {strict.quote(value)}")
            return default
        return value

    def string(self, key: str, *, required: bool = False) -> str | None:
        value: str | None = self.get(key, str, "a string", None, required=required)
        if value is not None and (not value.strip() or not value.isprintable()):
            self.reader.problems.append(f"{self.at(key)}: {strict.quote(value)} is empty or cannot be printed")
        return value

    def version(self, key: str) -> str | None:
        value = self.string(key)
        if value is not None and not _VERSION.fullmatch(value):
            self.reader.problems.append(f"{self.at(key)}: {strict.quote(value)} is not a version like 2.9")
            return None
        return value

    def strings(self, key: str, *, required: bool = False) -> tuple[str, ...]:
        items = self.get(key, list, "a list of strings", [], required=required)
        bad = [item for item in items if not isinstance(item, str) or not _FLAG.fullmatch(item)]
        self.reader.problems += [f"{self.at(key)}: expected strings, found {strict.quote(item)}" for item in bad]
        return () if bad else tuple(items)

    def names(self, key: str, known: Sequence[str] | set[str], *, required: bool = False) -> tuple[str, ...]:
        found = self.strings(key, required=required)
        self.reader.problems += [
            f"{self.at(key)}: {strict.quote(item)} is none of {', '.join(sorted(known))}" for item in found if item not in known
        ]
        return found

    def paths(self, key: str, *, required: bool = False) -> tuple[str, ...]:
        found = self.strings(key, required=required)
        for path in found:
            if (why := strict.path_problem(path.removesuffix("/") if path != "." else "root")) is not None:
                self.reader.problems.append(f"{self.at(key)}: the path {strict.quote(path)} {why}")
        return found

    def table(self, key: str, *, required: bool = False) -> _Table:
        return _Table(self.reader, self.get(key, dict, "a table", {}, required=required), self.at(key))

    def close(self) -> None:
        self.reader.problems += [
            f"{self.at(key)}: unknown key (known here: {', '.join(sorted(self.asked))})"
            for key in self.values
            if key not in self.asked
        ]


class _Reader:
    def __init__(self) -> None:
        self.problems: list[str] = []

    def file(self, values: Mapping[str, Any]) -> BuildFile:
        root = _Table(self, values, "")
        general = root.table("general", required=True)
        edition = self.edition(general, root)
        name = general.string("name", required=True) or ""
        if name and not _NAME.fullmatch(name):
            self.problems.append(f"general.name: {strict.quote(name)} is not a kernel name (a-z, 0-9 and inner dashes)")
        version: int = general.get("version", int, "a whole number from 0 on", 0, required=True)
        if version < 0:
            self.problems.append(f"general.version: expected a whole number from 0 on, found {version}")
        license_ = general.string("license", required=True) or ""
        backends = general.names("backends", BACKENDS, required=True)
        if not backends and not any(p.startswith("general.backends") for p in self.problems):
            self.problems.append("general.backends: names no backend")
        python_depends, kernel_depends = [("", general.strings("python-depends"))], [("", self.kernels(general, edition))]
        cuda_minver = cuda_maxver = None
        for backend in ("cuda", "neuron", "xpu", "tpu"):
            if backend == "tpu" and edition < 5:
                continue
            table = general.table(backend)
            if backend == "cuda":
                cuda_minver, cuda_maxver = table.version("minver"), table.version("maxver")
            python_depends.append((backend, table.strings("python-depends")))
            if backend != "tpu":
                kernel_depends.append((backend, self.kernels(table, edition)))
            table.close()
        hub = general.table("hub")
        repository, branch = hub.string("repo-id"), hub.string("branch")
        hub.close()
        upstream, source = general.string("upstream"), general.string("source")
        general.close()
        framework, table, archs = self.framework(root)
        arch = framework != "torch-noarch"
        file = BuildFile(
            name=name,
            version=version,
            license=license_,
            backends=backends,
            framework=framework,
            src=table.paths("src", required=framework == "tvm-ffi") if arch else (),
            include=table.paths("include") if arch else (),
            cxx_flags=table.strings("cxx-flags") if arch else (),
            pyext=table.strings("pyext") or ("py", "pyi"),
            stable_abi=self.stable_abi(table, backends, edition) if framework == "torch" else (),
            minver=table.version("minver") if framework == "torch" else None,
            maxver=table.version("maxver") if framework == "torch" else None,
            cuda_minver=cuda_minver,
            cuda_maxver=cuda_maxver,
            sections=self.sections(root),
            archs=archs,
            python_depends=tuple(python_depends),
            kernel_depends=tuple(kernel_depends),
            upstream=upstream,
            source=source,
            repository=repository,
            branch=branch,
            edition=edition,
        )
        table.close()
        root.close()
        return file

    def edition(self, general: _Table, root: _Table) -> int:
        edition: int = general.get("edition", int, "5", 4)
        if edition not in {4, 5} or ("edition" in general.values and edition != 5):
            self.problems.append(f"general.edition: {strict.quote(edition)} is not 5, the only edition that is named")
        old = [key for key in ("universal", "cuda-minver", "cuda-maxver") if key in general.values]
        universal = isinstance(root.values.get("torch"), dict) and "universal" in root.values["torch"]
        if old or universal:
            keys = ", ".join([f"general.{key}" for key in old] + (["torch.universal"] if universal else []))
            self.problems.append(f"{keys}: of an edition before 4; the builder of that edition can migrate it")
            general.asked.update(old)
        return edition

    def kernels(self, table: _Table, edition: int) -> tuple[Dependency, ...]:
        if edition < 5:
            return ()
        found = []
        for i, item in enumerate(table.get("kernel-depends", list, "a list of tables", [])):
            if not isinstance(item, dict):
                self.problems.append(f"{table.at('kernel-depends')}[{i}]: expected a table, found {strict.quote(item)}")
                continue
            entry = _Table(self, item, f"{table.at('kernel-depends')}[{i}]")
            name = entry.string("repo-id", required=True) or ""
            version: int | None = entry.get("version", int, "a whole number", None)
            revision = entry.string("revision")
            entry.close()
            if (version is None) is (revision is None):
                self.problems.append(f"{entry.where}: exactly one of version and revision is needed")
            found.append(Dependency(name, version=version, revision=revision))
        return tuple(found)

    def framework(self, root: _Table) -> tuple[Framework, _Table, tuple[tuple[str, tuple[str, ...]], ...]]:
        known: tuple[Framework, ...] = ("torch", "torch-noarch", "tvm-ffi")
        present = [name for name in known if name in root.values]
        if len(present) != 1:
            found = ", ".join(present) if present else "none"
            self.problems.append(f"exactly one of the tables {', '.join(known)} is needed, found {found}")
        chosen = present[0] if present else "torch"
        tables = {name: root.table(name) for name in known}
        table = tables[chosen]
        if chosen != "torch-noarch":
            return chosen, table, ()
        archs = (("cuda", table.strings("cuda_capabilities")), ("rocm", table.strings("rocm_archs")))
        return chosen, table, tuple((backend, found) for backend, found in archs if found)

    def stable_abi(self, table: _Table, backends: Sequence[str], edition: int) -> tuple[tuple[str, str], ...]:
        if not isinstance(table.values.get("stable-abi"), dict) or edition < 5:
            version = table.version("stable-abi")
            return tuple((backend, version) for backend in backends) if version is not None else ()
        per_backend = table.table("stable-abi")
        found = [(backend, per_backend.version(backend)) for backend in BACKENDS]
        per_backend.close()
        return tuple((backend, version) for backend, version in found if version is not None)

    def sections(self, root: _Table) -> tuple[Section, ...]:
        kernels = root.table("kernel")
        found = [self.section(id_, kernels.table(id_)) for id_ in kernels.values]
        kernels.close()
        return tuple(found)

    def section(self, id_: str, table: _Table) -> Section:
        backend = table.string("backend", required=True) or ""
        if backend and backend not in _SECTION_KEYS:
            self.problems.append(f"{table.at('backend')}: {strict.quote(backend)} is none of {', '.join(_SECTION_KEYS)}")
        special = _SECTION_KEYS.get(backend, ())
        archs: tuple[str, ...] = ()
        flags: tuple[str, ...] = ()
        for key in special:
            if key in {"cuda-capabilities", "rocm-archs"}:
                archs = table.strings(key)
            elif key.endswith("-flags"):
                flags = table.strings(key)
        section = Section(
            id=id_,
            backend=backend,
            depends=table.names("depends", _DEPENDS, required=True),
            src=table.paths("src", required=True),
            include=table.paths("include"),
            cxx_flags=table.strings("cxx-flags"),
            device_flags=flags,
            archs=archs,
            minver=table.version("cuda-minver") if "cuda-minver" in special else None,
        )
        table.close()
        return section
