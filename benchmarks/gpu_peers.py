"""Other people's kernels, called directly where they can be imported. Nothing here changes a class or a module of anyone's.

`WHY` says of each peer its version, or why it takes no part.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

WHY: dict[str, str] = {}


def there(name: str) -> bool:
    """Whether that peer takes part."""
    return not WHY[name].startswith("not ")


def peer(name: str, distribution: str, module: str) -> Any:
    """The module, or `None` with the reason kept."""
    try:
        found = importlib.import_module(module)
    except Exception as e:  # noqa: BLE001  # packages raise what they like when their GPU is not there
        WHY[name] = f"not importable here ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''})"
        return None
    try:
        WHY[name] = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # on the path without its metadata
        WHY[name] = "of an unknown version"
    return found


_ops = peer("Liger", "liger-kernel", "liger_kernel.ops")
_norm = peer("QuACK", "quack-kernels", "quack.rmsnorm")
_loss = peer("QuACK", "quack-kernels", "quack.cross_entropy") if _norm else None
_fa4 = peer("FA4", "flash-attn-4", "flash_attn.cute")


def _function(module: str, name: str) -> Any:
    """An autograd function of Liger's, or `None`: they are not all re-exported."""
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)
    except (ImportError, AttributeError):
        return None


def rms_norm() -> dict[str, Callable[..., Any]]:
    """f(x, w) -> y."""
    found: dict[str, Callable[..., Any]] = {}
    if _ops is not None and (liger := _function("rms_norm", "LigerRMSNormFunction")):
        found["Liger"] = lambda x, w: liger.apply(x, w, 1e-6, 0.0, "llama", False)  # not in place
    if _norm is not None:
        found["QuACK"] = lambda x, w: _norm.rmsnorm(x, w, eps=1e-6)
    return found


def add_rms_norm() -> dict[str, Callable[..., Any]]:
    """f(x, delta, w) -> (sum, norm of it)."""
    found: dict[str, Callable[..., Any]] = {}
    if _ops is not None and (liger := _function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")):
        found["Liger"] = lambda x, d, w: liger.apply(x, d, w, 1e-6, 0.0, "llama", False)[::-1]
    if _norm is not None:
        found["QuACK"] = lambda x, d, w: _norm.rmsnorm(x, w, residual=d, eps=1e-6, prenorm=True)[::-1]
    return found


def rope() -> dict[str, Callable[..., Any]]:
    """f(q, k, cos, sin) -> both rotated; q and k are (B, H, S, D). Liger's writes into them."""
    if _ops is not None and (liger := _function("rope", "LigerRopeFunction")):
        return {"Liger": liger.apply}
    return {}


def gated() -> dict[str, Callable[..., Any]]:
    """f(gate, up) -> silu(gate) * up."""
    if _ops is not None and (liger := _function("swiglu", "LigerSiLUMulFunction")):
        return {"Liger": liger.apply}
    return {}


def cross_entropy() -> dict[str, Callable[..., Any]]:
    """f(logits, target) -> mean. Liger's writes the gradient into the logits."""
    found: dict[str, Callable[..., Any]] = {}
    if _ops is not None and (liger := _function("cross_entropy", "LigerCrossEntropyFunction")):
        found["Liger"] = lambda z, target: liger.apply(z, target, None)[0]
    if _loss is not None:
        found["QuACK"] = _loss.cross_entropy
    return found


def linear_cross_entropy() -> dict[str, Callable[..., Any]]:
    """f(x, w, target) -> mean."""
    if _ops is not None and (liger := _function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")):
        return {"Liger": lambda x, w, target: liger.apply(x, w, target)[0]}
    return {}


def attention() -> dict[str, Callable[..., Any]]:
    """f(q, k, v) -> causal attention, (B, H, S, D)."""
    if _fa4 is None:
        return {}

    def fa4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = _fa4.flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return {"FA4": fa4}


def as_liger(made: Any) -> Any:
    """A Transformers causal model whose own modules now call Liger; classes, modules and other models stay as they are.

    Liger's `apply_liger_kernel_to_*` would replace functions of the modelling module, and so change the original beside it.
    """
    rms, mul = _function("rms_norm", "LigerRMSNormFunction"), _function("swiglu", "LigerSiLUMulFunction")
    rotary = importlib.import_module("liger_kernel.transformers.rope").liger_rotary_pos_emb
    for module in made.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = functools.partial(_norm_forward, rms, module)
        elif kind.endswith("MLP"):
            module.forward = functools.partial(_mlp_forward, mul, module)
        elif kind.endswith("Attention"):
            module.forward = types.MethodType(_with(type(module).forward, apply_rotary_pos_emb=rotary), module)
    family = type(made).__module__.rpartition(".")[0].rpartition(".")[2]
    loss = importlib.import_module(f"liger_kernel.transformers.model.{family}").lce_forward
    made.forward = types.MethodType(functools.partial(_returning_dict, loss), made)
    return made


def _returning_dict(forward: Any, model: Any, *args: Any, **more: Any) -> Any:
    return forward(model, *args, **{"return_dict": True, "output_attentions": False, "output_hidden_states": False, **more})


def _norm_forward(rms: Any, module: Any, x: torch.Tensor) -> Any:
    return rms.apply(x, module.weight, module.variance_epsilon, 0.0, "llama", False)


def _mlp_forward(mul: Any, module: Any, x: torch.Tensor) -> Any:
    return module.down_proj(mul.apply(module.gate_proj(x), module.up_proj(x)))


def _with(function: Any, **names: Any) -> Any:
    """The function, with other globals under these names."""
    function = inspect.unwrap(function)
    made = types.FunctionType(
        function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
