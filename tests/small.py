"""Small models with random weights that are the same in every run, for tests that need a real architecture and no trained one."""

import torch

SIZE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def qwen3(**config):
    """A Qwen3 for inference in float32 on the CPU; `config` goes over `SIZE`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZE, **config})).eval()


def checkpoint(where, words, change=lambda model: None, **config):
    """The folder `where` with such a model, after `change`, for the tokenizer `words`, and that tokenizer."""
    own = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    model = qwen3(**{"vocab_size": 1024, **own, **config})
    change(model)
    model.save_pretrained(where)
    words.save_pretrained(where)
    return where
