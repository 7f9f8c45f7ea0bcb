"""`Kernel` to `Implementation`: read the `layers` contract, and check it against what it will stand in for.

A layer is a subclass of `nn.Module` without state or constructor of its own, of which only `forward` is used: it will be
bound to the original module and read that module's parameters. A function may be a layer too, in `layers` or at the top
of the kernel.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import keyword
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, cast

from . import reads
from .errors import LayerMismatch, UnknownKernel
from .types import Implementation, Kernel

if TYPE_CHECKING:
    import torch.nn as nn

_MARKS = ("can_torch_compile", "has_backward")
_READS_LOCALS = {"locals", "vars", "eval", "exec", "dir"}


# -- what a kernel offers ---------------------------------------------------------------------------------------------


def implementation(kernel: Kernel, layer: str) -> Implementation:
    """`layers.<layer>` of the kernel, or a function of that name in `layers` or at its top.

    Raises:
        UnknownKernel: it offers nothing of that name; the message lists what it offers.
        LayerMismatch: it does, but not as a layer: state, a constructor, public members, no forward.
    """
    value = _look_up(kernel, layer)
    if inspect.isclass(value):
        return _of_class(kernel, layer, value)
    return _of_function(kernel, layer, value)


def function(kernel: Kernel, name: str) -> Implementation:
    """As `implementation`, for the place of a function: a layer class that reads nothing of `self` serves there as well.

    Raises:
        UnknownKernel, LayerMismatch: as `implementation`; also for a class whose forward needs a module.
    """
    found = implementation(kernel, name)
    if found.kind == "function":
        return found
    if found.reads:
        needs = ", ".join(found.reads)
        raise LayerMismatch(
            f"{name} is a layer that reads {needs} of its module; a function has none", asked=_asked(kernel, name)
        )
    return replace(found, kind="function", forward=_look_up(kernel, name)().forward)


def offers(kernel: Kernel) -> tuple[str, ...]:
    """Names that `implementation` takes, sorted: first the classes of `layers`, then functions."""
    layers = _layers(kernel)
    classes = {n for n in _public(layers) if _is_layer(kernel, getattr(layers, n, None))} if layers is not None else set()
    functions = {n for m in (layers, kernel.module) if m is not None for n in _public(m) if _is_own(kernel, getattr(m, n, None))}
    return (*sorted(classes), *sorted(functions - classes))


def layout(kernel: Kernel, layer: str) -> type[nn.Module] | None:
    """The class `<layer>Layout` beside a layer, which holds the weights as the layer reads them; `None` where there is none.

    Raises:
        UnknownKernel: the kernel has no such layer.
    """
    import torch.nn as nn

    value = _look_up(kernel, layer)
    home = sys.modules.get(getattr(value, "__module__", ""))
    found = getattr(home, f"{getattr(value, '__name__', layer)}Layout", None)
    return found if inspect.isclass(found) and issubclass(found, nn.Module) else None


def _look_up(kernel: Kernel, name: str) -> Any:
    asked = _asked(kernel, name)
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise UnknownKernel(f"{name!a} cannot be the name of a layer: one plain name, no dots, no leading _", asked=asked)
    layers = _layers(kernel)
    for module in (layers, kernel.module):
        value = getattr(module, name, None) if module is not None else None
        if value is None or isinstance(value, ModuleType):
            continue
        if inspect.isclass(value) and module is kernel.module and module is not layers:
            continue  # classes count as layers only where the contract says
        if inspect.isclass(value) or _is_own(kernel, value):
            return value
    offered = offers(kernel)
    close = difflib.get_close_matches(name, offered, n=1, cutoff=0.6)
    raise UnknownKernel(
        f"it has no layer {name}; it offers {', '.join(offered) or 'none'}",
        asked=asked,
        todo=f"Did you mean {close[0]}?" if close else None,
    )


def _layers(kernel: Kernel) -> Any:
    """A module `layers`, or a class that serves as one, as Transformers' own guide to writing kernels has it."""
    found = getattr(kernel.module, "layers", None)
    return found if isinstance(found, ModuleType) or (inspect.isclass(found) and _is_ours(kernel, found)) else None


def _public(module: ModuleType) -> list[str]:
    return [
        name for name in getattr(module, "__all__", None) or vars(module) if isinstance(name, str) and not name.startswith("_")
    ]


def _is_layer(kernel: Kernel, value: object) -> bool:
    """A class of this kernel that can be one; those imported from torch are not offered."""
    return inspect.isclass(value) and _is_ours(kernel, value) and not list(_class_problems(value))


def _is_own(kernel: Kernel, value: Any) -> bool:
    """A function to offer: of this kernel, or compiled (operators and native functions do not say where they are from)."""
    if inspect.isclass(value) or isinstance(value, ModuleType) or not callable(value):
        return False
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return _is_ours(kernel, value) or getattr(value, "__module__", None) is None
    if isinstance(value, MethodType):  # `apply` of an autograd function
        owner = value.__self__
        return _is_ours(kernel, owner if inspect.isclass(owner) else type(owner))
    return type(value).__module__ != "typing"  # an operator, a Triton function, a partial


def _is_ours(kernel: Kernel, value: Any) -> bool:
    home = str(getattr(value, "__module__", None))
    return home == kernel.module.__name__ or home.startswith(kernel.module.__name__ + ".")


def _asked(kernel: Kernel, name: str) -> str:
    return (
        f"{str(kernel.artifact.candidate.requirement).partition(':')[0]}:{name}"
        if name.isidentifier()
        else str(kernel.artifact.candidate.requirement)
    )


# -- the contract -----------------------------------------------------------------------------------------------------


def _of_class(kernel: Kernel, layer: str, cls: type[Any]) -> Implementation:
    problems = list(_class_problems(cls))
    if problems:
        raise LayerMismatch("\n".join(f"{layer} {problem}" for problem in problems), asked=_asked(kernel, layer))
    return Implementation(
        layer=layer,
        kind="module",
        forward=cast(Any, cls).forward,
        backward=getattr(cls, "has_backward", True),
        compiles=getattr(cls, "can_torch_compile", False),
        origin=kernel.artifact,
        reads=reads.of(cast(Any, cls).forward),
    )


def _of_function(kernel: Kernel, layer: str, value: Callable[..., Any]) -> Implementation:
    problems = list(_mark_problems(value))
    if problems:
        raise LayerMismatch("\n".join(f"{layer} {problem}" for problem in problems), asked=_asked(kernel, layer))
    return Implementation(
        layer=layer,
        kind="function",
        forward=value,
        backward=getattr(value, "has_backward", True),
        compiles=getattr(value, "can_torch_compile", False),
        origin=kernel.artifact,
    )


def _class_problems(cls: type[Any]) -> Iterator[str]:
    import torch.nn as nn

    if not issubclass(cls, nn.Module):
        yield "is not a subclass of nn.Module"
        return
    if cls.__init__ is not nn.Module.__init__ or cls.__new__ is not nn.Module.__new__ or type(cls) is not type(nn.Module):
        yield "has a constructor; it never runs, so a layer has none"
    extra = sorted(name for name in set(dir(cls)) - set(dir(nn.Module)) - set(_MARKS) if not name.startswith("_"))
    if extra:
        yield f"has public members besides forward: {', '.join(extra)}"
    yield from _mark_problems(cls)
    forward = inspect.getattr_static(cls, "forward", None)
    if forward is inspect.getattr_static(nn.Module, "forward"):
        yield "has no forward"
    elif not isinstance(forward, FunctionType):
        yield f"has a forward that is a {type(forward).__name__}, not a method"
    else:
        yield from _forward_problems(cls, forward)


def _forward_problems(cls: type[Any], forward: FunctionType) -> Iterator[str]:
    import torch.nn as nn

    if "__class__" in inspect.unwrap(forward).__code__.co_freevars:
        yield "uses super() in forward, which cannot be bound to the original module"
    own = {name for base in cls.__mro__[: cls.__mro__.index(nn.Module)] for name in vars(base)} - set(dir(nn.Module))
    used = sorted(own & {reads.root(read) for read in reads.of(forward)})
    if used:
        yield f"uses members of its own in forward that the original lacks: {', '.join(used)}"


def _mark_problems(value: object) -> Iterator[str]:
    for mark in _MARKS:
        if not isinstance(getattr(value, mark, False), bool):
            yield f"says {getattr(value, mark)!r:.40} for {mark}, expected True or False"


# -- against the original ---------------------------------------------------------------------------------------------


def mismatch(impl: Implementation, original: Callable[..., Any]) -> str | None:
    """Why `impl.forward` cannot be called in every way that `original` can, with the same meaning; or `None`.

    `original` is the unbound forward (or the class that has it) for a module, the function itself for a function. Asked for
    every target, never cached. The rule, by position:

    * as many parameters, each of the same kind (positional-only in the original may be nameable in the kernel);
    * the same names, except that required positional parameters may be called differently, as `x` for `hidden_states`,
      as long as no name changes its place; `fit` then gives the kernel the original's names, so that callers that name
      the argument are served too. A forward that cannot be renamed (compiled, or wrapped) must have the names itself;
    * what the original lets a caller leave out, the kernel does too, with an equal default.
    """
    if inspect.isclass(original):
        original = cast(Any, original).forward
    try:
        ours, theirs = _parameters(impl.forward), _parameters(original)
    except (TypeError, ValueError):
        return "its signature cannot be read" if not _has_signature(impl.forward) else "the original's signature cannot be read"
    if impl.kind == "module":
        ours, theirs = ours[1:], theirs[1:]  # self
    if len(ours) != len(theirs):
        return f"takes ({_names(ours)}) where the original takes ({_names(theirs)})"
    swapped = {p.name for p in ours} & {p.name for p in theirs}
    for our, their in zip(ours, theirs, strict=True):
        why = _parameter_mismatch(our, their, swapped)
        if why is not None:
            return why
    if _new_names(ours, theirs) and not _can_rename(impl.forward):
        return f"takes ({_names(ours)}), cannot be renamed, and a caller may name the original's ({_names(theirs)})"
    return None


def fit(impl: Implementation, original: Callable[..., Any]) -> Implementation:
    """`impl` with the original's parameter names, where `mismatch` allowed others. The same object if there is nothing to do.

    The forward is a copy of the function with other names in its code object: no frame more, the same globals, closure
    and source lines.
    """
    if inspect.isclass(original):
        original = cast(Any, original).forward
    skip = 1 if impl.kind == "module" else 0
    names = _new_names(_parameters(impl.forward)[skip:], _parameters(original)[skip:])
    return replace(impl, forward=_renamed(cast(FunctionType, impl.forward), names)) if names else impl


def _parameter_mismatch(our: inspect.Parameter, their: inspect.Parameter, shared: set[str]) -> str | None:
    widened = their.kind is their.POSITIONAL_ONLY and our.kind is our.POSITIONAL_OR_KEYWORD
    if our.kind is not their.kind and not widened:
        return f"its {our.name} is {our.kind.description}, the original's {their.name} is {their.kind.description}"
    if our.kind in {our.VAR_POSITIONAL, our.VAR_KEYWORD}:
        return None
    required = their.default is their.empty
    if our.name != their.name and (their.kind is their.KEYWORD_ONLY or not required or {our.name, their.name} & shared):
        return f"has {our.name} where the original has {their.name}"
    if not required and our.default is our.empty:
        return f"requires {our.name}, which the original lets a caller leave out"
    if not required and not _equal(our.default, their.default):
        return f"defaults {our.name} to {our.default!r:.40}, the original to {their.default!r:.40}"
    return None


def _new_names(ours: list[inspect.Parameter], theirs: list[inspect.Parameter]) -> tuple[tuple[str, str], ...]:
    nameable = {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return tuple(
        (our.name, their.name)
        for our, their in zip(ours, theirs, strict=False)
        if our.name != their.name and their.kind in nameable
    )


def _can_rename(forward: Callable[..., Any]) -> bool:
    """A plain function, whose signature is its own and whose locals nobody looks up by name."""
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__") or hasattr(forward, "__signature__"):
        return False
    return not any(_READS_LOCALS & set(code.co_names) for code in _codes(forward.__code__))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=4096)
def _renamed(forward: FunctionType, names: tuple[tuple[str, str], ...]) -> FunctionType:
    """Locals are numbered in the code, so other names change nothing else; a local that has a new name already gives way."""
    code = forward.__code__
    new = dict(names)
    new |= {
        name: f"{name}__"
        for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars)
        if name in new.values() and name not in new
    }

    def renamed(found: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new.get(name, name) for name in found)

    copy = FunctionType(
        code.replace(
            co_varnames=renamed(code.co_varnames), co_cellvars=renamed(code.co_cellvars), co_freevars=renamed(code.co_freevars)
        ),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__qualname__, copy.__module__, copy.__doc__ = forward.__qualname__, forward.__module__, forward.__doc__
    copy.__annotations__ = {new.get(name, name): kind for name, kind in forward.__annotations__.items()}
    copy.__dict__.update(forward.__dict__)
    return copy


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Raises TypeError or ValueError where there is no signature to read."""
    function = getattr(function, "_init_fn", function)  # torch.library.custom_op: the function that it was made from
    schema = getattr(getattr(function, "default", function), "_schema", None)  # torch.ops.<namespace>.<name>
    if schema is None:
        return list(inspect.signature(function).parameters.values())
    kinds = {False: inspect.Parameter.POSITIONAL_OR_KEYWORD, True: inspect.Parameter.KEYWORD_ONLY}
    return [
        inspect.Parameter(
            a.name, kinds[a.kwarg_only], default=a.default_value if a.has_default_value() else inspect.Parameter.empty
        )
        for a in schema.arguments
    ]


def _has_signature(function: Callable[..., Any]) -> bool:
    try:
        _parameters(function)
    except (TypeError, ValueError):
        return False
    return True


def _names(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)


def _equal(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and repr(one) == repr(other))  # `==` of tensors is a tensor


# -- classes that ask to be served --------------------------------------------------------------------------------------


def declared(cls: type[Any]) -> str | None:
    """The class's `kernel_layer_name`, if it was given to the forward in effect: a subclass that overrides forward is not
    taken for its parent, one that only marks or only inherits is.
    """
    owner = _declares(cls)
    name = vars(owner)["kernel_layer_name"] if owner is not None else None
    return name if isinstance(name, str) else None


def condition(cls: type[Any]) -> Callable[[nn.Module], bool] | None:
    """The `kernel_condition` that came with `declared(cls)`, if any."""
    owner = _declares(cls)
    found = getattr(owner, "kernel_condition", None) if owner is not None else None
    return cast("Callable[[nn.Module], bool]", found) if callable(found) else None


def _declares(cls: type[Any]) -> type[Any] | None:
    marked = next((c for c in cls.__mro__ if "kernel_layer_name" in vars(c)), None)
    defines = next((c for c in cls.__mro__ if "forward" in vars(c)), None)
    if marked is None or (defines is not None and cls.__mro__.index(defines) < cls.__mro__.index(marked)):
        return None
    return marked
