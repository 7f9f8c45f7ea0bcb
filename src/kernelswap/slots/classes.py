"""The classes of swapped modules, and how a module moves between them.

A swapped module has a subclass of its own class, one step down, with the same name and another `forward`. Which subclass
depends on its mode, and on how far its kernels are proven; equal needs share one class, so that 28 layers have the same
type and compiled code guards on one. A move is one assignment to `__class__`; nothing is decided per call:

* `train()`, `eval()` and any other write of `training` lands in a descriptor that moves the module. It defines no
  `__get__`, so that reading `training` finds the instance's own value, as ever.
* accelerate keeps the forward under its hook in `_old_forward`. A descriptor answers with the forward of the class of
  the moment, and cleans up the instance attribute that removing a hook leaves behind.
* `.to()`, `.half()`, `.cuda()` end in `_apply`: where dtype or device changed, verdicts no longer hold.
* a kernel that reads parameters of a submodule steps aside when that submodule is replaced, by LoRA for instance.
* pickles name the original class: a saved file needs no kernelswap.
"""

from __future__ import annotations

import copy
import copyreg
import functools
import sys
import weakref
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

from . import forwards, state
from .forwards import Form
from .state import MARK, Slot

if TYPE_CHECKING:
    import torch.nn as nn


def ours(cls: type[Any]) -> type[Any] | None:
    """The class of ours in the ancestry of `cls`: itself, or below what wrapped the module later (FSDP2)."""
    return next((c for c in cls.__mro__ if MARK in vars(c)), None)


def form(cls: type[Any]) -> Form:
    """What a class of ours was made from."""
    return cast(Form, vars(cls)[MARK])


def original(module: nn.Module) -> type[Any]:
    """The class of `module` as it was before any swap of ours; wrappers that came later do not count."""
    mine = ours(type(module))
    return type(module) if mine is None else form(mine).base


def form_for(slot: Slot, *, training: bool) -> Form:
    """What the module should be in this mode, by what is known now."""
    part, kernels, functions = slot.module_part, [], {}
    if part is not None and (kernel := part.serving(training=training)) is not None:
        kernels.append((part, kernel))
    else:  # a swapped forward leaves its functions moot
        for p in slot.function_parts:
            if (kernel := p.serving(training=training)) is not None:
                functions[p.site.name] = forwards.Kernel.of(kernel, p.norms)
                kernels.append((p, kernel))
    standings = [(p, p.service(training=training)) for p, _ in kernels]
    checking = bool(kernels) and (bool(slot.every) or any(s.standing == "open" for _, s in standings))
    return Form(
        slot.base,
        kernel=None if functions or not kernels else forwards.Kernel.of(kernels[0][1]),
        functions=tuple(functions.items()),
        checking=checking,
        traced=checking and all(s.standing == "accepted" or _trusted(slot, p, s) for p, s in standings),
        counting=slot.counting,
        watched=slot.watched,
        ahead=not training and not checking and bool(functions),
        after=None if training or checking else _after(slot),
    )


def _after(slot: Slot) -> type[Any] | None:
    """The class of ours that the layers before this norm have, once they go ahead. Of several, what was made last."""
    if slot.after is None or slot.counting:
        return None
    made = [cls for cls, _ in list(slot.classes.values()) if form(cls).base is slot.after and forwards.goes_ahead(cls)]
    return cast("type[Any] | None", made[-1] if made else None)


def _trusted(slot: Slot, part: state.Part, service: state.Service) -> bool:
    """Compiled code never checks. Asked to compile, the proof on random tensors must do, where there was one."""
    verdict = service.choice.verdict
    return slot.compiled and bool(part.site.row.probe) and verdict is not None and verdict.accepted


# -- moving -------------------------------------------------------------------------------------------------------


def place(slot: Slot, module: nn.Module) -> None:
    """Give `module` the class that it should have now. What wrapped it since stays around it."""
    move(module, class_for_mode(slot, training=vars(module).get("training", True)))


def unchecked(slot: Slot, module: nn.Module) -> Callable[..., Any]:
    """The forward of the class that the module has, or would have were its calls not checked."""
    return cast(Callable[..., Any], class_for_mode(slot, training=module.training, unchecked=True).forward)


def class_for_mode(slot: Slot, *, training: bool, unchecked: bool = False) -> type[Any]:
    """The class that the module should have in a mode.

    Found by what decides a form, without making one: this runs for every module at every `train()` and `eval()`.
    """
    key = (
        training,
        unchecked,
        slot.base,
        slot.counting,
        slot.watched,
        *((p.swap.site.name, id(p.inference.choice.implementation), id(p.training.choice.implementation)) for p in slot.parts),
        *((p.training if training else p.inference).standing for p in slot.parts),
        *((bool(p.away), p.norms) for p in slot.parts),
        *(_trusted(slot, p, p.training if training else p.inference) for p in slot.parts if slot.compiled),
        None if training else _after(slot),
    )
    found = slot.classes.get(key)
    if found is None:
        wanted = form_for(slot, training=training)
        after = make(wanted._replace(checking=False, traced=False))  # what cannot be made fails now, not after a verdict
        cls = after if unchecked else make(wanted)
        # with the implementations, so that no other one gets their ids
        found = slot.classes[key] = cls, [(p.inference.kernel, p.training.kernel) for p in slot.parts]
    return cast(type[Any], found[0])


def move(module: nn.Module, cls: type[Any]) -> None:
    """Replace our class of `module` by `cls`. A module whose class is no longer ours is left alone."""
    now = type(module)
    mine = ours(now)
    if mine is None or mine is cls:
        return
    assign(module, cls if mine is now else _rebased(now, mine, cls))


def assign(module: nn.Module, cls: type[Any]) -> None:
    """Make `module` a `cls`, so that everyone notices."""
    # not `module.__class__ = ...`: nn.Module.__setattr__ would look through all parameters first
    object.__setattr__(module, "__class__", cls)
    # torch.compile of 2.9 to 2.12 takes a module whose dicts have not changed for one whose type has not changed, and would
    # go on with the code of the former class. 1 is True: whoever reads in between reads the same.
    held = vars(module)
    training = held.get("training")
    if isinstance(training, bool):
        held["training"] = int(training)
        held["training"] = training


def _rebased(wrapper: type[Any], mine: type[Any], cls: type[Any]) -> type[Any]:
    """The class that `wrapper` would be, had the module been `cls` when it was wrapped. Toggling leads back to the first."""
    root, root_mine = vars(wrapper).get(_ROOT, (wrapper, mine))
    if root_mine is cls and _body(root) == _body(wrapper):
        return cast(type[Any], root)
    known = _REBASED.get((root, cls))
    if known is not None and _body(known) == _body(wrapper):
        return known
    bases = tuple(cls if b is mine else _rebased(b, mine, cls) if issubclass(b, mine) else b for b in wrapper.__bases__)
    metaclass: Any = type(wrapper)
    made = cast(type[Any], metaclass(wrapper.__name__, bases, {**_body(wrapper), _ROOT: (root, root_mine)}))
    _REBASED[root, cls] = made
    return made


_ROOT = "__kernelswap_root__"
_REBASED: weakref.WeakValueDictionary[tuple[type[Any], type[Any]], type[Any]] = weakref.WeakValueDictionary()


def _body(cls: type[Any]) -> dict[str, Any]:
    return {k: v for k, v in vars(cls).items() if k not in {"__dict__", "__weakref__", _ROOT}}


# -- making -------------------------------------------------------------------------------------------------------

_CLASSES: weakref.WeakValueDictionary[Form, type[Any]] = weakref.WeakValueDictionary()


def make(wanted: Form) -> type[Any]:
    """The class for a form; equal forms share it.

    Raises:
        TypeError: the base does not let itself be subclassed.
    """
    cls = _CLASSES.get(wanted)
    if cls is None:
        base = wanted.base
        body = {
            MARK: wanted,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "training": _LIVE,
            "_old_forward": _UNDER_HOOK,
            **_methods(base),
            **(getattr(wanted.kernel.forward, "beside", {}) if wanted.kernel is not None else {}),
            **({"__setattr__": _setattr(base, wanted.watched)} if wanted.watched else {}),
        }
        forward = forwards.make(wanted)
        if forward is not None:
            body["forward"] = forward
        metaclass: Any = type(base)
        cls = cast(type[Any], metaclass(base.__name__, (base,), body))
        _CLASSES[wanted] = cls
    return cls


class _Live:
    """`training`, with a setter only: writing it moves the module, reading it is a plain look into the instance."""

    def __set__(self, module: nn.Module, value: bool) -> None:  # noqa: FBT001  # a descriptor's signature
        vars(module)["training"] = value
        slot = state.find(module)
        if slot is not None:
            place(slot, module)
            return
        mine = ours(type(module))  # an instance that nobody recorded, e.g. `type(module)(...)`: a plain one
        if mine is not None:
            move(module, form(mine).base)


class _UnderHook:
    """`_old_forward`: what accelerate calls under its hook, and what it puts back when the hook goes."""

    def __get__(self, module: nn.Module | None, cls: type[Any]) -> Any:
        if module is None:
            return self
        try:
            held = vars(module)["_old_forward"]
        except KeyError:
            raise AttributeError("_old_forward") from None
        return MethodType(type(module).forward, module) if own(held, module) else held

    def __set__(self, module: nn.Module, value: Any) -> None:
        mine = ours(type(module))
        if mine is not None and own(value, module):
            value = MethodType(form(mine).base.forward, module)  # what it is without us: undo has nothing to repair
        vars(module)["_old_forward"] = value

    def __delete__(self, module: nn.Module) -> None:
        try:
            del vars(module)["_old_forward"]
        except KeyError:
            raise AttributeError("_old_forward") from None
        if own(vars(module).get("forward"), module):
            del vars(module)["forward"]  # would hide the class's forward, in every mode


_LIVE, _UNDER_HOOK = _Live(), _UnderHook()


def own(method: object, module: nn.Module) -> bool:
    """Whether `method` is the class's own forward, the original one or one of ours, bound to `module`."""
    if not isinstance(method, MethodType) or method.__self__ is not module:
        return False
    function, mine = method.__func__, ours(type(module))
    base = form(mine).base if mine is not None else type(module)
    if function is base.forward or function is type(module).forward or hasattr(function, forwards.MARK):
        return True
    slot = state.find(module)
    kernels = [s.kernel for p in slot.parts for s in (p.inference, p.training)] if slot is not None else []
    return any(k is not None and k.forward is function for k in kernels)


def _setattr(base: Any, watched: frozenset[str]) -> Callable[[Any, str, Any], None]:
    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807  # becomes the method of that name
        base.__setattr__(self, name, value)
        if name in watched:
            slot = state.find(self)
            if slot is not None:
                slot.conduct.reconsider(slot, self)

    return __setattr__


def _methods(base: Any) -> dict[str, Any]:
    """What every class of ours over `base` has."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807  # becomes the method of that name
        reduced = base.__reduce_ex__(self, protocol)
        return as_original(reduced, ours(type(self)), base) if isinstance(reduced, tuple) else reduced

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807  # same
        theirs = getattr(base, "__deepcopy__", None)
        if theirs is not None:
            twin = theirs(self, memo)
        else:
            twin = _blank(type(self))
            memo[id(self)] = twin
            vars(twin).update(copy.deepcopy(vars(self), memo))
        return _adopt(twin, self)

    def __copy__(self: Any) -> Any:  # noqa: N807  # same
        theirs = getattr(base, "__copy__", None)
        if theirs is not None:
            twin = theirs(self)
        else:
            twin = _blank(type(self))
            vars(twin).update(vars(self))
        return _adopt(twin, self)

    def _replicate_for_data_parallel(self: Any) -> Any:
        replica = base._replicate_for_data_parallel(self)  # noqa: SLF001  # the hook that DataParallel calls
        slot = state.find(self)
        if slot is not None:
            state.remember(replica, slot)  # it lives for one call: what it learns is for its source
        return replica

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        slot = state.find(self)
        before = None if slot is None else slot.whereabouts(self)
        result = base._apply(self, *args, **kwargs)  # noqa: SLF001  # what .to(), .half(), .cuda() end in
        if slot is not None and (after := slot.whereabouts(self, *args)) != before:
            slot.conduct.moved(slot, self, after)
        return result

    found = {f.__name__: f for f in (__reduce_ex__, __deepcopy__, __copy__, _replicate_for_data_parallel, _apply)}
    return found if hasattr(base, "__deepcopy__") else {**found, "__deepcopy__": _ForDeepcopy(__deepcopy__)}


class _ForDeepcopy:
    """`__deepcopy__` for `copy.deepcopy` alone. It asks the object, not the class, and what wraps a module and passes on whatever
    it does not have itself (PEFT, torch.compile) would otherwise be copied as the module inside.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, module: Any, cls: type[Any]) -> Any:
        if module is not None and sys._getframe(1).f_code is not copy.deepcopy.__code__:  # noqa: SLF001  # who asks decides
            raise AttributeError("__deepcopy__")
        return self.function if module is None else MethodType(self.function, module)


def _blank(cls: Any) -> Any:
    return cls.__new__(cls)


def _adopt(twin: Any, source: Any) -> Any:
    """A copy is as swapped as its source, and on its own from then on: undoing the source does not touch it."""
    slot = state.find(source)
    if slot is not None and ours(type(twin)) is not None and state.find(twin) is None:
        state.remember(twin, slot.twin())
    return twin


def as_original(reduced: tuple[Any, ...], mine: type[Any] | None, base: Any) -> tuple[Any, ...]:
    """What `__reduce_ex__` gave for an instance of `mine`, so that a `base` is made of it."""
    function: Any
    function, args, *rest = reduced
    if function is copyreg.__newobj__ and args and args[0] is mine:  # type: ignore[attr-defined]  # not in the stubs
        # pickle insists that __newobj__ names the object's present class; these two do the same and may name another
        plain = len(args) == 1 and base.__new__ is object.__new__
        function, args = (copyreg._reconstructor, (base, object, None)) if plain else (base.__new__, (base, *args[1:]))  # type: ignore[attr-defined]  # noqa: SLF001  # what protocol 1 names
    elif function is copyreg.__newobj_ex__ and args[0] is mine:  # type: ignore[attr-defined]  # not in the stubs
        function, args = functools.partial(base.__new__, base, *args[1], **args[2]), ()
    else:
        function, args = (base if function is mine else function), tuple(base if a is mine else a for a in args)
    return function, args, *rest
