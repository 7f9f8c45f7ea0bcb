"""A checkpoint whose `config.json` says whatever it likes: no kernel that it names is fetched, trusted or run."""

import contextlib
import json

import pytest
import torch
from tests.small import qwen3

import kernelswap
from kernelswap.api import Swapper
from kernelswap.types import Swap

transformers = pytest.importorskip("transformers")

EVIL = "stranger/evil"
TRICKS = {
    "attention": {"attn_implementation": EVIL, "_attn_implementation": f"{EVIL}:flash_attn_func"},
    "attention per part": {"attn_implementation": {"": EVIL, "text_config": EVIL}},
    "switched on": {"use_kernels": True, "kernels": {"RMSNorm": f"{EVIL}:RMSNorm"}},
    "a mapping": {"kernel_config": {"kernel_mapping": {"RMSNorm": f"{EVIL}:RMSNorm"}, "use_local_kernel": True}},
    "a mapping by another name": {"kernel_mapping": {"RMSNorm": f"{EVIL}:RMSNorm"}, "hub_kernels": {"rotary_pos_emb": EVIL}},
    "trust": {"trust_remote_code": True, "allow_all_kernels": True, "attn_implementation": EVIL},
    "a local directory": {"attn_implementation": "dir:///tmp/evil", "kernels": {"RMSNorm": "/tmp/evil:RMSNorm"}},
    "a layer's name": {"kernel_layer_name": "RMSNorm", "experts_implementation": EVIL},
}


@pytest.fixture
def checkpoint(tmp_path):
    qwen3(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def serving(as_default_hub, tmp_path, monkeypatch):
    """kernelswap over Transformers, with a hub that has the kernel and even calls its publisher trusted."""
    from tests.hub import kernel_files

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    as_default_hub.organization("stranger", trusted=True)
    code = "import builtins\nbuiltins.attacked = True\n"
    as_default_hub.repo(EVIL).branch("v1", kernel_files("torch-cpu", code, name="evil"))
    kernelswap.install(Swapper(cache=tmp_path / "cache"), build="never")
    as_default_hub.log.clear()
    yield as_default_hub
    kernelswap.uninstall()


@pytest.mark.parametrize("use_kernels", [False, True])
@pytest.mark.parametrize("trick", TRICKS)
def test_no_kernel_that_a_configuration_names_is_asked_for(world, serving, checkpoint, trick, use_kernels):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **TRICKS[trick]}))
    refuses = (
        ValueError,
        TypeError,
        AttributeError,
        OSError,
        ImportError,
        KeyError,
    )  # Transformers, some of these configurations
    with contextlib.suppress(*refuses):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, use_kernels=use_kernels)
        with torch.no_grad():
            assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 64)
    assert [path for _, path in serving.requests() if "evil" in path or "stranger" in path] == []


@pytest.mark.parametrize("trick", TRICKS)
def test_a_swap_looks_at_modules_and_not_at_their_configuration(world, serving, checkpoint, trick, tmp_path):
    model = transformers.Qwen3ForCausalLM.from_pretrained(checkpoint)
    for key, value in TRICKS[trick].items():
        if not key.endswith("attn_implementation"):
            setattr(model.config, key, value)
    outcomes = Swapper(cache=tmp_path / "cache").plan(model, build="never", hub=False)
    assert not [o for o in outcomes if isinstance(o, Swap)]
    assert [path for _, path in serving.requests() if "evil" in path or "stranger" in path] == []
