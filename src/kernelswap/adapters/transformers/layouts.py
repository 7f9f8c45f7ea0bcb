"""Layers that keep their weights in shapes of their own, and layers that take the place of several modules; of one model.

A kernel `K` may come with a class `KLayout` beside it: what holds the weights as `K` reads them, under other names or joined,
and `conversion_mapping`, which says how a checkpoint's weights become those. `fuse` puts such a layout in the place of modules
that are loaded; `unfuse` puts those modules back, the same objects.

* The forward of a layout is that of the modules which it replaced, on its own weights taken apart again. So there is an original
  to hold the kernel against, and one that serves where the kernel cannot.
* What has no way back bit for bit is not fused: the conversion is undone and compared, for every parent, before anything is written.
* `state_dict`, `load_state_dict` and pickles speak of the modules that were replaced. Only `named_parameters` shows the layout.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import UndoConflict
from ...slots import module as module_slot
from ...slots.obstacles import bypass
from . import layout_offload as offload
from .conversion import USED, Declined, steps, tensors
from .layout_classes import HELD, PARENT, Fusion, layout_class, parent_class

if TYPE_CHECKING:
    import torch.nn as nn
    from torch import Tensor

__all__ = ["USED", "Declined", "attempt", "constructed", "fuse", "layouts", "unfuse"]


# -- in ---------------------------------------------------------------------------------------------------------------


def attempt(*wanted: Any) -> str | None:
    """`fuse`; why not, where it declined."""
    try:
        fuse(*wanted)
    except Declined as e:
        return str(e)
    return None


def fuse(
    model: nn.Module, parent: str, names: Sequence[str], layout: type[Any], arguments: tuple[Any, ...] | None = None
) -> nn.Module:
    """Put an instance of `layout` in the place of the children `names` of the module at `parent`; it is returned.

    `arguments`: `(args, kwargs)` for its constructor; without them it is given the children.

    Raises:
        Declined: it cannot take their place.
    """
    import torch

    holder, names = model.get_submodule(parent), tuple(names)
    originals = tuple(getattr(holder, name) for name in names)
    children = dict(zip(names, originals, strict=True))
    config = getattr(model, "config", None)
    hooks = offload.hooks(children)
    weights = _judge(model, holder, children, away=bool(hooks))
    kept = offload.Kept(children, hooks) if hooks else None
    plain = offload.without_hooks(originals) if hooks else originals
    args, kwargs = arguments if arguments is not None else (plain, {})
    device = next((t.device for t in weights.values()), torch.device("cpu"))
    try:
        with torch.random.fork_rng(devices=[]), device:
            made: nn.Module = layout_class(layout, originals[0])(*args, **kwargs)
    except Exception as e:  # a kernel's constructor may raise anything, and says what it does not like
        raise Declined(f"{layout.__name__} raised {type(e).__name__}: {e}") from e
    transforms = getattr(layout, "conversion_mapping", ())
    base = "" if hasattr(model, getattr(model, "base_model_prefix", "") or " ") else getattr(model, "base_model_prefix", "")
    found = steps(transforms, tuple(weights), f"{parent}.", names[0], (f"{base}." if base else ""))
    fusion = Fusion(names, originals, found, config, plain)
    if kept is not None:
        weights = {
            n: torch.nn.Parameter(kept[n], t.requires_grad) if isinstance(t, torch.nn.Parameter) else kept[n]
            for n, t in weights.items()
        }
    with torch.no_grad():
        _fill(made, fusion, weights)
        apart = fusion.taken_apart(made)
    changed = [name for name, t in weights.items() if not (t.shape == apart[name].shape and torch.equal(t, apart[name]))]
    if changed:
        raise Declined(f"taken apart again, {', '.join(changed)} is not what it was")
    with torch.enable_grad():
        flows = fusion.taken_apart(made)
    stuck = [name for name, t in weights.items() if t.requires_grad and not flows[name].requires_grad]
    if stuck:
        raise Declined(f"no gradient flows back through the conversion of {', '.join(stuck)}")
    if kept is None:
        _empty(made, weights)
        _put(holder, made, fusion, {})
    else:
        converted = offload.Converted(kept, found, names[0], config)
        _put(holder, made, fusion, offload.follow(made, children, converted, hooks))
    return made


def _judge(model: nn.Module, holder: nn.Module, children: Mapping[str, nn.Module], *, away: bool) -> dict[str, Tensor]:
    """The weights of the children, where nothing stands in the way. `away`: they are offloaded.

    Raises:
        Declined: something does.
    """
    weights = tensors(children)
    why = bypass(holder, children, offloaded=away)
    if why is not None:
        raise Declined(why)
    if not away and (lost := [name for name, t in weights.items() if t.is_meta]):
        raise Declined(f"{', '.join(lost)} is not loaded")
    for name, child in children.items():
        state = set(child.state_dict())
        if left := [n for n, _ in child.named_buffers() if n not in state]:
            raise Declined(f"{name} holds {', '.join(left)}, which no checkpoint has")
    everywhere = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    here = Counter(id(p) for child in children.values() for _, p in child.named_parameters(remove_duplicate=False))
    if tied := [name for name, t in weights.items() if everywhere[id(t)] > here[id(t)]]:
        raise Declined(f"{', '.join(tied)} is shared with another module")
    return weights


def _fill(layout: nn.Module, fusion: Fusion, weights: Mapping[str, Tensor]) -> None:
    """Give the layout its weights: the very parameters where only the name is another.

    Raises:
        Declined: they do not fit, or some are missing.
    """
    import torch

    first = fusion.names[0]
    asked = tensors({first: layout})
    given: dict[str, Tensor] = {}
    for step in fusion.steps:
        made = step.forth(weights, fusion.config) if step.operations else {}
        sources = [weights[n] for names in step.sources.values() for n in names]
        trains = any(t.requires_grad for t in sources)
        for target in step.targets.values():
            given[target] = torch.nn.Parameter(made[target].detach(), trains) if step.operations else sources[0]
    if extra := [name for name in given if name not in asked]:
        raise Declined(f"it has no {', '.join(extra)}")
    if left := [name for name, t in asked.items() if name not in given and isinstance(t, torch.nn.Parameter)]:
        raise Declined(f"its conversion_mapping brings no {', '.join(left)}")
    if other := [name for name, t in given.items() if t.shape != asked[name].shape]:
        shapes = ", ".join(f"{name} is {tuple(asked[name].shape)}, its weights are {tuple(given[name].shape)}" for name in other)
        raise Declined(shapes)
    for name, tensor in given.items():
        path, _, last = name.removeprefix(f"{first}.").rpartition(".")
        owner = layout.get_submodule(path)
        held = owner._parameters if last in owner._parameters else owner._buffers  # noqa: SLF001  # torch has no other way to put a given Parameter in the place of another
        held[last] = tensor  # type: ignore[assignment]  # a Parameter where there was one


def _empty(layout: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Let go of the originals' weights that the layout has in another form."""
    import torch

    kept = {id(t) for t in layout.state_dict(keep_vars=True).values()}
    for tensor in weights.values():
        if id(tensor) not in kept:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def _put(holder: nn.Module, layout: nn.Module, fusion: Fusion, others: Mapping[str, nn.Module]) -> None:
    """`others`: what takes the place of an original that is not the first, where it is no plain Identity."""
    import torch

    vars(layout)[HELD] = fusion
    layout.train(fusion.originals[0].training)
    for name in fusion.names:
        empty = (others.get(name) or torch.nn.Identity()).train(layout.training)
        holder._modules[name] = layout if name == fusion.names[0] else empty  # noqa: SLF001  # in its place, without __setattr__ of a parent
    if PARENT not in vars(type(holder)):
        object.__setattr__(holder, "__class__", parent_class(type(holder)))


# -- out --------------------------------------------------------------------------------------------------------------


def layouts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """`(path, layout)` of everything that was put into `model`, or into what it is a copy of."""
    for path, module in model.named_modules():
        if HELD in vars(module):
            yield path, module


def unfuse(model: nn.Module, only: Sequence[str] | None = None) -> None:
    """Put the modules back that layouts replaced; `only`: those at these paths. Kernels must be taken out of them before.

    Raises:
        UndoConflict: something wrapped a layout or its parent since; nothing was changed.
    """
    import torch

    found = [(path, layout) for path, layout in layouts(model) if only is None or path in only]
    for path, layout in found:
        parent = model.get_submodule(path.rpartition(".")[0])
        if PARENT not in vars(type(parent)) or module_slot.original(layout) is not type(layout):
            raise UndoConflict(f"{path} or its parent was wrapped since, by {type(parent).__name__}; undo that first")
    for path, layout in found:
        parent, fusion = model.get_submodule(path.rpartition(".")[0]), vars(layout)[HELD]
        held = tensors({fusion.names[0]: layout})
        with torch.no_grad():
            apart = fusion.taken_apart(layout)
        if away := fusion.plain is not fusion.originals and offload.released(layout):
            offload.release(fusion.originals)
        for step in fusion.steps if away or fusion.plain is fusion.originals else ():
            trains = any(held[name].requires_grad for name in step.targets.values())
            for name in (n for names in step.sources.values() for n in names):
                child, _, inner = name.partition(".")
                below, _, last = inner.rpartition(".")
                owner = fusion.originals[fusion.names.index(child)].get_submodule(below)
                if not step.operations:
                    mine = owner._parameters if last in owner._parameters else owner._buffers  # noqa: SLF001  # as above
                    mine[last] = held[step.targets[""]]
                    continue
                if away:
                    owner._parameters[last] = torch.nn.Parameter(apart[name].detach(), trains)  # noqa: SLF001  # as above
                    continue
                tensor = getattr(owner, last)
                tensor.data = apart[name].detach()
                tensor.requires_grad_(trains)
        for name, original in zip(fusion.names, fusion.originals, strict=True):
            original.train(layout.training)
            parent._modules[name] = original  # noqa: SLF001  # as above
        if not any(HELD in vars(child) for child in parent.children()):
            object.__setattr__(parent, "__class__", vars(type(parent))[PARENT])


# -- constructors -----------------------------------------------------------------------------------------------------

_making: threading.local = threading.local()


def constructed(model: Any, paths: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """`{path: (args, kwargs)}`: what the modules at `paths` were made with, seen while the model is made again without weights.

    Raises:
        Declined: it cannot be made again.
    """
    import torch

    classes = {module_slot.original(model.get_submodule(path)) for path in paths}
    former = {cls: vars(cls).get("__init__") for cls in classes}
    seen: dict[int, tuple[Any, Any]] = {}
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # noqa: SLF001  # whichever it is: nothing is computed, and nothing may be fetched
    with _lock:
        for cls in classes:
            cls.__init__ = _recording(cls)
        try:
            _making.seen = seen
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                twin = module_slot.original(model)(config)
        except Exception as e:
            raise Declined(f"{type(model).__name__} cannot be made from its config again: {e}") from e
        finally:
            _making.seen = None
            for cls, init in former.items():
                if init is None:
                    del cls.__init__
                else:
                    cls.__init__ = init
    return {path: seen[id(m)] for path, m in twin.named_modules() if path in set(paths) and id(m) in seen}


_lock = threading.RLock()


def _recording(cls: Any) -> Any:
    init = cls.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # becomes the method of that name
        seen = getattr(_making, "seen", None)  # of this thread: others go on making models meanwhile
        if seen is not None and type(self) is cls:
            seen[id(self)] = args, kwargs
        init(self, *args, **kwargs)

    return __init__
