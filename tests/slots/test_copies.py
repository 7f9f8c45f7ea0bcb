"""What becomes of a swapped module that is copied, pickled, saved, replicated or called functionally."""

import copy
import io
import pickle

import pytest
import torch
from tests.slots.parts import (
    Model,
    Prover,
    RMSNorm,
    everywhere,
    kernel,
    off_by_one_kernel,
    rms_norm_kernel,
    swapped,
)

from kernelswap.apply import apply
from kernelswap.slots import module as slots
from kernelswap.slots import state

X = torch.linspace(-1, 1, 24).reshape(3, 8)


# -- copies and files ---------------------------------------------------------------------------------------------


def test_a_deepcopy_is_swapped_live_and_on_its_own():
    model = Model().eval()
    applied = apply(model, everywhere(model, off_by_one_kernel, RMSNorm), Prover(), check="off")
    twin = copy.deepcopy(model)
    applied.undo()
    assert type(model.norm) is RMSNorm
    assert type(twin.norm).forward is off_by_one_kernel
    assert twin.norm.weight is not model.norm.weight
    state.find(twin.norm).parts[0].training.standing = "refused"
    assert type(twin.train().norm).forward is RMSNorm.forward
    assert type(twin.eval().norm).forward is off_by_one_kernel
    for module in list(slots.swapped(twin)):
        slots.release(module)
    assert all(state.find(m) is None for m in twin.modules())
    assert type(twin.norm) is RMSNorm


def test_a_deepcopy_before_the_first_call_checks_for_itself():
    prover = Prover()
    module, _ = swapped(prover=prover, check="first-use")
    twin = copy.deepcopy(module)
    module(X)
    assert type(twin).forward is not off_by_one_kernel
    twin(X)
    assert type(twin).forward is off_by_one_kernel
    assert len(prover.calls) == 2


def test_a_shallow_copy_is_swapped_too():
    module, applied = swapped()
    twin = copy.copy(module)
    applied.undo()
    assert torch.equal(twin(X), RMSNorm(8)(X) + 1)
    assert twin.weight is module.weight


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_names_the_original_class(protocol):
    module, _ = swapped()
    data = pickle.dumps(module, protocol)
    assert b"kernelswap" not in data
    back = pickle.loads(data)
    assert type(back) is RMSNorm
    assert torch.equal(back(X), RMSNorm(8)(X))


class WithState(RMSNorm):
    def __getstate__(self):
        return {**vars(self), "cache": None}

    def __setstate__(self, state):
        super().__setstate__({**state, "restored": True})


class WithReduce(RMSNorm):
    def __reduce__(self):
        return type(self), (8,)


@pytest.mark.parametrize("cls", [WithState, WithReduce])
def test_a_class_that_pickles_in_its_own_way_still_does(cls):
    module, _ = swapped(cls(8))
    back = pickle.loads(pickle.dumps(module))
    assert type(back) is cls
    assert getattr(back, "restored", None) == getattr(pickle.loads(pickle.dumps(cls(8))), "restored", None)


def test_torch_save_of_the_whole_model_loads_as_the_original():
    model = Model()
    apply(model, everywhere(model, off_by_one_kernel), Prover(), check="off")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert {type(m) for m in back.modules()} == {type(m) for m in Model().modules()}
    assert torch.equal(back(X), Model.forward(back, X))


def test_the_state_dict_is_the_same_and_loads():
    model = Model()
    before = model.state_dict()
    apply(model, everywhere(model, off_by_one_kernel), Prover())
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    model.load_state_dict({k: v + 1 for k, v in before.items()})
    assert torch.equal(model.norm.weight, before["norm.weight"])  # state_dict tensors share memory with the model


def test_a_data_parallel_replica_uses_its_own_weights_and_reports_to_its_source():
    prover = Prover()
    module, _ = swapped(RMSNorm(8).eval(), prover=prover, check="first-use")
    replica = module._replicate_for_data_parallel()
    replica.weight = torch.zeros(8)  # as torch.nn.parallel.replicate hands weights out
    assert torch.equal(replica(X), torch.ones(3, 8))
    assert len(prover.calls) == 1
    assert type(module).forward is off_by_one_kernel
    assert torch.equal(module(X), RMSNorm(8)(X) + 1)


def test_functional_call_reaches_the_kernel_with_the_given_weights():
    module, _ = swapped(check="first-use")
    for _ in range(2):
        out = torch.func.functional_call(module, {"weight": torch.zeros(8)}, (X,))
        assert torch.equal(out, torch.ones(3, 8))


@pytest.mark.parametrize("check", ["off", "first-use"])
def test_torch_func_transforms_go_through(check):
    prover = Prover()
    module, applied = swapped(implementation=kernel(rms_norm_kernel), check=check, prover=prover)
    plain, weights = RMSNorm(8), dict(module.named_parameters())

    def loss(weights, x, m=module):
        return torch.func.functional_call(m, weights, (x,)).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, X)
    theirs = torch.func.vmap(torch.func.grad(lambda w, x: loss(w, x, plain)), in_dims=(None, 0))(weights, X)
    assert torch.allclose(ours["weight"], theirs["weight"], atol=1e-5)
    assert prover.calls == []  # nothing there could be compared; the verdict stays open
    assert applied.refusals == ()
    module(X)
    assert type(module).forward is rms_norm_kernel


class PassesOn(torch.nn.Module):
    """As PEFT's models and compiled ones do: what it does not have, the module inside may."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)


def test_a_copy_of_a_wrapper_that_passes_attributes_on_is_a_wrapper():
    module, applied = swapped()
    twin = copy.deepcopy(PassesOn(module))
    assert type(twin) is PassesOn
    assert type(twin.inner).forward is off_by_one_kernel
    assert twin.inner is not module
    applied.undo()
