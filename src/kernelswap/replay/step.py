"""One call of a model: is it a decode step, and everything but the numbers in its tensors that decides how it runs."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Key = tuple[Any, ...]
"""Hashable; two steps with equal keys run the same operations on tensors of the same shapes."""


class Step(NamedTuple):
    """A decode step. `tensors` in the order of the arguments, the cache's left out."""

    key: Key
    cache: Any
    tensors: list[Tensor]


class Unfit(Exception):
    """Why a call is not replayed, in one sentence."""


CACHE = "past_key_values"
_WANTS = ("labels", "output_attentions", "output_hidden_states", "output_router_logits")
"""Arguments that ask for more than the next logits."""
_PLAIN = (bool, int, float, str, type(None))


def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step | None:
    """The step that a call is; `None` for one that processes a prompt, or keeps no cache.

    Raises:
        Unfit: it is one token for each sequence and a cache, and is not replayed all the same.
    """
    cache = kwargs.get(CACHE)
    if cache is None:
        return None
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.shape[1] != 1:
        return None
    if torch.is_grad_enabled():
        raise Unfit("gradients are on; generate() and torch.no_grad() have them off")
    for name in _WANTS:
        wanted = kwargs.get(name)
        if wanted is not None and wanted is not False:
            raise Unfit(f"{name} is asked for")
    tensors: list[Tensor] = []
    arguments = tuple(_flat(value, "an argument", cache, tensors) for value in args)
    named = tuple((name, _flat(value, name, cache, tensors)) for name, value in kwargs.items())
    return Step((arguments, named, surroundings()), cache, tensors)


def surroundings() -> Key:
    """What a step depends on besides its arguments and its model."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():  # noqa: SLF001  # there is no public way to ask
        raise Unfit("a torch dispatch or function mode looks on")
    return (
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


def _flat(value: Any, name: str, cache: Any, tensors: list[Tensor]) -> Any:
    if type(value) is Tensor:
        tensors.append(value)
        return value.shape, value.dtype, value.device
    if value is cache:
        return CACHE
    if type(value) in _PLAIN:
        return type(value), value  # True and 1 are equal, and do not mean the same
    if isinstance(value, dict):
        return tuple((key, _flat(one, name, cache, tensors)) for key, one in value.items())
    if type(value) in {tuple, list}:
        return type(value), tuple(_flat(one, name, cache, tensors) for one in value)
    if isinstance(value, (enum.Enum, torch.dtype, torch.device)):
        return value
    raise Unfit(f"{name} is a {type(value).__name__}, which a recording cannot take in")


def replaced(args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Iterable[Tensor], cache: Any) -> tuple[Any, Any]:
    """The arguments with these tensors, in the order of `Step.tensors`, and with another cache."""
    fresh = iter(tensors)
    positional = tuple(_other(value, fresh) for value in args)
    return positional, {name: cache if name == CACHE else _other(value, fresh) for name, value in kwargs.items()}


def _other(value: Any, fresh: Iterator[Tensor]) -> Any:
    if type(value) is Tensor:
        return next(fresh)
    if isinstance(value, dict):
        return {key: _other(one, fresh) for key, one in value.items()}
    return type(value)(_other(one, fresh) for one in value) if type(value) in {tuple, list} else value
