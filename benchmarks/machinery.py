"""What our own machinery costs: importing, finding, planning, applying, calling. Ratios and medians of one run.

    python benchmarks/machinery.py [--rounds 15] [--layers 28]

Needs no network, no GPU and no compiler: the kernels are plain torch, served by a hub on loopback. Prints a table to
stderr and JSON to stdout; exit code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]


def interleaved(functions, rounds):
    """Seconds of each, taking turns."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def python(code):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def importing(rounds):
    seconds = interleaved({"pass": python("pass"), "kernelswap": python("import kernelswap")}, rounds)
    pairs = [b / a for a, b in zip(seconds["pass"], seconds["kernelswap"], strict=True)]
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, kernelswap; print([m for m in ('torch', 'huggingface_hub') if m in sys.modules])"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    return {"import / python -c pass": (statistics.median(pairs), 1.5), "heavy imports": (len(json.loads(loaded.stdout)), 0)}


def model(layers):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    )
    return Qwen3ForCausalLM(config).eval()


def hub_table(spec):
    from tests import swapping

    from kernelswap.types import Use

    def moved(row):
        uses = tuple(Use(f"{spec}:{use.spec.rpartition(':')[2]}", use.on, use.modes) for use in row.use)
        return row.__class__(**{**{f: getattr(row, f) for f in row.__slots__}, "use": uses})

    return [moved(row) for row in swapping.rows(Path("nowhere"))]


def swapping_and_finding(rounds, layers):
    import torch
    from tests import swapping
    from tests.hub import Hub, kernel_files

    from kernelswap.api import Swapper
    from kernelswap.sources.hub import HubSource

    torch.set_num_threads(1)
    with Hub() as hub, tempfile.TemporaryDirectory() as at:
        hub.organization("org", trusted=True)
        files = kernel_files("torch-cpu", "from . import layers", name="plain", files={"layers.py": swapping.LAYERS})
        spec = f"org/plain@{hub.repo('org/plain').branch('v1', files)}"

        def make():
            source = HubSource(Path(at) / "hub", endpoint=hub.url)
            return Swapper(cache=Path(at) / "cache", sources={"hub": source}, table=hub_table(spec))

        make().load(spec)
        swapper, subject = make(), model(layers)
        start = time.perf_counter()
        sites = swapper.swap(subject, hub=True).report["swapped"]
        cold = time.perf_counter() - start
        swapper.unkernelize(subject)

        asked = len(hub.log)
        seconds = {"plan + apply": [], "plan + apply, CPU": [], "find + load": []}
        for _ in range(rounds):
            start, cpu = time.perf_counter(), time.process_time()
            swapper.swap(subject, hub=True)
            seconds["plan + apply, CPU"].append(time.process_time() - cpu)
            seconds["plan + apply"].append(time.perf_counter() - start)
            swapper.unkernelize(subject)
            another = make()  # with nothing in its own memory but what this process has imported
            _ = another.machine
            start = time.perf_counter()
            another.find(spec)
            another.load(spec)
            seconds["find + load"].append(time.perf_counter() - start)
        requests = len(hub.log) - asked
        calls = calling(swapper, rounds)
    return {
        "sites swapped": (sites, None),
        f"first plan + apply of {layers} layers with its proofs, ms": (cold * 1e3, None),
        # one thread works here: CPU time is wall time on a machine that does nothing else, and holds on a busy one too
        f"warm plan + apply of {layers} layers, ms of CPU": (statistics.median(seconds["plan + apply, CPU"]) * 1e3, 25.0),
        f"warm plan + apply of {layers} layers, ms of wall time": (statistics.median(seconds["plan + apply"]) * 1e3, None),
        "warm find + load of a pinned kernel, ms": (statistics.median(seconds["find + load"]) * 1e3, 5.0),
        "requests of all that": (requests, 0),
        **calls,
    }


def calling(swapper, rounds):
    """A swapped module against a class that has the kernel's forward by itself."""
    import torch
    from tests.swapping import RMSNorm

    module, x = RMSNorm(16).eval(), torch.randn(1, 16)
    swapper.swap(module, hub=True)
    with torch.no_grad():
        module(x)  # the first call is checked
        forward = swapper.applied(module).outcomes[0].inference.implementation.forward
        by_hand = type("ByHand", (RMSNorm,), {"forward": forward})(16).eval()
        count = 500

        def run(m):
            return lambda: [m(x) for _ in range(count)]

        seconds = interleaved({"by hand": run(by_hand), "swapped": run(module)}, rounds)
        frames = _frames(module, x) - _frames(by_hand, x)
    ratio = statistics.median(b / a for a, b in zip(seconds["by hand"], seconds["swapped"], strict=True))
    return {"swapped call / kernel's own forward": (ratio, 1.05), "extra Python frames in a swapped call": (frames, 0)}


def _frames(module, x):
    frames = 0

    def count(frame, event, arg):  # noqa: ARG001  # the signature that sys.setprofile asks for
        nonlocal frames
        frames += event == "call"

    sys.setprofile(count)
    try:
        module(x)
    finally:
        sys.setprofile(None)
    return frames


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--layers", type=int, default=28)
    options = parser.parse_args()
    found = {**importing(options.rounds), **swapping_and_finding(options.rounds, options.layers)}
    missed = [name for name, (value, target) in found.items() if target is not None and value > target]
    for name, (value, target) in found.items():
        bound = "" if target is None else f"  target <= {target:g}{'  MISSED' if name in missed else ''}"
        print(f"{name:56} {value:9.3f}{bound}", file=sys.stderr)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    facts = {"python": sys.version.split()[0], "cpus": os.cpu_count(), "load": load, "rounds": options.rounds}
    print(json.dumps({**facts, "found": {n: {"value": v, "target": t} for n, (v, t) in found.items()}}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
