"""Why a module cannot be swapped, and when a kernel that reads into submodules steps aside."""

import pytest
import torch
from tests.slots.parts import (
    CALLING,
    MLP,
    READING,
    Block,
    Prover,
    RMSNorm,
    kernel,
    reading_mlp_kernel,
    swap,
    swapped,
)
from torch import nn

from kernelswap.apply import apply
from kernelswap.errors import PlanConflict
from kernelswap.slots import module as slots

X = torch.linspace(-1, 1, 24).reshape(3, 8)


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


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_cannot_be_swapped():
    assert "TorchScript" in slots.obstacle(traced())


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
    assert slots.obstacle(make(), CALLING) is None


@pytest.mark.parametrize("make", [with_hook, with_old_weight_norm, with_patched_child, quantised, subclassed_tensor])
@pytest.mark.parametrize("reads", [("gate_proj", "up_proj()"), ("*",)])
def test_a_kernel_whose_reading_cannot_be_followed_counts_as_reading_everything(make, reads):
    assert "the kernel reads gate_proj instead of calling gate_proj" in slots.obstacle(make(), reads)
    assert slots.obstacle(MLP(), reads) is None


def test_a_kernel_that_may_read_anything_is_watched_for_every_child():
    model = Block()
    apply(model, [swap("mlp", kernel(reading_mlp_kernel, reads=("*",), layer="MLP"))], Prover(), check="off")
    model.mlp.up_proj = with_hook().gate_proj
    assert type(model.mlp).forward is MLP.forward
    model.mlp.up_proj = nn.Linear(8, 16, bias=False)
    assert type(model.mlp).forward is reading_mlp_kernel


def test_attributes_that_are_no_modules_are_read_freely():
    mlp = MLP()
    mlp.config = type("Config", (), {"act": "silu"})()
    assert slots.obstacle(mlp, ("config.act", "gate_proj.in_features", *CALLING)) is None
    assert "down_proj.none.weight, which is not there" in slots.obstacle(mlp, ("down_proj.none.weight",))


def test_a_parametrized_submodule_is_not_read():
    mlp = MLP()
    nn.utils.parametrize.register_parametrization(mlp.gate_proj, "weight", nn.Identity())
    why = slots.obstacle(mlp, READING)
    assert why is not None  # its parameters have other names: nothing says that the kernel's view is complete
    assert "parametrizations" in why


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
