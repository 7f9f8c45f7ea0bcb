"""A small Qwen3 on the tests' hub under the id of the guide, kernels around it, and kernelswap installed over Transformers."""

import pytest
from tests.adapters import world


@pytest.fixture(autouse=True)
def _alone(one_thread):
    """In every test of these."""


@pytest.fixture
def published(as_default_hub):
    """The hub, with the small Qwen3 as `Qwen/Qwen3-0.6B`, a small Llama as `org/llama`, and kernels of kernels-community."""
    world.publish(as_default_hub)
    return as_default_hub


@pytest.fixture
def make_swapper(tmp_path, monkeypatch, hub, hub_cache):
    """A Swapper with the default table; its bundled kernels are plain torch, its hub is on loopback, its prover quick."""
    monkeypatch.chdir(tmp_path)  # policy files are looked for in the working directory
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("USE_HUB_KERNELS", "DISABLE_KERNEL_MAPPING", "LOCAL_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    return lambda **more: world.swapper(tmp_path, hub, hub_cache, **more)


@pytest.fixture
def installed(make_swapper):
    """kernelswap over Transformers; gives the Swapper that serves."""
    import kernelswap

    swapper = make_swapper()
    kernelswap.install(swapper)
    yield swapper
    kernelswap.uninstall()


@pytest.fixture
def qwen(published, installed):
    """`qwen(use_kernels=True, ...)`: the small Qwen3, loaded as the guide does."""
    from transformers import AutoModelForCausalLM

    return lambda *, of="Qwen/Qwen3-0.6B", **more: AutoModelForCausalLM.from_pretrained(of, **more)


@pytest.fixture
def said(caplog):
    """Everything that was said to the user so far, line by line."""
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("kernelswap")]


@pytest.fixture
def kernels(as_default_hub, installed, tmp_path):
    """kernelswap over Transformers, attention kernels of every shape on the hub, and the bundled one; gives the Swapper."""
    import shutil

    from tests.adapters import attention_world

    attention_world.publish(as_default_hub)
    shutil.copytree(attention_world.BUNDLED, tmp_path / "bundled" / "attention" / "build" / "torch-universal")
    return installed
