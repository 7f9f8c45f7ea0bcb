"""What a verdict holds for: a digest over everything that could change it. When any part changes, the verdict is void."""

from __future__ import annotations

import functools
import hashlib
import inspect
import platform
import re
import sys
import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import render, sites
from ..types import Artifact, Implementation, Run, Site
from . import calls, inputs, rotary

CHECK_VERSION = 4
"""Raised when the checks become stricter: older verdicts are void then."""

_SCALARS = (int, float, bool, str, type(None))
_NUMBERING = re.compile(
    r"layer_?(idx|index|id|number|num)|block_?(idx|index|id)|training|_is_hf_initialized|_is_full_backward_hook"
)


@functools.cache
def _numbers(name: str) -> bool:
    """Whether an attribute says which of many alike a module is, and nothing of what it does."""
    return _NUMBERING.fullmatch(name) is not None


def subject(site: Site, module: nn.Module, original: Callable[..., Any]) -> tuple[Any, ...]:
    """What is replaced: its code, the code of its class and helpers, its settings and the shapes of what it holds."""
    about = rotary.facts(site, module) if site.kind == "function" else _facts(module)
    return site.kind, site.layer, site.row.probe, site.target, site.name, _code(original), about


def _facts(module: nn.Module) -> tuple[Any, ...]:
    cls = sites.original(module)
    settings = tuple(
        (name, value if isinstance(value, _SCALARS) else f"{type(value).__module__}.{getattr(value, '__qualname__', '')}")
        for name, value in vars(module).items()
        if isinstance(value, (*_SCALARS, type, types.FunctionType)) and not _numbers(name)
    )
    held = tuple(
        (name, None if t is None else (tuple(t.shape), str(t.dtype), type(t).__name__))
        for tensors in (module._parameters, module._buffers)  # noqa: SLF001  # `named_parameters` walks the tree again at every level
        for name, t in tensors.items()
    )
    below = tuple((n, None if m is None else _facts(m)) for n, m in module._modules.items())  # noqa: SLF001  # same
    return _class_code(cast(Hashable, cls)), settings, held, below


def bucket(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What of a call decides whether an earlier verdict holds for it: rows (1, 2-16, 17-256, more), layouts, dtypes, gradients."""
    leaves = calls.leaves(args, kwargs)
    held = [t for t in leaves if isinstance(t, Tensor)]
    size = size_of(inputs.count(held))
    kinds = tuple(
        (str(t.dtype), t.ndim, t.shape[-1] if t.ndim else 0, t.is_contiguous(), t.requires_grad, t.device.type) for t in held
    )
    others = tuple(repr(v) for v in leaves if isinstance(v, _SCALARS))
    device = held[0].device.type if held else "cpu"
    cast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    return size, kinds, others, tuple(kwargs), cast, torch.is_grad_enabled()  # a check looks at both ways to do without gradients


SIZES = ((0, "no rows"), (1, "1 row"), (16, "2-16 rows"), (256, "17-256 rows"), (sys.maxsize, "over 256 rows"))


def size_of(rows: int) -> int:
    """The size bucket that a number of rows falls into, an index of `SIZES`."""
    return next(i for i, (most, _) in enumerate(SIZES) if rows <= most)


def about(candidate: Implementation, site: Site, device: torch.device, run: Run, rows: int | None) -> tuple[tuple[str, str], ...]:
    """What a verdict holds for, in words: the key itself can only be compared. `rows` is None for random tensors."""
    origin = candidate.origin
    found = (
        ("kernel", render.named(origin, candidate.layer)),
        ("build", origin.candidate.variant),
        ("digest", origin.digest),
        ("original", site.target),
        ("layer", site.layer),
        ("dtype", site.dtype.removeprefix("torch.")),
        ("tensors", "random" if rows is None else SIZES[size_of(rows)][1]),
        ("mode", ("training" if run.training else "inference") + (", compiled" if run.compiled else "")),
        ("machine", ", ".join(filter(None, (p for p in place(device) if p != "None")))),
    )
    return tuple((name, value) for name, value in found if value)


def digest(*parts: Any) -> str:
    """sha256, hex, over the parts as text."""
    return hashlib.sha256(repr((CHECK_VERSION, *parts)).encode()).hexdigest()


def kernel(candidate: Implementation) -> tuple[Any, ...]:
    """The bytes that run: the artifact's digest and those of its dependencies, which layer of it, and what serves each bucket."""
    parts = tuple(None if part is None else kernel(part) for part in candidate.parts)
    return *artifact(candidate.origin), candidate.layer, candidate.kind, *parts


def artifact(found: Artifact) -> tuple[str, ...]:
    """The bytes of a kernel and of what it depends on."""
    return found.digest, *(d for dependency in found.depends for d in artifact(dependency))


def run_of(run: Run) -> tuple[bool, bool]:
    """A run as text-stable values."""
    return run.training, run.compiled


@functools.cache
def place(device: torch.device) -> tuple[str, ...]:
    """The chip, torch with its build, and the compilers that make code at run time."""
    triton = getattr(sys.modules.get("triton"), "__version__", "")
    software = (
        torch.__version__,
        str(torch.version.cuda),
        str(torch.version.hip),
        triton,
        platform.system(),
        platform.python_version(),
    )
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return device.type, about.name, f"{about.major}.{about.minor}", *software
    if device.type == "cpu":
        return "cpu", _cpu(), torch.backends.cpu.get_cpu_capability(), *software
    return device.type, _cpu(), *software


@functools.cache
def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


# -- code ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _code(function: Callable[..., Any]) -> str:
    """Digest of what a function does: its bytecode, its constants, and the functions of its package that it calls."""
    out = hashlib.sha256()
    _feed(function, out.update, set(), 0)
    return out.hexdigest()[:32]


@functools.lru_cache(maxsize=4096)
def _class_code(cls: Any) -> str:
    """Digest of every method of a class and of its parents below torch."""
    out = hashlib.sha256(f"{cls.__module__}.{cls.__qualname__}".encode())
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("torch", "builtins"):
            out.update(f"{base.__module__}.{base.__qualname__}".encode())
            continue
        for name, member in sorted(vars(base).items()):
            if isinstance(found := inspect.unwrap(getattr(member, "__func__", member)), types.FunctionType):
                out.update(name.encode())
                _feed(found, out.update, set(), 0)
    return out.hexdigest()[:32]


def _feed(function: Any, update: Callable[[bytes], Any], seen: set[int], depth: int) -> None:
    function = inspect.unwrap(function) if callable(function) else function
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(type(function)))}"
    update(name.encode())
    code = getattr(function, "__code__", None)
    if code is None or id(code) in seen:
        return
    seen.add(id(code))
    _feed_code(code, update)
    update(repr([d for d in function.__defaults__ or () if isinstance(d, _SCALARS)]).encode())
    if depth < 3:
        package = (function.__module__ or "").partition(".")[0]
        for global_name in code.co_names:
            other = function.__globals__.get(global_name)
            if isinstance(other, types.FunctionType) and (other.__module__ or "").partition(".")[0] == package:
                _feed(other, update, seen, depth + 1)
            elif isinstance(other, _SCALARS):
                update(f"{global_name}={other!r}".encode())


def _feed_code(code: types.CodeType, update: Callable[[bytes], Any]) -> None:
    update(code.co_code)
    update(repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _feed_code(constant, update)
        else:
            update(_stable(constant).encode())


def _stable(constant: Any) -> str:
    """As `repr`, but the same in every process: the order of a set depends on the process's hash seed."""
    if isinstance(constant, frozenset):
        return f"frozenset({sorted(map(_stable, constant))})"
    if isinstance(constant, tuple):
        return f"({', '.join(map(_stable, constant))},)"
    return repr(constant)
