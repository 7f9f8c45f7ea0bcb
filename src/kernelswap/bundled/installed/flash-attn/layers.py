"""What flash-attn has besides attention: a fused RMSNorm in Triton, and SiLU * mul. For CUDA devices."""

from __future__ import annotations

from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.layer_norm import rms_norm_fn
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Llama's. Reads `weight` (N,), `variance_epsilon` or `eps`."""

    weight: Tensor
    has_backward = True
    can_torch_compile = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., N)."""
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        return rms_norm_fn(hidden_states, self.weight, None, eps=eps)


class SwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`. Calls the three projections."""

    has_backward = True
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., H) -> (..., H)."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
