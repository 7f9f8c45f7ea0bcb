"""How sharp is the check? Every faulty kernel of the zoo, and every correct one that rounds differently, over many random draws.

    python benchmarks/zoo.py --draws 1000 --jobs 16 --device cpu --out benchmarks/results/zoo.json

A draw is a width (32 to 2048, odd ones included), a dtype, a seed of inputs and parameters, and for the correct ones inference or
training. Prints how many of each were refused, and the draws that came out wrong.
"""

import argparse
import collections
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


def draws(specimen, count, device):
    from tests.proof import zoo

    source = random.Random(specimen.name)
    for seed in range(count):
        width, dtype = specimen.width(source), str(source.choice(specimen.dtypes)).removeprefix("torch.")
        training = specimen.training if specimen in zoo.WRONG else specimen.training and source.random() < 0.5
        yield specimen.name, dtype, width, seed, training, device


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=1000, help="of each specimen")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import torch
    from tests.proof import zoo

    specimens = [s for s in (*zoo.WRONG, *zoo.RIGHT) if arguments.only in s.name]
    todo = [d for s in specimens for d in draws(s, arguments.draws, arguments.device)]
    random.Random(0).shuffle(todo)
    accepted, total, seconds, surprises = collections.Counter(), collections.Counter(), collections.Counter(), []
    wrong = {s.name for s in zoo.WRONG}
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for done, (draw, fine, reason, took) in enumerate(pool.imap_unordered(one, todo, chunksize=8), 1):
            accepted[draw[0]] += fine
            total[draw[0]] += 1
            seconds[draw[0]] += took
            if fine == (draw[0] in wrong):
                surprises.append((*draw, reason))
            if done % 2000 == 0:
                print(f"{done} of {len(todo)}, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    for title, group, good in (("faulty", zoo.WRONG, 0), ("correct", zoo.RIGHT, 1)):
        names = [s.name for s in group if s.name in total]
        missed = sum(abs(accepted[n] - good * total[n]) for n in names)
        print(f"\n{title}: {len(names)} kernels, {sum(total[n] for n in names)} draws, {missed} judged wrongly")
        for n in names:
            print(f"  {n:45} refused {total[n] - accepted[n]:5} of {total[n]:5}   {1e3 * seconds[n] / total[n]:6.0f} ms each")
    for surprise in surprises[:40]:
        print("surprise:", *surprise)
    if arguments.out:
        result = {
            "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
            "torch": torch.__version__,
            "draws": arguments.draws,
            "specimens": {n: {"faulty": n in wrong, "draws": total[n], "refused": total[n] - accepted[n]} for n in total},
            "surprises": surprises[:200],
        }
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main())
