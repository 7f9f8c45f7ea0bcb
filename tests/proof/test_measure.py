"""Measured times: interleaved, fresh inputs, and noise that is called noise."""

import pytest
import torch

from kernelswap.proof import measure
from kernelswap.proof.measure import compare


def spin(n):
    def work(x):
        for _ in range(n):
            x = x + 1
        return x

    return work


def make():
    return (torch.randn(64, 64),)


def test_twice_the_work_takes_longer_and_the_ratio_says_which_way():
    found = compare(spin(60), spin(10), make, seconds=0.2)
    assert found.ratio > 2
    assert found.median_a > found.median_b > 0
    assert found.faster
    assert not compare(spin(10), spin(60), make, seconds=0.2).faster


def test_the_same_function_is_not_faster_than_itself():
    same = spin(20)
    assert not compare(same, same, make, seconds=0.3).faster


def test_runs_take_turns_and_inputs_rotate():
    calls = []

    def note(name):
        return lambda x: calls.append((name, x.data_ptr()))

    compare(note("a"), note("b"), make, seconds=0.0)
    assert {name for name, _ in calls} == {"a", "b"}
    assert len({pointer for name, pointer in calls if name == "a"}) == measure.INPUTS
    places = {name: [i for i, (n, _) in enumerate(calls[6:]) if n == name] for name in "ab"}
    assert len(places["a"]) == len(places["b"])
    early, late = (sum(places[name]) / len(places[name]) for name in "ab")
    assert abs(early - late) < 1e-3 * len(calls), "a machine that grows slower while measuring favours neither"


def test_short_calls_are_repeated_within_a_run_until_the_clock_can_see_them():
    found = compare(lambda x: x, lambda x: x, make, seconds=0.05)
    assert found.median_a < 1e-5
    assert found.runs >= measure.LEAST


def test_gradients_are_left_as_the_caller_set_them():
    seen = set()

    def look(x):
        seen.add(torch.is_grad_enabled())

    with torch.no_grad():
        compare(look, look, make, seconds=0.0)
    assert seen == {False}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures a GPU")
def test_the_device_clock_and_a_cold_cache():
    def made():  # 16 MB in and out: fits the L2, and takes longer than a launch
        return torch.randn(4 << 20, device="cuda"), torch.empty(4 << 20, device="cuda")

    def once(x, y):
        torch.neg(x, out=y)

    def twice(x, y):
        torch.neg(x, out=y)
        torch.neg(x, out=y)

    warm, cold = (compare(twice, once, made, seconds=0.3, device="cuda", cold=c, inputs=1) for c in (False, True))
    assert 1.5 < warm.ratio < 2.5
    assert 1.1 < cold.ratio < 2.2  # the second pass finds what the first left
    assert cold.median_b > warm.median_b
