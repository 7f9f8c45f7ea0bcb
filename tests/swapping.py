"""What the tests of sites, plan and api share: a kernel in plain torch, a quick prover, small models."""

import torch
import torch.nn as nn

from kernelswap.types import Machine, Row, Use, Verdict

LAYERS = """
import torch
from torch import nn


class RMSNorm(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
        x = hidden_states.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(hidden_states.dtype)


class RMSNormZeroCentered(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * (1.0 + self.weight.float())).type_as(x)


class LayerNorm(nn.Module):
    can_torch_compile = True

    def forward(self, input):
        return nn.functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class SwiGLUMLP(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class GeGLUMLP(nn.Module):
    def forward(self, x):
        return self.down_proj(nn.functional.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class InferenceOnly(nn.Module):
    has_backward = False

    def forward(self, hidden_states):
        return RMSNorm.forward(self, hidden_states)


class NotCompilable(nn.Module):
    can_torch_compile = False

    def forward(self, hidden_states):
        return RMSNorm.forward(self, hidden_states)


class ReadsInside(nn.Module):
    def forward(self, x):
        up = nn.functional.linear(x, self.up_proj.weight, self.up_proj.bias)
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * up)


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return hidden_states * self.weight


class TwoArguments(nn.Module):
    def forward(self, hidden_states, gate):
        return hidden_states


class SiLU(nn.Module):
    def forward(self, input):
        return input * torch.sigmoid(input)


def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    half = q.shape[-1] // 2

    def turn(x):
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    return turn(q), turn(k)
"""

CPU = Machine(os="linux", cpu="x86_64", torch=(2, 13), cxx11=True)


def repository(make_repo, name="plain", **more):
    """A repository whose CPU build is plain Python; its path."""
    return make_repo(name, {"torch-cpu": {"code": "from . import layers", "files": {"layers.py": LAYERS}}}, **more)


def rows(root):
    """A table that serves everything from `root`."""

    def use(*layers):
        return tuple(Use(f"dir://{root}:{layer}") for layer in layers)

    mlp = ("gate_proj",), ("up_proj",), ("down_proj",)
    return (
        Row(
            "RMSNorm",
            targets=("*RMSNorm",),
            needs=(("weight",), ("variance_epsilon", "eps")),
            probe="rows",
            use=use("RMSNorm", "RMSNormZeroCentered"),
        ),
        Row("LayerNorm", targets=("LayerNorm",), needs=(("weight",),), probe="rows", use=use("LayerNorm")),
        Row("SwiGLUMLP", targets=("*",), needs=(*mlp, ("act_fn=SiLU*",)), probe="mlp", use=use("SwiGLUMLP")),
        Row("GeGLUMLP", targets=("*",), needs=(*mlp, ("act_fn=*GELU*",)), probe="mlp", use=use("GeGLUMLP")),
        Row("SiLU", targets=("SiLU", "SiLUActivation"), probe="elementwise", use=use("SiLU")),
        Row("rotary_pos_emb", "function", ("apply_rotary_pos_emb",), probe="rotary", use=use("apply_rotary_pos_emb")),
    )


class Near:
    """A prover of one forward: quick, and enough to tell the kernels above apart. Counts what it was asked."""

    def __init__(self):
        self.asked, self.calls = [], 0

    def equivalent(self, site, module, original, candidate, run):
        self.asked.append((site.path, candidate.layer, run))
        with torch.no_grad():
            if site.kind == "function":
                q, k, cos, sin = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
                pairs = zip(original(q, k, cos, sin), candidate.forward(q, k, cos, sin), strict=True)
            else:
                device = next((p.device for p in module.parameters()), "cpu")
                x = torch.randn(3, _width(module), dtype=getattr(torch, site.dtype.removeprefix("torch.")), device=device)
                pairs = [(original(module, x), candidate.forward(module, x))]
            close = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
        return Verdict(close, "is close" if close else "differs from the original on random tensors")

    def first_call(self, site, module, original, candidate, run, args, kwargs, *, anew=False):
        self.calls += 1
        given = (module, *args) if site.kind == "module" else args
        return candidate.forward(*given, **kwargs), Verdict(True, "is close")


def _width(module):
    projection = getattr(module, "gate_proj", None)
    if projection is not None:
        return projection.in_features
    return next((p.shape[-1] for p in module.parameters()), 16)


class RMSNorm(nn.Module):
    """Undecorated, of nobody's library."""

    def __init__(self, n, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(n) + 0.5), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Mlp(nn.Module):
    def __init__(self, n, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(n, 2 * n), nn.Linear(n, 2 * n), nn.Linear(2 * n, n)
        self.act_fn = act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.norm, self.mlp = RMSNorm(n), Mlp(n, nn.SiLU())

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def model(n=16, layers=3):
    """`layers` blocks of norm and MLP, and a norm at the end."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(n) for _ in range(layers)), RMSNorm(n))


def frozen(module):
    """Everything about a model that a swap must give back: classes, `__dict__`s, tensors by identity."""
    return [
        (path, type(m), {k: v for k, v in vars(m).items() if k[0] != "_"}, [(k, id(t)) for k, t in m._parameters.items()])
        for path, m in module.named_modules()
    ]
