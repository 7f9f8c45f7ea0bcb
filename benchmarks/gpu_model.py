"""Whole models on a GPU, original against swapped, default settings: `python benchmarks/gpu_model.py [OUT.json] [0.6b] [8b] [flags]`.

Random weights in bf16, the copies timed alternately: prefill, decode with a dynamic cache, and a training step.
Row E0 asks that no ratio is below 1. Accuracy of the logits is against a float32 run of the same weights (0.6B).

    --attention  the swapped model with attn_implementation="kernelswap/attention", too
    --compile    layer.compile() where it is the strongest rival: prefill of 2048 tokens, training
    --liger      Liger's kernels in a copy of the model, where liger-kernel is importable
    --graph      prefill 1x2048 captured in CUDA graphs, beside torch.compile(model) captured
    --tokens     256 greedy tokens against the original's, with the original's top-2 gap where they part
    --generate   generate() with a dynamic cache, at lengths that were never met
    --train200   losses over 200 training steps on text, two seeds of the original and the swapped model (its own small size)
    --all        all of these
    --only A,B   of accuracy, prefill, decode, training, graph, tokens, generate, train200: these (their flags included)
    --add        keep the rows that OUT.json has and that this run does not measure
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import CUDA, DEVICE, captured, empty_cache, free_bytes, relative, synchronize, wall_ms, write
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
    "tiny": {  # for the test of this script
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
}
PREFILL = [(1, 16), (1, 128), (1, 512), (1, 2048), (8, 2048)]
FAR = 0.1
"""Two right implementations in bfloat16 end within a few hundredths of each other."""
COMPILED = [(1, 2048), (8, 2048)]
PARTS = ("accuracy", "prefill", "decode", "training", "graph", "tokens", "generate", "train200")
OPTIONAL = ("graph", "tokens", "generate", "train200")
FLAGS = {"--attention", "--compile", "--liger", "--graph", "--tokens", "--generate", "--train200", "--all", "--only", "--add"}
ROWS: list[dict[str, object]] = []
Models = dict[str, Any]


def model(size: str) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(**{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, **SIZES[size]})
    config._attn_implementation = "sdpa"
    with torch.device(DEVICE):
        torch.set_default_dtype(torch.bfloat16)
        made = Qwen3ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return made


def row(what: str, took: dict[str, tuple[float, float]], **more: object) -> None:
    base = took["original"][0]
    ratios = {k: round(base / v[0], 3) for k, v in took.items() if k != "original"}
    add(
        {
            "row": what,
            "ms": {k: round(v[0], 3) for k, v in took.items()},
            "spread": {k: round(v[1], 3) for k, v in took.items()},
            "speedup": ratios,
            **more,
        }
    )
    print(
        f"{what:34} original {base:8.2f} ms  " + "  ".join(f"{k} {v}x" for k, v in ratios.items()) + f"  {more or ''}", flush=True
    )


def add(entry: dict[str, object]) -> None:
    """Keep a row, in place of the one of that name, and write all of them."""
    ROWS[:] = [r for r in ROWS if r["row"] != entry["row"]] + [entry]
    for path in (a for a in sys.argv[1:] if a.endswith(".json")):
        write(ROWS, Path(path))


def keep(argv: list[str]) -> None:
    """Go on from the rows that the file has."""
    for path in (Path(a) for a in argv if a.endswith(".json")):
        if path.is_file():
            ROWS.extend(json.loads(path.read_text())["rows"])


def tokens(*shape: int, of: Any = None) -> torch.Tensor:
    return torch.randint(0, 150_000 if of is None else of.config.vocab_size - 1, shape, device=DEVICE)


def prefill(size: str, models: Models, compiled: Models) -> None:
    """`compiled`: rivals that are compiled for each shape anew, at the large shapes only."""
    for shape in PREFILL if size != "tiny" else [(1, 16), (2, 24)]:
        ids = tokens(*shape, of=models["original"])
        torch.compiler.reset()

        def run(m: Any, ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                m.model(ids, use_cache=False)

        rivals = models | (compiled if shape in COMPILED or size == "tiny" else {})
        row(f"{size} prefill {shape[0]}x{shape[1]}", wall_ms({k: lambda m=m: run(m) for k, m in rivals.items()}))


def decode(size: str, models: Models, context: int = 512, steps: int = 12) -> None:
    for batch in (1, 8, 32) if size != "tiny" else (2,):
        caches: dict[str, DynamicCache] = {}
        ids, one = tokens(batch, context, of=models["original"]), tokens(batch, 1, of=models["original"])

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


def training(size: str, models: Models) -> None:
    """A step with fused AdamW at 4x2048; of 8B forward and backward at 1x2048, since its optimiser's state has no room here."""
    large = size == "8b"
    shape = (1, 2048) if large else (4, 2048) if size != "tiny" else (2, 24)
    ids = tokens(*shape, of=models["original"])
    peaks: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    optimisers = {} if large else {k: torch.optim.AdamW(m.parameters(), lr=1e-5, fused=CUDA) for k, m in models.items()}

    def step(name: str) -> None:
        loss = models[name](ids, labels=ids).loss
        loss.backward()
        if name in optimisers:
            optimisers[name].step()
        models[name].zero_grad()
        losses.setdefault(name, []).append(loss.item())

    for name, m in models.items():
        m.train()
        step(name)
        peaks[name] = round((beyond(lambda name=name: step(name)) + held(m, optimisers.get(name))) / 2**30, 1)
    what = f"{size} training step {shape[0]}x{shape[1]}" + (" (no optimiser)" if large else "")
    last = {k: v[-1] for k, v in losses.items()}
    row(what, wall_ms({k: lambda k=k: step(k) for k in models}, 5), peak_gib=peaks, losses=last)
    for m in models.values():
        m.eval()


def beyond(call: Callable[[], object]) -> int:
    """Bytes that `call` needs at its highest, over what is allocated before."""
    if not CUDA:
        call()
        return 0
    synchronize()
    empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def held(m: Any, optimiser: Any) -> int:
    """Bytes of a model's own parameters and of its optimiser's state."""
    tensors = {p.data_ptr(): p for p in m.parameters()}
    state = [t for s in optimiser.state.values() for t in s.values() if torch.is_tensor(t)] if optimiser else []
    return sum(t.numel() * t.element_size() for t in [*tensors.values(), *state])


def accuracy(size: str, models: Models) -> None:
    ids = tokens(2, 128, of=models["original"])
    exact = copy.deepcopy(models["original"]).float()
    with torch.no_grad():
        want = exact(ids).logits.double()
        errors = {k: float((m(ids).logits.double() - want).norm() / want.norm()) for k, m in models.items()}
    add({"row": f"{size} logits error against float32", "error": errors})
    print(f"{size} logits error against float32", {k: f"{v:.2e}" for k, v in errors.items()}, flush=True)


def graphed(size: str, models: Models) -> None:
    """Prefill of one prompt, each captured once by hand: what is left is what the GPU does."""
    ids = tokens(1, 2048 if size != "tiny" else 16, of=models["original"])
    torch.compiler.reset()
    whole = shared(models["original"])
    whole.model.compile(dynamic=False)
    rivals = {**models, "torch.compile(model)": whole}
    runs, failed = {}, {}
    for name, m in rivals.items():

        def run(m: Any = m) -> None:
            with torch.no_grad():
                m.model(ids, use_cache=False)

        try:
            for _ in range(3):
                run()
            runs[name] = captured([run]).replay if CUDA else run
        except Exception as e:  # a capture may break in any way: the row says how
            if name == "original":
                raise
            failed[name] = f"{type(e).__name__}: {str(e).splitlines()[0]}"
            synchronize()
    row(f"{size} prefill {ids.shape[0]}x{ids.shape[1]} graph", wall_ms(runs), **({"failed": failed} if failed else {}))


def greedy_tokens(size: str, models: Models) -> None:
    import gpu_generate

    there = {**models, "control: attn_implementation=eager": gpu_generate.other_attention(models["original"])}
    exact = copy.deepcopy(models["original"]).float() if size != "8b" else None
    count = 256 if size != "tiny" else 24
    for batch in (1, 8) if size != "tiny" else (2,):
        found = gpu_generate.compare(there, tokens(batch, 16, of=models["original"]), count, exact)
        add({"row": f"{size} greedy {count} tokens batch {batch}", "against_original": found})
        gpu_generate.say(size, batch, found, lambda text: print(text, flush=True))


def generate(size: str, models: Models) -> None:
    import gpu_generate

    for batch in (1, 32) if size != "tiny" else (2,):
        context, new = (512, 16) if size != "tiny" else (8, 4)
        took = gpu_generate.new_lengths(models, batch, context=context, new=new)
        middle = {k: (statistics.median(t), (max(t) - min(t)) / statistics.median(t)) for k, t in took.items()}
        row(f"{size} generate new lengths batch {batch}", middle)


def trained() -> None:
    import gpu_train

    found = gpu_train.compare(lambda m: ks.swap(m, loss=True, require="LMHead"), 200 if CUDA else 40)
    add({"row": "losses over training steps on text", **found})
    print(
        f"losses on text: apart from the original's by {found['apart']} (means of {gpu_train.WINDOW} steps); "
        f"the swap's distance is {'within' if found['within_seeds'] else 'NOT within'} that of another seed",
        flush=True,
    )


def shared(original: Any) -> Any:
    """A copy with the same parameters: modules of its own, no second set of weights."""
    return copy.deepcopy(original, {id(p): p for p in [*original.parameters(), *original.buffers()]})


def rivals(original: Any, asked: set[str], *, copies: bool) -> Models:
    """Who else takes part: Liger, layers compiled. `copies`: with weights of their own, to be trained. Wrong ones do not."""
    made: Models = {}
    if "--liger" in asked:
        import gpu_peers

        if gpu_peers.there("Liger"):
            made["Liger"] = gpu_peers.as_liger((copy.deepcopy if copies else shared)(original))
        else:
            print(f"Liger takes no part: {gpu_peers.WHY['Liger']}", flush=True)
    if "--compile" in asked:
        made["layer.compile()"] = (copy.deepcopy if copies else shared)(original)
        for layer in made["layer.compile()"].model.layers:
            layer.compile(dynamic=False)
    ids = tokens(1, 64, of=original)
    with torch.no_grad():
        want = original.model(ids, use_cache=False).last_hidden_state
        for name in list(made):
            error = relative(made[name].model(ids, use_cache=False).last_hidden_state, want)
            if not error < FAR:
                del made[name]
                print(f"{name} takes no part: its hidden states are {error:.1e} from the original's", flush=True)
    return made


def main(argv: list[str]) -> None:
    asked = {a for a in argv if a.startswith("--")}
    if unknown := asked - FLAGS:
        raise SystemExit(f"{', '.join(sorted(unknown))}: not known here; there are {', '.join(sorted(FLAGS))}")
    only = set(argv[argv.index("--only") + 1].split(",")) if "--only" in asked else set(PARTS)
    if unknown := only - set(PARTS):
        raise SystemExit(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    if "--all" in asked:
        asked |= FLAGS - {"--only", "--add"}
    parts = {p for p in only if p not in OPTIONAL or f"--{p}" in asked or "--only" in asked}
    sizes = [s for s in argv if s in SIZES] or ["0.6b"]
    if not CUDA and sizes != ["tiny"]:
        raise SystemExit("this benchmark needs an NVIDIA GPU; PyTorch sees none here")
    if "--add" in asked:
        keep(argv)
    if "train200" in parts:
        trained()
        parts.discard("train200")
    for size in sizes if parts else ():
        weights = sum(p.numel() for p in model_on_meta(size).parameters()) * 2
        copies_needed = 2 + ("--attention" in asked)
        if weights * (copies_needed + 0.5) > free_bytes():
            print(f"{size} is left out: {copies_needed} copies of its weights do not fit into this GPU's memory", flush=True)
            continue
        one_size(size, asked, parts)
        empty_cache()


def one_size(size: str, asked: set[str], parts: set[str]) -> None:
    original = model(size)
    models = {"original": original, "swapped": copy.deepcopy(original)}
    applied = ks.swap(models["swapped"])
    print(applied.explain())
    if "--attention" in asked:
        ks.install()
        models["swapped+attention"] = copy.deepcopy(original)
        models["swapped+attention"].set_attn_implementation("kernelswap/attention")
        ks.swap(models["swapped+attention"])
    if "accuracy" in parts and size != "8b":
        accuracy(size, models)
    if "prefill" in parts:
        others = rivals(original, asked, copies=False)
        compiled = {k: others.pop(k) for k in list(others) if k == "layer.compile()"}
        prefill(size, models | others, compiled)
        del others, compiled
    if "decode" in parts:
        decode(size, models)
    if "generate" in parts:
        generate(size, models)
    if "tokens" in parts:
        greedy_tokens(size, models)
    if "graph" in parts:
        graphed(size, models)
    if "training" in parts:
        torch.compiler.reset()
        if size != "8b":
            models["swapped+loss"] = copy.deepcopy(original)
            print(ks.swap(models["swapped+loss"], loss=True, require="LMHead").explain())
            models |= rivals(original, asked, copies=True)
        training(size, models)


def model_on_meta(size: str) -> Any:
    config = Qwen3Config(**{"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, **SIZES[size]})
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


if __name__ == "__main__":
    main(sys.argv[1:])
