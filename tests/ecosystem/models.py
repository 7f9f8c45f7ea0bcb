"""Small models of Transformers, built from a configuration, and kernels for their layers."""

import torch
from tests.slots.parts import kernel, swap
from torch import nn

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
IDS = torch.arange(2 * 11).reshape(2, 11) % 64
CAUSAL = ("qwen3", "llama", "gemma", "gemma2", "mistral")


def make(kind, **more):
    """A model in eval mode with fixed random weights."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    size = dict(SIZE)
    if kind == "bert":
        size.pop("num_key_value_heads")
    elif kind in {"qwen3", "gemma", "gemma2"}:
        size["head_dim"] = 8
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **size, pad_token_id=0, **more)
    model = (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name.lower():
                p.normal_(0, 0.3)
    return model.eval()


def logits(model, **more):
    out = model(IDS, **more)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def norm_kernel(self, hidden_states):
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, eps)


def gemma_norm_kernel(self, x):
    return nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)


def layer_norm_kernel(self, input):  # noqa: A002  # the name of the original
    return torch.native_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)[0]


def rotary_kernel(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x):
        half = x.shape[-1] // 2
        return torch.cat((x[..., :half] * cos[..., :half] - x[..., half:] * sin[..., :half],
                          x[..., half:] * cos[..., half:] + x[..., :half] * sin[..., half:]), dim=-1)  # fmt: skip

    return turned(q), turned(k)


def mlp_kernel(self, x):
    gate, up = x @ self.gate_proj.weight.T, x @ self.up_proj.weight.T
    return self.down_proj(self.act_fn(gate) * up)


MLP_READS = ("gate_proj.weight", "up_proj.weight", "down_proj()", "act_fn()")
NORM = kernel(norm_kernel, reads=("weight", "variance_epsilon", "eps"))
ROTARY = kernel(rotary_kernel, kind="function", layer="rotary_pos_emb")
MLP = kernel(mlp_kernel, reads=MLP_READS, layer="MLP")


def plan(model, *, norms=NORM, rotary=True, mlps=False):
    """Swaps for every norm, every attention's rotary embedding, every gated MLP."""
    swaps = []
    for path, module in model.named_modules():
        name = type(module).__name__
        if norms is not None and name.endswith("RMSNorm"):
            swaps.append(swap(path, norms))
        if rotary and name.endswith("Attention") and "apply_rotary_pos_emb" in type(module).forward.__globals__:
            swaps.append(swap(path, ROTARY, name="apply_rotary_pos_emb"))
        if mlps and name.endswith("MLP"):
            swaps.append(swap(path, MLP))
    return swaps
