"""A model and the rows of a table to the places where a swap could go. Reads the model; changes nothing, loads nothing.

Everything is decided per module (design decision D9): its device is that of its own tensors, or of its execution device
under accelerate; its dtype and its mode are its own. A module reachable under two paths gives one site, under the first.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import CodeType
from typing import TYPE_CHECKING, Any, cast

from . import layers
from .errors import PlanConflict, TableError
from .slots import fused, rebuild
from .slots import module as module_slot
from .types import Row, Site

if TYPE_CHECKING:
    import torch.nn as nn

FLOAT32 = "torch.float32"  # where neither a module nor anything around it holds a floating tensor


def must_be_module(model: object) -> None:
    """Raise `TypeError` for anything else, with the way to the model for those who hold something around it."""
    if hasattr(model, "named_modules"):
        return
    inside = next(
        (name for name in ("model", "transformer", "unet") if hasattr(getattr(model, name, None), "named_modules")), None
    )
    hint = f"; its model is .{inside}" if inside is not None else ""
    raise TypeError(f"expected a torch.nn.Module, found a {type(model).__qualname__}{hint}")


def find(
    model: nn.Module,
    rows: Sequence[Row],
    *,
    only: str | Iterable[str] | None = None,
    skip: str | Iterable[str] | None = None,
    rivals: bool = False,
) -> tuple[Site, ...]:
    """All sites of `model`, in the order of `named_modules`, module before function. Statements are one where a kernel of their
    row may serve on that device; `rivals`: or one that serves where it is measured.

    `only` and `skip` are globs over module paths (`model.layers.0.*`; `layers.0.*` and `mlp` name the same places by
    the end of their paths) or over the layer names of the table (`RMSNorm`). What they leave out is still a site, with
    the reason in `Site.left_out`.

    Raises:
        PlanConflict: two rows name one module equally precisely.
        TableError: a glob of `only` or `skip` names nothing in this model.
        TypeError: `model` is not a module.
    """
    must_be_module(model)
    kinds = {kind: tuple(row for row in rows if row.kind == kind) for kind in ("module", "function")}
    statements = {id(row): (*row.use, *(row.rivals if rivals else ())) for row in rows if row.statements}
    read = tuple(row for row in kinds["function"] if statements.get(id(row), True))  # sources, which takes time
    matcher, wanted = _Matcher(kinds["module"], read), _Wanted(only, skip)
    found = []
    for path, module, parents in _walk(model):
        for row, target, name, left_out in matcher.claims(path, module):
            device, dtype = _place(module) or (None, None)
            for parent in reversed(parents):
                if device is not None and dtype is not None:
                    break
                near = _place(parent) or (None, None)
                device, dtype = device or near[0], dtype or near[1]
            device = device or "cpu"
            if row.statements and not any(_may_be_on(use.on, device) for use in statements[id(row)]):
                continue  # nothing that the model does is lost where there is no kernel for statements
            found.append(
                Site(
                    path=path,
                    kind=row.kind,
                    layer=row.layer,
                    target=target,
                    device=device,
                    dtype=dtype or FLOAT32,
                    training=module.training,
                    row=row,
                    name=name,
                    left_out=left_out,
                )
            )
    return wanted.mark(found, elsewhere={row.layer for row in rows if row.statements})


def _may_be_on(on: tuple[str, ...], device: str) -> bool:
    """Whether a use that is for these could serve on a device of this type; torch calls ROCm devices `cuda`."""
    kind = device.partition(":")[0]
    return not on or any(one.partition(":")[0] in ({"cuda", "rocm"} if kind == "cuda" else {kind}) for one in on)


def original(module: nn.Module) -> type[Any]:
    """The class of `module` as it was before any swap of ours."""
    return module_slot.original(module)


def named_by(pattern: str, site: Site) -> bool:
    """Whether a glob names a site: by its path, by the end of its path, or by its layer name."""
    return (
        fnmatchcase(site.path, pattern)
        or fnmatchcase(site.path, f"*.{pattern}")
        or fnmatchcase(site.layer, pattern)
        or (bool(site.name) and fnmatchcase(site.name, pattern))
    )


NOT_ASKED_FOR = "skipped by you (only="
"""How `left_out` begins where `only` names other sites."""


# -- what the user leaves out -------------------------------------------------------------------------------------


def _globs(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


class _Wanted:
    def __init__(self, only: str | Iterable[str] | None, skip: str | Iterable[str] | None) -> None:
        self.only, self.skip, self.all = _globs(only), _globs(skip), only is None

    def mark(self, found: list[Site], *, elsewhere: Collection[str] = ()) -> tuple[Site, ...]:
        """`elsewhere`: layers whose sites depend on the device; to skip one where it has none is no mistake."""
        idle = [
            f"{word}={glob!r} names nothing in this model"
            for word, globs in (("only", self.only), ("skip", self.skip))
            for glob in globs
            if not any(named_by(glob, site) for site in found) and not (word == "skip" and glob in elsewhere)
        ]
        if idle:
            offered = ", ".join(sorted({site.layer for site in found})) or "nothing that a table row knows"
            raise TableError("\n".join(idle), todo=f"This model has {offered}; a glob names a module path, its end, or a layer.")
        return tuple(self._marked(site) for site in found)

    def _marked(self, site: Site) -> Site:
        skipped = next((glob for glob in self.skip if named_by(glob, site)), None)
        if skipped is not None:
            return replace(site, left_out=f"skipped by you (skip={skipped!r})")
        if not self.all and not any(named_by(glob, site) for glob in self.only):
            return replace(site, left_out=f"{NOT_ASKED_FOR}{', '.join(map(repr, self.only)) or 'nothing'})")
        return site


# -- which row claims what ----------------------------------------------------------------------------------------

Claim = tuple[Row, str, str, str]  # row, target, global name (functions), why it is left out


class _Matcher:
    """Rows against modules. What depends on the class alone is asked once per class."""

    def __init__(self, module_rows: Sequence[Row], function_rows: Sequence[Row]) -> None:
        self.module_rows = tuple((row, *_split(row)) for row in module_rows)
        self.function_rows = tuple((row, *_split(row)) for row in function_rows if not row.statements)
        self.statement_rows = tuple((row, *_split(row)) for row in function_rows if row.statements)
        self.classes: dict[type[Any], tuple[str, tuple[tuple[int, Row], ...], tuple[tuple[Row, str, str], ...]]] = {}

    def claims(self, path: str, module: nn.Module) -> Iterator[Claim]:
        known = self.classes.get(type(module))
        if known is None:
            cls = original(module)
            known = _qualified(cls), tuple(self._by_class(cls)), tuple(self._functions(cls))
            self.classes[type(module)] = known
        target, ranked, functions = known
        if ranked:
            claim = self._choose(path, module, target, ranked)
            if claim is not None:
                yield claim
        for row, name, of in functions:
            yield row, of, name, ""
        for row, plain, globs in self.statement_rows:
            yield from self._statements(module, target, row, plain, globs)

    def _statements(
        self, module: nn.Module, target: str, row: Row, plain: frozenset[str], globs: tuple[str, ...]
    ) -> Iterator[Claim]:
        """The passages of a module's forward whose norms, or projections, are all of the classes that a row names."""
        fits = set()
        for name, child in _children(module).items():
            if child is not None:
                cls = original(child).__name__
                if (cls in plain or any(fnmatchcase(cls, glob) for glob in globs)) and _missing(child, row) is None:
                    fits.add(name)
        found = fused.find(original(module).forward, row.statements) if fits else ()
        if isinstance(found, str):
            return  # many classes hold a norm, and of what cannot be read nobody knows that there is anything to swap
        for passage in found:
            if fits.issuperset(passage.norms):
                yield row, target, passage.name, passage.why

    def _by_class(self, cls: type[Any]) -> Iterator[tuple[int, Row]]:
        """`(how precisely the row names this class, row)`: the decoration above all, then the literal part of a glob."""
        declared = layers.declared(cls)
        forward_of = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
        names = {cls.__name__, forward_of.__name__, _qualified(cls), _qualified(forward_of)}
        for row, plain, globs in self.module_rows:
            if declared is not None and declared == row.layer:
                yield DECLARED, row
                continue
            fits = [len(name) for name in names & plain]
            fits += [_literal(glob) for glob in globs if any(fnmatchcase(name, glob) for name in names)]
            if fits:
                yield max(fits), row

    def _choose(self, path: str, module: nn.Module, target: str, ranked: tuple[tuple[int, Row], ...]) -> Claim | None:
        best: list[tuple[int, Row]] = []
        lacking: list[tuple[int, Row, tuple[str, ...]]] = []
        for rank, row in ranked:
            if row.at and not any(fnmatchcase(path, glob) for glob in row.at):
                continue
            missing = _missing(module, row)
            if missing is None:
                best.append((rank, row))
            elif rank:  # a row that names every class describes a structure: what lacks it is simply something else
                lacking.append((rank, row, missing))
        if not best:
            if not lacking:
                return None
            _, row, missing = max(lacking, key=lambda entry: entry[0])
            needs = " or ".join(need.replace("=", " that is a ") for need in missing)
            return row, target, "", f"has no {needs}, which a {row.layer} has"
        top = max(rank for rank, _ in best)
        rows = [row for rank, row in best if rank == top]
        if len(rows) > 1:
            raise PlanConflict(
                f"{path or 'the model itself'} ({target}) is claimed by {' and '.join(row.layer for row in rows)}",
                todo="Name the class more precisely in one of these rows' targets, or turn one of them off.",
            )
        condition = layers.condition(original(module)) if top == DECLARED else None
        if condition is not None and not condition(module):
            return rows[0], target, "", "its class declares a kernel_condition, which is false for it"
        return rows[0], target, "", ""

    def _functions(self, cls: type[Any]) -> Iterator[tuple[Row, str, str]]:
        """`(row, global name, function)` for the functions that the class's forward looks up as globals."""
        forward = cls.forward
        inner = inspect.unwrap(forward)
        scope = getattr(inner, "__globals__", {})
        for name in dict.fromkeys(_names(getattr(inner, "__code__", None))):
            decorated = _decoration(scope.get(name))
            for row, plain, globs in self.function_rows:
                if decorated == row.layer or name in plain or any(fnmatchcase(name, glob) for glob in globs):
                    if rebuild.looks_up(forward, name) is None:
                        yield row, name, _qualified(rebuild.found(forward, name))
                    break


DECLARED = 1 << 16  # above any glob


def _split(row: Row) -> tuple[frozenset[str], tuple[str, ...]]:
    """The targets that are plain names, and those that are globs: most are names, and a set is quicker asked."""
    plain = frozenset(target for target in row.targets if not set(target) & set("*?["))
    return plain, tuple(target for target in row.targets if target not in plain)


def _names(code: CodeType | None) -> Iterator[str]:
    """Names that `code`, or code nested in it, looks up anywhere but among its locals."""
    if code is not None:
        yield from code.co_names
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from _names(constant)


def _decoration(function: Any) -> str | None:
    """A function decorated for kernels is an instance of a generated module class that carries the layer's name."""
    found = getattr(type(function), "kernel_layer_name", None) or getattr(function, "kernel_layer_name", None)
    return found if isinstance(found, str) else None


def _literal(glob: str) -> int:
    return sum(c not in "*?[]!" for c in glob)


def _qualified(thing: Any) -> str:
    cls = thing if isinstance(thing, type) or hasattr(thing, "__qualname__") else type(thing)
    return f"{cls.__module__}.{cls.__qualname__}"


def _missing(module: nn.Module, row: Row) -> tuple[str, ...] | None:
    """The alternatives of which the row needs one and the module has none, or `None`. `act_fn=SiLU*` also asks for the class."""
    for alternatives in row.needs:
        for need in alternatives:
            if _has(module, need):
                break
        else:
            return alternatives
    return None


def _has(module: nn.Module, need: str) -> bool:
    name, _, glob = need.partition("=")
    value = _attribute(module, name)
    if value is None or not glob:
        return value is not None
    cls = original(value) if hasattr(value, "named_modules") else type(value)
    return fnmatchcase(cls.__name__, glob)


def _attribute(module: nn.Module, name: str) -> Any:
    """An attribute of the module itself: what `__getattr__` of a wrapper hands through from inside does not count."""
    for held in (vars(module), module._parameters, _children(module), module._buffers):  # noqa: SLF001  # see `_own`
        if name in held:
            return held[name]
    return getattr(module, name, None) if hasattr(type(module), name) else None


# -- the walk -----------------------------------------------------------------------------------------------------


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` under the paths that their sites have."""
    return {path: module for path, module, _ in _walk(model)}


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """`named_modules`, with every module's ancestors. Its order, and each module once."""
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", model, ())]
    while stack:
        path, module, parents = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module, parents
        inside = (*parents, module)
        children = [
            (f"{path}.{name}" if path else name, child, inside) for name, child in _children(module).items() if child is not None
        ]
        stack.extend(reversed(children))


def _place(module: nn.Module) -> tuple[str | None, str | None] | None:
    """`(device, dtype)` of the first floating tensor in or below `module`; the device is accelerate's where it moves inputs."""
    execution = _execution_device(module)
    tensor = next((t for t in _own(module) if t.is_floating_point()), None)
    if tensor is not None:
        return execution or str(tensor.device), str(tensor.dtype)
    for child in _children(module).values():
        below = _place(child) if child is not None else None
        if below is not None:
            return execution or below[0], below[1]
    tensor = next(_own(module), None)
    device = execution or (str(tensor.device) if tensor is not None else None)
    return None if device is None else (device, None)


# `parameters()`, `named_children()` and their like keep a set of what they have seen; asked of every module of a model, that is
# most of the time that finding its sites takes.


def _own(module: nn.Module) -> Iterator[Any]:
    for held in (module._parameters, module._buffers):  # noqa: SLF001  # see above
        yield from (tensor for tensor in held.values() if tensor is not None)


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    return module._modules  # noqa: SLF001  # see above


def _execution_device(module: nn.Module) -> str | None:
    """Where accelerate runs this module, which under offloading is not where its weights are."""
    hook = vars(module).get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())):
        device = getattr(one, "execution_device", None)
        if device is not None:
            import torch

            return str(torch.device(cast(Any, device)))
    return None
