"""Kernels at the commits of a lock: a file, or the metadata of the distribution that asks."""

import json
import shutil
import sys

import pytest
from tests.compat.conftest import CODE, old_lock, published

from kernelswap import compat


def current(name, commit, version=1):
    return json.dumps([{"dependency": {"repo-id": name, "version": version}, "lock": {"commit": commit}}])


@pytest.fixture
def locked(hub, tmp_path):
    """A lock at the first of two commits of org/demo."""
    commit = published(hub)
    published(hub, code=CODE + "\nLATER = True\n")
    path = tmp_path / "kernels.lock"
    path.write_text(current("org/demo", commit))
    return path


def test_a_locked_kernel_is_that_of_the_commit(kernels, locked):
    module = kernels.get_locked_kernel("org/demo", lockfile=locked)
    assert not hasattr(module, "LATER")
    assert kernels.get_kernel("org/demo", version=1).LATER
    assert kernels.get_locked_kernel("org/demo", False, lockfile=str(locked)) is module


def test_load_kernel_asks_the_cache_alone(kernels, locked, hub):
    with pytest.raises(FileNotFoundError):
        kernels.load_kernel("org/demo", lockfile=locked)
    assert hub.requests() == []
    with pytest.raises(FileNotFoundError):
        kernels.get_locked_kernel("org/demo", True, lockfile=locked)
    module = kernels.get_locked_kernel("org/demo", lockfile=locked)
    asked = len(hub.requests())
    assert kernels.load_kernel("org/demo", locked) is module
    assert kernels.load_kernel(repo_id="org/demo", lockfile=locked, backend="cpu") is module
    assert len(hub.requests()) == asked


def test_the_old_format_is_read_and_its_digests_hold(kernels, hub, tmp_path, make_swapper):
    path = tmp_path / "kernels.lock"
    right = old_lock(hub, "org/demo", published(hub, files={"big.bin": b"B" * 5000}))
    path.write_text(right)
    assert kernels.get_locked_kernel("org/demo", lockfile=path).double(1) == 2
    pinned = json.loads(right)[0]["variants"]["torch-cpu"]["hash"]
    path.write_text(right.replace(pinned, f"sha256-{'0' * 64}"))
    with pytest.raises(ValueError, match="the lock states sha256-000"):  # though it is in the store by now
        kernels.get_locked_kernel("org/demo", lockfile=path)
    with pytest.raises(ValueError, match="the lock states sha256-000"):
        kernels.LockedLayerRepository("org/demo", lockfile=path, layer_name="Doubles").load()


def test_digests_of_an_old_lock_hold_for_what_another_tool_fetched_too(hub, hub_cache, tmp_path, make_swapper):
    from huggingface_hub import snapshot_download

    commit = published(hub, files={"big.bin": b"B" * 5000})
    given = {"repo_type": "kernel", "revision": commit, "cache_dir": hub_cache, "endpoint": hub.url}
    snapshot_download("org/demo", **given)
    for listed in (*hub_cache.rglob("trees"), *hub_cache.rglob(".kernelswap")):
        shutil.rmtree(listed)  # older clients list nothing
    compat.install(make_swapper(offline=True))
    import kernels

    try:
        path = tmp_path / "kernels.lock"
        right = old_lock(hub, "org/demo", commit)
        pinned = json.loads(right)[0]["variants"]["torch-cpu"]["hash"]
        path.write_text(right.replace(pinned, f"sha256-{'0' * 64}"))
        vouched = {"lockfile": path, "trust_remote_code": True}  # nobody here ever asked who publishes it
        with pytest.raises(ValueError, match="the lock states sha256-000"):
            kernels.get_locked_kernel("org/demo", True, **vouched)
        path.write_text(right)
        assert kernels.get_locked_kernel("org/demo", True, **vouched).double(1) == 2
    finally:
        compat.uninstall()


def test_a_lock_that_does_not_help_says_so(kernels, locked, tmp_path):
    with pytest.raises(ValueError, match="`org/other` is not locked"):
        kernels.load_kernel("org/other", lockfile=locked)
    (tmp_path / "bad.lock").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.lock"):
        kernels.load_kernel("org/demo", lockfile=tmp_path / "bad.lock")
    with pytest.raises(FileNotFoundError):
        kernels.load_kernel("org/demo", lockfile=tmp_path / "nothing.lock")


def test_a_dependency_must_be_in_the_lock_too(kernels, hub, tmp_path):
    published(hub, "org/base", code="BASE = 5")
    depends = {"kernel-depends": [{"repo-id": "org/base", "version": 1}]}
    path = tmp_path / "kernels.lock"
    path.write_text(current("org/top", published(hub, "org/top", code="x = 1", metadata=depends)))
    with pytest.raises(ValueError, match="org/base"):
        kernels.get_locked_kernel("org/top", lockfile=path)


def test_digests_of_our_lock_are_compared_even_with_what_was_in_the_store(kernels, hub, tmp_path):
    commit = published(hub)
    kernels.get_kernel("org/demo", version=1)
    build = {"torch-cpu": {"tree": "0" * 64}}
    entry = {"name": "org/demo", "source": "hub", "version": 1, "commit": commit, "builds": build}
    path = tmp_path / "kernelswap.lock"
    path.write_text(json.dumps({"format_version": 1, "entries": [entry]}))
    with pytest.raises(ValueError, match="the lock states the tree"):
        kernels.get_locked_kernel("org/demo", lockfile=path)
    with pytest.raises(ValueError, match="the lock states the tree"):
        kernels.LockedLayerRepository("org/demo", lockfile=path, layer_name="RMSNorm").load()


@pytest.fixture
def package(locked, tmp_path, monkeypatch):
    """An installed distribution `my-package` with a lock in its metadata and a module `mypkg`, which asks."""
    site = tmp_path / "site"
    (site / "mypkg").mkdir(parents=True)
    (site / "mypkg" / "__init__.py").write_text(
        "import kernels\n\n\ndef get():\n    return kernels.get_locked_kernel('org/demo')\n\n\n"
        "def load():\n    return kernels.load_kernel(repo_id='org/demo')\n\n\n"
        "def layer():\n    return kernels.LockedLayerRepository('org/demo', layer_name='RMSNorm')\n"
    )
    info = site / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("mypkg\n")
    (info / "kernels.lock").write_text(locked.read_text())
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("mypkg", None)


def test_d1_a_lock_in_package_metadata_is_found_for_the_module_that_asks(kernels, package):  # installed
    import mypkg

    module = mypkg.get()
    assert not hasattr(module, "LATER")
    assert mypkg.load() is module
    assert mypkg.layer().load() is module.layers.RMSNorm
    with pytest.raises(ValueError, match=r"Could not find a `kernels\.lock` file in the caller's package metadata"):
        kernels.load_kernel("org/demo")


def test_a_locked_layer_serves(kernels, locked):
    import torch
    from torch import nn

    @kernels.use_kernel_forward_from_hub("Mine")
    class Mine(nn.Module):
        def forward(self, x):
            return x + x

    repository = kernels.LockedLayerRepository("org/demo", lockfile=locked, layer_name="Doubles")
    kernels.register_kernel_mapping({"Mine": {"cpu": repository}})
    model = kernels.kernelize(Mine(), mode=kernels.Mode.INFERENCE)
    assert type(model) is not Mine
    assert torch.equal(model(torch.ones(1)), torch.full((1,), 2.0))
    assert compat.installed()
