"""A forward that finds another function under a global name. Makes new functions; changes none.

Decorators stay: `forward` may be a chain of plain Python wrappers that hold each other in their closures, as
`functools.wraps` leaves them. The innermost function that looks the name up gets other globals, and every wrapper above
it a copy whose closure holds the copy below.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType
from typing import Any, cast

DEPTH = 16  # of decorators; a closure that leads in a circle ends here


def looks_up(forward: Callable[..., Any], name: str) -> str | None:
    """Why `forward` does not find a function under the global `name`, in a way that can be changed for it alone, or `None`."""
    inner = _inner(forward, name)
    if inner is None:
        return f"its forward does not look up {name} as a global"
    if name not in inner.__globals__:
        return f"{inner.__module__} has no {name}"
    return None if callable(inner.__globals__[name]) else f"{inner.__module__}.{name} is not a function"


def found(forward: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What `forward` finds under the global `name`.

    Raises:
        LookupError: it does not look it up.
    """
    why = looks_up(forward, name)
    inner = _inner(forward, name)
    if why is not None or inner is None:
        raise LookupError(why)
    return cast(Callable[..., Any], inner.__globals__[name])


def rebuilt(forward: Callable[..., Any], names: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A copy of `forward` that finds `names` instead of the globals of the same names. The other globals are those of now.

    Raises:
        LookupError: it does not look one of them up.
    """
    for name, function in names.items():
        inner = _inner(forward, name)
        if inner is None:
            raise LookupError(looks_up(forward, name))
        other = like(inner, inner.__code__, scope(inner, {name: function}), inner.__closure__)
        forward = cast(Callable[..., Any], replaced(forward, inner, other))
    return forward


def scope(function: FunctionType, names: Mapping[str, Any]) -> dict[str, Any]:
    """The globals of `function` as of now, with `names` in them."""
    found = {**function.__globals__, **names}
    # torch.compile takes a function's globals for those of the module that `__name__` says, and would trace, and guard
    # on, the function that was replaced. Without the name it looks into this very dict. Imports inside use __package__.
    found.pop("__name__", None)
    return found


def replaced(function: Any, inner: FunctionType, other: FunctionType, depth: int = DEPTH) -> FunctionType | None:
    """`function` with `other` where it has `inner`: itself, or what it wraps; `None` where it has not."""
    if function is inner:
        return other
    if not isinstance(function, FunctionType) or not depth:
        return None
    wrapped = vars(function).get("__wrapped__")
    for cell, content in _cells(function):
        if wrapped is not None and content is not wrapped and wrapped not in _contents(content):
            continue  # a helper of the decorator, not what it wraps
        below = replaced(content, inner, other, depth - 1)
        if below is not None:
            closure = tuple(CellType(below) if c is cell else c for c in function.__closure__ or ())
            copy = like(function, function.__code__, function.__globals__, closure)
            if wrapped is not None:
                copy.__wrapped__ = below if content is wrapped else wrapped  # type: ignore[attr-defined]  # functools.wraps sets it
            return copy
    return None


def _inner(function: Any, name: str, depth: int = DEPTH) -> FunctionType | None:
    if not isinstance(function, FunctionType) or not depth:
        return None
    if name in _globals_of(function.__code__):
        return function
    wrapped = vars(function).get("__wrapped__")
    for _, content in _cells(function):
        if wrapped is not None and content is not wrapped and wrapped not in _contents(content):
            continue
        inner = _inner(content, name, depth - 1)
        if inner is not None:
            return inner
    return None


def like(function: FunctionType, code: CodeType, scope: dict[str, Any], closure: tuple[CellType, ...] | None) -> FunctionType:
    """A function with the names, defaults and attributes of `function`, and other code, globals or cells."""
    copy = FunctionType(code, scope, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__module__, copy.__doc__ = function.__qualname__, function.__module__, function.__doc__
    if hasattr(function, "__annotate__"):  # 3.14: annotations are not evaluated before someone asks
        copy.__annotate__ = function.__annotate__  # type: ignore[attr-defined]  # hasattr says so
    else:
        copy.__annotations__ = function.__annotations__
    copy.__dict__.update(vars(function))
    return copy


def cells(function: FunctionType) -> Iterator[tuple[CellType, Any]]:
    """The cells of a closure that hold something, and what they hold."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell: a name that is not bound yet
            yield cell, cell.cell_contents


def _cells(function: FunctionType) -> Iterator[tuple[CellType, Any]]:
    for cell, content in cells(function):
        if isinstance(content, FunctionType) and content is not function:
            yield cell, content


def _contents(function: Any) -> list[Any]:
    return [content for _, content in _cells(function)] if isinstance(function, FunctionType) else []


def _globals_of(code: CodeType) -> frozenset[str]:
    """Names that `code`, or code nested in it, looks up as globals."""
    if code not in _NAMES:
        names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                names |= _globals_of(constant)
        if len(_NAMES) > 1000:  # functions made in a loop must not fill the memory
            _NAMES.clear()
        _NAMES[code] = frozenset(names)
    return _NAMES[code]


_NAMES: dict[CodeType, frozenset[str]] = {}
