"""Fused statements with `choose="measured"`: raced against the statements as the model has them, by the size of the call."""

import pytest
import torch
from tests.cli.conftest import compiled_cache
from tests.ecosystem.test_fusion import written
from tests.fusion import anywhere, make
from torch import nn

import kernelswap as ks
from kernelswap.proof import Check, Verdicts
from kernelswap.types import Kept, Mode, Swap

pytestmark = [pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning"), pytest.mark.usefixtures("one_thread")]

MINE = """
import torch


class Slow(nn.Module):
    has_backward = True

    def forward(self, hidden_states):
        for _ in range(400):
            y = nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        return y


def sums(norm, residual, hidden):
    s = residual + hidden
    return nn.functional.rms_norm(s, norm.weight.shape, norm.weight, norm.variance_epsilon), s


def small(norm, residual, hidden):
    for _ in range(400 if hidden.numel() > 16 * hidden.shape[-1] else 0):
        sums(norm, residual, hidden)
    return sums(norm, residual, hidden)


def slow(norm, residual, hidden):
    for _ in range(50):
        sums(norm, residual, hidden)
    return sums(norm, residual, hidden)


def turned(q_norm, k_norm, q, k, cos, sin):
    def one(norm, x):
        x = nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat((-x[..., half:], x[..., :half]), -1) * sin[:, None]

    return one(q_norm, q), one(k_norm, k)


def projected(q_proj, k_proj, v_proj, hidden):
    return tuple(nn.functional.linear(hidden, one.weight, one.bias) for one in (q_proj, k_proj, v_proj))


def slowly_turned(q_norm, k_norm, q, k, cos, sin):
    for _ in range(50):
        turned(q_norm, k_norm, q, k, cos, sin)
    return turned(q_norm, k_norm, q, k, cos, sin)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    return written(tmp_path_factory.mktemp("repositories") / "mine", MINE)


@pytest.fixture
def swapper(layers_build, tmp_path):
    cache = compiled_cache(tmp_path / "cache", layers_build)
    check = Check(Verdicts(cache / "verdicts", key=tmp_path / "key"), contain="never")
    return ks.Swapper(cache=cache, offline=True, table=anywhere(), prover=check)


def one(outcomes, layer):
    return next(o for o in outcomes if o.site.layer == layer)


class SlowRMSNorm(nn.Module):
    """Takes its time, so that it is no question what is faster."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, hidden_states):
        for _ in range(40):
            y = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(y + self.variance_epsilon))


class Layer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), SlowRMSNorm(width)

    def forward(self, hidden_states):
        residual = hidden_states
        hidden_states = self.linear(hidden_states)
        hidden_states = residual + hidden_states
        residual = hidden_states
        hidden_states = self.norm(hidden_states)
        return residual + hidden_states


def test_a_kernel_for_statements_serves_the_sizes_at_which_it_beats_them(swapper, mine):
    model = nn.Sequential(Layer(), Layer()).eval().requires_grad_(requires_grad=False)
    few, many = torch.randn(1, 3, 32), torch.randn(2, 11, 32)
    plain = [model(few), model(many)]
    wanted = {"table": {"residual_norm": f"dir://{mine}:small"}, "inherit": False, "trust": True, "only": "residual_norm"}
    found = swapper.measure(model, seconds=120, **wanted)
    assert found.left == 0
    entries = found.speeds.entries.values()
    assert {spec.rpartition(":")[2] for entry in entries for spec, _ in entry.candidates} == {"small"}
    applied = swapper.swap(model, choose="measured", mode=Mode.INFERENCE, **wanted)
    by_size = {size: by.rpartition(":")[2] for size, by, _ in one(applied.outcomes, "residual_norm").inference.measured}
    assert by_size["1 row"] == by_size["2-16 rows"] == "small"
    assert not any(by for size, by in by_size.items() if size not in {"1 row", "2-16 rows"})
    for _ in range(2):
        torch.testing.assert_close([model(few), model(many)], plain, atol=2e-5, rtol=2e-4)
    assert applied.refusals == ()
    with applied.counting():
        model(few)
    assert sum(applied.calls.values()) == 2, "3 rows: the kernel's, in both layers"
    with applied.counting():
        model(many)
    assert (sum(applied.calls.values()), sum(applied.calls_of_original.values())) == (0, 2), "22 rows: as the model has them"
    applied.undo()
    assert torch.equal(model(many), plain[1])


def test_statements_whose_kernel_never_wins_are_left_alone_with_the_figures(swapper, mine):
    model = make("qwen3")
    table = {"residual_norm": f"dir://{mine}:slow", "norm_rotary": f"dir://{mine}:slowly_turned"}
    wanted = {"table": table, "inherit": False, "trust": True, "only": ["residual_norm", "norm_rotary"]}
    swapper.measure(model, seconds=120, **wanted)
    outcomes = swapper.plan(model, choose="measured", mode=Mode.INFERENCE, **wanted)
    for layer in table:
        assert isinstance(one(outcomes, layer), Kept)
        assert one(outcomes, layer).reason.startswith("measured, and the original is the fastest")
        assert "x on " in one(outcomes, layer).reason
        assert isinstance(one(swapper.plan(model, **wanted), layer), Swap), "the table knows no better"


def test_what_nobody_measured_of_statements_is_as_the_table_has_it(swapper, mine):
    model = make("qwen3")
    wanted = {"table": {"norm_rotary": f"dir://{mine}:slowly_turned"}, "inherit": False, "trust": True, "only": "norm_rotary"}
    outcome = one(swapper.plan(model, choose="measured", **wanted), "norm_rotary")
    assert isinstance(outcome, Swap)
    assert {times for _, _, times in outcome.inference.measured} == {None}


def test_training_of_statements_is_measured_with_the_gradients_of_their_norms(swapper, mine):
    model = make("qwen3")
    wanted = {
        "table": {"norm_rotary": f"dir://{mine}:turned"},
        "inherit": False,
        "trust": True,
        "only": "norm_rotary",
        "mode": None,
    }
    found = swapper.measure(model, seconds=60, **wanted)
    modes = {entry.run.training for entry in found.speeds.entries.values() if entry.site.layer == "norm_rotary"}
    assert modes == {False, True}
    assert found.measured > 0
    for entry in found.speeds.entries.values():
        for spec, candidate in entry.candidates:
            verdict = found.speeds.known(entry, candidate, 0)
            assert verdict is None or verdict.seconds_kernel is not None, (spec, verdict.reason)


def test_projections_are_measured_where_a_table_names_a_kernel(swapper, mine):
    model = make("llama")
    wanted = {"table": {"projections": f"dir://{mine}:projected"}, "trust": True, "only": "projections"}
    found = swapper.measure(model, seconds=30, **wanted)
    assert found.measured > 0
    assert any(found.speeds.known(e, c, 0).seconds_kernel for e in found.speeds.entries.values() for _, c in e.candidates)


def test_a_norm_that_lost_by_itself_does_not_keep_statements_that_won(swapper, mine):
    model = nn.Sequential(Layer())
    table = {"RMSNorm": f"dir://{mine}:Slow", "residual_norm": f"dir://{mine}:sums"}
    wanted = {"table": table, "inherit": False, "trust": True, "mode": Mode.INFERENCE}
    found = swapper.measure(model, seconds=120, compile=False, **wanted)
    assert found.left == 0
    outcomes = swapper.plan(model, choose="measured", **wanted)
    norm = one(outcomes, "RMSNorm")
    assert isinstance(norm, Kept)
    assert norm.reason.startswith("measured, and the original is the fastest")
    assert isinstance(one(outcomes, "residual_norm"), Swap)
    assert isinstance(one(swapper.plan(model, choose="measured", skip="RMSNorm", **wanted), "residual_norm"), Kept)


def test_the_norms_of_a_model_are_not_written_to_by_measuring(swapper, mine):
    model = make("gemma3_text")
    plain = {name: p.clone() for name, p in model.named_parameters()}
    wanted = {"only": ["residual_norm", "norm_rotary"], "mode": None}
    assert swapper.measure(model, seconds=20, **wanted).measured > 0
    assert all(torch.equal(p, plain[name]) and p.grad is None for name, p in model.named_parameters())
