"""A KernelConfig and a model to what `Swapper.swap` takes. Reads the model; changes nothing, loads nothing.

A name in a config means, in this order: a layer of the table or of a decorator; a class of this model; a module path or a glob
over paths; a class that Transformers has and this model has not (which is said, and is no error: configs are for many models).
Anything else is a mistake, and all of them are reported at once.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import layers, sites, spec
from ... import table as tables
from ...errors import TableError
from ...types import Row, Site, SiteKind, Use
from .config import KernelConfig
from .mapping import Entry

if TYPE_CHECKING:
    import torch.nn as nn

_DECORATED = re.compile(
    r"^@use_kernel_(?:forward_from_hub|func_from_hub|func_from_hub_with_fallback)\(\s*\"(\w+)\"[^\n]*\)\s*\n(?:@[^\n]*\n)*(class|def) (\w+)",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Fuse:
    """Modules whose place a layout takes, for one kernel."""

    parent: str
    names: tuple[str, ...]
    """Of the children of `parent`."""
    use: Use
    layer: str
    layout: type[Any]
    single: bool
    """One module, made as it was made; else the layout is given the children."""

    @property
    def path(self) -> str:
        """Where the layout goes."""
        return f"{self.parent}.{self.names[0]}".lstrip(".")


LayoutOf = Callable[[Use, str], "type[Any] | str | None"]
"""The layout that the kernel's layer brings, for a module on a device; why it cannot be had; or that it needs none."""


@dataclass
class Wanted:
    """Arguments of `Swapper.swap`, and what else there is to say and to do."""

    rows: list[Row] = field(default_factory=list)
    prefer: dict[str, tuple[Use, ...]] = field(default_factory=dict)
    skip: list[str] = field(default_factory=list)
    trust: list[str] = field(default_factory=list)
    attention: list[tuple[str, tuple[Use, ...]]] = field(default_factory=list)
    """Classes of attention modules, and the kernels that were named for them."""
    alone: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Names that are to be left alone, on these devices or everywhere."""
    fused: list[Fuse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines for the user: names that mean nothing in this model."""

    @property
    def named(self) -> set[str]:
        """Every spec that the config names."""
        return {use.spec for row in self.rows for use in row.use} | {use.spec for uses in self.prefer.values() for use in uses}


def want(
    model: nn.Module, config: KernelConfig | None, table: Sequence[Row], *, has_layer: Callable[[str], bool], layout_of: LayoutOf
) -> Wanted:
    """What `config` wants of `model`, for a Swapper that starts from `table`.

    `has_layer(spec)`: whether the kernel has a layer of that name; asked for attention classes alone, whose kernel may also
    be one that offers functions.

    Raises:
        TableError: a name means nothing; every one is reported, with the nearest that does.
    """
    wanted = Wanted(rows=_with_targets(model, table))
    if config is None:
        return wanted
    names = _Names(model, table)
    problems: list[str] = []
    for entry in config.entries():
        uses = tuple(replace(use, spec=_at_known_version(use.spec, table)) for use in entry.uses)
        wanted.trust += entry.trust
        wanted.alone += [(name, entry.off_on) for name in entry.names if entry.off or entry.off_on]
        if entry.fused:
            problems += _several(replace(entry, uses=uses), model, wanted, layout_of)
            continue
        for name in entry.names:
            if name == "attention":  # what the model says computes it, and no layer
                wanted.attention += [(name, uses)] if uses else []
                continue
            if _single(name, uses, names, wanted, layout_of):
                continue
            problem = _one(name, replace(entry, uses=uses), names, wanted, has_layer)
            if problem is not None:
                problems.append(problem)
    if problems:
        raise TableError("\n".join(problems), asked=f"applying a KernelConfig to {type(model).__name__}")
    _around(wanted, names)
    return wanted


# -- layers that come with a layout -----------------------------------------------------------------------------------


def _several(entry: Entry, model: nn.Module, wanted: Wanted, layout_of: LayoutOf) -> list[str]:
    """Add an entry of pairs (layer, glob over paths) to `wanted`; its problems."""
    what = "|".join("=".join(pair) for pair in entry.fused)
    patterns = [path.rpartition(".") for _, path in entry.fused]
    parents = {parent for parent, _, _ in patterns}
    if len(parents) > 1 or not all(parents):
        return [f"{what}: modules that one kernel replaces have one parent, as model.layers.*.norm and model.layers.*.mlp"]
    children = tuple(child for _, _, child in patterns)
    parent = re.compile(r"\w+".join(map(re.escape, parents.pop().split("*"))))
    here = [(path, module) for path, module in model.named_modules() if parent.fullmatch(path)]
    if not here:
        return [f"{what}: no module of this model is at {entry.fused[0][1].rpartition('.')[0]}"]
    lacking = {child: path for path, module in here for child in children if child not in dict(module.named_children())}
    if lacking:
        return [f"{what}: {path} has no {child}" for child, path in lacking.items()]
    for path, module in here:
        _add(wanted, path, children, module.get_submodule(children[0]), entry.uses, layout_of, single=False)
    return []


def _single(name: str, uses: tuple[Use, ...], names: _Names, wanted: Wanted, layout_of: LayoutOf) -> bool:
    """Whether the modules that `name` means get a layout, because a kernel that is named for them brings one."""
    if not any(isinstance(layout_of(use, device), type) for use in uses for device in names.devices):
        return False
    known = [
        s.path for s in names.sites if s.kind == "module" and (sites.named_by(name, s) or s.path in names.classes.get(name, []))
    ]
    paths = [path for path in known or names.classes.get(name, []) if path]
    for path in paths:
        parent, _, child = path.rpartition(".")
        _add(wanted, parent, (child,), names.model.get_submodule(path), uses, layout_of, single=True)
    return bool(paths)


def _add(  # all that a Fuse holds
    wanted: Wanted,
    parent: str,
    children: tuple[str, ...],
    module: nn.Module,
    uses: tuple[Use, ...],
    layout_of: LayoutOf,
    *,
    single: bool,
) -> None:
    """The first kernel whose layout can be had; a line for each that was tried before it."""
    device = str(next((t.device for t in module.state_dict().values()), "cpu"))
    for use in uses:
        layer = spec.parse(use.spec).layer or ""
        found = layout_of(use, device)
        if isinstance(found, type):
            wanted.fused.append(Fuse(parent, children, use, layer, found, single))
            row = Row(
                layer if layer not in {r.layer for r in tables.default()} else found.__name__,
                targets=(found.__name__,),
                use=(use,),
            )
            wanted.rows += [row] if row not in wanted.rows else []
            return
        if not single and (line := f"{use.spec}: {found or f'it brings no {layer}Layout'}; PyTorch goes on") not in wanted.notes:
            wanted.notes.append(line)


def _around(wanted: Wanted, names: _Names) -> None:
    """What else was said of modules that a layout replaces is moot."""
    gone = {f"{fuse.parent}.{name}" for fuse in wanted.fused for name in fuse.names}

    def inside(path: str) -> bool:
        return any(path == one or path.startswith(f"{one}.") for one in gone) and path in set(names.paths)

    wanted.skip = [path for path in wanted.skip if not inside(path)]
    wanted.prefer = {path: uses for path, uses in wanted.prefer.items() if not inside(path)}


# -- names ------------------------------------------------------------------------------------------------------------


def _one(  # noqa: PLR0911  # one return for each thing that a name can mean
    name: str, entry: Entry, names: _Names, wanted: Wanted, has_layer: Callable[[str], bool]
) -> str | None:
    """Add one name to `wanted`; the problem, if it means nothing."""
    if name in names.layers:
        wanted.rows.append(Row(name, use=entry.uses, off=entry.off))
        _skip_on(entry, [site for site in names.sites if site.layer == name], wanted)
        return None
    if name in names.decorated:
        kind, targets = names.decorated[name]
        wanted.rows.append(Row(name, kind=kind, targets=targets, use=entry.uses, off=entry.off))
        return None
    if name in names.classes:
        _class(name, entry, names, wanted, has_layer)
        return None
    if here := [site for site in names.sites if sites.named_by(name, site)]:
        if entry.off:
            wanted.skip.append(name)
        elif entry.uses:
            wanted.prefer[name] = entry.uses
        _skip_on(entry, here, wanted)
        return None
    if any(fnmatchcase(path, name) or fnmatchcase(path, f"*.{name}") for path in names.paths):
        wanted.notes.append(f"{name}: nothing below it is known to the table of kernels")
        return None
    if _is_of_transformers(name):
        near = sorted({cls for cls in names.classes if cls.endswith(re.sub(r"^[A-Z]+[a-z0-9_]*", "", name) or name)})
        wanted.notes.append(f"{name}: this model has none" + (f" (it has {', '.join(near)})" if near else ""))
        return None
    return _unknown(name, names)


def _class(name: str, entry: Entry, names: _Names, wanted: Wanted, has_layer: Callable[[str], bool]) -> None:
    paths = set(names.classes[name])
    here = [site for site in names.sites if site.path in paths]
    of_class = [site for site in here if site.kind == "module"]
    if entry.off:
        wanted.skip += _paths(here)
    elif entry.uses and "Attention" in name and not of_class and not any(has_layer(use.spec) for use in entry.uses):
        wanted.attention.append((name, entry.uses))
    elif of_class:
        wanted.prefer.update(dict.fromkeys(_paths(of_class), entry.uses))
    elif entry.uses:  # none: it speaks only of devices on which to leave it alone
        wanted.rows.append(Row(name, targets=(name,), use=entry.uses))
    _skip_on(entry, here, wanted)


def _unknown(name: str, names: _Names) -> str:
    known = [*names.layers, *names.decorated, *names.classes, "attention", *names.paths]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if near:
        return f"{name}: is nothing in this model, did you mean {near[0]}?"
    offered = ", ".join(sorted({site.layer for site in names.sites})) or "nothing that the table of kernels knows"
    return f"{name}: is no layer, class or module path of this model, which has {offered}"


def _paths(found: Iterable[Site]) -> list[str]:
    return list(dict.fromkeys(site.path for site in found if site.path))


def _skip_on(entry: Entry, found: Sequence[Site], wanted: Wanted) -> None:
    """Leave alone what is on a device where the entry says so."""
    off = set(entry.off_on)
    wanted.skip += _paths(site for site in found if _type(site.device) in off)


def _type(device: str) -> str:
    kind = device.partition(":")[0]
    torch = sys.modules.get("torch")
    return "rocm" if kind == "cuda" and torch is not None and torch.version.hip else kind


def _at_known_version(text: str, table: Sequence[Row]) -> str:
    """A spec without a version, at the version that the table names for the same repository, if it does."""
    asked = spec.parse(text)
    if asked.source != "hub" or asked.layer is None or (asked.version, asked.revision, asked.constraints) != (None, None, None):
        return text
    for row in table:
        for use in row.use:
            known = spec.parse(use.spec)
            if known.source == "hub" and known.name == asked.name and known.version is not None:
                return f"{asked.name}@{known.version}:{asked.layer}"
    return text


# -- what names mean in a model -------------------------------------------------------------------------------------


class _Names:
    """Everything that can be named in a model. What takes a walk is made when it is first asked for."""

    def __init__(self, model: nn.Module, table: Sequence[Row]) -> None:
        self.model, self.table = model, tables.merge(table, _with_targets(model, table))
        declared = {layers.declared(sites.original(module)) for module in model.modules()}
        self.layers = {row.layer for row in table} | {name for name in declared if name is not None}

    @functools.cached_property
    def decorated(self) -> dict[str, tuple[SiteKind, tuple[str, ...]]]:
        """Layers that the sources of the model's classes decorate, and what: for rows that the table has not."""
        return {name: found for name, found in _decorated(self.model).items() if name not in self.layers}

    @functools.cached_property
    def classes(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for path, module in self.model.named_modules():
            cls = sites.original(module)
            forward_of = next((c for c in cls.__mro__ if "forward" in vars(c)), cls)
            for name in {cls.__name__, forward_of.__name__}:
                found.setdefault(name, []).append(path)
        return found

    @functools.cached_property
    def devices(self) -> set[str]:
        return {str(p.device) for p in self.model.parameters()} or {"cpu"}

    @functools.cached_property
    def paths(self) -> list[str]:
        return [path for path, _ in self.model.named_modules() if path]

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        return sites.find(self.model, self.table)


def _with_targets(model: nn.Module, table: Sequence[Row]) -> list[Row]:
    """Rows of layers that only a decorator names, for models whose decorators did nothing when they were imported."""
    bare = {row.layer for row in table if not row.targets}
    if not bare:
        return []
    return [Row(layer, kind=kind, targets=targets) for layer, (kind, targets) in _decorated(model).items() if layer in bare]


def _decorated(model: nn.Module) -> dict[str, tuple[SiteKind, tuple[str, ...]]]:
    """`{layer: (kind, names)}` as the sources of the modules that define the model's classes have it.

    Transformers' decorators leave no trace unless `kernels` is installed in a version that it accepts, so the sources are read.
    """
    found: dict[str, tuple[SiteKind, tuple[str, ...]]] = {}
    for name in dict.fromkeys(sites.original(module).__module__ for module in model.modules()):
        for layer, what, target in _decorations(getattr(sys.modules.get(name), "__file__", None) or ""):
            kind: SiteKind = "module" if what == "class" else "function"
            known = found.get(layer, (kind, ()))[1]
            found[layer] = kind, (*known, *(() if target in known else (target,)))
    return found


@functools.lru_cache(maxsize=256)
def _decorations(path: str) -> tuple[tuple[str, str, str], ...]:
    try:
        text = Path(path).read_text(encoding="utf-8") if path.endswith(".py") else ""
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(_DECORATED.findall(text))


@functools.lru_cache(maxsize=256)
def _is_of_transformers(name: str) -> bool:
    """Whether some model of Transformers has a class of that name. Nothing is imported: the sources are searched."""
    found = importlib.util.find_spec("transformers") if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        return False
    for folder in Path(next(iter(found.submodule_search_locations)), "models").glob("*/"):
        if not name.lower().startswith(folder.name.replace("_", "")[:4]):
            continue
        for path in folder.glob("modeling_*.py"):
            if re.search(rf"^class {name}\b", path.read_text(encoding="utf-8"), re.MULTILINE):
                return True
    return False


def attention_spec(use: Use) -> str:
    """The attention kernel that a config's `org/repo:Layer` for an attention class means, where there is no such layer."""
    asked: Any = spec.parse(use.spec)
    return use.spec.removesuffix(f":{asked.layer}")
