"""`bundled/loss` through its Triton kernel, interpreted, against float64. The interpreter multiplies no matrices here: torch does."""

import pytest
import torch
import torch.nn.functional as F
from tests.interpreted.conftest import TOLERANCES, both, package, relative

DTYPES = list(TOLERANCES)


@pytest.fixture(scope="session")
def loss():
    return package("loss_interpreted", "loss/build/torch-universal", "_launch", "formula", "cross_entropy", "loss", "lazy")


@pytest.fixture
def launches(loss, monkeypatch):
    """The kernels that were launched, by name, with the modes they were made for; the head's loss takes them as on a GPU."""
    seen = []

    def bind(fn, *args, _bind=loss._launch.bind, **more):
        launch = _bind(fn, *args, **more)
        name = fn.__name__ + "".join("+" + k.lower() for k in ("LOSSES", "GRAD") if more.get(k))

        def noted(*call):
            seen.append(name)
            launch(*call)

        return noted

    monkeypatch.setattr(loss.cross_entropy, "bind", bind)
    monkeypatch.setattr(loss.cross_entropy, "_bound", {})
    monkeypatch.setattr(loss.cross_entropy, "_scales", {})
    monkeypatch.setattr(loss.loss, "_kernel", lambda x: loss.cross_entropy if loss.cross_entropy.takes(x) else None)
    return seen


def made(dtype, rows=23, hidden=16, vocab=300, *, bias=False):
    x, w = torch.randn(rows, hidden, dtype=dtype), torch.randn(vocab, hidden, dtype=dtype) * 0.3
    target = torch.randint(0, vocab, (rows,))
    target[3::7] = -100
    return x, w, target, *([torch.randn(vocab, dtype=dtype)] if bias else [])


# -- logits that are there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 100), (5, 4097), (1, 1)], ids=str)
def test_cross_entropy_and_its_gradient(loss, launches, dtype, rows, vocab, reduction):
    z = (torch.randn(rows, vocab) * 3).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    if rows > 4:
        target[[1, 4]] = -100
    error = both(
        lambda z: loss.cross_entropy.cross_entropy(z, target, reduction=reduction),
        lambda z: F.cross_entropy(z, target, reduction=reduction),
        (z,),
    )
    assert error < TOLERANCES[dtype]
    later = reduction == "none" or dtype is torch.float16  # those know what the gradient is scaled by before they round it
    assert launches == (["_sweeps+losses", "_sweeps+grad"] if later else ["_sweeps+losses+grad", "_scale"])


def test_smoothing_and_z_loss(loss, launches):
    z, target = torch.randn(6, 5000), torch.tensor([1, 4999, -100, 7, 0, 4096])

    def want(z):
        square = (z.logsumexp(1) ** 2).masked_fill(target == -100, 0).sum() / 5
        return F.cross_entropy(z, target, label_smoothing=0.1) + 0.01 * square

    assert both(lambda z: loss.cross_entropy.cross_entropy(z, target, label_smoothing=0.1, z_loss=0.01), want, (z,)) < 1e-5
    assert launches == ["_sweeps+losses+grad", "_scale"]


def test_where_nothing_counts_the_loss_is_nan_and_the_gradient_zero_as_in_torch(loss, launches):
    z, target = torch.randn(3, 10, requires_grad=True), torch.full((3,), -100)
    for f in (loss.cross_entropy.cross_entropy, F.cross_entropy):
        value = f(z, target)
        assert value.isnan()
        assert torch.equal(torch.autograd.grad(value, z)[0], torch.zeros(3, 10))


def test_logits_of_minus_infinity_count_for_nothing(loss, launches):
    z = torch.randn(4, 5000)
    z[:, 100:4200] = -torch.inf
    target = torch.tensor([0, 5, 4999, 99])
    assert both(lambda z: loss.cross_entropy.cross_entropy(z, target), lambda z: F.cross_entropy(z, target), (z,)) < 1e-5
    assert launches


@pytest.mark.parametrize("wrong", [10, -1, 1 << 40])
def test_a_target_that_is_no_word_is_read_from_nowhere_and_gives_nan(loss, launches, wrong):
    z, target = torch.randn(3, 10, requires_grad=True), torch.tensor([1, wrong, 2])
    rows = loss.cross_entropy.cross_entropy(z, target, reduction="none")
    (grad,) = torch.autograd.grad(rows, z, torch.ones(3))
    assert rows.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(1).tolist() == [False, True, False]


def test_float16_gradients_are_rounded_after_the_loss_scale_has_come(loss, launches):
    z, target = torch.randn(256, 4096).half().requires_grad_(), torch.randint(0, 4096, (256,))
    found = torch.autograd.grad(loss.cross_entropy.cross_entropy(z, target) * 65536, z)[0]
    want = torch.autograd.grad(F.cross_entropy(z.double(), target) * 65536, z)[0]
    others = F.one_hot(target, 4096) == 0  # beside which the target's own gradient is large
    assert relative(found[others], want[others]) < TOLERANCES[torch.float16]
    shares = torch.softmax(z.double(), 1)[others] / 256
    assert relative(shares.half(), shares) > 10 * TOLERANCES[torch.float16]  # rounded before


# -- the head and its loss -----------------------------------------------------------------------------------------

TERMS = {
    "plain": ({}, F.cross_entropy),
    "smoothed": ({"label_smoothing": 0.1}, lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1)),
    "scaled": ({"scale": -0.3}, lambda z, t: F.cross_entropy(z * -0.3, t)),
    "soft cap": ({"softcap": 2.5}, lambda z, t: F.cross_entropy(torch.tanh(z / 2.5) * 2.5, t)),
    "soft cap, smoothed": (
        {"softcap": 3.0, "label_smoothing": 0.2},
        lambda z, t: F.cross_entropy(torch.tanh(z / 3) * 3, t, label_smoothing=0.2),
    ),
    "rows": ({"reduction": "none"}, lambda z, t: F.cross_entropy(z, t, reduction="none")),
    "sum": ({"reduction": "sum"}, lambda z, t: F.cross_entropy(z, t, reduction="sum")),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head_and_its_loss_in_pieces(loss, launches, dtype, terms, bias):
    x, w, target, *b = made(dtype, bias=bias)
    more, want = TERMS[terms]
    workspace = 300 * x.element_size() * 5
    error = both(
        lambda x, w, b=None: loss.loss.linear_cross_entropy(x, w, b, target, workspace=workspace, **more),
        lambda x, w, b=None: want(F.linear(x, w, b), target),
        (x, w, *b),
    )
    assert error < 2 * TOLERANCES[dtype]
    later = dtype is torch.float16 or terms == "rows"
    first = ["_sweeps+losses"] * 5 + ["_sweeps+grad"] * 5 if later else ["_sweeps+losses+grad"] * 5
    assert launches == first + ([] if later else ["_scale"] * (2 + bias))


@pytest.mark.parametrize("pieces", [4, 23])
def test_many_pieces_are_summed_in_float32(loss, launches, pieces):
    """A word's gradient of thousands of equal parts: bfloat16 would stop growing at 256 of them."""
    rows = 23 if pieces == 23 else 24
    x, w = torch.ones(rows, 8, dtype=torch.bfloat16), torch.zeros(2, 8, dtype=torch.bfloat16, requires_grad=True)
    x[1:] *= 2**-9
    target = torch.zeros(rows, dtype=torch.int64)
    workspace = 2 * 2 * -(-rows // pieces)
    value = loss.loss.linear_cross_entropy(x, w, None, target, reduction="sum", workspace=workspace)
    (grad,) = torch.autograd.grad(value, w)
    want = -0.5 * (1 + (rows - 1) * 2**-9)
    assert launches.count("_sweeps+losses+grad") == pieces
    assert abs(grad[0, 0].item() - want) <= abs(want) * 2**-8


def test_every_backward_pass_gives_the_same(loss, launches):
    x, w, target = made(torch.float32)
    x.requires_grad_(), w.requires_grad_()
    for value in (loss.loss.linear_cross_entropy(x, w, None, target), loss.cross_entropy.cross_entropy(x @ w.t(), target)):
        first = torch.autograd.grad(value * 0.5, (x, w), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(value * 0.5, (x, w), retain_graph=True)
        assert all(map(torch.equal, kept, second))


def test_second_derivatives_are_those_of_torchs_loss(loss, launches):
    def penalty(value, leaves):
        return torch.autograd.grad(sum(g.pow(2).sum() for g in torch.autograd.grad(value, leaves, create_graph=True)), leaves)

    x, w, target = made(torch.float32)
    leaves = (x.requires_grad_(), w.requires_grad_())
    want = penalty(F.cross_entropy(F.linear(x, w), target), leaves)
    for value in (loss.loss.linear_cross_entropy(x, w, None, target), loss.cross_entropy.cross_entropy(x @ w.t(), target)):
        assert max(map(relative, penalty(value, leaves), want)) < 1e-5


def test_the_lazy_head_of_a_soft_capped_model_goes_through_the_kernel(loss, launches):
    x, w, target = made(torch.bfloat16)
    x.requires_grad_(), w.requires_grad_()
    z = loss.lazy.head(x, w, None)
    capped = torch.tanh(z / 5.0) * 5.0
    value = F.cross_entropy(capped.float(), target, reduction="sum") / torch.tensor(7)
    found = torch.autograd.grad(value, (x, w))
    assert not z.known()
    assert launches == ["_sweeps+losses+grad", "_scale", "_scale"]
    wide = [t.detach().double().requires_grad_() for t in (x, w)]
    exact = F.cross_entropy(torch.tanh(F.linear(*wide) / 5) * 5, target, reduction="sum") / 7
    assert relative(value, exact) < 1e-3
    assert max(map(relative, found, torch.autograd.grad(exact, wide))) < TOLERANCES[torch.bfloat16]
