"""What serves each site, in each mode, or the one reason why the original stays."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from tests import swapping
from tests.swapping import CPU, Mlp, Near, RMSNorm, frozen

from kernelswap import sites
from kernelswap.api import Swapper
from kernelswap.errors import ModeError, Refused, Required, Tampered, Unreachable
from kernelswap.plan import NotAsked, Wish, plan
from kernelswap.required import require
from kernelswap.types import Device, Kept, Machine, Mode, Row, Swap, Use


@pytest.fixture
def root(make_repo):
    return swapping.repository(make_repo)


@pytest.fixture
def provide(root, tmp_path):
    return Swapper(cache=tmp_path / "cache", machine=CPU, offline=True, verifiers=()).provide


@pytest.fixture
def planned(root, provide):
    """`planned(model, rows)` plans with the kernels of `root`."""

    def run(model, rows=None, *, prover=None, machine=CPU, give=None, only=None, verdicts=None, **wish):
        rows = swapping.rows(root) if rows is None else rows
        found = sites.find(model, rows, only=only)
        return plan(model, found, give or provide, prover or Near(), machine=machine, wish=Wish(**wish), verdicts=verdicts)

    return run


def one(*uses, probe="rows"):
    return (Row("RMSNorm", targets=("RMSNorm",), probe=probe, use=tuple(uses)),)


def layer(choice):
    return choice.implementation.layer if choice.implementation else None


# -- the ordinary case ----------------------------------------------------------------------------------------------


def test_every_site_has_one_outcome_in_order_and_nothing_is_written(planned):
    model = swapping.model()
    before = frozen(model)
    outcomes = planned(model)
    assert [o.site.path for o in outcomes if isinstance(o, Swap)] == [
        "0.norm",
        "0.mlp",
        "1.norm",
        "1.mlp",
        "2.norm",
        "2.mlp",
        "3",
    ]
    assert frozen(model) == before


def test_both_modes_are_served_and_say_by_what(planned):
    (outcome,) = planned(RMSNorm(8))
    assert (layer(outcome.inference), layer(outcome.training)) == ("RMSNorm", "RMSNorm")
    assert outcome.inference.verdict.accepted


def test_the_candidate_that_computes_the_same_is_taken_whatever_the_class_is_called(planned):
    class GemmaRMSNorm(RMSNorm):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    (outcome,) = planned(GemmaRMSNorm(8))
    assert layer(outcome.inference) == "RMSNormZeroCentered"
    assert [why for _, why in outcome.inference.passed] == ["differs from the original on random tensors"]


def test_the_kernel_takes_the_arguments_by_the_names_of_the_original(planned):
    (outcome,) = planned(RMSNorm(8))  # its forward(x); the kernel's is forward(hidden_states)
    module, x = RMSNorm(8), torch.randn(2, 8)
    assert torch.allclose(outcome.inference.implementation.forward(module, x=x), module(x), atol=1e-6)


def test_equal_modules_are_proved_once_in_each_mode(planned):
    prover = Near()
    planned(swapping.model(layers=5), prover=prover)
    assert len(prover.asked) == 2 * 2  # norm and MLP, inference and training


def test_what_was_proved_for_a_model_is_not_proved_again(planned):
    model, prover, verdicts = swapping.model(layers=2), Near(), {}
    planned(model, prover=prover, verdicts=verdicts)
    asked = len(prover.asked)
    planned(model, prover=prover, verdicts=verdicts)
    assert len(prover.asked) == asked > 0


@pytest.mark.parametrize("change", ["eps", "width", "dtype", "activation"])
def test_modules_that_may_compute_differently_are_proved_apart(planned, change):
    one_, other = {
        "eps": (RMSNorm(8), RMSNorm(8, eps=1e-2)),
        "width": (RMSNorm(8), RMSNorm(4)),
        "dtype": (RMSNorm(8), RMSNorm(8).double()),
        "activation": (Mlp(8, nn.GELU()), Mlp(8, nn.GELU(approximate="tanh"))),
    }[change]
    prover = Near()
    planned(nn.ModuleList([one_, other]), prover=prover)
    assert {path for path, *_ in prover.asked} == {"0", "1"}


def test_an_activation_that_its_mlp_no_longer_calls_is_not_missing(planned):
    model = swapping.model(layers=1)
    at = {o.site.path: o for o in planned(model)}
    assert at["0.mlp.act_fn"] == Kept(at["0.mlp.act_fn"].site, "inside mlp, which is swapped")


def test_an_activation_whose_mlp_stays_is_served_itself(planned):
    at = {o.site.path: o for o in planned(swapping.model(layers=1), only=["SiLU", "RMSNorm"])}
    assert isinstance(at["0.mlp.act_fn"], Swap)
    assert at["0.mlp"].reason.startswith("skipped by you")


def test_an_activation_whose_mlp_is_swapped_in_one_mode_only_is_served_in_the_other(planned, root):
    inference = replace(swapping.rows(root)[2], use=(Use(f"dir://{root}:SwiGLUMLP", modes=(Mode.INFERENCE,)),))
    rows = (inference, swapping.rows(root)[4])
    for path, model in (("", Mlp(8, nn.SiLU())), ("0", nn.ModuleList([Mlp(8, nn.SiLU())]))):
        at = {o.site.path: o for o in planned(model, rows)}
        assert layer(at[path].training) is None
        assert isinstance(at[f"{path}.act_fn".lstrip(".")], Swap)


def test_a_mode_that_was_not_asked_for_does_not_count_for_what_is_inside(planned):
    assert planned(Mlp(8, nn.SiLU()), mode=Mode.INFERENCE)[1].reason == "inside SwiGLUMLP, which is swapped"


def test_a_lone_mlp_hides_its_activation_too(planned):
    assert planned(Mlp(8, nn.SiLU()))[1].reason == "inside SwiGLUMLP, which is swapped"


# -- modes ----------------------------------------------------------------------------------------------------------


def test_a_kernel_without_backward_serves_inference_and_training_keeps_the_original(planned, root):
    (outcome,) = planned(RMSNorm(8), one(Use(f"dir://{root}:InferenceOnly")))
    assert layer(outcome.inference) == "InferenceOnly"
    assert outcome.training.passed == ((f"dir://{root}:InferenceOnly", "has no backward"),)


def test_inference_alone_leaves_training_alone(planned):
    (outcome,) = planned(RMSNorm(8), mode=Mode.INFERENCE)
    assert layer(outcome.inference) == "RMSNorm"
    assert outcome.training.implementation is None


def test_training_serves_inference_with_the_same_kernel(planned, root):
    both = one(Use(f"dir://{root}:InferenceOnly"), Use(f"dir://{root}:RMSNorm"))
    (outcome,) = planned(RMSNorm(8), both, mode=Mode.TRAINING)
    assert (layer(outcome.inference), layer(outcome.training)) == ("RMSNorm", "RMSNorm")
    (outcome,) = planned(RMSNorm(8), both)
    assert (layer(outcome.inference), layer(outcome.training)) == ("InferenceOnly", "RMSNorm")


def test_asking_for_compilation_passes_over_what_does_not_compile(planned, root):
    rows = one(Use(f"dir://{root}:NotCompilable"), Use(f"dir://{root}:RMSNorm"))
    (outcome,) = planned(RMSNorm(8), rows, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
    assert layer(outcome.training) == "RMSNorm"
    assert outcome.training.passed[0][1] == "is not torch.compile friendly"


def test_registered_modes_come_in_the_order_of_the_field(planned, root):
    fallback = Use(f"dir://{root}:RMSNorm", modes=(Mode.FALLBACK,))
    inference = Use(f"dir://{root}:NotCompilable", modes=(Mode.INFERENCE,))
    (outcome,) = planned(RMSNorm(8), one(fallback, inference))
    assert (layer(outcome.inference), layer(outcome.training)) == ("NotCompilable", "RMSNorm")
    assert "is registered for INFERENCE only" in dict(outcome.training.passed).values()


def test_a_mode_that_means_nothing_is_refused(planned):
    with pytest.raises(ModeError):
        planned(RMSNorm(8), mode=Mode.FALLBACK)


# -- one reason each --------------------------------------------------------------------------------------------------


def reason(outcome):
    assert isinstance(outcome, Kept)
    return outcome.reason


def test_a_kernel_for_another_device_is_no_reason_when_another_was_tried(planned, root):
    rows = one(Use("dir:///nowhere:RMSNorm", on=("cuda",)), Use(f"dir://{root}:Wrong"))
    (outcome,) = planned(RMSNorm(8), rows)
    assert reason(outcome) == f"dir://{root}:Wrong differs from the original on random tensors"
    assert [spec for spec, _ in outcome.passed] == ["dir:///nowhere:RMSNorm", f"dir://{root}:Wrong"]


@pytest.mark.parametrize(
    ("uses", "expected"),
    [
        ((), "no kernel in the table serves RMSNorm"),
        ((Use("org/a@1:X", on=("cuda",)), Use("org/b@1:X", on=("mps",))), "no kernel in the table is for cpu"),
        ((Use("dir:///nowhere:RMSNorm"),), "dir:///nowhere:RMSNorm: there is no directory /nowhere"),
        ((Use("dir://{root}:TwoArguments"),), "TwoArguments: takes (hidden_states, gate) where the original takes (x)"),
        ((Use("dir://{root}:apply_rotary_pos_emb"),), "apply_rotary_pos_emb is a function, this is a module"),
        ((Use("dir://{root}:RMSnorm"),), "RMSnorm: it has no layer RMSnorm"),
    ],
)
def test_the_reason_names_what_stood_in_the_way(planned, root, uses, expected):
    uses = [replace(use, spec=use.spec.replace("{root}", str(root))) for use in uses]
    assert expected in reason(planned(RMSNorm(8), one(*uses))[0])


def test_a_row_that_is_off_says_that_it_was_asked_for(planned):
    assert reason(planned(RMSNorm(8), (Row("RMSNorm", targets=("RMSNorm",), off=True),))[0]) == "left alone: you asked for it"


def test_a_module_that_is_not_loaded_yet_says_so(planned):
    assert "meta device" in reason(planned(RMSNorm(8).to("meta"))[0])


def test_what_stands_in_one_modules_way_does_not_concern_its_twins(planned):
    model = nn.ModuleList([RMSNorm(8), RMSNorm(8), RMSNorm(8)])
    model[1].forward = lambda x: x
    kinds = [type(o) for o in planned(model)]
    assert kinds == [Swap, Kept, Swap]
    assert "replaced on this very instance" in reason(planned(model)[1])


def test_a_hook_that_a_kernel_would_go_round_concerns_the_one_module_that_has_it(planned, root):
    row = replace(swapping.rows(root)[2], use=(Use(f"dir://{root}:ReadsInside"),))
    model = nn.ModuleList([Mlp(8, nn.SiLU()) for _ in range(3)])
    model[1].up_proj.register_forward_hook(lambda *_: None)
    outcomes = planned(model, (row,))
    assert [type(o) for o in outcomes] == [Swap, Kept, Swap]
    assert "up_proj" in reason(outcomes[1])


def test_each_module_is_decided_on_its_own_device(planned, root):
    machine = replace(CPU, backend="cuda", devices=tuple(Device("cuda", i, "", (9, 0), "sm90") for i in range(2)))
    rows = one(Use("dir:///nowhere:RMSNorm", on=("cuda",)), Use(f"dir://{root}:RMSNorm", on=("cpu",)))
    model = nn.ModuleList([RMSNorm(8), RMSNorm(8)])
    asked = []
    found = sites.find(model, rows)
    found = (found[0], replace(found[1], device="cuda:1"))

    def give(spec, device, kind):
        asked.append((spec, device))
        raise Unreachable("no answer")

    first, second = plan(model, found, give, Near(), machine=machine)
    assert asked == [(f"dir://{root}:RMSNorm", "cpu"), ("dir:///nowhere:RMSNorm", "cuda:1")]
    assert (reason(first), reason(second)) == (f"dir://{root}:RMSNorm: no answer", "dir:///nowhere:RMSNorm: no answer")


# -- failures -------------------------------------------------------------------------------------------------------


def failing(error):
    asked = []

    def give(spec, device, kind):
        asked.append(spec)
        raise error

    give.asked = asked
    return give


def test_an_unreachable_source_is_asked_once_for_all_layers(planned):
    give = failing(Unreachable("the hub did not answer"))
    outcomes = planned(swapping.model(layers=4), give=give)
    assert len(give.asked) == len(set(give.asked))
    assert {reason(o).partition(": ")[2] for o in outcomes if o.site.layer == "RMSNorm"} == {"the hub did not answer"}


def test_tampered_bytes_always_raise(planned):
    with pytest.raises(Tampered):
        planned(RMSNorm(8), give=failing(Tampered("bytes differ")))


def test_a_refused_kernel_of_the_table_is_a_reason_and_one_that_was_named_raises(planned):
    rows = one(Use("org/kernel@1:RMSNorm"))
    give = failing(Refused("nobody vouches for org"))
    assert reason(planned(RMSNorm(8), rows, give=give)[0]) == "org/kernel@1:RMSNorm: nobody vouches for org"
    with pytest.raises(Refused):
        planned(RMSNorm(8), rows, give=give, named={"org/kernel@1:RMSNorm"})


def test_a_kernel_that_nobody_asked_to_fetch_is_the_weakest_reason(planned, root):
    rows = one(Use("org/kernel@1:RMSNorm"))
    give = failing(NotAsked("is on the hub, and nothing is fetched unless you ask: hub=True"))
    assert "hub=True" in reason(planned(RMSNorm(8), rows, give=give)[0])


def test_what_the_user_prefers_is_tried_first(planned, root):
    rows = one(Use(f"dir://{root}:RMSNorm"))
    for glob in ("RMSNorm", "1"):
        outcomes = planned(nn.ModuleList([nn.Identity(), RMSNorm(8)]), rows, prefer={glob: (f"dir://{root}:InferenceOnly",)})
        assert (layer(outcomes[0].inference), layer(outcomes[0].training)) == ("InferenceOnly", "RMSNorm")


def test_without_a_recipe_the_proof_waits_for_the_first_real_call(planned, root):
    prover = Near()
    (outcome,) = planned(RMSNorm(8), one(Use(f"dir://{root}:RMSNorm"), probe=""), prover=prover)
    assert prover.asked == []
    assert "first real call" in outcome.inference.verdict.reason


# -- require --------------------------------------------------------------------------------------------------------


def test_require_lists_every_reason_and_passes_what_is_swapped(planned):
    model = nn.ModuleList([RMSNorm(8), RMSNorm(8)])
    require(planned(model), ["RMSNorm"])
    model[1].forward = lambda x: x
    with pytest.raises(Required) as e:
        require(planned(model), ["RMSNorm", "LayerNorm"])
    assert "RMSNorm: 1 of 2 stay as they are (1" in e.value.found
    assert "LayerNorm: this model has no such site" in e.value.found


def test_require_asks_about_the_mode_that_a_site_is_in(planned, root):
    rows, norm = one(Use(f"dir://{root}:InferenceOnly")), RMSNorm(8)
    require(planned(norm.eval(), rows), ["RMSNorm"])
    with pytest.raises(Required, match=r"in training, which it is in: dir://.*:InferenceOnly: has no backward"):
        require(planned(norm.train(), rows), ["RMSNorm"])


def test_require_attention_is_about_what_the_model_is_set_to():
    model = nn.Module()
    with pytest.raises(Required, match=r"attention: this model has no such site"):
        require((), ["attention"], model)
    model.config = SimpleNamespace(_attn_implementation="sdpa")
    with pytest.raises(Required, match=r"attention: is computed by 'sdpa', which is no kernel"):
        require((), ["attention"], model)
    model.config._attn_implementation = "kernelswap/attention"
    require((), ["attention"], model)


def test_a_plan_on_another_machine_is_the_same_plan(planned):
    other = Machine(os="darwin", cpu="aarch64", torch=(2, 14))
    assert planned(RMSNorm(8), machine=other)[0].inference.implementation is not None


def test_a_kernel_that_raises_when_it_is_looked_at_keeps_the_original_with_that_reason(planned, caplog):
    class Rude(Near):
        def equivalent(self, site, module, original, candidate, run):
            raise ZeroDivisionError("by design")

    (outcome,) = planned(RMSNorm(8), prover=Rude())
    assert "raised ZeroDivisionError while it was looked at: by design" in reason(outcome)
    assert "by design" in caplog.text
