"""Liger's kernels behind the forwards of the modules that they can stand in for. They need Triton and a device that it compiles for."""

from __future__ import annotations

from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Llama's: normalised in float32, rounded, scaled. Reads `weight` (N,), `variance_epsilon` or `eps`."""

    weight: Tensor
    has_backward = True
    can_torch_compile = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (..., N) -> (..., N)."""
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        # the last argument keeps the gradient that it is given as it is
        return LigerRMSNormFunction.apply(hidden_states, self.weight, eps, 0.0, "llama", False)


class RMSNormZeroCentered(nn.Module):
    """Gemma's: everything in float32, scaled by `1 + weight`. Reads `weight` (N,), `eps` or `variance_epsilon`."""

    weight: Tensor
    has_backward = True
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., N) -> (..., N)."""
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return LigerRMSNormFunction.apply(x, self.weight, eps, 1.0, "gemma", False)


class LayerNorm(nn.Module):
    """torch.nn.LayerNorm over the last dimension, with weight and bias. Reads `weight`, `bias`, `eps`."""

    weight: Tensor
    bias: Tensor
    eps: float
    has_backward = True
    can_torch_compile = False

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name of the original's parameter
        """`input` (..., N) -> (..., N)."""
        return LigerLayerNormFunction.apply(input, self.weight, self.bias, self.eps)


class SwiGLUMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`. Calls the three projections."""

    has_backward = True
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., H) -> (..., H)."""
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))


class GeGLUMLP(nn.Module):
    """`down(gelu(gate(x)) * up(x))`, with the tanh form of GELU. Calls the three projections."""

    has_backward = True
    can_torch_compile = False

    def forward(self, x: Tensor) -> Tensor:
        """`x` (..., H) -> (..., H)."""
        return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
