"""What checking adds to the first forward of a whole model, in runs of the originals; times are in `benchmarks/checking.py`."""

import functools

import pytest
import torch
from tests.cli.conftest import compiled_cache
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from kernelswap import Swapper

TOKENS = 40
KINDS = 4  # norms of the hidden size and of heads, the MLP, the rotation


@pytest.fixture
def runs(monkeypatch):
    """Every run of an original: its name, its first tensor's shape and dtype, whether it is with gradients."""
    found = []

    def counted(owner, name, skip):
        function = getattr(owner, name)

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            x = args[skip]
            found.append((f"{getattr(owner, '__name__', '')}.{name}", tuple(x.shape), x.dtype))
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    counted(qwen3.Qwen3RMSNorm, "forward", 1)
    counted(qwen3.Qwen3MLP, "forward", 1)
    counted(qwen3, "apply_rotary_pos_emb", 0)
    return found


def full(runs):
    """Those in the model's dtype and of all its tokens. Rows that were taken from a call have two dimensions."""
    return [r for r in runs if r[2] == torch.float32 and TOKENS in r[1] and len(r[1]) > 2]


def model(layers):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return qwen3.Qwen3ForCausalLM(qwen3.Qwen3Config(**sizes, num_hidden_layers=layers, vocab_size=64)).eval()


def step(model, *, training):
    ids = torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(training):
        out = model(ids, labels=ids if training else None, use_cache=False)
    if training:
        out.loss.backward()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layers", [2, 5])
def test_each_original_runs_once_more_per_kind_however_many_layers_and_never_again(
    runs, tmp_path, layers_build, layers, training
):
    cache = compiled_cache(tmp_path / "cache", layers_build)
    one = model(layers).train(training)
    applied = Swapper(cache=cache, offline=True).swap(one)
    assert f"{6 * layers + 1} of {7 * layers + 1} swapped" in applied.explain()
    runs.clear()
    step(one, training=training)
    assert applied.refusals == ()
    first = full(runs)
    assert len(first) == len(set(first)) == KINDS
    runs.clear()
    step(one, training=training)
    assert runs == [], "a second forward looks at nothing"

    again = model(layers).train(training)
    applied = Swapper(cache=cache, offline=True).swap(again)  # as a new process, with what is on disk
    runs.clear()
    step(again, training=training)
    assert applied.refusals == ()
    assert runs == [], "a warm start runs no original at all, of no size"
