"""Greedy generation: whose tokens are eager's, and how fast `generate()` is with a dynamic cache whose lengths were never met.

In bfloat16 two correct implementations part where the two best logits are closer than what rounding moves them by. For every
sequence that departs from the original's, its first difference is kept with the original's own top-2 gap there, the distance of
neighbouring bfloat16 numbers at that logit, and what the original's two logits are in float32 on the same prefix.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import DEVICE, synchronize
from transformers import DynamicCache


def resolution(logit: float) -> float:
    """The distance of neighbouring bfloat16 numbers at `logit`: seven bits after the leading one."""
    return 2.0 ** (math.floor(math.log2(abs(logit))) - 7) if logit else 2.0**-133


@torch.no_grad()
def greedy(model: Any, ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (B, count), and the two best logits of each step and whose they are, (B, count, 2), on the CPU."""
    cache = DynamicCache(config=model.config)
    given, found, best, whose = ids, [], [], []
    for _ in range(count):
        logits = model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        top = logits.float().topk(2)
        given = logits.argmax(-1, keepdim=True)  # as generate() has it, ties included
        found.append(given)
        best.append(top.values)
        whose.append(top.indices)
    return torch.cat(found, 1).cpu(), torch.stack(best, 1).cpu(), torch.stack(whose, 1).cpu()


def compare(models: dict[str, Any], prompts: torch.Tensor, count: int, exact: Any = None) -> dict[str, dict[str, Any]]:
    """By candidate: how many sequences are the original's, and each first difference of the others.

    `exact`: the same weights in float32, for what the two logits are without the original's rounding.
    """
    tokens, best, whose = greedy(models["original"], prompts, count)
    found = {}
    for name, model in models.items():
        if name == "original":
            continue
        other, _, _ = greedy(model, prompts, count)
        differences = []
        for row in range(len(prompts)):
            at = (other[row] != tokens[row]).nonzero()
            if not len(at):
                continue
            step = int(at[0])
            top, second = best[row, step].tolist()
            one = {
                "sequence": row, "token": step, "gap": top - second, "resolution": resolution(top), "logit": top,
                "second_taken": int(other[row, step]) in whose[row, step].tolist(),
            }  # fmt: skip
            if exact is not None:
                one |= _in_float32(exact, prompts[row], tokens[row], step, whose[row, step].tolist())
            one["below"] = one["gap"] <= one["resolution"]
            differences.append(one)
        same = float((other == tokens).float().mean())
        found[name] = {"sequences": len(prompts), "identical": len(prompts) - len(differences), "tokens_equal": round(same, 4)}
        found[name]["differences"] = differences
    return found


@torch.no_grad()
def _in_float32(exact: Any, prompt: torch.Tensor, tokens: torch.Tensor, step: int, pair: list[int]) -> dict[str, float]:
    """The gap between the same two tokens in float32; negative where the original itself took the worse one."""
    ids = torch.cat([prompt.cpu(), tokens[:step]])[None].to(prompt.device)
    logits = exact(ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return {"gap_float32": float(logits[pair[0]] - logits[pair[1]])}


def say(size: str, batch: int, found: dict[str, dict[str, Any]], line: Callable[[str], None]) -> None:
    """For a person: one line a candidate, one for each first difference."""
    for name, one in found.items():
        line(f"{size} greedy batch {batch}: {name} {one['identical']} of {one['sequences']} sequences identical")
        for d in one["differences"]:
            exact = f", in float32 {d['gap_float32']:+.4f}" if "gap_float32" in d else ""
            line(
                f"   sequence {d['sequence']} parts at token {d['token']}: the original's top-2 gap {d['gap']:.4f}{exact}; "
                f"bfloat16 resolves {d['resolution']:.4f} there" + ("" if d["below"] else "  ABOVE")
            )


def new_lengths(
    models: dict[str, Any], batch: int, *, context: int = 512, new: int = 16, turns: int = 3
) -> dict[str, list[float]]:
    """Milliseconds a token of plain `generate()`, each turn of each candidate on lengths that this process has not met.

    The prompt is part of it. Turns alternate; lengths are dealt out so that none is met by two candidates: plans that cuDNN
    keeps for a length would serve the second one.
    """
    took: dict[str, list[float]] = {name: [] for name in models}
    length = context
    for turn in range(turns + 1):
        for name in list(models) if turn % 2 else list(reversed(models)):
            ids = torch.randint(0, models[name].config.vocab_size - 1, (batch, length), device=DEVICE)
            length += new + 1
            mask = torch.ones_like(ids)
            synchronize()
            start = time.perf_counter()
            models[name].generate(
                ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
            synchronize()
            if turn:
                took[name].append((time.perf_counter() - start) * 1e3 / new)
    return took


def other_attention(model: Any) -> Any:
    """The original with Transformers' own other attention: what two right implementations differ by."""
    made = copy.deepcopy(model)
    made.set_attn_implementation("eager")
    return made
