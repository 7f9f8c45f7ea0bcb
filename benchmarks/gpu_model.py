"""Whole models on a GPU, original against swapped, default settings: `python benchmarks/gpu_model.py [OUT.json] [0.6b] [8b]`.

Random weights in bf16, the two copies timed alternately: prefill, decode with a dynamic cache, and a training step (0.6B).
Row E0 asks that no ratio is below 1. Accuracy of the logits is against a float32 run of the same weights (0.6B).
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch
from gpu_timing import wall_ms, write
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import kernelswap as ks

SIZES = {
    "0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
}
PREFILL = [(1, 16), (1, 128), (1, 512), (1, 2048), (8, 2048)]
ROWS: list[dict[str, object]] = []


def model(size: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(num_key_value_heads=8, head_dim=128, vocab_size=151936, **SIZES[size])
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        made = Qwen3ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return made


def row(what: str, took: dict[str, tuple[float, float]], **more: object) -> None:
    base = took["original"][0]
    ratios = {k: round(base / v[0], 3) for k, v in took.items() if k != "original"}
    ROWS.append(
        {
            "row": what,
            "ms": {k: round(v[0], 3) for k, v in took.items()},
            "spread": {k: round(v[1], 3) for k, v in took.items()},
            "speedup": ratios,
            **more,
        }
    )
    for path in (a for a in sys.argv[1:] if a.endswith(".json")):
        write(ROWS, Path(path))
    print(
        f"{what:34} original {base:8.2f} ms  " + "  ".join(f"{k} {v}x" for k, v in ratios.items()) + f"  {more or ''}", flush=True
    )


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 150_000, shape, device="cuda")


def prefill(size: str, models: dict[str, Qwen3ForCausalLM]) -> None:
    for shape in PREFILL:
        ids = tokens(*shape)

        def run(m: Qwen3ForCausalLM, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                m.model(ids, use_cache=False)

        row(f"{size} prefill {shape[0]}x{shape[1]}", wall_ms({k: lambda m=m: run(m) for k, m in models.items()}))


def decode(size: str, models: dict[str, Qwen3ForCausalLM], context: int = 512, steps: int = 12) -> None:
    for batch in (1, 8, 32):
        caches: dict[str, DynamicCache] = {}
        ids, one = tokens(batch, context), tokens(batch, 1)

        def fill(name: str, ids: torch.Tensor = ids, caches: dict[str, DynamicCache] = caches) -> None:
            caches[name] = DynamicCache(config=models[name].config)
            with torch.no_grad():
                models[name].model(ids, past_key_values=caches[name], use_cache=True)

        def run(name: str, one: torch.Tensor = one, caches: dict[str, DynamicCache] = caches) -> None:
            with torch.no_grad():
                for _ in range(steps):
                    models[name].model(one, past_key_values=caches[name], use_cache=True)

        took = wall_ms({k: lambda k=k: run(k) for k in models}, 3, before={k: lambda k=k: fill(k) for k in models})
        row(f"{size} decode step batch {batch}", {k: (v[0] / steps, v[1]) for k, v in took.items()})


def training(size: str, models: dict[str, Qwen3ForCausalLM]) -> None:
    ids = tokens(4, 2048)
    peaks, losses = {}, {}
    optimisers = {k: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=True) for k, m in models.items()}

    def step(name: str) -> None:
        loss = models[name](ids, labels=ids).loss
        loss.backward()
        optimisers[name].step()
        optimisers[name].zero_grad()
        losses.setdefault(name, []).append(loss.item())

    for name, m in models.items():
        m.train()
        step(name)
        torch.cuda.empty_cache()
        other = sum(p.numel() * 2 * 3 for n, o in models.items() if n != name for p in o.parameters())
        torch.cuda.reset_peak_memory_stats()
        step(name)
        peaks[name] = round((torch.cuda.max_memory_allocated() - other) / 2**30, 1)
    row(
        f"{size} training step 4x2048",
        wall_ms({k: lambda k=k: step(k) for k in models}, 5),
        peak_gib=peaks,
        losses={k: v[-1] for k, v in losses.items()},
    )


def accuracy(size: str, models: dict[str, Qwen3ForCausalLM]) -> None:
    ids = tokens(2, 128)
    exact = copy.deepcopy(models["original"]).float()
    with torch.no_grad():
        want = exact(ids).logits.double()
        errors = {k: float((m(ids).logits.double() - want).norm() / want.norm()) for k, m in models.items()}
    ROWS.append({"row": f"{size} logits error against float32", "error": errors})
    print(f"{size} logits error against float32", {k: f"{v:.2e}" for k, v in errors.items()}, flush=True)


if __name__ == "__main__":
    for size in [s for s in sys.argv[1:] if s in SIZES] or ["0.6b"]:
        original = model(size)
        models = {"original": original, "swapped": copy.deepcopy(original)}
        applied = ks.swap(models["swapped"])
        print(applied.explain())
        if "--attention" in sys.argv:
            ks.install()
            models["swapped+attention"] = copy.deepcopy(original)
            models["swapped+attention"].set_attn_implementation("kernelswap/attention")
            ks.swap(models["swapped+attention"])
        if size == "0.6b":
            accuracy(size, models)
        prefill(size, models)
        decode(size, models)
        if size == "0.6b":
            training(size, models)
        del original, models
        torch.cuda.empty_cache()
    out = [a for a in sys.argv[1:] if a.endswith(".json")]
    if out:
        write(ROWS, Path(out[0]))
