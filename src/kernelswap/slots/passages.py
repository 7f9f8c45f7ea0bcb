"""Statements of a forward that one call can stand for. Finds them in a syntax tree, and writes the call in their place.

Three patterns, named as the rows of a table name them (`statements = ...`), and one that joins a layer with the next (`ahead.py`):

    residual_norm    h = r + h                                    h, r = CALL(self.NORM, r, h)
                     r = h
                     h = self.NORM(h)

    norm_rotary      q = self.Q_NORM(X).transpose(1, 2)           q = (X).transpose(1, 2)
                     k = self.K_NORM(Y).transpose(1, 2)           k = (Y).transpose(1, 2)
                     ... (reads neither q nor k)                  ...
                     q, k = ROTARY(q, k, cos, sin)                q, k = CALL(self.Q_NORM, self.K_NORM, q, k, cos, sin)

    projections      q = ... self.Q(X) ...                        q, k, v = CALL(self.Q, self.K, self.V, X)
                     k = ... self.K(X) ...                        q = ... q ...
                     v = ... self.V(X) ...                        k = ... k ...
                                                                  v = ... v ...

    ahead            h = self.NORM(h)       the first, of what is given       h = CALL(self.NORM, h)
                     ...
                     h = r + h              the last                          h = CALL(self, r, h)
                     return h

where CALL is a global name of ours, under which the forward finds the statements' own meaning, as a function compiled from
them, until a kernel takes its place. The norms may also come after the transposition; what is done with a projection (`...`) is
methods, attributes and a norm, of it alone. What deviates from a pattern is left
alone; where it comes close, the reason is kept.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, cast

from . import source

PREFIX = "kernelswap_"
AHEAD_NORM, AHEAD_TOTAL = f"{PREFIX}ahead_norm", f"{PREFIX}ahead_total"


@dataclass(frozen=True, slots=True)
class Passage:
    """Where a pattern occurs in one forward."""

    name: str
    """The global name of the call."""
    norms: tuple[str, ...]
    """Attributes of the module: the norms, or projections, that the call is given first, in this order."""
    plain: Callable[..., Any]
    """What the statements mean, as a function of the norms and of the tensors that they read."""
    why: str = ""
    """Why it is left alone; empty: it is not. Such a one has no `plain`."""


def find(function: FunctionType, pattern: str) -> tuple[Passage, ...]:
    """The passages of `function`, and those that come close; of those with one name, the first.

    Raises:
        Unreadable: of `source.read`.
    """
    tree = source.read(function)
    found: dict[str, Passage] = {}
    for one in PATTERNS[pattern](tree):
        if one.why:
            found.setdefault(one.name, Passage(one.name, one.norms, _nothing, one.why))
        elif found.get(one.name) is None or found[one.name].why:
            found[one.name] = Passage(one.name, one.norms, _function(function, one))
    return tuple(found.values())


def rewritten(function: FunctionType, passages: Iterable[Passage]) -> CodeType:
    """The code of `function` with calls in place of these passages of it, to be used with `source.made`.

    Raises:
        Unreadable: of `source.read`.
    """
    tree = source.read(function)
    names = {passage.name for passage in passages}
    for find in PATTERNS.values():
        for one in [one for one in find(tree) if not one.why and one.name in names]:
            for old, new in one.changes:
                at = one.block.index(old)
                one.block[at : at + 1] = new
    return source.compiled(function, tree)


def _nothing(*_: Any) -> None:
    raise LookupError("this passage is left alone")


# -- the patterns ---------------------------------------------------------------------------------------------------


@dataclass
class _Found:
    name: str
    norms: tuple[str, ...]
    block: list[ast.stmt]
    changes: list[tuple[ast.stmt, list[ast.stmt]]] = field(default_factory=list)
    """A statement of the block, and what stands in its place."""
    parameters: tuple[str, ...] = ()
    body: list[ast.stmt] = field(default_factory=list)
    """What the statements mean, over `parameters`."""
    why: str = ""


def _residual_norm(tree: ast.FunctionDef) -> Iterator[_Found]:
    this = _this(tree)
    for block in _blocks(tree):
        for i, total in enumerate(block):
            match total:
                case ast.Assign(
                    targets=[ast.Name(h)], value=ast.BinOp(left=ast.Name(left), op=ast.Add(), right=ast.Name(right))
                ) if h in (left, right) and left != right:
                    yield from _after_sum(this, block, i, h, right if left == h else left)


def _after_sum(this: str, block: list[ast.stmt], i: int, h: str, r: str) -> Iterator[_Found]:
    rest, kept = block[i + 1 : i + 4], h
    copied = _name_to_name(rest[0]) if rest else None
    if copied is not None and copied[1] == h != copied[0]:
        rest, kept = rest[1:], copied[0]
    reads = next(((n, c) for n, stmt in enumerate(rest) for c in ast.walk(stmt) if _is_norm(this, c, h)), None)
    if reads is None:
        return
    norm, last = cast(ast.Attribute, cast(ast.Call, reads[1]).func).attr, rest[0]
    name = _name("residual_norm", norm)
    y = last.targets[0].id if isinstance(last, ast.Assign) and isinstance(last.targets[0], ast.Name) else ""
    if reads[0] or not isinstance(last, ast.Assign) or last.value is not reads[1] or len(last.targets) > 1 or y in ("", kept):
        why = f"its forward has `{_said(last)}` where the norm of a sum is expected"
        yield _Found(name, (norm,), block, why=why)
        return
    target = ast.Tuple([ast.Name(y, ast.Store()), ast.Name(kept, ast.Store())], ast.Store())
    call = _call(last, name, this, (norm,), (r, h))
    changes: list[tuple[ast.stmt, list[ast.stmt]]] = [(stmt, []) for stmt in block[i : block.index(last)]]
    changes.append((last, [ast.copy_location(ast.Assign([target], call), last)]))
    body = ast.parse("hidden = residual + hidden\nreturn norm(hidden), hidden").body
    yield _Found(name, (norm,), block, changes, ("norm", "residual", "hidden"), body)


def _norm_rotary(tree: ast.FunctionDef) -> Iterator[_Found]:
    this = _this(tree)
    for block in _blocks(tree):
        for last in block:
            match last:
                case ast.Assign(
                    targets=[ast.Tuple(elts=[ast.Name(q), ast.Name(k)])],
                    value=ast.Call(func=ast.Name(), args=[ast.Name(first), ast.Name(second), *_]),
                ) if (q, k) == (first, second) and q != k:
                    yield from _before_rotary(this, block, last, (q, k))


def _before_rotary(this: str, block: list[ast.stmt], last: ast.Assign, qk: tuple[str, str]) -> Iterator[_Found]:
    before = block[: block.index(last)]
    assigned = [stmt for stmt in before if isinstance(stmt, ast.Assign)]
    normed = {t: [(stmt, n) for stmt in assigned if (n := _normed(this, stmt, t)) is not None] for t in qk}
    if not all(normed.values()):
        return
    (q_stmt, (q_norm, q_of, q_after)), (k_stmt, (k_norm, k_of, k_after)) = (normed[t][-1] for t in qk)
    norms, call = (q_norm, k_norm), cast(ast.Call, last.value)
    rotary, others = cast(ast.Name, call.func).id, [a.id for a in call.args[2:] if isinstance(a, ast.Name)]
    name, why = _name("norm_rotary", *norms), ""
    for t, stmt in ((qk[0], q_stmt), (qk[1], k_stmt)):
        between = next((s for s in before[before.index(stmt) + 1 :] if t in _names(s)), None)
        if between is not None:
            why = f"its forward has `{_said(between)}` between a norm and {rotary}"
    if call.keywords or len(others) != 2 or len(call.args) != 4:  # q, k, cos, sin
        why = why or f"its forward calls `{_said(call)}`, not {rotary} of q, k, cos and sin"
    if why:
        yield _Found(name, norms, block, why=why)
        return
    changes: list[tuple[ast.stmt, list[ast.stmt]]] = []
    body: list[ast.stmt] = []
    for t, stmt, of, after in (("q", q_stmt, q_of, q_after), ("k", k_stmt, k_of, k_after)):
        value = _located("_.transpose(1, 2)", stmt.value, of) if after else of
        changes.append((stmt, [ast.copy_location(ast.Assign(stmt.targets, value), stmt)]))
        # what a norm is given keeps the order of its dimensions: hooks on it see what they saw
        code = f"{t} = {t}_norm({t}.transpose(1, 2)).transpose(1, 2)" if after else f"{t} = {t}_norm({t})"
        body += ast.parse(code).body
    new = _call(last, name, this, norms, (*qk, *others))
    changes.append((last, [ast.copy_location(ast.Assign(last.targets, new), last)]))
    body += ast.parse(f"return {rotary}(q, k, cos, sin)").body
    yield _Found(name, norms, block, changes, ("q_norm", "k_norm", "q", "k", "cos", "sin"), body)


def _ahead(tree: ast.FunctionDef) -> Iterator[_Found]:
    """The first norm of what a layer is given, and the sum that it returns; both or none."""
    this, given = _this(tree), next((a.arg for a in tree.args.args[1:2]), "")
    first = next((s for s in tree.body if any(_is_norm(this, n, given) for n in ast.walk(s))), None)
    if first is None or any(given in _stored(s) for s in tree.body[: tree.body.index(first)]):
        return
    match first, tree.body[-2:]:
        case (
            ast.Assign(targets=[ast.Name()], value=ast.Call(func=ast.Attribute(attr=norm)) as call),
            [
                ast.Assign(
                    targets=[ast.Name(h)], value=ast.BinOp(left=ast.Name(r), op=ast.Add(), right=ast.Name(right))
                ) as total,
                ast.Return(value=ast.Name(returned)),
            ],
        ) if h == right == returned != r and _is_norm(this, call, given):
            called = _call(first, AHEAD_NORM, this, (norm,), (given,))
            begins: list[tuple[ast.stmt, list[ast.stmt]]] = [
                (first, [ast.copy_location(ast.Assign(first.targets, called), first)])
            ]
            body = ast.parse("return norm(hidden)").body
            yield _Found(AHEAD_NORM, (norm,), tree.body, begins, ("norm", "hidden"), body)
            called = _call(total, AHEAD_TOTAL, this, (), (this, r, h))
            ends: list[tuple[ast.stmt, list[ast.stmt]]] = [(total, [ast.copy_location(ast.Assign(total.targets, called), total)])]
            body = ast.parse("return residual + hidden").body
            yield _Found(AHEAD_TOTAL, (), tree.body, ends, ("layer", "residual", "hidden"), body)


def _projections(tree: ast.FunctionDef) -> Iterator[_Found]:
    this = _this(tree)
    for block in _blocks(tree):
        taken = 0  # statements are of one passage at most
        for i in range(len(block) - 2):
            three = [_projected(this, stmt) for stmt in block[i : i + 3]]
            found = [one for one in three if one is not None]
            targets, names, given = ({one[at] for one in found} for at in range(3))
            if i < taken or len(found) < 3 or len(given) > 1 or min(len(targets), len(names)) < 3:
                continue
            if any(targets & _names(stmt.value) for stmt in block[i : i + 3] if isinstance(stmt, ast.Assign)):
                continue
            taken = i + 3
            yield _three(this, block, i, found)


def _three(this: str, block: list[ast.stmt], i: int, found: list[tuple[str, str, str, ast.Call]]) -> _Found:
    projections, first = tuple(name for _, name, _, _ in found), block[i]
    name, x = _name("projections", *projections), found[0][2]
    targets = ast.Tuple([ast.Name(t, ast.Store()) for t, *_ in found], ast.Store())
    call = ast.copy_location(ast.Assign([targets], _call(first, name, this, projections, (x,))), first)
    changes: list[tuple[ast.stmt, list[ast.stmt]]] = []
    for stmt, (t, _, _, projection) in zip(block[i : i + 3], found, strict=True):
        rest = [] if cast(ast.Assign, stmt).value is projection else [_with(stmt, projection, t)]
        changes.append((stmt, [call, *rest] if stmt is first else rest))
    parameters = ("q_proj", "k_proj", "v_proj", "hidden")
    body = ast.parse("return q_proj(hidden), k_proj(hidden), v_proj(hidden)").body
    return _Found(name, projections, block, changes, parameters, body)


def _projected(this: str, stmt: ast.stmt) -> tuple[str, str, str, ast.Call] | None:
    """`t = ... self.PROJECTION(X) ...`: t, the projection, X, and the call; what is around it begins with that call."""
    match stmt:
        case ast.Assign(targets=[ast.Name(target)], value=value):
            pass
        case _:
            return None
    whole, read = value, ""
    while not read:
        match value:
            case ast.Call(func=ast.Attribute(value=ast.Name(owner), attr=attribute), args=[inner], keywords=[]) if owner == this:
                if isinstance(inner, ast.Name):
                    read = inner.id
                    break
                value = inner  # a norm around it
            case ast.Call(func=ast.Attribute(value=inner)) | ast.Attribute(value=inner):
                value = inner
            case _:
                return None
    if sum(isinstance(n, ast.Name) and n.id == read for n in ast.walk(whole)) > 1:
        return None
    return target, attribute, read, cast(ast.Call, value)


def _with(stmt: ast.stmt, part: ast.expr, name: str) -> ast.stmt:
    """A copy of a statement that reads a variable in the place of a part of it."""
    return copy.deepcopy(stmt, {id(part): ast.copy_location(ast.Name(name, ast.Load()), part)})


def _stored(stmt: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(stmt) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


PATTERNS: dict[str, Callable[[ast.FunctionDef], Iterator[_Found]]] = {
    "residual_norm": _residual_norm,
    "norm_rotary": _norm_rotary,
    "projections": _projections,  # after it: what that leaves of a statement is still a projection
    "ahead": _ahead,
}


# -- trees ----------------------------------------------------------------------------------------------------------


def _this(tree: ast.FunctionDef) -> str:
    """What the function calls its module."""
    first = (*tree.args.posonlyargs, *tree.args.args)[:1]
    return first[0].arg if first else ""


def _blocks(tree: ast.stmt) -> Iterator[list[ast.stmt]]:
    """Every list of statements of a function; not those of functions and classes inside it."""
    for name in ("body", "orelse", "finalbody"):
        block = getattr(tree, name, [])
        if block:
            yield block
        for stmt in block:
            if not isinstance(stmt, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield from _blocks(stmt)


def _names(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _name_to_name(stmt: ast.stmt) -> tuple[str, str] | None:
    """`a = b` as (a, b)."""
    match stmt:
        case ast.Assign(targets=[ast.Name(a)], value=ast.Name(b)):
            return a, b
    return None


def _is_norm(this: str, node: ast.AST, h: str) -> bool:
    """`self.NORM(h)`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(owner)), args=[ast.Name(given)], keywords=[]):
            return owner == this and given == h
    return False


def _normed(this: str, stmt: ast.Assign, t: str) -> tuple[str, ast.expr, bool] | None:
    """`t = self.NORM(X)` or `t = self.NORM(X).transpose(1, 2)`: the norm, X, and whether it is transposed after."""
    match stmt:
        case ast.Assign(targets=[ast.Name(target)], value=value) if target == t:
            after = False
            match value:
                case ast.Call(
                    func=ast.Attribute(value=value, attr="transpose"), args=[ast.Constant(1), ast.Constant(2)], keywords=[]
                ):
                    after = True
            match value:
                case ast.Call(func=ast.Attribute(value=ast.Name(owner), attr=norm), args=[of], keywords=[]) if owner == this:
                    return norm, of, after
    return None


def _name(pattern: str, *norms: str) -> str:
    return "_".join((PREFIX + pattern, *norms))


def _call(at: ast.stmt, name: str, this: str, norms: tuple[str, ...], names: tuple[str, ...]) -> ast.expr:
    """`name(self.NORM, ..., names...)`, at the place of a statement."""
    code = f"{name}({', '.join((*(f'{this}.{norm}' for norm in norms), *names))})"
    return _located(code, at)


def _located(code: str, at: ast.AST, of: ast.expr | None = None) -> ast.expr:
    """An expression, all of it at the place of `at`; with `of` where it has `_`."""
    made = ast.parse(code, mode="eval").body
    for node in ast.walk(made):
        if isinstance(node, ast.expr):
            ast.copy_location(node, at)
    if of is not None and isinstance(made, ast.Call) and isinstance(made.func, ast.Attribute):
        made.func.value = of
    return made


def _function(function: FunctionType, one: _Found) -> FunctionType:
    """The passage as a function that finds the globals of the forward, as they are at each call."""
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(p) for p in one.parameters], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    tree = ast.FunctionDef(name=one.name, args=arguments, body=one.body, decorator_list=[])
    module = ast.fix_missing_locations(ast.Module(body=[tree], type_ignores=[]))
    outer = compile(module, f"<{one.name} of {function.__module__}.{function.__qualname__}>", "exec", dont_inherit=True)
    code = next(c for c in outer.co_consts if isinstance(c, CodeType))
    made = FunctionType(code, function.__globals__, one.name)
    made.__module__ = function.__module__
    return made


def _said(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 80 else f"{text[:77]}..."  # of a line
