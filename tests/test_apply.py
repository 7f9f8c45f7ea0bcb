"""A plan is written whole or not at all, and can be taken back."""

import gc
import json
import time
import weakref

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
)

from kernelswap.apply import apply
from kernelswap.errors import KernelSwapError, PlanConflict, UndoConflict
from kernelswap.types import Kept

X = torch.linspace(-1, 1, 24).reshape(3, 8)
ONE = kernel(off_by_one_kernel)


class Failing:
    """A forward that cannot be put on a class: the swap of it raises in the middle of apply."""

    def __get__(self, module, cls):
        return self

    def __set_name__(self, cls, name):
        raise RuntimeError("cannot be installed")


def test_when_the_last_swap_fails_the_others_are_undone():
    model = Model()
    before = as_now(model)
    broken = swap("norm", kernel(Failing()))
    with pytest.raises(RuntimeError, match=r"cannot be installed|__set_name__"):
        apply(model, [*everywhere(model, off_by_one_kernel)[:-1], broken], Prover())
    assert as_now(model) == before


@pytest.mark.parametrize(
    ("plan", "error", "why"),
    [
        ([swap("norm", ONE), swap("norm", ONE)], PlanConflict, "two swaps claim norm"),
        ([swap("norm", ONE), swap("layers.7.norm1", ONE)], KernelSwapError, "no module layers.7.norm1"),
        ([swap("norm", ONE), swap("norm.weight", ONE)], KernelSwapError, "no module norm.weight"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan, error, why):
    model = Model()
    before = as_now(model)
    with pytest.raises(error, match=why):
        apply(model, plan, Prover())
    assert as_now(model) == before


def test_two_paths_to_one_module_are_a_conflict():
    model = Model()
    model.again = model.norm
    with pytest.raises(PlanConflict, match="one module"):
        apply(model, [swap("norm", ONE), swap("again", ONE)], Prover())
    assert type(model.norm) is RMSNorm


def test_a_second_swap_of_a_swapped_module_is_a_conflict_and_the_first_stays():
    model = Model()
    apply(model, [swap("norm", ONE)], Prover(), check="off")
    with pytest.raises(PlanConflict, match="norm is swapped already"):
        apply(model, everywhere(model, rms_norm_kernel), Prover())
    assert type(model.norm).forward is off_by_one_kernel
    assert type(model.layers[0].norm1) is RMSNorm


def test_two_applied_on_one_model_undo_in_any_order():
    model = Model().eval()
    plain, before = model(X), as_now(model)
    first = apply(model, [swap("norm", ONE)], Prover())
    second = apply(model, [swap("layers.0.norm1", ONE)], Prover())
    first.undo()
    assert not torch.equal(model(X), plain)
    second.undo()
    assert as_now(model) == before


def test_as_a_context_manager_it_undoes_also_when_the_body_raises():
    model = Model()
    before = as_now(model)
    failure = RuntimeError("in the body")
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover())
    assert repr(applied) == "<Applied: 5 of 5 sites swapped>"
    with pytest.raises(RuntimeError, match="in the body"), applied:
        raise failure
    assert as_now(model) == before


def test_one_conflict_keeps_every_swap_and_names_each():
    model = Model()
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover())
    for name in ("layers.0.norm1", "norm"):
        torch.nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", torch.nn.Identity())
    with pytest.raises(UndoConflict) as caught:
        applied.undo()
    assert "layers.0.norm1 is now a ParametrizedRMSNorm" in str(caught.value)
    assert "\nnorm is now a ParametrizedRMSNorm" in str(caught.value)
    assert type(model.layers[1].norm1) is not RMSNorm


def test_a_module_that_left_the_model_is_freed_and_one_that_is_kept_is_restored():
    model = Model()
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover())
    kept, gone = model.layers[1], weakref.ref(model.layers[0])
    del model.layers
    gc.collect()
    assert gone() is None
    applied.undo()
    assert type(kept.norm1) is RMSNorm
    assert type(model.norm) is RMSNorm


def test_an_applied_does_not_keep_its_model_alive():
    model = Model()
    applied = apply(model, everywhere(model, off_by_one_kernel), Prover())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    applied.undo()
    assert "5 of 5 swapped" in applied.explain()


def test_classes_are_freed_with_the_last_module():
    class Own(RMSNorm):
        pass

    def one():
        module = Own(8)
        apply(module, [swap("", ONE)], Prover())
        module(X)
        return weakref.ref(type(module))

    cls = one()
    gc.collect()
    assert cls() is None
    assert Own.__subclasses__() == []


def test_the_report_is_plain_json_and_says_what_the_outcomes_say():
    model = Model().eval()
    kept = Kept(swap("layers.0.mlp", ONE).site, "left alone: you asked for it")
    applied = apply(model, [*everywhere(model, off_by_one_kernel), kept], Prover("differs"))
    with torch.no_grad(), applied.counting():
        model(X)
    report = json.loads(json.dumps(applied.report))
    assert (report["swapped"], report["kept"]) == (5, 1)
    assert {r["path"] for r in report["refusals"]} == {s.path for s, _ in applied.refusals}
    assert report["calls"] == dict.fromkeys(report["calls"], 0)
    assert sum(report["calls_of_original"].values()) == 5
    assert "left alone: you asked for it" in applied.explain()
    assert "differs" in applied.explain(long=True)


def test_a_kernel_that_steps_aside_is_told_in_the_outcomes():
    model = Model()
    applied = apply(model, everywhere(model, reading_mlp_kernel, MLP, reads=READING, layer="MLP"), Prover())
    model.layers[0].mlp.gate_proj = torch.nn.Linear(8, 16)
    assert isinstance(applied.outcomes[0], Kept)
    assert "also has bias" in applied.outcomes[0].reason


def test_two_hundred_swaps_are_installed_in_under_five_milliseconds_of_cpu():
    model = Model(layers=100)
    plan = everywhere(model, rms_norm_kernel)
    assert len(plan) == 201
    took = []
    for _ in range(30):
        start = time.process_time()
        applied = apply(model, plan, Prover())
        took.append(time.process_time() - start)
        applied.undo()
    assert min(took) < 0.005, f"{min(took) * 1e3:.1f} ms"
