"""Marks that say which kernels may serve a class or a function. They change nothing until a model is kernelized."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from .repositories import forward_of

if TYPE_CHECKING:
    import torch.nn as nn

Condition = Callable[["nn.Module"], bool] | None
T = TypeVar("T", bound=type)


def use_kernel_forward_from_hub(layer_name: str, condition: Condition = None) -> Callable[[Any], Any]:
    """Decorate a class, whose `forward` may then be a kernel's, or a function, which becomes an instance of a module that calls it.

    Args:
        layer_name: what `register_kernel_mapping` calls it.
        condition: asked of each module; where it says False, that module is left alone.

    Raises:
        TypeError: it is neither a module's class nor a function.
    """

    def mark(target: Any) -> Any:
        import torch.nn as nn

        if inspect.isclass(target) and issubclass(target, nn.Module):
            replace_kernel_forward_from_hub(target, layer_name, condition)
            return target
        if inspect.isfunction(target) or inspect.isbuiltin(target):
            return _instance(target, layer_name, condition)
        raise TypeError(f"use_kernel_forward_from_hub decorates classes of modules and functions, not {target!r}")

    return mark


def replace_kernel_forward_from_hub(cls: type[nn.Module], layer_name: str, condition: Condition = None) -> None:
    """Mark a class of somebody else's, in place."""
    marked: Any = cls
    marked.kernel_layer_name = layer_name
    marked.kernel_condition = staticmethod(condition) if condition is not None else None


def use_kernelized_func(*functions: Any) -> Callable[[T], T]:
    """Decorate the class of a module that calls these functions; its instances list them in `_kernel_funcs`.

    Raises:
        ValueError: one of them is not decorated with `use_kernel_forward_from_hub`.
    """
    names = {}
    for function in functions:
        layer = getattr(function, "kernel_layer_name", None)
        if not isinstance(layer, str):
            raise ValueError(f"{function!r} is not decorated with `use_kernel_forward_from_hub`")  # noqa: TRY004  # the reference's
        names[getattr(function, "__name__", None) or layer] = function

    def mark(cls: T) -> T:
        former: Any = cls.__init__  # type: ignore[misc]  # of this very class, which is decorated

        @functools.wraps(former)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            former(self, *args, **kwargs)
            self.__dict__.setdefault("_kernel_funcs", {}).update(names)  # not as submodules: they are no part of the model

        cls.__init__ = init  # type: ignore[misc]  # as above
        return cls

    return mark


@functools.cache
def _say_once() -> None:
    warnings.warn(
        "use_kernel_func_from_hub is deprecated; use_kernel_forward_from_hub takes functions, too",
        DeprecationWarning,
        stacklevel=3,
    )


def use_kernel_func_from_hub(func_name: str) -> Callable[[Any], Any]:
    """Deprecated: `use_kernel_forward_from_hub` takes functions."""
    _say_once()
    return use_kernel_forward_from_hub(func_name)


def _instance(function: Callable[..., Any], layer_name: str, condition: Condition) -> nn.Module:
    import torch.nn as nn

    name = getattr(function, "__name__", layer_name)
    made: Any = type(
        name,
        (nn.Module,),
        {
            "forward": forward_of(function),
            "kernel_layer_name": layer_name,
            "kernel_condition": staticmethod(condition) if condition is not None else None,
            "can_torch_compile": getattr(function, "can_torch_compile", False),
            "has_backward": getattr(function, "has_backward", True),
            "__module__": getattr(function, "__module__", __name__),
            "__doc__": function.__doc__,
            "__reduce__": _by_name,
        },
    )()
    made.__dict__.update(__name__=name, __qualname__=getattr(function, "__qualname__", name), __wrapped__=function)
    return made  # type: ignore[no-any-return]  # a module of a class made here


def _by_name(made: Any) -> str:
    """Pickled and copied as the function was: by the name under which its module has it."""
    return str(made.__qualname__)
