"""`bundled/loss` on a GPU: the Triton kernel against float64, and models swapped with `loss=True`. Never in CI."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernelswap.api import Swapper
from kernelswap.types import Swap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]

BUILD = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "loss" / "build" / "torch-universal"
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
DTYPES = list(TOLERANCES)


@pytest.fixture(scope="module")
def loss():
    package = types.ModuleType("loss_cuda_under_test")
    package.__path__ = [str(BUILD)]
    sys.modules[package.__name__] = package
    names = ("cross_entropy", "loss")
    yield types.SimpleNamespace(**{n: importlib.import_module(f"{package.__name__}.{n}") for n in names})
    for name in [m for m in sys.modules if m.startswith(package.__name__)]:
        del sys.modules[name]


@pytest.fixture
def sweeps(loss, monkeypatch):
    """How often the kernel was asked; without it torch would have answered, rightly and slowly."""
    seen = []

    def sweep(*args, _sweep=loss.cross_entropy.sweep):
        seen.append(args[0].shape[0])
        _sweep(*args)

    monkeypatch.setattr(loss.cross_entropy, "sweep", sweep)
    return seen


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative(got, want):
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def both(f, g, inputs):
    """Worst relative error of f's output and gradients against g's in float64; inputs must come out unwritten."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    kept = [x.detach().clone() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    got, want = f(*leaves), g(*exact)
    cotangent = torch.rand_like(got)
    if inputs[0].dtype is torch.float16 and not got.dim():  # a loss scale: without one float16 cannot hold these gradients
        cotangent *= 2.0**14
    found, wanted = torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, exact, cotangent.double())
    assert all(map(torch.equal, leaves, kept)), "an input was written to"
    return max(map(relative, (got, *found), (want, *wanted)))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", [1, 100, 4097, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_and_its_gradient(loss, sweeps, dtype, vocab, reduction):
    z = (torch.randn(37, vocab, device="cuda") * 3).to(dtype)
    target = torch.randint(0, vocab, (37,), device="cuda")
    target[[3, 11]] = -100
    if vocab == 1:  # loss and gradient are zero
        got = loss.cross_entropy.cross_entropy(z.requires_grad_(), target, reduction=reduction)
        assert not got.any()
        return
    error = both(
        lambda z: loss.cross_entropy.cross_entropy(z, target, reduction=reduction),
        lambda z: F.cross_entropy(z, target, reduction=reduction),
        (z,),
    )
    assert error < TOLERANCES[dtype]
    assert sweeps


TERMS = {
    "plain": ({}, F.cross_entropy),
    "smoothed": ({"label_smoothing": 0.1}, lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1)),
    "scaled": ({"scale": -0.3}, lambda z, t: F.cross_entropy(z * -0.3, t)),
    "soft cap": ({"softcap": 2.5}, lambda z, t: F.cross_entropy(torch.tanh(z / 2.5) * 2.5, t)),
    "rows": ({"reduction": "none"}, lambda z, t: F.cross_entropy(z, t, reduction="none")),
    "z-loss": (
        {"z_loss": 0.01},
        lambda z, t: F.cross_entropy(z, t) + 0.01 * z.logsumexp(1).square().masked_fill(t == -100, 0).sum() / (t != -100).sum(),
    ),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("pieces", [1, 4, 16])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head_and_its_loss_in_pieces(loss, sweeps, dtype, terms, pieces, bias):
    rows, hidden, vocab = 2048, 256, 5003
    inputs = [torch.randn(rows, hidden, device="cuda"), torch.randn(vocab, hidden, device="cuda") * 0.05]
    inputs = [t.to(dtype) for t in [*inputs, *([torch.randn(vocab, device="cuda")] if bias else [])]]
    target = torch.randint(0, vocab, (rows,), device="cuda")
    target[3::7] = -100
    more, want = TERMS[terms]
    workspace = vocab * inputs[0].element_size() * rows // pieces
    error = both(
        lambda x, w, b=None: loss.loss.linear_cross_entropy(x, w, b, target, workspace=workspace, **more),
        lambda x, w, b=None: want(F.linear(x, w, b), target),
        inputs,
    )
    assert error < TOLERANCES[dtype] * (2 if dtype is torch.float32 else 1)
    assert sweeps[:pieces] == [rows // pieces] * pieces


@pytest.mark.parametrize("hidden", [1024, 4096])
def test_the_head_holds_little_beyond_its_gradients(loss, hidden):
    rows, vocab = 8192, 151936
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_()
    target = torch.randint(0, vocab, (rows,), device="cuda")
    loss.loss.linear_cross_entropy(x[:256], w, None, target[:256]).backward()  # what cuBLAS keeps for itself is there
    x.grad = w.grad = None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss.loss.linear_cross_entropy(x, w, None, target).backward()
    beyond = torch.cuda.max_memory_allocated() - before - (x.numel() + w.numel()) * 2
    assert beyond <= 0.6 * 2**30


# -- models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(cache=tmp_path_factory.mktemp("gpu"), offline=True)


def made(kind="qwen3", dtype=torch.float32, vocab=5003, *, tie=True):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config, model = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    }[kind]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": vocab, "tie_word_embeddings": tie, "pad_token_id": 0}
    return model(config(**sizes, **more)).train().to("cuda", dtype)


def batch(vocab=5003, rows=4, length=128):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab, (rows, length), generator=generator).cuda()
    labels = ids.clone()
    labels[:, :9] = -100
    return ids, labels


def step(model, **more):
    model.zero_grad()
    ids, labels = batch(model.config.vocab_size)
    out = model(ids, labels=labels, **more)
    out.loss.backward()
    return out.loss.detach().double(), {n: p.grad.double() for n, p in model.named_parameters()}


def off(found, want):
    return relative(found[0], want[0]), max(relative(found[1][n], want[1][n]) for n in want[1])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_swapped_with_its_loss_errs_no_more_than_the_original(swapper, kind, dtype, tie):
    more = {"num_items_in_batch": torch.tensor(300, device="cuda")}
    model = made(kind, dtype, tie=tie)
    exact = step(made(kind, torch.float64, tie=tie), **more)
    original = off(step(model, **more), exact)
    applied = swapper.swap(model, loss=True, only="LMHead", require="LMHead")
    for _ in range(2):
        found = off(step(model, **more), exact)
        assert applied.refusals == ()
        assert found[0] <= 1.5 * original[0] + 1e-5
        assert found[1] <= 1.5 * original[1] + 1e-4
    assert any(isinstance(o, Swap) and o.site.layer == "LMHead" for o in applied.outcomes)


def test_float16_under_a_loss_scale_trains_as_the_original_does(swapper):
    losses, gradients = [], []
    for swap in (False, True):
        model = made()
        if swap:
            swapper.swap(model, loss=True, only="LMHead", require="LMHead")
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids, labels = batch()
        run = []
        for i in range(8):
            with torch.autocast("cuda", torch.float16):
                loss = model(ids, labels=labels).loss
            scaler.scale(loss).backward()
            if i == 0:
                scaler.unscale_(optimizer)
                gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
        assert scaler.get_scale() == 2.0**14  # nothing overflowed
    assert max(relative(gradients[1][n], g) for n, g in gradients[0].items()) < 2e-2
    assert losses[0][-1] < losses[0][0] - 0.1
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 0.02


def test_a_training_step_holds_a_fraction_of_the_logits(swapper):
    peaks = []
    for swap in (False, True):
        model = made(dtype=torch.bfloat16, vocab=151936)
        if swap:
            swapper.swap(model, loss=True, only="LMHead", require="LMHead")
        step(model)
        ids, labels = batch(151936, rows=8, length=1024)
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        model(ids, labels=labels).loss.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
        torch.cuda.empty_cache()
    assert peaks[0] > 2 * 8192 * 151936 * 4  # two float32 copies of the logits
    assert peaks[1] < peaks[0] / 6
