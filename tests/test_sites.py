"""Where swaps could go, decided per module."""

import pytest
import torch
import torch.nn as nn
from tests import swapping
from tests.small import qwen3
from tests.swapping import Mlp, RMSNorm

from kernelswap import sites, table
from kernelswap.errors import PlanConflict, TableError
from kernelswap.types import Row

ROWS = table.default()


def found(model, rows=ROWS, **more):
    return {(s.path, s.layer): s for s in sites.find(model, rows, **more)}


def layers(model, rows=ROWS, **more):
    return {(s.path, s.layer) for s in sites.find(model, rows, **more)}


def test_an_undecorated_model_of_nobodys_library_has_sites():
    assert layers(swapping.model(layers=1)) == {
        ("0.norm", "RMSNorm"),
        ("0.mlp", "SwiGLUMLP"),
        ("0.mlp.act_fn", "SiLU"),
        ("1", "RMSNorm"),
    }


def test_a_decorated_class_goes_to_the_row_of_its_layer_whatever_it_is_called():
    class Normaliser(RMSNorm):
        kernel_layer_name = "RMSNormZeroCentered"

    assert layers(Normaliser(4)) == {("", "RMSNormZeroCentered")}


def test_a_subclass_that_overrides_forward_is_not_taken_for_its_parent():
    class Parent(nn.Module):
        kernel_layer_name = "MegaBlocksMoeMLP"

        def forward(self, x):
            return x

    class Child(Parent):
        def forward(self, x):
            return x + 1

    assert layers(Parent()) == {("", "MegaBlocksMoeMLP")}
    assert layers(Child()) == set()


def test_a_false_condition_is_the_reason_that_a_site_is_left_out():
    class Normaliser(RMSNorm):
        kernel_layer_name = "RMSNorm"
        kernel_condition = staticmethod(lambda module: module.weight.numel() > 4)

    assert "kernel_condition" in found(Normaliser(4))["", "RMSNorm"].left_out
    assert found(Normaliser(8))["", "RMSNorm"].left_out == ""


def test_a_subclass_that_only_inherits_forward_is_still_found_by_name():
    class Smooth(nn.SiLU):
        pass

    assert layers(Smooth()) == {("", "SiLU")}


def test_what_a_kernel_would_read_and_is_not_there_is_the_reason():
    class ScalelessRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.eps, self.weight = 1e-6, None

        def forward(self, x):
            return x

    assert "has no weight" in found(ScalelessRMSNorm())["", "RMSNorm"].left_out


def test_an_mlp_is_found_by_its_structure_and_its_activation():
    from transformers.activations import ACT2FN

    assert ("", "SwiGLUMLP") in layers(Mlp(4, ACT2FN["silu"]))
    assert ("", "GeGLUMLP") in layers(Mlp(4, ACT2FN["gelu_pytorch_tanh"]))
    assert ("", "GeGLUMLP") in layers(Mlp(4, nn.GELU()))
    assert layers(Mlp(4, nn.ReLU())) == set()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("silu", "SiLU"),
        ("swish", "SiLU"),
        ("gelu", "GeLU"),
        ("gelu_new", "NewGELU"),
        ("gelu_fast", "FastGELU"),
        ("quick_gelu", "QuickGELU"),
        ("gelu_pytorch_tanh", "GeluTanh"),
    ],
)
def test_activations_of_transformers_are_sites(name, layer):
    from transformers.activations import ACT2FN

    assert layers(ACT2FN[name]) == {("", layer)}


def test_what_a_wrapper_hands_through_from_inside_does_not_make_it_a_site():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

        def forward(self, x):
            return self.inner(x)

    assert {path for path, _ in layers(Wrapper(Mlp(4, nn.SiLU())))} == {"inner", "inner.act_fn"}


def test_a_shared_module_is_one_site_under_its_first_name():
    shared = RMSNorm(4)
    assert layers(nn.ModuleDict({"a": shared, "b": shared})) == {("a", "RMSNorm")}


def test_a_function_that_forward_looks_up_is_a_site():
    model = qwen3()
    functions = [s for s in sites.find(model, ROWS) if s.kind == "function"]
    assert [(s.path, s.name) for s in functions] == [(f"model.layers.{i}.self_attn", "apply_rotary_pos_emb") for i in (0, 1)]
    assert functions[0].target == "transformers.models.qwen3.modeling_qwen3.apply_rotary_pos_emb"


def test_a_decorated_function_is_found_by_its_layer_whatever_it_is_called(monkeypatch):
    import transformers.models.qwen3.modeling_qwen3 as file

    class Turn(nn.Module):
        kernel_layer_name = "rotary_pos_emb"

        def forward(self, *args):
            return args

    row = Row("rotary_pos_emb", "function", ("another_name",))
    monkeypatch.setattr(file, "apply_rotary_pos_emb", Turn())
    assert [s.name for s in sites.find(qwen3(num_hidden_layers=1), (row,))] == ["apply_rotary_pos_emb"]


def test_a_method_of_the_same_name_is_not_a_global():
    class Attention(nn.Module):
        def apply_rotary_pos_emb(self, x):
            return x

        def forward(self, x):
            return self.apply_rotary_pos_emb(x)

    assert layers(Attention()) == set()


# -- two rows for one class -----------------------------------------------------------------------------------------


def test_the_row_that_names_a_class_more_precisely_wins():
    general, precise = Row("General", targets=("*Norm",)), Row("Precise", targets=("*RMSNorm",))
    for rows in ((general, precise), (precise, general)):
        assert layers(RMSNorm(4), rows) == {("", "Precise")}


def test_two_rows_that_name_a_class_equally_are_a_conflict_that_names_both():
    with pytest.raises(PlanConflict, match=r"the model itself .*RMSNorm\) is claimed by A and B"):
        layers(RMSNorm(4), (Row("A", targets=("RMS*",)), Row("B", targets=("*orm",), needs=(("eps",),))))


def test_a_row_whose_needs_are_not_met_claims_nothing():
    rows = Row("A", targets=("RMSNorm",), needs=(("bias",),)), Row("B", targets=("RMSNorm",), needs=(("eps",),))
    assert layers(RMSNorm(4), rows) == {("", "B")}


# -- per module -----------------------------------------------------------------------------------------------------


def test_dtype_and_mode_are_those_of_each_module():
    model = swapping.model(layers=2)
    model[0].norm.bfloat16()
    model[1].train(False)
    at = found(model)
    assert at["0.norm", "RMSNorm"].dtype == "torch.bfloat16"
    assert at["1.norm", "RMSNorm"].dtype == "torch.float32"
    assert at["0.mlp", "SwiGLUMLP"].training
    assert not at["1.mlp", "SwiGLUMLP"].training


def test_a_module_without_tensors_goes_by_what_is_nearest_around_it():
    mlp = Mlp(4, nn.SiLU()).double()
    outer = nn.ModuleDict({"norm": RMSNorm(4), "mlp": mlp})
    assert found(outer)["mlp.act_fn", "SiLU"].dtype == "torch.float64"
    assert found(nn.SiLU())["", "SiLU"].device == "cpu"


def test_the_device_is_each_modules_own():
    model = nn.ModuleList([RMSNorm(4), RMSNorm(4).to("meta")])
    assert [s.device for s in sites.find(model, ROWS)] == ["cpu", "meta"]


def test_under_accelerate_the_device_is_where_the_module_runs():
    accelerate = pytest.importorskip("accelerate")
    model = swapping.model(layers=1)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model[0].norm.weight.device.type == "meta"
    assert {s.device for s in sites.find(model, ROWS)} == {"cpu"}


def test_integers_say_nothing_about_the_dtype():
    norm = RMSNorm(4)
    norm._parameters = {"steps": nn.Parameter(torch.zeros(1, dtype=torch.int64), requires_grad=False), **norm._parameters}
    assert found(norm)["", "RMSNorm"].dtype == "torch.float32"


# -- what the user leaves out -----------------------------------------------------------------------------------------


def left(model, **more):
    return {s.path for s in sites.find(model, ROWS, **more) if not s.left_out}


def test_globs_name_paths_their_ends_and_layers():
    model = nn.ModuleDict({"body": swapping.model(layers=2)})
    assert left(model, only="body.0.*") == {"body.0.norm", "body.0.mlp", "body.0.mlp.act_fn"}
    assert left(model, only="0.*") == left(model, only="body.0.*")
    assert left(model, only="RMSNorm") == {"body.0.norm", "body.1.norm", "body.2"}
    assert left(model, only="RMSNorm", skip=["1.norm"]) == {"body.0.norm", "body.2"}
    assert left(model, only=[]) == set()


def test_what_is_left_out_says_by_which_glob():
    assert found(RMSNorm(4), skip="RMS*")["", "RMSNorm"].left_out == "skipped by you (skip='RMS*')"


def test_a_glob_that_names_nothing_is_an_error_that_lists_what_there_is():
    with pytest.raises(TableError, match=r"skip='layer.0' names nothing(.|\n)*RMSNorm, SiLU, SwiGLUMLP"):
        layers(swapping.model(), skip="layer.0")


def test_what_is_not_a_module_is_a_type_error():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, found a str"):
        layers("model")
