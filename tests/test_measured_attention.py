"""Attention under `choose="measured"`: candidates raced by the form of the call, prompts and steps over a cache, on a small Qwen3."""

import pytest
import torch
from tests.hub import kernel_files
from tests.small import qwen3

from kernelswap.api import Swapper
from kernelswap.errors import Required
from kernelswap.proof import Check, Verdicts, attention_course, contest
from kernelswap.sources.directory import DirectorySource
from kernelswap.sources.hub import HubSource
from kernelswap.types import Kept, Mode, Swap

transformers = pytest.importorskip("transformers")
BUNDLED = "kernelswap/attention:flash_attn_forward"
PROMPTS = {form.name for form in attention_course.FORMS if form.queries > 1 and form.queries <= 512}
STEPS = {form.name for form in attention_course.FORMS if form.queries == 1}
IDS = torch.arange(2, 14).reshape(2, 6)

# Flash-attention's face, in plain torch: right and slow, wrong, and one that has not all that a model may ask for.
FUNCTIONS = """
import torch

CALLS = []


def _attention(q, k, v, softmax_scale, causal):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def slow(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
    assert window_size == (-1, -1)
    for _ in range(15):
        out = _attention(q, k, v, softmax_scale, causal)
    return out


def plain(q, k, v, softmax_scale=None, causal=False):
    CALLS.append(q.shape[1])
    return _attention(q, k, v, softmax_scale, causal)


def uneven(q, k, v, softmax_scale=None, causal=False):
    for _ in range(1 if q.shape[1] > 1 else 15):
        out = _attention(q, k, v, softmax_scale, causal)
    return out


def wrong(q, k, v, softmax_scale=None, causal=False):
    return _attention(q, k, v, softmax_scale, causal) * 1.01


def moody(q, k, v, softmax_scale=None, causal=False):
    return _attention(q, k, v, softmax_scale, causal) * (1.01 if q.shape[1] == 29 else 1.0)


def raises(q, k, v, softmax_scale=None, causal=False):
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")


def by_kind(module, query, key, value, attention_mask, scaling=None, **kwargs):
    few = attention_mask is None and query.shape[2] > 1
    for _ in range(15 if module.sliding_window is None else 1):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, is_causal=few, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


def other(a, b, c):
    return a
"""
pytestmark = pytest.mark.usefixtures("one_thread", "small_and_short")


@pytest.fixture
def small_and_short(monkeypatch):
    """Calls up to prompts of 512 tokens, and a moment for each: what wins here wins by much."""
    monkeypatch.setitem(attention_course.MOST_SCORES, "cpu", 1 << 19)
    monkeypatch.setattr(contest, "MOST", 0.1)
    monkeypatch.setattr(contest, "LEAST", 0.05)


@pytest.fixture
def wasteful(monkeypatch):
    """Make the original attention of this process take 31 times as long, where the condition says so: then a candidate wins by much."""
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    original = functions["sdpa"]

    def make(when):
        def sdpa(module, query, key, value, attention_mask, **kwargs):
            for _ in range(30 if when(module, query) else 0):
                original(module, query, key, value, attention_mask, **kwargs)
            return original(module, query, key, value, attention_mask, **kwargs)

        monkeypatch.setitem(type(functions)._global_mapping, "sdpa", sdpa)

    return make


def on_prompts(module, query):
    return query.shape[2] > 1


@pytest.fixture
def make_swapper(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def make(**more):
        check = Check(Verdicts(tmp_path / "verdicts", key=tmp_path / "key"), contain="never")
        given = {"table": (), "prover": check, "verifiers": (), "offline": True}
        return Swapper(cache=tmp_path / "cache", **{**given, **more})

    return make


@pytest.fixture
def candidates(make_repo):
    root = make_repo("attend", {"torch-cpu": FUNCTIONS})
    return lambda name: {"attention": f"dir://{root}:{name}"}


def model(**more):
    return qwen3(**{"initializer_range": 0.3, "num_attention_heads": 2, "num_key_value_heads": 1, **more})


def measure(swapper, about, **more):
    more = {"seconds": 300, "compile": False, "attention": True, **more}
    return swapper.measure(about, **more)


def the(outcomes):
    (outcome,) = [o for o in outcomes if o.site.layer == "attention"]
    return outcome


def serving(outcome, **mode):
    assert isinstance(outcome, Swap), outcome.reason
    return {size: by for size, by, _ in outcome.serving(training=mode.get("training", False)).measured}


def test_a_kernel_serves_the_calls_at_which_it_beats_the_original_and_no_others(make_swapper, candidates, wasteful):
    wasteful(on_prompts)
    swapper, about = make_swapper(sources={"dir": DirectorySource()}), model()
    wanted = {"attention": True, "prefer": candidates("uneven")}
    expected = about.generate(IDS, max_new_tokens=5, do_sample=False)
    found = measure(swapper, about, **wanted)
    assert found.left == 0
    applied = swapper.swap(about, choose="measured", mode=Mode.INFERENCE, **wanted)
    by = serving(the(applied.outcomes))
    assert {size for size, serves in by.items() if serves} == PROMPTS
    assert set(by.values()) == {wanted["prefer"]["attention"], ""}
    with applied.counting():
        assert torch.equal(about.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    assert applied.calls[""] == 2, "a prompt in two layers"
    assert applied.calls_of_original[""] == 4 * 2, "four steps of one token"
    assert the(applied.outcomes).inference.verdict.reason.startswith("as accurate as the original")
    text = applied.explain()
    assert "x on prompts to 64" in text
    assert f"the original on the {len(by) - len(PROMPTS)} others" in text
    applied.undo()
    assert about.config._attn_implementation == "sdpa"


def test_a_candidate_that_never_wins_is_not_used_and_its_figures_are_the_reason(make_swapper, candidates):
    swapper, about = make_swapper(sources={"dir": DirectorySource()}), model()
    wanted = {"attention": True, "prefer": candidates("slow")}
    measure(swapper, about, **wanted)
    outcome = the(swapper.plan(about, choose="measured", mode=Mode.INFERENCE, **wanted))
    assert isinstance(outcome, Kept)
    assert outcome.reason.startswith(f"measured, and the original is the fastest: {wanted['prefer']['attention']}: 0.")
    assert "x on prompts to 64" in outcome.reason
    assert "does not serve" not in outcome.reason


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong", "differs in output"),
        ("raises", "FlashAttention only supports Ampere GPUs or newer"),
        ("other", "takes (a, b, c), which is neither flash-attention's way to be called nor Transformers'"),
    ],
)
def test_what_differs_or_cannot_run_loses_with_its_reason(make_swapper, candidates, wasteful, name, why):
    wasteful(on_prompts)
    swapper, about, wanted = make_swapper(), model(), candidates(name)
    measure(swapper, about, prefer=wanted)
    outcome = the(swapper.plan(about, attention=True, choose="measured", prefer=wanted, mode=Mode.INFERENCE))
    assert why in dict(outcome.inference.passed)[wanted["attention"]]
    assert serving(outcome)["prompts to 64"] == BUNDLED


def test_flash_attention_is_asked_for_calls_without_a_mask_and_the_original_for_the_others(
    make_swapper, candidates, wasteful, tmp_path
):
    wasteful(lambda module, query: True)
    swapper, about, wanted = (
        make_swapper(sources={"dir": DirectorySource()}),
        model(),
        {"attention": True, "prefer": candidates("plain")},
    )
    expected = about.generate(IDS, max_new_tokens=3, do_sample=False)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    expected_padded = about(IDS, attention_mask=padded).logits
    found = measure(swapper, about, **wanted)
    (entry,) = found.speeds.entries.values()
    (plain, *_) = [i for spec, i in entry.candidates if spec.endswith(":plain")]
    static = attention_course.FORMS.index(next(f for f in attention_course.FORMS if f.static))
    assert "does not serve such calls" in found.speeds.known(entry, plain, static).reason
    assert "does not serve" not in found.speeds.known(entry, plain, 0).reason
    with swapper.swap(about, choose="measured", **wanted) as applied:
        assert serving(the(applied.outcomes))["prompts to 64"] == wanted["prefer"]["attention"]
        with applied.counting():
            assert torch.equal(about.generate(IDS, max_new_tokens=3, do_sample=False), expected)
        assert applied.calls_of_original.get("", 0) == 0
        with applied.counting():
            torch.testing.assert_close(about(IDS, attention_mask=padded).logits, expected_padded)
        assert (applied.calls[""], applied.calls_of_original[""]) == (0, 2), "a mask of four dimensions"


def test_what_was_measured_is_kept_goes_on_and_holds_for_its_like_alone(make_swapper, monkeypatch):
    about = model()
    monkeypatch.setattr(contest, "LEAST", 0.3)
    monkeypatch.setattr(contest, "MOST", 0.3)
    first = measure(make_swapper(), about, seconds=0.5)
    assert first.left > 0, "the time was up"
    second = measure(make_swapper(), about)
    assert (second.left, second.measured) == (0, first.left)
    assert measure(make_swapper(), about).measured == 0
    left = {
        name: measure(make_swapper(), other, seconds=0).left
        for name, other in {
            "heads": model(num_key_value_heads=2),
            "head size": model(head_dim=16),
            "dtype": model().bfloat16(),
            "more layers": model(num_hidden_layers=3),
        }.items()
    }
    assert left.pop("more layers") == 0, "layers are alike"
    assert len(set(left.values())) == 1
    assert min(left.values()) > 0


def test_an_edited_original_is_measured_anew(make_swapper, wasteful):
    about = model()
    measure(make_swapper(), about)
    wasteful(on_prompts)
    assert measure(make_swapper(), about, seconds=0).left > 0


def test_layers_with_a_window_are_measured_and_served_by_themselves(make_swapper, candidates, wasteful):
    wasteful(lambda module, query: query.shape[2] > 1 and module.sliding_window is not None)
    size = {"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 32}
    swapper, about = make_swapper(sources={"dir": DirectorySource()}), model(**size)
    wanted = {"attention": True, "prefer": candidates("by_kind")}
    measure(swapper, about, **wanted)
    ids = torch.randint(2, 60, (1, 50))
    expected = about.generate(ids, max_new_tokens=3, do_sample=False)
    with swapper.swap(about, choose="measured", mode=Mode.INFERENCE, **wanted) as applied:
        by = serving(the(applied.outcomes))
        assert {size for size, serves in by.items() if serves} == {"window: prompts to 64", "window: prompts of 65-512"}
        assert "window: 1 token, cache to 1024" not in by, "such a cache never holds so much"
        with applied.counting():
            assert torch.equal(about.generate(ids, max_new_tokens=3, do_sample=False), expected)
        assert applied.calls[""] == 1 + 2, "the layer with the window: its prompt, and its steps, which nobody measured"
        assert applied.calls_of_original[""] == 3, "the other layer"


def test_training_is_measured_with_its_gradients_and_on_prompts_alone(make_swapper, wasteful):
    wasteful(on_prompts)
    swapper, about = make_swapper(), model().train()
    found = measure(swapper, about, mode=Mode.TRAINING)
    (entry,) = [e for e in found.speeds.entries.values() if e.run.training]
    assert {n for i, n in enumerate(entry.course.names) if entry.course.occurs(i)} == PROMPTS
    about.zero_grad()
    about(IDS, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in about.parameters()]
    with swapper.swap(about, attention=True, choose="measured", mode=Mode.TRAINING) as applied:
        assert serving(the(applied.outcomes), training=True)["prompts to 64"] == BUNDLED
        about.zero_grad()
        about(IDS, labels=IDS).loss.backward()
        for p, wanted in zip(about.parameters(), expected, strict=True):
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)


def test_a_real_call_proves_the_kernel_that_serves_it_and_a_refusal_is_for_good(make_swapper, candidates, wasteful):
    wasteful(on_prompts)
    swapper, about = make_swapper(sources={"dir": DirectorySource()}), model()
    wanted = {"attention": True, "prefer": candidates("moody"), "mode": Mode.INFERENCE, "choose": "measured"}
    expected = about(IDS).logits
    measure(swapper, about, attention=True, prefer=wanted["prefer"])
    met, first_call = [], swapper.prover.first_call
    swapper.prover.first_call = lambda *a, **k: met.append(a[3].layer) or first_call(*a, **k)
    with swapper.swap(about, **wanted) as applied:
        torch.testing.assert_close(about(IDS).logits, expected)
        assert applied.refusals == ()
        about(IDS)
        assert met == ["moody"], "once, and the part that serves"
    with swapper.swap(about, **wanted) as applied:
        ids = torch.randint(2, 60, (1, 29))
        torch.testing.assert_close(about(ids).logits, about(ids).logits)
        ((_, reason),) = applied.refusals
        assert "differs in output" in reason, "nobody measured 29 tokens; who calls with them is protected all the same"


def test_a_required_attention_kernel_that_lost_is_an_error(make_swapper, candidates):
    swapper, about = make_swapper(sources={"dir": DirectorySource()}), model()
    wanted = {"attention": True, "prefer": candidates("slow")}
    measure(swapper, about, **wanted)
    with pytest.raises(Required, match="measured, and the original is the fastest"):
        swapper.swap(about, choose="measured", mode=Mode.INFERENCE, require="attention", **wanted)
    assert about.config._attn_implementation == "sdpa"
    assert the(swapper.plan(about, **wanted)).inference.implementation.layer == "slow", "where nobody asked a clock"


def test_a_kernel_of_the_hub_takes_part_over_http_where_it_is_named(hub, hub_cache, make_swapper, wasteful):
    wasteful(on_prompts)
    hub.organization("org", trusted=True)
    hub.repo("org/flash").branch("v1", kernel_files("torch-cpu", FUNCTIONS, name="flash"))
    sources = {"hub": HubSource(hub_cache, endpoint=hub.url, backoff=0.01)}
    swapper, about = make_swapper(sources=sources, offline=False), model()
    measure(swapper, about)
    assert hub.requests() == [], "nothing is fetched that nobody named"
    wanted = {"attention": "org/flash@1:plain"}
    measure(swapper, about, prefer=wanted)
    assert (
        serving(the(swapper.plan(about, attention=True, choose="measured", prefer=wanted)))["prompts to 64"]
        == wanted["attention"]
    )


@pytest.mark.slow
def test_the_original_under_compile_takes_part(make_swapper, wasteful):
    swapper, about = make_swapper(), model()
    found = measure(swapper, about, compile=True)
    (entry,) = found.speeds.entries.values()
    verdicts = {n: found.speeds.known(entry, entry.candidates[-1][1], i) for i, n in enumerate(entry.course.names)}
    assert entry.candidates[-1][0] == "torch.compile"
    timed = {n for n, v in verdicts.items() if v is not None and v.seconds_kernel is not None}
    assert timed >= {"prompts to 64", "1 token, cache to 1024"}, verdicts
