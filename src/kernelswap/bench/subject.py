"""The model that a run is about: a Qwen3 made on the spot, or any causal language model or encoder that Transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import KernelSwapError

if TYPE_CHECKING:
    import torch
    import torch.nn as nn

SEED = 0
PROMPT_TOKENS = 512

# Written for this purpose; the tokenizer is trained on it and the prompt is cut from it.
TEXT = """\
A model is a long list of small sums. Most of them are products of large matrices, and for those every library of the
last forty years has done its best. Between the products stand the small steps: a row is divided by its length, a gate
is opened or closed, a position is turned by an angle, two streams are added. Each of them reads its input from memory,
does a little arithmetic, and writes its output back. Written one operation at a time, such a step may walk through
memory six or eight times, where once in and once out would do. A kernel is a step written so that it walks once.

Whoever wants to use one has to answer five questions. Is there a build for this machine, this version of the library
and this chip? Are these the bytes that its author published? Does it compute what the step that it replaces computes,
also for one row, for a prime number of rows, for a row of zeros? Is it faster here, at these sizes, and not only on
the machine of whoever wrote it? And can it be taken out again, so that nothing remains of it but the time it saved?

The first question is answered by a name. The second is answered by a digest, taken before the code is imported and
compared with the one that was written down. The third is answered by running both, next to a third one in double
precision, and by looking at how far each of the two is from it: a kernel need not be close to the original, it must be
as close to the truth. The fourth is answered by a clock, with both taking turns, so that a machine that grows warm or
busy does so for both. The fifth is answered by comparing what is there afterwards with what was there before, object
by object and bit by bit.

There is no sixth question. When one of the five is answered with no, the step stays as it was, and the reason is
written where everybody can read it. That is less than a promise that everything gets faster, and it is worth more.
"""


@dataclass
class Subject:
    """A model in eval mode and what it is given. `inputs` are keyword arguments of its forward, on its device."""

    name: str
    model: nn.Module
    kind: Literal["causal", "encoder"]
    inputs: dict[str, torch.Tensor]
    prompt: str = ""
    tokenizer: Any = None
    notes: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, over all sequences."""
        return self.inputs["input_ids"].numel()

    @property
    def parameters(self) -> int:
        """Parameters, shared ones once."""
        return sum(p.numel() for p in self.model.parameters())

    def generate(self, new_tokens: int) -> torch.Tensor:
        """Greedy: token ids (1, prompt + new_tokens) of a causal model; the last hidden state of an encoder."""
        import torch

        with torch.no_grad():
            if self.kind == "encoder":
                return self.model(**self.inputs)[0]  # type: ignore[no-any-return]  # Transformers' outputs are untyped
            return self.model.generate(  # type: ignore[no-any-return,operator]  # same
                **self.inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens
            )

    def forward(self) -> torch.Tensor:
        """Logits or the last hidden state for the prompt, (batch, tokens, width)."""
        import torch

        with torch.no_grad():
            return self.model(**self.inputs)[0]  # type: ignore[no-any-return]  # same


def tokenizer() -> Any:
    """A byte-level BPE trained on `TEXT`; the same on every machine, in milliseconds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    raw.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")  # noqa: S106  # tokens of text


def demo(*, device: str = "cpu", dtype: str = "float32") -> Subject:
    """A Qwen3-architecture causal language model with random weights, always the same ones, and a text prompt.

    67 million parameters: large enough that the steps between the matrix products cost what they cost in real models,
    small enough that two CPU cores show both sides in seconds.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    words = tokenizer()
    config = Qwen3Config(
        vocab_size=-(-len(words) // 64) * 64,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = Qwen3ForCausalLM(config)
        # Norm weights of one would hide a kernel that forgets them, or reads another module's.
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data.normal_(mean=1.0, std=0.1)
    model = model.to(device=device, dtype=_dtype(dtype)).eval()
    model.generation_config.eos_token_id = None  # every run generates the same number of tokens
    subject = Subject("Qwen3 architecture, random weights", model, "causal", {}, tokenizer=words)
    _prompt(subject, device)
    return subject


def load(name: str, *, device: str = "cpu", dtype: str = "auto", offline: bool = False, runs: bool = True) -> Subject:
    """Any causal language model or encoder: an id on the hub or a directory. Code in a model's repository is never run.

    Without `runs` it is only looked at: there is no prompt, and no tokenizer is needed.

    Raises:
        KernelSwapError: it cannot be loaded; with Transformers' own words.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    local = Path(name).expanduser()
    where = str(local) if local.is_dir() else name
    only_local = offline or local.is_dir()
    quiet = _without_bars()
    try:
        config = AutoConfig.from_pretrained(where, local_files_only=only_local)
        causal = _is_causal(config)
        loader = AutoModelForCausalLM if causal else AutoModel
        wanted = dtype if dtype == "auto" else _dtype(dtype)
        model = loader.from_pretrained(where, config=config, dtype=wanted, local_files_only=only_local)
        words = AutoTokenizer.from_pretrained(where, local_files_only=only_local) if runs else None
    except (OSError, ValueError, KeyError, ImportError) as e:
        raise KernelSwapError(
            f"Transformers cannot load it: {str(e).strip().splitlines()[0]}",
            asked=f"the model {name!r}",
            todo="give a directory with config.json, weights and tokenizer, or the id of a model on the hub",
        ) from e
    finally:
        quiet()
    model = model.to(device).eval()
    if causal and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None
    short = "/".join(local.resolve().parts[-2:]) if local.is_dir() else name
    subject = Subject(short, model, "causal" if causal else "encoder", {}, tokenizer=words)
    if runs:
        _prompt(subject, device)
    return subject


def _without_bars() -> Callable[[], None]:
    """Silence Transformers' own progress bars: the caller shows progress. Returns what gives them back."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        return lambda: None
    logging.disable_progress_bar()

    def give_back() -> None:
        logging.enable_progress_bar()

    return give_back


def _is_causal(config: Any) -> bool:
    """By the architecture that the checkpoint names; BERT's family is in both of Transformers' tables."""
    named = getattr(config, "architectures", None) or ()
    return any(n.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for n in named)


def _dtype(name: str) -> torch.dtype:
    import torch

    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(name, name)
    found = getattr(torch, short, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise KernelSwapError(f"{name!r} is no floating dtype", todo="one of float32, bfloat16, float16")
    return found


def _prompt(subject: Subject, device: str) -> None:
    """`PROMPT_TOKENS` tokens of `TEXT`, repeated as needed, or as many as the model takes."""
    import torch

    limit = min(PROMPT_TOKENS, getattr(subject.model.config, "max_position_embeddings", PROMPT_TOKENS) or PROMPT_TOKENS)
    if subject.kind == "encoder":
        sentences = [s.strip() for s in TEXT.replace("\n", " ").replace("?", ".").split(".") if s.strip()]
        subject.prompt = sentences[0] + "."
        batch = subject.tokenizer(sentences, return_tensors="pt", padding=True, truncation=True, max_length=limit)
    else:
        ids = subject.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        if not ids:  # Transformers makes an empty one where there are no files
            raise KernelSwapError(
                "there is no tokenizer with it that makes tokens of a text",
                asked=f"the model {subject.name!r}",
                todo="save one beside the weights: tokenizer.save_pretrained(DIRECTORY)",
            )
        ids = (ids * -(-limit // len(ids)))[: max(1, limit - 64 if limit < PROMPT_TOKENS else limit)]
        subject.prompt = subject.tokenizer.decode(ids)
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    subject.inputs = {k: v.to(device) for k, v in batch.items()}
