"""What the tests of the adapters have on their hub and in their Swapper. Everything is small; kernels are plain torch."""

import functools
import pathlib
import tempfile

import torch
from tests.hub import kernel_files
from tests.swapping import CPU, LAYERS, Near

from kernelswap.api import Swapper
from kernelswap.machine import look
from kernelswap.sources.bundled import BundledSource
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.hub import HubSource
from kernelswap.types import Swap

IDS = torch.arange(2 * 7).reshape(2, 7)
SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

LIGER = """
import torch
from torch import nn


class LigerRMSNorm(nn.Module):
    def forward(self, hidden_states):
        x = hidden_states.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(hidden_states.dtype)


class OnlyInfers(nn.Module):
    has_backward = False
    can_torch_compile = True

    def forward(self, hidden_states):
        return LigerRMSNorm.forward(self, hidden_states)


class Trains(nn.Module):
    def forward(self, hidden_states):
        return LigerRMSNorm.forward(self, hidden_states)


class Compiles(nn.Module):
    can_torch_compile = True

    def forward(self, hidden_states):
        return LigerRMSNorm.forward(self, hidden_states)
"""

FLASH = """
import torch
from torch.nn.functional import scaled_dot_product_attention


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal, scale=softmax_scale, enable_gqa=True)
    return out.transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    parts = []
    for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:]):
        one = flash_attn_func(q[None, a:b], k[None, c:d], v[None, c:d], dropout_p, softmax_scale, causal and b - a > 1)
        parts.append(one[0])
    return torch.cat(parts)
"""


@functools.cache
def checkpoint(kind="qwen3"):
    """The files of a small model with fixed weights, as its repository holds them."""
    import transformers

    torch.manual_seed(0)
    more = {"head_dim": 8} if kind == "qwen3" else {}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SIZE, **more))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.3)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir()}


BACKENDS = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def builds(code, **more):
    """The files of a kernel of plain Python, for what this machine can run models on."""
    return {path: data for backend in BACKENDS for path, data in kernel_files(f"torch-{backend}", code, **more).items()}


def kernel(name, layers, **more):
    return builds("from . import layers", name=name, files={"layers.py": layers}, **more)


def publish(hub):
    hub.organization("kernels-community", trusted=True)
    hub.organization("stranger", trusted=False)
    hub.model("Qwen/Qwen3-0.6B").branch("main", checkpoint())
    hub.model("org/llama").branch("main", checkpoint("llama"))
    hub.repo("kernels-community/liger-kernels").branch("v3", kernel("liger", LIGER, version=3))
    hub.repo("kernels-community/liger_kernels").branch("v1", kernel("liger", LIGER))
    hub.repo("stranger/norms").branch("v1", kernel("norms", LIGER))
    flash = hub.repo("kernels-community/flash-attn2")
    for tag in ("2.0.0", "2.1.0", "2.2.0", "3.0.0", "4.0.0"):
        version = int(tag[0])
        files = builds(f"{FLASH}\nVERSION = {tag!r}\n", name="flash-attn2", version=version, unique=f"f{version}")
        flash.branch(f"v{version}", files)
        flash.tag(f"v{tag}", f"v{version}")
    return hub


def swapper(tmp_path, hub, hub_cache, **more):
    root = tmp_path / "bundled"
    if not root.exists():
        for path, data in kernel("layers", LAYERS).items():
            (root / "layers" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "layers" / path).write_bytes(data)
    sources = {
        "hub": HubSource(hub_cache, endpoint=hub.url, backoff=0.01, remember=0.0),
        "dir": DirectorySource(),
        "bundled": BundledSource(root, tmp_path / "built", lambda _: "0"),
    }
    from kernelswap.sources.hub_client import HubClient
    from kernelswap.verifiers.publisher import Publishers, PublisherVerifier

    ask = HubClient(hub.url, None, 5.0, 0.01).trusts
    verifiers = [PublisherVerifier(Publishers(tmp_path / "publishers", ask))]
    seen = CPU if BACKENDS == ("cpu",) else look()
    given = {"sources": sources, "verifiers": verifiers, "machine": seen, "prover": Near(), **more}
    return Swapper(cache=tmp_path / "cache", **given)


def serving(swapper, model):
    """`{path: spec's kernel and layer}` of everything that serves in the model's present mode."""
    found = {}
    for outcome in swapper.applied(model).outcomes if swapper.applied(model) else ():
        if isinstance(outcome, Swap):
            choice = outcome.serving(training=model.training)
            if choice.implementation is not None:
                origin = choice.implementation.origin.candidate
                found[f"{outcome.site.path}|{outcome.site.name}".rstrip("|")] = f"{origin.name}:{choice.implementation.layer}"
    return found


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def close(a, b):
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def plain(kind="qwen3"):
    """The model of the hub as PyTorch has it."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        for name, data in checkpoint(kind).items():
            (pathlib.Path(folder) / name).write_bytes(data)
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
