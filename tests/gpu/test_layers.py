"""The Triton layers against float64, forward and backward. Runs where there is a GPU; never in CI."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

BUILD = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "layers" / "build" / "torch-cuda"
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
DTYPES = list(TOLERANCES)


@pytest.fixture(scope="module")
def kernels():
    package = types.ModuleType("layers_cuda_under_test")
    package.__path__ = [str(BUILD)]
    sys.modules[package.__name__] = package
    names = ("rms_norm", "gated_norm", "layer_norm", "softmax", "glu", "rope", "rope_gradients", "layers")
    yield types.SimpleNamespace(**{n: importlib.import_module(f"{package.__name__}.{n}") for n in names})
    for name in [m for m in sys.modules if m.startswith(package.__name__)]:
        del sys.modules[name]


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def both(f, g, inputs, dtype):
    """Worst relative error of f's outputs and gradients against g's in float64; inputs must come out unwritten."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    kept = [x.detach().clone() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = f(*leaves), g(*exact)
    got, want = (got, want) if isinstance(got, tuple) else ((got,), (want,))
    grads = [torch.randn_like(x) for x in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(want, [x.double() for x in grads])
    assert all(torch.equal(a, b) for a, b in zip(leaves, kept, strict=True)), "an input was written to"
    pairs = [*zip(got, want, strict=True), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    return max(relative(a, b) for a, b in pairs)


def rms(x, w, offset=0):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (w + offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1024), (3, 7, 1000), (2, 5, 16, 128), (1, 37, 4096), (2, 3, 8192), (2, 3, 16384)], ids=str
)
def test_rms_norm_and_its_gradients(kernels, dtype, shape, offset):
    x, w = torch.randn(shape, device="cuda", dtype=dtype), torch.randn(shape[-1], device="cuda", dtype=dtype)
    error = both(lambda x, w: kernels.rms_norm.rms_norm(x, w, 1e-6, offset), lambda x, w: rms(x, w, offset), (x, w), dtype)
    assert error < TOLERANCES[dtype]


def gated(x, z, w, act, groups, before):
    a = torch.nn.functional.silu(z) if act == "silu" else torch.sigmoid(z)
    h = (x * a if before else x).unflatten(-1, (groups, -1))
    n = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(-2) * w
    return n if before else n * a


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 7, 1000), 1), ((333, 128), 1), ((2, 37, 4096), 8), ((2, 3, 16384), 1)], ids=str
)
def test_gated_norms_and_their_gradients(kernels, dtype, before, act, shape, groups):
    x, z = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    w = torch.randn(shape[-1], device="cuda", dtype=dtype)
    wide = torch.randn(*shape[:-1], shape[-1] + 64, device="cuda", dtype=dtype)[..., 64:]
    for gate in (z, wide):
        error = both(
            lambda x, z, w: kernels.gated_norm.rms_norm_gated(x, z, w, 1e-6, act, groups, before=before),
            lambda x, z, w: gated(x, z, w, act, groups, before),
            (x, gate, w),
            dtype,
        )
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 1000), (333, 128), (2, 37, 4096), (2, 3, 16384)], ids=str)
def test_layer_norms_and_their_gradients(kernels, dtype, shape):
    x, (w, b) = torch.randn(shape, device="cuda", dtype=dtype), torch.randn(2, shape[-1], device="cuda", dtype=dtype)
    want = torch.nn.functional.layer_norm
    for scaled, shifted in ((True, True), (True, False), (False, False)):
        inputs = x, *([w] if scaled else ()), *([b] if shifted else ())
        missing = (None,) * (3 - len(inputs))
        error = both(
            lambda x, *t: kernels.layer_norm.layer_norm(x, *t, *missing, 1e-5),  # noqa: B023 -- called within the turn
            lambda x, *t: want(x, shape[-1:], *t, *missing, 1e-5),  # noqa: B023 -- likewise
            inputs,
            dtype,
        )
        assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 1000), (333, 128), (2, 37, 4096), (2, 3, 16384), (5, 151936)], ids=str)
def test_softmax_and_its_gradient(kernels, dtype, shape):
    x = torch.randn(shape, device="cuda", dtype=dtype) * 3
    assert both(kernels.softmax.softmax, lambda x: torch.softmax(x, -1), (x,), dtype) < TOLERANCES[dtype]
    x[0, ..., : shape[-1] // 2] = float("-inf")
    torch.testing.assert_close(kernels.softmax.softmax(x), torch.softmax(x, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 3072), (7, 1001), (33, 4096)], ids=str)
def test_gated_activations_and_their_gradients(kernels, dtype, act, shape):
    g, u = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(2))
    f = kernels.glu
    assert both(lambda g, u: f.act_mul(g, u, act), lambda g, u: f.formula(g, u, act), (g, u), dtype) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 16, 8, 128), (2, 17, 12, 4, 64), (2, 5, 5, 5, 96)], ids=str)
def test_rotary_and_its_gradients(kernels, dtype, shape):
    b, s, h, k, d = shape
    q = torch.randn(b, s, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    kk = torch.randn(b, s, k, d, device="cuda", dtype=dtype).transpose(1, 2)
    cos, sin = (torch.randn(b, s, d, device="cuda", dtype=dtype) for _ in range(2))
    f = kernels.rope
    error = both(lambda q, k: f.rope(q, k, cos, sin), lambda q, k: f.formula(q, k, cos.double(), sin.double()), (q, kk), dtype)
    assert error < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", range(5))
@pytest.mark.parametrize("rotated", [128, 64, 40])
def test_rotary_in_every_form_whole_and_in_part(kernels, dtype, form, rotated):
    f = kernels.rope
    b, s, h, k, d = 2, 37, 12, 4, 128
    q = torch.randn(b, s, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    kk = torch.randn(b, s, k, d, device="cuda", dtype=dtype).transpose(1, 2)
    width = rotated // 2 if form == f.HALVES_NARROW else rotated
    cos, sin = (torch.randn(b, s, width, device="cuda", dtype=dtype) for _ in range(2))
    error = both(
        lambda q, k: f.rope(q, k, cos, sin, 1, form),
        lambda q, k: f.formula(q, k, cos.double(), sin.double(), 1, form),
        (q, kk),
        dtype,
    )
    assert error < TOLERANCES[dtype]
    found, want = f.rope(q[0], kk[0], cos[0], sin[0], 0, form), f.rope(q[:1], kk[:1], cos[:1], sin[:1], 1, form)
    assert all(torch.equal(x, y[0]) for x, y in zip(found, want, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["rotated back first", "one launch back"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_rotary_in_one_launch(kernels, dtype, fused, monkeypatch):
    monkeypatch.setattr(kernels.rope_gradients, "FUSED", fused)
    b, s, h, k, d = 2, 19, 16, 8, 128
    q = torch.randn(b, s, h, d, device="cuda", dtype=dtype).transpose(1, 2)
    kk = torch.randn(b, s, k, d, device="cuda", dtype=dtype).transpose(1, 2)
    w, v = (torch.randn(d, device="cuda", dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(b, s, d, device="cuda", dtype=dtype) for _ in range(2))
    f = kernels.rope
    error = both(
        lambda q, k, w, v: f.norm_rope(q, k, w, v, cos, sin, 1e-6),
        lambda q, k, w, v: f.formula(rms(q, w), rms(k, v), cos.double(), sin.double()),
        (q, kk, w, v),
        dtype,
    )
    assert error < 1.3 * TOLERANCES[dtype]


def test_what_the_kernels_do_not_take_goes_through_the_formula(kernels):
    empty = torch.empty(0, 64, device="cuda", dtype=torch.bfloat16)
    assert kernels.rms_norm.rms_norm(empty, torch.ones(64, device="cuda", dtype=torch.bfloat16), 1e-6).shape == (0, 64)
    strided = torch.randn(64, 128, device="cuda").t()
    want = rms(strided.double(), torch.ones(64, device="cuda").double())
    assert relative(kernels.rms_norm.rms_norm(strided, torch.ones(64, device="cuda"), 1e-6), want) < 1e-5


def test_compiled_and_eager_agree_in_one_graph(kernels):
    x, w = torch.randn(8, 256, device="cuda"), torch.randn(256, device="cuda")
    compiled = torch.compile(lambda x: kernels.rms_norm.rms_norm(x, w, 1e-6), fullgraph=True)
    assert relative(compiled(x), kernels.rms_norm.rms_norm(x, w, 1e-6)) < 1e-5
