"""The Prover that ships, on real models: what it finds out on a first call stays true of every call after it."""

from dataclasses import replace

import pytest
import torch
from tests.ecosystem.models import IDS, NORM, gemma_norm_kernel, make, plan
from tests.slots.parts import kernel

from kernelswap.apply import apply
from kernelswap.proof import Check
from kernelswap.types import Kept


def planned(model, norms):
    """With the recipes that the default table names."""
    return [
        replace(s, site=replace(s.site, row=replace(s.site.row, probe="rotary" if s.site.kind == "function" else "rows")))
        for s in plan(model, norms=norms)
    ]


def step(model):
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads]


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("kind", ["qwen3", "gemma"])
def test_training_with_checks_on(kind, checkpointing):
    model = make(kind).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    plain = step(model)
    norms = kernel(gemma_norm_kernel, reads=("weight", "eps")) if kind == "gemma" else NORM
    applied = apply(model, planned(model, norms), Check(None, contain="never"))
    for _ in range(2):
        for ours, theirs in zip(step(model), plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert applied.refusals == ()
    with applied.counting():
        step(model)
    assert sum(applied.calls_of_original.values()) == 0


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_a_kernel_with_wrong_gradients_is_refused_in_training_and_the_step_is_right(checkpointing):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, eps):
            return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

        @staticmethod
        def backward(ctx, grad):
            return grad, grad.reshape(-1, grad.shape[-1]).sum(0), None

    model = make("qwen3").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    plain = step(model)
    wrong = kernel(lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon))
    applied = apply(model, planned(model, wrong), Check(None, contain="never"))
    for _ in range(2):
        for ours, theirs in zip(step(model), plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    assert {site.layer for site, _ in applied.refusals} == {"RMSNorm"}
    assert len(applied.refusals) == 9
    assert not [o for o in applied.outcomes if isinstance(o, Kept)]  # inference is still open
