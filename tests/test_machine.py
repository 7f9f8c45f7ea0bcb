import dataclasses
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from kernelswap import backends, machine
from kernelswap.backends import seen
from kernelswap.errors import SpecError
from kernelswap.types import Device, Machine

SRC = pathlib.Path(machine.__file__).parents[1]
HERE = Machine(
    os="linux",
    cpu="x86_64",
    python=(3, 11),
    torch=(2, 13),
    cxx11=True,
    backend="cuda",
    backend_version=(13, 0),
    devices=(Device("cuda", 0, "H", (9, 0), "sm90"),),
    why=(("os", "seen"),),
)


def test_every_field_has_its_reason():
    looked = machine.look()
    assert {f.name for f in dataclasses.fields(Machine)} - {"why"} == {name for name, _ in looked.why}
    assert all(reason for _, reason in looked.why)


def test_looking_agrees_with_torch():
    torch = pytest.importorskip("torch")
    looked = machine.look()
    assert looked.torch == tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    assert (looked.backend == "cuda") == bool(torch.version.cuda)
    assert looked.python == sys.version_info[:2]


def test_a_machine_without_torch_is_looked_at():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from kernelswap import machine; m = machine.look()\n"
        "print(m.torch, m.backend, dict(m.why)['torch'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SRC)
    assert done.stdout.startswith("None ")
    assert "torch is" in done.stdout


def test_a_probe_that_raises_becomes_a_reason(monkeypatch):
    def broken(torch):
        raise RuntimeError("driver too old")

    monkeypatch.setattr(machine, "PROBES", (("cuda", broken), *backends.PROBES[-1:]))
    looked = machine.look()
    assert looked.backend == "cpu"
    assert "cuda passed over, its probe raised RuntimeError: driver too old" in dict(looked.why)["backend"]


def test_the_detection_order_is_the_published_one():
    assert [name for name, _ in backends.PROBES] == ["tpu", "neuron", "cuda", "rocm", "metal", "xpu", "cann", "cpu"]


def test_a_planned_machine_keeps_what_was_not_named():
    planned = machine.override(HERE, "torch=2.14, cuda=13.2,sm=120,os=linux,cpu=aarch64,offline")
    assert (planned.torch, planned.backend, planned.backend_version) == ((2, 14), "cuda", (13, 2))
    assert planned.devices == (Device("cuda", 0, "planned", (12, 0), "sm120"),)
    assert (planned.os, planned.cpu, planned.python, planned.cxx11) == ("linux", "aarch64", (3, 11), True)
    why = dict(planned.why)
    assert why["torch"] == "planned: torch=2.14"
    assert why["offline"] == "planned: offline"
    assert why["os"] == "planned: os=linux"


@pytest.mark.parametrize(
    ("text", "backend", "version", "archs"),
    [
        ("cuda=12.8", "cuda", (12, 8), ["sm90"]),
        ("sm=9.0", "cuda", (13, 0), ["sm90"]),
        ("sm=sm_121", "cuda", (13, 0), ["sm121"]),
        ("rocm=7.1,gfx=942", "rocm", (7, 1), ["gfx942"]),
        ("gfx=gfx90a", "rocm", None, ["gfx90a"]),
        ("backend=cpu", "cpu", None, []),
        ("metal,os=macos,cpu=arm64,macos=26.1", "metal", None, []),
        ("backend=npu", "cann", None, []),
        ("xpu=2025.3", "xpu", (2025, 3), []),
    ],
)
def test_devices_of_another_backend_are_not_visible(text, backend, version, archs):
    planned = machine.override(HERE, text)
    assert (planned.backend, planned.backend_version, [d.arch for d in planned.devices]) == (backend, version, archs)


def test_a_plan_for_another_os_has_no_abi_flag():
    assert machine.override(HERE, "os=windows").cxx11 is None
    assert machine.override(machine.override(HERE, "os=windows"), "os=linux").cxx11 is True


@pytest.mark.parametrize(
    ("text", "said", "at"),
    [
        ("torhc=2.14", "did you mean torch?", 0),
        ("torch=2.14,zzz=1", "known keys: os, cpu", 11),
        ("torch=new", "torch expects a version such as 2.14", 0),
        ("torch=2.14, sm=huge", "sm expects a compute capability", 12),
        ("cpu=x86_64,os=beos", "os expects linux, darwin or windows", 11),
        ("cuda=13.0,rocm=7.1", "rocm contradicts what came before it: backend is cuda", 10),
        ("metal=2", "metal expects no value", 0),
    ],
)
def test_a_wrong_key_is_pointed_at(text, said, at):
    with pytest.raises(SpecError, match=said.replace("?", r"\?")) as e:
        machine.override(HERE, text)
    assert e.value.span[0] == at


def test_a_caller_may_choose_the_cpu_or_what_is_there():
    assert machine.for_backend(HERE, "cuda") is HERE
    chosen = machine.for_backend(HERE, "cpu")
    assert (chosen.backend, chosen.backend_version, chosen.devices) == ("cpu", None, ())
    with pytest.raises(SpecError, match="this process has 'cuda'"):
        machine.for_backend(HERE, "rocm")
    with pytest.raises(ValueError, match="cuda"):  # what callers of other loaders catch
        machine.for_backend(HERE, "nonsense")


@pytest.mark.parametrize(("text", "pair"), [("2.13.0+cu130", (2, 13)), ("26", (26, 0)), ("8.1.RC1", (8, 1)), ("", None)])
def test_versions_are_read_to_the_minor(text, pair):
    assert seen.major_minor(text) == pair


def test_a_device_that_cannot_be_described_is_left_out_with_the_reason():
    def one(index):
        if index == 1:
            raise OSError("fell off the bus")
        return Device("cuda", index, "x")

    devices, reason = seen.by_index(3, one, "count")
    assert [d.index for d in devices] == [0, 2]
    assert "device 1 left out: OSError: fell off the bus" in reason


def test_the_fields_are_plain_data():
    assert SimpleNamespace(**dataclasses.asdict(machine.look())).os
