"""A function's source, as a syntax tree that is known to be what runs; and functions made of changed trees.

The tree is compiled as it stands and must give the very code that the function has, line numbers and columns included. A file
that was edited since, a decorator that changed the code or a class whose names are mangled otherwise shows there, and such a
function is not read at all. Changed code keeps file, lines, globals, cells and defaults: tracebacks, debuggers and
`inspect` find what they found.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import functools
import inspect
import linecache
import operator
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from . import rebuild

_FUTURE: int = functools.reduce(operator.or_, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names))


class Unreadable(Exception):
    """There is no tree for this function; the text says why, and completes "its forward ..."."""


def read(function: FunctionType) -> ast.FunctionDef:
    """The definition of `function`. A tree of its own for each caller: it may be changed.

    Raises:
        Unreadable: no source, or not the source of what runs.
    """
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(code)
    except (OSError, TypeError, SyntaxError) as e:
        raise Unreadable("has no source that can be read") from e
    indented = lines[0][:1].isspace()  # kept, so that columns are those of the file
    try:
        body = ast.parse("if 1:\n" * indented + "".join(lines)).body
    except SyntaxError as e:
        raise Unreadable("has source that cannot be parsed by itself") from e
    if indented:
        body = body[0].body if isinstance(body[0], ast.If) else []
    tree = body[0] if body else None
    if not isinstance(tree, ast.FunctionDef):
        raise Unreadable(f"is a {type(tree).__name__} in its source, not a plain function")
    ast.increment_lineno(tree, first - 1 - indented)
    if compiled(function, tree) != code:
        raise Unreadable("does not run the code that its source file has now")
    return tree


def compiled(function: FunctionType, tree: ast.FunctionDef) -> CodeType:
    """The code that `tree` would have in the place of `function`: its file, its class, the cells around it.

    Raises:
        Unreadable: it does not compile there.
    """
    code, where = function.__code__, function.__qualname__.split(".")
    wrapped: ast.stmt = tree
    if len(where) > 1 and where[-2].isidentifier():  # names are mangled, and super() finds its cell, by the class around
        wrapped = ast.ClassDef(name=where[-2], bases=[], keywords=[], body=[wrapped], decorator_list=[])
    cells = [ast.arg(arg=name) for name in code.co_freevars if name != "__class__" or wrapped is tree]
    if cells:
        given = ast.arguments(posonlyargs=[], args=cells, kwonlyargs=[], kw_defaults=[], defaults=[])
        wrapped = ast.FunctionDef(name="around", args=given, body=[wrapped], decorator_list=[])
    # a method of something that the module imports is called by other instructions than a method of anything else
    imports = [ast.Import(names=[ast.alias(name=name)]) for name in code.co_names if name in _imports(code.co_filename)]
    module = ast.fix_missing_locations(ast.Module(body=[*imports, wrapped], type_ignores=[]))
    outer = compile(module, code.co_filename, "exec", flags=code.co_flags & _FUTURE, dont_inherit=True)
    for made in _inside(outer):
        if (
            made.co_name == tree.name
            and made.co_firstlineno == code.co_firstlineno
            and set(made.co_freevars) <= set(code.co_freevars)
        ):
            qualname = {"co_qualname": code.co_qualname} if hasattr(code, "co_qualname") else {}  # 3.11
            return made.replace(co_flags=code.co_flags, **qualname)
    raise Unreadable("does not compile alone as it does in its place")


def made(function: FunctionType, code: CodeType, scope: dict[str, Any]) -> FunctionType:
    """`function` with other code, of `compiled`, and other globals."""
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return rebuild.like(function, code, scope, tuple(held[name] for name in code.co_freevars) or None)


@functools.lru_cache(maxsize=1024)
def _imports(filename: str) -> frozenset[str]:
    """Names that the file imports, outside of functions and classes."""
    found: set[str] = set()
    todo: list[ast.AST] = []
    with contextlib.suppress(SyntaxError):
        todo.append(ast.parse("".join(linecache.getlines(filename))))
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            todo += ast.iter_child_nodes(node)
    return frozenset(found)


def _inside(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _inside(constant)
