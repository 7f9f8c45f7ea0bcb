"""What a model was is known well enough to see any change that a swap could leave behind."""

import copy

import pytest
import torch
from torch import nn

from kernelswap.bench import state


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.GELU()))


def test_nothing_is_said_of_a_model_that_was_only_used(model):
    before = state.take(model)
    model(torch.randn(2, 4)).sum().backward()
    model.zero_grad()
    model.state_dict()
    copy.deepcopy(model)
    assert state.differences(before, model) == []


def _class(model):
    model[1].__class__ = type("LayerNorm", (nn.LayerNorm,), {})


def _own_forward(model):
    model[0].forward = lambda x: x


def _hook(model):
    model[2][0].register_forward_hook(lambda *_: None)


def _backward_hook(model):
    model[0].register_full_backward_hook(lambda *_: None)


def _parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _module(model):
    model[2] = nn.Sequential(nn.GELU())


def _more(model):
    model.add_module("more", nn.Identity())


def _buffer(model):
    model[1].register_buffer("seen", torch.zeros(1))


def _mode(model):
    model[0].training = not model[0].training


def _order(model):
    inner = model[0]._parameters
    inner["weight"] = inner.pop("weight")


@pytest.mark.parametrize(
    "change",
    [_class, _own_forward, _hook, _backward_hook, _parameter, _module, _more, _buffer, _mode, _order],
    ids=lambda f: f.__name__,
)
def test_a_change_is_named(model, change):
    before = state.take(model)
    change(model)
    assert state.differences(before, model)


def test_a_function_replaced_in_the_module_s_globals_is_named(tmp_path, monkeypatch):
    (tmp_path / "modeling.py").write_text(
        "from torch import nn\n\ndef turn(x):\n    return -x\n\nclass M(nn.Module):\n    def forward(self, x):\n        return turn(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import modeling

    model = modeling.M()
    before = state.take(model)
    modeling.turn = abs
    assert state.differences(before, model) == ["(the model): its forward finds another turn"]
