"""The bundled CPU layers: what they compute, at every instruction set, and that they take nothing and leave nothing."""

import ctypes

import pytest
import torch
from tests.kernels import load
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation, QuickGELUActivation, SiLUActivation
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.t5.modeling_t5 import T5LayerNorm

from kernelswap import layers as contract
from kernelswap import metadata
from kernelswap.types import Artifact, Candidate, Kernel, Requirement

DTYPES = (torch.float32, torch.bfloat16)
ACTS = ("silu", "gelu", "gelu_tanh", "gelu_quick")
SHAPES = ((1, 1), (3, 5, 37), (2, 128), (7, 4099), (33, 1024))
"""One element; a row shorter than any vector's multiple; a multiple of all; prime and long; enough rows for every piece."""
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""To an original that rounds between its operations; the originals of norms compute in float32 at most."""
LAYERS = ("RMSNorm", "RMSNormZeroCentered", "LayerNorm", "SwiGLUMLP", "GeGLUMLP", "GEGLU", "SwiGLU", "LinearGELU", "LinearQuickGELU", "SiLU", "GELU", "GELUTanh", "NewGELU", "FastGELU", "QuickGELU")  # fmt: skip


@pytest.fixture(scope="module")
def kernel(layers_alone):
    return load(layers_alone)


@pytest.fixture(scope="module")
def ops(kernel):
    """The operators themselves, below the rules of when they are worth it."""
    return kernel.functional.ops


def instruction_sets(layers_alone):
    (library,) = layers_alone.glob("*.so")
    choose = ctypes.CDLL(str(library)).kernels_isa
    choose.restype, choose.argtypes = ctypes.c_char_p, (ctypes.c_char_p,)
    return choose


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request, layers_alone):
    """Every kernel compiled for another instruction set; back to the widest afterwards."""
    choose = instruction_sets(layers_alone)
    if choose(request.param.encode()).decode() != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    choose(b"")


def error(found, wanted):
    """Largest error of a row, relative to the largest value of that row (to 0.01 where all of it cancels)."""
    if wanted.numel() == 0:
        assert found.shape == wanted.shape
        return 0.0
    found, wanted = (t.double().reshape(-1, t.shape[-1]) for t in (found, wanted))
    return ((found - wanted).abs().amax(-1) / wanted.abs().amax(-1).clamp_min(1e-2)).max().item()


def randn(*shape, dtype=torch.float32, scale=1.0, seed=0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def truth(formula, *inputs):
    """The formula's values and gradients in float64, and the upstream gradients that they are for."""
    wide = [t.double().requires_grad_() for t in inputs]
    out = formula(*wide)
    out = out if isinstance(out, tuple) else (out,)
    upstream = [randn(*t.shape, dtype=inputs[0].dtype, seed=9) for t in out]
    return out, torch.autograd.grad(out, wide, [g.double() for g in upstream], allow_unused=True), upstream


def within(kernel, dtype, found, wanted, *, gradients=False):
    tolerance = kernel.reference.TOLERANCES[dtype][gradients]
    for mine, true in zip(found, wanted, strict=True):
        assert mine.dtype is dtype
        assert error(mine, true) <= tolerance


# -- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centered", [False, True])
def test_rms_norm_is_the_formula(kernel, ops, isa, dtype, shape, centered):
    x, w = randn(*shape, dtype=dtype), randn(shape[-1], dtype=dtype, seed=1)
    out, grads, (g,) = truth(lambda x, w: kernel.reference.rms_norm(x, w, 1e-6, centered=centered), x, w)
    within(kernel, dtype, [ops.rms_norm(x, w, 1e-6, centered)], out)
    within(kernel, dtype, ops.rms_norm_backward(g, x, w, 1e-6, centered, True), grads, gradients=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("centered", [False, True])
def test_the_residual_sum_is_torchs_and_its_norm_that_of_the_sum(kernel, ops, isa, dtype, shape, centered):
    x, d, w = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=3), randn(shape[-1], dtype=dtype, seed=1)
    s, y = ops.add_rms_norm(x, d, w, 1e-6, centered)
    assert torch.equal(s, x + d)
    assert torch.equal(y, ops.rms_norm(s, w, 1e-6, centered))
    leaves = [t.clone().requires_grad_() for t in (x, d, w)]
    out, grads, upstream = truth(lambda x, d, w: kernel.reference.add_rms_norm(x, d, w, 1e-6, centered=centered), *leaves)
    found = kernel.add_rms_norm(*leaves, 1e-6, centered=centered)
    if dtype is torch.float32:  # in bfloat16 the sum itself is rounded, and what cancels in it is lost to both
        within(kernel, dtype, found, out)
        within(kernel, dtype, torch.autograd.grad(found, leaves, upstream), grads, gradients=True)


def test_residual_sums_of_any_strides_and_shapes(kernel, ops):
    x, d, w = randn(48, 5).t(), randn(5, 96)[:, ::2], randn(48)
    s, y = ops.add_rms_norm(x, d, w, 1e-6, False)
    assert torch.equal(s, x + d)
    assert torch.equal(y, ops.rms_norm(s, w, 1e-6, False))
    assert [t.shape for t in ops.add_rms_norm(randn(0, 8), randn(0, 8), randn(8), 1e-6, False)] == [(0, 8), (0, 8)]
    with pytest.raises(RuntimeError, match="shapes differ"):
        ops.add_rms_norm(randn(2, 8), randn(3, 8), randn(8), 1e-6, False)
    one = kernel.add_rms_norm(randn(2, 3, 48), randn(48), w, 1e-6)[1]  # broadcast: the formula
    assert error(one, kernel.rms_norm(randn(2, 3, 48) + randn(48), w, 1e-6)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_layer_norm_is_the_formula_also_far_from_zero(kernel, ops, isa, dtype, shape, affine):
    x = randn(*shape, dtype=dtype) + 5
    w, b = (randn(shape[-1] if has else 0, dtype=dtype, seed=i) for i, has in enumerate(affine, 1))
    present = [t for t in (w, b) if t.numel()]
    out, grads, (g,) = truth(lambda x, *wb: kernel.reference.layer_norm(x, *wb, *[None] * (2 - len(wb)), 1e-5), x, *present)
    within(kernel, dtype, [ops.layer_norm(x, w, b, 1e-5)], out)
    found = ops.layer_norm_backward(g, x, w, 1e-5, *affine)
    within(kernel, dtype, [t for t, wanted in zip(found, (True, *affine), strict=True) if wanted], grads, gradients=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_activations_are_the_formulas(kernel, ops, isa, dtype, act, shape):
    x, up, number = randn(*shape, dtype=dtype, scale=3), randn(*shape, dtype=dtype, seed=1), ACTS.index(act)
    out, grads, (g,) = truth(kernel.reference.ACTS[act], x)
    within(kernel, dtype, [ops.act(x, number)], out)
    within(kernel, dtype, [ops.act_backward(g, x, number)], grads, gradients=True)
    out, grads, (g,) = truth(lambda x, up: kernel.reference.act_mul(x, up, act), x, up)
    within(kernel, dtype, [ops.act_mul(x, up, number)], out)
    within(kernel, dtype, ops.act_mul_backward(g, x, up, number), grads, gradients=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ACTS)
def test_activations_hold_over_the_whole_range(kernel, ops, isa, dtype, act):
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, -0.0, 1e-38, -1e-38, 1e30, -1e30, 65504.0])]).to(dtype)
    found, wanted = ops.act(x, ACTS.index(act)), kernel.reference.ACTS[act](x.double())
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6 if dtype is torch.float32 else 4e-3, atol=1e-7)
    slope = ops.act_backward(torch.ones_like(x[:4001]), x[:4001], ACTS.index(act))
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("act", ACTS)
def test_a_nan_stays_a_nan(ops, isa, act):
    for dtype in DTYPES:
        x = torch.tensor([1.0, float("nan"), 2.0] * 17, dtype=dtype)
        assert torch.equal(ops.act(x, ACTS.index(act)).isnan(), x.isnan())
        assert ops.rms_norm(x, torch.ones_like(x), 1e-6, False).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "h", "t", "d", "r"), [(2, 4, 5, 64, 64), (1, 3, 7, 80, 32), (2, 2, 3, 6, 6), (1, 2, 257, 128, 128)]
)
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_rotary_is_the_formula(kernel, ops, isa, dtype, b, h, t, d, r, unsqueeze_dim):
    shape = (b, h, t, d) if unsqueeze_dim == 1 else (b, t, h, d)
    q, k = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    cos, sin = (
        randn(b, t, r, dtype=dtype, seed=2),
        randn(b, t, r, dtype=dtype, seed=3),
    )  # halves differ: nothing may assume otherwise
    out, grads, upstream = truth(lambda q, k: kernel.reference.rotary(q, k, cos.double(), sin.double(), unsqueeze_dim), q, k)
    within(kernel, dtype, ops.rotary(q, k, cos, sin, 3 - unsqueeze_dim, False), out)
    within(kernel, dtype, ops.rotary(*upstream, cos, sin, 3 - unsqueeze_dim, True), grads, gradients=True)


def test_rotary_takes_one_cos_for_every_batch_and_grouped_heads(kernel):
    q, k, cos, sin = randn(3, 8, 5, 64), randn(3, 2, 5, 64, seed=1), randn(1, 5, 64, seed=2), randn(1, 5, 64, seed=3)
    for mine, eager in zip(kernel.apply_rotary_pos_emb(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(mine, eager)


def test_rotary_keeps_the_order_of_memory(kernel):
    q, k = randn(2, 5, 4, 64).transpose(1, 2), randn(2, 2, 5, 64)
    cos, sin = randn(1, 5, 64), randn(1, 5, 64)
    for mine, eager in zip(kernel.apply_rotary_pos_emb(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert mine.stride() == eager.stride()


# -- as layers ----------------------------------------------------------------------------------------------------


def swapped(module, layer):
    twin = type(module).__new__(type(module))
    twin.__dict__ = module.__dict__
    twin.__class__ = type(type(module).__name__, (type(module),), {"forward": layer.forward})
    return twin


class Projected(nn.Module):
    """diffusers' forms, written out: one projection, then a gate made of its half, or an activation."""

    def __init__(self, width=64, approximate="none"):
        super().__init__()
        self.proj, self.approximate = nn.Linear(64, width), approximate


class Geglu(Projected):
    def forward(self, hidden_states, *args, **kwargs):
        half, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return half * nn.functional.gelu(gate)


class Swiglu(Projected):
    def forward(self, hidden_states):
        half, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return half * nn.functional.silu(gate)


class Gelu(Projected):
    def forward(self, hidden_states):
        return nn.functional.gelu(self.proj(hidden_states), approximate=self.approximate)


class QuickGelu(Projected):
    def forward(self, x):
        x = self.proj(x)
        return x * torch.sigmoid(1.702 * x)


def originals():
    config = LlamaConfig(hidden_size=64, intermediate_size=192)
    gelu_config = LlamaConfig(hidden_size=64, intermediate_size=192, hidden_act="gelu_pytorch_tanh")
    return (
        ("RMSNorm", LlamaRMSNorm(64, eps=1e-5)),
        ("RMSNorm", T5LayerNorm(64)),
        ("RMSNorm", nn.RMSNorm(64)),
        ("RMSNorm", nn.RMSNorm(64, eps=1e-3)),
        ("RMSNormZeroCentered", Gemma3RMSNorm(64)),
        ("LayerNorm", nn.LayerNorm(64)),
        ("LayerNorm", nn.LayerNorm(64, bias=False)),
        ("LayerNorm", nn.LayerNorm(64, elementwise_affine=False)),
        ("LayerNorm", nn.LayerNorm((300, 64))),
        ("SwiGLUMLP", LlamaMLP(config)),
        ("GeGLUMLP", LlamaMLP(gelu_config)),
        ("GEGLU", Geglu(128)),
        ("SwiGLU", Swiglu(128)),
        ("LinearGELU", Gelu()),
        ("LinearGELU", Gelu(approximate="tanh")),
        ("LinearQuickGELU", QuickGelu()),
        ("SiLU", nn.SiLU()),
        ("SiLU", SiLUActivation()),
        ("GELU", nn.GELU()),
        ("GELUTanh", nn.GELU(approximate="tanh")),
        ("GELUTanh", GELUTanh()),
        ("NewGELU", NewGELUActivation()),
        ("FastGELU", FastGELUActivation()),
        ("QuickGELU", QuickGELUActivation()),
    )


@pytest.mark.parametrize("index", range(len(originals())))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_swapped_module_does_what_it_did(kernel, index, dtype, recorded):
    torch.manual_seed(index)
    name, module = originals()[index]
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module = module.to(dtype)
    twin = swapped(module, getattr(kernel.layers, name))
    x = randn(300, 64, dtype=dtype)  # above the sizes where torch's own operators serve
    with torch.set_grad_enabled(recorded):
        mine, eager = twin(x), module(x)
    assert mine.dtype is eager.dtype
    assert error(mine.detach(), eager.detach()) <= CLOSE[dtype]
    assert mine.requires_grad == eager.requires_grad


@pytest.mark.parametrize("index", range(len(originals())))
def test_gradients_are_those_of_the_original(kernel, index):
    torch.manual_seed(index)
    name, module = originals()[index]
    x, g = randn(300, 64), randn(300, 64, seed=1)
    found = []
    for m in (swapped(module, getattr(kernel.layers, name)), module):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(m(leaf), [leaf, *module.parameters()], g))
    for mine, eager in zip(*found, strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


def test_every_layer_fits_the_contract(kernel, layers_alone):
    meta = metadata.parse((layers_alone / "metadata.json").read_bytes())
    candidate = Candidate(Requirement("kernelswap/layers"), "bundled", "layers", "0", layers_alone.name)
    loaded = Kernel(Artifact(candidate, layers_alone, "0" * 64, meta), kernel)
    for name, module in originals():
        found = contract.implementation(loaded, name)
        assert found.backward
        assert found.compiles
        assert isinstance(module, nn.RMSNorm) or contract.mismatch(found, type(module).forward) is None
    assert contract.mismatch(contract.function(loaded, "apply_rotary_pos_emb"), apply_rotary_pos_emb) is None
    assert set(LAYERS) <= set(contract.offers(loaded))


def test_an_mlp_calls_whatever_its_projections_became(kernel):
    mlp = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=16))
    twin = swapped(mlp, kernel.layers.SwiGLUMLP)
    before = twin(randn(2, 32))
    called = []
    mlp.gate_proj.register_forward_hook(lambda *_: called.append("gate"))
    mlp.down_proj = nn.Sequential(mlp.down_proj, nn.Tanh())
    assert torch.allclose(twin(randn(2, 32)), before.tanh())
    assert called == ["gate"]


# -- what an operator may not do ----------------------------------------------------------------------------------


def calls(ops, dtype=torch.float32, rows=40, n=1000):
    x, y, w = randn(rows, n, dtype=dtype), randn(rows, n, dtype=dtype, seed=1), randn(n, dtype=dtype, seed=2)
    q, c = randn(2, rows, 3, 32, dtype=dtype).transpose(1, 2), randn(2, rows, 32, dtype=dtype)
    return (
        (ops.rms_norm, (x, w, 1e-6, False)),
        (ops.add_rms_norm, (x, y, w, 1e-6, False)),
        (ops.rms_norm_backward, (y, x, w, 1e-6, True, True)),
        (ops.rms_norm_backward, (y, x, w, 1e-6, False, False)),
        (ops.layer_norm, (x, w, w, 1e-5)),
        (ops.layer_norm_backward, (y, x, w, 1e-5, True, False)),
        (ops.act, (x, 0)),
        (ops.act_backward, (y, x, 1)),
        (ops.act_mul, (x, y, 2)),
        (ops.act_mul_backward, (y, x, y, 3)),
        (ops.rotary, (q, q, c, c, 2, False)),
    )


def tensors(values):
    return [t for t in (values if isinstance(values, tuple | list) else (values,)) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_are_never_written_and_never_returned(ops, dtype):
    for op, args in calls(ops, dtype):
        before = [(t.clone(), t._version) for t in tensors(args)]
        out = tensors(op(*args))
        for t, (copy, version) in zip(tensors(args), before, strict=True):
            assert torch.equal(t, copy)
            assert t._version == version
            assert all(o.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() or o.numel() == 0 for o in out)


def test_torch_agrees_about_schema_and_shapes(ops):
    for op, args in calls(ops, rows=5, n=32):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_of_the_input_do_not_matter(ops, dtype):
    wide = randn(40, 2, 96, dtype=dtype)
    for x in (wide[:, 0], wide[:, 1, :41], wide[::2, 0], wide[:, 0].t(), wide.transpose(0, 1), wide[:, :, ::2], wide[:, :1].expand(40, 2, 96)):  # fmt: skip
        w = randn(x.shape[-1], dtype=dtype)
        y = randn(*x.shape, dtype=dtype, seed=3)
        for op, args in (
            (ops.rms_norm, (x, w, 1e-6, False)),
            (ops.layer_norm, (x, w, w, 1e-6)),
            (ops.act, (x, 2)),
            (ops.act_mul, (x, y, 0)),
            (ops.act_mul, (y, x, 0)),
            (ops.rms_norm_backward, (x, y, w, 1e-6, False, True)),
        ):
            plain = [t.contiguous() if isinstance(t, torch.Tensor) else t for t in args]
            for one, other in zip(tensors(op(*args)), tensors(op(*plain)), strict=True):
                assert torch.equal(one, other)
                assert one.is_contiguous()
    q = randn(2, 3, 4, 64, dtype=dtype)
    c = randn(2, 4, 128, dtype=dtype)[..., ::2]
    for view in (q, q[:, :, :, :].transpose(1, 2).contiguous().transpose(1, 2), q.transpose(2, 3).contiguous().transpose(2, 3)):
        for one, other in zip(ops.rotary(view, view, c, c, 2, False), ops.rotary(q, q, c.contiguous(), c.contiguous(), 2, False), strict=True):  # fmt: skip
            assert torch.equal(one, other)


def test_no_rows_no_columns_no_dimensions(ops):
    for shape in ((0, 8), (3, 0), (2, 0, 5), (0,)):
        x, w = torch.empty(shape), torch.empty(shape[-1])
        assert ops.rms_norm(x, w, 1e-6, False).shape == shape
        assert ops.act(x, 0).shape == shape
        dx, dw = ops.rms_norm_backward(x, x, w, 1e-6, False, True)
        assert dx.shape == shape
        assert torch.equal(dw, torch.zeros(shape[-1]))
    assert ops.act(torch.tensor(2.0), 0).shape == ()
    q, c = torch.empty(1, 2, 0, 8), torch.empty(1, 0, 8)
    assert ops.rotary(q, q, c, c, 2, False)[0].shape == q.shape


@pytest.mark.parametrize(
    "bad",
    [
        lambda ops: ops.rms_norm(randn(2, 8), randn(7), 1e-6, False),
        lambda ops: ops.rms_norm(randn(2, 8), randn(8, dtype=torch.bfloat16), 1e-6, False),
        lambda ops: ops.rms_norm(randn(2, 8, dtype=torch.float16), randn(8, dtype=torch.float16), 1e-6, False),
        lambda ops: ops.act(torch.zeros(3, dtype=torch.int64), 0),
        lambda ops: ops.act_mul(randn(2, 8), randn(2, 7), 0),
        lambda ops: ops.rotary(randn(1, 2, 3, 8), randn(1, 2, 3, 8), randn(1, 4, 8), randn(1, 4, 8), 2, False),
        lambda ops: ops.rotary(randn(1, 2, 3, 8), randn(1, 2, 3, 8), randn(1, 3, 10), randn(1, 3, 10), 2, False),
    ],
)
def test_what_does_not_fit_raises_instead_of_reading_past_the_end(ops, bad):
    with pytest.raises(RuntimeError):
        bad(ops)


def test_threads_do_not_change_a_row(ops):
    x, w = randn(300, 1000), randn(1000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.rms_norm(x, w, 1e-6, False)
        torch.set_num_threads(3)
        assert torch.equal(ops.rms_norm(x, w, 1e-6, False), one)
    finally:
        torch.set_num_threads(threads)


# -- autograd, transforms, compilation ----------------------------------------------------------------------------


def functions(kernel):
    f = kernel.functional
    x, y, w = randn(40, 1000), randn(40, 1000, seed=1), randn(1000, seed=2)
    return (
        (lambda x, w: f.rms_norm(x, w, 1e-6), (x, w)),
        (lambda x, w: f.rms_norm(x, w, 1e-6, centered=True), (x, w)),
        (lambda x, w: f.layer_norm(x, w, None, 1e-5), (x, w)),
        (lambda x, y, w: torch.stack(f.add_rms_norm(x, y, w, 1e-6)), (x, y, w)),
        (lambda x: f.act(x, "gelu_tanh"), (x,)),
        (lambda x, y: f.act_mul(x, y, "silu"), (x, y)),
    )


@pytest.mark.parametrize("index", range(6))
def test_second_derivatives_are_those_of_the_formula(kernel, index):
    function, inputs = functions(kernel)[index]
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
    found = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
    wide = [t.double().requires_grad_() for t in inputs]  # float64 is served by the formula
    first = torch.autograd.grad(function(*wide).sin().sum(), wide, create_graph=True)
    for mine, true in zip(found, torch.autograd.grad(sum(g.pow(2).sum() for g in first), wide), strict=True):
        assert error(mine, true) < 1e-4


def test_rotary_has_second_derivatives(kernel):
    q, c = randn(1, 2, 3, 8).requires_grad_(), randn(1, 3, 8)
    out = kernel.apply_rotary_pos_emb(q, q, c, c)
    (first,) = torch.autograd.grad(sum(t.pow(3).sum() for t in out), q, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), q)
    eager = apply_rotary_pos_emb(q, q, c, c)
    (first,) = torch.autograd.grad(sum(t.pow(3).sum() for t in eager), q, create_graph=True)
    torch.testing.assert_close(second, torch.autograd.grad(first.sum(), q)[0])


def test_torch_func_goes_through(kernel):
    x, w = randn(4, 5, 64), randn(64)
    f = kernel.functional
    torch.testing.assert_close(torch.func.vmap(lambda x: f.rms_norm(x, w, 1e-6))(x), f.rms_norm(x, w, 1e-6))
    mine = torch.func.grad(lambda x: f.act_mul(x, x, "silu").sum())(randn(200, 200))
    torch.testing.assert_close(mine, torch.func.grad(lambda x: (nn.functional.silu(x) * x).sum())(randn(200, 200)))


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 4, 5, 9, 11])
def test_compiled_in_one_graph_forward_and_backward(kernel, index):
    name, module = originals()[index]
    torch._dynamo.reset()
    compiled = torch.compile(swapped(module, getattr(kernel.layers, name)), fullgraph=True, backend="aot_eager")
    for rows in (300, 411):
        x, g = randn(rows, 64), randn(rows, 64, seed=1)
        found = []
        for m in (compiled, module):
            leaf = x.clone().requires_grad_()
            found.append((m(leaf), *torch.autograd.grad(m(leaf), leaf, g)))
        for mine, eager in zip(*found, strict=True):
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)


LONE = {"SiLU": nn.SiLU(), "GELU": nn.GELU(), "GELUTanh": nn.GELU(approximate="tanh")}  # for which torch has one operator


def served_by_kernel(kernel, layer, x):
    """Whether a call runs an operator of the kernel."""
    seen = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    module = swapped(LONE[layer], getattr(kernel.layers, layer))
    with torch.no_grad(), Look():
        module(x)
    (found,) = seen
    return found is kernel.functional.ops.act.default


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_torchs_own_operator_is_as_fast_it_serves(kernel, dtype):
    rules, wide = kernel.functional, torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    for layer, at in (("SiLU", rules.MIN_SILU), ("GELUTanh", rules.MIN_GELU_TANH)):
        assert not served_by_kernel(kernel, layer, randn(1, dtype=dtype))
        assert not served_by_kernel(kernel, layer, randn(at - 1, dtype=dtype))
        assert served_by_kernel(kernel, layer, randn(at, dtype=dtype))
    upto = rules.GELU_UPTO[dtype]
    assert (upto > 0) == (wide or dtype is torch.float32)
    assert not served_by_kernel(kernel, "GELU", randn(1, dtype=dtype))
    assert served_by_kernel(kernel, "GELU", randn(128, dtype=dtype)) == (upto > 0)
    assert not served_by_kernel(kernel, "GELU", randn(upto + 1, dtype=dtype))
    assert not served_by_kernel(kernel, "GELU", randn(128, dtype=torch.float64))


@pytest.mark.parametrize("layer", LONE)
def test_the_border_between_kernel_and_operator_does_not_show(kernel, layer):
    rules = kernel.functional
    at = {"SiLU": rules.MIN_SILU, "GELU": rules.GELU_UPTO[torch.float32], "GELUTanh": rules.MIN_GELU_TANH}[layer]
    x = randn(at + 1)
    module = swapped(LONE[layer], getattr(kernel.layers, layer))
    torch.testing.assert_close(module(x)[: at - 1], module(x[: at - 1]), rtol=1e-6, atol=1e-6)
