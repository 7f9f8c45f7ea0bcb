"""Products of few rows with several weights: rows K10 of the kernels' benchmark. They decide how many rows, if any, ours serve by default.

Shapes are rows x K x columns of all results. "3 F.linear" and "2 F.linear, act*mul" are what a model does; "one F.linear" has the weights
copied into one, which ours need not: it is there to be known, not to be used. `tile`: ours with other blocks
(columns x K, stages, warps), without `--quick` at 1 and 8 rows.
"""

from __future__ import annotations

import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_rows import Board, copies, fit, randn
from gpu_timing import CUDA
from torch import Tensor

MODELS = {"0.6B": (1024, (2048, 1024, 1024), 3072), "8B": (4096, (4096, 1024, 1024), 12288)}
"""Hidden size, columns of q, k and v, and of gate and of up."""
ROWS = (1, 4, 8, 16, 32)
TILES = {
    True: ((4, 512, 4, 4), (8, 256, 6, 4), (8, 1024, 3, 4), (16, 256, 4, 4), (4, 1024, 3, 8)),
    False: ((16, 128, 6, 2), (16, 256, 4, 4), (32, 64, 6, 4), (32, 128, 5, 4), (32, 256, 3, 4), (64, 128, 3, 4)),
}
"""Of one row, and of several."""


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

    def mine(tile: tuple[int, ...] | None = None) -> Callable[..., tuple[Tensor, ...]]:
        def run(x: Tensor, q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            return ours.project(x, (q, k, v), (None, None, None), tile) or eager(x, q, k, v, _)

        return run

    def one(x: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, whole).split([q.shape[0], k.shape[0], v.shape[0]], -1)

    candidates = {"kernelswap": mine(), "3 F.linear": eager, "one F.linear": one, **_tiles(board, m, mine)}
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

    def mine(tile: tuple[int, ...] | None = None) -> Callable[..., Tensor]:
        def run(x: Tensor, gate: Tensor, up: Tensor, _: Tensor) -> Tensor:
            found = ours.projections.gate_up(x, gate, up, act="silu", tile=tile)
            return eager(x, gate, up, _) if found is None else found

        return run

    def one(x: Tensor, _gate: Tensor, _up: Tensor, both: Tensor) -> Tensor:
        a, b = F.linear(x, both).chunk(2, -1)
        return F.silu(a) * b

    candidates = {
        "kernelswap": mine(),
        "2 F.linear, act*mul": eager,  # ours, as SwiGLUMLP calls it: what a swapped model does without these
        "eager": exact,
        "one F.linear": one,
        **_tiles(board, m, mine),
    }
    board.compare(kernel, shape, _floor(board, weights, m, k + n), inputs, candidates, exact, 8e-3)


def _floor(board: Board, weights: int, m: int, activations: int) -> float:
    """Microseconds: nearly all of it is read, so over the read bandwidth."""
    return (weights + 2 * m * activations) / board.read * 1e6


def _tiles(board: Board, m: int, mine: Callable[..., Callable[..., object]]) -> dict[str, Callable[..., object]]:
    if board.quick or m not in (1, 8) or not CUDA:
        return {}
    return {"tile " + "x".join(map(str, tile)): mine(tile) for tile in TILES[m == 1]}
