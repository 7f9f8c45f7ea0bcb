"""Transformer layers for the CPU: norms, gated MLPs, activations and rotary embedding, forward and backward.

`layers` holds what stands in for a module's forward, `functional` the functions on tensors, `reference` the formulas in plain
torch with the tolerances that the kernels are held to.
"""

from . import functional, layers, reference
from .functional import act, act_mul, add_rms_norm, layer_norm, rms_norm, rotary
from .layers import apply_rotary_pos_emb

__all__ = [
    "act",
    "act_mul",
    "add_rms_norm",
    "apply_rotary_pos_emb",
    "functional",
    "layer_norm",
    "layers",
    "reference",
    "rms_norm",
    "rotary",
]
