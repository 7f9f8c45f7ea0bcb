"""A kernel repository with sources becomes `build/<variant>/`, with metadata and digests, as if it had been published.

Nothing under its final name is ever half-built: a temporary directory is filled and renamed, under a lock, so that two
processes compile once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from . import buildfile, metadata
from ._version import __version__
from .buildfile import BuildFile
from .errors import BuildFailed
from .toolchain import OPS_NOARCH, Compilation, architectures, compiler, failed, pair
from .types import Dependency, Machine, Progress

__all__ = ["compile", "compiler", "misfit", "source_digest", "sources", "variant_name"]

RECIPE = "2"  # enters every digest: raise it when the flags below change what is built
_UNSOURCED = {"build", "tests", "test", "benchmarks", "docs", "__pycache__"}  # directories that do not decide what is built
_PACKAGES = {"torch": "torch-ext", "torch-noarch": "torch-ext", "tvm-ffi": "tvm-ffi-ext"}


# -- what is there ------------------------------------------------------------------------------------------------


def sources(root: Path) -> BuildFile | None:
    """The `build.toml` of `root`, or None where `root` is not a repository with sources.

    Raises:
        BadMetadata: it does not parse; every problem at once.
    """
    try:
        text = (root / "build.toml").read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return buildfile.parse(text, where=str(root / "build.toml"))


def source_digest(root: Path) -> str:
    """16 hex digits over everything that decides what is built from `root`, this file's recipe included.

    Names the directory of compiled bundled kernels. Left out: builds, tests, benchmarks, Markdown, hidden files.
    """
    state = hashlib.sha256(RECIPE.encode())
    for path in _source_files(root):
        name = path.relative_to(root).as_posix()
        state.update(f"{len(name)}:{name}".encode())
        state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()[:16]


def variant_name(file: BuildFile, machine: Machine) -> str:
    """What a build of `file` for `machine` is called: `torch213-cxx11-cpu-x86_64-linux`, `torch-cuda`.

    Raises:
        BuildFailed: there is nothing to build for this machine, or it has no torch.
    """
    if file.framework == "torch-noarch":
        return f"torch-{'npu' if machine.backend == 'cann' else machine.backend}"
    if machine.torch is None:
        raise failed(file, "torch is not installed", todo="pip install torch")
    version = "".join(map(str, machine.backend_version)) if machine.backend_version else ""
    backend = {"cuda": "cu"}.get(machine.backend, machine.backend) + version
    arch = f"{backend}-{machine.cpu}-{machine.os}"
    stable = dict(file.stable_abi).get(machine.backend)
    if stable is not None:
        return f"torch-stable-abi{stable.replace('.', '')}-{arch}"
    abi = {True: "-cxx11", False: "-cxx98", None: ""}[machine.cxx11]
    return f"torch{machine.torch[0]}{machine.torch[1]}{abi}-{arch}"


# -- compiling ----------------------------------------------------------------------------------------------------


def compile(root: Path, machine: Machine, into: Path, *, progress: Progress | None = None) -> Path:  # noqa: A001  # the verb of the step
    """Build the repository `root` for `machine` into `<into>/build/<variant>/`, unless exactly that is already there.

    The id is `_<python name>_<backend>_<source digest>`, so that one source state has one id wherever it is compiled.
    Progress counts translation units, and one for the linker.

    Raises:
        BadMetadata: `build.toml` does not parse.
        BuildFailed: nothing to build for this machine, no compiler, or it reported errors; nothing is left under the final
            name, and the whole report is in the log that the message names.
    """
    file = sources(root)
    if file is None:
        raise BuildFailed(f"{root} has no build.toml", todo="give the directory of a kernel repository with sources")
    if (why := misfit(file, machine)) is not None:
        raise failed(file, why)
    variant = variant_name(file, machine)
    id_ = f"_{file.python_name}_{machine.backend}_{_unique(root)}"
    final = into / "build" / variant
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(into / f".{variant}.lock"):
            if not _is_built(final, id_):
                with _scratch(into, variant) as scratch:
                    package, objects = scratch / "package", scratch / "objects"
                    objects.mkdir()
                    _copy_package(root, file, package)
                    if file.framework == "torch-noarch":
                        ops = OPS_NOARCH.format(prefix=f"_{file.python_name}", unique=_unique(root))
                    else:
                        build = Compilation(root, file, machine, id_, objects, into / f"{variant}.log")
                        ops = build.run(package, progress)
                    (package / "_ops.py").write_text(ops)
                    _write_metadata(root, file, machine, id_, package)
                    _replace(package, final, scratch)
    except OSError as e:
        raise failed(file, f"{into} cannot be written: {e}") from e
    return final


def misfit(file: BuildFile, machine: Machine) -> str | None:
    """Why `file` cannot be built for `machine`, or None."""
    torch, arch = machine.torch or (0, 0), file.framework == "torch"
    lacking = sorted({d for s in file.sections_for(machine.backend) for d in s.depends} - {"torch"})
    low, high = (pair(bound) if bound else torch for bound in (file.minver, file.maxver))
    checks = (
        (
            machine.backend in file.backends,
            f"has sources for {', '.join(file.backends)}, this machine's backend is {machine.backend}",
        ),
        (file.framework != "tvm-ffi", "is a tvm-ffi kernel; only torch kernels are compiled here"),
        (
            not arch or machine.backend in {"cpu", "cuda"},
            f"needs a compiler for {machine.backend}; cpu and cuda are compiled here",
        ),
        (not arch or machine.os in {"linux", "darwin"}, f"has C++ sources, compiled on linux and darwin; this is {machine.os}"),
        (not lacking, f"needs {', '.join(lacking)}, which only the field's builder brings"),
        (low <= torch <= high, f"is for torch {file.minver or '...'} to {file.maxver or '...'}, this is {torch[0]}.{torch[1]}"),
    )
    return next((why for fine, why in checks if not fine), None)


# -- the directory ------------------------------------------------------------------------------------------------


def _source_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _UNSOURCED and not f.startswith("."))
        found += [Path(folder) / n for n in sorted(names) if not n.startswith(".") and not n.endswith((".md", ".pyc", ".log"))]
    return sorted(found)


def _unique(root: Path) -> str:
    """Thirteen characters in place of the builder's random ones, so that the same sources have the same id."""
    return base64.b32encode(bytes.fromhex(source_digest(root))).decode().rstrip("=").lower()


def _is_built(final: Path, id_: str) -> bool:
    try:
        found: object = json.loads((final / "metadata.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError:  # damaged from outside: build it again
        return False
    return isinstance(found, dict) and found.get("id") == id_


@contextmanager
def _scratch(beside: Path, variant: str) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix=f".{variant}.", dir=beside))  # on the file system of the final name: rename is atomic
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _replace(package: Path, final: Path, scratch: Path) -> None:
    with suppress(FileNotFoundError):
        final.rename(scratch / "stale")  # of other sources; deleted with the scratch
    package.rename(final)


def _copy_package(root: Path, file: BuildFile, into: Path) -> None:
    package = root / _PACKAGES[file.framework] / file.python_name
    if not (package / "__init__.py").is_file():
        raise failed(file, f"has no {package.relative_to(root).as_posix()}/__init__.py")
    wanted = tuple(f".{extension.lstrip('.')}" for extension in file.pyext)
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.name.endswith(wanted) and "__pycache__" not in path.parts:
            target = into / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _write_metadata(root: Path, file: BuildFile, machine: Machine, id_: str, package: Path) -> None:
    archs = set(dict(file.archs).get(machine.backend, ()))
    for section in file.sections_for(machine.backend) if machine.backend == "cuda" else ():
        archs |= {*architectures(section, machine)} if any(name.endswith(".cu") for name in section.src) else set()
    backend: dict[str, object] = {"type": machine.backend}
    if archs:
        backend["archs"] = sorted(archs)
    written: dict[str, object] = {
        "name": file.name,
        "id": id_,
        "version": file.version,
        "license": file.license,
        **({"upstream": file.upstream} if file.upstream else {}),
        **({"source": file.source} if file.source else {}),
        "python-depends": list(file.python_depends_on(machine.backend)),
        "kernel-depends": [_dependency(d) for d in file.kernel_depends_on(machine.backend)],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": metadata.digest_files(package)},
        "provenance": {"kernel-builder": {"version": f"kernelswap-{__version__}"}, **_origin(root)},
    }
    data = json.dumps(written, indent=1).encode()
    metadata.parse(data)  # what we write, we can read
    (package / "metadata.json").write_bytes(data)


def _dependency(dependency: Dependency) -> dict[str, object]:
    pinned = {"version": dependency.version} if dependency.version is not None else {"revision": dependency.revision}
    return {"repo-id": dependency.name, **pinned}


def _origin(root: Path) -> dict[str, object]:
    """Commit and dirtiness, where `root` itself is a git repository (not merely inside one)."""
    if not (root / ".git").exists() or (git := shutil.which("git")) is None:
        return {}
    ask = [git, "-C", str(root)]
    head = subprocess.run([*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603  # git, fixed arguments
    state = subprocess.run([*ask, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)  # noqa: S603  # same
    if head.returncode or state.returncode:
        return {}
    return {"kernel": {"commit": head.stdout.strip(), "dirty": bool(state.stdout.strip())}}
