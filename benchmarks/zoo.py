"""How sharp is the check? Every faulty kernel of the zoo, and every correct one that rounds differently, over many random draws.

    python benchmarks/zoo.py --draws 1000 --jobs 16 --device cpu --out benchmarks/results/zoo.json

A draw is a width (32 to 2048, odd ones included), a dtype, a seed of inputs and parameters, and for the correct ones inference or
training. Prints how many of each were refused, and the draws that came out wrong.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
os.environ["OMP_NUM_THREADS"] = "1"
CHUNK = 10  # seeds between two looks at the file


def one(draw):
    name, dtype, width, seed, training, device = draw
    import torch
    from tests.proof import zoo

    from kernelswap.proof import Check

    torch.set_num_threads(1)
    specimen = replace(zoo.by_name()[name], training=training)
    start = time.perf_counter()
    verdict = zoo.prove(Check(None, seed=seed), specimen, getattr(torch, dtype), width, device=device)
    return draw, verdict.accepted, verdict.reason, time.perf_counter() - start


def draws(specimen, seed, device):
    """One draw: the same for the same seed, whatever else is drawn."""
    from tests.proof import zoo

    source = random.Random(f"{specimen.name} {seed}")
    width, dtype = specimen.width(source), str(source.choice(specimen.dtypes)).removeprefix("torch.")
    training = specimen.training if specimen in zoo.WRONG else specimen.training and source.random() < 0.5
    return specimen.name, dtype, width, seed, training, device


def report(result):
    for title, faulty in (("faulty", True), ("correct", False)):
        group = {n: s for n, s in result["specimens"].items() if s["faulty"] == faulty}
        missed = sum(s["draws"] - s["refused"] if faulty else s["refused"] for s in group.values())
        print(f"\n{title}: {len(group)} kernels, {sum(s['draws'] for s in group.values())} draws, {missed} judged wrongly")
        for n, s in group.items():
            print(f"  {n:45} refused {s['refused']:5} of {s['draws']:5}   {1e3 * s['seconds'] / s['draws']:6.0f} ms each")
    for surprise in result["surprises"][:40]:
        print("surprise:", *surprise)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000, help="of each specimen")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--out", type=Path, help="written as it goes; a run that was stopped goes on from it")
    arguments = parser.parse_args()
    import torch
    from tests.proof import zoo

    wrong = {s.name for s in zoo.WRONG}
    specimens = [s for s in (*zoo.WRONG, *zoo.RIGHT) if arguments.only in s.name]
    result = {
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "torch": torch.__version__,
        "seeds": 0,
        "specimens": {s.name: {"faulty": s.name in wrong, "draws": 0, "refused": 0, "seconds": 0.0} for s in specimens},
        "surprises": [],
    }
    if arguments.out and arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        while result["seeds"] < arguments.draws:
            seeds = range(result["seeds"], min(result["seeds"] + CHUNK, arguments.draws))
            todo = [draws(s, seed, arguments.device) for seed in seeds for s in specimens]
            for draw, accepted, reason, took in pool.imap_unordered(one, todo, chunksize=4):
                about = result["specimens"][draw[0]]
                about["draws"] += 1
                about["refused"] += not accepted
                about["seconds"] += took
                if accepted == about["faulty"]:
                    result["surprises"].append((*draw, reason))
            result["seeds"] = seeds.stop
            if arguments.out:
                arguments.out.write_text(json.dumps(result, indent=1) + "\n")
            print(f"{seeds.stop} of {arguments.draws}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    report(result)
    return 1 if result["surprises"] else 0


if __name__ == "__main__":
    sys.exit(main())
