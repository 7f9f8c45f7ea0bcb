"""How sharp is the check? Every faulty kernel of the zoo, and every correct one that rounds differently, over many random draws.

    python benchmarks/zoo.py --draws 1000 --jobs 16 --device cpu --out benchmarks/results/zoo.json
    python benchmarks/zoo.py --only faulty --seconds 600 --out ...     # a piece of it; the next one goes on from there

A draw is a width (32 to 2048, odd ones included), a dtype, a seed of inputs and parameters, and for the correct ones inference or
training. Those that take their process down meet it in a child process, as native kernels do. Prints how many of each were
refused, and the draws that came out wrong.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ["OMP_NUM_THREADS"] = "1"
CHUNK = 10  # draws of each between two looks at the file
HANGS = 0.25  # seconds that a kernel may take in the child where it is known never to come back
CRASHES = 20.0  # and elsewhere


class Crashes:
    """One child process for all draws of this worker, and the kernels that end it, as files."""

    def __init__(self):
        from kernelswap.proof import Check

        self.folder = tempfile.TemporaryDirectory()
        self.check = Check(None)
        self.contact = self.check.contact

    def one(self, name, dtype, width, seed, training):
        """The verdict on one that crashes, hangs or raises."""
        import torch
        from tests.proof import zoo, zoo_crash
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        from kernelswap.proof import Check
        from kernelswap.types import Run

        root = Path(self.folder.name) / f"{name}{seed}"
        body = {**zoo_crash.CRASHES, **zoo_crash.HARMLESS}[name]
        found = zoo_crash.artifact(root, f"{body}\n        # {seed}")
        module = LlamaRMSNorm(width).to(dtype).train(training)
        check = Check(None, seed=seed)
        check.contact = self.contact
        self.contact.time_limit = HANGS if name == "hangs" else CRASHES
        here = zoo_crash.raising if name == "raises" else zoo_crash.never_called if name in zoo_crash.CRASHES else zoo_crash.norm
        kernel = zoo_crash.implementation(found, here)
        where = replace(zoo.site(module, "rows"), dtype=str(dtype), device="cpu")
        torch.manual_seed(seed)
        return check.equivalent(where, module, LlamaRMSNorm.forward, kernel, Run(training=training))


_CRASHES = []


def one(draw):
    name, dtype, width, seed, training, device, kind = draw
    import torch
    from tests.proof import zoo

    from kernelswap.proof import Check

    torch.set_num_threads(1)
    start = time.perf_counter()
    if kind == "crashing":
        if not _CRASHES:
            _CRASHES.append(Crashes())
        verdict = _CRASHES[0].one(name, getattr(torch, dtype), width, seed, training)
        if name != "raises" and "in a child process" not in verdict.reason:  # refused for its numbers: it got past the child
            verdict = replace(verdict, accepted=True)
    else:
        specimen = replace(zoo.by_name()[name], training=training)
        verdict = zoo.prove(Check(None, seed=seed), specimen, getattr(torch, dtype), width, device=device)
    return draw, verdict.accepted, verdict.reason, time.perf_counter() - start


def draws(name, kind, seed, device):
    """One draw: the same for the same seed, whatever else is drawn."""
    from tests.proof import zoo

    source = random.Random(f"{name} {seed}")
    specimen = zoo.by_name()[name] if kind != "crashing" else zoo.Specimen(name, "llama", lambda: None)
    width, dtype = specimen.width(source), str(source.choice(specimen.dtypes)).removeprefix("torch.")
    training = specimen.training if kind == "faulty" else (specimen.training or kind == "crashing") and source.random() < 0.5
    return name, dtype, width, seed, training, device, kind


def known():
    """Name to kind: `faulty`, `crashing` (faulty, too), `correct`."""
    from tests.proof import zoo, zoo_crash

    found = {s.name: "faulty" for s in zoo.WRONG} | dict.fromkeys((*zoo_crash.CRASHES, "raises"), "crashing")
    return found | {s.name: "correct" for s in zoo.RIGHT}


def report(result):
    for kind in ("faulty", "crashing", "correct"):
        group = {n: s for n, s in result["specimens"].items() if s["kind"] == kind and s["draws"]}
        if not group:
            continue
        missed = sum(s["refused"] if kind == "correct" else s["draws"] - s["refused"] for s in group.values())
        print(f"\n{kind}: {len(group)} kernels, {sum(s['draws'] for s in group.values())} draws, {missed} judged wrongly")
        for n, s in group.items():
            print(f"  {n:45} refused {s['refused']:5} of {s['draws']:5}   {1e3 * s['seconds'] / s['draws']:6.0f} ms each")
    for surprise in result["surprises"][:40]:
        print("surprise:", *surprise)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000, help="of each specimen")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="faulty, crashing, correct, or part of a name")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new is begun")
    parser.add_argument("--out", type=Path, help="written as it goes; a run that was stopped goes on from it")
    arguments = parser.parse_args()
    import torch

    kinds = known()
    if arguments.device != "cpu":
        kinds = {n: kind for n, kind in kinds.items() if kind != "crashing"}
    result = {"device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu", "torch": torch.__version__}
    result |= {"specimens": {}, "surprises": []}
    if arguments.out and arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    for name, kind in kinds.items():
        result["specimens"].setdefault(name, {"kind": kind, "draws": 0, "refused": 0, "seconds": 0.0})
    only = {n for n, kind in kinds.items() if arguments.only == kind}
    wanted = only or {n for n in kinds if arguments.only in n}
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        while time.perf_counter() - start < arguments.seconds:
            least = min(result["specimens"][n]["draws"] for n in wanted)
            end = min(least + CHUNK, arguments.draws)
            todo = [
                draws(n, kinds[n], seed, arguments.device)
                for n in kinds
                if n in wanted
                for seed in range(result["specimens"][n]["draws"], end)
            ]
            if not todo:
                break
            for draw, accepted, reason, took in pool.imap_unordered(one, todo, chunksize=4):
                about = result["specimens"][draw[0]]
                about["draws"] += 1
                about["refused"] += not accepted
                about["seconds"] += took
                if accepted == (about["kind"] != "correct"):
                    result["surprises"].append((*draw, reason))
            if arguments.out:
                part = arguments.out.with_suffix(".part")
                part.write_text(json.dumps(result, indent=1) + "\n")
                part.replace(arguments.out)
            print(f"{end} of {arguments.draws}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    report(result)
    return 1 if result["surprises"] else 0


if __name__ == "__main__":
    sys.exit(main())
