"""What the kernels compute, in plain torch, and how close they come to it.

These are also what serves where a kernel does not: other dtypes, other devices, shapes that it does not take.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

TOLERANCES = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (4e-3, 8e-3)}
"""dtype -> (forward, gradients): largest error of a row relative to its largest value, against these formulas in float64."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * w`, or `* (1 + w)` where `centered`; computed in float32, rounded once.

    Source: Zhang & Sennrich 2019, arXiv:1910.07467.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if centered:
        return (normed * (1.0 + weight.to(wide))).to(x.dtype)
    return (normed * weight.to(wide)).to(torch.promote_types(x.dtype, weight.dtype))


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> tuple[Tensor, Tensor]:
    """`s = x + delta`, rounded, and `rms_norm(s)`: the residual stream after a block, and what the next block reads of it."""
    s = x + delta
    return s, rms_norm(s, weight, eps, centered=centered)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * w + b` over the last dimension. Source: Ba et al. 2016, arXiv:1607.06450."""
    return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`. Source: Hendrycks & Gimpel 2016, arXiv:1606.08415."""
    return nn.functional.silu(x)


def gelu(x: Tensor) -> Tensor:
    """`x * Phi(x)`, Phi the distribution function of the normal distribution. Source: as `silu`."""
    return nn.functional.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """`x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`. Source: as `silu`."""
    return nn.functional.gelu(x, approximate="tanh")


def gelu_tanh_spelled(x: Tensor) -> Tensor:
    """`gelu_tanh`, operation by operation."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def gelu_quick(x: Tensor) -> Tensor:
    """`x * sigmoid(1.702 x)`. Source: as `silu`."""
    return x * torch.sigmoid(1.702 * x)


ACTS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "gelu_quick": gelu_quick}
"""In the order of their numbers in kernels.h."""


def act_mul(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`act(gate) * up`. Source: Shazeer 2020, arXiv:2002.05202."""
    return ACTS[act](gate) * up


def project(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """`x W_i^T + b_i` for each weight; summed up in float32, rounded once.

    Shapes: x (..., K), W_i (N_i, K), b_i (N_i,) or None, each result (..., N_i).
    """
    return tuple(nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def gate_up(x: Tensor, weights: tuple[Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None], act: str) -> Tensor:
    """`act(x W_g^T + b_g) * (x W_u^T + b_u)`: an MLP up to its last product. Source: as `act_mul`."""
    return act_mul(*project(x, weights, biases), act)


def rotate_half(x: Tensor) -> Tensor:
    """`(x1, x2) -> (-x2, x1)` on the halves of the last dimension."""
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`x * cos + rotate_half(x) * sin` on the first R elements of each head, the others as they are.

    Shapes: q (B, HQ, T, D) and k (B, HK, T, D), or (B, T, H, D) with `unsqueeze_dim` 2; cos, sin (B or 1, T, R), R <= D.
    Source: Su et al. 2021, arXiv:2104.09864, in the half-split order of GPT-NeoX.
    """
    cos, sin, r = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        if r == x.shape[-1]:
            return x * cos + rotate_half(x) * sin
        turned, rest = x[..., :r], x[..., r:]
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    return rotate(q), rotate(k)
