"""A swap is one subclass; nothing else about the module changes."""

import copy
import inspect
import io
import pickle
import sys

import pytest
import torch
from tests.slots.parts import (
    MLP,
    READING,
    Block,
    Model,
    Prover,
    RMSNorm,
    as_now,
    everywhere,
    kernel,
    off_by_one_kernel,
    reading_mlp_kernel,
    rms_norm_kernel,
    swap,
)
from torch import nn

from kernelswap.apply import apply
from kernelswap.errors import PlanConflict, UndoConflict
from kernelswap.slots import module as slots
from kernelswap.slots import state


def swapped(module=None, implementation=None, *, training=..., check="off", prover=None, **more):
    module = module or RMSNorm(8)
    implementation = implementation or kernel(off_by_one_kernel)
    training = implementation if training is ... else training
    return module, apply(module, [swap("", implementation, training)], prover or Prover(), check=check, **more)


X = torch.linspace(-1, 1, 24).reshape(3, 8)


# -- the class ----------------------------------------------------------------------------------------------------


def test_the_class_is_one_step_below_the_modules_own_and_keeps_its_names():
    module, _ = swapped()
    assert type(module).__mro__[1:] == RMSNorm.__mro__
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(module), name) == getattr(RMSNorm, name)
    assert isinstance(module, RMSNorm)
    assert repr(module) == repr(RMSNorm(8))


def test_the_instance_dict_is_untouched():
    module = RMSNorm(8)
    before = {k: id(v) for k, v in vars(module).items()}
    swapped(module, check="first-use")
    module(X)
    assert {k: id(v) for k, v in vars(module).items()} == before


def test_a_proven_kernel_is_called_without_a_frame_of_ours():
    depths = []

    def forward(self, hidden_states):
        depths.append(len(inspect.stack()))
        return hidden_states

    class Plain(RMSNorm):
        pass

    Plain.forward = forward
    direct, module = Plain(8), RMSNorm(8)
    swapped(module, kernel(forward), check="first-use")
    module(X)
    depths.clear()
    assert type(module).forward is forward
    for one in (direct, module):
        one(X)
    assert depths[0] == depths[1]


def test_layers_of_one_class_share_their_subclasses():
    model = Model(layers=3)
    apply(model, everywhere(model, rms_norm_kernel), Prover())
    model(X)
    assert len({type(m) for m in model.modules() if isinstance(m, RMSNorm)}) == 1


def test_two_models_with_different_kernels_do_not_meet():
    a, b, c = RMSNorm(8), RMSNorm(8), RMSNorm(8)
    swapped(a)
    swapped(b, kernel(rms_norm_kernel))
    assert torch.equal(a(X), c(X) + 1)
    assert torch.allclose(b(X), c(X), atol=1e-6)
    assert type(c) is RMSNorm


def test_hooks_still_fire_around_the_kernel():
    module, seen = RMSNorm(8), []
    module.register_forward_pre_hook(lambda m, a: seen.append("before"))
    swapped(module)
    module.register_forward_hook(lambda m, a, o: seen.append("after"))
    module(X)
    assert seen == ["before", "after"]


def test_a_metaclass_is_asked_to_make_the_subclass():
    class Meta(type):
        made = []

        def __new__(mcs, name, bases, body):
            cls = super().__new__(mcs, name, bases, body)
            Meta.made.append(cls)
            return cls

    class Odd(RMSNorm, metaclass=Meta):
        __slots__ = ("extra",)

    module = Odd(8)
    module.extra = 7
    swapped(module)
    assert type(module) in Meta.made
    assert module.extra == 7
    assert torch.equal(module(X), RMSNorm(8)(X) + 1)


def test_constructing_from_the_class_of_a_swapped_module_gives_a_plain_one():
    module, _ = swapped()
    assert type(type(module)(8)) is RMSNorm


# -- modes are live -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toggle", ["module", "parent", "assignment"])
def test_train_and_eval_move_the_module_to_the_forward_of_its_mode(toggle):
    model = nn.ModuleDict({"inner": RMSNorm(8)})
    inner = model["inner"].eval()
    apply(model, [swap("inner", kernel(off_by_one_kernel), kernel(rms_norm_kernel))], Prover(), check="off")

    def to(training):
        if toggle == "assignment":
            inner.training = training
        else:
            (model if toggle == "parent" else inner).train(training)

    assert type(inner).forward is off_by_one_kernel
    to(True)
    assert type(inner).forward is rms_norm_kernel
    assert inner.training is True
    to(False)
    assert type(inner).forward is off_by_one_kernel


def test_reading_training_runs_no_code_of_ours():
    module, _ = swapped()
    frames = []
    sys.setprofile(lambda frame, event, _: frames.append(frame.f_code.co_name) if event == "call" else None)
    try:
        seen = module.training
    finally:
        sys.setprofile(None)
    assert seen is True
    assert not [name for name in frames if name != "<lambda>"]


def test_a_mode_without_a_kernel_keeps_the_original():
    module, _ = swapped(training=None)
    assert type(module.train()).forward is RMSNorm.forward
    assert type(module.eval()).forward is off_by_one_kernel


def test_a_kernel_without_backward_is_never_live_in_training_whatever_the_plan_says():
    forward_only = kernel(off_by_one_kernel, backward=False)
    module, _ = swapped(implementation=forward_only, training=forward_only)
    assert type(module.train()).forward is RMSNorm.forward


def test_a_kernel_without_backward_gives_way_where_eval_wants_gradients():
    module, _ = swapped(implementation=kernel(off_by_one_kernel, backward=False), training=None)
    plain = RMSNorm(8)
    module.eval()
    assert torch.equal(module(X), plain(X))  # its weight requires a gradient
    with torch.no_grad():
        assert torch.equal(module(X), plain(X) + 1)
    module.requires_grad_(requires_grad=False)
    assert torch.equal(module(X), plain(X) + 1)
    assert torch.equal(module(X.clone().requires_grad_()), plain(X))


# -- undo ---------------------------------------------------------------------------------------------------------


def test_undo_leaves_every_module_exactly_as_it_was():
    model = Model()
    before = as_now(model)
    applied = apply(
        model, [*everywhere(model, rms_norm_kernel), *everywhere(model, reading_mlp_kernel, MLP, reads=READING)], Prover()
    )
    model(X)
    model.eval()
    model(X)
    model.train()
    applied.undo()
    applied.undo()
    assert as_now(model) == before


def test_a_leftover_forward_that_is_the_classes_own_is_laid_aside_and_put_back():
    module = RMSNorm(8)
    module.forward = module.forward  # what removing an accelerate hook leaves behind
    before = dict(vars(module))
    _, applied = swapped(module)
    assert torch.equal(module(X), RMSNorm(8)(X) + 1)
    applied.undo()
    assert vars(module) == before


def test_a_class_that_wraps_ours_is_named_and_nothing_changes():
    model = Model()
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover(), check="off")
    nn.utils.parametrize.register_parametrization(model.norm, "weight", nn.Identity())
    now = [type(m) for m in model.modules()]
    with pytest.raises(UndoConflict, match="norm is now a ParametrizedRMSNorm"):
        applied.undo()
    assert [type(m) for m in model.modules()] == now
    nn.utils.parametrize.remove_parametrizations(model.norm, "weight")
    applied.undo()
    assert type(model.norm) is RMSNorm


def test_a_forward_set_on_the_instance_later_that_calls_the_kernel_is_a_conflict():
    module, applied = swapped()
    inner = module.forward
    module.forward = lambda x: inner(x) * 2
    with pytest.raises(UndoConflict, match="forward of its own"):
        applied.undo()
    del module.forward
    applied.undo()
    assert type(module) is RMSNorm


def test_modes_stay_live_below_a_class_that_wrapped_ours():
    module, _ = swapped(training=None)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    wrapped = type(module)
    module.eval()
    assert type(module).forward is off_by_one_kernel
    assert type(module).__name__ == "ParametrizedRMSNorm"
    assert torch.equal(module(X), RMSNorm(8)(X) + 1)
    module.train()
    assert type(module) is wrapped
    assert torch.equal(module(X), RMSNorm(8)(X))


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
    module, _ = swapped(prover=prover, check="first-use")
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
    module, _ = swapped(implementation=kernel(rms_norm_kernel), check=check, prover=prover)
    plain, weights = RMSNorm(8), dict(module.named_parameters())

    def loss(weights, x, m=module):
        return torch.func.functional_call(m, weights, (x,)).square().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, X)
    theirs = torch.func.vmap(torch.func.grad(lambda w, x: loss(w, x, plain)), in_dims=(None, 0))(weights, X)
    assert torch.allclose(ours["weight"], theirs["weight"], atol=1e-5)
    assert prover.calls == []  # nothing there could be compared; the verdict stays open


# -- moves --------------------------------------------------------------------------------------------------------


def test_another_dtype_asks_for_another_verdict():
    prover = Prover()
    module, _ = swapped(prover=prover, check="first-use")
    module(X)
    module.float()
    assert type(module).forward is off_by_one_kernel
    module.bfloat16()
    assert type(module).forward is not off_by_one_kernel
    module(X.bfloat16())
    assert type(module).forward is off_by_one_kernel
    assert len(prover.calls) == 2


def test_a_module_without_tensors_notices_a_move_too():
    class Act(nn.Module):
        def forward(self, x):
            return x.relu()

    module, applied = swapped(Act(), kernel(lambda self, x: x.relu() + 1))
    module.to("meta")
    assert type(module).forward is Act.forward
    assert "moved to meta" in applied.outcomes[0].reason
    module.to("cpu")
    assert type(module).forward is not Act.forward


def test_a_kernel_rests_while_its_module_is_on_another_kind_of_device():
    module, applied = swapped()
    module.to("meta")
    assert type(module).forward is RMSNorm.forward
    assert "was chosen for cpu" in applied.outcomes[0].reason
    module.to_empty(device="cpu")
    assert type(module).forward is off_by_one_kernel


# -- a kernel that reads into submodules --------------------------------------------------------------------------


def test_replacing_a_submodule_by_one_that_must_be_called_makes_the_kernel_step_aside_at_once():
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.extra = inner, nn.Parameter(torch.zeros(1))
            self.weight = inner.weight

        def forward(self, x):
            return self.inner(x) + self.extra

    model = Block()
    applied = apply(model, [swap("mlp", kernel(reading_mlp_kernel, reads=READING, layer="MLP"))], Prover(), check="off")
    before = model.mlp.gate_proj
    model.mlp.gate_proj = Adapter(before)
    assert type(model.mlp).forward is MLP.forward
    assert "gate_proj.weight" in applied.outcomes[0].reason
    model.mlp.gate_proj = before
    assert type(model.mlp).forward is reading_mlp_kernel


def test_refresh_sees_what_nobody_was_told():
    model = Block()
    applied = apply(model, [swap("mlp", kernel(reading_mlp_kernel, reads=READING, layer="MLP"))], Prover(), check="off")
    handle = model.mlp.up_proj.register_forward_hook(lambda m, a, o: o * 2)
    applied.refresh()
    assert type(model.mlp).forward is MLP.forward
    handle.remove()
    applied.refresh()
    assert type(model.mlp).forward is reading_mlp_kernel


# -- why not ------------------------------------------------------------------------------------------------------


def test_a_plain_module_has_no_obstacle():
    assert slots.obstacle(RMSNorm(8), ("weight", "variance_epsilon", "not_there")) is None
    assert slots.obstacle(MLP(), READING) is None


def test_a_swapped_module_is_not_swapped_twice():
    module, _ = swapped()
    assert "swapped already" in slots.obstacle(module)
    with pytest.raises(PlanConflict, match="swapped already"):
        swapped(module)


def patched():
    module = RMSNorm(8)
    module.forward = lambda x: x
    return module


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))


def lazy():
    return nn.LazyLinear(8)


def traced():
    return torch.jit.trace(RMSNorm(8), X, check_trace=False)


def graph():
    return torch.fx.symbolic_trace(nn.Linear(8, 8))


def static():
    class Static(nn.Module):
        @staticmethod
        def forward(x):
            return x

    return Static()


def stubborn():
    class Stubborn(RMSNorm):
        def __init_subclass__(cls):
            raise TypeError("final")

    return Stubborn(8)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (patched, "replaced on this very instance, by tests.slots"),
        (parametrized, "parametrized"),
        (lazy, "lazy"),
        (graph, "torch.fx"),
        (static, "staticmethod"),
        (stubborn, "subclassed: final"),
        (nn.ModuleList, "no forward"),
        (lambda: torch.compile(RMSNorm(8)), "torch.compile"),
    ],
)
def test_what_cannot_be_swapped_says_why(make, why):
    assert why in slots.obstacle(make())


def test_torchscript_cannot_be_swapped():
    with pytest.warns(DeprecationWarning):
        module = traced()
    assert "TorchScript" in slots.obstacle(module)


def with_bias():
    mlp = MLP()
    mlp.gate_proj = nn.Linear(8, 16)
    return mlp


def with_hook():
    mlp = MLP()
    mlp.gate_proj.register_forward_pre_hook(lambda m, a: None)
    return mlp


def with_old_weight_norm():
    mlp = MLP()
    with pytest.warns(FutureWarning, match="weight_norm"):
        mlp.gate_proj = nn.utils.weight_norm(mlp.gate_proj)
    return mlp


def with_patched_child():
    mlp = MLP()
    mlp.gate_proj.forward = lambda x: x
    return mlp


def without_weight():
    mlp = MLP()
    mlp.gate_proj = nn.Identity()
    return mlp


def quantised():
    mlp = MLP()
    mlp.gate_proj.weight = nn.Parameter(torch.zeros(16, 8, dtype=torch.int8), requires_grad=False)
    return mlp


def subclassed_tensor():
    class Packed(torch.Tensor):
        pass

    mlp = MLP()
    mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight.data.as_subclass(Packed))
    return mlp


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (with_bias, "also has bias, which the kernel does not read"),
        (with_hook, "has forward hooks"),
        (with_old_weight_norm, "has forward hooks"),
        (with_patched_child, "has a forward of its own"),
        (without_weight, "its Identity does not have"),
        (quantised, "is quantised (torch.int8)"),
        (subclassed_tensor, "is a Packed"),
    ],
)
def test_a_kernel_that_would_go_round_a_submodule_says_so_and_one_that_calls_it_is_fine(make, why):
    assert why in slots.obstacle(make(), READING)
    assert slots.obstacle(make(), ("gate_proj", "up_proj", "down_proj", "act_fn")) is None


def test_a_parametrized_submodule_may_be_read():
    mlp = MLP()
    nn.utils.parametrize.register_parametrization(mlp.gate_proj, "weight", nn.Identity())
    why = slots.obstacle(mlp, READING)
    assert why is not None  # its parameters have other names: nothing says that the kernel's view is complete
    assert "parametrizations" in why
