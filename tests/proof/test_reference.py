"""The original in float64: what it means, without its roundings, and without a trace on the user's module."""

import copy
import functools

import pytest
import torch
from tests.proof.zoo import ORIGINALS, implementation, site
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from kernelswap.proof import Check
from kernelswap.proof.reference import Promote, Reference, tensors, twin, widen
from kernelswap.types import Run


def answer(module, *args, dtype=torch.float64):
    reference = Reference(type(module).forward, module, torch.device("cpu"))

    def run(function, a, k):
        return [function(reference.module, *a, **k)], {}

    return reference, reference(args, {}, run)


@pytest.mark.parametrize("name", ["llama", "gemma", "layer_norm", "mlp", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_casts_inside_the_original_do_not_round(name, dtype):
    torch.manual_seed(0)
    module = ORIGINALS[name].make(64).to(dtype)
    x = torch.randn(5, 64).to(dtype)
    with torch.no_grad():
        _, found = answer(module, x)
        wide = copy.deepcopy(module).double()
        if name in ("layer_norm", "mlp", "gelu"):  # these compute in the dtype that they are given
            assert torch.allclose(found.outputs[0], wide(x.double()), rtol=1e-14, atol=1e-14)
        near = module(x).double()
    assert found.outputs[0].dtype == torch.float64
    error = (near - found.outputs[0]).norm() / near.norm()
    assert 0 < error < 4 * torch.finfo(dtype).eps
    assert error > torch.finfo(dtype).eps / 100, "more exact than the original"


def test_every_way_to_ask_for_a_narrower_type():
    def forward(x):
        a = x.float() + x.to(torch.bfloat16) + x.half() + x.type(torch.float32) + x.to(dtype=torch.float32)
        b = (
            torch.zeros(3, dtype=torch.float32)
            + torch.ones_like(x, dtype=torch.bfloat16)
            + torch.full((3,), 0.1, dtype=torch.float16)
        )
        c = torch.softmax(x, -1, dtype=torch.float32) + x.sum(dtype=torch.float32) + x.type_as(torch.zeros(1))
        return a + b + c, x.to(torch.complex64)

    x = torch.tensor([1 / 3, 2 / 3, 1.0], dtype=torch.float64)
    with Promote():
        real, imaginary = forward(x)
    assert real.dtype == torch.float64
    assert imaginary.dtype == torch.complex128
    third = x * 6 + 1 + 0.1 + torch.softmax(x, -1) + x.sum()
    assert torch.allclose(real, third, rtol=1e-15)


def test_the_second_answer_shows_how_well_conditioned_the_question_is():
    module = nn.LayerNorm(64)
    x = torch.randn(2, 64)
    x[1] = 3.7
    with torch.no_grad():
        _, found = answer(module, x)
    moved = (found.moved[0] - found.outputs[0]).norm(dim=-1)
    assert moved[0] < 1e-5
    assert moved[1] > 1e-4, "a constant row is nothing but rounding"


def test_autocast_of_the_caller_does_not_reach_it():
    module = ORIGINALS["mlp"].make(32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        _, found = answer(module, torch.randn(3, 32))
    assert found.outputs[0].dtype == torch.float64


def test_a_copy_shares_nothing_that_a_kernel_could_write():
    module = ORIGINALS["mlp"].make(32)
    module.register_buffer("counter", torch.zeros(1))
    module.plain = torch.ones(2)
    before = {n: t.clone() for n, t in tensors(module).items()}
    copy_ = twin(module, lambda _, t: t.detach().clone())
    assert set(before) == {"gate_proj.weight", "up_proj.weight", "down_proj.weight", "counter", "plain"}
    with torch.no_grad():
        for t in tensors(copy_).values():
            t.add_(1)
    copy_.counter = torch.zeros(5)
    assert all(torch.equal(t, before[n]) for n, t in tensors(module).items())
    assert type(copy_) is type(module)
    assert copy_.config is module.config


def test_hooks_and_forwards_of_the_user_do_not_run_in_a_copy():
    calls = []
    module = ORIGINALS["mlp"].make(32)
    module.gate_proj.register_forward_hook(lambda *a: calls.append("hook"))
    module.up_proj.register_forward_pre_hook(lambda *a: calls.append("pre"))
    inner = module.down_proj
    inner._old_forward = inner.forward
    inner.forward = functools.partial(lambda self, x: calls.append("accelerate") or self._old_forward(x), inner)
    copy_ = twin(module, lambda _, t: t.detach().clone())
    x = torch.randn(2, 32)
    out = type(module).forward(copy_, x)
    assert not calls
    assert torch.equal(out, module(x))
    assert calls == ["hook", "pre", "accelerate"]


def test_a_forward_that_the_user_bound_to_the_module_is_bound_to_the_copy():
    linear = nn.Linear(4, 4)
    linear.forward = type(linear.forward)(lambda self, x: x @ self.weight, linear)
    copy_ = twin(linear, lambda _, t: t.detach() * 2)
    x = torch.randn(2, 4)
    assert torch.allclose(copy_(x), linear(x) * 2)


def test_weights_that_are_made_before_the_call_are_made_in_a_copy_too():
    linear = parametrizations.weight_norm(nn.Linear(4, 4))
    copy_ = twin(linear, lambda _, t: widen(t))
    x = torch.randn(2, 4)
    out = nn.Linear.forward(copy_, x.double())
    assert out.dtype == torch.float64
    assert torch.allclose(out.float(), linear(x), atol=1e-6)


def test_a_module_too_large_for_float64_gets_less_and_says_so(monkeypatch):
    from kernelswap.proof import reference

    monkeypatch.setattr(reference, "LARGEST_REFERENCE", 100)
    found, result = answer(LlamaRMSNorm(64).bfloat16(), torch.randn(2, 64).bfloat16())
    assert found.note.startswith("float32")
    assert result.outputs[0].dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_a_rotary_embedding_whose_cos_is_half_as_wide_is_proved_on_such(training):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    module = ORIGINALS["rotary"].make(64)

    def by_halves(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        halves = ((x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]) for x in (q, k))
        return tuple(torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in halves)

    def turned_back(q, k, cos, sin, unsqueeze_dim=1):
        return by_halves(q, k, cos, -sin, unsqueeze_dim)

    for kernel, right in ((by_halves, True), (turned_back, False)):
        asked = site(module, "rotary", "function"), module, gpt_oss.apply_rotary_pos_emb, implementation(kernel, "function")
        verdict = Check(None).equivalent(*asked, Run(training=training))
        assert verdict.accepted is right, verdict.reason
