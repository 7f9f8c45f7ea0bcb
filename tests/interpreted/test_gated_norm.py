"""RMSNorm with a gate, interpreted, against float64: after the norm and before it, in groups, every dtype, any strides."""

import pytest
import torch
from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNormGated
from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from .conftest import TOLERANCES, both, relative

DTYPES = list(TOLERANCES)
ALL = ["_forward", "_backward", "_sum_partials"]


def gated(x, z, w, act="silu", groups=1, before=False, eps=1e-6):
    """Written once more, not imported: the kernels' own formula is what they are not to fall back to."""
    a = z / (1 + torch.exp(-z)) if act == "silu" else 1 / (1 + torch.exp(-z))
    h = (x * a if before else x).reshape(*x.shape[:-1], groups, -1)
    n = (h / (h.pow(2).mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape) * w
    return n if before else n * a


@pytest.fixture
def norm(layers):
    return layers.gated_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["silu", "sigmoid"])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 1, 128), 1), ((3, 7, 100), 4), ((2, 5, 4, 16), 1), ((1, 3), 1), ((70, 33), 1), ((2, 2049), 1)],
    ids=str,
)
def test_gated_norms_and_their_gradients(norm, launches, dtype, act, before, shape, groups):
    x, z, w = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) * 2, torch.randn(shape[-1], dtype=dtype)
    error = both(
        lambda x, z, w: norm.rms_norm_gated(x, z, w, 1e-6, act, groups, before=before),
        lambda x, z, w: gated(x, z, w, act, groups, before),
        (x, z, w),
    )
    assert error < TOLERANCES[dtype]
    with torch.no_grad():
        found = norm.rms_norm_gated(x, z, w, 1e-6, act, groups, before=before)
    assert relative(found, gated(x.double(), z.double(), w.double(), act, groups, before)) < TOLERANCES[dtype]
    assert launches == [*ALL, "_forward"]


@pytest.mark.parametrize("before", [False, True])
def test_gates_are_read_where_they_lie_and_other_strides_are_copied(norm, launches, before):
    w = torch.randn(48)
    slices = (
        torch.randn(2, 5, 200)[..., 20:68],
        torch.randn(2, 5, 48)[:, :1].expand(2, 5, 48),
        torch.randn(5, 2, 96)[..., :48].transpose(0, 1),
    )
    for z in (*slices, torch.randn(2, 48, 5).transpose(1, 2), torch.randn(2, 5, 96)[..., ::2]):
        for x in (torch.randn(2, 5, 48), torch.randn(5, 2, 48).transpose(0, 1)):
            f = lambda x, z, w: norm.rms_norm_gated(x, z, w, 1e-6, before=before)  # noqa: E731 -- two lines where it is used
            assert both(f, lambda x, z, w: gated(x, z, w, before=before), (x, z, w)) < 1e-5
    assert len(launches) == 30
    z, step = norm._strided(slices[0])
    assert z.data_ptr() == slices[0].data_ptr()
    assert step == 200


def test_each_tensor_may_have_a_dtype_of_its_own(norm, launches):
    x, z, w = torch.randn(5, 64).bfloat16(), torch.randn(5, 64), torch.randn(64).half()
    assert both(norm_of := lambda x, z, w: norm.rms_norm_gated(x, z, w, 1e-6), gated, (x, z, w)) < TOLERANCES[torch.bfloat16]
    assert norm_of(x, z, w).dtype is torch.bfloat16
    assert launches == [*ALL, "_forward"]


def test_gates_far_out_and_rows_of_zeros_give_no_nan(norm, launches):
    z = torch.tensor([-200.0, -90.0, -20.0, -0.0, 0.0, 20.0, 90.0, 200.0]).repeat(3, 1)
    for before in (False, True):
        for act in ("silu", "sigmoid"):
            f = lambda x, w: norm.rms_norm_gated(x, z, w, 1e-6, act, before=before)  # noqa: B023, E731 -- called within the turn
            g = lambda x, w: gated(x, z.double(), w, act, before=before)  # noqa: B023, E731
            assert both(f, g, (torch.randn(3, 8), torch.randn(8))) < 1e-5
            assert torch.equal(f(torch.zeros(3, 8), torch.ones(8)), torch.zeros(3, 8))
    assert launches


def test_what_the_kernel_does_not_take_is_torchs(norm, launches):
    f, w = norm.rms_norm_gated, torch.ones(64)
    assert f(torch.empty(0, 64), torch.empty(0, 64), w, 1e-6).shape == (0, 64)
    x, z, v = torch.randn(3, 64).double(), torch.randn(3, 64).double(), torch.randn(64).double()
    assert relative(f(x, z, v, 1e-6, groups=4), gated(x, z, v, groups=4)) < 1e-14
    assert f(torch.randn(3, 64), torch.randn(1, 64), w, 1e-6).shape == (3, 64)
    with pytest.raises(RuntimeError):
        f(torch.randn(3, 64), torch.randn(3, 64), torch.ones(32), 1e-6)
    assert launches == []


@pytest.mark.parametrize("before", [False, True])
def test_second_derivatives_are_those_of_the_formula(norm, launches, before):
    inputs = torch.randn(5, 16), torch.randn(5, 16), torch.randn(16)

    def second(f, inputs):
        first = torch.autograd.grad(f(*inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs)

    found = second(
        lambda *t: norm.rms_norm_gated(*t, 1e-6, groups=2, before=before), [x.clone().requires_grad_() for x in inputs]
    )
    want = second(lambda *t: gated(*t, groups=2, before=before), [x.double().requires_grad_() for x in inputs])
    assert max(map(relative, found, want)) < 1e-5
    assert launches == ALL  # once forward; the recorded pass is torch's, and its own gradient leads through the kernel's again


def test_under_tracing_the_formula_is_what_the_compiler_sees(norm, launches):
    x, z, w = torch.randn(4, 32), torch.randn(4, 32), torch.randn(32)
    compiled = torch.compile(lambda x, z: norm.rms_norm_gated(x, z, w, 1e-6), fullgraph=True, backend="aot_eager")
    assert relative(compiled(x, z), gated(x.double(), z.double(), w.double())) < 1e-6
    assert launches == []


MODULES = {
    "Qwen3Next": ("RMSNormGated", lambda: Qwen3NextRMSNormGated(64), ("silu", 1, False)),
    "Mamba2": ("RMSNormGateFirst", lambda: MambaRMSNormGated(64, group_size=64, eps=1e-5), ("silu", 1, True)),
    "Bamba": ("RMSNormGateFirst", lambda: BambaRMSNormGated(64, group_size=16, eps=1e-5), ("silu", 4, True)),
    "after": ("RMSNormGatedGroups", lambda: FalconH1RMSNormGated(64, n_groups=4, norm_before_gate=True), ("silu", 4, False)),
    "before": ("RMSNormGatedGroups", lambda: FalconH1RMSNormGated(64, n_groups=4, norm_before_gate=False), ("silu", 4, True)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_stand_in_for_the_models_modules_and_are_no_further_from_float64(layers, launches, name, dtype):
    layer, make, form = MODULES[name]
    module = make().to(dtype)
    torch.nn.init.normal_(module.weight)
    x, z = torch.randn(2, 37, 64, dtype=dtype), torch.randn(2, 37, 64, dtype=dtype)
    with torch.no_grad():
        found, original = getattr(layers.layers, layer).forward(module, x, z), module(x, z)
    want = gated(x.double(), z.double(), module.weight.double(), *form, module.variance_epsilon)
    assert found.dtype is original.dtype
    assert relative(original, want) < TOLERANCES[dtype], "the reference is what the model computes"
    assert relative(found, want) < TOLERANCES[dtype]
    if dtype is not torch.bfloat16:  # which the interpreter cuts off
        assert relative(found, want) < 1.1 * relative(original, want)
    assert launches == ["_forward"]


def test_the_activation_is_the_modules(layers, launches):
    module, x, z = Qwen3NextRMSNormGated(64), torch.randn(3, 64), torch.randn(3, 64)
    module.activation = "sigmoid"
    assert relative(layers.layers.RMSNormGated.forward(module, x, z), module(x, z).double()) < 1e-6
    assert launches == ["_forward"]
    module.activation = "relu"
    with pytest.raises(ValueError, match="relu"):
        layers.layers.RMSNormGated.forward(module, x, z)


def test_without_a_gate_it_is_the_norm(layers):
    x = torch.randn(3, 64)
    for name in ("Mamba2", "Bamba", "after", "before"):
        layer, make, _ = MODULES[name]
        module = make()
        assert relative(getattr(layers.layers, layer).forward(module, x), module(x).double()) < 1e-6
