"""Every faulty kernel is refused, for what is wrong with it; no correct one is, however it rounds."""

from dataclasses import replace

import pytest
import torch
from tests.proof.zoo import FLOATS, ORIGINALS, RIGHT, WRONG, Specimen, implementation, prove, site

from kernelswap.proof import Check
from kernelswap.types import Run

SAYS = {  # what the reason must name, where "differs in output" is not the point
    "accumulates_in_sixteen_bits": ("common factor", "differs in output"),
    "no_gradient_for_the_weight": ("no gradient of weight",),
    "only_in_backward": ("gradient of hidden_states",),
    "weight_gradient_of_the_last_block": ("gradient of weight",),
    "writes_into_the_gradient_it_is_given": ("changes the gradient of output 0 in place",),
    "takes_the_gradient_for_contiguous": ("differs in the gradient",),
    "inverse_rotation_in_backward": ("gradient of q",),
    "only_under_compile": ("under torch.compile",),
    "hides_nan": ("hides a NaN",),
    "nan_on_zeros": ("NaN where the original has a number",),
    "changes_its_input": ("changes its input hidden_states",),
    "changes_its_weight": ("changes the module's weight",),
    "returns_its_input": ("in place", "memory of its input"),
    "returns_a_stale_buffer": ("same memory from two calls", "result of an earlier call"),
    "returns_a_stale_gradient": ("same memory from two calls",),
    "leaks": ("leaks memory",),
    "raises_when_there_is_much": ("raises RuntimeError: CUDA error",),
    "raises_on_nothing": ("raises ZeroDivisionError", "no rows"),
    "wrong_dtype": ("the dtype torch.float32",),
    "wrong_layout": ("not contiguous",),
    "draws_random_numbers": ("draws random numbers",),
    "returns_a_tuple": ("returns",),
    "rotates_in_place": ("changes its input q",),
    "leaves_the_tail_unwritten": ("NaN where", "differs in output"),
    "exponential_overflows_in_backward": ("NaN where the original has a number",),
    "adds_to_memory_that_it_did_not_clear": ("NaN where",),
    "computes_in_float16": ("NaN where", "infinite where", "hides", "differs in output"),
    "flushes_small_numbers": ("from minute to enormous",),
    "hides_infinities": ("hides a NaN",),
    "keeps_the_weight_of_its_first_call": ("goes on with the weight of an earlier call",),
    "keeps_packed_weights": ("goes on with the gate_proj.weight of an earlier call",),
    "only_in_another_thread": ("only in another thread",),
    "beyond_sixteen_bits_of_rows": ("differs in output", "only in a call of 65541 rows"),
    "beyond_sixteen_bits_of_rows_in_backward": ("the gradient of input 0", "only in a call of 65541 rows"),
    "takes_every_address_for_aligned": ("at an odd address",),
    "takes_expanded_for_dense": ("expanded",),
    "turns_gradients_off": ("changes torch's grad mode",),
    "changes_the_precision_of_products": ("changes torch's float32 matmul precision",),
    "changes_the_default_dtype": ("changes torch's default dtype",),
    "no_gradient_at_all": ("gives no gradient of hidden_states",),
    "gradient_of_a_frozen_layers_input": ("gradient of hidden_states",),
    "nan_far_below_zero": ("NaN where",),
}


def draws(specimens: list[Specimen]):
    return [pytest.param(s, d, id=f"{s.name}-{str(d).removeprefix('torch.')}") for s in specimens for d in s.dtypes]


@pytest.mark.parametrize(("specimen", "dtype"), draws(WRONG))
def test_a_wrong_kernel_is_refused_and_the_reason_says_what_is_wrong(specimen, dtype):
    verdict = prove(Check(None), specimen, dtype, 128)
    assert not verdict.accepted
    expected = SAYS.get(specimen.name, ("differs in",))
    assert any(text in verdict.reason for text in expected), verdict.reason


def test_what_a_kernel_changed_of_torch_is_put_back():
    before = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.is_grad_enabled()
    for specimen in WRONG:
        if "changes torch's" in SAYS.get(specimen.name, ("",))[0]:
            assert not prove(Check(None), specimen, torch.float32, 64).accepted
    after = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.is_grad_enabled()
    assert after == before


@pytest.mark.parametrize(("specimen", "dtype"), draws(RIGHT))
def test_a_right_kernel_is_accepted_however_it_rounds(specimen, dtype):
    for training in {False, specimen.training}:
        for width in (64, 130):
            verdict = prove(Check(None), replace(specimen, training=training), dtype, width)
            assert verdict.accepted, verdict.reason


@pytest.mark.parametrize("name", sorted(ORIGINALS))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_original_stands_in_for_itself(name, dtype):
    original = ORIGINALS[name]

    def itself():
        return original.function or type(original.make(64)).forward

    for training in (False, True):
        verdict = prove(Check(None), Specimen("itself", name, itself, training=training), dtype, 64)
        assert verdict.accepted, verdict.reason
        assert dict(verdict.details)["reference"] == "float64"
        assert verdict.error_kernel == pytest.approx(verdict.error_original, rel=0.5)
        assert verdict.error_original < 40 * torch.finfo(dtype).eps


def test_an_output_in_the_memory_of_a_weight_is_refused():
    class Row(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(64))

        def forward(self, x):
            return self.weight.expand(*x.shape[:-1], 64).clone()

    module = Row()
    kernel = implementation(lambda self, x: self.weight.detach().repeat(*x.shape[:-1], 1))
    assert Check(None).equivalent(site(module, "rows"), module, Row.forward, kernel, Run()).accepted
    lazy = implementation(lambda self, x: self.weight.detach().expand(*x.shape[:-1], 64))
    single = implementation(
        lambda self, x: self.weight.view(1, 1, 64) if x.numel() == 64 else self.weight.repeat(*x.shape[:-1], 1)
    )
    for candidate in (lazy, single):
        verdict = Check(None).equivalent(site(module, "rows"), module, Row.forward, candidate, Run())
        assert "not contiguous" in verdict.reason or "memory of its input or of the module" in verdict.reason, verdict.reason
