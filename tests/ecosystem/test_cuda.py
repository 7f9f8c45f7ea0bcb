"""What only an accelerator shows: moves between devices, random numbers there, graph capture, replicas."""

import pytest
import torch
from tests.ecosystem.models import IDS, make, plan
from tests.slots.parts import Comparing, Model, Prover, RMSNorm, everywhere, kernel, off_by_one_kernel, rms_norm_kernel, swap
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernelswap.apply import apply

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


def on_cuda(path="", forward=off_by_one_kernel, **more):
    return swap(path, kernel(forward, **more), device="cuda:0")


def x():
    return torch.linspace(-1, 1, 24, device="cuda").reshape(3, 8)


def test_a_module_that_leaves_its_device_leaves_its_kernel_and_asks_again_when_it_comes_back():
    prover = Prover()
    module = RMSNorm(8).cuda()
    applied = apply(module, [on_cuda()], prover)
    module(x())
    assert type(module).forward is off_by_one_kernel
    module.cpu()
    assert type(module).forward is RMSNorm.forward
    assert "was chosen for cuda" in applied.outcomes[0].reason
    module.cuda()
    module(x())
    assert type(module).forward is off_by_one_kernel
    assert len(prover.calls) == 2


def test_the_check_leaves_no_trace_in_the_random_numbers_of_the_device():
    class Noisy(Prover):
        def first_call(self, *args):
            torch.rand(100, device="cuda")
            return super().first_call(*args)

    module = RMSNorm(8).cuda()
    apply(module, [on_cuda()], Noisy())
    torch.manual_seed(0)
    module(x())
    drawn = torch.rand(1, device="cuda")
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1, device="cuda"))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_with_dropout(use_reentrant):
    def grads(model, given):
        torch.manual_seed(1)
        checkpoint(model, given, use_reentrant=use_reentrant).square().sum().backward()
        grad, given.grad = given.grad.clone(), None
        return grad

    torch.manual_seed(0)
    model = nn.Sequential(RMSNorm(8), nn.Dropout(0.5), nn.Linear(8, 8)).cuda().train()
    given = x().requires_grad_()
    plain = grads(model, given)
    apply(model, [on_cuda("0", rms_norm_kernel)], Comparing())
    for _ in range(2):
        assert torch.allclose(grads(model, given), plain, atol=1e-5)


def test_a_graph_that_is_captured_before_any_eager_call_holds_the_original_and_decides_nothing():
    prover = Prover()
    module = RMSNorm(8).cuda().eval()
    plain = RMSNorm(8).cuda()(x())
    apply(module, [on_cuda()], prover)
    given, graph = x(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            out = module(given)
        graph.replay()
        assert torch.allclose(out, plain)
        assert prover.calls == []
        module(given)
        with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
            out = module(given)
        graph.replay()
        assert torch.allclose(out, plain + 1)


def test_replicas_of_data_parallel():
    model = Model().cuda().eval()
    swaps = [on_cuda(s.site.path, rms_norm_kernel) for s in everywhere(model, rms_norm_kernel)]
    with torch.no_grad():
        plain, prover = model(x()), Comparing()
        apply(model, swaps, prover)
        for _ in range(2):
            (replica,) = torch.nn.parallel.replicate(model, [0])
            assert torch.allclose(replica(x()), plain, atol=1e-6)
    assert len(prover.calls) == 5
    assert type(model.norm).forward is rms_norm_kernel


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_data_parallel_over_two_devices():
    model = Model().cuda().eval()
    swaps = [on_cuda(s.site.path, rms_norm_kernel) for s in everywhere(model, rms_norm_kernel)]
    with torch.no_grad():
        plain = model(x())
        apply(model, swaps, Comparing())
        parallel = nn.DataParallel(model, [0, 1])
        for _ in range(3):
            assert torch.allclose(parallel(x()), plain, atol=1e-6)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_compiled_by_inductor(dtype):
    torch._dynamo.reset()
    model = make("qwen3").cuda().to(dtype)
    ids = IDS.cuda()
    with torch.no_grad():
        plain = model(ids).logits
        apply(model, [on_cuda(s.site.path, s.inference.implementation.forward) for s in plan(model, rotary=False)], Prover())
        model(ids)
        fast = torch.compile(model.model, fullgraph=True)
        out = model.lm_head(fast(ids, use_cache=False).last_hidden_state)
    torch.testing.assert_close(out, plain, atol=5e-2 if dtype is torch.bfloat16 else 1e-4, rtol=1e-2)
    torch._dynamo.reset()
