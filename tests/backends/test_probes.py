"""Each probe, on stand-ins for torch builds that this machine does not have."""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from kernelswap import machine
from kernelswap.backends import PROBES, cpu, cuda, mps, neuron, npu, rocm, tpu, xpu
from kernelswap.types import Device


def torch_like(**more):
    version = SimpleNamespace(cuda=None, hip=None, xpu=None)
    return SimpleNamespace(
        version=version,
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
        utils=SimpleNamespace(),
        _C=SimpleNamespace(_get_privateuse1_backend_name=lambda: "privateuseone"),
        **more,
    )


def cuda_torch(kinds, *, initialised=True):
    torch = torch_like()
    torch.version.cuda = "13.0"
    torch.cuda = SimpleNamespace(
        device_count=lambda: len(kinds),
        is_initialized=lambda: initialised,
        get_device_name=lambda i: kinds[i][0],
        get_device_capability=lambda i: kinds[i][1],
    )
    return torch


@pytest.mark.parametrize("probe", [p for n, p in PROBES if n != "cpu"])
def test_a_cpu_build_of_torch_is_nothing_else(probe):
    seen = probe(torch_like())
    assert not seen.present
    assert seen.reason
    assert seen.devices == ()


@pytest.mark.parametrize("probe", [p for n, p in PROBES if n not in {"cpu", "cuda"}])
def test_no_torch_is_no_accelerator(probe):
    assert not probe(None).present


def test_cuda_is_seen_with_its_capabilities():
    seen = cuda.probe(cuda_torch([("H200", (9, 0)), ("B200", (10, 0))]))
    assert (seen.present, seen.version) == (True, (13, 0))
    assert seen.devices == (Device("cuda", 0, "H200", (9, 0), "sm90"), Device("cuda", 1, "B200", (10, 0), "sm100"))


def test_a_cuda_build_without_a_device_is_still_cuda():
    seen = cuda.probe(cuda_torch([], initialised=False))
    assert (seen.present, seen.devices, seen.devices_reason) == (True, (), "torch.cuda.device_count() is 0")


def test_cuda_is_not_initialised_where_all_gpus_are_of_one_kind(monkeypatch):
    torch = cuda_torch([("H200", (9, 0))] * 2, initialised=False)
    torch.cuda.get_device_capability = torch.cuda.get_device_name = None  # asking these would initialise
    monkeypatch.setattr(cuda, "_managed", lambda: [("H200", (9, 0))] * 8)
    seen = cuda.probe(torch)
    assert [(d.index, d.arch) for d in seen.devices] == [(0, "sm90"), (1, "sm90")]


def test_mixed_gpus_are_asked_one_by_one(monkeypatch):
    monkeypatch.setattr(cuda, "_managed", lambda: [("old", (8, 0)), ("new", (9, 0))])
    seen = cuda.probe(cuda_torch([("new", (9, 0)), ("old", (8, 0))], initialised=False))
    assert [d.arch for d in seen.devices] == ["sm90", "sm80"]


def test_rocm_devices_carry_the_plain_gfx_name():
    torch = torch_like()
    torch.version.hip = "7.1.25424-4179531dcd"
    properties = SimpleNamespace(name="MI300X", gcnArchName="gfx942:sramecc+:xnack-")
    torch.cuda = SimpleNamespace(device_count=lambda: 1, get_device_properties=lambda i: properties)
    seen = rocm.probe(torch)
    assert (seen.version, seen.devices) == ((7, 1), (Device("rocm", 0, "MI300X", None, "gfx942"),))


def test_xpu_versions_are_years():
    torch = torch_like()
    torch.version.xpu = "20250301"
    torch.xpu = SimpleNamespace(device_count=lambda: 1, get_device_name=lambda i: "Max 1550")
    seen = xpu.probe(torch)
    assert (seen.version, seen.devices) == ((2025, 3), (Device("xpu", 0, "Max 1550"),))


def test_metal_is_seen_where_mps_is_available():
    torch = torch_like()
    torch.backends.mps.is_available = lambda: True
    assert mps.probe(torch).present
    assert mps.probe(torch).devices[0].type == "mps"


def test_tpu_and_neuron_are_seen_by_their_modules():
    torch = torch_like(neuron=SimpleNamespace(device_count=lambda: 2))
    assert [d.index for d in neuron.probe(torch).devices] == [0, 1]
    torch.backends.tpu = SimpleNamespace()
    assert tpu.probe(torch).present


def test_npu_is_the_private_backend_of_that_name(monkeypatch):
    package = ModuleType("torch_npu")
    package.utils = SimpleNamespace(get_cann_version=lambda: "8.1.RC1")
    monkeypatch.setitem(sys.modules, "torch_npu", package)
    torch = torch_like(npu=SimpleNamespace(device_count=lambda: 1, get_device_name=lambda i: "Ascend910B"))
    torch._C._get_privateuse1_backend_name = lambda: "npu"
    seen = npu.probe(torch)
    assert (seen.version, seen.devices) == ((8, 1), (Device("npu", 0, "Ascend910B"),))


def test_the_first_probe_that_says_yes_wins(monkeypatch):
    torch = cuda_torch([])
    torch.__version__ = "2.13.0"
    torch.neuron = SimpleNamespace()
    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", lambda name: torch if name == "torch" else real(name))
    assert machine.look().backend == "neuron"


def test_the_cpu_is_always_there():
    assert cpu.probe(None).present
    assert cpu.probe(torch_like()).present
