"""`use_kernels=True` on models of many families, decorated or not, with the kernels that come with kernelswap and the prover of users."""

import pytest
import torch
from tests.adapters.world import logits
from tests.kernels import repository

import kernelswap
from kernelswap.proof import Check
from kernelswap.types import Swap

SIZE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48,
    "n_inner": 48, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_positions": 64,
    "shared_expert_intermediate_size": 16, "sliding_window": 4, "state_size": 8, "word_embed_proj_dim": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "bert": {"LayerNorm", "GeLU"},
    "bloom": {"LayerNorm"},
    "cohere": {"SwiGLUMLP"},
    "falcon": {"LayerNorm", "GeLU", "rotary_pos_emb"},
    "gemma": {"RMSNorm", "GeGLUMLP", "rotary_pos_emb"},
    "glm4": {"RMSNorm", "SiLU"},
    "gpt2": {"LayerNorm", "NewGELU"},
    "gpt_neox": {"LayerNorm", "GeLU"},
    "gpt_oss": {"RMSNorm"},
    "granitemoe": {"RMSNorm", "SiLU", "rotary_pos_emb"},
    "llama": {"RMSNorm", "SwiGLUMLP", "rotary_pos_emb"},
    "mamba": {"RMSNorm", "SiLU"},
    "olmo2": {"RMSNorm", "SwiGLUMLP", "rotary_pos_emb"},
    "opt": {"LayerNorm"},
    "qwen2_moe": {"RMSNorm", "SiLU", "SwiGLUMLP", "rotary_pos_emb"},
    "starcoder2": {"LayerNorm", "GeluTanh", "rotary_pos_emb"},
}
IDS = torch.arange(3, 12)[None]


@pytest.fixture
def swapper(make_swapper, tmp_path, layers_build):
    repository(layers_build, tmp_path / "bundled" / "layers")
    made = make_swapper(prover=Check(None), machine=None)
    kernelswap.install(made)
    yield made
    kernelswap.uninstall()


def made(kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind)
    computed = {name for name in SIZE if isinstance(getattr(type(config), name, None), property)}
    taken = {name: value for name, value in SIZE.items() if hasattr(config, name) and name not in computed}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **taken)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    return model


def gradients(model):
    model.train()
    model.zero_grad()
    torch.manual_seed(1)  # dropout draws the same numbers, whatever is checked on the way
    model(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return found


@pytest.mark.parametrize("kind", FAMILIES)
def test_layers_are_served_logits_and_gradients_stay_and_switching_off_gives_every_bit_back(kind, swapper):
    model = made(kind)
    plain, expected = logits(model, IDS), gradients(model)
    model.set_use_kernels(True)
    for _ in range(2):
        torch.testing.assert_close(logits(model, IDS), plain, atol=2e-5, rtol=1e-4)
    outcomes = [o for o in swapper.applied(model).outcomes if isinstance(o, Swap)]
    assert {o.site.layer for o in outcomes if o.inference.implementation is not None} == FAMILIES[kind], swapper.explain(model)
    found = gradients(model)
    assert list(found) == list(expected)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    assert swapper.applied(model).refusals == (), swapper.explain(model)
    model.use_kernels = False
    assert torch.equal(logits(model, IDS), plain)
