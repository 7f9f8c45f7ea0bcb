"""Which attributes of `self` a forward touches, as its source shows. Reads source, runs nothing.

The notation keeps apart what an adapter such as LoRA must keep apart:

    weight              self.weight, self.weight.float(): read as a value
    gate_proj.weight    self.gate_proj.weight: reads into a submodule; whatever wraps that submodule is bypassed
    gate_proj()         self.gate_proj(x), self.gate_proj.forward(x): calls it; whatever wraps it stays in effect
    experts             self.experts passed on or looped over: a value; if it is a submodule, anything may be read from it
    *                   self itself goes where this cannot follow; anything may be read
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

ANYTHING = "*"

_DEEPEST = 4  # helpers that call helpers; past this, `*`
# Ways to reach state without naming it.
_REACHES_ALL = {
    "__dict__",
    "_parameters",
    "_buffers",
    "_modules",
    "parameters",
    "named_parameters",
    "buffers",
    "named_buffers",
    "children",
    "named_children",
    "modules",
    "named_modules",
    "state_dict",
    "get_parameter",
    "get_buffer",
    "get_submodule",
    "apply",
}
_LOOKS_ONLY = {"isinstance", "type", "id", "callable"}  # of the object, not of its attributes


def of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What `forward(self, ...)` touches of `self`, in order of first appearance; `("*",)` if its source cannot be had."""
    return tuple(dict.fromkeys(_of(inspect.unwrap(forward), 0, 0)))


def root(read: str) -> str:
    """The attribute of `self` that it begins with: `gate_proj` of `gate_proj.weight` and of `gate_proj()`."""
    return read.partition(".")[0].removesuffix("()")


def _of(function: Callable[..., Any], position: int | str, depth: int) -> list[str]:
    definition = _definition(function)
    if definition is None or depth > _DEEPEST:
        return [ANYTHING]
    arguments = [*definition.args.posonlyargs, *definition.args.args, *definition.args.kwonlyargs]
    named = {a.arg: a.arg for a in arguments}
    name = named.get(position) if isinstance(position, str) else (arguments[position].arg if position < len(arguments) else None)
    if name is None:
        return [ANYTHING]  # it came in as *args
    walker = _Walker(name, getattr(function, "__globals__", {}), depth)
    for statement in definition.body:
        walker.visit(statement)
    return walker.found


def _definition(function: Callable[..., Any]) -> ast.FunctionDef | None:
    if not isinstance(function, FunctionType):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # no source, or a lambda in the middle of an expression
        return None
    first = tree.body[0] if tree.body else None
    return first if isinstance(first, ast.FunctionDef) and first.name == function.__code__.co_name else None


class _Walker(ast.NodeVisitor):
    def __init__(self, name: str, scope: dict[str, Any], depth: int) -> None:
        self.name, self.scope, self.depth = name, scope, depth
        self.found: list[str] = []

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = self.chain(node)
        if parts is None:
            self.generic_visit(node)
        elif parts[0] in _REACHES_ALL:
            self.found.append(ANYTHING)
        elif not isinstance(node.ctx, ast.Store):
            self.found.append(".".join(parts))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        parts = self.chain(node.target)
        if parts is not None:
            self.found.append(".".join(parts))
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == self.name:
            self.found.append(ANYTHING)

    def visit_Call(self, node: ast.Call) -> None:
        if self.by_name(node):
            for default in node.args[2:]:
                self.visit(default)
            return
        parts = self.chain(node.func)
        if parts is not None:
            self.called(parts)
        else:
            self.visit(node.func)
        for argument in (*node.args, *node.keywords):
            if not self.is_self(argument):
                self.visit(argument)
        if any(self.is_self(a) for a in (*node.args, *node.keywords)):
            self.passed(node)

    def called(self, parts: list[str]) -> None:
        if parts[0] in _REACHES_ALL:
            self.found.append(ANYTHING)
        elif len(parts) == 1:
            self.found.append(f"{parts[0]}()")
        elif parts[-1] in {"forward", "__call__"}:
            self.found.append(".".join(parts[:-1]) + "()")
        else:
            self.found.append(".".join(parts[:-1]))  # a method of the value: weight.float()

    def by_name(self, node: ast.Call) -> bool:
        """`getattr(self, "weight")`."""
        if not (isinstance(node.func, ast.Name) and node.func.id in {"getattr", "hasattr"} and len(node.args) >= 2):
            return False
        parts = [] if self.is_self(node.args[0]) else self.chain(node.args[0])
        key = node.args[1]
        if parts is None:
            return False
        constant = isinstance(key, ast.Constant) and isinstance(key.value, str)
        self.found.append(".".join([*parts, key.value]) if constant else ".".join(parts) or ANYTHING)  # type: ignore[attr-defined]  # `constant` says so
        return True

    def passed(self, node: ast.Call) -> None:
        """`self` is an argument: follow it into a function of the same kernel, give up elsewhere."""
        called = node.func.id if isinstance(node.func, ast.Name) else None
        if called in _LOOKS_ONLY:
            return
        function = inspect.unwrap(self.scope[called]) if called is not None and callable(self.scope.get(called)) else None
        for i, argument in enumerate(node.args):
            if self.is_self(argument):
                self.found += _of(function, i, self.depth + 1) if function is not None else [ANYTHING]
        for keyword in node.keywords:
            if self.is_self(keyword):
                self.found += _of(function, keyword.arg, self.depth + 1) if function is not None and keyword.arg else [ANYTHING]

    def is_self(self, node: ast.AST) -> bool:
        value = node.value if isinstance(node, ast.keyword) else node
        return isinstance(value, ast.Name) and value.id == self.name

    def chain(self, node: ast.AST) -> list[str] | None:
        """`["gate_proj", "weight"]` for `self.gate_proj.weight`, `None` for what does not begin at `self`."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        return parts if parts and isinstance(node, ast.Name) and node.id == self.name else None
