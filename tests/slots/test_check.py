"""The first real call decides; what autograd, checkpointing, threads and tracers see stays consistent around it."""

import threading

import pytest
import torch
from tests.slots.parts import (
    Block,
    Model,
    Prover,
    RMSNorm,
    everywhere,
    kernel,
    off_by_one_kernel,
    rms_norm_kernel,
    swap,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernelswap.apply import apply
from kernelswap.errors import KernelSwapError
from kernelswap.types import Kept, Run, Swap, Verdict

X = torch.linspace(-1, 1, 24).reshape(3, 8)


def first_use(module=None, forward=off_by_one_kernel, prover=None, check="first-use", **more):
    module = module or RMSNorm(8)
    one = kernel(forward, **more)
    return module, apply(module, [swap("", one, one if one.backward else None)], prover or Prover(), check=check)


# -- which one answers --------------------------------------------------------------------------------------------


def test_an_accepted_kernel_answers_the_first_call_and_serves_from_then_on():
    prover = Prover()
    module, applied = first_use(module=RMSNorm(8).eval(), prover=prover)
    with torch.no_grad():
        assert torch.equal(module(X), RMSNorm(8)(X) + 1)
        assert type(module).forward is off_by_one_kernel
        module(X)
    assert prover.calls == [("", Run(training=False))]
    assert applied.outcomes[0].inference.verdict.reason == "accepted on the first call"
    assert applied.refusals == ()


@pytest.mark.parametrize("grad", [True, False])
def test_a_refused_kernel_leaves_the_originals_answer_and_its_reason(grad):
    module, applied = first_use(module=RMSNorm(8).eval(), prover=Prover("y[0] differs by 1"))
    with torch.set_grad_enabled(grad):
        assert torch.equal(module(X), RMSNorm(8)(X))
        assert type(module).forward is RMSNorm.forward
    ((site, reason),) = applied.refusals
    assert (site.path, reason) == ("", "y[0] differs by 1")
    assert "y[0] differs by 1" in applied.explain()
    assert isinstance(applied.outcomes[0], Swap)  # training is still open
    module.train()(X)
    assert isinstance(applied.outcomes[0], Kept)
    assert applied.report["swapped"] == 0


def test_each_mode_is_checked_on_its_own():
    prover = Prover()
    module, _ = first_use(prover=prover)
    module.train()(X)
    with torch.no_grad():
        module.eval()(X)
        module.eval()(X)
    module.train()(X)
    assert [run.training for _, run in prover.calls] == [True, False]


def test_an_eval_call_that_wants_gradients_is_checked_with_gradients():
    prover = Prover()
    module, _ = first_use(module=RMSNorm(8).eval(), prover=prover)
    module(X)
    assert prover.calls == [("", Run(training=True))]


def test_a_training_call_without_gradients_proves_the_forward_only():
    class NoBackward(Prover):
        def first_call(self, site, module, original, candidate, run, *rest):
            self.reason = "its gradients differ" if run.training else None
            return super().first_call(site, module, original, candidate, run, *rest)

    prover, plain = NoBackward(), RMSNorm(8)(X).detach()
    module, applied = first_use(module=RMSNorm(8).train(), prover=prover)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(module(X), plain + 1)
    assert [run.training for _, run in prover.calls] == [False]
    for _ in range(2):
        assert torch.equal(module(X), plain)
    assert [run.training for _, run in prover.calls] == [False, True]
    assert [r for _, r in applied.refusals] == ["its gradients differ"]


def test_a_check_that_raises_keeps_the_original_with_the_reason():
    class Broken(Prover):
        def first_call(self, *args):
            raise MemoryError("out of memory")

    module, applied = first_use(prover=Broken())
    assert torch.equal(module(X), RMSNorm(8)(X))
    assert applied.refusals[0][1] == "raised MemoryError while being checked: out of memory"


def test_a_wrong_call_raises_what_the_original_raises_and_decides_nothing():
    prover = Prover()
    module, applied = first_use(prover=prover)
    for _ in range(2):
        with pytest.raises(AttributeError, match="float"):
            module("not a tensor")
    assert applied.refusals == ()
    assert torch.equal(module(X), RMSNorm(8)(X) + 1)


def test_a_kernel_without_backward_waits_for_a_call_without_gradients():
    prover = Prover()
    module, _ = first_use(module=RMSNorm(8).eval(), prover=prover, backward=False)
    assert torch.equal(module(X), RMSNorm(8)(X))
    assert prover.calls == []
    with torch.no_grad():
        assert torch.equal(module(X), RMSNorm(8)(X) + 1)
    assert len(prover.calls) == 1
    assert torch.equal(module(X), RMSNorm(8)(X))


def test_always_checks_every_call_and_a_late_refusal_is_final():
    prover = Prover()
    module, applied = first_use(module=RMSNorm(8).eval(), prover=prover, check="always")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(X), RMSNorm(8)(X) + 1)
        assert len(prover.calls) == 3
        prover.reason = "drifted"
        for _ in range(2):
            assert torch.equal(module(X), RMSNorm(8)(X))
    assert len(prover.calls) == 4
    assert applied.refusals[0][1] == "drifted"


def test_sample_checks_the_first_and_every_nth_call():
    prover, asked = Prover(), []
    module, _ = first_use(module=RMSNorm(8).eval(), prover=prover, check="sample:3")
    with torch.no_grad():
        for i in range(8):
            before = len(prover.calls)
            assert torch.equal(module(X), RMSNorm(8)(X) + 1)
            asked += [i] * (len(prover.calls) - before)
    assert asked == [0, 3, 6]


@pytest.mark.parametrize("check", ["sometimes", "sample:0", "sample:", ""])
def test_a_meaningless_check_changes_nothing(check):
    module = RMSNorm(8)
    with pytest.raises(KernelSwapError, match="says nothing"):
        first_use(module, check=check)
    assert type(module) is RMSNorm


def test_the_check_leaves_no_trace_in_the_random_numbers():
    class Noisy(Prover):
        def first_call(self, *args):
            torch.rand(100)
            return super().first_call(*args)

    torch.manual_seed(0)
    module, _ = first_use(prover=Noisy())
    module(X)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))


# -- gradients ----------------------------------------------------------------------------------------------------


class Thorough(Prover):
    """Compares gradients too, as a real one does, and saves tensors of its own while it is at it."""

    def first_call(self, site, module, original, candidate, run, args, kwargs):
        with torch.enable_grad():
            given = [a.detach().requires_grad_() for a in args]
            for forward in (original, candidate.forward):
                torch.autograd.grad(forward(module, *given).exp().sum(), given)
        return super().first_call(site, module, original, candidate, run, args, kwargs)


def step(model, x, **checkpointing):
    model.zero_grad()
    for layer in model.layers:
        x = checkpoint(layer, x, **checkpointing) if checkpointing else layer(x)
    model.norm(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reason", [None, "differs"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_what_the_first_call_computed(use_reentrant, reason):
    torch.manual_seed(0)
    model = Model().train()
    x = X.clone().requires_grad_()
    plain = step(model, x)
    apply(model, everywhere(model, rms_norm_kernel), Thorough(reason))
    for _ in range(2):  # the step with the checks in it, and one without
        ours = step(model, x, use_reentrant=use_reentrant)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, ours, strict=True))
    served = RMSNorm.forward if reason else rms_norm_kernel
    assert type(model.norm).forward is served
    assert type(model.layers[0].norm1).forward is served


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_dropout_after_a_checked_module_is_recomputed_with_the_same_numbers(use_reentrant):
    class Noisy(Thorough):
        def first_call(self, *args):
            torch.rand(100)
            return super().first_call(*args)

    def grads(model, x):
        torch.manual_seed(1)
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        grad, x.grad = x.grad.clone(), None
        return grad

    torch.manual_seed(0)
    model = nn.Sequential(RMSNorm(8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    x = X.clone().requires_grad_()
    plain = grads(model, x)
    apply(model, everywhere(model, rms_norm_kernel), Noisy())
    for _ in range(2):
        assert torch.allclose(grads(model, x), plain, atol=1e-6)


def test_selective_checkpointing_is_checked_and_consistent():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(0)
    model = Model().train()
    x = X.clone().requires_grad_()
    plain = step(model, x)
    apply(model, everywhere(model, rms_norm_kernel), Thorough())
    for _ in range(2):
        ours = step(model, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, ours, strict=True))
    assert type(model.layers[0].norm1).forward is rms_norm_kernel


def test_what_looks_on_at_the_step_does_not_see_the_check():
    from torch.utils.flop_counter import FlopCounterMode

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(X)
        return counter.get_total_flops()

    class Multiplying(Prover):
        def first_call(self, *args):
            X @ X.T
            return super().first_call(*args)

    model = Block()
    before = flops(model)
    apply(model, everywhere(model, rms_norm_kernel), Multiplying())
    assert flops(model) == before
    assert type(model.norm1).forward is rms_norm_kernel


# -- threads and recursion ----------------------------------------------------------------------------------------


def test_two_threads_in_the_first_call_get_one_check_and_the_same_answer():
    inside, release = threading.Event(), threading.Event()

    class Slow(Prover):
        def first_call(self, *args):
            inside.set()
            assert release.wait(30)
            return super().first_call(*args)

    prover = Slow()
    module, _ = first_use(prover=prover)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(module(X))) for _ in range(4)]
    threads[0].start()
    assert inside.wait(30)
    for thread in threads[1:]:
        thread.start()
    release.set()
    for thread in threads:
        thread.join(30)
    assert len(prover.calls) == 1
    assert all(torch.equal(a, RMSNorm(8)(X) + 1) for a in answers)
    assert len(answers) == 4


def test_a_check_that_calls_the_module_gets_the_original():
    class Curious(Prover):
        def first_call(self, site, module, *rest):
            self.seen = module(X)
            return super().first_call(site, module, *rest)

    prover = Curious()
    module, _ = first_use(prover=prover)
    assert torch.equal(module(X), RMSNorm(8)(X) + 1)
    assert torch.equal(prover.seen, RMSNorm(8)(X))


def test_swapped_modules_inside_of_one_that_is_checked_stay_open_and_plain():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = RMSNorm(8)

        def forward(self, x):
            return self.norm(x) * 2

    model, prover = Outer().eval(), Prover()
    apply(model, [swap("", kernel(lambda self, x: self.norm(x) * 3)), swap("norm", kernel(off_by_one_kernel))], prover)
    plain = RMSNorm(8)(X)
    with torch.no_grad():
        assert torch.equal(model(X), plain * 3)
        assert [path for path, _ in prover.calls] == [""]
        assert torch.equal(model(X), (plain + 1) * 3)
        assert [path for path, _ in prover.calls] == ["", "norm"]


# -- where there are no numbers -----------------------------------------------------------------------------------


def test_fake_tensors_get_the_original_and_decide_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    prover = Prover()
    module, _ = first_use(prover=prover)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(mode.from_tensor(X))
    assert prover.calls == []
    module(X)
    assert len(prover.calls) == 1


def test_make_fx_gets_the_original_and_decides_nothing():
    from torch.fx.experimental.proxy_tensor import make_fx

    prover = Prover()
    module, _ = first_use(prover=prover)
    graph = make_fx(module)(X)
    assert prover.calls == []
    assert torch.equal(graph(X), RMSNorm(8)(X))


# -- counting -----------------------------------------------------------------------------------------------------


def test_counting_counts_while_it_is_open_and_leaves_no_frame():
    model = Model().eval()
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover())
    assert applied.report["calls"] is None
    with torch.no_grad(), applied.counting() as same:
        assert same is applied
        model(X)
        assert type(model.norm).forward is not off_by_one_kernel
        model(X)
    model(X)
    assert applied.calls == dict.fromkeys(("layers.0.norm1", "layers.0.norm2", "layers.1.norm1", "layers.1.norm2", "norm"), 2)
    assert sum(applied.calls_of_original.values()) == 0
    assert type(model.norm).forward is off_by_one_kernel
    assert "10 calls" in applied.explain()


def test_counting_tells_calls_that_the_original_served_all_the_same():
    module, applied = first_use(module=RMSNorm(8).eval(), backward=False)
    with applied.counting():
        module(X)  # gradients are wanted
        with torch.no_grad():
            module(X)
            module(X)
        module(X)
        module.train()(X)
    assert (applied.calls[""], applied.calls_of_original[""]) == (2, 3)


def test_a_verdict_may_come_with_the_plan_and_stays_until_a_call_says_more():
    module, applied = first_use()
    assert applied.outcomes[0].inference.verdict == Verdict(accepted=True, reason="equal on random tensors")
    module.train()(X)
    assert applied.outcomes[0].inference.verdict.reason == "equal on random tensors"
    assert applied.outcomes[0].training.verdict.reason == "accepted on the first call"
