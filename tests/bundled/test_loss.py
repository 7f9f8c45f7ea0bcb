"""`kernelswap/loss`: the head and its cross entropy against float64, and logits that nobody can tell from computed ones."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.kernels import opened
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

BUILD = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "loss" / "build" / "torch-universal"
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}
V, H = 103, 16


@pytest.fixture(scope="module")
def kernel():
    with opened("loss_under_test", BUILD) as module:
        yield module


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def pieces(kernel, monkeypatch):
    """Pieces of eight rows."""
    monkeypatch.setattr(sys.modules["loss_under_test.loss"], "LEAST", 8)
    monkeypatch.setitem(sys.modules["loss_under_test.loss"].WORKSPACE, "cpu", 1)


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30)).item()


def made(dtype=torch.float32, rows=21, *, bias=False):
    x = torch.randn(rows, H, dtype=dtype, requires_grad=True)
    w = torch.randn(V, H, dtype=dtype, requires_grad=True)
    b = torch.randn(V, dtype=dtype, requires_grad=True) if bias else None
    target = torch.randint(0, V, (rows,))
    target[::5] = -100
    return x, w, b, target


# -- the loss -----------------------------------------------------------------------------------------------------


TERMS = {  # what a loss may ask for, and what it then is
    "plain": ({}, lambda z, t, r: F.cross_entropy(z, t, reduction=r)),
    "smoothed": ({"label_smoothing": 0.1}, lambda z, t, r: F.cross_entropy(z, t, reduction=r, label_smoothing=0.1)),
    "scaled": ({"scale": -0.3}, lambda z, t, r: F.cross_entropy(z * -0.3, t, reduction=r)),
    "soft cap": ({"softcap": 2.5}, lambda z, t, r: F.cross_entropy(torch.tanh(z / 2.5) * 2.5, t, reduction=r)),
    "z-loss": ({"z_loss": 0.02}, lambda z, t, r: F.cross_entropy(z, t, reduction=r) + reduced(z.logsumexp(1) ** 2 * 0.02, t, r)),
    "everything": (
        {"label_smoothing": 0.2, "scale": 0.6, "softcap": 3.0, "z_loss": 0.01},
        lambda z, t, r: (
            F.cross_entropy(torch.tanh(z * 0.2) * 3, t, reduction=r, label_smoothing=0.2)
            + reduced((torch.tanh(z * 0.2) * 3).logsumexp(1) ** 2 * 0.01, t, r)
        ),
    ),
}


def reduced(rows, target, reduction):
    rows = rows.masked_fill(target == -100, 0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / (target != -100).sum()}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 8, 21])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_loss_and_gradients_agree_with_float64(kernel, pieces, dtype, terms, rows, bias, reduction):
    more, formula = TERMS[terms]
    x, w, b, target = made(dtype, rows, bias=bias)
    target[0] = 3
    leaves = [t for t in (x, w, b) if t is not None]
    kept = [t.detach().clone() for t in leaves]
    loss = kernel.linear_cross_entropy(x, w, b, target, reduction=reduction, **more)
    cotangent = torch.rand_like(loss)
    found = torch.autograd.grad(loss, leaves, cotangent)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = formula(F.linear(*wide), target, reduction)
    want = torch.autograd.grad(exact, wide, cotangent.double())
    assert loss.dtype is torch.float32
    assert loss.shape == exact.shape
    assert relative(loss, exact) < TOLERANCES[dtype]
    assert max(map(relative, found, want)) < TOLERANCES[dtype]
    assert [g.dtype for g in found] == [t.dtype for t in leaves]
    assert all(map(torch.equal, leaves, kept))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_gets_no_gradient(kernel, pieces, frozen):
    x, w, _, target = made()
    (x, w)[frozen].requires_grad_(False)
    kernel.linear_cross_entropy(x, w, None, target).backward()
    assert [x.grad is None, w.grad is None] == [frozen == 0, frozen == 1]


def test_every_backward_pass_gives_the_same(kernel, pieces):
    x, w, _, target = made()
    loss = kernel.linear_cross_entropy(x, w, None, target)
    first = [g.clone() for g in torch.autograd.grad(loss * 0.5, (x, w), retain_graph=True)]
    second = torch.autograd.grad(loss * 0.5, (x, w), retain_graph=True)
    third = torch.autograd.grad(loss, (x, w))
    assert all(map(torch.equal, first, second))
    assert max(relative(a, b / 2) for a, b in zip(first, third, strict=True)) < 1e-6


def test_float16_gradients_are_rounded_after_the_loss_scale_has_come(kernel, pieces):
    """A model that is sure, and right: every softmax but one is below float16's smallest number until the scale has come."""
    x, w, _, _ = made(torch.float16)
    with torch.no_grad():
        x.mul_(0.02)[:, 0] = 17
        w.mul_(0.02)[0] = torch.eye(H)[0]
    target = torch.zeros(21, dtype=torch.int64)
    found = torch.autograd.grad(kernel.linear_cross_entropy(x, w, None, target) * 2.0**20, (x, w))
    want = torch.autograd.grad(F.cross_entropy(F.linear(x, w).float(), target) * 2.0**20, (x, w))
    assert max(map(relative, found, want)) < TOLERANCES[torch.float16]
    shares = torch.softmax(F.linear(x, w).double(), 1)
    assert relative(shares[:, 1:].half(), shares[:, 1:]) > 0.1  # rounded before


def test_second_derivatives_are_those_of_torchs_loss(kernel, pieces):
    def penalty(loss, leaves):
        return torch.autograd.grad(sum(g.pow(2).sum() for g in torch.autograd.grad(loss, leaves, create_graph=True)), leaves)

    x, w, _, target = made()
    found = penalty(kernel.linear_cross_entropy(x, w, None, target), (x, w))
    want = penalty(F.cross_entropy(F.linear(x, w), target), (x, w))
    assert max(map(relative, found, want)) < 1e-5


@pytest.mark.parametrize("rows", [0, 4])
def test_where_nothing_counts_loss_and_gradients_are_torchs(kernel, rows):
    x, w, _, _ = made(rows=rows)
    target = torch.full((rows,), -100)
    loss, want = kernel.linear_cross_entropy(x, w, None, target), F.cross_entropy(F.linear(x, w), target)
    assert loss.isnan()
    assert want.isnan()
    pairs = zip(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(want, (x, w)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_target_that_is_no_word_raises_as_in_torch(kernel):
    x, w, _, target = made()
    target[3] = V
    with pytest.raises(IndexError):
        kernel.linear_cross_entropy(x, w, None, target)


# -- the logits ---------------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    """Code that torch's function overrides do not reach."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return g * 2


def lazy(kernel, dtype=torch.float32, shape=(3, 7), *, bias=True):
    layer = nn.Linear(H, V, bias=bias, dtype=dtype)
    x = torch.randn(*shape, H, dtype=dtype, requires_grad=True)
    return kernel.layers.LMHead.forward(layer, x), layer(x), layer, x


LABELS = torch.randint(0, V, (3, 7), generator=torch.Generator().manual_seed(3))
ROWS = {  # what goes through the fused loss
    "as Transformers": lambda z: ForCausalLMLoss(z, LABELS, V),
    "as Transformers, over a number of items": lambda z: ForCausalLMLoss(z, LABELS, V, num_items_in_batch=11),
    "shifted by hand": lambda z: F.cross_entropy(z[:, :-1].contiguous().view(-1, V).float(), LABELS[:, 1:].reshape(-1)),
    "sliced with an ellipsis": lambda z: F.cross_entropy(z[..., :-1, :].float().reshape(-1, V), LABELS[:, 1:].reshape(-1)),
    "in float32 by `to`": lambda z: F.cross_entropy(z.to(torch.float32).view((21, V)), LABELS.view(-1), ignore_index=5),
    "label smoothing": lambda z: F.cross_entropy(z.float().view(-1, V), LABELS.view(-1), label_smoothing=0.1),
    "without a reduction": lambda z: F.cross_entropy(z.float().view(-1, V), LABELS.view(-1), reduction="none"),
    "as wide as the logits": lambda z: F.cross_entropy(z.view(-1, V), LABELS.view(-1)),
    "soft cap": lambda z: F.cross_entropy((torch.tanh(z / 3) * 3).float().view(-1, V), LABELS.view(-1)),
    "a soft cap in float32, twice scaled": lambda z: ForCausalLMLoss(2 * (0.5 * z.float()).div(3).tanh().mul(3), LABELS, V),
    "scaled": lambda z: ForCausalLMLoss(z * 0.0625, LABELS, V),
    "a loss module": lambda z: nn.CrossEntropyLoss(reduction="sum")(z.float().view(-1, V), LABELS.view(-1)),
}
OTHERS = {  # what reads the logits
    "two soft caps": lambda z: F.cross_entropy(torch.tanh(torch.tanh(z / 3)).float().view(-1, V), LABELS.view(-1)),
    "scaled by a tensor": lambda z: ForCausalLMLoss(z * torch.tensor(0.5), LABELS, V),
    "scaled by nothing": lambda z: z * 0.0,
    "divided with rounding": lambda z: torch.div(z, 3, rounding_mode="floor"),
    "a divisor": lambda z: 3 / (2 + z * z),
    "a soft cap below Python": lambda z: Double.apply(torch.tanh(z / 3) * 3),
    "class weights": lambda z: F.cross_entropy(z.float().view(-1, V), LABELS.view(-1), weight=torch.linspace(0, 1, V)),
    "z-loss": lambda z: ForCausalLMLoss(z, LABELS, V) + z.float().logsumexp(-1).pow(2).mean(),
    "classes second": lambda z: F.cross_entropy(z.float().transpose(1, 2), LABELS),
    "probabilities": lambda z: F.cross_entropy(z.float().view(-1, V), torch.eye(V)[LABELS.view(-1)]),
    "columns": lambda z: z[..., 3:9],
    "one token": lambda z: z[:, -1],
    "picked rows": lambda z: z[LABELS > 40],
    "in place": lambda z: z.div_(3) * 2,
    "assigned": lambda z: (z.__setitem__((0, 0), 0.0), z)[1] * 1,
    "another view": lambda z: z.view(-1),
    "below Python": Double.apply,
    "stacked": lambda z: torch.stack([z, z]),
    "a module": nn.Softmax(-1),
    "einsum": lambda z: torch.einsum("btv,btv->bt", z, z),
}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", [*ROWS, *OTHERS])
def test_what_is_computed_from_the_logits_is_what_the_layer_would_give(kernel, name, dtype):
    z, plain, layer, x = lazy(kernel, dtype)
    assert isinstance(z, kernel.LazyLogits)
    f = {**ROWS, **OTHERS}[name]
    got, want = f(z), f(plain.clone())
    assert type(got) is torch.Tensor
    assert z.known() == (name in OTHERS)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    leaves = (x, layer.weight, layer.bias)
    cotangent = torch.randn_like(want)
    found, exact = torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent)
    whole = name in OTHERS and name != "z-loss"  # which is a fused loss and a term that reads
    assert torch.equal(got, want) if whole else relative(got, want) < TOLERANCES[dtype]
    assert max(map(relative, found, exact)) < TOLERANCES[dtype]


def test_metadata_is_told_without_computing_anything(kernel):
    z, plain, _, _ = lazy(kernel)
    for ask in (
        lambda t: (t.shape, t.dtype, t.device, t.requires_grad, t.ndim, t.is_leaf, t.layout, len(t), t.numel(), t.stride()),
        lambda t: (t.size(-1), t.dim(), t.is_contiguous(), t.is_cuda, t.element_size(), t.is_floating_point()),
    ):
        assert ask(z) == ask(plain)
    assert z.grad_fn is not None
    assert len({z, z}) == 1
    assert not z.known()


def test_logits_are_read_as_any_tensor_is(kernel):
    z, plain, _, _ = lazy(kernel)
    assert torch.equal(z, plain)
    assert torch.equal(z.argmax(-1), plain.argmax(-1))
    assert z.detach().numpy().tolist() == plain.tolist()
    assert repr(z)[:40] == repr(plain)[:40]
    file = io.BytesIO()
    torch.save(z.detach(), file)
    file.seek(0)
    assert torch.equal(torch.load(file), plain)
    assert torch.equal(copy.deepcopy(z.detach()), plain)
    with torch.no_grad():
        fresh = lazy(kernel)[0]
        assert type(fresh) is torch.Tensor


def test_a_loss_and_a_term_that_reads_the_logits_add_up(kernel):
    z, plain, layer, x = lazy(kernel)
    both = [
        torch.autograd.grad(ForCausalLMLoss(t, LABELS, V) + 0.1 * t.pow(2).mean(), (x, layer.weight)) for t in (z, plain.clone())
    ]
    assert max(map(relative, *both)) < 1e-5


@pytest.mark.parametrize("when", ["before", "after", "after two", "a cast of them", "a loss of them"])
def test_logits_read_after_an_optimisers_step_are_those_from_before_it(kernel, when):
    z, plain, layer, _ = lazy(kernel)
    ForCausalLMLoss(z, LABELS, V).backward()
    cast = z.float() if when == "a cast of them" else z
    if when == "before":
        assert torch.equal(z.argmax(-1), plain.argmax(-1))
    optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
    for _ in range(2 if when == "after two" else 1):
        optimizer.step()
    if when == "a loss of them":
        assert relative(ForCausalLMLoss(z, LABELS, V), ForCausalLMLoss(plain, LABELS, V)) < 1e-6
    assert torch.equal(cast, plain)
    assert not torch.equal(layer(lazy(kernel)[3]), plain)


def test_logits_that_nobody_holds_cost_a_step_nothing(kernel, monkeypatch):
    lazies = sys.modules[kernel.LazyLogits.__module__]
    z, _, layer, _ = lazy(kernel)
    ForCausalLMLoss(z, LABELS, V).backward()
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda t, **_: copied.append(t) or t.detach() + 0)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert len(copied) == 2  # weight and bias, once for all that come from them
    del z
    torch.optim.SGD(layer.parameters(), 0.1).step()
    assert len(copied) == 2
    assert not lazies._living


@pytest.mark.parametrize("read", [lambda z: z.argmax(-1), lambda z: ForCausalLMLoss(z, LABELS, V)])
def test_logits_read_after_anything_else_wrote_to_the_weight_are_an_error(kernel, read):
    z, _, layer, _ = lazy(kernel)
    ForCausalLMLoss(z, LABELS, V).backward()
    with torch.no_grad():
        layer.weight.mul_(2)
    torch.optim.SGD(layer.parameters(), 0.1).step()
    with pytest.raises(RuntimeError, match=r"Read them before that, or let .* KernelConfig\("):
        read(z)


def test_the_gradient_at_logits_is_had_where_it_is_asked_for_before_the_loss(kernel):
    found = []
    for t in lazy(kernel)[:2]:
        t.retain_grad()
        t.register_hook(lambda grad: None)
        ForCausalLMLoss(t, LABELS, V).backward()
        found.append(t.grad)
    assert relative(*found) < 1e-6


def test_the_gradient_at_logits_that_were_never_made_is_refused(kernel):
    z = lazy(kernel)[0]
    loss = ForCausalLMLoss(z, LABELS, V)
    with pytest.raises(RuntimeError, match="gradient at the logits"):
        z.retain_grad()
    with pytest.raises(RuntimeError, match="gradient at the logits"):
        z.register_hook(print)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss, z)


def test_autocast_rounds_as_it_would_have(kernel):
    _, _, layer, x = lazy(kernel)
    with torch.autocast("cpu", torch.bfloat16):
        z, plain = kernel.layers.LMHead.forward(layer, x), layer(x)
        assert z.dtype is plain.dtype is torch.bfloat16
        loss, want = ForCausalLMLoss(z, LABELS, V), ForCausalLMLoss(plain, LABELS, V)
    assert not z.known()
    assert relative(loss, want) < 1e-5
    leaves = (x, layer.weight)
    assert max(map(relative, torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves))) < TOLERANCES[torch.bfloat16]
    assert torch.equal(z, plain)


def test_where_logits_are_wanted_at_once_the_layer_gives_them(kernel):
    layer, x = nn.Linear(H, V), torch.randn(2, H)
    forward = kernel.layers.LMHead.forward
    with torch.no_grad():
        assert type(forward(layer, x)) is torch.Tensor
    assert type(forward(layer.eval(), x)) is torch.Tensor
    layer.train()
    assert type(forward(layer.requires_grad_(False), x)) is torch.Tensor
    layer.requires_grad_(True)
    layer._is_replica = True
    assert type(forward(layer, x)) is torch.Tensor
    del layer._is_replica
    assert type(torch.func.grad(lambda x: forward(layer, x).sum())(x)) is torch.Tensor
    compiled = torch.compile(lambda x: forward(layer, x) * 2, backend="eager", fullgraph=True)
    assert type(compiled(x)) is torch.Tensor
    assert isinstance(forward(layer, x), kernel.LazyLogits)
