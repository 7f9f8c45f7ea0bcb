"""Kernels for statements are held against the statements, the parameters of their norms included."""

import os
from dataclasses import replace

import pytest
import torch
from tests.fusion import anywhere, make
from tests.proof.zoo import implementation
from tests.proof.zoo_crash import artifact
from torch import nn

from kernelswap import sites
from kernelswap.proof import Check
from kernelswap.slots import function as function_slot
from kernelswap.types import Run


def rms(norm, x, *, eps=1.0, shift=0.0, weight=True):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon * eps)
    return (normed * (norm.weight.float() + shift if weight else norm.weight.detach().float())).to(x.dtype)


def turned(x, cos, sin, sign=1.0):
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), x.shape[-1] // 2
    return x * cos + sign * torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def right(norm, residual, hidden):
    s = residual + hidden
    return rms(norm, s), s


def right_rotary(q_norm, k_norm, q, k, cos, sin):
    return turned(rms(q_norm, q), cos, sin), turned(rms(k_norm, k), cos, sin)


WRONG = {
    "another eps": lambda norm, residual, hidden: (rms(norm, residual + hidden, eps=2.0), residual + hidden),
    "one plus weight": lambda norm, residual, hidden: (rms(norm, residual + hidden, shift=1.0), residual + hidden),
    "the norm of the sum as the sum": lambda norm, residual, hidden: (rms(norm, residual + hidden),) * 2,
    "the other way round": lambda norm, residual, hidden: right(norm, residual, hidden)[::-1],
    "without the residual": lambda norm, residual, hidden: (rms(norm, hidden), residual + hidden),
    "no gradient of the weight": lambda norm, r, h: (rms(norm, r + h, weight=False), r + h),
    "no gradient through the sum": lambda norm, r, h: (rms(norm, r + h), (r + h).detach()),
    "the sum in place": lambda norm, r, h: (rms(norm, r.add_(h) if not r.requires_grad else r + h), r),
}
WRONG_ROTARY = {
    "another eps": lambda a, b, q, k, c, s: (turned(rms(a, q, eps=2.0), c, s), turned(rms(b, k), c, s)),
    "one norm for both": lambda a, b, q, k, c, s: (turned(rms(a, q), c, s), turned(rms(a, k), c, s)),
    "turned the other way": lambda a, b, q, k, c, s: (turned(rms(a, q), c, s), turned(rms(b, k), c, s, -1.0)),
    "the norm after": lambda a, b, q, k, c, s: (rms(a, turned(q, c, s)), rms(b, turned(k, c, s))),
    "no norm of k": lambda a, b, q, k, c, s: (turned(rms(a, q), c, s), turned(k, c, s)),
    "no gradient of a weight": lambda a, b, q, k, c, s: (turned(rms(a, q), c, s), turned(rms(b, k, weight=False), c, s)),
}


@pytest.fixture(scope="module")
def found():
    model = make("qwen3")
    modules = sites.modules(model)
    return {s.layer: (s, modules[s.path]) for s in sites.find(model, anywhere()) if s.row.statements}


def asked(found, layer, kernel, training, dtype=torch.float32):
    site, module = found[layer]
    if dtype != torch.float32:
        module = type(module)(module.self_attn.config if layer == "residual_norm" else module.config, 0).to(dtype)
        site = replace(site, dtype=str(dtype))
    original = function_slot.original(module, site.name)
    return Check(None, contain="never").equivalent(
        site, module, original, implementation(kernel, "function"), Run(training=training)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("layer", "kernel"), [("residual_norm", right), ("norm_rotary", right_rotary)])
def test_the_same_with_other_roundings_is_accepted(found, layer, kernel, training, dtype):
    verdict = asked(found, layer, kernel, training, dtype)
    assert verdict.accepted, verdict.reason


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_for_sum_and_norm_is_refused(found, name):
    verdict = asked(found, "residual_norm", WRONG[name], training="gradient" in name)
    assert not verdict.accepted
    assert "no way to test" not in verdict.reason


@pytest.mark.parametrize("name", WRONG_ROTARY)
def test_a_wrong_kernel_for_norms_and_rotary_is_refused(found, name):
    verdict = asked(found, "norm_rotary", WRONG_ROTARY[name], training="gradient" in name)
    assert not verdict.accepted
    assert "no way to test" not in verdict.reason


def test_a_missing_gradient_of_a_norm_is_named_by_the_norm(found):
    verdict = asked(found, "residual_norm", WRONG["no gradient of the weight"], training=True)
    assert "gives no gradient of post_attention_layernorm.weight" in verdict.reason
    verdict = asked(found, "norm_rotary", WRONG_ROTARY["no gradient of a weight"], training=True)
    assert "gives no gradient of k_norm.weight" in verdict.reason


@pytest.mark.parametrize("wrong", [False, True])
def test_on_a_real_call_the_norms_given_are_those_compared(found, wrong):
    site, module = found["residual_norm"]
    norm = module.post_attention_layernorm
    original = function_slot.original(module, site.name)
    kernel = (lambda n, r, h: (rms(n, r + h, eps=1e4), r + h)) if wrong else right
    given = torch.randn(1, 5, 32) * 1e-2, torch.randn(1, 5, 32) * 1e-2
    with torch.no_grad():
        (y, s), verdict = Check(None, contain="never").first_call(
            site, module, original, implementation(kernel, "function"), Run(), (norm, *given), {}
        )
    assert verdict.accepted is not wrong, verdict.reason
    torch.testing.assert_close(y, norm(given[0] + given[1]))
    assert torch.equal(s, given[0] + given[1])


def test_a_verdict_is_void_for_another_norm(found):
    site, module = found["residual_norm"]
    original, kernel = function_slot.original(module, site.name), implementation(right, "function")
    check = Check(None, contain="never")
    key = check.equivalent(site, module, original, kernel, Run()).key
    assert check.equivalent(site, module, original, kernel, Run()).key == key
    norm = module.post_attention_layernorm
    try:
        norm.variance_epsilon *= 2
        assert check.equivalent(site, module, original, kernel, Run()).key != key
    finally:
        norm.variance_epsilon /= 2
    assert isinstance(norm, nn.Module)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals have names on posix")
@pytest.mark.parametrize("crashes", [True, False])
def test_a_kernel_that_crashes_on_norms_does_so_in_a_child_process(found, tmp_path, crashes):
    crash = "norm.weight.sum()\n    import os\n    os.abort()" if crashes else "pass"
    function = (
        f"def residual_norm(norm, residual, hidden):\n    {crash}\n    return norm_of(norm, residual + hidden), residual + hidden"
    )
    build = artifact(tmp_path / "kernel", f"        pass\n\n\n{function}\n\n\ndef norm_of(self, hidden_states):")
    site, module = found["residual_norm"]
    original = function_slot.original(module, site.name)
    kernel = replace(implementation(right, "function"), layer="residual_norm", origin=build)
    check = Check(None, contain="always")
    try:
        verdict = check.equivalent(site, module, original, kernel, Run())
    finally:
        check.close()
    assert verdict.accepted is not crashes, verdict.reason
    if crashes:
        assert "SIGABRT" in verdict.reason
