"""The compiler, run directly: one translation unit a process, in parallel. Knows flags and libraries, no directories of ours.

A kernel has a handful of units; a build system would be one more thing that may be absent. The environment is read for one
thing, `CXX`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from .buildfile import BuildFile, Section
from .errors import BuildFailed
from .types import Machine, Progress

COMPILERS = ("c++", "g++", "clang++")
SOURCES = (".cpp", ".cc", ".cxx", ".c", ".cu")
_SHOWN = 12  # lines of the compiler's report that an error carries
_CUDA_BY_DEFAULT = ("8.0", "9.0", "10.0")  # where the build file names none and no device is visible
_WRAPPERS = {"ccache", "sccache", "distcc"}
_MEANINGFUL = re.compile(r"error|undefined reference|No such file|cannot find|fatal", re.IGNORECASE)


def compiler() -> str | None:
    """The C++ compiler: `CXX` where set, else the first of `COMPILERS` on the path; None where there is none."""
    named = os.environ.get("CXX")
    if named:
        return shutil.which(shlex.split(named)[0]) and named
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def failed(file: BuildFile, found: str, *, todo: str | None = None) -> BuildFailed:
    """The error of compiling `file`; a finding that begins with a verb has the kernel for its subject."""
    return BuildFailed(
        f"{file.name} {found}" if found.startswith(("has ", "is ", "needs ")) else found, asked=f"compile {file.name}", todo=todo
    )


def pair(version: str) -> tuple[int, int]:
    """Major and minor of a dotted version."""
    major, _, rest = version.partition(".")
    return int(major), int(rest.partition(".")[0] or 0)


def architectures(section: Section | None, machine: Machine) -> tuple[str, ...]:
    """CUDA capabilities to compile for: those of the build file, else those of the visible devices, else the usual ones."""
    here = sorted({f"{d.capability[0]}.{d.capability[1]}" for d in machine.devices if d.capability is not None})
    return (section.archs if section else ()) or tuple(here) or _CUDA_BY_DEFAULT


@dataclass(frozen=True, slots=True)
class _Unit:
    source: Path
    object: Path
    command: list[str]


class Compilation:
    """One run of the compiler over all units of one repository."""

    def __init__(self, root: Path, file: BuildFile, machine: Machine, id_: str, objects: Path, log: Path) -> None:
        self.root, self.file, self.machine, self.id, self.objects, self.log = root, file, machine, id_, objects, log
        found = compiler()
        if found is None:
            asked = os.environ.get("CXX")
            what = (
                f"CXX is {asked!r}, which is not there" if asked else f"no C++ compiler found (looked for {', '.join(COMPILERS)})"
            )
            raise failed(file, what, todo="install one, for example the package g++, or set CXX")
        self.cxx = shlex.split(found)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise failed(file, "torch is not installed", todo="pip install torch")
        self.torch = Path(spec.origin).parent
        self.is_clang = b"clang" in subprocess.run([*self.cxx, "--version"], capture_output=True, check=False).stdout  # noqa: S603  # the compiler the user chose
        (objects / "registration.h").write_text(_REGISTRATION)

    def run(self, package: Path, progress: Progress | None) -> str:
        """Compile and link into `package`; returns the text of `_ops.py`."""
        units = list(self._units())
        if not units:
            raise failed(self.file, "build.toml names no source for this backend")
        total = len(units) + 1
        step = f"compile {self.file.name}"
        self.log.write_bytes(b"")
        if progress:
            progress(step, 0, total)
        with ThreadPoolExecutor(max_workers=max(1, min(len(units), os.cpu_count() or 1))) as pool:
            waiting = [pool.submit(self._call, unit.command, unit.source.relative_to(self.root).as_posix()) for unit in units]
            try:
                for done, future in enumerate(as_completed(waiting), 1):
                    future.result()
                    if progress:
                        progress(step, done, total)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        library = self._link(units, package)
        if progress:
            progress(step, total, total)
        return (_OPS_MODULE if library.name.endswith(".abi3.so") else _OPS_LIBRARY).format(id=self.id, library=library.name)

    def _units(self) -> Iterator[_Unit]:
        groups: list[tuple[Section | None, tuple[str, ...]]] = [(None, self.file.src)]
        groups += [(section, section.src) for section in self.file.sections_for(self.machine.backend)]
        for group, (section, names) in enumerate(groups):
            for number, name in enumerate(names):
                source = self.root / name
                if source.suffix not in SOURCES:
                    continue  # headers are listed so that a packager knows them
                if not source.is_file():
                    raise failed(self.file, f"build.toml names {name}, which is not there")
                target = self.objects / f"{group}_{number}_{source.stem}.o"
                yield _Unit(source, target, [*self._flags(section, source), "-c", str(source), "-o", str(target)])

    def _flags(self, section: Section | None, source: Path) -> list[str]:
        on_device = source.suffix == ".cu"
        command = self._nvcc(section) if on_device else [*self.cxx, "-fPIC", "-fvisibility=hidden", "-w"]
        command += ["-O3", "-DNDEBUG", f"-std=c++{20 if (self.machine.torch or (0, 0)) >= (2, 12) else 17}"]
        command += [f"-DTORCH_EXTENSION_NAME={self.id}", "-DPy_LIMITED_API=0x03090000"]
        command += ["-Xcompiler"] if on_device else []
        command.append(
            f"-ffile-prefix-map={self.root}=."
        )  # TORCH_LIBRARY keeps __FILE__: one source, one library, wherever it lies
        command += [f"-I{self.root / path}" for path in (section.include if section else self.file.include)]
        command += [f"-I{self.root}", f"-I{self.objects}"]
        if self.machine.cxx11 is not None:
            command.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(self.machine.cxx11)}")
        stable = dict(self.file.stable_abi).get(self.machine.backend)
        if stable is not None:
            major, minor = pair(stable)
            command.append(f"-DTORCH_TARGET_VERSION={(major << 56) | (minor << 48):#x}")
        if section is None or "torch" in section.depends:
            command += self._with_torch(on_device=on_device)
        if section is None:
            return [*command, *self.file.cxx_flags]
        return [*command, *section.cxx_flags, *(section.device_flags if on_device else ())]

    def _with_torch(self, *, on_device: bool) -> list[str]:
        include, python = self.torch / "include", Path(sysconfig.get_path("include"))
        found = ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
        found += ["-isystem", str(python)] if (python / "Python.h").is_file() else ["-DKERNEL_WITHOUT_PYTHON"]
        if self.machine.backend == "cuda" and not on_device:
            found += ["-DUSE_CUDA", *_of_nvcc("INCLUDES")]
        if self.machine.os == "linux" and not self.is_clang and not on_device:
            found.append("-fopenmp")  # at::parallel_for is a template: its threads must be torch's own libgomp, see _link
        return found

    def _nvcc(self, section: Section | None) -> list[str]:
        found = shutil.which("nvcc")
        if found is None:
            raise failed(self.file, "has CUDA sources, and there is no nvcc on the path", todo="install the CUDA toolkit")
        host = next(word for word in self.cxx if Path(word).name not in _WRAPPERS)
        command = [found, "-ccbin", host, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-w", "--expt-relaxed-constexpr"]
        for arch in architectures(section, self.machine):
            number = arch.removesuffix("+PTX").replace(".", "")
            command.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if arch.endswith("+PTX"):
                command.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return command

    def _link(self, units: Sequence[_Unit], package: Path) -> Path:
        """Against torch's libraries by name, without a path: torch is imported before any kernel is.

        No `-fopenmp` here. With it the linker would name the system's libgomp, a second pool of threads that
        `torch.set_num_threads` does not reach; without it the symbols are found in the libgomp that libtorch brought.
        """
        library = self.objects / "kernel.so"
        command = [*self.cxx, "-shared", "-o", str(library), *(str(unit.object) for unit in units), f"-L{self.torch / 'lib'}"]
        command += ["-undefined", "dynamic_lookup"] if self.machine.os == "darwin" else ["-Wl,--no-as-needed", "-Wl,-s"]
        command += ["-ltorch_cpu", "-lc10"]
        if self.machine.backend == "cuda":
            command += ["-ltorch_cuda", "-lc10_cuda", *_of_nvcc("LIBRARIES"), "-lcudart"]  # the shared one: torch has loaded it
        self._call(command, "linking")
        is_module = f"PyInit_{self.id}".encode() in library.read_bytes()
        final = package / f"{self.id}{'.abi3' if is_module else ''}.so"
        shutil.move(library, final)
        return final

    def _call(self, command: list[str], what: str) -> None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)  # noqa: S603  # the compiler
        except OSError as e:
            raise failed(self.file, f"{command[0]} cannot be run: {e}") from e
        report = f"$ {shlex.join(command)}\n{done.stdout}{done.stderr}\n"
        with self.log.open("a", encoding="utf-8") as log:
            log.write(report)
        if done.returncode:
            lines = [
                line.replace(f"{self.root}{os.sep}", "") for line in (done.stdout + done.stderr).splitlines() if line.strip()
            ]
            first = next((i for i, line in enumerate(lines) if _MEANINGFUL.search(line)), 0)
            shown = "\n".join(f"  {line}" for line in lines[first : first + _SHOWN]) or f"  exit status {done.returncode}"
            raise failed(self.file, f"{what}: {Path(command[0]).name} failed\n{shown}", todo=f"the whole report: {self.log}")


def _of_nvcc(word: str) -> list[str]:
    """The flags that nvcc itself uses for `INCLUDES` or `LIBRARIES`: asked, because the nvcc on the path may be a wrapper."""
    found = shutil.which("nvcc")
    if found is None:
        return []
    done = subprocess.run([found, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False)  # noqa: S603  # nvcc, fixed arguments
    line = re.search(rf"^#\$ {word}=(.*)$", done.stderr + done.stdout, re.MULTILINE)
    return shlex.split(line[1]) if line else []


# What bindings written for the field's builder include: it generates this header, and `_ops.py`.
_REGISTRATION = """\
#pragma once
#define KERNEL_JOIN_(a, b) a##b
#define KERNEL_JOIN(a, b) KERNEL_JOIN_(a, b)
#define TORCH_LIBRARY_EXPAND(NAME, MODULE) TORCH_LIBRARY(NAME, MODULE)
#define TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)
#define STABLE_TORCH_LIBRARY_IMPL_EXPAND(NAME, DEVICE, MODULE) STABLE_TORCH_LIBRARY_IMPL(NAME, DEVICE, MODULE)
#ifdef KERNEL_WITHOUT_PYTHON
#define REGISTER_EXTENSION(NAME)
#else
#include <Python.h>
#define KERNEL_TEXT_(x) #x
#define KERNEL_TEXT(x) KERNEL_TEXT_(x)
#define REGISTER_EXTENSION(NAME)                                                                          \\
  PyMODINIT_FUNC KERNEL_JOIN(PyInit_, NAME)() {                                                           \\
    static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, KERNEL_TEXT(NAME), nullptr, 0, nullptr};   \\
    return PyModule_Create(&module);                                                                      \\
  }
#endif
"""

_OPS_HEAD = '''\
"""Where this build registered its operators. Generated."""

import torch
'''
_OPS_TAIL = '''

def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` in the namespace of this build."""
    return f"{NAMESPACE}::{op_name}"
'''
_OPS_MODULE = (
    _OPS_HEAD
    + 'from . import {id}\n\nNAMESPACE = "{id}"\nops = torch.ops.{id}\n'
    + _OPS_TAIL.replace("{", "{{").replace("}", "}}")
)
_OPS_LIBRARY = (
    _OPS_HEAD
    + 'from pathlib import Path\n\nNAMESPACE = "{id}"\ntorch.ops.load_library(str(Path(__file__).with_name("{library}")))\n'
    + "ops = torch.ops.{id}\n"
    + _OPS_TAIL.replace("{", "{{").replace("}", "}}")
)
OPS_NOARCH = (
    _OPS_HEAD
    + """

def _backend() -> str:
    if hasattr(torch.backends, "tpu"):
        return "tpu"
    if hasattr(torch, "neuron"):
        return "neuron"
    if torch.version.cuda is not None:
        return "cuda"
    if torch.version.hip is not None:
        return "rocm"
    if torch.backends.mps.is_available():
        return "metal"
    return "xpu" if getattr(torch.version, "xpu", None) is not None else "cpu"


NAMESPACE = f"{prefix}_{{_backend()}}_{unique}"
ops = getattr(torch.ops, NAMESPACE)
"""
    + _OPS_TAIL.replace("{", "{{").replace("}", "}}")
)
