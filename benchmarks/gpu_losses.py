"""Cross entropy, and the head with its loss: rows K6 and K7 of the kernels' benchmark."""

from __future__ import annotations

import functools
import types

import gpu_peers
import torch
import torch.nn.functional as F
from gpu_rows import Board, fit, randn
from gpu_timing import CUDA, DEVICE, empty_cache, peak_since, queued_us
from torch import Tensor


def cross_entropy(board: Board, ours: types.SimpleNamespace) -> None:
    def upcast(z: Tensor, target: Tensor) -> Tensor:
        """As Transformers does it."""
        return F.cross_entropy(z.float() if z.dtype is torch.bfloat16 else z, target)

    for t, v in (fit(*s) for s in ((4096, 151936), (8192, 151936))):
        kernel, shape = "K6 cross entropy f+b", f"{t}x{v}"
        if not board.room(kernel, shape, t * v * 26):
            continue
        inputs = [(randn(t, v), torch.randint(0, v, (t,), device=DEVICE))]
        one = torch.ones((), device=DEVICE)
        candidates = {
            "kernelswap": ours.cross_entropy.cross_entropy,
            "torch bf16": F.cross_entropy,
            "eager": upcast,
            **gpu_peers.cross_entropy(),
            **board.compiled(upcast),
        }
        board.compare(
            kernel, shape, t * v * 4 / board.bandwidth * 1e6, inputs, candidates, F.cross_entropy, 6e-3,
            grads=[(one,)], wanted=(0,), clock=queued_us,
            subset=lambda args, dy: ((args[0][:32], args[1][:32]), dy),
        )  # fmt: skip
        del inputs, candidates
        empty_cache()


def linear_cross_entropy(board: Board, ours: types.SimpleNamespace) -> None:
    def eager(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        """As Transformers does it."""
        z = x @ w.t()
        return F.cross_entropy(z.float() if z.dtype is torch.bfloat16 else z, target)

    def mine(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return ours.loss.linear_cross_entropy(x, w, None, target)

    v = 151936
    several = 2560  # tokens of the check: more than one piece of logits, and room for them in float64
    for t, h, vocab in (fit(*s) for s in ((8192, 1024, v), (8192, 4096, v))):
        kernel, shape = "K7 LM head + CE f+b", f"{t}x{h}x{vocab}"
        if not board.room(kernel, shape, t * vocab * 12 + several * vocab * 32 + vocab * h * 24):
            continue
        x, w, target = randn(t, h), randn(vocab, h) * 0.02, torch.randint(0, vocab, (t,), device=DEVICE)
        candidates = {
            "kernelswap": mine,
            "eager": eager,
            **gpu_peers.linear_cross_entropy(),
            **board.compiled(eager),
        }
        one = torch.ones((), device=DEVICE)
        entry = board.compare(
            kernel, shape, 6 * t * h * vocab / board.rate * 1e6, [(x, w, target)], candidates, eager, 1e-2,
            grads=[(one,)], wanted=(0, 1), clock=functools.partial(queued_us, replays=3),
            subset=lambda args, dy: ((args[0][:several], args[1], args[2][:several]), dy),
        )  # fmt: skip
        if "us" in entry:

            def step(x: Tensor = x, w: Tensor = w, target: Tensor = target) -> None:
                p, q = x.detach().requires_grad_(), w.detach().requires_grad_()
                torch.autograd.grad(mine(p, q, target), (p, q))

            beyond = peak_since(step) - (t * h + vocab * h) * 2 if CUDA else 0
            entry["gib_beyond_gradients"] = round(beyond / 2**30, 3)
            board.save()
            print(f"{'':22} {'':16} {beyond / 2**30:.2f} GiB beyond the gradients", flush=True)
        del x, w, candidates
        empty_cache()
