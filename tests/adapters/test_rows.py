"""What Transformers' integration of kernels lacked, row by row: each has a test that is named after it."""

import pathlib
import re
from dataclasses import replace

import pytest
import torch
from tests import swapping
from tests.adapters.world import close, logits, plain, serving
from tests.swapping import CPU, Near, RMSNorm
from torch import nn

from kernelswap import sites
from kernelswap.errors import NoVariant
from kernelswap.plan import plan
from kernelswap.types import Device, Row, Use

ROWS = [f"{letter}{n}" for letter, last in (("a", 17), ("c", 9), ("d", 9)) for n in range(1, last + 1)]
"""Of the guide against the code (a), of the layer system (c), of Transformers beyond the guide (d)."""
FOLDERS = ("adapters", "guide")
LIGER = "kernels-community/liger-kernels:LigerRMSNorm"


def named_after():
    tests = pathlib.Path(__file__).parents[1]
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (tests / folder).glob("test_*.py")):
        for name in re.findall(r"^def test_((?:[acd]\d+_)+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            for row in name.strip("_").split("_"):
                found.setdefault(row, []).append(path.name)
    return found


def test_every_row_has_a_test_of_its_name():
    assert sorted(set(ROWS) ^ set(named_after())) == []


def test_c4_two_different_cards_get_two_decisions(make_repo, tmp_path, make_swapper):
    """Capabilities are those of the device that the module is on, not of the first or the current one."""
    root = swapping.repository(make_repo)
    devices = (Device("cuda", 0, "", (9, 0), "sm90"), Device("cuda", 1, "", (8, 0), "sm80"))
    machine = replace(CPU, backend="cuda", devices=devices)
    uses = (Use(f"dir://{root}:RMSNorm", on=("cuda:sm90",)), Use(f"dir://{root}:InferenceOnly", on=("cuda:sm80",)))
    rows = (Row("RMSNorm", targets=("RMSNorm",), probe="rows", use=uses),)
    model = nn.ModuleList([RMSNorm(8) for _ in range(4)])
    found = [replace(site, device=f"cuda:{i % 2}") for i, site in enumerate(sites.find(model, rows))]
    swapper = make_swapper()

    def provide(text, device, kind):
        return swapper.provide(text, "cpu", kind)

    outcomes = plan(model, tuple(found), provide, Near(), machine=machine)
    assert [o.inference.implementation.layer for o in outcomes] == ["RMSNorm", "InferenceOnly"] * 2


def test_c4_a_build_is_chosen_for_the_card_that_it_is_loaded_for(make_repo, make_swapper):
    devices = (Device("cuda", 0, "", (9, 0), "sm90"), Device("cuda", 1, "", (8, 0), "sm80"))
    machine = replace(CPU, backend="cuda", devices=devices)
    backend = {"backend": {"type": "cuda", "archs": ["9.0"]}}
    root = make_repo("hopper", {"torch-cuda": {"code": "from . import layers", "files": {"layers.py": ""}, "metadata": backend}})
    swapper = make_swapper(machine=machine)
    assert swapper.find(f"dir://{root}", device="cuda:0").chosen.variant == "torch-cuda"
    with pytest.raises(NoVariant) as e:
        swapper.kernel(f"dir://{root}", device="cuda:1")
    assert "9.0" in str(e.value)


class _Gated(nn.Module):
    """Also a `RMSNorm` by its decoration; another signature."""

    kernel_layer_name = "RMSNorm"

    def __init__(self, like):
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon

    def forward(self, hidden_states, gate=None):
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(hidden_states.dtype) * (1 if gate is None else gate)


@pytest.mark.parametrize("place", ["model.layers.0.input_layernorm", "model.norm"])
def test_c5_each_class_is_held_against_the_kernel_not_only_the_first(qwen, installed, place):
    """The first target of the layer or the last one: the one whose forward takes more stays, the others are swapped."""
    model = qwen()
    parent, _, name = place.rpartition(".")
    setattr(model.get_submodule(parent), name, _Gated(model.get_submodule(place)))
    model.set_use_kernels(True, {"RMSNorm": LIGER})
    norms = {path: served for path, served in serving(installed, model).items() if "norm" in path}
    assert len(norms) == 8
    assert set(norms.values()) == {LIGER}
    assert place not in norms
    assert "takes (hidden_states) where the original takes (hidden_states, gate=None)" in installed.explain(model)
    close(logits(model), logits(plain()))


def test_c6_a_subclass_with_a_forward_of_its_own_is_not_its_parent(qwen, installed):
    model = qwen()
    norm = model.model.norm
    parent = type(norm)

    decorated = type("Decorated", (parent,), {"kernel_layer_name": "RMSNorm", "forward": parent.forward})
    child = type("Child", (decorated,), {"forward": lambda self, hidden_states: 2 * parent.forward(self, hidden_states)})
    norm.__class__ = child
    expected = logits(model)
    model.use_kernels = True
    assert "model.norm" not in serving(installed, model)
    close(logits(model), expected)
    model.use_kernels = False
    norm.__class__ = decorated
    model.use_kernels = True
    assert serving(installed, model)["model.norm"] == "layers:RMSNorm"


@pytest.mark.parametrize("before", [True, False], ids=["kernels there", "kernels not there"])
def test_d7_a_condition_decides_for_each_module(qwen, installed, monkeypatch, before):
    """Of Transformers' own decorator, whether or not `kernels` was there when it was imported."""
    from kernelswap.adapters.transformers.seams import _decorator

    def theirs(layer_name):  # as Transformers has it with `kernels` there: it takes no condition
        def mark(cls):
            cls.kernel_layer_name = layer_name
            return cls

        return mark

    if before:
        decorator = _decorator(theirs)
    else:
        from transformers.integrations.hub_kernels import use_kernel_forward_from_hub as decorator
    model = qwen()
    norm = type(model.model.norm)

    @decorator("RMSNorm", condition=lambda module: module.weight.numel() == 8)
    class OnlyHeads(norm):
        forward = norm.forward

    for _, module in model.named_modules():
        if type(module) is norm:
            module.__class__ = OnlyHeads
    model.use_kernels = True
    assert sorted({path.rpartition(".")[2] for path in serving(installed, model) if "norm" in path}) == ["k_norm", "q_norm"]
    assert "kernel_condition" in installed.explain(model)
    close(logits(model), logits(plain()))


def test_d7_without_a_condition_the_decorator_is_transformers_own(installed):
    from transformers.integrations import hub_kernels

    class Mine(nn.Module):
        pass

    theirs = hub_kernels.use_kernel_forward_from_hub.__wrapped__
    before = dict(vars(theirs("RMSNorm")(type("Theirs", (nn.Module,), {}))))
    assert hub_kernels.use_kernel_forward_from_hub("RMSNorm")(Mine) is Mine
    assert ("kernel_layer_name" in vars(Mine)) == ("kernel_layer_name" in before)
