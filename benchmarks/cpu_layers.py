"""The bundled CPU layers against the eager modules they stand in for: one table, one JSON file.

Every row is measured in rounds, each round timing every implementation once in turn, so that a neighbour's load hits both;
the ratio is the median of the rounds' ratios. The floor is the bytes that must move (inputs once, outputs once) over the
bandwidth that a plain copy of the same number of bytes reaches in the same rounds.

    python benchmarks/cpu_layers.py [--quick] [--only rms,silu] [--threads 2]
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation, QuickGELUActivation
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernelswap import build, machine

HERE = Path(__file__).parent
SOURCES = Path(build.__file__).parent / "bundled" / "layers"
SHAPES = ((1, 1024), (16, 1024), (512, 1024), (4096, 1024), (4096, 4096))


def load(into: Path):
    """The compiled package, imported the way any kernel is: under its id."""
    path = build.compile(SOURCES, machine.for_backend(machine.look(), "cpu"), into)
    name = json.loads((path / "metadata.json").read_bytes())["id"]
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py", submodule_search_locations=[str(path)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def swapped(module: nn.Module, layer: type) -> nn.Module:
    """`module` with the forward of `layer`, by class, as a swap does it."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = module.__dict__
    twin.__class__ = type(type(module).__name__, (type(module),), {"forward": layer.forward})
    return twin


class SiluMul(nn.Module):
    def forward(self, gate, up):
        return nn.functional.silu(gate) * up


class GeluMul(nn.Module):
    def forward(self, gate, up):
        return nn.functional.gelu(gate, approximate="tanh") * up


class Halves(nn.Module):
    """What diffusers' GEGLU and SwiGLU do behind their projection."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        half, gate = x.chunk(2, -1)
        return half * self.act(gate)


def halves(functional, act):
    def ours(x):
        half, gate = x.chunk(2, -1)
        return functional.act_mul(gate, half, act)

    return ours


class Rotary(nn.Module):
    def forward(self, q, k, cos, sin):
        return apply_rotary_pos_emb(q, k, cos, sin)


def cases(kernel, rows, n, dtype):
    """(name, eager, ours, inputs, tensors read, tensors written), the last two in units of rows * n elements."""
    layers, functional = kernel.layers, kernel.functional
    x, y = torch.randn(rows, n, dtype=dtype), torch.randn(rows, n, dtype=dtype)

    def module(name, original, layer):
        original = original.to(dtype)
        return name, original, swapped(original, layer), (x,), 1, 1

    yield module("rms_norm", LlamaRMSNorm(n), layers.RMSNorm)
    yield module("rms_norm_gemma", Gemma3RMSNorm(n), layers.RMSNormZeroCentered)
    yield module("layer_norm", nn.LayerNorm(n), layers.LayerNorm)
    yield "silu_mul", SiluMul(), lambda gate, up: functional.act_mul(gate, up, "silu"), (x, y), 2, 1
    yield "gelu_tanh_mul", GeluMul(), lambda gate, up: functional.act_mul(gate, up, "gelu_tanh"), (x, y), 2, 1
    both = torch.randn(rows, 2 * n, dtype=dtype)
    yield "geglu_halves", Halves(nn.functional.gelu), halves(functional, "gelu"), (both,), 2, 1
    yield "swiglu_halves", Halves(nn.functional.silu), halves(functional, "silu"), (both,), 2, 1
    yield module("silu", nn.SiLU(), layers.SiLU)
    yield module("gelu", nn.GELU(), layers.GELU)
    yield module("gelu_tanh", nn.GELU(approximate="tanh"), layers.GELUTanh)
    yield module("new_gelu", NewGELUActivation(), layers.NewGELU)
    yield module("fast_gelu", FastGELUActivation(), layers.FastGELU)
    yield module("quick_gelu", QuickGELUActivation(), layers.QuickGELU)
    heads = max(1, n // 128)
    q = torch.randn(1, rows, heads, 128, dtype=dtype).transpose(1, 2)
    k = torch.randn(1, rows, heads, 128, dtype=dtype).transpose(1, 2)
    angle = torch.randn(1, rows, 64)
    angle = torch.cat((angle, angle), -1)
    yield "rotary", Rotary(), layers.apply_rotary_pos_emb, (q, k, angle.cos().to(dtype), angle.sin().to(dtype)), 2, 2


def step(f, inputs, training):
    if not training:
        return lambda: f(*inputs)
    inputs = [t.detach().requires_grad_() if t.dim() != 3 else t for t in inputs]
    grads = None

    def run():
        nonlocal grads
        out = f(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        if grads is None:
            grads = [torch.ones_like(t) for t in out]
        for t in inputs:
            t.grad = None
        torch.autograd.backward(out, grads)

    return run


def measure(functions, rounds, budget):
    """Seconds of each function in each round. One thread: of that thread's own time, which neighbours do not lengthen."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = []
    for f in functions:
        f()
        start = clock()
        f()
        calls.append(max(1, int(budget / max(1e-7, clock() - start))))
    times = [[] for _ in functions]
    for order in itertools.islice(itertools.cycle(itertools.permutations(range(len(functions)))), rounds):  # each after each
        for i in order:
            start = clock()
            for _ in range(calls[i]):
                functions[i]()
            times[i].append((clock() - start) / calls[i])
    return times


def row(case, rows, n, dtype, training, rounds, budget):
    name, eager, ours, inputs, read, written = case
    width = torch.empty(0, dtype=dtype).element_size()
    moved = (read + written) * rows * n * width * (2 if training else 1) + (read * rows * n * width if training else 0)
    source = torch.empty(max(1, moved // 8), dtype=torch.float32).fill_(1.0)
    target = torch.empty_like(source)
    with torch.set_grad_enabled(training):
        functions = [step(eager, inputs, training), step(ours, inputs, training), lambda: target.copy_(source)]
        t_eager, t_ours, t_copy = measure(functions, rounds, budget)
    ratios = [a / b for a, b in zip(t_eager, t_ours, strict=True)]
    return {
        "op": name + ("+backward" if training else ""),
        "rows": rows,
        "n": n,
        "dtype": str(dtype).removeprefix("torch."),
        "eager_us": statistics.median(t_eager) * 1e6,
        "ours_us": statistics.median(t_ours) * 1e6,
        "floor_us": statistics.median(t_copy) * 1e6,
        "ratio": statistics.median(ratios),
        "ratio_low": sorted(ratios)[len(ratios) // 10],
        "of_floor": statistics.median(c / o for c, o in zip(t_copy, t_ours, strict=True)),
    }


def cpu():
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", default="", help="names, comma-separated; a prefix is enough")
    parser.add_argument("--shapes", default="", help="rows x columns, comma-separated: 1x1024,512x1024")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--built", type=Path, help="where compiled kernels are kept (default: a fresh directory)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "cpu_layers.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rounds, budget = (12, 0.01) if args.quick else (30, 0.03)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")] if args.shapes else SHAPES
    wanted = tuple(args.only.split(","))
    found = []
    with tempfile.TemporaryDirectory() as fresh:
        start = time.perf_counter()
        kernel = load(args.built or Path(fresh))
        compiled = time.perf_counter() - start
        facts = {
            "torch": torch.__version__,
            "threads": args.threads,
            "cpu": cpu(),
            "compile_s": round(compiled, 1),
            "rounds": rounds,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        print(f"torch {torch.__version__}, {args.threads} threads, compiled and imported in {compiled:.1f} s")
        print(
            f"{'op':22} {'rows':>5} {'n':>5} {'dtype':9} {'eager us':>10} {'ours us':>10} {'copy us':>10} {'eager/ours':>10} {'p10':>6} {'of copy':>7}"
        )
        for dtype in (torch.float32, torch.bfloat16):
            for rows, n in shapes:
                for case in cases(kernel, rows, n, dtype):
                    if not case[0].startswith(wanted):
                        continue
                    r = {
                        k: round(v, 3) if isinstance(v, float) else v
                        for k, v in row(case, rows, n, dtype, args.training, rounds, budget).items()
                    }
                    found.append(r)
                    part = args.output.with_suffix(".part")
                    part.write_text(json.dumps({"machine": facts, "rows": found}, indent=1))
                    part.replace(args.output)  # whoever ends this run finds whole rows
                    print(
                        f"{r['op']:22} {rows:5} {n:5} {r['dtype']:9} {r['eager_us']:10.1f} {r['ours_us']:10.1f} {r['floor_us']:10.1f} "
                        f"{r['ratio']:10.2f} {r['ratio_low']:6.2f} {r['of_floor']:7.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
