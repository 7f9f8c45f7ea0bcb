"""Every bundled GPU kernel against eager, torch's own, Liger, QuACK and FA4 where installed, and the floor.

    python benchmarks/gpu_kernels.py [OUT.json] [--quick] [--only K1,K7] [--add] [--seconds 150]

Correctness against float64 is checked before any timing, of every candidate. Floors: bytes that must move over the element-wise
bandwidth that this run measured (decode attention, projections of few rows: the read bandwidth); LM head + loss and attention: operations over the matrix
rate. Rows are written as they come; `--add` keeps what OUT.json has of other kernels. `--quick`: the shapes that have a target.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import gpu_attention
import gpu_losses
import gpu_peers
import gpu_projections
import targets
import torch
import torch.nn.functional as F
from gpu_kernel_files import Kernels
from gpu_rows import BF, Board, copies, fit, randn, rows_of
from gpu_timing import CUDA, DEVICE, element_wise_bandwidth, empty_cache, host_us, matrix_rate, read_bandwidth

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

EPS = 1e-6
WRONG = 3
"""The exit code when everything was measured and an output of ours was wrong."""
KERNELS = ("H1", "K1", "K2", "K3", "K4", "K5", "K6", "K7", "K8", "K9", "K10")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="where the rows go")
    parser.add_argument(
        "--quick", action="store_true", help="the shapes that have a target; nothing compiled but attention at 2k"
    )
    parser.add_argument("--only", default=",".join(KERNELS), help=f"of {','.join(KERNELS)}")
    parser.add_argument("--add", action="store_true", help="keep the rows of other kernels in OUT.json")
    parser.add_argument(
        "--untuned", action="store_true", help="with the configurations of the formulas, whatever was measured here"
    )
    parser.add_argument("--seconds", type=float, default=150.0, help="from three quarters of it on nothing more is compiled")
    given = parser.parse_args()
    given.only = set(given.only.upper().split(","))
    if unknown := given.only - set(KERNELS):
        parser.error(f"--only {','.join(sorted(unknown))}: the kernels are {', '.join(KERNELS)}")
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("this benchmark needs an NVIDIA GPU; PyTorch sees none here")
    return given


def eager_rms(x: torch.Tensor, w: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """Transformers' own; in float64 the reference."""
    f = x if x.dtype is torch.float64 else x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return w * f.to(x.dtype)


def rms_norm(board: Board, ours: types.SimpleNamespace) -> None:
    rms = ours.rms_norm
    full = [(m, n) for m in (1, 16, 4096, 16384) for n in (1024, 4096)]
    for m, n in (fit(*s) for s in board.sizes(full, [s for s in full if s[1] == 4096])):
        if not board.wants("K1") or not board.room("K1 RMSNorm fwd", f"{m}x{n}", m * n * 60):
            continue
        w = randn(n)
        xs = [(randn(m, n), w) for _ in range(copies(m * n * 4))]
        candidates = {
            "kernelswap": lambda x, w: rms.rms_norm(x, w, EPS),
            "eager": eager_rms,
            "F.rms_norm": lambda x, w, n=n: F.rms_norm(x, (n,), w, EPS),
            **gpu_peers.rms_norm(),
            **(board.compiled(eager_rms) if n == 4096 else {}),
        }
        floor = m * n * 4 / board.bandwidth * 1e6
        board.compare("K1 RMSNorm fwd", f"{m}x{n}", floor, xs, candidates, eager_rms, 4e-3, repeat=8 if m <= 16 else 1)
    for m, n in (fit(*s) for s in [(16384, 4096), (16384, 1024)]):
        if not board.wants("K2") or not board.room("K2 RMSNorm fwd+bwd", f"{m}x{n}", m * n * 120):
            continue
        k = copies(m * n * 6)
        xs, dys = [(randn(m, n), randn(n)) for _ in range(k)], [(randn(m, n),) for _ in range(k)]
        candidates = {
            "kernelswap": lambda x, w: rms.rms_norm(x, w, EPS),
            "eager": eager_rms,
            "F.rms_norm": lambda x, w, n=n: F.rms_norm(x, (n,), w, EPS),
            **gpu_peers.rms_norm(),
            **board.compiled(eager_rms),
        }
        floor = 5 * m * n * 2 / board.bandwidth * 1e6
        board.compare("K2 RMSNorm fwd+bwd", f"{m}x{n}", floor, xs, candidates, eager_rms, 6e-3, grads=dys, wanted=(0, 1))


def add_rms_norm(board: Board, ours: types.SimpleNamespace) -> None:
    def eager(x: torch.Tensor, d: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = x + d
        return s, eager_rms(s, w)

    for m, n in (fit(*s) for s in board.sizes([(1, 4096), (4096, 4096), (16384, 4096)], [(16384, 4096)])):
        for what, moved in (("fwd", 4), ("fwd+bwd", 8)):
            kernel, shape = f"K3 add+RMSNorm {what}", f"{m}x{n}"
            if not board.room(kernel, shape, m * n * 160):
                continue
            k, backward = copies(m * n * 8), what != "fwd"
            w = randn(n)
            xs = [(randn(m, n), randn(m, n), w) for _ in range(k)]
            dys = [(randn(m, n), randn(m, n)) for _ in range(k)] if backward else None
            candidates = {
                "kernelswap": lambda x, d, w: ours.rms_norm.add_rms_norm(x, d, w, EPS),
                "eager": eager,
                **gpu_peers.add_rms_norm(),
                **(board.compiled(eager) if m > 4096 else {}),
            }
            floor = moved * m * n * 2 / board.bandwidth * 1e6
            more = {"grads": dys, "wanted": (0, 1, 2)} if backward else {"repeat": 8 if m <= 16 else 1}
            board.compare(kernel, shape, floor, xs, candidates, eager, 6e-3, **more)


def gated(board: Board, ours: types.SimpleNamespace) -> None:
    def eager(g: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return F.silu(g) * u

    full = [(1, 14336), (1, 3072), (16, 14336), (4096, 3072), (4096, 14336), (16384, 3072), (16384, 14336)]
    for m, n in (fit(*s) for s in board.sizes(full, [full[0], full[2], full[4], full[5], full[6]])):
        for what, moved in (("fwd", 6), ("fwd+bwd", 16)):
            kernel, shape = f"K5 SiLU*mul {what}", f"{m}x{n}"
            if (what == "fwd+bwd" and (board.quick or m <= 4096)) or not board.room(kernel, shape, m * n * 120):
                continue
            pairs = [(randn(m, n), randn(m, n)) for _ in range(copies(m * n * 6))]
            candidates = {
                "kernelswap": ours.glu.act_mul,
                "eager": eager,
                **gpu_peers.gated(),
                **(board.compiled(eager) if what == "fwd" and m in (1, 16384) else {}),
            }
            more = {"repeat": 8 if m <= 16 else 1}
            if what == "fwd+bwd":
                more = {"grads": [(randn(m, n),) for _ in pairs], "wanted": (0, 1)}
            board.compare(kernel, shape, moved * m * n / board.bandwidth * 1e6, pairs, candidates, eager, 6e-3, **more)
            del pairs


def rotary(board: Board, ours: types.SimpleNamespace) -> None:
    rope, (hq, hk, d) = ours.rope, (32, 8, 128) if CUDA else (2, 1, 16)

    def plain(q, k, cos, sin):
        return rope.formula(q, k, cos, sin)

    def normed(q, k, w, v, cos, sin):
        return rope.formula(eager_rms(q, w), eager_rms(k, v), cos, sin)

    usual = ours.rope_gradients.FUSED

    def backward(fused):  # one way or the other, as of the next call
        def called(q, k, w, v, c, s):
            ours.rope_gradients.FUSED = fused
            return rope.norm_rope(q, k, w, v, c, s, EPS)

        return called

    ligers = gpu_peers.rope()
    liger_norms = gpu_peers.rms_norm()
    together = (
        {"Liger": lambda q, k, w, v, c, s: ligers["Liger"](liger_norms["Liger"](q, w), liger_norms["Liger"](k, v), c, s)}
        if ligers and "Liger" in liger_norms
        else {}
    )
    for (t,) in map(fit, board.sizes((1, 16, 4096, 16384), (16384,))):
        if not board.room("K4 q/k-norm+RoPE fwd", f"{t} tokens", t * (hq + hk) * d * 100):
            continue
        k = copies(t * (hq + hk) * d * 4)
        angle = torch.arange(t, device=DEVICE)[:, None] * (10000.0 ** (-torch.arange(0, d, 2, device=DEVICE) / d))[None, :]
        cos, sin = (f(torch.cat([angle, angle], -1))[None].to(BF) for f in (torch.cos, torch.sin))
        w, v = randn(d), randn(d)
        qk = [(randn(1, t, hq, d).transpose(1, 2), randn(1, t, hk, d).transpose(1, 2)) for _ in range(k)]
        floor = t * (hq + hk) * d * 4 / board.bandwidth * 1e6
        repeat = 8 if t <= 16 else 1
        full = [(q, k, w, v, cos, sin) for q, k in qk]
        candidates = {
            "kernelswap": lambda q, k, w, v, c, s: rope.norm_rope(q, k, w, v, c, s, EPS),
            "eager": normed,
            **together,
            **(board.compiled(normed) if t > 16 else {}),
        }
        board.compare("K4 q/k-norm+RoPE fwd", f"{t} tokens", floor, full, candidates, normed, 8e-3, repeat=repeat)
        if t == fit(16384)[0]:
            dys = [(randn(1, t, hq, d).transpose(1, 2), randn(1, t, hk, d).transpose(1, 2)) for _ in range(k)]
            more = {"grads": dys, "wanted": (0, 1, 2, 3)}
            candidates = {
                "kernelswap": backward(False),
                "kernelswap, one launch back": backward(True),
                "eager": normed,
                **together,
            }
            board.compare("K4 q/k-norm+RoPE fwd+bwd", f"{t} tokens", 2.5 * floor, full, candidates, normed, 1.6e-2, **more)
            ours.rope_gradients.FUSED = usual
            del dys
        simple = [(q, k, cos, sin) for q, k in qk]
        candidates = {"kernelswap": rope.rope, "eager": plain, **ligers}
        board.compare("K4 RoPE fwd", f"{t} tokens", floor, simple, candidates, plain, 8e-3, repeat=repeat)
        if t != fit(16384)[0]:
            continue
        dys = [(randn(1, t, hq, d).transpose(1, 2), randn(1, t, hk, d).transpose(1, 2)) for _ in range(k)]
        more = {"grads": dys, "wanted": (0, 1)}
        candidates |= board.compiled(plain)
        board.compare("K4 RoPE fwd+bwd", f"{t} tokens", 2 * floor, simple, candidates, plain, 8e-3, **more)


def hosts(board: Board, ours: types.SimpleNamespace) -> None:
    """Microseconds of CPU of one call at one token: of the kernels' functions, and of a swapped model's own modules."""
    costs: dict[str, float] = {}
    (x, w), g = (randn(1, 1024), randn(1024)), randn(1, 3072)
    q, k = randn(1, 1, 16, 128).transpose(1, 2), randn(1, 1, 8, 128).transpose(1, 2)
    c, d = randn(1, 1, 128), randn(128)
    calls = {
        "RMSNorm": lambda x: ours.rms_norm.rms_norm(x, w, EPS),
        "SiLU*mul": lambda x: ours.glu.act_mul(x, g),
        "RoPE": lambda x: ours.rope.rope(x, k, c, c),
        "q/k-norm+RoPE": lambda x: ours.rope.norm_rope(x, k, d, d, c, c, EPS),
        "F.rms_norm": lambda x: F.rms_norm(x, (1024,), w, EPS),
        "eager RMSNorm": lambda x: eager_rms(x, w),
    }
    tensors = {"SiLU*mul": g, "RoPE": q, "q/k-norm+RoPE": q}
    calls |= swapped_modules()
    for name, call in calls.items():
        given = tensors.get(name, x)
        with torch.no_grad():
            costs[name] = host_us(lambda call=call, given=given: call(given))
        leaf = given.detach().requires_grad_()
        costs[f"{name} with grad"] = host_us(lambda call=call, leaf=leaf: call(leaf))
    board.add({"kernel": "H1 host cost", "us": {k: round(v, 3) for k, v in costs.items()}})
    for name in calls:
        print(
            f"H1 host cost           {name:22} {costs[name]:6.1f} us, with gradient {costs[name + ' with grad']:6.1f}", flush=True
        )


def swapped_modules() -> dict[str, Callable[..., object]]:
    """The norm of a Qwen3 layer as its layer calls it: swapped, and as it was."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import kernelswap as ks

    config = Qwen3Config(
        hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=64,
    )  # fmt: skip
    original, model = (Qwen3ForCausalLM(config).eval().to(DEVICE, BF) for _ in range(2))
    ks.swap(model, build="never")
    ids = torch.zeros((1, 4), dtype=torch.long, device=DEVICE)
    for _ in range(3):  # the first calls compare with the original
        model.eval()(ids)
        model.train()(ids, labels=ids).loss.backward()
    norm, before = model.eval().model.layers[0].input_layernorm, original.model.layers[0].input_layernorm
    with torch.no_grad():
        norm(torch.zeros((1, 1024), device=DEVICE, dtype=BF))
    return {"RMSNorm module": norm, "eager RMSNorm module": before}


def main(asked: argparse.Namespace) -> int:
    torch.manual_seed(0)
    torch._dynamo.config.cache_size_limit = 64
    board = Board(
        asked.out, quick=asked.quick, seconds=asked.seconds, only=asked.only, kept=rows_of(asked.out) if asked.add else ()
    )
    kernels = Kernels(tuned=not asked.untuned)
    layers, loss, attention = (kernels.of(f"kernelswap/{name}") for name in ("layers", "loss", "attention"))
    board.bandwidth, board.read, board.rate = element_wise_bandwidth(), read_bandwidth(), matrix_rate()
    board.about = {
        "peers": gpu_peers.WHY,
        "quick": asked.quick,
        "tuned": kernels.tuned(),
        "ceilings": {"element_wise": board.bandwidth, "read": board.read, "matrix": board.rate},
    }
    print(
        f"element-wise {board.bandwidth / 1e12:.2f} TB/s, read {board.read / 1e12:.2f} TB/s, bf16 {board.rate / 1e12:.0f} TFLOP/s"
    )
    for text in board.about["tuned"]:
        print(f"tuned: {text}"[:79])
    for name, why in gpu_peers.WHY.items():
        print(f"{name}: {why}"[:79])
    print(f"{'kernel':22} {'shape':16} {'time':>12} {'floor':>5} over the next best")
    parts = {
        ("H1",): lambda: hosts(board, layers),
        ("K1", "K2"): lambda: rms_norm(board, layers),
        ("K3",): lambda: add_rms_norm(board, layers),
        ("K4",): lambda: rotary(board, layers),
        ("K5",): lambda: gated(board, layers),
        ("K6",): lambda: gpu_losses.cross_entropy(board, loss),
        ("K7",): lambda: gpu_losses.linear_cross_entropy(board, loss),
        ("K8",): lambda: (gpu_attention.decode(board, attention), gpu_attention.paged(board, attention)),
        ("K9",): lambda: gpu_attention.causal(board, attention),
        ("K10",): lambda: gpu_projections.projections(board, layers),
    }
    took = {}
    for names, part in parts.items():
        if board.wants(*names):
            start = time.perf_counter()
            part()
            took[" ".join(names)] = round(time.perf_counter() - start, 1)
            empty_cache()
    verdicts = targets.judge(board.rows)
    board.about |= {
        "seconds": took,
        "targets": [
            {"row": v.row, "target": v.target, "measured": v.measured, "met": v.met} for v in verdicts if v.met is not None
        ],
    }
    board.save()
    print("\n".join(targets.table(verdicts)))
    print(f"{time.perf_counter() - board.start:.0f} s")
    return WRONG if board.failed else 0


if __name__ == "__main__":
    raise SystemExit(main(arguments()))
