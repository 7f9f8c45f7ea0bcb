"""`{layer: spec}`, as `swap(model, table=...)` and `KernelConfig` write it, to rows of a table. No I/O."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from . import spec
from .errors import TableError
from .types import Row, Use

Table = Sequence[Row] | Mapping[str, Any]
"""Rows; or `{layer: spec}`, where instead of a spec there may be several in order of preference, `{device: spec}`, or `""`
for "leave it alone"."""
DEVICES = {"": "", "metal": "mps", "cann": "npu", **{d: d for d in ("cpu", "cuda", "rocm", "xpu", "npu", "mps", "tpu", "neuron")}}
"""What a mapping may call a device, and what a table does."""


def rows(given: Table | None, known: Container[str]) -> tuple[Row, ...]:
    """Rows as given, or made from `{layer: spec}`; a layer that no row knows is the name of a class."""
    if given is None:
        return ()
    if not isinstance(given, Mapping):
        found: tuple[Any, ...] = tuple(given) if isinstance(given, Iterable) else (given,)
        if not all(isinstance(row, Row) for row in found):
            raise TableError(f"table={given!r} is no table", todo="Give {layer: spec}, or rows.")
        return found
    made = (_row(layer, value) for layer, value in given.items())
    return tuple(row if row.layer in known else replace(row, targets=(row.layer,)) for row in made)


def preferences(given: Mapping[str, str | Use | Iterable[str | Use]] | None) -> dict[str, tuple[Use, ...]]:
    """`{glob: spec or specs}` to uses, in their order.

    Raises:
        TableError: it is no mapping.
    """
    if given is not None and not isinstance(given, Mapping):
        raise TableError(
            f"prefer={given!r} does not say for what", todo="Write {'RMSNorm': 'org/kernel:Layer'}, layers or globs."
        )
    several = {glob: (specs,) if isinstance(specs, (str, Use)) else specs for glob, specs in (given or {}).items()}
    return {glob: tuple(one if isinstance(one, Use) else Use(one) for one in specs) for glob, specs in several.items()}


def _row(layer: str, value: Any) -> Row:
    if value is None or value is False or value == "":
        return Row(layer, off=True)
    uses: list[Use] = []
    for device, specs in value.items() if isinstance(value, Mapping) else [("", value)]:
        name, colon, arch = device.partition(":")
        if name not in DEVICES:
            raise TableError(f"{layer}: {device!r} is no device", todo=f"Known: {', '.join(filter(None, DEVICES))}.")
        for one in (specs,) if isinstance(specs, str) or not isinstance(specs, Iterable) else specs:
            if not isinstance(one, str):
                raise TableError(
                    f"{layer}: {one!r} is not a spec", todo=f"Write 'org/kernel@1:{layer}', or '' to leave it alone."
                )
            spec.parse(one)
            uses.append(Use(one, on=(DEVICES[name] + colon + arch,) if device else ()))
    return Row(layer, use=tuple(uses))
