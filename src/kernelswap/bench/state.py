"""What a model is, taken down before a swap, to prove afterwards that it is that again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.nn as nn


@dataclass(frozen=True)
class Instance:
    """One module: its class, its `__dict__` and, one level down, the dictionaries in it (parameters, hooks, ...).

    Held by reference, so that "the same" means the same objects and no identity is reused meanwhile.
    """

    path: str
    module: nn.Module
    cls: type
    items: dict[str, Any]
    inner: dict[str, tuple[tuple[Any, Any], ...]]
    names: dict[str, Any]
    """The globals that the class's forward looks up, by name: functions are swapped there."""


def take(model: nn.Module) -> tuple[Instance, ...]:
    """The state of every module of `model`."""
    return tuple(_instance(path, module) for path, module in model.named_modules())


def _instance(path: str, module: nn.Module) -> Instance:
    forward = getattr(type(module), "forward", None)
    code, scope = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    return Instance(
        path=path or "(the model)",
        module=module,
        cls=type(module),
        items=dict(vars(module)),
        inner={k: tuple(v.items()) for k, v in vars(module).items() if isinstance(v, dict)},
        names={name: scope[name] for name in getattr(code, "co_names", ()) if name in scope},
    )


def differences(before: tuple[Instance, ...], model: nn.Module) -> list[str]:
    """What is not as it was, one sentence each; empty when the model is as it was.

    Compared by identity: the modules, their classes, every entry of every `__dict__` and of the dictionaries in it
    (hooks, parameters, buffers), in order, and the globals that each forward looks up.
    """
    now = {path or "(the model)": module for path, module in model.named_modules()}
    said = [f"{was.path}: no longer there" for was in before if now.get(was.path) is not was.module]
    said += [f"{path}: was not there" for path in now.keys() - {was.path for was in before}]
    for was in before:
        if now.get(was.path) is was.module:
            said += [f"{was.path}: {what}" for what in _changes(was, _instance(was.path, was.module))]
    return said


def _changes(was: Instance, now: Instance) -> list[str]:
    said = []
    if was.cls is not now.cls:
        said.append(f"its class was {was.cls.__qualname__}, is {now.cls.__qualname__} ({now.cls.__module__})")
    said += _entries("__dict__", tuple(was.items.items()), tuple(now.items.items()))
    for name in was.inner.keys() & now.inner.keys():
        said += _entries(name, was.inner[name], now.inner[name])
    said += [f"its forward finds another {name}" for name, value in was.names.items() if now.names.get(name) is not value]
    return said


def _entries(where: str, was: tuple[tuple[Any, Any], ...], now: tuple[tuple[Any, Any], ...]) -> list[str]:
    old, new = dict(was), dict(now)
    said = [f"{where} lost {key!r}" for key in old.keys() - new.keys()]
    said += [f"{where} gained {key!r}" for key in new.keys() - old.keys()]
    said += [f"{where}[{key!r}] is another object" for key in old.keys() & new.keys() if old[key] is not new[key]]
    if not said and list(old) != list(new):
        said.append(f"{where} is in another order")
    return sorted(said)
