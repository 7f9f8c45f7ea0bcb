"""kernelswap/layers for NVIDIA GPUs: Triton, any CUDA version, any compute capability from 7.0."""

from torch import Tensor

from . import layers, rms_norm, tuning
from .layer_norm import layer_norm
from .softmax import softmax

__all__ = ["add_rms_norm", "layer_norm", "layers", "softmax", "tuning"]


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> tuple[Tensor, Tensor]:
    """`s = x + delta` and `rms_norm(s)` in one launch; scaled by `1 + weight` where `centered`. See `rms_norm.add_rms_norm`."""
    return rms_norm.add_rms_norm(x, delta, weight, eps, int(centered))
