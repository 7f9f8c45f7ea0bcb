"""Statements that call norms, as a module that holds these norms: then their parameters are looked at like any module's."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..slots import function
from ..types import Implementation, Site


class Norms(nn.Module):
    """The norms of some statements, under the names that they have in their module."""

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, norm in norms.items():
            self.add_module(name, norm)


Seen = tuple[Site, nn.Module, Callable[..., Any], Implementation]


def seen(
    site: Site, module: nn.Module, original: Callable[..., Any], candidate: Implementation, given: tuple[Any, ...] | None = None
) -> Seen:
    """What a check looks at: everything as it is, but for statements, whose norms become the module of their site.

    `given`: the arguments of a call, which begin with the norms that it is about; else those of `module` are.
    """
    if not site.row.statements:
        return site, module, original, candidate
    held = of(site, module, given)
    norms = len(held._modules)  # noqa: SLF001  # see `on_module`
    forward = on_module(candidate.forward, norms)
    return (
        dataclasses.replace(site, kind="module"),
        held,
        on_module(original, norms),
        dataclasses.replace(candidate, kind="module", forward=forward),
    )


def of(site: Site, module: nn.Module, given: tuple[Any, ...] | None = None) -> Norms:
    """The norms of some statements of `module`; of a call, those that its arguments begin with."""
    found = function.norms(module, site.name)
    return Norms(found if given is None else dict(zip(found, given, strict=False)))


def rest(site: Site, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments without the norms that they begin with."""
    return args[len(function.norms(module, site.name)) :] if site.row.statements else args


def on_module(function: Callable[..., Any], norms: int) -> Callable[..., Any]:
    """A function of so many norms, and of tensors, as an unbound forward of the module that holds these norms."""

    @functools.wraps(function)
    def forward(module: nn.Module, *args: Any) -> Any:
        return function(*module._modules.values(), *args)  # noqa: SLF001  # `children` passes over one that is there twice

    with contextlib.suppress(ValueError, TypeError):  # a compiled one may have none that can be read
        parameters = list(inspect.signature(function).parameters.values())[norms:]
        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        forward.__signature__ = inspect.Signature([this, *parameters])  # type: ignore[attr-defined]  # what `signature` looks at first
    return forward
