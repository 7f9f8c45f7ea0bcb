"""accelerate's hooks keep the forward in the instance. They come and go around a swap, and stay what they were."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from tests.slots.parts import Model, Prover, RMSNorm, everywhere, kernel, off_by_one_kernel, rms_norm_kernel, swap

from kernelswap.apply import apply
from kernelswap.errors import UndoConflict
from kernelswap.slots import module as slots

X = torch.linspace(-1, 1, 24).reshape(3, 8)
PLAIN = RMSNorm(8)(X).detach()


class Noting(ModelHook):
    def __init__(self):
        self.seen = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append("before")
        return args, kwargs

    def post_forward(self, module, output):
        self.seen.append("after")
        return output


def install(module, check="off", training=...):
    one = kernel(off_by_one_kernel)
    return apply(module, [swap("", one, one if training is ... else training)], Prover(), check=check)


def ours(module):
    """Values of the instance's dict that lead to us."""
    return [k for k, v in vars(module).items() if getattr(v, "__func__", None) not in (None, RMSNorm.forward)]


def test_a_hooked_module_has_no_obstacle_and_a_patched_one_below_its_hook_has():
    module = RMSNorm(8)
    add_hook_to_module(module, Noting())
    assert slots.obstacle(module) is None
    patched = RMSNorm(8)
    patched.forward = lambda x: x
    add_hook_to_module(patched, Noting())
    assert "accelerate's hook wraps a forward" in slots.obstacle(patched)


@pytest.mark.parametrize("check", ["off", "first-use"])
def test_a_swap_goes_under_a_hook_that_was_there(check):
    module, hook = RMSNorm(8), Noting()
    add_hook_to_module(module, hook)
    before = dict(vars(module))
    applied = install(module, check)
    for _ in range(2):
        assert torch.equal(module(X), PLAIN + 1)
    assert hook.seen == ["before", "after"] * 2
    assert vars(module) == before
    applied.undo()
    assert vars(module) == before
    assert torch.equal(module(X), PLAIN)
    assert hook.seen == ["before", "after"] * 3


def test_train_and_eval_move_the_kernel_under_the_hook():
    module, hook = RMSNorm(8), Noting()
    add_hook_to_module(module, hook)
    install(module, training=None)
    assert torch.equal(module.train()(X), PLAIN)
    assert torch.equal(module.eval()(X), PLAIN + 1)
    assert len(hook.seen) == 4


def test_a_hook_removed_later_leaves_the_kernel():
    module = RMSNorm(8)
    add_hook_to_module(module, Noting())
    applied = install(module, training=None)
    module.eval()
    remove_hook_from_module(module)
    assert "forward" not in vars(module)
    assert torch.equal(module(X), PLAIN + 1)
    assert torch.equal(module.train()(X), PLAIN)
    applied.undo()
    assert torch.equal(module.eval()(X), PLAIN)


@pytest.mark.parametrize("check", ["off", "first-use"])
def test_a_hook_added_later_calls_the_kernel_of_the_moment_and_leaves_it_on_removal(check):
    module, hook = RMSNorm(8), Noting()
    applied = install(module, check, training=None)
    module.eval()
    add_hook_to_module(module, hook)
    assert ours(module) == []
    assert torch.equal(module(X), PLAIN + 1)
    assert torch.equal(module.train()(X), PLAIN)
    assert torch.equal(module.eval()(X), PLAIN + 1)
    assert len(hook.seen) == 6
    remove_hook_from_module(module)
    assert "forward" not in vars(module)
    assert torch.equal(module(X), PLAIN + 1)
    applied.undo()
    assert torch.equal(module(X), PLAIN)


def test_undo_under_a_hook_that_came_later_leaves_the_hook_and_the_original():
    module, hook = RMSNorm(8), Noting()
    applied = install(module)
    add_hook_to_module(module, hook)
    applied.undo()
    assert torch.equal(module(X), PLAIN)
    assert hook.seen == ["before", "after"]
    assert ours(module) == []
    remove_hook_from_module(module)
    assert torch.equal(module(X), PLAIN)


def test_an_appended_hook_is_chained():
    module, first, second = RMSNorm(8), Noting(), Noting()
    add_hook_to_module(module, first)
    install(module)
    add_hook_to_module(module, second, append=True)
    assert isinstance(module._hf_hook, SequentialHook)
    assert torch.equal(module(X), PLAIN + 1)
    assert first.seen == second.seen == ["before", "after"]


def test_a_patch_between_swap_and_hook_stays_and_is_a_conflict():
    module = RMSNorm(8)
    applied = install(module)
    inner = module.forward
    module.forward = lambda x: inner(x) * 2
    add_hook_to_module(module, Noting())
    assert torch.equal(module(X), (PLAIN + 1) * 2)
    with pytest.raises(UndoConflict):
        applied.undo()
    remove_hook_from_module(module)
    assert torch.equal(module(X), (PLAIN + 1) * 2)


def test_a_copy_of_a_hooked_module_is_hooked_and_swapped():
    module = RMSNorm(8)
    add_hook_to_module(module, Noting())
    applied = install(module)
    twin = copy.deepcopy(module)
    applied.undo()
    assert torch.equal(twin(X), PLAIN + 1)
    assert len(twin._hf_hook.seen) == 2
    twin.weight.data.zero_()
    assert torch.equal(twin(X), torch.ones(3, 8))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["cpu", "disk", "dispatch"])
def test_weights_that_are_brought_for_each_call_are_there_for_the_kernel_and_its_check(kind, when, tmp_path):
    model = Model().eval().requires_grad_(requires_grad=False)
    plain = model(X)

    def offload():
        if kind == "cpu":
            cpu_offload(model, execution_device="cpu")
        elif kind == "disk":
            disk_offload(model, str(tmp_path), execution_device="cpu")
        else:
            dispatch_model(
                model, {"layers.0": "cpu", "layers.1": "disk", "norm": "disk"}, main_device="cpu", offload_dir=str(tmp_path)
            )

    if when == "before":
        offload()
    prover = Prover()
    applied = apply(model, everywhere(model, rms_norm_kernel), prover)
    if when == "after":
        offload()
    for _ in range(2):
        assert torch.allclose(model(X), plain, atol=1e-6)
        assert model.norm.weight.is_meta
    assert len(prover.calls) == 5
    assert applied.refusals == ()
    with applied.counting():
        model(X)
    assert sum(applied.calls.values()) == 5
    applied.undo()
    assert torch.equal(model(X), plain)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(X), plain)
