"""Products of few rows with several weights, in one launch, the weights read where they lie: q/k/v, and gate and up with what follows.

    project:  y_i = x W_i^T + b_i    i = 1, 2, 3          gate_up:  y = act(x W_g^T + b_g) * (x W_u^T + b_u)

Shapes: x (..., K), W_i (N_i, K), b_i (N_i,) or None, y_i (..., N_i). Sums in float32, rounded once; gate, up and act(gate) are
rounded to x's dtype in between, as eager does. Source of the second: Shazeer 2020, arXiv:2002.05202; activations as in `glu.py`.

Bytes: every weight once, x once for each block of columns (out of the L2), each y once. A step of decoding is bound by these bytes
and by launches, so a block of columns goes over all of K alone: there are more blocks than multiprocessors at any width of
a model, no sum is split between programs, and equal calls give equal bits. Within a program K is split over its threads.
One row is multiplied and summed up as it comes; up to 32 are a product of matrices.

`UPTO` rows at most: of more, a product of matrices proper makes better use of the weights that it has read. Such calls, those that
want gradients, other dtypes and devices, tensors that are not plain, autocast and tracing get `F.linear`, that is, `None` here:
whoever asks calls the modules, as without these kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own spelling
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_stream, on
from .glu import _ACTS, _act
from .glu import formula as _act_mul
from .tuning import bound, space

UPTO = 32
"""Rows (tokens) up to which the kernels answer; no more than 32, the rows of one product. Rows K10 of benchmarks/gpu_kernels.py decide."""


@triton.jit
def _product(
    X, W, first, N, M,
    K: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns `first` to `first + BN` of x W^T: (BN,) where ROWS is 1, else (ROWS, BN); float32."""
    n = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = W + n.to(tl.int64)[:, None] * K
    some = (n < N)[:, None]
    if ROWS == 1:
        sums = tl.zeros((BN, BK), tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            at = start + k
            w = tl.load(row + at[None, :], mask=some & (at < K)[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(X + at, mask=at < K, other=0.0)
            sums += w.to(tl.float32) * x.to(tl.float32)[None, :]
        return tl.sum(sums, axis=1)
    else:
        m = tl.arange(0, ROWS)
        those = X + m[:, None] * K
        total = tl.zeros((ROWS, BN), tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            at = start + k
            w = tl.load(row + at[None, :], mask=some & (at < K)[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(those + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0.0)
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        return total


@triton.jit
def _kept(Y, y, first, N, M, ROWS: tl.constexpr, BN: tl.constexpr):
    n = first + tl.arange(0, BN)
    if ROWS == 1:
        tl.store(Y + n, y, mask=n < N)
    else:
        m = tl.arange(0, ROWS)
        tl.store(Y + m.to(tl.int64)[:, None] * N + n[None, :], y, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def _biased(y, B, first, N, ROWS: tl.constexpr, BN: tl.constexpr):
    n = first + tl.arange(0, BN)
    b = tl.load(B + n, mask=n < N, other=0.0).to(tl.float32)
    if ROWS == 1:
        return y + b
    else:
        return y + b[None, :]


@triton.jit(do_not_specialize=["N1", "N2", "N3", "M"])
def _project(
    X, W1, W2, W3, B1, B2, B3, Y1, Y2, Y3, N1, N2, N3, M, BIASES: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The blocks of y_1 first, then those of y_2 and y_3. BIASES: bit i says that there is a b_(i+1)."""
    block = tl.program_id(0)
    one = tl.cdiv(N1, BN)
    two = one + tl.cdiv(N2, BN)
    W = W1
    B = B1
    Y = Y1
    N = N1
    first = block * BN
    biased = (BIASES & 1) != 0
    if block >= two:
        W = W3
        B = B3
        Y = Y3
        N = N3
        first = (block - two) * BN
        biased = (BIASES & 4) != 0
    elif block >= one:
        W = W2
        B = B2
        Y = Y2
        N = N2
        first = (block - one) * BN
        biased = (BIASES & 2) != 0
    y = _product(X, W, first, N, M, K, ROWS, BN, BK, STAGES)
    if BIASES:
        y = _biased(y, B, first, tl.where(biased, N, 0), ROWS, BN)
    _kept(Y, y, first, N, M, ROWS, BN)


@triton.jit(do_not_specialize=["N", "M"])
def _gate_up(
    X, WG, WU, BG, BU, Y, N, M, ACT: tl.constexpr, BIASES: tl.constexpr,
    K: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BN
    n = first + tl.arange(0, BN)
    k = tl.arange(0, BK)
    row = n.to(tl.int64)[:, None] * K
    some = (n < N)[:, None]
    if ROWS == 1:
        gates = tl.zeros((BN, BK), tl.float32)
        ups = tl.zeros((BN, BK), tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            at = start + k
            inside = some & (at < K)[None, :]
            wg = tl.load(WG + row + at[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            wu = tl.load(WU + row + at[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(X + at, mask=at < K, other=0.0).to(tl.float32)[None, :]
            gates += wg.to(tl.float32) * x
            ups += wu.to(tl.float32) * x
        g = tl.sum(gates, axis=1)
        u = tl.sum(ups, axis=1)
    else:
        m = tl.arange(0, ROWS)
        those = X + m[:, None] * K
        g = tl.zeros((ROWS, BN), tl.float32)
        u = tl.zeros((ROWS, BN), tl.float32)
        for start in tl.range(0, K, BK, num_stages=STAGES):
            at = start + k
            inside = some & (at < K)[None, :]
            wg = tl.load(WG + row + at[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            wu = tl.load(WU + row + at[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            x = tl.load(those + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0.0)
            g = tl.dot(x, tl.trans(wg), g, input_precision="ieee")
            u = tl.dot(x, tl.trans(wu), u, input_precision="ieee")
    if BIASES & 1:
        g = _biased(g, BG, first, N, ROWS, BN)
    if BIASES & 2:
        u = _biased(u, BU, first, N, ROWS, BN)
    dt = Y.dtype.element_ty
    a = _act(g.to(dt).to(tl.float32), ACT).to(dt).to(tl.float32)
    _kept(Y, a * u.to(dt).to(tl.float32), first, N, M, ROWS, BN)


# -- host side ----------------------------------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# no public ways to ask: whether this is inside grad, vmap, jvp, ...; how many modes look on (a FLOP counter, ...)
_transformed, _watched = torch._C._functorch.peek_interpreter_stack, torch._C._len_torch_dispatch_stack
_projects: dict[tuple[Any, ...], tuple[Any, int]] = {}
_gate_ups: dict[tuple[Any, ...], tuple[Any, int]] = {}
_AXES: dict[str, Any] = {
    "BN": (4, 8, 16, 32, 64),
    "BK": (64, 128, 256, 512, 1024),
    "STAGES": (1, 2, 3, 4, 5, 6),
    "num_warps": (1, 2, 4, 8),
    "also": (
        {"BN": 16, "BK": 256, "num_warps": 4},
        {"BN": 8, "BK": 256, "STAGES": 6},
        {"BN": 4, "BK": 1024, "STAGES": 3},
        {"BN": 32, "BK": 128, "STAGES": 5, "num_warps": 4},
        {"BN": 64, "BK": 128, "STAGES": 3, "num_warps": 4},
    ),
}
space("projections.project", _projects, **_AXES)
space("projections.gate_up", _gate_ups, **_AXES)


def tile_of(rows: int, k: int, columns: int, weights: int, size: int) -> dict[str, int]:
    """Reckoned, not measured: 16 to 24 KiB of weights are on their way in a block, and two blocks or more go to a multiprocessor.

    `columns`: of all results; `weights`: how many are read side by side; `size`: bytes of a number.
    """
    if rows == 1:
        wide = max(16, min(triton.next_power_of_2(k), 1024 // size))
        return {"BN": 8 // weights, "BK": wide, "STAGES": 4, "num_warps": 4}
    many = columns >= 8192
    wide = max(16, min(triton.next_power_of_2(k), 256 // size))
    return {"BN": 32 // weights if many else 16, "BK": wide, "STAGES": 4, "num_warps": 4 if many else 2}


def formula(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """`project` in plain torch."""
    return tuple(F.linear(x, w, b) for w, b in zip(weights, biases, strict=True))


def gate_up_formula(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None, act: str = "silu"
) -> Tensor:
    """`gate_up` in plain torch."""
    return _act_mul(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), act)


def few(x: Tensor) -> bool:
    """Whether it has rows, and no more than the kernels take."""
    return x.ndim > 0 and 0 < x.numel() <= UPTO * x.shape[-1]


def fits(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...]) -> bool:
    """The kernels can take these, and are to."""
    if torch.compiler.is_compiling() or type(x) not in _PLAIN or x.is_cuda is INTERPRETED or x.dtype not in _DTYPES:
        return False
    if not few(x) or torch.is_autocast_enabled(x.device.type) or _transformed() is not None or _watched():
        return False
    graded, dtype, device, k = torch.is_grad_enabled(), x.dtype, x.device, x.shape[-1]
    if graded and x.requires_grad:
        return False
    for w, b in zip(weights, biases, strict=True):
        if (
            type(w) not in _PLAIN
            or w.dtype is not dtype
            or w.device != device
            or w.ndim != 2
            or w.shape[1] != k
            or not w.shape[0]
            or not w.is_contiguous()
            or (graded and w.requires_grad)
        ):
            return False
        if b is not None and (
            type(b) not in _PLAIN
            or b.dtype is not dtype
            or b.device != device
            or b.shape != w.shape[:1]
            or not b.is_contiguous()
            or (graded and b.requires_grad)
        ):
            return False
    return True


def project(
    x: Tensor, weights: tuple[Tensor, Tensor, Tensor], biases: tuple[Tensor | None, Tensor | None, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """x (..., K), three weights (N_i, K), biases (N_i,) or None -> three (..., N_i), contiguous; None: see the top of the file.

    bf16, fp16 or fp32, all of one dtype. Inputs are not written.
    """
    if not fits(x, weights, biases):
        return None
    x = x.contiguous()
    ys = tuple(x.new_empty((*x.shape[:-1], w.shape[0])) for w in weights)
    sizes = [w.shape[0] for w in weights]
    launch, wide, pointers, m = _launch_for("project", x, weights, biases, ys, sizes)
    with on(x.get_device()):
        launch(sum(-(-n // wide) for n in sizes), current_stream(x.get_device()), *pointers, *sizes, m)
    return ys  # type: ignore[return-value]  # three


def gate_up(
    x: Tensor, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None, act: str = "silu"
) -> Tensor | None:
    """x (..., K), gate and up (N, K), biases (N,) or None -> (..., N), contiguous; None: see the top of the file.

    `act`: silu, gelu or gelu_tanh. bf16, fp16 or fp32, all of one dtype. Inputs are not written.
    """
    if gate.shape != up.shape or not fits(x, (gate, up), (gate_bias, up_bias)):
        return None
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], gate.shape[0]))
    n = gate.shape[0]
    launch, wide, pointers, m = _launch_for("gate_up", x, (gate, up), (gate_bias, up_bias), (y,), [n], act)
    with on(x.get_device()):
        launch(-(-n // wide), current_stream(x.get_device()), *pointers, n, m)
    return y


def _launch_for(
    kernel: str, x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...], ys: tuple[Tensor, ...],
    sizes: list[int], act: str = "",
) -> tuple[Any, int, list[int], int]:  # fmt: skip
    """The launch for these (x contiguous), its BN, their pointers (that of a weight where there is no bias), and the rows."""
    fn, known = (_project, _projects) if kernel == "project" else (_gate_up, _gate_ups)
    given = tuple(w if b is None else b for w, b in zip(weights, biases, strict=True))
    pointers = [t.data_ptr() for t in (x, *weights, *given, *ys)]
    bits = sum(1 << i for i, b in enumerate(biases) if b is not None)
    k, columns = x.shape[-1], sum(sizes)
    m = x.numel() // k
    align = 0
    for pointer in pointers:
        align |= pointer & 15
    odd = tuple(pointer & 15 for pointer in pointers) if align else ()  # which of them: each is compiled for
    rows = 1 if m == 1 else 16 if m <= 16 else 32
    key = (x.dtype, x.get_device(), k, columns, rows, bits, odd, act)
    found = known.get(key)
    if found is None:
        more = {"ACT": _ACTS[act]} if act else {}

        def make(c: dict[str, int]) -> tuple[Any, int]:
            wide = c["BN"] if rows == 1 else max(16, c["BN"])  # a product of matrices has no narrower ones
            launch = bind(
                fn, (x, *weights, *given, *ys, *(17,) * len(sizes), 17), device=x.get_device(), num_warps=c["num_warps"],
                **more, BIASES=bits, K=k, ROWS=rows, BN=wide, BK=c["BK"], STAGES=c["STAGES"],
            )  # fmt: skip
            return launch, wide

        dtype = str(x.dtype).removeprefix("torch.")
        bucket = f"{dtype}{', ' + act if act else ''}{', biases' if bits else ''}; {k} to {columns}; {_SPANS[rows]}"
        default = tile_of(m, k, columns, len(weights) // len(sizes), x.element_size())
        found = known[key] = bound(f"projections.{kernel}", default, bucket, x.get_device(), make)
    return *found, pointers, m


_SPANS = {1: "1 row", 16: "2-16 rows", 32: "17-32 rows"}
