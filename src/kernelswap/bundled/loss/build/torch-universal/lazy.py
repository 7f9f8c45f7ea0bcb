"""Logits that are computed when somebody reads them.

A LazyLogits is a Tensor with shape, dtype and history, and no memory. `float()`, `contiguous()`, views that keep rows whole,
slices of rows, a scale and a soft cap (`cap * tanh(z / cap)`) give another one; `cross_entropy` of one goes through `linear_cross_entropy`; everything else computes the logits,
once, and goes on with a plain tensor of the values and the history that the layer itself would have given. So does code below
Python: operators dispatch to `__torch_dispatch__`, and the history is a node of autograd's like any other.

An optimiser's step changes the weight that unread logits come from: for those that somebody still holds, the weight is
copied before it (torch's hook for all optimisers), which costs a copy of the weight and not the logits.

What cannot be had from it raises instead of being wrong: logits first read after something else wrote to the weight, and the
gradient at the logits of a loss that never made them (`retain_grad`, `register_hook`).
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own spelling
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .formula import Terms, shaped
from .loss import of_terms

_transformed = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether nothing here needs the logits at once, or owns the weight only for the length of a call."""
    held = (x, weight) if bias is None else (x, weight, bias)
    return (
        all(type(t) in (Tensor, nn.Parameter) for t in held)
        and any(t.requires_grad for t in held)
        and x.dim() > 0
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or _transformed())
        and _get_current_dispatch_mode() is None
        and not getattr(module, "_is_replica", False)
        and not _sharded(module, weight)
    )


def _sharded(module: nn.Module, weight: Tensor) -> bool:
    """Whether the weight is whole for the length of a call only: under FSDP, of the module or of what it is in, or ZeRO."""
    if hasattr(weight, "ds_id") or any("FSDP" in c.__name__ for c in type(module).__mro__):
        return True
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", None) or {}
    return any(
        type(outer).__name__.startswith("FSDP") and any(inner is module for inner in outer.modules()) for outer in list(states)
    )


def head(x: Tensor, weight: Tensor, bias: Tensor | None) -> LazyLogits:
    """x (..., H), weight (V, H), bias (V,) or None -> (..., V). Casts as autocast would."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        to = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(to), weight.to(to), None if bias is None else bias.to(to)
    return _made(x, weight, bias, x.dtype)


@dataclass(slots=True)
class _Source:
    """What logits are made of."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    versions: tuple[int, ...]
    terms: Terms
    """What became of the layer's output."""
    parent: LazyLogits | None = None
    how: Callable[[Tensor], Tensor] | None = None
    """These logits from the parent's."""
    dense: Tensor | None = None
    spent: bool = False
    """A loss was computed from them that never made them."""

    def written(self) -> bool:
        """Whether the weight, or the layer's input, is not what it was."""
        return self.versions != tuple(t._version for t in self.held()) or not self.weight.untyped_storage().nbytes()

    def held(self) -> tuple[Tensor, ...]:
        return (self.x, self.weight) if self.bias is None else (self.x, self.weight, self.bias)


class LazyLogits(Tensor):
    """See the file. Made by `head`; the values are `dense()`'s."""

    _source: _Source

    def dense(self) -> Tensor:
        """The logits, as a plain tensor with a history. Computed once.

        Raises:
            RuntimeError: the weight, or the layer's input, was written to since.
        """
        source = self._source
        if source.dense is None:
            if source.parent is not None and source.how is not None:
                source.dense = source.how(source.parent.dense())
            else:
                if source.written():
                    raise RuntimeError(
                        "these logits were not computed, because nothing read them, and the weights they come from have changed "
                        f"since. Read them before that, or {_WITHOUT}"
                    )
                with torch.enable_grad(), torch.autocast(source.x.device.type, enabled=False):
                    source.dense = F.linear(source.x, source.weight, source.bias)
        return source.dense

    def known(self) -> bool:
        """Whether somebody has read these logits, or those that they come from."""
        source: _Source | None = self._source
        while source is not None:
            if source.dense is not None:
                return True
            source = None if source.parent is None else source.parent._source
        return False

    def may_wait(self) -> bool:
        """Whether nobody has read them, and they can still be computed."""
        return not self.known() and not self._source.written()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (lazy := _LAZY.get(func)) is not None and isinstance(args[0] if args else None, LazyLogits) and args[0].may_wait():
            found = lazy(*args, **kwargs)
            if found is not None:
                return found
        if func in _AT_THE_LOGITS and args[0]._source.spent and not args[0].known():
            raise RuntimeError(
                f"{getattr(func, '__name__', 'this')} asks for the gradient at the logits, which the loss that was computed from "
                f"them does not give: it never made them. Ask before the loss is computed, or {_WITHOUT}"
            )
        args, kwargs = pytree.tree_map(_dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(lambda t: t.dense().detach() if isinstance(t, LazyLogits) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


_WITHOUT = "let this model's head be: swap(model, loss=False), KernelConfig({'LMHead': ''})"


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, LazyLogits) else value


class _Head(torch.autograd.Function):
    """A node that gives a LazyLogits its history; its backward pass is the linear layer's, and that of what came after it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, terms: Terms) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.terms = terms
        shape = (*x.shape[:-1], weight.shape[0])
        return Tensor._make_wrapper_subclass(LazyLogits, shape, dtype=dtype, device=x.device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        if ctx.terms.tanh:
            with torch.enable_grad():
                z = F.linear(x.detach(), weight.detach(), bias).float().detach().requires_grad_()
                (grad,) = torch.autograd.grad(shaped(z, ctx.terms), z, grad.float())
        elif ctx.terms.pre != 1.0:
            grad = grad * ctx.terms.pre
        grad = grad.to(x.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        dx = (grad @ weight) if wants_x else None
        dw = rows.t() @ x.reshape(-1, x.shape[-1]) if wants_weight else None
        return dx, dw, rows.sum(0) if wants_bias else None, None, None


def _made(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype,
    parent: LazyLogits | None = None, how: Callable[[Tensor], Tensor] | None = None, terms: Terms = Terms(),
) -> LazyLogits:  # fmt: skip
    with torch.enable_grad():
        out: LazyLogits = _Head.apply(x, weight, bias, dtype, terms)
    held = (x, weight) if bias is None else (x, weight, bias)
    out._source = _Source(x, weight, bias, tuple(t._version for t in held), terms, parent, how)
    _remember(out)
    return out


# -- before the weight changes --------------------------------------------------------------------------------------

_living: dict[int, weakref.ref[LazyLogits]] = {}
"""Unread or not, by identity: tensors compare by element."""
_hook: list[Any] = []
"""Stays once it is there: with nothing living it does nothing, and to take it out while hooks are being called is an error."""


def _remember(z: LazyLogits) -> None:
    key = id(z)
    _living[key] = weakref.ref(z, lambda gone: _forget(key, gone))
    if not _hook:
        _hook.append(register_optimizer_step_pre_hook(_keep_weights))


def _forget(key: int, gone: Any) -> None:
    if _living.get(key) is gone:
        del _living[key]


def _keep_weights(*_: Any) -> None:
    """Before any optimiser's step: unread logits that somebody holds get copies of what they come from."""
    if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    copies: dict[int, Tensor] = {}
    for z in [z for ref in list(_living.values()) if (z := ref()) is not None and not z.known()]:
        source = z._source
        if source.written():
            continue
        for name, held in (("weight", source.weight), ("bias", source.bias)):
            if held is not None and held.is_leaf:
                if id(held) not in copies:
                    copies[id(held)] = held.detach().clone()
                setattr(source, name, copies[id(held)])
        source.versions = tuple(t._version for t in source.held())


# -- what stays lazy ------------------------------------------------------------------------------------------------


def _of_rows(z: LazyLogits, how: Callable[[Tensor], Tensor], of_x: Callable[[Tensor], Tensor]) -> LazyLogits | None:
    """`how` of the logits, which is `of_x` of the layer's input and the layer again."""
    if not torch.is_grad_enabled():
        return None
    s = z._source
    return _made(of_x(s.x), s.weight, s.bias, z.dtype, z, how, s.terms)


def _cast(z: LazyLogits, dtype: torch.dtype) -> LazyLogits | None:
    if dtype is z.dtype:
        return z
    if dtype is not torch.float32 or not torch.is_grad_enabled():  # a narrower one would round again
        return None
    s = z._source
    return _made(s.x, s.weight, s.bias, dtype, z, lambda t: t.to(dtype), s.terms)


def _float(z: LazyLogits) -> LazyLogits | None:
    return _cast(z, torch.float32)


def _to(z: LazyLogits, *args: Any, **kwargs: Any) -> LazyLogits | None:
    waits = {"non_blocking", "copy"}  # which of them asks for nothing where the logits are already
    asked = (*args, *(value for name, value in kwargs.items() if name not in waits))
    if len(asked) != 1 or set(kwargs) - {"dtype", "device", *waits} or kwargs.get("copy"):
        return None
    if isinstance(asked[0], torch.dtype):
        return _cast(z, asked[0])
    if isinstance(asked[0], (str, torch.device)):
        device = torch.device(asked[0])
        return z if device == z.device or (device.type == z.device.type == "cpu") else None
    return None


def _contiguous(z: LazyLogits, *args: Any, **kwargs: Any) -> LazyLogits | None:
    return z if not args and not kwargs else None


def _view(z: LazyLogits, *shape: Any) -> LazyLogits | None:
    if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)):
        shape = tuple(shape[0])
    if len(shape) < 1 or not all(type(n) is int for n in shape) or shape[-1] != z.shape[-1]:
        return None
    width = z._source.x.shape[-1]
    return _of_rows(z, lambda t: t.reshape(shape), lambda x: x.reshape(*shape[:-1], width))


def _item(z: LazyLogits, index: Any) -> LazyLogits | None:
    given = list(index) if isinstance(index, tuple) else [index]
    if not all(i is Ellipsis or isinstance(i, slice) for i in given) or given.count(Ellipsis) > 1:
        return None
    gap = given.index(Ellipsis) if Ellipsis in given else len(given)
    given[gap : gap + 1] = [slice(None)] * (z.dim() - len(given) + (Ellipsis in given))
    if len(given) != z.dim() or given[-1] != slice(None):
        return None
    return _of_rows(z, lambda t: t[index], lambda x: x[tuple(given)])


def _then(z: LazyLogits, terms: Terms, how: Callable[[Tensor], Tensor]) -> LazyLogits | None:
    """`how` of the logits, which makes their `terms` these."""
    if not torch.is_grad_enabled():
        return None
    s = z._source
    return _made(s.x, s.weight, s.bias, z.dtype, z, how, terms)


def _times(z: LazyLogits, others: Any, by: Callable[[float], float], how: Callable[..., Tensor]) -> LazyLogits | None:
    if len(others) != 1 or type(others[0]) not in (int, float) or not math.isfinite(others[0]) or not others[0]:
        return None
    terms, factor = z._source.terms, by(others[0])
    terms = terms._replace(post=terms.post * factor) if terms.tanh else terms._replace(pre=terms.pre * factor)
    return _then(z, terms, lambda t: how(t, others[0]))


def _mul(z: LazyLogits, *others: Any, **more: Any) -> LazyLogits | None:
    return None if more else _times(z, others, lambda n: n, torch.mul)


def _div(z: LazyLogits, *others: Any, **more: Any) -> LazyLogits | None:
    return None if more else _times(z, others, lambda n: 1.0 / n, torch.div)


def _tanh(z: LazyLogits, **more: Any) -> LazyLogits | None:
    terms = z._source.terms
    return None if more or terms.tanh else _then(z, terms._replace(tanh=True), torch.tanh)


def _cross_entropy(  # noqa: PLR0913  # torch's own parameters
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor | None:  # fmt: skip
    s = input._source
    if (
        weight is not None
        or size_average is not None
        or reduce is not None
        or not 0.0 <= label_smoothing <= 1.0
        or reduction not in ("mean", "sum", "none")
        or s.x.dtype not in _DTYPES
        or s.weight.dtype is not s.x.dtype
        or (s.bias is not None and s.bias.dtype is not s.x.dtype)
        or input.dim() != 2
        or type(target) is not Tensor
        or target.dtype is not torch.int64
        or target.shape != input.shape[:1]
        or target.device != input.device
        or not torch.is_grad_enabled()
    ):
        return None
    z: LazyLogits | None = input
    while z is not None:
        z._source.spent, z = True, z._source.parent
    kind = s.x.device.type
    dtype = torch.float32 if torch.is_autocast_enabled(kind) else input.dtype  # a loss of narrow logits is as narrow
    terms = s.terms._replace(ignore=ignore_index, smoothing=label_smoothing)
    with torch.autocast(kind, enabled=False):
        return of_terms(s.x, s.weight, s.bias, target, terms, reduction).to(dtype)


_LAZY: dict[Any, Callable[..., Any]] = {
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.contiguous: _contiguous,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.__getitem__: _item,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _mul),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div, Tensor.true_divide, torch.true_divide), _div),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
    F.cross_entropy: _cross_entropy,
}
_AT_THE_LOGITS = {Tensor.retain_grad, Tensor.register_hook, Tensor.grad.__get__}  # type: ignore[attr-defined]  # a slot of C
_GETTERS = (
    "shape", "dtype", "device", "requires_grad", "ndim", "layout", "grad_fn", "is_leaf", "is_cuda", "is_cpu", "is_meta", "is_sparse",
    "is_quantized", "is_nested", "is_mps", "is_xpu", "is_mkldnn", "names", "output_nr", "retains_grad", "itemsize",
    "_base",
)  # fmt: skip
_METADATA = {getattr(Tensor, name).__get__ for name in _GETTERS if hasattr(Tensor, name)} | {
    Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.storage_offset,
    Tensor.is_contiguous, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.__hash__,
    Tensor.__len__, torch.is_floating_point, torch.is_complex, torch.numel,
}  # fmt: skip
