"""Packages that are installed here, as a source of kernels: found while they are there, and never put there."""

import importlib.util
import json

import pytest
import torch
from tests.contract.sources import SourceContract, Subject, on_disk
from torch import nn

from kernelswap.api import Swapper
from kernelswap.errors import UnknownKernel
from kernelswap.proof import Check, Verdicts
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.installed import InstalledSource
from kernelswap.types import Kept, Mode, Requirement, Row, Swap, Use

LAYERS = """
from torch import Tensor, nn
from quick_norm import rms

class RMSNorm(nn.Module):
    weight: Tensor
    eps: float

    def forward(self, x):
        return rms(x, self.weight, self.eps)
"""
PACKAGE = """
import torch

def rms(x, weight, eps):
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
"""


def install(site, version="1.2", code=PACKAGE):
    """What an installer leaves: the package and its dist-info."""
    (site / "quick_norm").mkdir(parents=True, exist_ok=True)
    (site / "quick_norm" / "__init__.py").write_text(code)
    for old in site.glob("*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    about = site / f"quick_norm-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: quick-norm\nVersion: {version}\nLicense: MIT\n")
    (about / "RECORD").write_text(f"quick_norm/__init__.py,sha256={hash(code)},{len(code)}\n")


@pytest.fixture
def source(tmp_path):
    layers = tmp_path / "known" / "quick-norm"
    layers.mkdir(parents=True)
    (layers / "__init__.py").write_text("from . import layers\n")
    (layers / "layers.py").write_text(LAYERS)
    install(tmp_path / "site")
    return InstalledSource(tmp_path / "known", (str(tmp_path / "site"),))


def of(name, **more):
    return Requirement(name, source="installed", **more)


class TestInstalled(SourceContract):
    @pytest.fixture
    def subject(self, source, tmp_path):
        (candidate,) = source.find(of("quick-norm"))[0]
        into = tmp_path / "expected"
        into.mkdir()
        source.fetch(candidate, into)
        files = on_disk(into)
        assert files["layers.py"] == LAYERS.encode()
        assert b'"1.2"' in files["_package.py"]
        return Subject(source, of("quick-norm"), {"torch-universal": files}, of("quick-gelu"))


def test_a_package_that_is_not_installed_is_no_kernel(source, tmp_path):
    empty = InstalledSource(source.root, (str(tmp_path / "nothing"),))
    with pytest.raises(UnknownKernel, match="quick-norm is not installed here"):
        empty.find(of("quick-norm"))
    with pytest.raises(UnknownKernel, match="there are layers for quick-norm"):
        source.find(of("quick-nrm"))
    with pytest.raises(UnknownKernel, match="the version that it has"):
        source.find(of("quick-norm", constraints=">=1.0"))


def test_another_version_is_another_kernel(source, tmp_path):
    (before,) = source.find(of("quick-norm"))[0]
    install(tmp_path / "site", version="1.3")
    (after,) = source.find(of("quick-norm"))[0]
    assert before.commit != after.commit
    (tmp_path / "into").mkdir()
    with pytest.raises(UnknownKernel, match="changed"):
        source.fetch(before, tmp_path / "into")


def test_the_same_version_with_other_files_is_another_kernel(source, tmp_path):
    (before,) = source.find(of("quick-norm"))[0]
    install(tmp_path / "site", code=PACKAGE + "# patched\n")
    assert source.find(of("quick-norm"))[0][0].commit != before.commit


class Wasteful(nn.Module):
    """An RMSNorm that takes its time."""

    def __init__(self, n):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(n) + 0.5), 1e-6

    def forward(self, x):
        for _ in range(10):
            out = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return out


def test_it_serves_where_a_measurement_chose_it_and_only_there(source, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.chdir(tmp_path)
    row = Row("RMSNorm", targets=("Wasteful",), probe="rows", rivals=(Use("installed://quick-norm:RMSNorm"),))
    check = Check(Verdicts(tmp_path / "verdicts", key=tmp_path / "key"), contain="never")
    sources = {"installed": source, "dir": DirectorySource()}
    swapper = Swapper(cache=tmp_path / "cache", sources=sources, table=(row,), prover=check, verifiers=())
    model = nn.Sequential(Wasteful(64)).eval()
    assert isinstance(swapper.plan(model, mode=Mode.INFERENCE)[0], Kept), "unmeasured it is no candidate"
    assert isinstance(swapper.plan(model, mode=Mode.INFERENCE, choose="measured")[0], Kept), (
        "nor where a clock is asked, and knows nothing"
    )
    swapper.measure(model, seconds=60, compile=False)
    (outcome,) = swapper.plan(model, choose="measured", mode=Mode.INFERENCE)
    assert isinstance(outcome, Swap)
    assert {by for _, by, _ in outcome.inference.measured} == {"installed://quick-norm:RMSNorm"}
    install(tmp_path / "site", version="2.0")
    again = Swapper(cache=tmp_path / "cache", sources=sources, table=(row,), prover=check, verifiers=())
    assert again.measure(model, seconds=0, compile=False).left == 5, "a new version is measured anew"


def test_every_package_of_the_table_has_its_layers(tmp_path):
    from kernelswap import spec, table

    known = Swapper(cache=tmp_path).sources["installed"]
    rivals = [spec.parse(use.spec) for row in table.default() for use in row.rivals if use.spec.startswith("installed://")]
    assert {r.name for r in rivals} == set(known.names()) == {"liger-kernel", "flashinfer-python", "flash-attn"}
    for rival in rivals:
        assert f"class {rival.layer}(nn.Module)" in (known.root / rival.name / "layers.py").read_text()


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run here")
def test_liger_without_a_device_loses_with_its_own_reason(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    swapper = Swapper(cache=tmp_path)
    model = nn.Sequential(LlamaRMSNorm(64)).eval()
    wanted = {"prefer": {"RMSNorm": "installed://liger-kernel:RMSNorm"}, "inherit": False, "mode": Mode.INFERENCE}
    (kept,) = swapper.plan(model, **wanted)
    assert "No module named 'triton'" in kept.reason or "0 active drivers" in kept.reason, kept.reason


def test_metadata_names_the_licence_of_the_package(source):
    (candidate,) = source.find(of("quick-norm"))[0]
    assert json.loads(source.read(candidate, "metadata.json"))["license"] == "MIT"
