"""The CPU kernels as an aarch64 compiler makes them (NEON), run by an emulator: their arithmetic, without torch's binding.

Needs `aarch64-linux-gnu-g++` and `qemu-aarch64-static` (Debian: g++-aarch64-linux-gnu, qemu-user-static); skips without.
"""

import pathlib
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F

from kernelswap import build

CSRC = pathlib.Path(build.__file__).parent / "bundled" / "layers" / "csrc"
CXX, EMULATOR = (shutil.which(name) for name in ("aarch64-linux-gnu-g++", "qemu-aarch64-static"))
pytestmark = pytest.mark.skipif(not (CXX and EMULATOR), reason="no aarch64 compiler, or no emulator to run what it makes")
CODES = {torch.float32: 0, torch.bfloat16: 1}
ACTS = {
    0: F.silu,
    1: F.gelu,
    2: lambda x: F.gelu(x, approximate="tanh"),
    3: lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    target = tmp_path_factory.mktemp("aarch64") / "one_call"
    sources = [pathlib.Path(__file__).with_name("one_call.cpp"), CSRC / "kernels_base.cpp"]
    subprocess.run([CXX, "-std=c++17", "-O3", "-static", f"-I{CSRC}", *sources, "-o", target], check=True)
    return target


def call(program, op, x, w, b, act=0):
    rows, n = x.shape
    given = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (x, w, b))
    numbers = [str(number) for number in (CODES[x.dtype], rows, n, act)]
    done = subprocess.run([EMULATOR, program, op, *numbers], input=given, capture_output=True, check=True)
    assert done.stderr == b"baseline"
    return torch.frombuffer(bytearray(done.stdout), dtype=x.dtype).view(rows, n)


def drawn(n, dtype):
    source = torch.Generator().manual_seed(n)
    return [torch.randn(size, generator=source).to(dtype) for size in ((3, n), (n,), (n,))]


def as_accurate(y, exact):
    slack = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[y.dtype]
    assert ((y.double() - exact).abs().amax(-1) / exact.abs().amax(-1)).max() < slack


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("n", [1, 7, 64, 199, 1024])
def test_norms(program, n, dtype):
    x, w, b = drawn(n, dtype)
    exact = x.double()
    as_accurate(call(program, "rms_norm", x, w, b), F.rms_norm(exact, (n,), w.double(), 1e-6))
    if n > 1:
        as_accurate(call(program, "layer_norm", x, w, b), F.layer_norm(exact, (n,), w.double(), b.double(), 1e-6))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("n", [1, 13, 1024])
def test_gated_activations(program, n, act, dtype):
    x, w, b = drawn(n, dtype)
    as_accurate(call(program, "act_mul", x, w, b, act), ACTS[act](x.double()) * x.double())


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("n", [2, 6, 64, 128])
def test_rotary(program, n, dtype):
    x, cos, sin = drawn(n, dtype)
    one, two = x.double().chunk(2, -1)
    as_accurate(call(program, "rotary", x, cos, sin), x.double() * cos.double() + torch.cat([-two, one], -1) * sin.double())
