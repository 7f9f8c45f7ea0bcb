"""Every bundled GPU kernel against eager, torch's own, Liger where installed, and the floor: `python benchmarks/gpu_kernels.py [OUT.json]`.

Correctness against float64 is checked before any timing. Floors: bytes that must move over the element-wise bandwidth that
this run measured; LM head + loss: operations over the matrix rate that this run measured.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_timing import device_us, element_wise_bandwidth, host_us, relative, wall_ms, write

import kernelswap

for name, build in (("layers_cuda", "layers/build/torch-cuda"), ("loss_cuda", "loss/build/torch-universal")):
    package = types.ModuleType(name)
    package.__path__ = [str(Path(kernelswap.__file__).parent / "bundled" / build)]
    sys.modules[name] = package
rms = importlib.import_module("layers_cuda.rms_norm")
glu = importlib.import_module("layers_cuda.glu")
rope = importlib.import_module("layers_cuda.rope")
ce = importlib.import_module("loss_cuda.cross_entropy")
head = importlib.import_module("loss_cuda.loss")
try:
    import liger_kernel.ops as liger
except ImportError:
    liger = None
try:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction
except ImportError:
    liger = None

BF = torch.bfloat16
ROWS: list[dict[str, object]] = []
BANDWIDTH = 0.0


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF, requires_grad=grad)


def copies(bytes_each: int) -> int:
    """Enough buffers that the L2 holds none of them for the next call."""
    return max(2, min(64, int(4e8 // bytes_each) + 1))


def row(name: str, shape: str, floor_us: float, took: dict[str, tuple[float, float]], error: float) -> None:
    entry = {"kernel": name, "shape": shape, "floor_us": floor_us, "error": error}
    entry["us"] = {k: round(v[0], 3) for k, v in took.items()}
    entry["spread"] = {k: round(v[1], 3) for k, v in took.items()}
    entry["share_of_floor"] = {k: round(floor_us / v[0], 3) for k, v in took.items()}
    ROWS.append(entry)
    if len(sys.argv) > 1:
        write(ROWS, Path(sys.argv[1]))
    best = min((v[0], k) for k, v in took.items() if k != "kernelswap") if len(took) > 1 else (0.0, "-")
    ours = took["kernelswap"][0]
    print(
        f"{name:22} {shape:18} {ours:9.2f} us  {floor_us / ours:5.2f} of floor  {best[0] / ours:5.2f}x {best[1]:12} error {error:.1e}",
        flush=True,
    )


def eager_rms(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    f = x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)
    return w * f.to(x.dtype)


def rms_norm() -> None:
    for m, n in [(1, 1024), (1, 4096), (16, 1024), (16, 4096), (4096, 4096), (16384, 1024), (16384, 4096)]:
        xs = [randn(m, n) for _ in range(copies(m * n * 4))] * (8 if m <= 16 else 1)
        w = randn(n)
        ref = eager_rms(xs[0].double(), w.double())
        error = relative(rms.rms_norm(xs[0], w, 1e-6), ref)
        assert error < 4e-3, error
        with torch.no_grad():
            took = device_us(
                {
                    "kernelswap": [lambda x=x: rms.rms_norm(x, w, 1e-6) for x in xs],
                    "eager": [lambda x=x: eager_rms(x, w) for x in xs],
                    "F.rms_norm": [lambda x=x: F.rms_norm(x, (n,), w, 1e-6) for x in xs],
                }
                | ({"Liger": [lambda x=x: LigerRMSNormFunction.apply(x, w, 1e-6) for x in xs]} if liger else {})
            )
        row("K1 RMSNorm fwd", f"{m}x{n}", m * n * 4 / BANDWIDTH * 1e6, took, error)


def with_backward(name: str, shape: str, floor_bytes: int, makers: dict[str, tuple], error: float) -> None:
    """Forward and backward, gradients dropped between calls so that nothing accumulates."""

    def step(f, xs, dys):
        def call() -> None:
            for x, dy in zip(xs, dys, strict=True):
                leaves = [t.detach().requires_grad_() for t in x]
                out = f(*leaves)
                torch.autograd.grad(out, leaves, dy)

        return call

    took = {k: (v[0] * 1.0, v[1]) for k, v in device_us({k: [step(*m)] for k, m in makers.items()}).items()}
    count = len(next(iter(makers.values()))[1])
    row(name, shape, floor_bytes / BANDWIDTH * 1e6, {k: (v[0] / count, v[1]) for k, v in took.items()}, error)


def rms_norm_backward() -> None:
    for m, n in [(16384, 1024), (16384, 4096)]:
        k = copies(m * n * 6)
        inputs, dys = [(randn(m, n), randn(n)) for _ in range(k)], [randn(m, n) for _ in range(k)]
        x, w = (t.double().requires_grad_() for t in inputs[0])
        want = torch.autograd.grad(eager_rms(x, w), (x, w), dys[0].double())
        leaves = [t.detach().requires_grad_() for t in inputs[0]]
        got = torch.autograd.grad(rms.rms_norm(*leaves, 1e-6), leaves, dys[0])
        error = max(relative(g, r) for g, r in zip(got, want, strict=True))
        assert error < 6e-3, error
        makers = {
            "kernelswap": (lambda x, w: rms.rms_norm(x, w, 1e-6), inputs, dys),
            "eager": (eager_rms, inputs, dys),
            "F.rms_norm": (lambda x, w, n=n: F.rms_norm(x, (n,), w, 1e-6), inputs, dys),
        }
        if liger:
            makers["Liger"] = (lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False), inputs, dys)
        with_backward("K2 RMSNorm fwd+bwd", f"{m}x{n}", 5 * m * n * 2, makers, error)


def gated() -> None:
    for m, n in [(1, 3072), (1, 14336), (16, 14336), (4096, 3072), (4096, 14336), (16384, 3072), (16384, 14336)]:
        pairs = [(randn(m, n), randn(m, n)) for _ in range(copies(m * n * 6))] * (8 if m <= 16 else 1)
        g, u = pairs[0]
        error = relative(glu.act_mul(g, u), F.silu(g.double()) * u.double())
        assert error < 5e-3, error
        with torch.no_grad():
            took = device_us(
                {
                    "kernelswap": [lambda g=g, u=u: glu.act_mul(g, u) for g, u in pairs],
                    "eager": [lambda g=g, u=u: F.silu(g) * u for g, u in pairs],
                }
                | ({"Liger": [lambda g=g, u=u: LigerSiLUMulFunction.apply(g, u) for g, u in pairs]} if liger else {})
            )
        row("K5 SiLU*mul fwd", f"{m}x{n}", m * n * 6 / BANDWIDTH * 1e6, took, error)
        del pairs


def rotary() -> None:
    hq, hk, d = 32, 8, 128
    for t in (1, 16, 4096, 16384):
        k = copies(t * (hq + hk) * d * 4)
        qk = [(randn(1, t, hq, d).transpose(1, 2), randn(1, t, hk, d).transpose(1, 2)) for _ in range(k)]
        cos, sin, w, v = randn(1, t, d), randn(1, t, d), randn(d), randn(d)
        q, kk = qk[0]
        want = rope.formula(eager_rms(q.double(), w.double()), eager_rms(kk.double(), v.double()), cos.double(), sin.double())
        got = rope.norm_rope(q, kk, w, v, cos, sin, 1e-6)
        error = max(relative(a, b) for a, b in zip(got, want, strict=True))
        assert error < 6e-3, error
        floor = t * (hq + hk) * d * 4 / BANDWIDTH * 1e6
        with torch.no_grad():
            took = device_us(
                {
                    "kernelswap": [lambda q=q, k=k: rope.norm_rope(q, k, w, v, cos, sin, 1e-6) for q, k in qk],
                    "eager": [lambda q=q, k=k: rope.formula(eager_rms(q, w), eager_rms(k, v), cos, sin) for q, k in qk],
                }
            )
            row("K4 q/k-norm+RoPE fwd", f"{t} tokens", floor, took, error)
            took = device_us(
                {
                    "kernelswap": [lambda q=q, k=k: rope.rope(q, k, cos, sin) for q, k in qk],
                    "eager": [lambda q=q, k=k: rope.formula(q, k, cos, sin) for q, k in qk],
                }
            )
        row("K4 RoPE fwd", f"{t} tokens", floor, took, error)


def losses() -> None:
    v = 151936
    for t in (4096, 8192):
        z, target = randn(t, v), torch.randint(0, v, (t,), device="cuda")
        want_z = z[:32].double().requires_grad_()
        F.cross_entropy(want_z, target[:32]).backward()
        got_z = z[:32].clone().requires_grad_()
        ce.cross_entropy(got_z, target[:32]).backward()
        error = relative(got_z.grad, want_z.grad)
        assert error < 5e-3, error

        def ours(z=z, target=target):
            leaf = z.detach().requires_grad_()
            torch.autograd.grad(ce.cross_entropy(leaf, target), leaf)

        def theirs(z=z, target=target):
            leaf = z.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(leaf, target), leaf)

        took = {k: (a * 1e3, b) for k, (a, b) in wall_ms({"kernelswap": ours, "torch bf16": theirs}, 5).items()}
        row("K6 cross entropy f+b", f"{t}x{v}", t * v * 4 / BANDWIDTH * 1e6, took, error)
        del z
    rate = matrix_rate()
    for h in (1024, 4096):
        t = 8192
        x, w, target = randn(t, h), randn(v, h) * 0.02, torch.randint(0, v, (t,), device="cuda")

        def ours(x=x, w=w, target=target):
            p, q = x.detach().requires_grad_(), w.detach().requires_grad_()
            return torch.autograd.grad(head.linear_cross_entropy(p, q, None, target), (p, q))

        def eager(x=x, w=w, target=target):
            p, q = x.detach().requires_grad_(), w.detach().requires_grad_()
            return torch.autograd.grad(F.cross_entropy((p @ q.t()).float(), target), (p, q))

        calls = {"kernelswap": ours, "eager": eager}
        if liger:

            def ligers(x=x, w=w, target=target):
                p, q = x.detach().requires_grad_(), w.detach().requires_grad_()
                loss = LigerFusedLinearCrossEntropyFunction.apply(p, q, target)
                return torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, (p, q))

            calls["Liger"] = ligers
        error = max(relative(a, b) for a, b in zip(ours(), eager(), strict=True))
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ours()
        beyond = (torch.cuda.max_memory_allocated() - before - (t * h + v * h) * 2) / 2**30
        took = {k: (a * 1e3, b) for k, (a, b) in wall_ms(calls, 3).items()}
        row("K7 LM head + CE f+b", f"{t}x{h}x{v}", 6 * t * h * v / rate * 1e6, took, error)
        ROWS[-1]["gib_beyond_gradients"] = round(beyond, 3)
        print(f"   {beyond:.2f} GiB beyond the gradients")
        del x, w
        torch.cuda.empty_cache()


def matrix_rate() -> float:
    """Operations per second of a bf16 product on random data."""
    left, right = randn(8192, 8192), randn(8192, 8192)
    return 2 * 8192**3 / (device_us({"mm": [lambda: left @ right] * 8})["mm"][0] * 1e-6)


def hosts() -> None:
    x, w, g = randn(1, 1024), randn(1024), randn(1, 3072)
    q, k = randn(1, 1, 16, 128).transpose(1, 2), randn(1, 1, 8, 128).transpose(1, 2)
    c, d = randn(1, 1, 128), randn(128)
    with torch.no_grad():
        costs = {
            "RMSNorm": host_us(lambda: rms.rms_norm(x, w, 1e-6)),
            "SiLU*mul": host_us(lambda: glu.act_mul(g, g)),
            "RoPE": host_us(lambda: rope.rope(q, k, c, c)),
            "q/k-norm+RoPE": host_us(lambda: rope.norm_rope(q, k, d, d, c, c, 1e-6)),
            "F.rms_norm": host_us(lambda: F.rms_norm(x, (1024,), w, 1e-6)),
            "eager RMSNorm": host_us(lambda: eager_rms(x, w)),
        }
    leaf = x.detach().requires_grad_()
    costs["RMSNorm with grad"] = host_us(lambda: rms.rms_norm(leaf, w, 1e-6))
    ROWS.append({"kernel": "H1 host cost", "us": costs})
    print("H1 host us: " + "  ".join(f"{k} {v:.1f}" for k, v in costs.items()))


if __name__ == "__main__":
    torch.manual_seed(0)
    BANDWIDTH = element_wise_bandwidth()
    print(f"element-wise bandwidth {BANDWIDTH / 1e12:.2f} TB/s")
    for part in (hosts, rms_norm, rms_norm_backward, gated, rotary, losses):
        part()
        torch.cuda.empty_cache()
    if len(sys.argv) > 1:
        write(ROWS, Path(sys.argv[1]))
