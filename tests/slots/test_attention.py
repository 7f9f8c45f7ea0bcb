"""Attention as something that a swap switches: by the model's own setting, proved at the first real calls, given back exactly."""

import copy
import dataclasses
import gc
import io
import pickle

import pytest
import torch
from tests.small import qwen3
from tests.swapping import frozen

from kernelswap.api import Swapper
from kernelswap.errors import Required
from kernelswap.slots import attention, attention_calls
from kernelswap.slots import attention_masks as masks
from kernelswap.types import Kept, Swap

transformers = pytest.importorskip("transformers")
IDS = torch.arange(2, 14).reshape(2, 6)


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(offline=True, cache=tmp_path_factory.mktemp("cache"), table=())


@pytest.fixture
def model():
    return qwen3(initializer_range=0.3)


def registered():
    functions, masks = attention._registries()
    return set(functions.valid_keys()), set(masks.valid_keys())


def the(applied):
    (outcome,) = [o for o in applied.outcomes if o.site.layer == "attention"]
    return outcome


def test_the_models_setting_is_switched_and_given_back_and_so_are_the_registries(model, swapper):
    gc.collect()
    before, names = frozen(model), registered()
    setting = model.config._attn_implementation
    settings = dict(vars(model.config))
    with swapper.swap(model, attention=True) as applied:
        assert model.config._attn_implementation.startswith("kernelswap/attention")
        assert model.model.layers[0].self_attn.config is model.config
        assert isinstance(the(applied), Swap)
        model(IDS)
    assert model.config._attn_implementation is setting
    assert vars(model.config) == settings
    assert frozen(model) == before
    assert registered() == names


@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens_are_the_same_and_the_kernel_is_proved_on_a_prompt_and_on_one_token(model, swapper, cache):
    more = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = [model.generate(IDS, **more), model.generate(IDS, attention_mask=mask, **more)]
    applied = swapper.swap(model, attention=True)
    assert the(applied).inference.verdict.reason == "to be proved on its first real calls"
    with applied.counting():
        assert torch.equal(model.generate(IDS, **more), expected[0])
        assert torch.equal(model.generate(IDS, attention_mask=mask, **more), expected[1])
    assert applied.calls[""] == 2 * 8 * 2
    verdict = the(applied).inference.verdict
    assert verdict.accepted
    assert verdict.error_kernel is not None, verdict
    assert applied.refusals == ()
    line = next(line for line in applied.explain().splitlines() if " attention " in line)
    assert "sdpa_attention_forward" in line
    assert "kernelswap/attention:flash_attn_forward" in line
    assert "as accurate as the original" in line
    applied.undo()


def test_gradients_are_those_of_the_original_and_are_proved(model, swapper):
    model.train()

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    with swapper.swap(model, attention=True) as applied:
        found = gradients()
        assert the(applied).training.verdict.reason.startswith("as accurate as the original")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


class Wrong:
    """The kernel, and then some. Only `when` says so."""

    def __init__(self, kernel, when):
        self.kernel, self.when = kernel, when

    def __call__(self, module, query, *args, **kwargs):
        out, weights = self.kernel(module, query, *args, **kwargs)
        return (out * 1.01 if self.when(query) else out), weights


@pytest.mark.parametrize("name", ["prompt", "one token", "raises"])
def test_a_kernel_that_differs_is_refused_and_the_original_answers(model, swapper, monkeypatch, name):
    expected = model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation="static")
    provide = type(swapper).provide

    def wrong(self, text, *args, **kwargs):
        found = provide(self, text, *args, **kwargs)
        when = {"prompt": lambda q: q.shape[2] > 1, "one token": lambda q: q.shape[2] == 1, "raises": lambda q: q.nothing}
        return dataclasses.replace(found, forward=Wrong(found.forward, when[name]))

    monkeypatch.setattr(type(swapper), "provide", wrong)
    fresh = Swapper(offline=True, cache=swapper.store.cache / name, table=())
    applied = fresh.swap(model, attention=True)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False, cache_implementation="static"), expected)
    ((site, reason),) = applied.refusals
    assert site.layer == "attention"
    assert ("raises" if name == "raises" else "differs in output") in reason
    assert reason in applied.explain(long=True)
    applied.undo()
    assert model.config._attn_implementation == "sdpa"


def test_a_required_kernel_that_differs_is_an_error_at_the_call_that_finds_it(model, swapper, monkeypatch):
    expected = model(IDS).logits
    found = swapper.provide(attention.SPEC, "cpu")
    wrong = dataclasses.replace(found, forward=Wrong(found.forward, lambda q: q.shape[2] > 1))
    monkeypatch.setattr(type(swapper), "provide", lambda *_, **__: wrong)
    fresh = Swapper(offline=True, cache=swapper.store.cache / "required", table=())
    with fresh.swap(model, attention=True, require="attention"):
        with pytest.raises(Required, match=r"(?s)attention.* was refused at this call: differs in output"):
            model(IDS)
        assert torch.equal(model(IDS).logits, expected)


def test_compiled_code_holds_the_kernel_once_it_is_proved(model, swapper):
    with torch.no_grad():
        expected = model(IDS).logits
        applied = swapper.swap(model, attention=True)
        model(IDS)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS).logits, expected)
    applied.undo()


def test_a_copy_is_as_switched_as_its_source_and_outlives_it(model, swapper):
    gc.collect()
    names = registered()
    expected = model(IDS).logits
    applied = swapper.swap(model, attention=True)
    twin = copy.deepcopy(model)
    applied.undo()
    assert twin.config._attn_implementation.startswith("kernelswap/attention")
    torch.testing.assert_close(twin(IDS).logits, expected)
    swapper.unkernelize(twin)
    assert twin.config._attn_implementation == "sdpa"
    gc.collect()
    assert registered() == names


def test_what_is_saved_names_the_original(model, swapper, tmp_path):
    expected = model(IDS).logits
    applied = swapper.swap(model, attention=True)
    file = io.BytesIO()
    torch.save(model, file)
    model.save_pretrained(tmp_path / "saved")
    name = str(model.config._attn_implementation)
    assert name not in (tmp_path / "saved" / "config.json").read_text()
    applied.undo()
    for loaded in (torch.load(io.BytesIO(file.getvalue()), weights_only=False), pickle.loads(pickle.dumps(model))):
        assert loaded.config._attn_implementation == "sdpa"
        assert torch.equal(loaded(IDS).logits, expected)


def test_it_can_be_required(model, swapper):
    swapper.swap(model, attention=True, require=["attention"]).undo()
    model.set_attn_implementation("eager")
    with pytest.raises(Required, match="'eager'"):
        swapper.swap(model, attention=True, require=["attention"])
    assert model.config._attn_implementation == "eager"


def test_what_is_no_model_of_transformers_says_so_and_nothing_else_happens(swapper):
    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = frozen(plain)
    applied = swapper.swap(plain, attention=True)
    (outcome,) = applied.outcomes
    assert isinstance(outcome, Kept)
    assert outcome.reason == "it is no model of Transformers, whose setting says what computes attention"
    assert frozen(plain) == before


def test_the_user_has_the_last_word(model, swapper):
    applied = swapper.swap(model, attention=True)
    model.set_attn_implementation("eager")
    applied.undo()
    assert model.config._attn_implementation == "eager"


def test_a_second_swap_starts_from_the_original(model, swapper):
    swapper.swap(model, attention=True)
    applied = swapper.swap(model, attention=True)
    assert isinstance(the(applied), Swap)
    applied = swapper.swap(model)
    assert model.config._attn_implementation == "sdpa"
    applied.undo()


def test_without_a_check_nothing_is_compared(model, swapper):
    expected = model(IDS).logits
    with swapper.swap(model, attention=True, check="off") as applied:
        torch.testing.assert_close(model(IDS).logits, expected)
        assert the(applied).inference.verdict.reason == "to be proved on its first real calls"


def test_parts_with_configurations_of_their_own_have_outcomes_of_their_own(swapper):
    torch.manual_seed(0)
    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=16
    )
    model = transformers.CLIPModel(config).eval()
    pixels = torch.randn(1, 3, 8, 8)
    expected = model(input_ids=IDS, pixel_values=pixels).logits_per_image
    applied = swapper.swap(model, attention=True)
    assert {o.site.path for o in applied.outcomes} >= {"", "text_model", "vision_model"}
    torch.testing.assert_close(model(input_ids=IDS, pixel_values=pixels).logits_per_image, expected)
    assert applied.refusals == ()
    applied.undo()
    assert {c._attn_implementation for c in (config, config.text_config, config.vision_config)} == {"sdpa"}


def test_a_long_prompt_is_proved_on_a_part_of_it(swapper, monkeypatch):
    monkeypatch.setattr(attention_calls, "SMALL", 64)
    monkeypatch.setattr(attention_calls, "ROWS", 3)
    model = qwen3(initializer_range=0.3)
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation="static")
    with swapper.swap(model, attention=True) as applied:
        found = model.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation="static")
        assert torch.equal(found, expected)
        assert the(applied).inference.verdict.accepted
        assert applied.refusals == ()


def test_a_padding_mask_goes_to_the_kernel_for_one_token_as_it_is(model, swapper, monkeypatch):
    """On a GPU in half precision; here the form is asked for, and read by what serves on a CPU."""
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1] * 6])
    more = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static", "attention_mask": mask}
    expected = model.generate(IDS, **more)
    seen = []
    monkeypatch.setattr(masks, "_reads_packed", lambda *_: True)
    original = masks.packed
    monkeypatch.setattr(masks, "packed", lambda *a: seen.append(original(*a)) or seen[-1])
    with swapper.swap(model, attention=True) as applied:
        assert torch.equal(model.generate(IDS, **more), expected)
        assert applied.refusals == ()
    assert len(seen) == 5
    assert seen[0][:, 0, 0].tolist() == [[7, *mask[0].tolist(), 1, 0, 0, 0, 0], [7, *mask[1].tolist(), 1, 0, 0, 0, 0]]


def test_lengths_written_out_are_transformers_own_mask():
    from transformers.masking_utils import sdpa_mask

    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1] * 7])
    offset = torch.tensor(6)
    key = torch.empty(2, 1, 12, 4)
    found = attention_calls.written_out(masks.packed(torch, offset, mask, 12), key)
    theirs = sdpa_mask(
        batch_size=2, q_length=1, kv_length=12, q_offset=offset, attention_mask=mask.bool(), allow_is_causal_skip=False
    )
    assert torch.equal(found, theirs)
