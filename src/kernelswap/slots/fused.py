"""Passages of a module's forward as function sites: where they are, the forward that calls them, and who may answer the call.

A kernel for a passage is given the norms as modules and reads their weights. It answers only where calling the norms would
do nothing else: each is of the very class that was proved, or of ours over it, with no hook and no forward of its own, and
its weight is an ordinary parameter where the tensors are and of their dtype. In any other call, and under tracing, the
statements are run as they stand, norms as modules. All this holds of projections too, which are `torch.nn.Linear` and have biases.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, cast

from . import passages, rebuild, source
from .passages import PREFIX, Passage
from .state import MARK, Norms

if TYPE_CHECKING:
    import torch.nn as nn

Function = Callable[..., Any]

# -- in a forward ---------------------------------------------------------------------------------------------------

_FOUND: weakref.WeakKeyDictionary[FunctionType, dict[str, tuple[Passage, ...] | str]] = weakref.WeakKeyDictionary()
_CODE: weakref.WeakKeyDictionary[FunctionType, dict[frozenset[str], CodeType]] = weakref.WeakKeyDictionary()


def find(forward: Function, pattern: str) -> tuple[Passage, ...] | str:
    """The passages of a forward, decorators looked through; or why there can be none."""
    inner = _inner(forward)
    if inner is None:
        return "its forward is not a plain Python function"
    known = _FOUND.setdefault(inner, {})
    if pattern not in known:
        try:
            known[pattern] = passages.find(inner, pattern)
        except source.Unreadable as e:
            known[pattern] = f"its forward {e}"
    return known[pattern]


def opened(forward: Function, names: Iterable[str]) -> Function:
    """`forward` with the passages of these names as calls of their own meaning. Names that it looks up already, or that are of
    no passage, are not looked at.

    Raises:
        LookupError: it has no such passage.
    """
    wanted = frozenset(name for name in names if name.startswith(PREFIX) and rebuild.looks_up(forward, name) is not None)
    inner = _inner(forward)
    if not wanted or inner is None:
        return forward
    chosen = {
        p.name: p for pattern in passages.PATTERNS for p in _several(find(forward, pattern)) if p.name in wanted and not p.why
    }
    if len(chosen) < len(wanted):
        raise LookupError(f"its forward has no {', '.join(sorted(wanted - set(chosen)))}")
    codes = _CODE.setdefault(inner, {})
    if wanted not in codes:
        codes[wanted] = passages.rewritten(inner, chosen.values())
    names_ = {name: passage.plain for name, passage in chosen.items()}
    other = source.made(inner, codes[wanted], rebuild.scope(inner, names_))
    return cast(Function, rebuild.replaced(forward, inner, other))


def goes_ahead(forward: Function) -> bool:
    """Whether `forward` begins with a norm of what it is given and ends with a sum, as `ahead` wants it."""
    return bool(_several(find(forward, "ahead")))


def norms(forward: Function, name: str) -> tuple[str, ...]:
    """The attributes that the call of a passage is given first; none where `name` is no passage of `forward`."""
    if not name.startswith(PREFIX):
        return ()
    found = (p for pattern in passages.PATTERNS for p in _several(find(forward, pattern)) if p.name == name)
    return next((p.norms for p in found), ())


def is_or_ours(kind: type[Any], cls: type[Any]) -> bool:
    """Whether `kind` is `cls`, or the class of a swapped `cls`; what somebody else made of it is not."""
    return kind is cls or (kind.__bases__ == (cls,) and MARK in vars(kind))


def _several(found: tuple[Passage, ...] | str) -> tuple[Passage, ...]:
    return () if isinstance(found, str) else found


def _inner(forward: Function) -> FunctionType | None:
    inner = inspect.unwrap(forward)
    return inner if isinstance(inner, FunctionType) and rebuild.replaced(forward, inner, inner) is not None else None


def obstacle(module: nn.Module, name: str) -> str | None:
    """Why a kernel for the passage `name` would not answer for this module that it calls, as that is now, or `None`."""
    held, projection = vars(module), name.startswith(f"{PREFIX}projections")
    it = "a projection that it calls" if projection else "a norm that it calls"
    if projection and (why := _not_linear(module)) is not None:
        return f"{it} {why}"
    if "forward" in held:
        return f"{it} has a forward of its own"
    if any(held[name] for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")):
        return f"{it} has hooks"
    return None


def _not_linear(module: nn.Module) -> str | None:
    import torch

    cls = type(module)
    if not is_or_ours(cls, torch.nn.Linear):
        return f"is a {cls.__name__} ({cls.__module__.partition('.')[0]}), not torch's own Linear"
    hook = vars(module).get("_hf_hook")
    if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
        return "keeps its weights elsewhere between calls (accelerate)"
    weight = vars(module)["_parameters"].get("weight")
    if type(weight) is not torch.nn.Parameter or not weight.is_floating_point():
        kind = "no parameter" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        return f"has a weight that is {kind}, not an ordinary one"
    return None


def twice(modules: Iterable[nn.Module]) -> str | None:
    """Why modules that are one module under several names are not given to a kernel, or `None`."""
    modules = list(modules)
    return "two of the modules that it calls are one" if len(set(map(id, modules))) < len(modules) else None


# -- in a call ------------------------------------------------------------------------------------------------------


def standing_back(kernel: Function, plain: Function, classes: Norms) -> Function:
    """What the forward calls: the kernel where it may answer, else `plain`. Its `serving` says which, of the same arguments.

    A kernel with a `serving` of its own, for some sizes of calls, is asked as well.
    """
    of: dict[int, Callable[..., Function]] = {1: _of_one, 2: _of_two, 3: _of_three}
    made = of[len(classes)](kernel, plain, *classes)
    sizes = getattr(kernel, "serving", None)
    if sizes is not None:
        may = made.serving  # type: ignore[attr-defined]  # every one of these has it
        made.serving = lambda *given: may(*given) and sizes(*given)  # type: ignore[attr-defined]  # same
    return made


def _of_one(kernel: Function, plain: Function, cls: type[Any]) -> Function:
    tensor, elsewhere, fine = *asked(), idle(cls)

    def serving(norm: nn.Module, residual: Any, hidden: Any) -> bool:
        return (
            not elsewhere()
            and type(hidden) is tensor
            and type(residual) is tensor
            and residual.dtype is hidden.dtype
            and residual.shape == hidden.shape
            and fine(norm, hidden)
        )

    def residual_norm(norm: nn.Module, residual: Any, hidden: Any) -> Any:
        if serving(norm, residual, hidden):
            return kernel(norm, residual, hidden)
        return plain(norm, residual, hidden)

    residual_norm.serving = serving  # type: ignore[attr-defined]  # as on kernels that serve some sizes only
    return residual_norm


def _of_two(kernel: Function, plain: Function, q_cls: type[Any], k_cls: type[Any]) -> Function:
    tensor, elsewhere, idle_q, idle_k = *asked(), idle(q_cls), idle(k_cls)

    def serving(q_norm: nn.Module, k_norm: nn.Module, q: Any, k: Any, cos: Any, sin: Any) -> bool:
        return (
            not elsewhere()
            and type(q) is type(k) is type(cos) is type(sin) is tensor
            and q.dtype is k.dtype is cos.dtype is sin.dtype
            and idle_q(q_norm, q)
            and idle_k(k_norm, k)
        )

    def norm_rotary(q_norm: nn.Module, k_norm: nn.Module, q: Any, k: Any, cos: Any, sin: Any) -> Any:
        if serving(q_norm, k_norm, q, k, cos, sin):
            return kernel(q_norm, k_norm, q, k, cos, sin)
        return plain(q_norm, k_norm, q, k, cos, sin)

    norm_rotary.serving = serving  # type: ignore[attr-defined]  # same
    return norm_rotary


def _of_three(kernel: Function, plain: Function, *classes: type[Any]) -> Function:
    tensor, elsewhere, fine = *asked(), [_idle_linear(cls) for cls in classes]
    fine_q, fine_k, fine_v = fine

    def serving(q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, hidden: Any) -> bool:
        return (
            not elsewhere()
            and type(hidden) is tensor
            and fine_q(q_proj, hidden)
            and fine_k(k_proj, hidden)
            and fine_v(v_proj, hidden)
        )

    def projections(q_proj: nn.Module, k_proj: nn.Module, v_proj: nn.Module, hidden: Any) -> Any:
        if serving(q_proj, k_proj, v_proj, hidden):
            return kernel(q_proj, k_proj, v_proj, hidden)
        return plain(q_proj, k_proj, v_proj, hidden)

    projections.serving = serving  # type: ignore[attr-defined]  # same
    return projections


def asked() -> tuple[type[Any], Callable[[], bool]]:
    """The class of ordinary tensors; and whether this is no place for a kernel: traced, under torch.func, every module hooked."""
    import torch
    from torch.nn.modules import module as hooks

    compiling, tracing = torch.compiler.is_compiling, torch._C._get_tracing_state  # noqa: SLF001  # what torch.jit.is_tracing asks
    transformed = torch._C._functorch.peek_interpreter_stack  # noqa: SLF001  # inside grad, vmap, jvp, ...; no public way to ask
    before, after = hooks._global_forward_pre_hooks, hooks._global_forward_hooks  # noqa: SLF001  # as Module.__call__ asks
    above, below = hooks._global_backward_hooks, hooks._global_backward_pre_hooks  # noqa: SLF001  # same

    def elsewhere() -> bool:
        return bool(compiling() or before or after or above or below or transformed() is not None or tracing() is not None)

    return torch.Tensor, elsewhere


def idle(cls: type[Any]) -> Callable[[nn.Module, Any], bool]:
    """Whether a call of a norm would be that of its class and nothing else, on a weight that is as the tensor given is."""
    import torch

    parameter, known = torch.nn.Parameter, {cls}

    def asked_of(norm: nn.Module, x: Any) -> bool:
        held = norm.__dict__
        if type(norm) not in known:
            if not is_or_ours(type(norm), cls):
                return False
            known.add(type(norm))
        if (
            "forward" in held
            or held["_forward_hooks"]
            or held["_forward_pre_hooks"]
            or held["_backward_hooks"]
            or held["_backward_pre_hooks"]
        ):
            return False
        weight = held["_parameters"].get("weight")
        return type(weight) is parameter and weight.dtype is x.dtype and weight.device == x.device

    return asked_of


def _idle_linear(cls: type[Any]) -> Callable[[nn.Module, Any], bool]:
    """The same of a projection, whose bias, if it has one, is as its weight is."""
    fine = idle(cls)

    def asked_of(linear: nn.Module, x: Any) -> bool:
        if not fine(linear, x):
            return False
        held = linear.__dict__["_parameters"]
        weight, bias = held["weight"], held.get("bias")
        return bias is None or (type(bias) is type(weight) and bias.dtype is weight.dtype and bias.device == weight.device)

    return asked_of


__all__ = ["PREFIX", "Passage", "find", "is_or_ours", "norms", "obstacle", "opened", "standing_back", "twice"]
