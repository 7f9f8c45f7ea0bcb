"""A swap is one subclass; nothing else about the module changes."""

import inspect
import sys

import pytest
import torch
from tests.slots.parts import (
    MLP,
    READING,
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
    swapped,
)
from torch import nn

from kernelswap.apply import apply
from kernelswap.errors import UndoConflict

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
        made = []  # noqa: RUF012  # one list for all, on purpose

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
