"""Look at this machine once, or describe another one. After that, a `Machine` is a value that is handed on.

`look()` asks one probe per backend (`backends/`); every field of the answer has its reason in `why`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .backends import PROBES, Seen
from .backends.cuda import device as cuda_device
from .backends.seen import major_minor
from .errors import SpecError
from .types import Device, Machine

_CPUS = {"arm64": "aarch64", "amd64": "x86_64"}
_ALIASES = {"mps": "metal", "npu": "cann", "hip": "rocm"}
BACKENDS = ("cpu", "cuda", "rocm", "metal", "xpu", "cann", "neuron", "tpu")


def look() -> Machine:
    """This machine as this process sees it. Works without torch, never raises, does not initialise CUDA where avoidable.

    Detection is about how torch was built; `devices` is about what is visible. Costs an `import torch` where torch is
    installed; ask once and hand the value on.
    """
    why: dict[str, str] = {}
    os_name, cpu = platform.system().lower(), platform.machine()
    why["os"] = f"platform.system() is {platform.system()}"
    why["cpu"] = f"platform.machine() is {cpu}"
    why["python"] = f"this is {platform.python_implementation()} {platform.python_version()}"
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    why["free_threaded"] = f"Py_GIL_DISABLED is {sysconfig.get_config_var('Py_GIL_DISABLED')}"
    torch, why["torch"] = _torch()
    tvm_ffi, why["tvm_ffi"] = _tvm_ffi()
    cxx11, why["cxx11"] = _cxx11(torch, os_name)
    mac = platform.mac_ver()[0]
    why["macos"] = f"platform.mac_ver() is {mac}" if mac else "this is not macOS"
    backend, seen, passed = _backend(torch)
    why["backend"] = "; ".join([seen.reason, *passed])
    why["backend_version"] = seen.reason if seen.version else f"{backend} builds carry no version here"
    why["devices"] = seen.devices_reason
    return Machine(
        os=os_name,
        cpu=_CPUS.get(cpu.lower(), cpu),
        python=sys.version_info[:2],
        free_threaded=free_threaded,
        torch=major_minor(torch.__version__) if torch is not None else None,
        cxx11=cxx11,
        tvm_ffi=tvm_ffi,
        backend=backend,
        backend_version=seen.version,
        macos=major_minor(mac),
        devices=seen.devices,
        why=tuple(why.items()),
    )


def _torch() -> tuple[Any, str]:
    try:
        torch = importlib.import_module("torch")
    except ModuleNotFoundError as e:
        if e.name == "torch":
            return None, "torch is not installed"
        return None, f"torch is installed but does not import: {e}"
    except Exception as e:  # noqa: BLE001 -- a torch with a broken driver raises anything; its words are the reason
        return None, f"torch is installed but does not import: {type(e).__name__}: {e}"
    return torch, f"torch {torch.__version__} is installed"


def _tvm_ffi() -> tuple[tuple[int, int] | None, str]:
    try:
        version = importlib.metadata.version("apache-tvm-ffi")
    except importlib.metadata.PackageNotFoundError:
        return None, "apache-tvm-ffi is not installed"
    return major_minor(version), f"apache-tvm-ffi {version} is installed"


def _cxx11(torch: Any, os_name: str) -> tuple[bool | None, str]:
    if os_name != "linux" or torch is None:
        return None, "only asked on linux, with torch"
    try:
        flag = bool(torch.compiled_with_cxx11_abi())
    except Exception as e:  # noqa: BLE001 -- becomes the reason
        return None, f"torch.compiled_with_cxx11_abi() raised {type(e).__name__}: {e}"
    return flag, f"torch.compiled_with_cxx11_abi() is {flag}"


def _backend(torch: Any) -> tuple[str, Seen, list[str]]:
    """The first probe that says yes, and what those before it that broke have to say."""
    passed: list[str] = []
    for name, probe in PROBES:
        try:
            seen = probe(torch)
        except Exception as e:  # noqa: BLE001 -- a probe that breaks is a reason to pass it over, never the end
            passed.append(f"{name} passed over, its probe raised {type(e).__name__}: {e}")
            continue
        if seen.present:
            return name, seen, passed
    return "cpu", Seen(True, "no probe answered"), passed


# -- another machine ----------------------------------------------------------------------------------------------


def for_backend(machine: Machine, name: str) -> Machine:
    """`machine`, as a kernel for backend `name` should see it: the detected backend, or the CPU.

    Raises:
        SpecError: neither `cpu` nor what was detected.
    """
    asked = _ALIASES.get(name.lower(), name.lower())
    if asked == machine.backend:
        return machine
    if asked != "cpu":
        raise SpecError(
            f"backend {name!r} was asked for, this process has {machine.backend!r}",
            text=name,
            span=(0, len(name)),
            todo=f"ask for {machine.backend!r} or 'cpu'; `override` describes another machine for planning",
        )
    why = {**dict(machine.why), "backend": "the caller asked for cpu", "devices": "the caller asked for cpu"}
    why["backend_version"] = "cpu builds carry no version"
    return replace(machine, backend="cpu", backend_version=None, devices=(), why=tuple(why.items()))


def _pair(value: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+(\.\d+){0,2}", value):
        raise ValueError("a version such as 2.14")
    pair = major_minor(value)
    assert pair is not None
    return pair


def _flag(value: str) -> bool:
    if value.lower() in {"1", "true", "yes", "on", ""}:
        return True
    if value.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError("true or false")


def _os(value: str) -> str:
    name = {"mac": "darwin", "macos": "darwin", "win": "windows", "win32": "windows"}.get(value.lower(), value.lower())
    if name not in {"linux", "darwin", "windows"}:
        raise ValueError("linux, darwin or windows")
    return name


def _cpu(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_]+", value):
        raise ValueError("x86_64 or aarch64")
    return _CPUS.get(value.lower(), value)


def _sm(value: str) -> tuple[Device, ...]:
    digits = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?", value)
    if not digits:
        raise ValueError("a compute capability such as 90 or 12.0")
    return (cuda_device(0, "planned", (int(digits[1]), int(digits[2]))),)


def _gfx(value: str) -> tuple[Device, ...]:
    name = value if value.startswith("gfx") else f"gfx{value}"
    if not re.fullmatch(r"gfx[0-9a-f]{3,5}", name):
        raise ValueError("an architecture such as gfx942")
    return (Device("rocm", 0, "planned", None, name),)


def _backend_name(value: str) -> str:
    name = _ALIASES.get(value.lower(), value.lower())
    if name not in BACKENDS:
        raise ValueError(" ".join(BACKENDS))
    return name


_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "os": ("os", _os),
    "cpu": ("cpu", _cpu),
    "python": ("python", _pair),
    "free-threaded": ("free_threaded", _flag),
    "torch": ("torch", _pair),
    "cxx11": ("cxx11", _flag),
    "tvm-ffi": ("tvm_ffi", _pair),
    "backend": ("backend", _backend_name),
    "macos": ("macos", _pair),
    "sm": ("devices", _sm),
    "gfx": ("devices", _gfx),
}
_VERSIONED = ("cuda", "rocm", "xpu", "cann")
_BARE = ("metal", "neuron", "tpu")
KEYS = (*_FIELDS, *_VERSIONED, *_BARE, "offline")


def override(machine: Machine, text: str) -> Machine:
    """`machine` with some facts replaced, to plan for a machine that is not here: `torch=2.14,cuda=13.2,sm=120`.

    Keys: os, cpu (the architecture), python, torch, tvm-ffi, macos, cxx11, free-threaded; backend=cpu or one of cuda, rocm,
    xpu, cann with a version, metal, neuron, tpu; sm=90 or gfx=942 for the device. `torch=none` says that it is absent.
    `offline` is accepted and kept in `why`: it is about sources, whoever asks them reads it there.
    A device of another backend than the one named is dropped: it would not be visible there.

    Raises:
        SpecError: the caret is under the key or value that is wrong, with what is accepted.
    """
    changes: dict[str, Any] = {}
    why: dict[str, str] = {}
    at = 0
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        key, start = key.strip().lower().replace("_", "-"), at + len(part) - len(part.lstrip())
        span = (start, at + len(part.rstrip()))
        at += len(part) + 1
        if not part.strip():
            continue
        try:
            found = _one(key, value.strip())
        except KeyError:
            near = difflib.get_close_matches(key, KEYS, 1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(KEYS)}"
            raise SpecError(f"{key!r} is no fact of a machine", text=text, span=span, todo=hint) from None
        except ValueError as e:
            raise SpecError(f"{key} expects {e}", text=text, span=span) from None
        clash = [name for name in found if name in changes and changes[name] != found[name] and name != "why"]
        if clash:
            raise SpecError(f"{key} contradicts what came before it: {clash[0]} is {changes[clash[0]]}", text=text, span=span)
        changes |= found
        why |= dict.fromkeys(found or [key], f"planned: {part.strip()}")
    return _consistent(machine, changes, why)


def _one(key: str, value: str) -> dict[str, Any]:
    if key in {"offline", *_BARE}:
        if value:
            raise ValueError("no value")
        return {} if key == "offline" else {"backend": key, "backend_version": None}
    if key in _VERSIONED:
        return {"backend": key, "backend_version": _pair(value)}
    field, read = _FIELDS[key]
    if value.lower() == "none" and field in {"torch", "tvm_ffi", "macos", "cxx11", "devices"}:
        return {field: () if field == "devices" else None}
    return {field: read(value)}


def _consistent(machine: Machine, changes: dict[str, Any], why: dict[str, str]) -> Machine:
    devices = changes.get("devices", machine.devices)
    backend = changes.get("backend") or (devices[0].type if changes.get("devices") else machine.backend)
    spelled = {"metal": "mps", "cann": "npu"}.get(backend, backend)
    kept = tuple(d for d in devices if d.type == spelled)
    if kept != machine.devices and "devices" not in changes:
        why["devices"] = f"planned: devices of {machine.backend} are not visible to {backend}"
    if backend != machine.backend:
        why.setdefault("backend", why.get("devices", "planned"))
        if "backend_version" not in changes:
            changes["backend_version"] = None
            why["backend_version"] = f"planned: no version given for {backend}"
    if changes.get("os", machine.os) != "linux" and "cxx11" not in changes:
        changes["cxx11"] = None
        why["cxx11"] = "only linux has this choice"
    elif changes.get("os", machine.os) == "linux" and changes.get("cxx11", machine.cxx11) is None and "cxx11" not in changes:
        changes["cxx11"] = True
        why["cxx11"] = "planned: every torch since 2.7 uses the C++11 ABI"
    changes |= {"backend": backend, "devices": kept}
    return replace(machine, **changes, why=_merged(machine.why, why))


def _merged(old: Iterable[tuple[str, str]], new: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple({**dict(old), **new}.items())
