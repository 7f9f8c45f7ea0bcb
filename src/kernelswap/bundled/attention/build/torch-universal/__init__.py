"""Attention over PyTorch's own kernels, under the names of flash-attention 2, and as an attention function of Transformers.

    o = softmax(scale * q k^T + bias) v

Works with nothing else installed, on every device and dtype that PyTorch's attention has; one-token queries on a GPU go to a
Triton kernel of its own where Triton is importable. Forward and backward, except for that one token.
"""

from . import tuning
from .dense import append_token
from .flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .forward import flash_attn_forward, supports_flash_attn, supports_lengths

__all__ = [
    "append_token",
    "flash_attn_forward",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "supports_flash_attn",
    "supports_lengths",
    "tuning",
]
