"""FlashInfer's norms, for inference on CUDA devices."""

from __future__ import annotations

from flashinfer.norm import gemma_rmsnorm, rmsnorm
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Llama's. Reads `weight` (N,), `variance_epsilon` or `eps`."""

    weight: Tensor
    has_backward = False
    can_torch_compile = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., N)."""
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        n = hidden_states.shape[-1]
        return rmsnorm(hidden_states.reshape(-1, n), self.weight, eps).view(hidden_states.shape)


class RMSNormZeroCentered(nn.Module):
    """Gemma's: scaled by `1 + weight`. Reads `weight` (N,), `eps` or `variance_epsilon`."""

    weight: Tensor
    has_backward = False
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., N) -> (..., N)."""
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return gemma_rmsnorm(x.reshape(-1, x.shape[-1]), self.weight, eps).view(x.shape)
