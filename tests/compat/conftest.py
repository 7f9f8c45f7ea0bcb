"""`kernels`, served from a Swapper whose hub is on loopback."""

import hashlib
import json
import sys

import pytest
import torch
from tests.hub import kernel_files
from tests.hub.repos import blob_id, is_lfs
from tests.swapping import CPU, LAYERS, Near

from kernelswap import compat
from kernelswap.api import Swapper
from kernelswap.cli import app
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.hub import HubSource
from kernelswap.sources.hub_client import HubClient
from kernelswap.sources.overrides import Overrides
from kernelswap.verifiers.publisher import Publishers, PublisherVerifier

CODE = """
from . import layers
from . import inner


class _Ops:
    def gemm(self, x):
        return x + 1


ops = _Ops()


def double(x):
    return x + x
"""
MORE = """

class Doubles(nn.Module):
    can_torch_compile = True

    def forward(self, x):
        return x * 2


class State(nn.Module):
    def __init__(self):
        super().__init__()

    def forward(self, x):
        return x
"""


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Nothing of the user's environment, and no policy file of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("USE_HUB_KERNELS", "DISABLE_KERNEL_MAPPING", "LOCAL_KERNELS", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def published(hub, name="org/demo", version=1, *, code=CODE, variants=("torch-cpu",), **more):
    """A repository with a branch for one version; its commit."""
    inside = {"layers.py": LAYERS + MORE, "inner/__init__.py": "VALUE = 7\n", "tuning.json": "{}", **more.pop("files", {})}
    files = {}
    for variant in variants:
        files |= kernel_files(variant, code, name=name.partition("/")[2], version=version, files=inside, **more)
    hub.organization(name.partition("/")[0], trusted=True)
    return hub.repo(name).branch(f"v{version}", files)


def old_lock(hub, name, commit):
    """A lock as releases up to 0.16 wrote it, with the digest of every build, as its text."""
    found = {}
    for path, data in sorted(hub.repo(name).commits[commit].items(), key=lambda item: item[0].encode()):
        build, variant, inside = path.split("/", 2)
        assert build == "build"
        blob = hashlib.sha256(data).hexdigest() if is_lfs(path, data) else blob_id(data)
        found.setdefault(variant, hashlib.sha256()).update(inside.encode() + bytes.fromhex(blob))
    variants = {v: {"hash": f"sha256-{state.hexdigest()}", "hash_type": "git_lfs_concat"} for v, state in found.items()}
    return json.dumps([{"repo_id": name, "sha": commit, "variants": variants}])


@pytest.fixture
def make_swapper(tmp_path, hub, hub_cache):
    """`make_swapper(local={"org/x": path}, offline=True)`: each with its own look at the hub and all with one cache."""

    def make(*, local=(), offline=False, at=None):
        source = HubSource(hub_cache, endpoint=at or hub.url, backoff=0.01, offline=offline)
        ask = HubClient(at or hub.url, None, 5.0, 0.01).trusts
        return Swapper(
            sources={"hub": Overrides(source, dict(local)) if local else source, "dir": DirectorySource()},
            verifiers=[PublisherVerifier(Publishers(tmp_path / "publishers", None if offline else ask))],
            machine=CPU,
            prover=Near(),
            cache=tmp_path / "cache",
        )

    return make


@pytest.fixture
def kernels(make_swapper):
    """The module, while it is ours."""
    compat.install(make_swapper())
    import kernels

    yield kernels
    kernels.register_kernel_mapping({}, inherit_mapping=False)
    compat.uninstall()
    assert "kernels" not in sys.modules


@pytest.fixture
def cli(hub, hub_cache, tmp_path, monkeypatch, capsys):
    """`cli("lock", ".")`: (exit code, JSON on stdout)."""
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KERNELS_CACHE", raising=False)

    def run(*argv):
        code = app.run([*map(str, argv), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run
