"""Losses over training steps on real text: two seeds of the original, and the swapped model from the first seed's weights.

The text is the source of Python's standard library, two bytes to a token (65536 words). What a swap changes must be smaller
than what another seed changes: `judge` compares means over twenty steps.
"""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import CUDA, DEVICE, synchronize
from transformers import Qwen3Config, Qwen3ForCausalLM

SIZES = {
    True: {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8, "head_dim": 64},
    False: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16},
}
BATCH = {True: (8, 512), False: (2, 32)}
WINDOW = 20


def text(count: int) -> torch.Tensor:
    """`count` tokens of source code, in files' order by name."""
    data = b""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += path.read_bytes()
        if len(data) >= 2 * count:
            break
    pairs = torch.frombuffer(bytearray(data[: len(data) // 2 * 2]), dtype=torch.uint8).long().view(-1, 2)
    tokens = pairs[:, 0] * 256 + pairs[:, 1]
    return tokens.repeat(-(-count // len(tokens)))[:count]


def model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = Qwen3Config(**SIZES[CUDA], num_key_value_heads=SIZES[CUDA]["num_attention_heads"] // 2, vocab_size=65536)
    return Qwen3ForCausalLM(config).to(DEVICE, torch.bfloat16).train()


def losses(made: Any, batches: torch.Tensor, rate: float = 5e-4) -> list[float]:
    """One loss a step; read at the end, so that no step waits."""
    optimiser = torch.optim.AdamW(made.parameters(), lr=rate, fused=CUDA)
    found = []
    for ids in batches:
        loss = made(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.detach())
    synchronize()
    return torch.stack(found).float().tolist()


def means(values: list[float]) -> list[float]:
    return [statistics.fmean(values[i : i + WINDOW]) for i in range(0, len(values), WINDOW)]


def judge(runs: dict[str, list[float]]) -> dict[str, float]:
    """Largest distance from the first seed's run, of means over a window: by the other seed, and by the swap."""
    base = means(runs["original, seed 0"])
    return {k: round(max(abs(a - b) for a, b in zip(base, means(v), strict=True)), 4) for k, v in runs.items()}


def compare(swap: Callable[[Any], object], steps: int = 200) -> dict[str, object]:
    """`swap(model)` swaps a model in place. The row of the benchmark: losses by run, distances, and whether the swap's is smaller."""
    rows, length = BATCH[CUDA]
    batches = text(steps * rows * length).view(steps, rows, length).to(DEVICE)
    runs = {f"original, seed {seed}": losses(model(seed), batches) for seed in (0, 1)}
    swapped = model(0)
    swap(swapped)
    runs["swapped+loss, seed 0"] = losses(swapped, batches)
    apart = judge(runs)
    return {
        "losses": {k: [round(x, 4) for x in v] for k, v in runs.items()},
        "apart": apart,
        "within_seeds": apart["swapped+loss, seed 0"] <= apart["original, seed 1"],
    }
