"""Kernels that come with layouts, as Transformers' guide to writing kernels has them: plain torch."""

KERNEL = """
import torch
from torch import nn
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming

CALLS = []


def norm(x, weight, eps):
    x_ = x.float()
    return weight * (x_ * torch.rsqrt(x_.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNormMLPLayout(nn.Module):
    conversion_mapping = [
        WeightRenaming("post_attention_layernorm.weight", "post_attention_layernorm.scale"),
        WeightRenaming("mlp.down_proj.weight", "post_attention_layernorm.down_proj.weight"),
        WeightConverter(
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            "post_attention_layernorm.gate_up_proj.weight",
            operations=[Concatenate(dim=0)],
        ),
    ]

    def __init__(self, norm, mlp):
        super().__init__()
        self.variance_epsilon = norm.variance_epsilon
        self.scale = nn.Parameter(torch.empty_like(norm.weight))
        self.gate_up_proj = nn.Linear(
            mlp.gate_proj.in_features, 2 * mlp.gate_proj.out_features, bias=False, dtype=mlp.gate_proj.weight.dtype
        )
        self.down_proj = mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, hidden_states):
        pass


class RMSNormMLP(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        CALLS.append(hidden_states.shape)
        gate, up = self.gate_up_proj(norm(hidden_states, self.scale, self.variance_epsilon)).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class OnlyInfersLayout(RMSNormMLPLayout):
    pass


class OnlyInfers(nn.Module):
    has_backward = False

    def forward(self, hidden_states):
        return RMSNormMLP.forward(self, hidden_states)


class WrongLayout(RMSNormMLPLayout):
    pass


class Wrong(nn.Module):
    def forward(self, hidden_states):
        return RMSNormMLP.forward(self, hidden_states) * 1.01


class ForgetsLayout(RMSNormMLPLayout):
    conversion_mapping = RMSNormMLPLayout.conversion_mapping[:2]


class Forgets(nn.Module):
    def forward(self, hidden_states):
        return RMSNormMLP.forward(self, hidden_states)


class RaisesLayout(nn.Module):
    def __init__(self, norm, mlp):
        super().__init__()
        raise ValueError("only silu is supported")


class Raises(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class Plain(nn.Module):
    def forward(self, hidden_states):
        return hidden_states


class ScaledNormLayout(nn.Module):
    conversion_mapping = [WeightRenaming(r"norm\\.weight", "norm.scale")]

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))
        self.epsilon = eps


class ScaledNorm(nn.Module):
    def forward(self, hidden_states):
        return norm(hidden_states, self.scale, self.epsilon)


class layers:
    RMSNormMLP = RMSNormMLP
    OnlyInfers = OnlyInfers
    Wrong = Wrong
    Forgets = Forgets
    Raises = Raises
    Plain = Plain
    ScaledNorm = ScaledNorm
"""
