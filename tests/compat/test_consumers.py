"""What libraries and scripts in the wild do with `kernels`, in their own words as far as a test can have them."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from tests.compat.conftest import CODE, old_lock, published
from tests.hub import kernel_files

FLASH = """
def flash_attn_func(q, k, v, causal=False, **more):
    return q


def flash_attn_varlen_func(q, k, v, **more):
    return q


def flash_attn_with_kvcache(q, k_cache, v_cache, **more):
    return q


from . import flash_attn_interface
"""
INTERFACE = """
def _wrapped_flash_attn_forward(q): return ("forward", q)
def _wrapped_flash_attn_backward(q): return ("backward", q)
def _wrapped_flash_attn_varlen_forward(q): return ("varlen forward", q)
def _wrapped_flash_attn_varlen_backward(q): return ("varlen backward", q)
def _flash_attn_forward(q): return ("forward 3", q)
def _flash_attn_backward(q): return ("backward 3", q)
"""


def flash(hub, name="kernels-community/flash-attn3", version=1, **more):
    return published(hub, name, version, code=FLASH, files={"flash_attn_interface.py": INTERFACE}, **more)


def test_transformers_asks_with_every_keyword_and_catches_what_it_catches(kernels, hub):
    """`lazy_load_kernel` and the loading of an attention kernel."""
    flash(hub)
    published(hub, "org/elsewhere", variants=("torch-cuda",))
    agent = {"framework": "transformers", "version": "5.23.0", "repo_id": "x"}
    given = {"user_agent": agent, "trust_remote_code": False}
    found = kernels.get_kernel("kernels-community/flash-attn3", revision=None, version=1, **given)
    assert found.flash_attn_varlen_func(1, 2, 3) == 1
    with pytest.raises((FileNotFoundError, AssertionError)):
        kernels.get_kernel("org/elsewhere", revision=None, version=1, **given)
    with pytest.raises(ValueError, match="has v1"):
        kernels.get_kernel("kernels-community/flash-attn3", revision=None, version=7, **given)


def test_transformers_kernelizes_with_all_its_keywords(kernels, hub):
    import torch
    from torch import nn

    published(hub)

    @kernels.use_kernel_forward_from_hub("Mine")
    class Mine(nn.Module):
        def forward(self, x):
            return x + x

    assert Mine.kernel_layer_name == "Mine"
    found = kernels.LayerRepository(repo_id="org/demo", layer_name="Doubles", version=1)
    with kernels.use_kernel_mapping({"Mine": {"cpu": {kernels.Mode.INFERENCE: found}}}, inherit_mapping=False):
        done = kernels.kernelize(
            Mine(), device=torch.device("cpu"), mode=kernels.Mode.INFERENCE, use_fallback=kernels.KernelizeFallback.ALL
        )
    assert torch.equal(done(torch.ones(2)), torch.full((2,), 2.0))


def test_diffusers_takes_functions_by_paths_into_sub_modules(kernels, hub):
    flash(hub)
    given = {"revision": None, "version": 1, "user_agent": {"framework": "diffusers"}, "trust_remote_code": True}
    module = kernels.get_kernel("kernels-community/flash-attn3", **given)
    paths = [
        "flash_attn_func",
        "flash_attn_varlen_func",
        *(f"flash_attn_interface._wrapped_flash_attn_{x}" for x in ("forward", "backward", "varlen_forward", "varlen_backward")),
        "flash_attn_interface._flash_attn_forward",
        "flash_attn_interface._flash_attn_backward",
    ]
    for path in paths:
        target = module
        for part in path.split("."):
            target = getattr(target, part)
        assert callable(target)


def test_diffusers_asks_for_a_quantisation_kernel_without_version_or_revision(kernels, hub):
    hub.organization("isotr0py", trusted=False)
    ops = "class ops:\n    @staticmethod\n    def gemm_w4a4(x):\n        return x\n"
    hub.repo("Isotr0py/ggml").branch("v1", kernel_files("torch-cpu", ops, name="ggml"))
    found = kernels.get_kernel("Isotr0py/ggml", user_agent={"framework": "diffusers"}, trust_remote_code=True)
    assert found.ops.gemm_w4a4(3) == 3


@pytest.mark.parametrize("module", ["bitsandbytes", "TRL, NeMo and scripts"])
def test_bare_requests_with_and_without_a_version(kernels, hub, module):
    flash(hub)
    given = {"version": 1} if module == "bitsandbytes" else {}
    found = kernels.get_kernel("kernels-community/flash-attn3", **given)
    sys.modules["flash_attn_interface"] = found  # some call it that for others
    try:
        import flash_attn_interface

        assert flash_attn_interface.flash_attn_func(1, 2, 3) == 1
        from flash_attn_interface import flash_attn_with_kvcache

        assert flash_attn_with_kvcache(4, 5, 6) == 4
    finally:
        del sys.modules["flash_attn_interface"]


def test_sglang_gives_the_lock_by_position_and_asks_by_branch(kernels, hub, tmp_path):
    commit = flash(hub, "kernels-community/sgl-flash-attn3")
    module = kernels.get_kernel("kernels-community/sgl-flash-attn3", revision="v1")
    assert module.flash_attn_with_kvcache(1, 2, 3) == 1
    path = tmp_path / "kernels.lock"
    path.write_text(old_lock(hub, "kernels-community/sgl-flash-attn3", commit))
    assert kernels.load_kernel("kernels-community/sgl-flash-attn3", str(path)) is module


def test_sglang_finds_the_build_in_the_cache_itself_and_loads_the_snapshot(kernels, hub, hub_cache):
    """A newer one reads the old lock, looks for metadata.json in the hub's cache, and loads the directory that it is in."""
    from huggingface_hub import try_to_load_from_cache

    commit = flash(hub, "kernels-community/sgl-flash-attn3")
    module = kernels.get_kernel("kernels-community/sgl-flash-attn3", version=1)
    (entry,) = json.loads(old_lock(hub, "kernels-community/sgl-flash-attn3", commit))
    (variant,) = entry["variants"]
    path = f"build/{variant}/metadata.json"
    found = try_to_load_from_cache(entry["repo_id"], path, cache_dir=hub_cache, revision=entry["sha"], repo_type="kernel")
    assert isinstance(found, str)
    snapshot = found.removesuffix(f"/{path}")
    local = kernels.get_local_kernel(snapshot)
    assert local.flash_attn_func(2, 3, 4) == 2
    assert local is module  # the same bytes are the same kernel


def test_a_script_that_reads_an_old_lock_itself_installs_what_it_pins_and_nothing_else(kernels, hub):
    commit = flash(hub, "kernels-community/flash-attn2")
    from kernels.lockfile import KernelLock, VariantLock

    from kernels import get_local_kernel, install_kernel

    entry = KernelLock.from_json(json.loads(old_lock(hub, "kernels-community/flash-attn2", commit))[0])
    assert (entry.repo_id, entry.sha, set(entry.variants)) == ("kernels-community/flash-attn2", commit, {"torch-cpu"})
    path = install_kernel(entry.repo_id, revision=entry.sha, variant_locks=entry.variants, validate_dependencies=True)
    assert get_local_kernel(path).flash_attn_func(1, 2, 3) == 1
    with pytest.raises(ValueError, match="the lock states sha256-000"):
        install_kernel(entry.repo_id, revision=entry.sha, variant_locks={"torch-cpu": VariantLock("sha256-" + "0" * 64)})
    with pytest.raises(ValueError, match="has no torch-cpu"):
        install_kernel(entry.repo_id, revision=entry.sha, variant_locks={})
    with pytest.raises(ValueError, match="sha"):
        KernelLock.from_json({"repo_id": "a/b", "sha": "short", "variants": {}})


def test_a_script_pins_a_revision_where_0_16_took_one_from_the_cache_alone(kernels, hub):
    commit = published(hub)
    with pytest.raises(FileNotFoundError):
        kernels.load_kernel("org/demo", lockfile=None, revision=commit, backend="cpu")
    module = kernels.get_kernel("org/demo", revision=commit)
    asked = len(hub.requests())
    assert kernels.load_kernel("org/demo", lockfile=None, revision=commit, backend="cpu") is module
    assert len(hub.requests()) == asked


def test_text_generation_inference_finds_an_old_lock_in_its_own_metadata(kernels, hub, tmp_path, monkeypatch):
    commit = published(hub)
    published(hub, code=CODE + "\nLATER = True\n")
    site = tmp_path / "site"
    (site / "text_generation_server").mkdir(parents=True)
    (site / "text_generation_server" / "__init__.py").write_text("")
    (site / "text_generation_server" / "kernels.py").write_text(
        textwrap.dedent(
            """
            import importlib

            from kernels import load_kernel as hub_load_kernel


            def load_kernel(*, module, repo_id):
                if importlib.util.find_spec(module) is not None:
                    return importlib.import_module(module)
                return hub_load_kernel(repo_id=repo_id)
            """
        )
    )
    info = site / "text_generation_server-3.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: text-generation-server\nVersion: 3.0\n")
    (info / "top_level.txt").write_text("text_generation_server\n")
    (info / "kernels.lock").write_text(old_lock(hub, "org/demo", commit))
    monkeypatch.syspath_prepend(str(site))
    try:
        from text_generation_server.kernels import load_kernel

        with pytest.raises(FileNotFoundError):  # the cache alone is asked
            load_kernel(module="nowhere_at_all", repo_id="org/demo")
        kernels.get_kernel("org/demo", revision=commit)
        module = load_kernel(module="nowhere_at_all", repo_id="org/demo")
        assert not hasattr(module, "LATER")
        assert load_kernel(module="json", repo_id="org/demo") is json
    finally:
        for name in [n for n in sys.modules if n.partition(".")[0] == "text_generation_server"]:
            del sys.modules[name]


def test_a_condition_on_the_version_of_kernels_opens(kernels):
    """Transformers, diffusers and axolotl compare versions; the same answer from all three places."""
    import importlib.metadata

    from packaging.version import Version

    version = Version(importlib.metadata.version("kernels"))
    assert version == Version(kernels.__version__)
    assert version >= Version("0.14")
    assert importlib.metadata.distribution("kernels").metadata["Name"] == "kernels"


SCRIPT = """
from kernels import get_kernel, has_kernel
import torch

if has_kernel("org/demo", version=1):
    demo = get_kernel("org/demo", version=1)
    print("DOUBLE", demo.double(torch.ones(1)).item())
"""


def test_a_script_that_knows_nothing_of_us_runs_under_kernelswap_run_and_so_do_the_verbs(hub, hub_cache, tmp_path):
    published(hub)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_CACHE": str(hub_cache),
        "KERNELSWAP_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }

    def run(*given):
        argv = [sys.executable, "-m", "kernelswap", "run", *given]
        done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("script.py").split() == ["DOUBLE", "2.0"]
    said = json.loads(run("-m", "kernels", "versions", "org/demo", "--json"))
    assert said["versions"][0]["variant"] == "torch-cpu"
    said = json.loads(run("-m", "kernels", "info", "org/demo", "--version", "1", "--json"))
    assert (said["name"], said["backends"]) == ("demo", ["cpu"])
