"""Kernels as they are published in the wild, of every era, through `get_kernel`: layouts, names of builds, metadata, native code."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tests.compat.conftest import published
from tests.hub import kernel_files

from kernelswap import compat, machine
from kernelswap.api import Swapper
from kernelswap.sources.hub import HubSource

HERE = machine.look()
ARCH = f"{HERE.cpu}-{HERE.os}"
TORCH = "".join(map(str, HERE.torch[:2]))
CODE = "from . import layers\n\n\ndef double(x):\n    return x + x\n"
LAYERS = "from torch import nn\n\n\nclass Doubles(nn.Module):\n    def forward(self, x):\n        return x * 2\n"
SHIM = "from .. import *\nraise AssertionError('the code is beside it')\n"


@pytest.fixture
def wild(hub, hub_cache, tmp_path):
    """`kernels` on this very machine, as a CPU one; the hub trusts `org`."""
    cpu = machine.for_backend(HERE, "cpu")
    hub.organization("org", trusted=True)
    compat.install(
        Swapper(sources={"hub": HubSource(hub_cache, endpoint=hub.url)}, verifiers=[], machine=cpu, cache=tmp_path / "cache")
    )
    import kernels

    yield kernels
    compat.uninstall()


def flat(variant="torch-cpu", **more):
    return kernel_files(variant, CODE, files={"layers.py": LAYERS}, **more)


def moved(files, variant, package):
    """The same code in a package below the build, with a digest that fits no more, as old builds had none."""
    found = {}
    for path, data in files.items():
        name = path.removeprefix(f"build/{variant}/")
        if name == "metadata.json":
            about = json.loads(data)
            del about["digest"]
            found[path] = json.dumps(about).encode()
        else:
            found[f"build/{variant}/{package}/{name}"] = data
    return found


def without_metadata(files):
    return {p: d for p, d in files.items() if not p.endswith("metadata.json")}


def old_metadata(files):
    """Up to 0.13 a loader read two keys, and builders wrote no others."""
    return {
        p: json.dumps({"version": 1, "python-depends": []}).encode() if p.endswith("metadata.json") else d
        for p, d in files.items()
    }


ERAS = {
    "flat, noarch": flat(),
    "flat, universal": flat("torch-universal"),
    "nested": moved(flat(), "torch-cpu", "demo"),
    "nested, universal, no metadata": without_metadata(moved(flat("torch-universal"), "torch-universal", "demo")),
    "nested, old metadata": old_metadata(moved(flat(), "torch-cpu", "demo")),
    "flat with a nested shim": kernel_files("torch-cpu", CODE, files={"layers.py": LAYERS, "demo/__init__.py": SHIM}),
    "flat, old metadata": old_metadata(flat()),
    "flat, no metadata": without_metadata(flat()),
    "for this torch": flat(f"torch{TORCH}-cpu-{ARCH}", backend="cpu"),
    "for the stable ABI": flat(f"torch-stable-abi29-cpu-{ARCH}", backend="cpu"),
}
if HERE.os == "linux":
    ERAS["for this torch, with its ABI"] = flat(f"torch{TORCH}-cxx11-cpu-{ARCH}", backend="cpu")


@pytest.mark.parametrize("era", ERAS)
def test_every_layout_loads(wild, hub, era):
    hub.repo("org/demo").branch("v1", ERAS[era])
    module = wild.get_kernel("org/demo", version=1)
    assert module.double(4) == 8
    assert wild.has_kernel("org/demo", version=1)
    assert wild.LayerRepository("org/demo", layer_name="Doubles", version=1).load()()(torch.ones(1)) == 2
    assert [k.metadata.version for k in wild.get_loaded_kernels() if k.module is module]


def test_of_many_builds_the_one_that_the_rules_prefer_is_taken(wild, hub):
    names = [
        f"torch{TORCH}-cpu-{ARCH}",
        f"torch-stable-abi29-cpu-{ARCH}",
        "torch-cpu",
        "torch-universal",
        "torch-cuda",
        "nonsense",
    ]
    files = {}
    for name in names:
        files |= kernel_files(name, f"label = {name!r}", backend="cuda" if "cuda" in name else "cpu", unique=f"{len(name):07x}")
    hub.repo("org/demo").branch("v1", files)
    best = f"torch-stable-abi29-cpu-{ARCH}"
    assert wild.get_kernel("org/demo", version=1).label == best
    found = wild.get_kernel_variants("org/demo", version=1)
    accepted = [v.variant.variant_str for v in found if isinstance(v, wild.VariantAccepted)]
    assert accepted == [best, f"torch{TORCH}-cpu-{ARCH}", "torch-cpu", "torch-universal"]


def test_a_repository_from_before_branches_for_versions_has_its_builds_on_main_and_its_versions_in_tags(wild, hub):
    repo = hub.repo("org/demo")
    repo.tag("v0.9.0", kernel_files("torch-universal", "label = 'first'"))
    repo.tag("v1.2.0", kernel_files("torch-universal", "label = 'second'", unique="0b1b2c3"))
    repo.branch("main", kernel_files("torch-universal", "label = 'main'", unique="0c1b2c3"))
    assert wild.get_kernel("org/demo", revision="v0.9.0").label == "first"
    assert wild.get_kernel("org/demo", version=">=1.0,<2.0").label == "second"
    assert wild.get_kernel("org/demo").label == "main"


def test_compiled_code_of_a_hub_registers_its_operators_and_runs(wild, hub, native_of_a_hub):
    files = {
        f"build/{native_of_a_hub.name}/{p.relative_to(native_of_a_hub)}": p.read_bytes()
        for p in native_of_a_hub.rglob("*")
        if p.is_file()
    }
    hub.repo("org/native").branch("v3", {p: d for p, d in files.items() if "__pycache__" not in p})
    module = wild.get_kernel("org/native", version=3)
    x = torch.randn(5)
    assert torch.equal(module.twice(x), 2 * x)
    assert wild.LayerRepository("org/native", layer_name="Twice", version=3).load()()(x).equal(2 * x)


SUB = """
def _wrapped_flash_attn_forward(q, k, v):
    return q + k + v


def _flash_attn_forward(q, k, v):
    return q
"""
TUNED = """
import json
from pathlib import Path

import torch

from . import flash_attn_interface

TUNING = json.loads(Path(__file__).with_name("tuning.json").read_text())
NAMESPACE = __name__.rpartition(".")[2]


@torch.library.custom_op(f"{NAMESPACE}::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * TUNING["scale"]


@scaled.register_fake
def _(x):
    return torch.empty_like(x)


ops = getattr(torch.ops, NAMESPACE)
"""


def test_sub_modules_ops_tuning_files_and_operators_of_its_own(wild, hub):
    files = {"flash_attn_interface.py": SUB, "tuning.json": '{"scale": 3}'}
    hub.repo("org/demo").branch("v1", kernel_files("torch-cpu", TUNED, files=files, unique="0d1b2c3"))
    module = wild.get_kernel("org/demo", version=1)
    one = torch.ones(2)
    assert module.flash_attn_interface._wrapped_flash_attn_forward(1, 2, 3) == 6
    assert torch.equal(module.ops.scaled(one), 3 * one)
    assert torch.equal(torch.compile(module.scaled, backend="eager", fullgraph=True)(one), 3 * one)


CPP = """
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>

static void twice(tvm::ffi::TensorView x, tvm::ffi::TensorView y) {
  const float* in = static_cast<const float*>(x.data_ptr());
  float* out = static_cast<float*>(y.data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i) out[i] = 2 * in[i];
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(twice, twice);
"""
TVM = """
from pathlib import Path

import torch
import tvm_ffi

_id = {id!r}
ops = tvm_ffi.load_module(str(Path(__file__).parent / f"{{_id}}.so"))


def twice(x):
    y = torch.empty_like(x)
    ops.twice(x, y)
    return y
"""


def test_a_library_of_tvm_ffi_loads_and_is_preferred_to_a_build_without_native_code(wild, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # where ninja is
    ffi = pytest.importorskip("tvm_ffi")
    import tvm_ffi.cpp

    if shutil.which("ninja") is None or HERE.os != "linux":
        pytest.skip("tvm_ffi builds with ninja")
    built = tvm_ffi.cpp.build_inline("demo", cpp_sources=CPP, build_directory=str(tmp_path / "tvm"))
    major, minor = ffi.__version__.split(".")[:2]
    name, unique = f"tvm-ffi{major}{minor}-cpu-{ARCH}", "0e1b2c3"
    id_ = f"_demo_cpu_{unique}"
    library = {f"{id_}.so": Path(built).read_bytes()}
    files = kernel_files(name, TVM.format(id=id_), files=library, unique=unique, metadata={"python-depends": ["tvm-ffi"]})
    hub.repo("org/demo").branch("v1", {**files, **kernel_files("torch-cpu", "label = 'noarch'")})
    module = wild.get_kernel("org/demo", version=1)
    assert torch.equal(module.twice(torch.ones(3)), torch.full((3,), 2.0))


# -- errors of types that callers catch ----------------------------------------------------------------------------------


def test_a_build_for_another_chip_or_loader_is_a_runtime_error_too(hub, make_swapper):
    from dataclasses import replace

    from kernelswap.types import Device

    swapper = make_swapper()
    device = Device("cuda", 0, "test", capability=(8, 0))
    swapper._machine = replace(swapper.machine, backend="cuda", backend_version=(12, 8), devices=(device,))
    compat.install(swapper)
    import kernels

    try:
        published(hub, variants=("torch-cuda",), metadata={"backend": {"type": "cuda", "archs": ["9.0a"]}})
        published(hub, "org/newer", metadata={"kernels-minver": "9.0.0"}, variants=("torch-cuda",))
        for name in ("org/demo", "org/newer"):
            assert not kernels.has_kernel(name, version=1)
            for error in (RuntimeError, FileNotFoundError):
                with pytest.raises(error):
                    kernels.get_kernel(name, version=1)
        assert kernels.get_kernel("org/demo", version=1, check_arch=False).double(1) == 2
    finally:
        compat.uninstall()
        sys.modules.pop("kernels", None)
