"""kernelswap/layers for NVIDIA GPUs: Triton, any CUDA version, any compute capability from 7.0."""

from . import layers

__all__ = ["layers"]
