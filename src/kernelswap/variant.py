"""Build variant names, `torch213-cxx11-cu130-x86_64-linux`, and what runs where. Pure: the machine is an argument."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .errors import BadMetadata
from .strict import quote
from .types import Device, Machine

Framework = Literal["torch-stable-abi", "torch", "tvm-ffi", "noarch"]
Pair = tuple[int, int]

FIRST_METAL = (26, 0)  # builds use Metal 4, which macOS 26 brought
FIRST_FREE_THREADED_ABI = (3, 15)  # before it, the limited API and free threading exclude each other

_CLASS: dict[str, int] = {"torch-stable-abi": 0, "torch": 1, "tvm-ffi": 2, "noarch": 3}
_SHORT = {"cu": "cuda", "rocm": "rocm", "xpu": "xpu", "cann": "cann"}
_PREFIX = {backend: short for short, backend in _SHORT.items()}
_BACKEND = re.compile(r"(?P<plain>cpu|metal|neuron|tpu)|(?P<short>cu|rocm|xpu|cann)(?P<version>[0-9]{2,8})")
_FRAMEWORK = re.compile(r"torch-stable-abi(?P<stable>[0-9]{2,4})-|torch(?P<torch>[0-9]{2,4})-|tvm-ffi(?P<tvm>[0-9]{2,4})-")
_ARCH = re.compile(r"(?P<major>[0-9]{1,3})\.(?P<minor>[0-9]{1,2})(?P<kind>[af]?)(?P<ptx>\+PTX)?")


@dataclass(frozen=True, slots=True)
class Variant:
    """A variant name, taken apart. `str()` gives the name back."""

    name: str
    framework: Framework
    backend: str
    """`cpu cuda rocm metal xpu cann neuron tpu`; of a noarch build as written, so also `npu` and `universal`."""
    framework_version: Pair | None = None
    abi: str | None = None
    """`cxx11` or `cxx98`, where the name says it."""
    backend_version: Pair | None = None
    cpu: str | None = None
    os: str | None = None

    def __str__(self) -> str:
        return self.name


def parse(name: str) -> Variant:
    """Read a build directory's name.

    The first digit of a torch or tvm-ffi version is its major. The last digit of a backend version is its minor, unless
    the digits before it are no major that such a backend can have (30 or more; for xpu, no year from 2000 to 2099): then
    the last two are the minor. So `cu126` is 12.6, `cu1310` is 13.10, `rocm710` is 7.10, `xpu202510` is 2025.10.

    Raises:
        BadMetadata: not a variant name that this version understands.
    """
    match = _FRAMEWORK.match(name)
    if match is None:
        backend = name.removeprefix("torch-")
        if backend in {name, ""} or backend.startswith("stable-abi") or not backend.isprintable():
            raise _bad(name, "it begins with no framework that is known")
        return Variant(name, "noarch", backend)
    framework, digits = next((f, d) for f, d in zip(("torch-stable-abi", "torch", "tvm-ffi"), match.groups(), strict=True) if d)
    tokens = name[match.end() :].split("-")
    abi = tokens.pop(0) if framework == "torch" and tokens[0] in {"cxx11", "cxx98"} else None
    if len(tokens) != 3 or not all(tokens):
        raise _bad(name, "expected `backend-cpu-os` after the framework")
    backend, version = _backend(name, tokens[0])
    return Variant(
        name,
        framework,  # type: ignore[arg-type]  # one of the three literals above
        backend,
        framework_version=(int(digits[0]), int(digits[1:])),
        abi=abi,
        backend_version=version,
        cpu=tokens[1],
        os=tokens[2],
    )


def misfit(variant: Variant, machine: Machine) -> str | None:
    """Why `variant` cannot run on `machine`, or `None`: the first rule that fails."""
    if variant.framework == "noarch":
        return _noarch_misfit(variant, machine)
    if machine.free_threaded and machine.python < FIRST_FREE_THREADED_ABI:
        return f"compiled code needs the GIL before Python 3.15, this is free-threaded {_dotted(machine.python)}"
    if variant.cpu != machine.cpu:
        return f"built for {variant.cpu}, this is {machine.cpu}"
    if variant.os != machine.os:
        return f"built for {variant.os}, this is {machine.os}"
    return _framework_misfit(variant, machine) or _backend_misfit(variant, machine)


def rank(variant: Variant) -> tuple[object, ...]:
    """Sort key among builds that fit, best first.

    Stable ABI, then exact torch, then tvm-ffi, then noarch (the reference lets the last two tie); a newer stable ABI
    first; untagged before tagged; a newer backend first; a named backend before `universal`. The name ends the key, so
    that the order in which a server lists builds never shows.
    """
    abi = variant.framework_version if variant.framework == "torch-stable-abi" else None
    return (
        _CLASS[variant.framework],
        _newest_first(abi),
        variant.abi is not None,
        _newest_first(variant.backend_version),
        variant.backend == "universal",
        variant.name,
    )


def arch_misfit(archs: Sequence[str], machine: Machine, device: str | None = None) -> str | None:
    """Why code for `archs` cannot run on `device` (`cuda:0`, `cuda`), or without one on every visible device, or `None`.

    `archs` is `backend.archs` of the metadata. CUDA: `9.0` runs on 9.x from 9.0 on, `9.0a` on exactly 9.0, `10.0f` on 10.x from
    10.0 on, `9.0+PTX` on anything from 9.0 on. ROCm: the gfx name itself. Other backends are not checked, nor is a machine
    without torch or without a device, nor a list of which no entry can be read.

    Without a device, one that does not fit decides: a kernel is loaded once and may be called on any of them.
    """
    if not archs or machine.torch is None or machine.backend not in {"cuda", "rocm"}:
        return None
    visible = [d for d in machine.devices if d.type == machine.backend]
    if device is not None and visible:
        chosen, problem = _pick(visible, device, machine.backend)
        if problem is not None:
            return problem
        visible = chosen
    fits = _rocm_fits if machine.backend == "rocm" else _cuda_fits
    bad = next((d for d in visible if not fits(archs, d)), None)
    if bad is None:
        return None
    is_ = _dotted(bad.capability) if machine.backend == "cuda" else str(bad.arch)
    return f"its code is for {', '.join(archs)}; {bad.type}:{bad.index} ({bad.name}) is {is_}"


# -- parsing ------------------------------------------------------------------------------------------------------


def _backend(name: str, token: str) -> tuple[str, Pair | None]:
    match = _BACKEND.fullmatch(token)
    if match is None:
        raise _bad(name, f"{quote(token)} is no backend that is known")
    if match["plain"]:
        return match["plain"], None
    return _SHORT[match["short"]], _backend_version(_SHORT[match["short"]], match["version"])


def _backend_version(backend: str, digits: str) -> Pair:
    plausible = range(2000, 2100) if backend == "xpu" else range(30)
    usual = int(digits[:-1]), int(digits[-1])
    two_digits = len(digits) > 2 and int(digits[:-2]) in plausible and digits[-2] != "0"
    return (int(digits[:-2]), int(digits[-2:])) if usual[0] not in plausible and two_digits else usual


def _bad(name: str, why: str) -> BadMetadata:
    return BadMetadata(f"{quote(name)} is not a variant name that this version understands: {why}")


# -- the rules ----------------------------------------------------------------------------------------------------


def _noarch_misfit(variant: Variant, machine: Machine) -> str | None:
    here = "npu" if machine.backend == "cann" else machine.backend
    if variant.backend in {"universal", here}:
        return None
    return f"built for {quote(variant.backend)[1:-1]}, this is {here}"


def _framework_misfit(variant: Variant, machine: Machine) -> str | None:
    wants, has = variant.framework_version, machine.tvm_ffi if variant.framework == "tvm-ffi" else machine.torch
    what = "tvm-ffi" if variant.framework == "tvm-ffi" else "torch"
    if wants is None or has is None:
        return f"needs {what} {_dotted(wants)}, which is not installed"
    if variant.framework == "torch-stable-abi":
        return None if wants <= has else f"needs torch {_dotted(wants)} or newer, this is {_dotted(has)}"
    if wants != has:
        return f"built for {what} {_dotted(wants)}, this is {_dotted(has)}"
    if variant.abi is not None and (variant.abi == "cxx11") is not machine.cxx11:
        here = {None: "has no such choice", True: "uses cxx11", False: "uses cxx98"}[machine.cxx11]
        return f"built for the C++ ABI {variant.abi}, torch here {here}"
    return None


def _backend_misfit(variant: Variant, machine: Machine) -> str | None:
    wants, has = variant.backend_version, machine.backend_version
    if variant.backend != machine.backend:
        return f"built for {variant.backend}, this is {machine.backend}"
    if variant.backend == "cuda" and wants is not None and has is not None:
        if wants[0] != has[0]:
            return f"built for CUDA {_dotted(wants)}, this is {_dotted(has)}"
        return None if wants[1] <= has[1] else f"needs CUDA {_dotted(wants)} or newer, this is {_dotted(has)}"
    if variant.backend in _PREFIX and wants != has:
        return f"built for {variant.backend} {_dotted(wants)}, this is {_dotted(has)}"
    if variant.backend == "metal" and (machine.macos is None or machine.macos < FIRST_METAL):
        return f"needs macOS {_dotted(FIRST_METAL)} or newer, this is {_dotted(machine.macos)}"
    return None


def _pick(visible: Sequence[Device], device: str, backend: str) -> tuple[list[Device], str | None]:
    type_, _, index = device.partition(":")
    if type_ not in {backend, "cuda"}:  # torch calls ROCm devices `cuda`
        return [], None
    chosen = [d for d in visible if not index or str(d.index) == index]
    return chosen, None if chosen else f"there is no {device} here"


def _rocm_fits(archs: Sequence[str], device: Device) -> bool:
    return device.arch is None or device.arch.partition(":")[0] in archs


def _cuda_fits(archs: Sequence[str], device: Device) -> bool:
    readable = [m for m in map(_ARCH.fullmatch, archs) if m is not None]
    return device.capability is None or not readable or any(_runs(m, device.capability) for m in readable)


def _runs(arch: re.Match[str], here: Pair) -> bool:
    built = int(arch["major"]), int(arch["minor"])
    if arch["kind"] == "a":
        return here == built
    if arch["ptx"] and not arch["kind"]:
        return here >= built
    return here[0] == built[0] and here >= built


def _newest_first(version: Pair | None) -> Pair:
    return (-version[0], -version[1]) if version is not None else (0, 0)


def _dotted(version: Pair | None) -> str:
    return ".".join(map(str, version)) if version is not None else "unknown"
