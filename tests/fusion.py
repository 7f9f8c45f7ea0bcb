"""What the tests of fused statements share: small models of Transformers, and the default table with those rows on any device."""

from dataclasses import replace

import torch

from kernelswap import table
from kernelswap.types import Swap

LAYERS = {"residual_norm", "norm_rotary"}
FUSED = {  # kind -> sites of each pattern in two layers
    "llama": {"residual_norm": 2},
    "mistral": {"residual_norm": 2},
    "qwen2": {"residual_norm": 2},
    "qwen3": {"residual_norm": 2, "norm_rotary": 2},
    "gemma2": {"residual_norm": 2},
    "gemma3_text": {"residual_norm": 2, "norm_rotary": 2},
}
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
IDS = torch.arange(2 * 11).reshape(2, 11) % 64


def anywhere():
    """The default table; its rows for statements serve on every device."""
    return [replace(row, use=tuple(replace(use, on=()) for use in row.use)) if row.statements else row for row in table.default()]


def make(kind, device="cpu", dtype=torch.float32, **more):
    """A model in eval mode with fixed random weights, those of norms included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZE, **more}, pad_token_id=0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn(p.shape) * 0.3)
    return model.to(device, dtype).eval()


def served(applied):
    """Layer to the number of its sites that a kernel serves now."""
    found = {}
    for outcome in applied.outcomes:
        if isinstance(outcome, Swap) and outcome.serving(training=outcome.site.training).implementation is not None:
            found[outcome.site.layer] = found.get(outcome.site.layer, 0) + 1
    return found


def fused(applied):
    """The same for fused statements alone."""
    return {layer: n for layer, n in served(applied).items() if layer in LAYERS}


def step(model, ids=IDS):
    """The loss and every gradient of one training step."""
    loss = model(ids, labels=ids).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [loss.detach(), *grads]
