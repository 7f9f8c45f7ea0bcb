"""Transformers' own integration, not ours: its gate opens, its decorators are ours, and `use_kernels=True` reaches our kernelize."""

import os
import subprocess
import sys
import textwrap

from tests.compat.conftest import published

SCRIPT = """
from kernelswap import compat

compat.install()
import torch
from transformers import KernelConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available

assert is_kernels_available()
from transformers.integrations import hub_kernels
import kernels

assert hub_kernels.LayerRepository is kernels.LayerRepository
assert KernelConfig.__module__.startswith("transformers")
torch.manual_seed(0)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2)).eval().save_pretrained("model")
ids = torch.arange(8)[None]
with torch.no_grad():
    before = LlamaForCausalLM.from_pretrained("model")(ids).logits
kernels.register_kernel_mapping({"RMSNorm": {"cpu": kernels.LayerRepository("org/demo", layer_name="RMSNorm", version=1)}})
model = LlamaForCausalLM.from_pretrained("model", use_kernels=True)
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-4)
from kernelswap.slots import module as module_slot

served = set(map(id, module_slot.swapped(model)))
print("SERVED", sorted(path for path, m in model.named_modules() if id(m) in served))
from transformers.integrations.hub_kernels import get_kernel

print("DOUBLE", get_kernel("org/demo", version=1, allow_all_kernels=True).double(2))
"""


def test_use_kernels_of_transformers_itself_is_served(hub, hub_cache, tmp_path):
    published(hub)
    env = {
        **{k: v for k, v in os.environ.items() if k not in {"LOCAL_KERNELS", "USE_HUB_KERNELS", "HF_HUB_OFFLINE"}},
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(hub_cache),
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "KERNELSWAP_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    given = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    done = subprocess.run(given, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    norms = [f"model.layers.{i}.{n}" for i in range(2) for n in ("input_layernorm", "post_attention_layernorm")]
    assert f"SERVED {sorted([*norms, 'model.norm'])}" in done.stdout
    assert "DOUBLE 4" in done.stdout
