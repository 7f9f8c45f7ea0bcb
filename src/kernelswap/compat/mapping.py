"""`{layer: {device: {mode: repository}}}`, registered for the process or for a `with` block. Merged entry by entry.

`None` in place of a repository says: leave that layer alone there. A repository in place of the modes is for every mode that has
none of its own, as `Mode.FALLBACK` is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .. import mode as modes
from .. import spec
from ..types import Mode
from . import devices
from .devices import Device
from .repositories import Repository

Registered = dict[str, dict[Device, dict[Mode, "Repository | None"]]]

_process: Registered = {}
_current: ContextVar[Registered] = ContextVar("kernel_mapping", default=_process)


def current() -> Registered:
    """What is registered here and now."""
    return _current.get()


def register_kernel_mapping(mapping: Mapping[str, Any], inherit_mapping: bool = True) -> None:  # noqa: FBT001, FBT002  # the reference's
    """Add to what is registered, per layer, device (with its capabilities) and mode; `inherit_mapping=False` forgets that first.

    Args:
        mapping: `{layer: {device: repository | {Mode: repository}}}`; a device is a name or a `Device`, a repository one of
            the classes of this package, a spec such as `org/repo@1:Layer`, or None.
        inherit_mapping: see above.

    Raises:
        ValueError: an unknown device or a combination of modes that means nothing. Nothing was registered.
        TypeError: something is no repository.
    """
    read = _read(mapping)
    registered = _current.get()
    if not inherit_mapping:
        registered.clear()
    for layer, by_device in read.items():
        registered.setdefault(layer, {})
        for device, by_mode in by_device.items():
            registered.setdefault(layer, {}).setdefault(device, {}).update(by_mode)


@contextmanager
def use_kernel_mapping(mapping: Mapping[str, Any], *, inherit_mapping: bool = True) -> Iterator[None]:
    """While the block runs, in this thread or task: what is registered and `mapping`; `inherit_mapping=False`: `mapping` alone."""
    copy = {layer: {d: dict(m) for d, m in by.items()} for layer, by in _current.get().items()} if inherit_mapping else {}
    token = _current.set(copy)
    try:
        register_kernel_mapping(mapping)
        yield
    finally:
        _current.reset(token)


def _read(mapping: Mapping[str, Any]) -> Registered:
    found: Registered = {}
    for layer, by_device in mapping.items():
        found.setdefault(layer, {})
        for device, value in by_device.items():
            by_mode = value if isinstance(value, Mapping) else {Mode.FALLBACK: value}
            entries = {modes.check(mode): _repository(one) for mode, one in by_mode.items()}
            found.setdefault(layer, {}).setdefault(devices.read(device), {}).update(entries)
    return found


def _repository(value: Any) -> Repository | None:
    if value is None or isinstance(value, Repository):
        return value
    if isinstance(value, str):
        asked = spec.parse(value)
        if asked.layer is not None:
            return Repository(value, asked.layer, [])
    raise TypeError(
        f"{value!r} is no repository; use LayerRepository, LocalLayerRepository, or a spec such as 'org/repo@1:Layer'"
    )
