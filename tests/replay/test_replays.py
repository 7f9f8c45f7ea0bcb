"""Decode steps are recorded once and replayed inside an unmodified generate(). Real models; a recorder that works on any device."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from packaging.version import Version
from tests.cli.conftest import compiled_cache
from tests.replay.rerun import Rerun, recorded
from tests.small import qwen3
from tests.swapping import frozen

from kernelswap.api import Swapper
from kernelswap.replay import replays as module
from kernelswap.types import Kept

transformers = pytest.importorskip("transformers")
STATIC = {"cache_implementation": "static", "do_sample": False}


@pytest.fixture(scope="module")
def swapper(layers_build, tmp_path_factory):
    """With kernels compiled already: those that the other tests of this process load."""
    return Swapper(cache=compiled_cache(tmp_path_factory.mktemp("cache"), layers_build), offline=True)


@pytest.fixture
def model():
    return qwen3(initializer_range=0.3)


@pytest.fixture
def recorder():
    return Rerun()


def prompt(batch=2, length=6):
    return torch.arange(2, 2 + batch * length).reshape(batch, length) % 60


def generated(model, ids=None, tokens=10, **more):
    ids = prompt() if ids is None else ids
    return model.generate(ids, max_new_tokens=tokens, **{**STATIC, **more})


needs_lengths = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.13"),
    reason="before 5.13 the caller says the position, and layers keep no length",
)


def facts(applied):
    return applied.report["graphs"]


# -- the same tokens ------------------------------------------------------------------------------------------------


def by_index(k, v, k_cache, v_cache, at):
    """What the kernel that writes a token into the cache does."""
    k_cache.index_copy_(2, at.reshape(1), k)
    v_cache.index_copy_(2, at.reshape(1), v)
    return True


@needs_lengths
@pytest.mark.parametrize("batch", [1, 4])
def test_a_kernel_writes_the_token_and_all_lengths_grow_together(model, recorder, swapper, batch):
    expected, written = generated(model, prompt(batch)), []

    def append(k, *rest):
        written.append(k.shape)
        return by_index(k, *rest)

    applied = recorded(model, recorder, swapper, append=append)
    for _ in range(2):
        assert torch.equal(generated(model, prompt(batch)), expected)
    assert facts(applied)["replayed"] == (9 - 2) + 9
    assert len(set(written)) == 1
    assert applied.refusals == ()
    assert recorder.recordings == 1


@needs_lengths
def test_where_that_kernel_does_not_serve_the_cache_writes_by_itself(model, recorder, swapper):
    expected = generated(model)
    recorded(model, recorder, swapper, append=lambda *_: False)
    assert torch.equal(generated(model), expected)
    assert recorder.recordings == 1


@needs_lengths
def test_a_kernel_that_writes_something_else_is_found_by_the_first_replay(model, recorder, swapper):
    expected = generated(model)
    applied = recorded(model, recorder, swapper, append=lambda k, v, *rest: by_index(k * 1.5, v, *rest))
    assert torch.equal(generated(model), expected)
    assert facts(applied)["replayed"] == 0
    assert any("a replay differs" in why for why in facts(applied)["refused"])


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_tokens_are_those_of_the_model_without_and_one_recording_serves_all_calls(model, recorder, swapper, batch):
    others = prompt(batch, 5)
    expected = [generated(model, prompt(batch)), generated(model, others, 9)]
    applied = recorded(model, recorder, swapper)
    assert torch.equal(generated(model, prompt(batch)), expected[0])
    assert recorder.recordings == 1
    assert torch.equal(generated(model, others, 9), expected[1]), "shorter: in a cache of the former length"
    assert torch.equal(generated(model, prompt(batch)), expected[0])
    assert recorder.recordings == 1
    assert facts(applied)["replayed"] == (9 - 2) + 8 + 9


def test_prompts_padded_on_the_left(model, recorder, swapper):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected = generated(model, attention_mask=mask)
    assert not torch.equal(expected, generated(model))
    recorded(model, recorder, swapper)
    assert torch.equal(generated(model, attention_mask=mask), expected)
    assert torch.equal(generated(model, attention_mask=mask), expected)
    assert recorder.recordings == 1


def test_what_was_prepared_for_another_prompt_does_not_shine_through(model, recorder, swapper):
    expected = generated(model)
    recorded(model, recorder, swapper)
    generated(model, prompt() + 31)
    assert torch.equal(generated(model), expected)
    assert recorder.recordings == 1


def test_scores_are_kept_by_the_caller(model, recorder, swapper):
    more = {"output_logits": True, "return_dict_in_generate": True}
    expected = generated(model, **more)
    recorded(model, recorder, swapper)
    for _ in range(2):
        found = generated(model, **more)
        for mine, theirs in zip(found.logits, expected.logits, strict=True):
            torch.testing.assert_close(mine, theirs)


def steps(model, cache, tokens, **more):
    """One token after the other, as a loop of one's own would."""
    with torch.no_grad():
        return [model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True, **more) for i in range(tokens.shape[1])]


def filled(model, ids):
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    return cache


def test_a_loop_of_ones_own_gets_outputs_that_no_later_step_touches(model, recorder, swapper):
    tokens = prompt(2, 8)
    expected = [out.logits for out in steps(model, filled(model, prompt()), tokens)]
    applied = recorded(model, recorder, swapper)
    cache = filled(model, prompt())
    found = steps(model, cache, tokens)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.logits, theirs)
        assert mine.past_key_values is cache
    assert facts(applied)["replayed"] == 6
    assert len({out.logits.data_ptr() for out in found}) == len(found)


def test_tuples_come_back_as_tuples(model, recorder, swapper):
    expected = [out[0] for out in steps(model, filled(model, prompt()), prompt(2, 4), return_dict=False)]
    recorded(model, recorder, swapper)
    found = steps(model, filled(model, prompt()), prompt(2, 4), return_dict=False)
    assert all(isinstance(out, tuple) for out in found)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine[0], theirs)


def test_inference_mode(model, recorder, swapper):
    expected = generated(model)
    recorded(model, recorder, swapper)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(generated(model), expected)


def test_two_caches_that_live_have_two_recordings(model, recorder, swapper):
    tokens = prompt(2, 6)
    expected = [out.logits for out in steps(model, filled(model, prompt()), tokens)]
    recorded(model, recorder, swapper)
    caches = [filled(model, prompt()) for _ in range(2)]
    for i in range(tokens.shape[1]):
        for cache in caches:
            (found,) = steps(model, cache, tokens[:, i : i + 1])
            torch.testing.assert_close(found.logits, expected[i])
    assert recorder.recordings == 2


def test_beam_search_reorders_the_cache_and_is_left_to_the_model(model, recorder, swapper):
    expected = generated(model, num_beams=3)
    applied = recorded(model, recorder, swapper)
    assert torch.equal(generated(model, num_beams=3), expected)
    assert "as in a beam search" in next(iter(facts(applied)["not_replayed"]))
    assert torch.equal(generated(model, num_beams=3), expected)


# -- when something changes -------------------------------------------------------------------------------------------


def changes():
    def in_place(model):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(-1.5)

    def replaced(model):
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach() * -1.5)

    def pointed_elsewhere(model):
        weight = model.model.layers[0].mlp.up_proj.weight
        weight.data = weight.detach() * -1.5

    def another_module(model):
        up = model.model.layers[0].mlp.up_proj
        model.model.layers[0].mlp.up_proj = torch.nn.Linear(up.in_features, up.out_features, bias=False).eval()

    def a_layer_less(model):
        del model.model.layers[1]
        model.config.num_hidden_layers = 1

    return {f.__name__: f for f in (in_place, replaced, pointed_elsewhere, another_module, a_layer_less)}


@pytest.mark.parametrize("name", changes())
def test_a_change_of_weights_or_modules_is_in_the_next_token(model, recorder, swapper, name):
    before = generated(model)
    applied = recorded(model, recorder, swapper)
    generated(model)
    torch.manual_seed(1)
    changes()[name](model)
    plain = copy.deepcopy(model)
    swapper.unkernelize(plain)
    expected = generated(plain)
    assert not torch.equal(expected, before), "the change can be seen"
    for _ in range(2):
        assert torch.equal(generated(model), expected)
    assert recorder.recordings == (1 if name == "in_place" else 2)
    assert bool(facts(applied)["renewed"]) is (name != "in_place")


def test_a_lora_adapter_is_noticed_and_so_is_that_it_is_switched_off(model, recorder, swapper):
    peft = pytest.importorskip("peft")
    before = generated(model)
    recorded(model, recorder, swapper)
    generated(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    plain = copy.deepcopy(adapted)
    swapper.unkernelize(plain.base_model.model)
    expected = generated(plain)
    assert not torch.equal(expected, before)
    for _ in range(2):
        assert torch.equal(generated(adapted), expected)
        with adapted.disable_adapter():
            assert torch.equal(generated(adapted), before)
    assert recorder.recordings > 1


def test_training_mode_is_the_models_own(model, recorder, swapper):
    applied = recorded(model, recorder, swapper)
    generated(model)
    model.train()
    assert type(model).forward is transformers.Qwen3ForCausalLM.forward
    model(prompt(), labels=prompt()).loss.backward()
    model.eval()
    replayed = facts(applied)["replayed"]
    generated(model)
    assert facts(applied)["replayed"] > replayed


def test_hooks_are_run_at_every_step(model, recorder, swapper):
    applied = recorded(model, recorder, swapper)
    generated(model)
    seen = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    generated(model)
    assert len(seen) == 10
    assert any("has forward hooks" in why for why in facts(applied)["not_replayed"])
    handle.remove()
    generated(model)
    replayed = facts(applied)["replayed"]
    generated(model)
    assert facts(applied)["replayed"] == replayed + 9
    assert len(seen) == 10


def test_counting_counts_every_call(model, recorder, swapper):
    applied = recorded(model, recorder, swapper)
    generated(model)
    with applied.counting():
        generated(model)
    assert applied.calls.get("model.norm") == 10, applied.explain()


def test_a_configuration_that_changes(model, recorder, swapper):
    recorded(model, recorder, swapper)
    generated(model)
    model.set_attn_implementation("eager")
    generated(model)
    assert recorder.recordings == 2


# -- what cannot be recorded ------------------------------------------------------------------------------------------


def test_a_step_that_cannot_be_recorded_runs_as_ever(model, recorder, swapper):
    expected = generated(model)
    recorder.fail = RuntimeError("operation not permitted when stream is capturing")
    applied = recorded(model, recorder, swapper)
    for _ in range(2):
        assert torch.equal(generated(model), expected)
    (why,) = facts(applied)["refused"]
    assert why == "it cannot be recorded: RuntimeError: operation not permitted when stream is capturing"
    assert why in applied.explain()


def test_a_replay_that_differs_is_refused_and_the_cache_is_as_it_was(model, recorder, swapper):
    expected = generated(model)
    recorder.wrong = 0.5
    applied = recorded(model, recorder, swapper)
    assert torch.equal(generated(model), expected)
    assert facts(applied)["replayed"] == 0
    assert "a replay differs from the step itself: the output: " in next(iter(facts(applied)["refused"]))


def test_other_caches_have_their_reason(model, recorder, swapper):
    applied = recorded(model, recorder, swapper)
    generated(model, cache_implementation=None)
    assert recorder.recordings == 0
    (why,) = facts(applied)["not_replayed"]
    assert why == "the cache is a DynamicCache; generate(..., cache_implementation='static') makes one whose steps can be"


def test_a_sliding_window_is_left_to_the_model(recorder, swapper):
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    expected = generated(model)
    applied = recorded(model, recorder, swapper)
    assert torch.equal(generated(model), expected)
    assert "StaticSlidingWindowLayer" in next(iter(facts(applied)["not_replayed"]))


def test_masks_that_grow_do_not_fill_the_memory(model, recorder, swapper, monkeypatch):
    monkeypatch.setattr(module, "KINDS", 3)
    applied = recorded(model, recorder, swapper)
    cache = filled(model, prompt())
    for i in range(8):
        steps(model, cache, prompt(2, 1), attention_mask=torch.ones(2, 7 + i))
    assert len(module.of(model, None).kinds) == 3
    assert recorder.recordings == 0
    applied.undo()


def test_recordings_are_bounded(model, recorder, swapper, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    plain = copy.deepcopy(model)
    applied = recorded(model, recorder, swapper)
    for batch in (1, 2, 3, 1):
        expected = generated(plain, prompt(batch))
        assert torch.equal(generated(model, prompt(batch)), expected)
    assert facts(applied)["held"] == 2
    assert recorder.recordings == facts(applied)["recorded"] == 4, "the first had to go"


def test_checking_every_call_leaves_nothing_to_replay(model, recorder, swapper):
    (whole, *_) = (applied := recorded(model, recorder, swapper)).outcomes
    applied.undo()
    from kernelswap.apply import apply

    with apply(model, (whole, *swapper.plan(model, build="wait")), swapper.prover, check="always") as applied:
        generated(model)
        assert facts(applied)["replayed"] == 0, applied.explain()
        assert any("is checked again and again" in why for why in facts(applied)["not_replayed"])


# -- the swap ---------------------------------------------------------------------------------------------------------


def test_undo_leaves_nothing(model, recorder, swapper):
    generated(model)  # it keeps the length of its cache
    before = frozen(model)
    applied = recorded(model, recorder, swapper)
    generated(model)
    held = weakref.ref(module.of(model, None).kinds.popitem()[1].recordings[0].buffers.tensors[0])
    module.of(model, None).kinds.clear()
    applied.undo()
    assert frozen(model) == before
    assert type(model) is transformers.Qwen3ForCausalLM
    gc.collect()
    assert held() is None
    assert id(model) not in module._REPLAYS


def test_recordings_go_with_their_model(recorder, swapper):
    model = qwen3(initializer_range=0.3)
    recorded(model, recorder, swapper)
    generated(model)
    key, gone = id(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert key not in module._REPLAYS


def test_a_copy_records_for_itself(model, recorder, swapper):
    expected = generated(model)
    applied = recorded(model, recorder, swapper)
    generated(model)
    twin = copy.deepcopy(model)
    assert torch.equal(generated(twin), expected)
    assert recorder.recordings == 2
    applied.undo()
    assert torch.equal(generated(twin), expected)
    assert type(swapper.unkernelize(twin)) is transformers.Qwen3ForCausalLM


def test_a_pickle_is_the_plain_model(model, recorder, swapper):
    expected = generated(model)
    recorded(model, recorder, swapper)
    generated(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is transformers.Qwen3ForCausalLM
    assert torch.equal(generated(loaded), expected)


def test_generate_does_not_compile_what_is_replayed_unless_it_is_told_to(model, recorder, swapper):
    cache = transformers.StaticCache(config=model.config, max_cache_len=8)
    everywhere = transformers.CompileConfig()
    everywhere._compile_all_devices = True
    asked = transformers.GenerationConfig(compile_config=everywhere)
    assert model._valid_auto_compile_criteria({"past_key_values": cache}, asked)
    applied = recorded(model, recorder, swapper)
    assert model._valid_auto_compile_criteria({"past_key_values": cache}, asked)
    assert not model._valid_auto_compile_criteria({"past_key_values": cache}, transformers.GenerationConfig())
    assert "_valid_auto_compile_criteria" in vars(type(model))
    applied.undo()
    assert "_valid_auto_compile_criteria" not in vars(type(model))


def test_without_cuda_one_line_says_that_there_is_nothing_to_capture(model, swapper):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    before = frozen(model)
    with swapper.swap(model, graphs=True) as applied:
        outcome = applied.outcomes[0]
        assert isinstance(outcome, Kept)
        assert outcome.site.layer == "graphs"
        assert outcome.reason == "the model is on cpu, and only CUDA has graphs to capture"
        assert not any(o.site.layer == "attention" for o in applied.outcomes), "which only a replay needs"
        assert type(model) is transformers.Qwen3ForCausalLM
    assert frozen(model) == before


def test_a_model_without_generate_says_so(swapper):
    plain = torch.nn.Sequential(torch.nn.LayerNorm(8))
    (outcome,) = [o for o in swapper.plan(plain, graphs=True) if o.site.layer == "graphs"]
    assert outcome.reason == "the model has no generate() of Transformers, which makes the steps"
