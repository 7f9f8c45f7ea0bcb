"""One row of the kernels' benchmark: every candidate checked against float64, those that are right timed, the row written at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import CUDA, DEVICE, device_us, empty_cache, first_line, free_bytes, relative, write
from torch import Tensor

Function = Callable[..., Any]
Clock = Callable[..., "dict[str, tuple[float, float]]"]
OURS = "kernelswap"
BF = torch.bfloat16 if CUDA else torch.float32
"""Triton's interpreter cuts bfloat16 off where a GPU rounds."""


def randn(*shape: int, dtype: torch.dtype = BF) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def fit(*sizes: int) -> tuple[int, ...]:
    """The sizes, on a GPU; elsewhere small ones, with which a row can be tried in an interpreter."""
    return sizes if CUDA else tuple(min(n, 4 + 28 * (n > 1024)) for n in sizes)


def copies(bytes_each: int) -> int:
    """Enough buffers that the L2 holds none of them for the next call."""
    if not CUDA:
        return 1
    return max(1, min(64, int(4e8 // bytes_each) + 2, free_bytes() // (6 * bytes_each)))


class Board:
    """The rows of one run, and what they are measured against. Nothing fails a run but ours: what a rival cannot do is written down."""

    def __init__(
        self, out: Path | None, *, quick: bool, seconds: float, only: set[str], kept: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.out, self.quick, self.seconds, self.only = out, quick, seconds, only
        self.rows: list[dict[str, Any]] = [r for r in kept if r["kernel"].split()[0] not in only]
        self.about: dict[str, Any] = {}
        self.start = time.perf_counter()
        self.bandwidth = self.read = self.rate = 1.0
        self.failed = 0

    def wants(self, *kernels: str) -> bool:
        return bool(self.only & set(kernels))

    def sizes(self, full: Sequence[Any], quick: Sequence[Any]) -> Sequence[Any]:
        return quick if self.quick else full

    def compiled(self, f: Function) -> dict[str, Function]:
        """`f` under torch.compile as a rival, while there is time for it: compiling takes longer than all of a row's timing."""
        if self.quick or not CUDA or time.perf_counter() - self.start > 0.75 * self.seconds:
            return {}
        torch.compiler.reset()
        return {"torch.compile": torch.compile(f, dynamic=False)}

    def room(self, kernel: str, shape: str, bytes_needed: int) -> bool:
        """Whether the GPU's memory holds that much; if not, a row says so."""
        empty_cache()
        if not CUDA and any(
            r["kernel"] == kernel and r.get("shape", "").split()[0] == shape.split(maxsplit=1)[0] for r in self.rows
        ):
            return False  # small sizes coincide
        if bytes_needed <= free_bytes():
            return True
        why = f"needs {bytes_needed / 2**30:.0f} GiB, {free_bytes() / 2**30:.0f} GiB are free"
        self.add({"kernel": kernel, "shape": shape, "left_out": why})
        print(f"{kernel:22} {shape:16} left out: {why}", flush=True)
        return False

    def add(self, entry: dict[str, Any]) -> None:
        self.rows.append(entry)
        self.save()

    def save(self) -> None:
        if self.out is not None:
            write(self.rows, self.out, **self.about)

    def compare(  # noqa: PLR0913  # what a row is
        self,
        kernel: str,
        shape: str,
        floor_us: float,
        inputs: Sequence[tuple[Tensor, ...]],
        candidates: dict[str, Function],
        reference: Function,
        tolerance: float,
        *,
        grads: Sequence[tuple[Tensor, ...]] | None = None,
        wanted: Sequence[int] = (),
        clock: Clock = device_us,
        repeat: int = 1,
        subset: Callable[..., tuple[Any, ...]] | None = None,
    ) -> dict[str, Any]:
        """Check and time.

        inputs: one tuple of arguments for each buffer. grads: of the outputs, for forward and backward; `wanted`: which inputs get
        gradients. subset: (inputs, grads) -> the same, smaller, where float64 of everything would be too large.
        """
        entry: dict[str, Any] = {"kernel": kernel, "shape": shape, "floor_us": floor_us, "tolerance": tolerance}
        args, dy = inputs[0], grads[0] if grads else None
        if subset is not None:
            args, dy = subset(args, dy)
        exact = _run(reference, tuple(_double(t) for t in args), None if dy is None else tuple(_double(t) for t in dy), wanted)
        right, errors, out = {}, {}, {}
        for name, f in candidates.items():
            try:
                got = _run(f, tuple(_copy(t) for t in args), dy, wanted)
                errors[name] = max(relative(a, b) for a, b in zip(got, exact, strict=True))
                del got
                if not errors[name] < tolerance:  # NaN is no less
                    out[name] = f"wrong: relative error {errors[name]:.1e}"
                    continue
                right[name] = f
            except Exception as e:  # noqa: BLE001  # a rival that cannot do this takes no part in it
                out[name] = first_line(e)
        del exact
        empty_cache()
        entry |= {"error": errors.get(OURS), "errors": errors, "out": out}
        took: dict[str, tuple[float, float]] = {}
        if OURS in right:
            took = clock({name: _calls(f, inputs, grads, wanted) * repeat for name, f in right.items()}, failed=out)
        if OURS not in took:
            self.failed += 1
            self.add(entry)
            print(f"{kernel:22} {shape:16} FAILED: {out[OURS]}", flush=True)
            return entry
        entry["us"] = {k: round(us, 3) for k, (us, _) in took.items()}
        entry["spread"] = {k: round(spread, 3) for k, (_, spread) in took.items()}
        entry["share_of_floor"] = {k: round(floor_us / us, 3) for k, (us, _) in took.items()}
        self.add(entry)
        ours = took[OURS][0]
        others = sorted((us, name) for name, (us, _) in took.items() if name != OURS)
        best = f"{others[0][0] / ours:5.2f}x {others[0][1]}" if others else ""
        print(f"{kernel:22} {shape:16} {ours:9.2f} us {floor_us / ours:5.2f} {best}", flush=True)
        return entry


def _double(t: Any) -> Any:
    return t.detach().double() if torch.is_tensor(t) and t.is_floating_point() else t


def _copy(t: Any) -> Any:
    """Memory of its own, in the same layout: some write into their inputs."""
    return t.detach().clone() if torch.is_tensor(t) else t


def _run(f: Function, args: tuple[Any, ...], dy: tuple[Tensor, ...] | None, wanted: Sequence[int]) -> list[Tensor]:
    """Outputs; with `dy` the gradients of the wanted inputs, too."""
    if dy is None:
        with torch.no_grad():
            out = f(*args)
        return list(out) if isinstance(out, tuple) else [out]
    leaves = [t.requires_grad_() if i in wanted else t for i, t in enumerate(args)]
    out = f(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    found = torch.autograd.grad(outs, [leaves[i] for i in wanted], [g.clone() for g in dy])
    return [o.detach() for o in outs] + list(found)


def _calls(
    f: Function, inputs: Sequence[tuple[Any, ...]], grads: Sequence[tuple[Tensor, ...]] | None, wanted: Sequence[int]
) -> list[Callable[[], object]]:
    """One call for each buffer; gradients are dropped between calls so that nothing accumulates."""
    if grads is None:

        def forward(args: tuple[Any, ...]) -> None:
            with torch.no_grad():
                f(*args)

        return [lambda args=args: forward(args) for args in inputs]

    def step(args: tuple[Any, ...], dy: tuple[Tensor, ...]) -> None:
        leaves = [t.detach().requires_grad_() if i in wanted else t for i, t in enumerate(args)]
        out = f(*leaves)
        torch.autograd.grad(list(out) if isinstance(out, tuple) else [out], [leaves[i] for i in wanted], list(dy))

    return [lambda args=args, dy=dy: step(args, dy) for args, dy in zip(inputs, grads, strict=True)]


def rows_of(path: Path | None) -> list[dict[str, Any]]:
    """What a former run wrote."""
    return json.loads(path.read_text())["rows"] if path is not None and path.is_file() else []
