"""Install and restore a swap on one module, and why one cannot be installed.

`install` is the last step: everything that could fail was asked before, by `obstacle`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from ..errors import PlanConflict, UndoConflict
from ..types import Prover, Swap
from . import classes, rebuild, state
from .check import Conduct
from .forwards import Form
from .state import Part, Service, Slot, Standing

if TYPE_CHECKING:
    import torch.nn as nn


def original(module: nn.Module) -> type[Any]:
    """The class of `module` as it was before any swap of ours; wrappers that came later do not count."""
    mine = classes.ours(type(module))
    return type(module) if mine is None else classes.form(mine).base


def install(
    module: nn.Module,
    swaps: Sequence[Swap],
    prover: Prover,
    *,
    every: int | None = 0,
    compiled: bool = False,
    shared: dict[Any, Any] | None = None,
) -> Slot:
    """Swap `module`'s forward, or functions that it looks up, as the `swaps` say; all of them are for this module.

    Args:
        module: with no `obstacle`.
        swaps: at most one of kind module, any number of kind function.
        prover: asked at the first call; at every n-th too where `every` is n > 0; never where it is None.
        every: see `prover`.
        compiled: compiled code may hold a kernel that was only proven on random tensors.
        shared: one dict for everything that is installed together, with the same `every` and `compiled`.

    Raises:
        PlanConflict: two swaps for one place, or the module is swapped already. Nothing was changed.
        LookupError: a function is not looked up. Nothing was changed.
    """
    path = swaps[0].site.path or "the model itself"
    if classes.ours(type(module)) is not None:
        raise PlanConflict(f"{path} is swapped already", todo="Undo that swap first.")
    if len(swaps) > 1 and len({(s.site.kind, s.site.name) for s in swaps}) < len(swaps):
        raise PlanConflict(f"two swaps claim {path}", todo="Leave one of them out.")
    standing: Standing = "accepted" if every is None else "open"
    parts = tuple(Part(s, Service(s.inference, standing), Service(s.training, standing)) for s in swaps)
    shared = {} if shared is None else shared
    slot = Slot(type(module), parts, prover, CONDUCT, every=every, compiled=compiled, classes=shared)
    both = [classes.class_for_mode(slot, training=training) for training in (False, True)]  # all that can fail, now
    held = vars(module)
    if "forward" in held and "_old_forward" not in held:
        slot.leftover = held.pop("forward")
    state.remember(module, slot)
    object.__setattr__(module, "__class__", both[held.get("training", True)])
    return slot


def conflict(slot: Slot) -> str | None:
    """Why `restore` would not leave the module as it was, or `None`."""
    module = slot.ref() if slot.ref is not None else None
    if module is None or state.find(module) is not slot:
        return None
    path = slot.parts[0].site.path or "the model itself"
    now, mine = type(module), classes.ours(type(module))
    if now is slot.base:
        return None
    if mine is None:
        return f"{path} is now a {now.__module__}.{now.__qualname__}, which is not what was installed"
    if mine is not now:
        return f"{path} is now a {now.__name__}, wrapped around the {slot.base.__name__} after the swap"
    wrapper = vars(module).get("_old_forward", vars(module).get("forward"))  # below accelerate's hook, if there is one
    if wrapper is not None and _holds(wrapper, module):
        return f"{path} has a forward of its own now, set after the swap, which calls what it found then"
    return None


def restore(slot: Slot) -> None:
    """Give the module back as it was. One that is gone, or plain again, is left alone.

    Raises:
        UndoConflict: something wrapped the module after the swap; undo that first. Nothing was changed.
    """
    why = conflict(slot)
    if why is not None:
        raise UndoConflict(why, todo="Undo what wrapped it first, then this swap.")
    module = slot.ref() if slot.ref is not None else None
    if module is None or state.find(module) is not slot:
        return
    state.forget(module)
    if type(module) is not slot.base:
        object.__setattr__(module, "__class__", slot.base)
    if slot.leftover is not None:
        vars(module).setdefault("forward", slot.leftover)


def release(module: nn.Module) -> None:
    """Take the swap off this one module, whoever installed it; for copies, which no handle knows.

    Raises:
        UndoConflict: as `restore`.
    """
    slot = state.find(module)
    if slot is not None:
        restore(slot)


def _holds(wrapper: Any, module: nn.Module) -> bool:
    """Whether an instance-level forward holds one that the class had while it was swapped."""
    inside = [getattr(wrapper, "__wrapped__", None), getattr(wrapper, "func", None), *getattr(wrapper, "args", ())]
    function = wrapper.__func__ if isinstance(wrapper, MethodType) else wrapper
    if isinstance(function, FunctionType):
        inside += [content for _, content in rebuild.cells(function)]
        inside += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    base = original(module).forward
    return any(classes.own(held, module) and held.__func__ is not base for held in (wrapper, *inside))


# -- why not ------------------------------------------------------------------------------------------------------


def obstacle(module: nn.Module, reads: Iterable[str] = (), *, replacing: bool = False) -> str | None:
    """Why a kernel that reads the attributes `reads` cannot take this module, or `None`. `replacing`: a swap of ours on it
    is going to be undone first, so it is judged as the plain module that it will be.

    A kernel that calls a submodule is fine whatever became of it. One that reads a parameter inside a submodule goes
    round its forward, and with it round what lives there: an adapter, a quantiser, a hook that brings the weights.
    """
    return _cannot_take(module, original(module) if replacing else type(module)) or bypass(module, reads)


def _cannot_take(module: nn.Module, cls: type[Any]) -> str | None:
    if classes.ours(cls) is not None:
        return "it is swapped already; undo that swap first"
    return _class_obstacle(cls) or _adapter(module) or _instance_obstacle(module)


_OBSTACLES: weakref.WeakKeyDictionary[type[Any], str | None] = weakref.WeakKeyDictionary()


def _class_obstacle(cls: type[Any]) -> str | None:
    if cls not in _OBSTACLES:
        _OBSTACLES[cls] = _judge_class(cls)
    return _OBSTACLES[cls]


def _judge_class(cls: type[Any]) -> str | None:
    import torch
    from torch.nn.modules.lazy import LazyModuleMixin

    holder = next((c for c in cls.__mro__ if "forward" in vars(c)), torch.nn.Module)
    held = vars(holder)["forward"]
    dynamo = cls.__name__ == "OptimizedModule" and cls.__module__.startswith("torch._dynamo")
    checks = (
        (issubclass(cls, torch.jit.ScriptModule), "it is TorchScript, whose forward is not Python"),
        (issubclass(cls, torch.fx.GraphModule), "it is a torch.fx graph, which writes its own forward"),
        (issubclass(cls, LazyModuleMixin), "it is lazy: its parameters do not exist before its first call"),
        (dynamo, "it is what torch.compile returned; the module inside it can be swapped"),
        (holder is torch.nn.Module, "it has no forward"),
        (isinstance(held, (staticmethod, classmethod, property)), f"its forward is a {type(held).__name__}"),
    )
    why = next((why for so, why in checks if so), None)
    if why is not None:
        return why
    try:
        classes.make(Form(cls))
    except Exception as e:  # noqa: BLE001  # a metaclass or __init_subclass__ may raise anything; the reason is returned
        return f"its class does not let itself be subclassed: {e}"
    return None


def _adapter(module: nn.Module) -> str | None:
    if any(c.__module__.split(".")[0] == "peft" for c in type(module).__mro__):
        return f"it is PEFT's {type(module).__name__}"
    if "parametrizations" in module._modules:  # noqa: SLF001  # what torch.nn.utils.parametrize.is_parametrized asks
        return "it is parametrized (torch.nn.utils.parametrize), which takes its class back on removal"
    return None


def _instance_obstacle(module: nn.Module) -> str | None:
    held = vars(module).get("forward")
    if held is None:
        return None
    if "_hf_hook" in vars(module) and "_old_forward" in vars(module):
        held = vars(module)["_old_forward"]
        return None if classes.own(held, module) else "accelerate's hook wraps a forward that was set on this very instance"
    # a forward that some tools leave behind on the instance is the class's own: `install` lays it aside
    return None if classes.own(held, module) else f"its forward was replaced on this very instance, by {_name(held)}"


def bypass(module: nn.Module, reads: Iterable[str]) -> str | None:
    """What a kernel that reads these attributes would go round, or `None`."""
    import torch

    inside: dict[str, set[str]] = {}
    for read in reads:
        *owners, name = read.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part, None)
        if owners and not isinstance(owner, torch.nn.Module):
            if owner is None:
                return f"the kernel reads {read}, which is not there"
            continue
        value = getattr(owner, name, None)
        if owners and not hasattr(owner, name):
            return f"the kernel reads {read}, which {_article(owner)} does not have"
        if isinstance(value, torch.Tensor):
            why = _odd(value)
            if why is not None:
                return f"the kernel reads {read}, which {why}"
            if owners:
                inside.setdefault(owners[0], set()).add(".".join((*owners[1:], name)))
    for child, names in inside.items():
        why = _rounds(module._modules.get(child), names)  # noqa: SLF001  # by name, without __getattr__
        if why is not None:
            return f"the kernel reads {child}.{min(names)} instead of calling {child}, which {why}"
    return None


def _rounds(child: nn.Module | None, names: set[str]) -> str | None:
    """Why reading `names` out of `child` is not the same as calling it, or `None`."""
    if child is None:
        return None
    for path, inner in child.named_modules():
        if any(c.__module__.split(".")[0] == "peft" for c in type(inner).__mro__):
            return f"is wrapped by PEFT ({type(child).__name__})"
        if not any(n.rpartition(".")[0] == path for n in names):
            continue
        if inner._forward_hooks or inner._forward_pre_hooks:  # noqa: SLF001  # there is no public way to ask
            return "has forward hooks"
        hook = vars(inner).get("_hf_hook")
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            return "keeps its weights elsewhere between calls (accelerate)"
        if hook is None and "forward" in vars(inner) and not classes.own(vars(inner)["forward"], inner):
            return "has a forward of its own"
    unread = sorted({name for name, _ in child.named_parameters()} - names)
    return f"also has {', '.join(unread)}, which the kernel does not read" if unread else None


def _odd(tensor: Any) -> str | None:
    """Why a tensor is not what a kernel takes it for, or `None`."""
    import torch

    kind = type(tensor)
    if isinstance(tensor, torch.nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex()):
        return f"is quantised ({tensor.dtype})"
    if kind.__module__.split(".")[0] == "torch":  # Tensor, Parameter, DTensor (FSDP2 hands out plain ones inside a call)
        return "is not loaded yet" if "Uninitialized" in kind.__name__ else None
    return f"is a {kind.__name__} ({kind.__module__.split('.')[0]})"


def _name(function: Any) -> str:
    function = getattr(function, "func", function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _article(module: nn.Module) -> str:
    return f"its {type(module).__name__}"


def swapped(model: nn.Module) -> Iterator[nn.Module]:
    """Every swapped module of `model`."""
    for module in model.modules():
        if classes.ours(type(module)) is not None:
            yield module


CONDUCT = Conduct(bypass)
