"""The head and its loss, with `swap(model, loss=True)` and without: time of a training step's head and peak memory.

Each implementation runs in a process of its own, which reports the peak of its resident memory over what it held before the first
whole step (Linux); the rounds of the timing alternate the processes. The original is an `nn.Linear` followed by Transformers' `ForCausalLMLoss`.

    python benchmarks/loss.py [--vocab 50304] [--hidden 512] [--tokens 2048] [--dtype float32] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn


def peak(*, anew=False):
    """Bytes of resident memory at their highest since the start, or since the last `anew`. Linux keeps the figure."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


class Model(nn.Module):
    def __init__(self, hidden, vocab, dtype):
        super().__init__()
        self.lm_head = nn.Linear(hidden, vocab, bias=False, dtype=dtype)

    def forward(self, x, labels):
        from transformers.loss.loss_utils import ForCausalLMLoss

        logits = self.lm_head(x)
        return ForCausalLMLoss(logits, labels, logits.shape[-1]), logits


def serve(args):
    """Answer each line on stdin with one step's seconds; the last one with the peak."""
    import kernelswap

    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = Model(args.hidden, args.vocab, dtype).train()
    x = torch.randn(1, args.tokens, args.hidden, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, args.vocab, (1, args.tokens))

    def step(tokens=args.tokens):
        model.lm_head.weight.grad = x.grad = None
        start = time.perf_counter()
        loss, _ = model(x[:, :tokens], labels[:, :tokens])
        loss.backward()
        return time.perf_counter() - start, loss.item()

    if args.serve == "kernel":
        kernelswap.swap(model, loss=True, only="LMHead", check="off", require="LMHead")
    step(64)
    before = peak(anew=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)
    print(json.dumps(peak() - before), flush=True)


def main():
    parser = argparse.ArgumentParser()
    for name, default in (("vocab", 50304), ("hidden", 512), ("tokens", 2048), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args)
    names = ("original", "kernel")
    command = [sys.executable, __file__, *sys.argv[1:], "--serve"]
    started = {
        n: subprocess.Popen([*command, n], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for n in names
    }
    seen = {n: [] for n in names}
    for i in range(args.rounds):
        for n in names if i % 2 else names[::-1]:
            started[n].stdin.write("go\n")
            seen[n].append(json.loads(started[n].stdout.readline()))
    peaks = {}
    for n, process in started.items():
        process.stdin.close()
        peaks[n] = json.loads(process.stdout.readline())
        process.wait()
    ratio = statistics.median(a[0] / b[0] for a, b in zip(seen["original"], seen["kernel"], strict=True))
    print(f"{args.tokens} tokens, hidden {args.hidden}, vocabulary {args.vocab}, {args.dtype}, {torch.get_num_threads()} threads")
    for n in names:
        seconds = statistics.median(s for s, _ in seen[n])
        print(
            f"  {n:<9} {seconds:7.2f} s   peak {peaks[n] / 2**20:7.0f} MiB over the weights and inputs   loss {seen[n][0][1]:.6f}"
        )
    print(f"  kernel against original: {ratio:.2f}x the speed, {peaks['kernel'] / peaks['original']:.2f} of the memory")
    return None


if __name__ == "__main__":
    main()
