"""Inputs of rotary embeddings: heads as the model has them, and the cos and sin of positions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Site
from .inputs import Case, Subject


@dataclass(frozen=True, slots=True)
class Heads:
    """What a rotary embedding is given. `q` and `k` are few, in the proportion of the model's own; `whole` are those."""

    q: int
    k: int
    size: int
    rotated: tuple[int, ...]
    """Candidates for the length of cos: all of a head, and the part that the configuration names."""
    whole: tuple[int, int]


def heads(module: nn.Module) -> Heads:
    """By the attributes of the attention module and of its configuration; four heads of 64 where they do not say."""
    config = getattr(module, "config", None)
    config = getattr(config, "text_config", config)

    def ask(*names: str) -> Any:
        for holder in (module, config):
            for name in names:
                if isinstance(found := getattr(holder, name, None), int | float) and found:
                    return found
        return None

    q = int(ask("num_attention_heads", "num_heads", "n_head") or 4)
    k = int(ask("num_key_value_heads") or q)
    hidden = ask("hidden_size", "n_embd")
    size = int(ask("head_dim", "qk_rope_head_dim") or (int(hidden) // q if hidden else 64))
    parameters = getattr(config, "rope_parameters", None)
    part = (
        ask("partial_rotary_factor") or (parameters or {}).get("partial_rotary_factor") if isinstance(parameters, dict) else None
    )
    rotated = (size,) if not part or part == 1 else (int(size * part), size)
    groups, few = max(1, q // k), min(k, 2)
    return Heads(few * min(groups, 4), few, size, rotated, (q, k))


def angles(subject: Subject, positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cos and sin (..., size) as rotary embeddings make them: both halves alike."""
    inverse = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device="cpu") / size)
    angle = positions[..., None].double() * inverse
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(subject.device, subject.dtype), angle.sin().to(subject.device, subject.dtype)


def rotary(subject: Subject) -> Iterator[Case]:
    """`apply_rotary_pos_emb(q, k, cos, sin, ..., unsqueeze_dim=1)`: q (B, H, S, D), k (B, G, S, D), cos and sin (B, S, D).

    Where `unsqueeze_dim` is a parameter also (B, S, H, D); where four dimensions do not fit, (S, H, D) as vision models have it.
    """
    about = heads(subject.module)
    named = inspect.signature(subject.original).parameters
    for size, narrow in (*((size, False) for size in about.rotated), (about.size, True)):
        part = "" if size == about.size else f", {size} of {about.size} rotated"
        part += ", cos of half the width" if narrow else ""
        for salt, (name, batch, tokens, first) in enumerate(
            (("13 tokens", 1, 13, 0), ("1 token", 1, 1, 4097), ("3x7 tokens", 3, 7, 100), ("no tokens", 1, 0, 0))
        ):
            positions = first + torch.arange(tokens, device="cpu").expand(batch, tokens)
            positions = positions + 11 * torch.arange(batch, device="cpu")[:, None]
            cos, sin = angles(subject, positions, size)
            if narrow:  # as GPT-OSS has them; most functions raise then, and are not asked
                cos, sin = cos[..., : size // 2].contiguous(), sin[..., : size // 2].contiguous()
            q = subject.normal(batch, tokens, about.q, about.size, salt=salt)
            k = subject.normal(batch, tokens, about.k, about.size, salt=salt + 50)
            both = q.transpose(1, 2), k.transpose(1, 2)
            dense = both[0].contiguous(), both[1].contiguous()
            grads = (0, 1)
            yield Case(f"{name}{part}", (*dense, cos, sin), differentiable=grads, generic=salt == 0, thorough=salt in (0, 2))
            if not tokens:
                continue
            yield Case(f"{name}{part}, as projections leave them", (*both, cos, sin), differentiable=grads)
            yield Case(f"{name}{part}, large and tiny", (dense[0] * 100, dense[1] * 1e-3, cos, sin), differentiable=grads)
            if batch > 1:
                yield Case(f"{name}{part}, one cos for all", (*dense, cos[:1], sin[:1]), differentiable=grads)
            packed = torch.full((batch, tokens, about.q + 2 * about.k, about.size), torch.nan, device=q.device, dtype=q.dtype)
            packed[:, :, : about.q], packed[:, :, about.q : about.q + about.k] = q, k
            views = packed[:, :, : about.q].transpose(1, 2), packed[:, :, about.q : about.q + about.k].transpose(1, 2)
            yield Case(f"{name}{part}, slices of one projection", (*views, cos, sin), differentiable=grads)
            if "unsqueeze_dim" in named:
                yield Case(f"{name}{part}, heads last", (q, k, cos, sin), {"unsqueeze_dim": 2}, differentiable=grads)
            if batch == 1:
                yield Case(f"{name}{part}, no batch", (q[0], k[0], cos[0], sin[0]), differentiable=grads)


def facts(site: Site, module: nn.Module) -> tuple[Any, ...]:
    """What the inputs of a function site depend on, for its verdict's key."""
    return (repr(heads(module)),) if site.row.probe == "rotary" else ()
