"""Transformer layers on NVIDIA GPUs, in Triton. Each class stands in for a module's forward; the module keeps its state."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from .glu import act_mul
from .rms_norm import rms_norm
from .rope import rope


class RMSNorm(nn.Module):
    """Llama's RMSNorm. Reads `weight` (N,) and `variance_epsilon` or `eps`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., N)."""
        try:
            eps = self.variance_epsilon
        except AttributeError:
            eps = self.eps
        return rms_norm(hidden_states, self.weight, eps)


class RMSNormZeroCentered(nn.Module):
    """Gemma's RMSNorm: scale is 1 + weight, product in float32. Reads `weight` (N,) and `eps` or `variance_epsilon`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N) -> (..., N)."""
        try:
            eps = self.eps
        except AttributeError:
            eps = self.variance_epsilon
        return rms_norm(x, self.weight, eps, 1)


class SwiGLUMLP(nn.Module):
    """down(silu(gate(x)) * up(x)). Calls `gate_proj`, `up_proj`, `down_proj`: whatever replaced them stays in effect."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), "silu"))


class GeGLUMLP(nn.Module):
    """down(gelu_tanh(gate(x)) * up(x)): Gemma's MLP. Calls `gate_proj`, `up_proj`, `down_proj`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """x (..., hidden) -> (..., hidden)."""
        return self.down_proj(act_mul(self.gate_proj(x), self.up_proj(x), "gelu_tanh"))


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """q (B, HQ, S, D), k (B, HK, S, D), cos and sin (B or 1, S, D) -> rotated q and k, in new memory."""
    return rope(q, k, cos, sin, unsqueeze_dim)


apply_rotary_pos_emb.can_torch_compile = True  # type: ignore[attr-defined]  # the layer contract's marks, on a function
apply_rotary_pos_emb.has_backward = True  # type: ignore[attr-defined]
