"""Random inputs for every kind of site: shapes, layouts, magnitudes and parameters at which kernels go wrong.

A recipe is chosen by `Row.probe` and yields `Case`s, lazily. Same module shape, same seed: same cases. The tensors are made on
the CPU from a generator of their own; nobody's random state is touched.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Site
from .reference import twin

BIG = 1 << 22
"""Parameters of one module above which its own weights are used (copied) instead of random ones."""
PRIME, MANY = 61, 307  # rows: enough for statistics; across the 256-row bucket and past the grain of a thread
_PLAIN: Any = {"dtype": torch.float32, "device": "cpu"}  # whatever the caller's defaults are


@dataclass(frozen=True, slots=True)
class Case:
    """One call to compare."""

    name: str
    """For reasons: "13 rows, every second row of a larger tensor"."""
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    differentiable: tuple[int, ...] = (0,)
    """Which tensors of the call, in order, carry gradients in training."""
    generic: bool = False
    """Rounding errors are independent here, so that common factors show (`tolerance.coherent`)."""
    counts: bool = False
    """Its errors are those that a verdict reports; generic ones count as well."""
    sums: bool = False
    """Elements of the output are sums of many terms: small ones are what is left of large ones."""
    vanishing: bool = False
    """Gradients may vanish for whole rows; what is left of them there is noise."""
    thorough: bool = False
    """Worth the slow questions: leaks, compiled, more than one kind of gradient."""
    many: bool = False
    """Its rows may be asked for again and again, as more than fit into 16 bits."""
    centre: float = 1.0
    """Random parameters of rank one lie around this."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What a recipe may look at."""

    site: Site
    module: nn.Module
    original: Callable[..., Any]
    device: torch.device
    dtype: torch.dtype
    seed: int = 0

    def source(self, salt: int) -> torch.Generator:
        """A generator of its own for each case."""
        return torch.Generator("cpu").manual_seed(self.seed * 1009 + salt)

    def normal(self, *shape: int, salt: int = 0, scale: float = 1.0) -> Tensor:
        """Standard normal, in the site's dtype, on its device."""
        drawn = torch.randn(*shape, generator=self.source(salt), **_PLAIN) * scale
        return drawn.to(self.device, self.dtype)


Recipe = Callable[[Subject], Iterator[Case]]


# -- modules with random parameters -------------------------------------------------------------------------------


def with_parameters(subject: Subject, centre: float) -> nn.Module:
    """A copy of the module on its device, tensors its own. Small modules get random parameters: rank one around `centre`, both signs.

    A module of more than `BIG` parameters keeps copies of its weights, except those that are all zero (a fresh LoRA's B
    would hide that a kernel bypasses the adapter). Weights that are not here (meta, sharded) are random always.
    """
    module, source = subject.module, subject.source(int(centre) + 77)
    big = sum(p.numel() for p in module.parameters()) > BIG
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}

    def replace(name: str, tensor: Tensor) -> Tensor:
        absent = tensor.is_meta or type(tensor).__name__ == "DTensor"
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        if not tensor.is_floating_point() or not (plain or absent):
            return tensor if not plain else tensor.detach().clone()
        keep = name not in parameters or (big and not absent)
        if not absent and keep and not (name in parameters and not bool(tensor.detach().any())):
            held = tensor.detach().clone().to(subject.device)
        else:
            held = _draw(name, tensor, centre, source).to(subject.device, tensor.dtype)
        return nn.Parameter(held) if name in parameters else held

    return twin(module, replace)


def _draw(name: str, like: Tensor, centre: float, source: torch.Generator) -> Tensor:
    drawn = torch.randn(tuple(like.shape), generator=source, **_PLAIN)
    if like.ndim >= 2:
        return drawn / math.sqrt(like.shape[-1])
    return drawn * 0.3 if name.endswith("bias") else drawn * 0.5 + centre


# -- rows ---------------------------------------------------------------------------------------------------------


def width(module: nn.Module) -> int | None:
    """Length of the rows that a norm works on, or None when its attributes do not say."""
    for name in ("weight", "scale", "gamma", "g"):
        held = getattr(module, name, None)
        if isinstance(held, Tensor) and held.numel():
            return held.numel()
    for name in ("normalized_shape", "hidden_size", "dim", "num_features"):
        held = getattr(module, name, None)
        if isinstance(held, int):
            return held
        if isinstance(held, Sequence) and len(held) == 1:
            return int(held[0])
    return None


def near_eps(module: nn.Module) -> float:
    """The magnitude at which eps decides."""
    for name in ("variance_epsilon", "eps", "epsilon", "layer_norm_epsilon"):
        eps = getattr(module, name, None)
        if isinstance(eps, float) and eps > 0:
            return math.sqrt(eps)
    return 1e-3


def _kinds(subject: Subject, n: int, salt: int, large: float = 1e4) -> Tensor:
    """One row of each kind: (13, n)."""
    tiny = near_eps(subject.module)
    x = torch.randn(13, n, generator=subject.source(salt), **_PLAIN)
    x[1] *= tiny
    x[2] *= 0.1 * tiny
    x[3] *= 1e-2
    x[4] *= min(large, 1e3) if subject.dtype == torch.float16 else large
    x[5] = 0.0
    x[6] = 3.7
    x[7, n // 3] *= 300.0
    x[8] += 50.0
    x[9] *= torch.logspace(-3, 1, n, **_PLAIN)
    x[10, : n // 2] = 0.0
    x[11] += 200.0
    x[12] += 1000.0
    return x.to(subject.device, subject.dtype)


def _scales(subject: Subject, n: int, salt: int) -> Tensor:
    """Rows beyond what float16 holds, from either end: some kernels compute in it, or flush what is small. (4, n)."""
    scale = torch.tensor([1e-12, 1e-6, 1.0, 1e3 if subject.dtype == torch.float16 else 1e6], **_PLAIN)[:, None]
    return (torch.randn(4, n, generator=subject.source(salt), **_PLAIN) * scale).to(subject.device, subject.dtype)


def _no_numbers(subject: Subject, n: int, salt: int) -> Tensor:
    """(5, n), a NaN and an infinity in rows of their own."""
    x = subject.normal(5, n, salt=salt)
    x[2, n // 2], x[3, n // 3] = torch.nan, torch.inf
    return x


def _layouts(subject: Subject, n: int) -> Iterator[tuple[str, Tensor, float]]:
    """Non-contiguous ways to hold rows of length n; what lies around them is NaN, so that reading it shows."""
    yield "5x3 rows, transposed", subject.normal(3, 5, n, salt=21).transpose(0, 1), 1.0
    wide = torch.full((7, n + 11), torch.nan, device=subject.device, dtype=subject.dtype)
    wide[:, 3 : 3 + n] = subject.normal(7, n, salt=22)
    yield "7 rows, a slice of longer rows", wide[:, 3 : 3 + n], 0.0
    tall = torch.full((2, 26, n), torch.nan, device=subject.device, dtype=subject.dtype)
    tall[:, ::2] = subject.normal(2, 13, n, salt=23)
    yield "2x13 rows, every second row of a larger tensor", tall[:, ::2], 1.0
    odd = torch.full((5 * n + 1,), torch.nan, device=subject.device, dtype=subject.dtype)[1:].view(5, n)
    yield "5 rows at an odd address", odd.copy_(subject.normal(5, n, salt=26)), 0.0
    yield "4x3 rows, expanded", subject.normal(4, 1, n, salt=24).expand(4, 3, n), 0.0
    columns = subject.normal(n, 17, salt=25)
    yield "17 rows, stored by column", columns.t(), 1.0


def rows(subject: Subject) -> Iterator[Case]:
    """Norms: one tensor (..., n)."""
    n = width(subject.module)
    if n is None:
        return
    yield Case(f"{PRIME} rows", (subject.normal(1, PRIME, n, salt=1),), generic=True, thorough=True, many=True)
    yield Case("1 token", (subject.normal(1, 1, n, salt=2),), centre=0.0)
    yield Case("3x5 rows", (subject.normal(3, 5, n, salt=3),), centre=0.0, thorough=True)
    yield Case("rows of many kinds (tiny, large, zero, constant, outlier)", (_kinds(subject, n, 4),))
    yield Case(
        f"{PRIME} rows as small as eps",
        (subject.normal(PRIME, n, salt=5, scale=near_eps(subject.module)),),
        generic=True,
        centre=0.0,
    )
    for name, x, centre in _layouts(subject, n):
        yield Case(name, (x,), centre=centre)
    yield Case("2x3x5 rows", (subject.normal(2, 3, 5, n, salt=6),))
    yield Case(f"{MANY} rows", (subject.normal(MANY, n, salt=7),), centre=0.0, generic=True)
    yield Case("no rows", (subject.normal(0, n, salt=8),))
    yield Case("4 rows, from minute to enormous", (_scales(subject, n, 10),))
    yield Case("5 rows, a NaN in one, an infinity in another", (_no_numbers(subject, n, 9),), differentiable=())


def gated_rows(subject: Subject) -> Iterator[Case]:
    """Gated norms: (hidden (..., n), gate (..., n))."""
    for salt, case in enumerate(rows(subject)):
        x = case.args[0]
        gate = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if x.is_contiguous() else None
        drawn = subject.normal(*x.shape, salt=900 + salt)
        gate = drawn if gate is None else gate.copy_(drawn)
        yield Case(
            case.name,
            (x, gate),
            differentiable=(0, 1) if case.differentiable else (),
            generic=case.generic,
            thorough=case.thorough,
            many=case.many,
            centre=case.centre,
        )


# -- elementwise --------------------------------------------------------------------------------------------------


def _sweep(subject: Subject) -> Tensor:
    """(64, 256), sorted: neighbours share a row, so that each row's own scale judges it (GELU against its tanh form)."""
    return torch.linspace(-2.5, 6.0, 64 * 256, **_PLAIN).reshape(64, 256).to(subject.device, subject.dtype)


def elementwise(subject: Subject) -> Iterator[Case]:
    """Activations: one tensor of any shape."""
    yield Case("a sweep from -2.5 to 6", (_sweep(subject),), generic=True, vanishing=True, thorough=True)
    yield Case("3x5x1027", (subject.normal(3, 5, 1027, salt=1),), thorough=True)
    yield Case("1 element", (subject.normal(1, salt=2).abs() + 0.5,))  # away from where gradients vanish
    yield Case("7x3", (subject.normal(7, 3, salt=3),))
    yield Case("rows of many kinds (tiny, large, zero, constant, outlier)", (_kinds(subject, 515, 4),))
    for name, x, _ in _layouts(subject, 129):
        yield Case(name, (x,))
    yield Case(f"{MANY}x1024", (subject.normal(MANY, 1024, salt=5, scale=2.0),))
    yield Case("nothing", (subject.normal(0, 64, salt=6),))
    yield Case("4x515, from minute to enormous", (_scales(subject, 515, 8),))
    yield Case("5x64, a NaN in one row, an infinity in another", (_no_numbers(subject, 64, 7),), differentiable=())


def gated(subject: Subject) -> Iterator[Case]:
    """Activation and product: (gate (..., n), up (..., n)), or one tensor (..., 2n) where the original takes one."""
    one = len(required(subject.original)) - (subject.site.kind == "module") == 1
    for salt, case in enumerate(elementwise(subject)):
        x = case.args[0]
        if one:
            yield Case(case.name, (torch.cat([x, x.roll(1, 0)], -1),), generic=False, thorough=case.thorough)
            continue
        up = subject.normal(*x.shape, salt=700 + salt)
        grads = (0, 1) if case.differentiable else ()
        yield Case(case.name, (x, up), differentiable=grads, generic=case.generic, vanishing=True, thorough=case.thorough)


# -- MLP ----------------------------------------------------------------------------------------------------------


def in_features(module: nn.Module) -> int | None:
    """Length of the rows that an MLP or a linear layer takes."""
    for name in "gate_proj gate_up_proj up_proj fc1 c_fc w1 wi_0 wi dense_h_to_4h dense linear1 proj".split():  # noqa: SIM905  # one line
        child = getattr(module, name, None)
        child = getattr(child, "base_layer", child)  # PEFT
        if isinstance(features := getattr(child, "in_features", None), int):
            return features
        if type(child).__name__ == "Conv1D" and isinstance(weight := getattr(child, "weight", None), Tensor):
            return int(weight.shape[0])
    features = getattr(module, "in_features", None)
    return features if isinstance(features, int) else None


def mlp(subject: Subject) -> Iterator[Case]:
    """Feed-forward blocks and linear layers: one tensor (..., in_features). Few tokens: the weights are what costs."""
    n = in_features(subject.module)
    if n is None:
        return
    yield Case("17 tokens", (subject.normal(1, 17, n, salt=1),), counts=True, thorough=True, sums=True)
    yield Case("1 token", (subject.normal(1, 1, n, salt=2),), sums=True)
    large = 30.0 if subject.dtype == torch.float16 else 120.0  # gates beyond exp's range; in float16 products would overflow
    big = sum(p.numel() for p in subject.module.parameters()) > BIG
    yield Case("3x5 tokens", (subject.normal(3, 5, n, salt=3),), thorough=not big, sums=True)
    yield Case("rows of many kinds (tiny, large, zero, constant, outlier)", (_kinds(subject, n, 4, large)[:11],), sums=True)
    for name, x, _ in list(_layouts(subject, n))[1 : 3 if big else None]:
        yield Case(name, (x,), sums=True)
    yield Case("no tokens", (subject.normal(1, 0, n, salt=5),), sums=True)
    x = subject.normal(5, n, salt=6)
    x[2, n // 2] = torch.nan
    yield Case("5 tokens, a NaN in one", (x,), differentiable=(), sums=True)


# -- of a call --------------------------------------------------------------------------------------------------


def required(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters without a default."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds and p.default is p.empty]


def count(tensors: Sequence[Tensor]) -> int:
    """Rows of a call: those of its first tensor, a row being the last dimension."""
    if not tensors:
        return 0
    first = tensors[0]
    return math.prod(first.shape[:-1]) if first.ndim > 1 else 1
