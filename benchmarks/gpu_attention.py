"""Attention: rows K8 (one token over a cache, dense or in pages, its length on the device) and K9 (causal, prefill and training) of the kernels' benchmark."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import gpu_peers
import torch
import torch.nn.functional as F
from gpu_rows import Board, Clock, copies, randn
from gpu_timing import CUDA, DEVICE, device_us, empty_cache, queued_us
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

HQ, HK, D = (32, 8, 128) if CUDA else (4, 2, 16)
HALF = torch.bfloat16 if CUDA else torch.float16
SCALE = D**-0.5


def decode(board: Board, ours: types.SimpleNamespace) -> None:
    """One query a sequence; the kernel is told the live length by a tensor, the others by the shapes of what they get."""

    def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def static(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As Transformers does it over a static cache: keys repeated, a boolean mask."""
        mask = torch.ones((q.shape[0], 1, 1, k.shape[2]), dtype=torch.bool, device=q.device)
        k, v = (t[:, :, None].expand(-1, -1, HQ // HK, -1, -1).flatten(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def reference(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        out = []
        for row in range(q.shape[0]):  # one sequence at a time: keys in float64 are large
            live = int(length[row])
            scores = q[row].view(HK, HQ // HK, D) @ k[row, :, :live].transpose(1, 2) * SCALE
            out.append((torch.softmax(scores, -1) @ v[row, :, :live]).view(1, HQ, D))
        return torch.stack(out)

    def mine(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        return ours.decode.decode(q, k, v, scale=SCALE, length=length)

    def theirs(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v, length: f(q, k, v).transpose(1, 2)  # noqa: ARG005  # all keys live in what is timed

    shapes = [(32, 8192), (1, 32768), (1, 1024), (1, 8192), (32, 1024)]
    for b, n in board.sizes(shapes, shapes[:2]):
        batch, keys = (b, n) if CUDA else (min(b, 2), 96)
        kernel, shape = "K8 decode attention", f"{b}x{n}" if CUDA else f"{batch}x{keys}"
        moved = 2 * batch * HK * keys * D * 2
        if not board.room(kernel, shape, moved * 8):
            continue
        all_of_them = torch.full((batch,), keys, dtype=torch.int32, device=DEVICE)
        inputs = [
            (*(randn(batch, h, n, D, dtype=HALF) for h, n in ((HQ, 1), (HK, keys), (HK, keys))), all_of_them)
            for _ in range(min(8, copies(moved)))
        ]
        fewer = torch.randint(1, keys, (batch,), dtype=torch.int32, device=DEVICE)
        q, k, v, _ = inputs[0]
        error = _error(mine(q, k, v, fewer), reference(q.double(), k.double(), v.double(), fewer))
        candidates = {"kernelswap": mine, "SDPA": theirs(grouped), "SDPA flash": theirs(flash), "eager static": theirs(static)}
        entry = board.compare(
            kernel, shape, moved / board.read * 1e6, inputs, candidates, reference, 6e-3, repeat=8 if moved < 1 << 26 else 1
        )
        entry["error_shorter"] = error
        if not error < 6e-3:
            board.failed += 1
            print(f"{kernel:22} {shape:16} FAILED at shorter lengths: error {error:.1e}", flush=True)
        board.save()
        del inputs, q, k, v
        empty_cache()


def paged(board: Board, ours: types.SimpleNamespace) -> None:
    """The same over pages that a table orders: read in place, and gathered into a dense copy first, as it was before."""

    def mine(q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor) -> Tensor:
        return ours.decode.decode(q, k.transpose(1, 2), v.transpose(1, 2), scale=SCALE, table=table, length=length)

    def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor) -> Tensor:
        k, v = (x[table].flatten(1, 2).transpose(1, 2) for x in (k, v))
        return ours.decode.decode(q, k, v, scale=SCALE, length=length)

    def reference(q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor) -> Tensor:
        out = []
        for row in range(q.shape[0]):
            keys, values = (x[table[row].long()].flatten(0, 1)[: int(length[row])].transpose(0, 1) for x in (k, v))
            scores = q[row].view(HK, HQ // HK, D) @ keys.transpose(1, 2) * SCALE
            out.append((torch.softmax(scores, -1) @ values).view(1, HQ, D))
        return torch.stack(out)

    for b, n, size in board.sizes([(32, 8192, 256), (32, 8192, 16), (1, 32768, 256), (1, 32768, 16)], [(32, 8192, 256)]):
        batch, keys, page = (b, n, size) if CUDA else (min(b, 2), 96, min(size, 32))
        kernel, shape = f"K8 decode, pages of {page}", f"{batch}x{keys}"
        moved = 2 * batch * HK * keys * D * 2
        if not board.room(kernel, shape, moved * 8):
            continue
        count = batch * keys // page
        all_of_them = torch.full((batch,), keys, dtype=torch.int32, device=DEVICE)
        inputs = [
            (
                randn(batch, HQ, 1, D, dtype=HALF),
                *(randn(count, page, HK, D, dtype=HALF) for _ in range(2)),
                torch.randperm(count, device=DEVICE, dtype=torch.int32).view(batch, -1),
                all_of_them,
            )
            for _ in range(min(4, copies(moved)))
        ]
        candidates = {"kernelswap": mine, "gathered first": gathered}
        repeat = 8 if moved < 1 << 26 else 1
        board.compare(kernel, shape, moved / board.read * 1e6, inputs, candidates, reference, 6e-3, repeat=repeat)
        del inputs
        empty_cache()


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def _out(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """(B, H, S, D) -> (B, S, H, D), the memory that a model goes on with."""
    return lambda q, k, v: f(q, k, v).transpose(1, 2).contiguous()


def _sdpa(*backends: Any) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not backends:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        with sdpa_kernel(list(backends)):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def _varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    b, _, s, _ = q.shape
    starts = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=q.device)
    q, k, v = (t.transpose(1, 2).reshape(-1, t.shape[1], D) for t in (q, k, v))
    if "enable_gqa" in (varlen_attn.__kwdefaults__ or {}):
        out = varlen_attn(q, k, v, starts, starts, s, s, window_size=(-1, 0), enable_gqa=True)
    else:
        k, v = (t.repeat_interleave(HQ // HK, dim=1) for t in (k, v))
        out = varlen_attn(q, k, v, starts, starts, s, s, window_size=(-1, 0))
    return out.view(b, s, HQ, D).transpose(1, 2)


def _one_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: the heads that share one key head, in float64."""
    s = q.shape[2]
    scores = q[0].view(HQ // HK, s, D) @ k[0, 0].t() * SCALE
    scores = scores.masked_fill(torch.ones((s, s), dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    return (torch.softmax(scores, -1) @ v[0, 0]).transpose(0, 1)[None]


def _first_group(args: tuple[Any, ...], dy: tuple[Tensor, ...] | None) -> tuple[Any, ...]:
    part = tuple(t[:1, : HQ // HK if i == 0 else 1] for i, t in enumerate(args))
    return part, None if dy is None else (dy[0][:1, :, : HQ // HK],)


def causal(board: Board, ours: types.SimpleNamespace) -> None:
    """q, k, v as a model has them, (B, S, H, D) in memory; the same output memory of everybody."""
    module = types.SimpleNamespace(is_causal=True)

    def mine(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ours.forward.flash_attn_forward(module, q, k, v, None, scaling=SCALE)[0]

    rivals = {
        "SDPA": _out(_sdpa()),
        "SDPA cuDNN": _out(_sdpa(SDPBackend.CUDNN_ATTENTION)),
        "SDPA flash": _out(_sdpa(SDPBackend.FLASH_ATTENTION)),
        "varlen_attn": _out(_varlen),
        **{name: _out(f) for name, f in gpu_peers.attention().items()},
    }
    for b, s in ((32, 512), (8, 2048), (2, 8192)):
        batch, tokens = (b, s) if CUDA else (2, 48)
        for what, work in (("fwd", 1.0), ("fwd+bwd", 3.5)):
            kernel, shape = f"K9 attention {what}", f"{b}x{s}" if CUDA else f"{batch}x{tokens}"
            if not board.room(kernel, f"{shape} eager", batch * tokens * HQ * D * 80):
                continue
            backward = what != "fwd"
            buffers = 2 if CUDA else 1
            inputs = [tuple(randn(batch, tokens, h, D).transpose(1, 2) for h in (HQ, HK, HK)) for _ in range(buffers)]
            grads = [(randn(batch, tokens, HQ, D),) for _ in inputs] if backward else None
            floor = work * 2 * batch * HQ * tokens * tokens * D / board.rate * 1e6
            more: dict[str, Any] = {"grads": grads, "wanted": (0, 1, 2)} if backward else {}
            more["subset"] = _first_group
            modes: dict[str, tuple[Any, Clock]] = {"eager": (mine, queued_us), "captured": (mine, device_us)}
            if CUDA and (not board.quick or (s == 2048 and not backward)):
                torch.compiler.reset()
                modes["compiled"] = (torch.compile(mine, dynamic=False), queued_us)
            for mode, (who, clock) in modes.items():
                entry = board.compare(
                    kernel, f"{shape} {mode}", floor, inputs, {"kernelswap": who, **rivals}, _one_group, 8e-3,
                    clock=functools.partial(clock, replays=7), **more,
                )  # fmt: skip
                if "us" in entry:
                    entry["tflops"] = {name: round(floor * board.rate / us / 1e12, 1) for name, us in entry["us"].items()}
            del inputs, grads
            empty_cache()
    board.save()
