"""FSDP2 gives a module a class of its own; a swap lives above it or below it. One process over gloo."""

import copy

import pytest
import torch
import torch.distributed as dist
from tests.ecosystem.models import IDS, make
from tests.slots.parts import MLP, READING, Model, Prover, RMSNorm, everywhere, kernel, rms_norm_kernel, swap
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from kernelswap.api import Swapper
from kernelswap.apply import apply
from kernelswap.errors import UndoConflict
from kernelswap.slots import module as slots

X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.fixture(autouse=True, scope="module")
def one_process(tmp_path_factory):
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(model):
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.layers:
        fully_shard(layer.norm1, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model):
    model.zero_grad()
    model(X).square().mean().backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("order", ["swap, shard", "shard, swap"])
def test_a_sharded_model_trains_with_its_kernels(order):
    torch.manual_seed(0)
    model = Model().train()
    plain, prover = step(copy.deepcopy(model)), Prover()
    if order == "swap, shard":
        applied = apply(model, everywhere(model, rms_norm_kernel), prover)
        shard(model)
    else:
        shard(model)
        applied = apply(model, everywhere(model, rms_norm_kernel), prover)
    for _ in range(2):
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(step(model), plain, strict=True))
    assert len(prover.calls) == 5
    assert applied.refusals == ()
    for module in (model.norm, model.layers[0].norm1, model.layers[1].norm2):
        assert type(module).forward is rms_norm_kernel
    assert isinstance(model.layers[0].norm1, FSDPModule)
    assert isinstance(model.layers[0].norm1, RMSNorm)


def test_a_module_sharded_before_the_swap_is_undone_to_its_sharded_class():
    model = shard(Model())
    before = [type(m) for m in model.modules()]
    applied = apply(model, everywhere(model, rms_norm_kernel), Prover())
    model(X)
    applied.undo()
    assert [type(m) for m in model.modules()] == before


def test_a_module_sharded_after_the_swap_is_a_conflict_that_names_the_wrapper():
    model = Model()
    applied = apply(model, [swap("layers.0.norm1", kernel(rms_norm_kernel))], Prover())
    shard(model)
    model(X)
    with pytest.raises(UndoConflict, match="norm1 is now a FSDPRMSNorm"):
        applied.undo()


def test_modes_stay_live_under_a_sharded_class_without_a_new_class_at_each_turn():
    model = Model().eval()
    apply(model, [swap("layers.0.norm1", kernel(rms_norm_kernel), None)], Prover(), check="off")
    shard(model)
    norm, seen = model.layers[0].norm1, []
    for training in (True, False) * 3:
        model.train(training)
        assert isinstance(norm, FSDPModule)
        assert type(norm).forward is (RMSNorm.forward if training else rms_norm_kernel)
        seen.append(type(norm))
        model(X)
    assert len(set(seen)) == 2


def test_a_kernel_that_reads_a_parameter_which_a_shard_of_its_own_brings_declines():
    mlp = MLP()
    fully_shard(mlp.gate_proj, mesh=init_device_mesh("cpu", (1,)))
    assert "has forward hooks" in slots.obstacle(mlp, READING)


@pytest.mark.parametrize("reshard", [None, True])
@pytest.mark.parametrize("order", ["swap, shard", "shard, swap"])
def test_the_head_of_a_sharded_language_model_gives_logits_at_once(tmp_path, order, reshard):
    """FSDP takes the weight away after the forward, and hangs hooks on what comes out of it."""
    model, plain = make("llama").train(), make("llama").train()
    swapper = Swapper(cache=tmp_path, offline=True)
    for what in order.split(", "):
        if what == "swap":
            swapper.swap(model, loss=True, only="LMHead", require="LMHead", build="never")
            continue
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, **({} if reshard is None else {"reshard_after_forward": reshard}))
    out, want = (m(input_ids=IDS, labels=IDS) for m in (model, plain))
    for one in (out, want):
        one.loss.backward()
    assert torch.equal(out.logits, want.logits)
    assert torch.allclose(model.lm_head.weight.grad.full_tensor(), plain.lm_head.weight.grad)
