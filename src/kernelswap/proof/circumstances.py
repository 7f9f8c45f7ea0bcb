"""What goes on around the calls of a kernel: memory that it keeps, weights that change between two calls, very many rows.

Here nothing has to be compared with the float64 reference: the kernel is held against itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import inputs, memory, real
from .agree import Differs, Result, name, same
from .calls import Want, call, guarded
from .inputs import Case
from .tolerance import compare
from .trial import Pair

ROWS = 65541
"""More than a grid of CUDA has blocks in its second and third dimension, and than 16 bits count; odd."""
MOST_ON_CPU, MOST = 9 << 20, 36 << 20
"""Elements of a call with so many: rows of 128, as heads have them, and of 512."""


def examine(pair: Pair, case: Case, probe: str, *, training: bool) -> None:
    """Whatever of it the case is there for.

    Raises:
        Differs: the kernel may not stand in for the original.
    """
    if case.thorough:
        memory_kept(pair, case)
        weights_followed(pair, case)
    if case.many:
        try:
            many_rows(pair, case, probe, training=training)
        except Differs as e:
            if e.lasting:  # else there is no room for it: nor will there be for the user's
                wrong = Differs(f"{e}; only in a call of {ROWS} rows")
                raise wrong from None


def weights_followed(pair: Pair, case: Case) -> None:
    """A kernel may keep weights in a form of its own; after an optimizer's step or a merged adapter it must not answer with the old.

    Of each parameter in turn the sign is changed, which is exact and undoes itself.

    Raises:
        Differs: it does.
    """
    module = pair.module
    if module is None:
        return

    def both() -> tuple[list[Tensor], list[Tensor]]:
        arguments = case.args, dict(case.kwargs)
        with torch.no_grad():
            original = call(pair.original, module, arguments, pair.device)
            with memory.users_threads():
                kernel = guarded(lambda: call(pair.candidate, module, arguments, pair.device))
        return original.outputs, kernel.outputs

    usual, mine = both()
    for path, weight in module.named_parameters():
        with torch.no_grad():
            weight.neg_()
        try:
            theirs, now = both()
        finally:
            with torch.no_grad():
                weight.neg_()
        differ = (compare(b, a, a.to(torch.float32), sums=case.sums, slack=4.0).wrong for a, b in zip(usual, theirs, strict=True))
        if same(mine, now) and any(why is not None for why in differ):
            raise Differs(f"goes on with the {path} of an earlier call after that has changed")


def memory_kept(pair: Pair, case: Case) -> None:
    """A kernel may keep workspaces; one that keeps something new on every equal call leaks.

    Raises:
        Differs: it does.
    """

    def ask() -> Result:
        fresh = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, (case.args, dict(case.kwargs)))
        with torch.no_grad(), memory.users_threads():
            return call(pair.candidate, pair.module, fresh, pair.device)

    if found := memory.leak(lambda: guarded(ask), pair.device):
        raise Differs(f"leaks memory: {found}")


def repeated(arguments: Any, probe: str) -> tuple[Any, Tensor] | None:
    """The rows of a call again and again, and which they are; None where that has no meaning, or is too large."""
    leaves, spec = pytree.tree_flatten(arguments)
    held = [t for t in leaves if isinstance(t, Tensor)]
    few = inputs.count(held)
    if probe not in real.ROWWISE or not few:
        return None
    device, width = held[0].device, held[0].shape[-1]
    if ROWS * width > (MOST_ON_CPU if device.type == "cpu" else MOST):
        return None
    index = torch.arange(ROWS, device=device) % few
    picked = real.take(probe, leaves, index)
    return None if picked is None else (pytree.tree_unflatten(picked, spec), index)


def many_rows(pair: Pair, case: Case, probe: str, *, training: bool) -> None:
    """Equal rows must give what they gave in a small call.

    Raises:
        Differs: they do not.
    """
    arguments = case.args, dict(case.kwargs)
    found = repeated(arguments, probe)
    if found is None:
        return
    more, index = found
    want = Want(case.differentiable) if training and case.differentiable else None
    labels = [str(i) for i in range(len(pytree.tree_leaves(arguments)))]

    def ask(arguments: Any, cotangents: list[Tensor] | None = None) -> Result:
        def settled() -> Result:
            result = call(pair.candidate, pair.module, arguments, pair.device, want, cotangents, labels)
            memory.settle(pair.device)
            return result

        with torch.set_grad_enabled(want is not None), memory.users_threads():
            return guarded(settled)

    small = ask(arguments)
    large = ask(more, None if small.cotangents is None else [_rows(t, index) for t in small.cotangents])
    pairs = [(name(large, i), k, o) for i, (k, o) in enumerate(zip(large.outputs, small.outputs, strict=True))]
    for source, k in large.gradients.items():
        o = small.gradients[source]
        if k is not None and o is not None:
            pairs.append((f"the gradient of input {source}", k, o))
    for what, k, usual in pairs:
        expected = _rows(usual, index)
        if k.numel() != expected.numel():
            raise Differs(f"gives {what} the shape {tuple(k.shape)}")
        if not same([k.reshape(expected.shape)], [expected]):
            wrong = compare(k.reshape(expected.shape), expected, expected, sums=case.sums, slack=real.BOTH, most=256).wrong
            if wrong is not None:
                raise Differs(f"differs in {what}, {wrong}")


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])[index]
