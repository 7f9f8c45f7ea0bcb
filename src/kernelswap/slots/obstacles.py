"""Why a module cannot be swapped, and what a kernel that reads into submodules would go round.

A kernel that calls a submodule is fine whatever became of it. One that reads a parameter inside a submodule goes round
its forward, and with it round what lives there: an adapter, a quantiser, a hook that brings the weights. What a kernel
reads is written as in `reads.py`: `weight`, `gate_proj.weight`, `gate_proj()` for a call, `*` for anything.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .. import reads as notation
from . import classes
from .forwards import Form

if TYPE_CHECKING:
    import torch.nn as nn


def obstacle(module: nn.Module, reads: Iterable[str] = (), *, replacing: bool = False) -> str | None:
    """Why a kernel that reads the attributes `reads` cannot take this module, or `None`. `replacing`: a swap of ours on it
    is going to be undone first, so it is judged as the plain module that it will be.

    `reads` is written as in `reads.py`.
    """
    return _cannot_take(module, classes.original(module) if replacing else type(module)) or bypass(module, reads)


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
    if _is_peft(module):
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


def bypass(module: nn.Module, reads: Iterable[str], *, offloaded: bool = False) -> str | None:
    """What a kernel that reads these attributes would go round, or `None`. `offloaded`: whoever asks brings such weights itself."""
    import torch

    inside: dict[str, set[str]] = {}
    for read in _spelled_out(module, reads):
        *owners, name = read.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part, None)
        if owner is None:
            return f"the kernel reads {read}, which is not there"
        if owners and not isinstance(owner, torch.nn.Module):
            continue  # `config.hidden_act`
        value = getattr(owner, name, None)
        if owners and not hasattr(owner, name):
            return f"the kernel reads {read}, which its {type(owner).__name__} does not have"
        if isinstance(value, torch.nn.Module):
            inside.setdefault(read.partition(".")[0], set()).add(notation.ANYTHING)
        elif isinstance(value, torch.Tensor):
            if (why := _odd(value)) is not None:
                return f"the kernel reads {read}, which {why}"
            if owners:
                inside.setdefault(owners[0], set()).add(".".join((*owners[1:], name)))
    for child, names in inside.items():
        why = _rounds(module._modules.get(child), names, offloaded=offloaded)  # noqa: SLF001  # by name, without __getattr__
        if why is not None:
            what = child if notation.ANYTHING in names else f"{child}.{min(names)}"
            return f"the kernel reads {what} instead of calling {child}, which {why}"
    return None


def watched(module: nn.Module, reads: Iterable[str]) -> frozenset[str]:
    """The submodules whose replacement may make `bypass` say something else."""
    return frozenset(read.partition(".")[0] for read in _spelled_out(module, reads)) & frozenset(module._modules)  # noqa: SLF001  # names only


def _spelled_out(module: nn.Module, reads: Iterable[str]) -> Iterable[str]:
    """Without the calls, and with every attribute that `*` may mean."""
    reads = list(reads)
    if notation.ANYTHING in reads:
        held = (module._parameters, module._buffers, module._modules)  # noqa: SLF001  # names only
        reads += [name for one in held for name, value in one.items() if value is not None]
    return [read for read in reads if read != notation.ANYTHING and not read.endswith("()")]


def _rounds(child: nn.Module | None, names: set[str], *, offloaded: bool) -> str | None:  # noqa: PLR0911  # one return for each reason
    """Why reading `names` out of `child` is not the same as calling it, or `None`."""
    if child is None:
        return None
    anything = notation.ANYTHING in names
    for path, inner in child.named_modules():
        if _is_peft(inner):
            return f"is wrapped by PEFT ({type(child).__name__})"
        if not anything and not any(n.rpartition(".")[0] == path for n in names):
            continue
        if inner._forward_hooks or inner._forward_pre_hooks:  # noqa: SLF001  # there is no public way to ask
            return "has forward hooks"
        hook = vars(inner).get("_hf_hook")
        if not offloaded and any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            return "keeps its weights elsewhere between calls (accelerate)"
        if hook is None and "forward" in vars(inner) and not classes.own(vars(inner)["forward"], inner):
            return "has a forward of its own"
    if anything:
        return next((f"has {name}, which {why}" for name, p in child.named_parameters() if (why := _odd(p))), None)
    unread = sorted({name for name, _ in child.named_parameters()} - names)
    return f"also has {', '.join(unread)}, which the kernel does not read" if unread else None


def _is_peft(module: nn.Module) -> bool:
    return any(c.__module__.split(".")[0] == "peft" for c in type(module).__mro__)


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
