"""Decode on a GPU: `python benchmarks/gpu_decode.py [OUT.json] [0.6b] [8b] [--compile [--long]] [--only=static|dynamic] [--projections] [--add]`.

Random weights in bf16, context 1024. Static cache: the original, the swapped model with graphs, and, with `--compile`, the original
as generate() compiles it by itself (reduce-overhead). A step inside generate() is the difference of two lengths; a bare step is a
loop of forwards. Dynamic cache: plain generate() at lengths never met, the original against `swap(attention=True)`.
Greedy tokens are compared; where they first differ, the original's own two best logits there are told. `--long`: the compiled 8B at
batch 1, too. `--projections`: static rows also with q/k/v and gate/up as one launch each (docs/fusion.md), against graphs without.
`--add`: rows of OUT.json that this run does not measure stay.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_generate import resolution
from gpu_model import SIZES, add, keep, model
from gpu_model import tokens as random_tokens
from gpu_timing import CUDA, empty_cache, synchronize
from transformers import StaticCache

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import kernelswap as ks

CONTEXT, SHORT, LONG, COUNT = (1024, 16, 80, 48) if CUDA else (24, 4, 8, 4)
BATCHES = (1, 32) if CUDA else (1, 2)
PROJECTIONS = {"projections": "kernelswap/layers:projections", "SwiGLUMLP": "kernelswap/layers:SwiGLUMLPFused"}
LENGTHS = (301, 517, 733, 949) if CUDA else (11, 17)


def row(what: str, **found: object) -> None:
    add({"row": what, **found})
    print(f"{what:44} " + "  ".join(f"{k} {v}" for k, v in found.items()), flush=True)


def timed(run: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def generate(m: Any, ids: torch.Tensor, count: int, **more: Any) -> torch.Tensor:
    more = {"cache_implementation": "static", **more}
    mask = torch.ones_like(ids)
    return m.generate(ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, **more)


def step_in_generate(m: Any, ids: torch.Tensor, repeats: int = 3, **more: Any) -> tuple[float, float]:
    """ms per step, and the spread of what the repeats say."""
    found = []
    for _ in range(repeats):
        short = timed(lambda: generate(m, ids, SHORT, **more))
        found.append((timed(lambda: generate(m, ids, LONG, **more)) - short) / (LONG - SHORT))
    return round(sorted(found)[len(found) // 2], 3), round(max(found) - min(found), 3)


@torch.no_grad()
def bare_step(m: Any, ids: torch.Tensor, count: int = COUNT) -> float:
    cache = StaticCache(config=m.config, max_cache_len=CONTEXT + LONG)
    m(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    one = ids[:, :1].contiguous()
    for _ in range(4):
        m(one, past_key_values=cache, use_cache=True)
    return round(timed(lambda: [m(one, past_key_values=cache, use_cache=True) for _ in range(count)]) / count, 3)


@torch.no_grad()
def agreement(original: Any, found: torch.Tensor, expected: torch.Tensor, ids: torch.Tensor) -> dict[str, object]:
    """How far greedy tokens agree, and how close the original's two best were where they part."""
    differ = (found != expected).any(0).nonzero()
    if not len(differ):
        return {"tokens": f"{expected.shape[1] - ids.shape[1]} equal"}
    at = int(differ[0])
    sequence = int((found[:, at] != expected[:, at]).nonzero()[0])
    best = original(expected[sequence : sequence + 1, :at], logits_to_keep=1).logits[0, -1].float().topk(2).values
    gap, unit = float(best[0] - best[1]), resolution(float(best[0]))
    return {"tokens": f"equal for {at - ids.shape[1]}, then a gap of {gap:.4f} where bf16 resolves {unit:.4f}"}


def static(size: str, original: Any, swapped: Any) -> None:
    for batch in BATCHES:
        ids = random_tokens(batch, CONTEXT, of=original)
        eager = {"disable_compile": True}
        expected = generate(original, ids, LONG, **eager)
        original_ms, spread = step_in_generate(original, ids, 2, **eager)
        began = time.perf_counter()
        applied = ks.swap(swapped, graphs=True)
        swapping = time.perf_counter() - began
        first = timed(lambda s=swapped, i=ids: generate(s, i, 4)) / 1e3
        found = generate(swapped, ids, LONG)
        graphs_ms, graphs_spread = step_in_generate(swapped, ids)
        told = applied.report["graphs"]
        row(
            f"{size} static batch {batch} in generate()",
            ms={"original": original_ms, "graphs": graphs_ms},
            spread={"original": spread, "graphs": graphs_spread},
            speedup=round(original_ms / graphs_ms, 2),
            ready_s={"swap": round(swapping, 2), "first generate of 4": round(first, 2)},
            graphs={k: v for k, v in (told or {}).items() if v},
            **agreement(original, found, expected, ids),
        )
        bare = {"original": bare_step(original, ids), "graphs": bare_step(swapped, ids)}
        row(f"{size} static batch {batch} bare step", ms=bare, speedup=round(bare["original"] / bare["graphs"], 2))
        print(applied.explain(), flush=True)
        applied.undo()
        if "--projections" in sys.argv:
            with_projections(f"{size} static batch {batch}", swapped, ids, {"generate": graphs_ms, "bare": bare["graphs"]})
        if "--compile" in sys.argv and ((size, batch) != ("8b", 1) or "--long" in sys.argv):
            torch._dynamo.reset()
            first = timed(lambda o=original, i=ids: generate(o, i, 4)) / 1e3
            compiled_ms, spread = step_in_generate(original, ids)
            row(
                f"{size} static batch {batch} compiled by generate()",
                ms=compiled_ms,
                spread=spread,
                graphs_times_faster=round(compiled_ms / graphs_ms, 2),
                ready_s=round(first, 2),
            )
            vars(original).pop("_compiled_call", None)
            torch._dynamo.reset()
        empty_cache()


def with_projections(what: str, swapped: Any, ids: torch.Tensor, without: dict[str, float]) -> None:
    with ks.swap(swapped, graphs=True) as applied:
        expected = generate(swapped, ids, LONG)
        first = bare_step(swapped, ids)
    with ks.swap(swapped, graphs=True, table=PROJECTIONS) as applied:
        found = generate(swapped, ids, LONG)
        ms, spread = step_in_generate(swapped, ids)
        bare = bare_step(swapped, ids)
        row(
            f"{what} with projections in generate()",
            ms={"graphs": without["generate"], "projections": ms},
            spread=spread,
            speedup=round(without["generate"] / ms, 2),
            **agreement(swapped, found, expected, ids),
        )
        least = min(first, without["bare"])
        row(f"{what} with projections bare step", ms={"graphs": least, "projections": bare}, speedup=round(least / bare, 2))
        print(applied.explain(), flush=True)


def dynamic(size: str, original: Any, swapped: Any) -> None:
    with ks.swap(swapped, attention=True) as applied:
        for batch in BATCHES:
            both = {"original": original, "attention": swapped}
            for m in both.values():
                generate(m, random_tokens(batch, 64, of=original), 4, cache_implementation=None)
            took: dict[str, list[float]] = {name: [] for name in both}
            for turn, length in enumerate(LENGTHS):
                ids = random_tokens(batch, length, of=original)
                for name in sorted(both, reverse=bool(turn % 2)):
                    took[name].append(timed(lambda m=both[name], i=ids: generate(m, i, 32, cache_implementation=None)))
            ms = {name: round(sum(times) / len(times) / 32, 3) for name, times in took.items()}
            row(
                f"{size} dynamic batch {batch}, new lengths, per token",
                ms=ms,
                speedup=round(ms["original"] / ms["attention"], 2),
                each={name: [round(t) for t in times] for name, times in took.items()},
            )
        print(applied.explain(), flush=True)


if __name__ == "__main__":
    if "--add" in sys.argv:
        keep(sys.argv[1:])
    only = next((a.partition("=")[2] for a in sys.argv if a.startswith("--only=")), "")
    for name in [a for a in sys.argv[1:] if a in SIZES] or ["0.6b" if CUDA else "tiny"]:
        plain = model(name)
        twin = copy.deepcopy(plain)
        if only != "dynamic":
            static(name, plain, twin)
        if only != "static":
            dynamic(name, plain, twin)
        del plain, twin
        empty_cache()
