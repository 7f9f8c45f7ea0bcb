"""Softmax, interpreted, against float64: short rows and rows longer than a program holds, every dtype, any strides, infinities."""

import pytest
import torch

from .conftest import TOLERANCES, both, relative

DTYPES = list(TOLERANCES)


def exact(x):
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


@pytest.fixture(params=["whole", "long"])
def soft(layers, request, monkeypatch):
    """Rows as they are, and the kernels for long rows on short ones: blocks of 64."""
    if request.param == "long":
        monkeypatch.setattr(layers.softmax, "LONGEST", 0)
        monkeypatch.setattr(layers.softmax, "_BLOCK", 64)
    layers.softmax.expected = [f"{n}{'_long' * (request.param == 'long')}" for n in ("_forward", "_backward")]
    return layers.softmax


def error_of(f, x):
    torch.manual_seed(1)
    return both(f, exact, (x,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 7, 100), (2, 5, 4, 16), (1, 3), (70, 33), (2, 1025), (5,)], ids=str)
def test_softmax_and_its_gradient(soft, launches, dtype, shape):
    x = torch.randn(shape, dtype=dtype) * (
        3 if dtype is torch.float32 else 0.5
    )  # an answer near 1, rounded, has no gradient left
    mine, torchs = (error_of(f, x) for f in (soft.softmax, lambda x: torch.softmax(x, -1)))
    assert mine < 3 * max(TOLERANCES[dtype], torchs)  # where terms cancel, nobody who keeps a rounded y has more digits
    with torch.no_grad():
        assert relative(soft.softmax(x), exact(x.double())) < TOLERANCES[dtype]
    assert launches == [*soft.expected, soft.expected[0]]


def test_a_row_longer_than_a_program_holds(layers, launches):
    x = torch.randn(2, layers.softmax.LONGEST + 77)
    assert both(layers.softmax.softmax, exact, (x,)) < 1e-5
    assert launches == ["_forward_long", "_backward_long"]


def test_any_strides_and_another_dtype_for_the_answer(soft, launches):
    for x in (torch.randn(48, 5).t(), torch.randn(5, 2, 48)[:, 1], torch.randn(5, 96)[:, ::2], torch.randn(1, 48).expand(5, 48)):
        assert both(soft.softmax, exact, (x,)) < 1e-5
    x = torch.randn(5, 48).bfloat16()
    y = soft.softmax(x, torch.float32)
    assert y.dtype is torch.float32
    assert relative(y, exact(x.double())) < 1e-6
    assert both(lambda x: soft.softmax(x, torch.float32), exact, (x,)) < TOLERANCES[torch.bfloat16]
    assert launches == [*soft.expected * 4, soft.expected[0], *soft.expected]


def test_infinities_and_nan_are_torchs(soft, launches):
    inf = float("inf")
    x = torch.randn(7, 200)
    x[0, :150], x[1], x[2, 3], x[3, 7], x[4] = -inf, -inf, inf, float("nan"), 1e38
    x[5, 64:] = -inf
    torch.testing.assert_close(soft.softmax(x), torch.softmax(x, -1), equal_nan=True)
    assert launches == [soft.expected[0]]


def test_what_the_kernel_does_not_take_is_torchs(soft, launches):
    assert soft.softmax(torch.empty(0, 64)).shape == (0, 64)
    assert soft.softmax(torch.empty(3, 0)).shape == (3, 0)
    assert soft.softmax(torch.tensor(3.0)) == 1
    x = torch.randn(3, 64).double()
    assert relative(soft.softmax(x), exact(x)) < 1e-14
    with torch.autocast("cpu", torch.bfloat16):
        assert soft.softmax(x.bfloat16()).dtype is torch.softmax(x.bfloat16(), -1).dtype
    compiled = torch.compile(soft.softmax, fullgraph=True, backend="aot_eager")
    assert relative(compiled(x.float()), exact(x)) < 1e-6
    assert launches == []


def test_second_derivatives_are_those_of_the_formula(soft, launches):
    x = torch.randn(5, 16)

    def second(f, x):
        (first,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x)[0]

    found, want = second(soft.softmax, x.clone().requires_grad_()), second(exact, x.double().requires_grad_())
    assert relative(found, want) < 1e-5
    assert launches
