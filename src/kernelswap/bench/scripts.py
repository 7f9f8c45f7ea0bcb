"""Benchmarks that kernels ship, as their authors wrote them: found in a file, checked, then timed beside their own reference.

`benchmark_x` is the kernel, `verify_x` the reference, once as it is and once under `torch.compile`. Nothing here knows where the
files come from, nor the class `Benchmark`: it is what has `prepare`, `verified` and methods named `benchmark_x`.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import LoadFailed
from ..types import Progress
from .ab import Times, distance
from .turns import captured, take_turns

CLOSE = 1e-2
"""Absolute tolerance of `torch.allclose`, which these scripts count on, and which some replace by their own."""
COLD_TURNS = 30  # emptying the caches takes longer than most kernels


@dataclass(frozen=True)
class Asked:
    """How to measure."""

    device: str = "cpu"
    iterations: int = 100
    warmup: int = 10
    compile: bool = True


@dataclass(frozen=True)
class Workload:
    """One workload of one benchmark, measured. Times are seconds per call, by side: `kernel`, `reference`, `compiled`."""

    script: str
    benchmark: str
    workload: str
    matches: bool | None = None
    """Whether the kernel's output is the reference's; `None` where there is no reference."""
    error: float | None = None
    """Largest relative error of a row, against the reference; `None` where they cannot be compared."""
    warm: dict[str, Times] = field(default_factory=dict)
    cold: dict[str, Times] = field(default_factory=dict)
    graph: Times | None = None
    """The kernel, replayed from a CUDA graph."""
    notes: tuple[str, ...] = ()
    """What could not be done, and why."""
    failed: str | None = None
    """Why nothing was measured."""

    @property
    def bad(self) -> bool:
        """It raised, or its output is wrong."""
        return self.failed is not None or self.matches is False

    @property
    def name(self) -> str:
        """For a person."""
        return f"{self.benchmark}.{self.workload}"


@contextmanager
def modules(files: Sequence[Path]) -> Iterator[list[ModuleType]]:
    """The scripts, imported one after the other as if each were run in its own folder; forgotten afterwards.

    Raises:
        LoadFailed: one of them raised; the cause is its own error.
    """
    before, path, found = set(sys.modules), list(sys.path), []
    try:
        for number, file in enumerate(files):
            sys.path.insert(0, str(file.parent))
            name = f"_kernelswap_benchmark_{number}"
            spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None and spec.loader is not None  # noqa: PT018  # a file that ends in .py has both
            module = sys.modules[name] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
            except (Exception, SystemExit) as e:
                raise LoadFailed(f"it raised {type(e).__name__}: {e}", asked=f"importing {file.name}") from e
            found.append(module)
        yield found
    finally:
        folders = {str(file.parent.resolve()) for file in files}
        for name in set(sys.modules) - before:
            at = getattr(sys.modules[name], "__file__", None)
            if at is not None and str(Path(at).resolve().parent) in folders:
                del sys.modules[name]
        sys.path[:] = path


def classes(module: ModuleType, base: type) -> list[type]:
    """The benchmarks of a script: subclasses of `base` with workloads that it defines; where it defines none, that it imports."""
    found = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, base) and c is not base and workloads(c)]
    own = [c for c in found if c.__module__ == module.__name__]
    return list(dict.fromkeys(own or found))


def workloads(cls: type) -> list[str]:
    """Of `benchmark_x`, x."""
    return [n.removeprefix("benchmark_") for n in dir(cls) if n.startswith("benchmark_") and callable(getattr(cls, n))]


def measure(
    scripts: Sequence[ModuleType], base: type, kernel: ModuleType, asked: Asked, *, progress: Progress | None = None
) -> list[Workload]:
    """Every workload of every benchmark of the scripts, one after the other, each on an instance of its own.

    One that raises, or whose output is wrong, is listed as such and the others go on.
    """
    todo = [(script, cls, name) for script in scripts for cls in classes(script, base) for name in workloads(cls)]
    done: list[Workload] = []
    for number, (script, cls, name) in enumerate(todo):
        if progress is not None:
            progress("measuring", number, len(todo))
        empty = Workload(Path(script.__file__ or script.__name__).name, cls.__name__, name)
        try:
            with torch.cuda.device(asked.device) if asked.device.startswith("cuda:") else nullcontext():
                done.append(_measure(empty, cls, kernel, asked))
        except (Exception, SystemExit) as e:  # noqa: BLE001  # whatever it raises, the others go on
            done.append(replace(empty, failed=_line(e)))
    if progress is not None:
        progress("measuring", len(todo), len(todo))
    return done


def _measure(empty: Workload, cls: type, kernel: ModuleType, asked: Asked) -> Workload:
    one: Any = cls()
    one.kernel, one.device = kernel, asked.device
    one.prepare(empty.workload)
    call: Callable[[], Any] = getattr(one, f"benchmark_{empty.workload}")
    call()
    compared = one.verified(empty.workload)
    sides: dict[str, Callable[[], Any]] = {"kernel": call}
    notes: list[str] = []
    matches = error = None
    if compared is not None:
        matches, error = _compare(*compared)
        reference = getattr(one, f"verify_{empty.workload}")
        sides["reference"] = reference
        if asked.compile:
            compiled = _compiled(reference, notes)
            sides |= {"compiled": compiled} if compiled is not None else {}
    given: dict[str, Any] = {"warmup": asked.warmup, "device": asked.device}
    warm = take_turns(sides, turns=asked.iterations, **given)
    cold = take_turns(sides, turns=min(asked.iterations, COLD_TURNS), cold=True, **{**given, "warmup": 0})
    graph = None
    if asked.device.startswith("cuda"):
        try:
            graph = take_turns({"graph": captured(call)}, turns=asked.iterations, **given)["graph"]
        except Exception as e:  # noqa: BLE001  # many kernels allocate or wait, and cannot be captured
            notes.append(f"no CUDA graph: {_line(e)}")
    return replace(empty, matches=matches, error=error, warm=warm, cold=cold, graph=graph, notes=tuple(notes))


def _compiled(reference: Callable[[], Any], notes: list[str]) -> Callable[[], Any] | None:
    """The reference under torch.compile, compiled; `None` and a note where that fails."""
    quiet = logging.getLogger("torch._dynamo")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        made: Callable[[], Any] = torch.compile(reference)
        made()
    except Exception as e:  # noqa: BLE001  # no compiler, or code that it does not know
        notes.append(f"torch.compile: {_line(e)}")
        return None
    finally:
        quiet.setLevel(level)
    return made


def _compare(out: Any, right: Any) -> tuple[bool, float | None]:
    """Whether they are close, all parts of them, and the largest relative error of a row."""
    if isinstance(right, tuple | list):
        parts = [_compare(a, b) for a, b in zip(out, right, strict=True)]
        errors = [error for _, error in parts if error is not None]
        return all(close for close, _ in parts), max(errors, default=None)
    if not isinstance(out, torch.Tensor):
        raise TypeError(f"the benchmark left {type(out).__name__} in `out`, expected a tensor")
    if out.shape != right.shape:
        return False, None
    a, b = (out, right) if out.dtype == right.dtype else (out.float(), right.float())
    close = bool(torch.allclose(a, b, atol=CLOSE))
    if a.numel() == 0 or a.is_complex():
        return close, None
    error = distance(*(t.detach().reshape(-1, t.shape[-1] if t.dim() > 1 else t.numel()) for t in (a, b)))
    return close, error if math.isfinite(error) else None


def _line(e: BaseException) -> str:
    text = next((line.strip() for line in str(e).splitlines() if line.strip()), "")
    return f"{type(e).__name__}: {text}" if text else type(e).__name__
