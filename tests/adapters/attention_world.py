"""Attention kernels of every shape on the tests' hub, made of the bundled kernel's sources, and small models with loud attention."""

import copy
from pathlib import Path

import torch
from tests.hub import kernel_files

BUNDLED = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "attention" / "build" / "torch-universal"
OURS = {p.name: p.read_bytes() for p in BUNDLED.glob("*.py") if p.name != "__init__.py"}

FLASH = """
from . import flash

CALLS = []


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                    deterministic=False, return_attn_probs=False):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    CALLS.append("func")
    return flash.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                           return_attn_probs=False, block_table=None):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and isinstance(max_seqlen_q, int) and cu_seqlens_q.dtype == cu_seqlens_k.dtype
    CALLS.append("varlen")
    out = flash.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
                                       window_size, softcap)
    return out, None


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, block_table=None, softmax_scale=None,
                            causal=False, window_size=(-1, -1), softcap=0.0):
    CALLS.append("kvcache")
    return flash.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, block_table=block_table,
                                         softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap)
"""
POOR = """
from . import flash

CALLS = []


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    CALLS.append("varlen")
    return flash.flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, softmax_scale, causal)
"""
ITSELF = """
from . import forward

CALLS = []
supports_flash_attn = True


def flash_attn_forward(module, query, key, value, attention_mask, **kwargs):
    CALLS.append("forward")
    return forward.flash_attn_forward(module, query, key, value, attention_mask, **kwargs)
"""
NAMED = """
import torch
from . import flash

CALLS = []


def my_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    CALLS.append("my_attention")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return flash.flash_attn_func(q, k, v, softmax_scale=scaling, causal=True), None


def in_flash_style(q, k, v, softmax_scale=None, causal=False):
    CALLS.append("in_flash_style")
    return flash.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal)


class nested:
    attention = staticmethod(my_attention)
"""
SPARSE = """
def sparse_atten_func(*args, **kwargs):
    raise NotImplementedError


def build_k2q_csr(*args, **kwargs):
    raise NotImplementedError
"""


def files(code, **more):
    return kernel_files("torch-cpu", code, files=OURS, **more)


def publish(hub):
    hub.organization("kernels-community", trusted=True)
    hub.organization("stranger", trusted=False)
    flash = hub.repo("kernels-community/flash-attn2")
    for version in (2, 3, 4):
        flash.branch(f"v{version}", files(FLASH, name="flash-attn2", version=version, unique=f"000000{version}"))
    flash.tag("v2.1.0", "v2")
    flash.pull_request(1, files(FLASH, name="flash-attn2", version=4, unique="00000f1"))
    hub.repo("kernels-community/poor-flash").branch("v1", files(POOR, name="poor"))
    hub.repo("kernels-community/itself").branch("v1", files(ITSELF, name="itself"))
    hub.repo("kernels-community/named").branch("v1", files(NAMED, name="named"))
    hub.repo("kernels-community/sparse").branch("v1", files(SPARSE, name="sparse"))
    hub.repo("stranger/flash").branch("v1", files(FLASH, name="stranger"))
    hub.repo("kernels-community/for-cuda").branch("v1", kernel_files("torch213-cxx11-cu128-x86_64-linux", name="other"))
    return hub


SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 8,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
MODELS = {
    "qwen3": {"head_dim": 8},
    "llama": {},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 1.5},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4},
    "gpt_oss": {
        "head_dim": 8, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "bert": {"num_key_value_heads": None},
}  # fmt: skip
CAUSAL = [kind for kind in MODELS if kind != "bert"]


def pair(kind, attention, **more):
    """The same small model twice, in float32: with eager attention, and with `attention`. Weights are large: attention matters."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    size = {k: v for k, v in {**SIZE, **MODELS[kind], **more}.items() if v is not None or k.endswith("token_id")}
    config = AutoConfig.for_model(kind, **size)
    cls = AutoModel if kind == "bert" else AutoModelForCausalLM
    torch.manual_seed(0)
    eager = cls.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in eager.named_parameters():
            p.copy_(torch.randn_like(p) * 0.3) if "norm" not in name.lower() else p.add_(torch.randn_like(p) * 0.1)
    model = cls.from_config(copy.deepcopy(config), attn_implementation=attention).eval()
    model.load_state_dict(eager.state_dict())
    assert model.config._attn_implementation == attention
    return eager, model


def out(model, ids, **more):
    found = model(ids, **more)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def calls(swapper, text):
    """What a kernel of the hub was asked, since it was loaded."""
    return swapper.load(text).CALLS


def registered(text):
    """What is registered under a name; prepares it first."""
    from kernelswap.adapters.transformers import attention

    attention.prepare(text)
    return attention._open[-1].registered[text]


def replace_mask(text, function, monkeypatch):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    monkeypatch.setitem(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, text, function)
