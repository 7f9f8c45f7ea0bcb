"""LayerNorm, interpreted, against float64: with weight and bias, either or neither, every dtype, any strides."""

import pytest
import torch

from .conftest import TOLERANCES, both, relative

DTYPES = list(TOLERANCES)
EPS = 1e-5
ALL = ["_forward", "_backward", "_sum_partials", "_sum_partials"]


def centred(x, w=None, b=None):
    d = x - x.mean(-1, keepdim=True)
    y = d / (d.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


@pytest.fixture
def norm(layers):
    return layers.layer_norm


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 7, 100), (2, 5, 4, 16), (1, 3), (70, 33), (2, 2049)], ids=str)
def test_layer_norms_and_their_gradients(norm, launches, dtype, shape):
    x, w, b = torch.randn(shape, dtype=dtype), *torch.randn(2, shape[-1], dtype=dtype)
    assert both(lambda x, w, b: norm.layer_norm(x, w, b, EPS), centred, (x, w, b)) < TOLERANCES[dtype]
    with torch.no_grad():
        assert relative(norm.layer_norm(x, w, b, EPS), centred(x.double(), w.double(), b.double())) < TOLERANCES[dtype]
    assert launches == [*ALL, "_forward"]


def test_weight_and_bias_may_each_be_missing(norm, launches):
    x, w, b = torch.randn(9, 100), torch.randn(100), torch.randn(100)
    assert both(lambda x, w: norm.layer_norm(x, w, None, EPS), centred, (x, w)) < 1e-5
    assert both(lambda x, b: norm.layer_norm(x, None, b, EPS), lambda x, b: centred(x, None, b), (x, b)) < 1e-5
    assert both(lambda x: norm.layer_norm(x, None, None, EPS), centred, (x,)) < 1e-5
    assert launches == [*ALL[:3], *ALL[:3], *ALL[:2]]


def test_any_strides_and_a_dtype_for_each(norm, launches):
    w, b = torch.randn(48), torch.randn(48)
    for x in (torch.randn(48, 5).t(), torch.randn(5, 2, 48)[:, 1], torch.randn(5, 96)[:, ::2], torch.randn(1, 48).expand(5, 48)):
        assert both(lambda x, w, b: norm.layer_norm(x, w, b, EPS), centred, (x, w, b)) < 1e-5
    x = torch.randn(5, 48).bfloat16()
    assert both(lambda x, w, b: norm.layer_norm(x, w, b, EPS), centred, (x, w, b.half())) < TOLERANCES[torch.bfloat16]
    assert norm.layer_norm(x, w, b, EPS).dtype is torch.bfloat16
    assert len(launches) == 5 * 4 + 1


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(norm, launches):
    x = torch.randn(6, 300) + 3000  # the mean of squares less the square of the mean is off by 10 % here
    assert relative(norm.layer_norm(x, None, None, EPS), centred(x.double())) < 1e-3
    assert relative(norm.layer_norm(torch.full((2, 64), 5.0), None, None, EPS), torch.zeros(2, 64).double()) == 0
    assert launches == ["_forward", "_forward"]


def test_what_the_kernel_does_not_take_is_torchs(norm, launches):
    assert norm.layer_norm(torch.empty(0, 64), None, None, EPS).shape == (0, 64)
    x, w, b = torch.randn(3, 64).double(), torch.randn(64).double(), torch.randn(64).double()
    assert relative(norm.layer_norm(x, w, b, EPS), centred(x, w, b)) < 1e-14
    with pytest.raises(RuntimeError):
        norm.layer_norm(torch.randn(3, 64), torch.randn(32), None, EPS)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(3, 64).bfloat16()
        assert norm.layer_norm(x, None, None, EPS).dtype is torch.nn.functional.layer_norm(x, (64,)).dtype
    compiled = torch.compile(lambda x: norm.layer_norm(x, None, None, EPS), fullgraph=True, backend="aot_eager")
    assert relative(compiled(x), centred(x.double())) < 1e-2
    assert launches == []


def test_second_derivatives_are_those_of_the_formula(norm, launches):
    def second(f, inputs):
        first = torch.autograd.grad(f(*inputs).pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs)

    x, w, b = torch.randn(5, 16), torch.randn(16), torch.randn(16)
    for f, g, inputs in (
        (lambda *t: norm.layer_norm(*t, EPS), centred, (x, w, b)),
        (lambda x, b: norm.layer_norm(x, None, b, EPS), lambda x, b: centred(x, None, b), (x, b)),
    ):
        found = second(f, [t.clone().requires_grad_() for t in inputs])
        want = second(g, [t.double().requires_grad_() for t in inputs])
        assert max(map(relative, found, want)) < 1e-5
    assert launches


@pytest.mark.parametrize("shape", [(64,), (4, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
def test_the_layer_stands_in_for_torchs(layers, launches, shape, options):
    module, x = torch.nn.LayerNorm(shape, eps=1e-3, **options), torch.randn(3, 5, *shape)
    for p in module.parameters():
        torch.nn.init.normal_(p)
    assert relative(layers.layers.LayerNorm.forward(module, x), module(x).double()) < 1e-6
    assert launches == (["_forward"] if len(shape) == 1 else [])
