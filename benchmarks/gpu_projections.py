"""Products of few rows with several weights: rows K10 of the kernels' benchmark. They decide how many rows, if any, ours serve by default.

Shapes are rows x K x columns of all results. "3 F.linear" and "2 F.linear, act*mul" are what a model does; "one F.linear" has the weights
copied into one, which ours need not: it is there to be known, not to be used. `gpu_tune.py --only K10` looks for better blocks of ours.
"""

from __future__ import annotations

import types

import torch
import torch.nn.functional as F
from gpu_rows import Board, copies, fit, randn
from torch import Tensor

MODELS = {"0.6B": (1024, (2048, 1024, 1024), 3072), "8B": (4096, (4096, 1024, 1024), 12288)}
"""Hidden size, columns of q, k and v, and of gate and of up."""
ROWS = (1, 4, 8, 16, 32)


def projections(board: Board, ours: types.SimpleNamespace) -> None:
    for m in ROWS:
        for k, sizes, n in MODELS.values():
            _qkv(board, ours.projections, m, k, sizes)
            _mlp(board, ours, m, k, n)


def _qkv(board: Board, ours: types.SimpleNamespace, m: int, k: int, sizes: tuple[int, ...]) -> None:
    m, k, *sizes = fit(m, k, *sizes)
    kernel, shape, columns = "K10 q/k/v", f"{m}x{k}x{sum(sizes)}", sum(sizes)
    weights = columns * k * 2
    if not board.room(kernel, shape, 8 * weights):
        return
    inputs = []
    for _ in range(copies(weights)):
        three = [randn(size, k) / k**0.5 for size in sizes]
        inputs.append((randn(m, k), *three, torch.cat(three)))

    def eager(x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, q), F.linear(x, k), F.linear(x, v)

    def mine(x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        return ours.project(x, (q, k, v), (None, None, None)) or eager(x, q, k, v, _)

    def one(x: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, whole).split([q.shape[0], k.shape[0], v.shape[0]], -1)

    candidates = {"kernelswap": mine, "3 F.linear": eager, "one F.linear": one}
    board.compare(kernel, shape, _floor(board, weights, m, k + columns), inputs, candidates, eager, 8e-3)


def _mlp(board: Board, ours: types.SimpleNamespace, m: int, k: int, n: int) -> None:
    m, k, n = fit(m, k, n)
    kernel, shape, weights = "K10 gate/up", f"{m}x{k}x{2 * n}", 4 * n * k
    if not board.room(kernel, shape, 8 * weights):
        return
    inputs = []
    for _ in range(copies(weights)):
        gate, up = (randn(n, k) / k**0.5 for _ in range(2))
        inputs.append((randn(m, k), gate, up, torch.cat([gate, up])))

    def exact(x: Tensor, gate: Tensor, up: Tensor, _: Tensor) -> Tensor:
        return F.silu(F.linear(x, gate)) * F.linear(x, up)

    def eager(x: Tensor, gate: Tensor, up: Tensor, _: Tensor) -> Tensor:
        return ours.glu.act_mul(F.linear(x, gate), F.linear(x, up), "silu")

    def mine(x: Tensor, gate: Tensor, up: Tensor, _: Tensor) -> Tensor:
        found = ours.projections.gate_up(x, gate, up, act="silu")
        return eager(x, gate, up, _) if found is None else found

    def one(x: Tensor, _gate: Tensor, _up: Tensor, both: Tensor) -> Tensor:
        a, b = F.linear(x, both).chunk(2, -1)
        return F.silu(a) * b

    candidates = {
        "kernelswap": mine,
        "2 F.linear, act*mul": eager,  # ours, as SwiGLUMLP calls it: what a swapped model does without these
        "eager": exact,
        "one F.linear": one,
    }
    board.compare(kernel, shape, _floor(board, weights, m, k + n), inputs, candidates, exact, 8e-3)


def _floor(board: Board, weights: int, m: int, activations: int) -> float:
    """Microseconds: nearly all of it is read, so over the read bandwidth."""
    return (weights + 2 * m * activations) / board.read * 1e6
