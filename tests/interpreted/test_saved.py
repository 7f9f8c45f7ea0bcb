"""What a decoder layer keeps for its backward pass with the GPU kernels in it: each activation once, in its own dtype."""

import torch
import transformers.models.qwen3.modeling_qwen3 as qwen3
from transformers import Qwen3Config, Qwen3ForCausalLM

HIDDEN, INNER, HEADS, KV, DIM, TOKENS = 128, 384, 16, 8, 16, 32


def kept(layers, monkeypatch, depth, *, swapped):
    """Bytes per token that autograd holds after a forward pass, parameters apart."""
    config = Qwen3Config(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=depth, num_attention_heads=HEADS, num_key_value_heads=KV,
        head_dim=DIM, vocab_size=64,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).train()
    with monkeypatch.context() as patch:
        if swapped:
            patch.setattr(qwen3.Qwen3RMSNorm, "forward", layers.layers.RMSNorm.forward)
            patch.setattr(qwen3.Qwen3MLP, "forward", layers.layers.SwiGLUMLP.forward)
            patch.setattr(qwen3, "apply_rotary_pos_emb", layers.layers.apply_rotary_pos_emb)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage  # which also keeps its address from being given out again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(torch.randint(0, 64, (1, TOKENS)), use_cache=False)
    return sum(s.nbytes() for s in held.values()) / TOKENS


def per_layer(layers, monkeypatch, *, swapped):
    return (kept(layers, monkeypatch, 3, swapped=swapped) - kept(layers, monkeypatch, 1, swapped=swapped)) / 2


def test_a_layer_keeps_each_activation_once(layers, launches, monkeypatch):
    """x and its norm, twice; q before and after norm and rotation, and the answer; k so, v; gate, up and their product."""
    least = 2 * (4 * HIDDEN + 3 * HEADS * DIM + 3 * KV * DIM + 3 * INNER) + 4 * HEADS  # and a float32 by head
    assert per_layer(layers, monkeypatch, swapped=True) == least
    assert {"_forward"} <= set(launches)
    assert per_layer(layers, monkeypatch, swapped=False) > 1.5 * least
