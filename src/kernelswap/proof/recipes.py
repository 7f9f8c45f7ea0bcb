"""Every recipe by its name in a table; and those for statements that call norms, whose module holds these norms (`norms.Norms`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from . import inputs, rotary
from .inputs import Case, Recipe, Subject


def residual_rows(subject: Subject) -> Iterator[Case]:
    """A residual sum and its norm: (residual (..., n), hidden (..., n)); the norm is the only one of `subject.module`."""
    of_norm = replace(subject, module=next(iter(subject.module.children())))
    for salt, case in enumerate(inputs.rows(of_norm)):
        x = case.args[0]
        scale = 0.5 * x.detach().float().abs().nan_to_num(0.0).mean().item() if x.numel() else 1.0
        hidden = subject.normal(*x.shape, salt=600 + salt, scale=scale)
        yield replace(case, args=(x, hidden), differentiable=(0, 1) if case.differentiable else ())


def norm_rotary(subject: Subject) -> Iterator[Case]:
    """Norms of q and k, then rotary embedding: (q (B, H, S, D), k (B, G, S, D), cos, sin (B, S, D)); the module has the two norms."""
    size = inputs.width(next(iter(subject.module.children())))
    if size is None:
        return
    small = min(map(inputs.near_eps, subject.module.children()))
    for salt, (batch, tokens, first, h, g) in enumerate(
        ((1, inputs.PRIME, 0, 4, 2), (1, 1, 4097, 4, 4), (3, 7, 100, 6, 2), (1, 0, 0, 4, 2), (2, 3, 9, 33, 1))
    ):
        positions = first + torch.arange(tokens, device="cpu").expand(batch, tokens)
        cos, sin = rotary.angles(subject, positions + 11 * torch.arange(batch, device="cpu")[:, None], size)
        q, k = (subject.normal(batch, tokens, n, size, salt=salt + at).transpose(1, 2) for n, at in ((h, 0), (g, 50)))
        name = f"{batch}x{tokens} tokens, {h} and {g} heads"
        both = (0, 1)
        yield Case(
            name, (q, k, cos, sin), differentiable=both, generic=salt == 0, thorough=salt in (0, 2), centre=float(salt != 1)
        )
        if tokens > 1:
            yield Case(f"{name}, dense", (q.contiguous(), k.contiguous(), cos, sin), differentiable=both)
            yield Case(f"{name}, as small as eps", (q * small, k * small, cos, sin), differentiable=both, generic=salt == 0)
            yield Case(f"{name}, large and small", (q * 100, k * 0.1 * small, cos, sin), differentiable=both)
            packed = torch.full((batch, tokens, h + 2 * g, size), torch.nan, device=q.device, dtype=q.dtype)
            packed[:, :, :h], packed[:, :, h : h + g] = q.transpose(1, 2), k.transpose(1, 2)
            views = packed[:, :, :h].transpose(1, 2), packed[:, :, h : h + g].transpose(1, 2)
            yield Case(f"{name}, slices of one projection", (*views, cos, sin), differentiable=both)
        if batch > 1:
            yield Case(f"{name}, one cos for all", (q, k, cos[:1], sin[:1]), differentiable=both)


def projections(subject: Subject) -> Iterator[Case]:
    """Projections of one tensor (..., in_features): as for one of them, and in every size up to where kernels for few rows end."""
    first = replace(subject, module=next(iter(subject.module.children())))
    yield from inputs.mlp(first)
    n = inputs.in_features(first.module)
    for tokens in (2, 5, 16, 32) if n is not None else ():
        x = subject.normal(tokens, 1, n or 0, salt=800 + tokens)
        yield Case(f"{tokens} sequences of 1 token", (x,), counts=True, sums=True)


RECIPES: dict[str, Recipe] = {
    "rows": inputs.rows,
    "gated_rows": inputs.gated_rows,
    "elementwise": inputs.elementwise,
    "gated": inputs.gated,
    "mlp": inputs.mlp,
    "rotary": rotary.rotary,
    "residual_rows": residual_rows,
    "norm_rotary": norm_rotary,
    "projections": projections,
    "head": inputs.mlp,
}
