"""Two sides, measured fairly."""

import sys
import time

import pytest
import torch
from tests.small import qwen3
from torch import nn

from kernelswap.bench import ab, subject


def test_a_twin_shares_every_tensor_and_no_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    twin = ab.twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert not {id(m) for m in model.modules()} & {id(m) for m in twin.modules()}


def test_sides_take_turns_and_the_order_alternates():
    seen = []
    ab.interleave(
        lambda: (seen.append("a"), time.sleep(0.001)), lambda: (seen.append("b"), time.sleep(0.001)), seconds=0, least=4
    )
    assert "".join(seen[-8:]) in {"abbaabba", "baabbaab"}


def test_a_side_that_takes_twice_as_long_is_slower():
    def once():
        torch.randn(64, 64) @ torch.ones(64, 64)

    def twice():
        once()
        once()

    torch.set_num_threads(1)
    pair = ab.interleave(once, twice, seconds=0.2)
    assert pair.slower
    assert not pair.faster
    assert 0.3 < pair.speedup < 0.8


def test_a_side_against_itself_is_neither_slower_nor_faster():
    def side():
        torch.randn(64, 64) @ torch.ones(64, 64)

    torch.set_num_threads(1)
    pair = ab.interleave(side, side, seconds=0.3)
    assert not (pair.slower and pair.faster)
    assert pair.low <= 1.0 <= pair.high or abs(pair.speedup - 1) < 0.1


def test_prefill_and_decode_are_apart_and_a_decode_step_continues_the_prompt():
    about = tiny()
    calls = []
    about.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((kwargs["input_ids"].shape[1], kwargs.get("past_key_values"))), with_kwargs=True
    )
    found = ab.whole(about, about.model, about.model, seconds=0, steps=3)
    assert set(found) == {"prefill", "decode"}
    assert found["decode"].original.runs == 3 * found["prefill"].original.runs
    assert {n for n, _ in calls} == {about.tokens, 1}
    longest = max(cache.get_seq_length() for n, cache in calls if n == 1)
    assert longest == about.tokens + 3


def test_the_error_is_that_of_the_worst_row():
    reference = torch.ones(3, 4, dtype=torch.float64)
    output = reference.clone()
    output[1, 0] += 0.02
    assert ab.distance(output, reference) == pytest.approx(0.01)


def test_a_small_row_does_not_hide_behind_a_large_one():
    reference = torch.tensor([[1e6, 1e6], [1e-6, 1e-6]], dtype=torch.float64)
    output = torch.tensor([[1e6, 1e6], [1e-6, 0.0]], dtype=torch.float64)
    assert ab.distance(output, reference) == pytest.approx(2**-0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets its high-water mark")
def test_peak_memory_is_what_the_run_needed_beyond_before():
    def run():
        a = torch.ones(16 << 20)  # 64 MiB
        return a.sum()

    assert 60 << 20 < ab.peak(run) < 80 << 20


def tiny():
    model = qwen3()
    ids = torch.arange(12)[None]
    return subject.Subject("tiny", model, "causal", {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
