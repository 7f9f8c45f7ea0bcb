"""What `gpu_tune.py` looks at: calls of the bundled kernels by shape, with their references."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernel_files import Kernels
from gpu_rows import BF, copies, randn
from gpu_timing import CUDA, DEVICE
from torch import Tensor

EPS = 1e-6
HALF = BF if CUDA else torch.float16
"""What the decode kernel takes."""
SIZES = {
    "K1": ("16384x4096", "4096x4096", "16384x1024", "16x4096", "1x4096"),
    "K2": ("16384x4096", "16384x1024"),
    "K3": ("16384x4096", "4096x4096", "1x4096"),
    "K4": ("16384x32x8x128", "16x32x8x128"),
    "K5": ("16384x14336", "16384x3072", "16x14336", "1x14336"),
    "K6": ("8192x151936",),
    "K7": ("8192x4096x151936", "8192x1024x151936"),
    "LN": ("16384x4096", "16x4096"),
    "GN": ("16384x4096", "16x4096"),
    "SM": ("16384x4096", "4096x32768"),
    "K8": ("1x32768x32x8x128", "32x8192x32x8x128", "1x1024x32x8x128", "32x1024x32x8x128"),
    "K10": tuple(f"{m}x{model}" for model in ("1024x2048x1024x3072", "4096x4096x1024x12288") for m in (1, 8, 32)),
}
"""The benchmark's, by row: rows x N; tokens x heads x key heads x dim; rows x vocabulary; rows x hidden x vocabulary; batch x keys x as K4; rows x hidden x q x k x intermediate."""
FIRST = ("K1 16384x4096", "K3 16384x4096", "K4 16384x32x8x128", "K8 1x32768x32x8x128", "K7 8192x4096x151936")
PARTS = {
    "LN": (2,),
    "GN": (2,),
    "SM": (2,),
    "K1": (2,),
    "K2": (2,),
    "K3": (2,),
    "K4": (1, 4),
    "K5": (2,),
    "K6": (2,),
    "K7": (3,),
    "K8": (2, 5),
    "K10": (5,),
}
"""How many numbers a shape of each row has; what is left out is as in the benchmark."""


@dataclasses.dataclass
class Case:
    """One call. `inputs`: as many as keep the L2 cold. `others`: further calls of the same bucket, checked and not timed."""

    row: str
    repository: str
    kernel: str
    shape: str
    inputs: Callable[[], list[tuple[tuple[Any, ...], tuple[Tensor, ...] | None]]]
    call: Callable[..., Any]
    reference: Callable[..., Any]
    tolerance: float
    bytes_needed: int
    others: Callable[[], list[tuple[tuple[Any, ...], tuple[Tensor, ...] | None]]] = list
    wanted: Sequence[int] = ()
    exact: Callable[..., list[Tensor]] | None = None
    queued: bool = False
    repeat: int = 1
    weight: float = 1.0
    """Its share of the time."""


def among_nan(t: Tensor) -> Tensor:
    """The same numbers with NaN on both sides: whoever reads outside and uses it is wrong."""
    if not t.is_floating_point():
        return t
    around = torch.full((t.numel() + 1024,), float("nan"), dtype=t.dtype, device=t.device)
    inside = around[512 : 512 + t.numel()]
    inside.copy_(t.reshape(-1))
    return inside.view(t.shape)


def eager_rms(x: Tensor, w: Tensor) -> Tensor:
    f = x if x.dtype is torch.float64 else x.float()
    f = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)
    return w * f.to(x.dtype)


def norms(k: Kernels, row: str, m: int, n: int) -> list[Case]:
    rms = k.of("kernelswap/layers").rms_norm
    add, backward = row == "K3", row == "K2"

    def args(m: int) -> tuple[Tensor, ...]:
        return tuple(among_nan(t) for t in ((randn(m, n), randn(m, n), randn(n)) if add else (randn(m, n), randn(n))))

    def dys(m: int, *, back: bool) -> tuple[Tensor, ...] | None:
        return (tuple(randn(m, n) for _ in range(1 + add))) if back else None

    def plain(*given: Tensor) -> Any:
        if not add:
            return eager_rms(*given)
        s = given[0] + given[1]
        return s, eager_rms(s, given[2])

    def case(kernel: str, *, back: bool) -> Case:
        return Case(
            row, "kernelswap/layers", kernel, f"{m}x{n}{' f+b' * back}",
            lambda: [(args(m), dys(m, back=back)) for _ in range(copies(m * n * (8 if add else 4)))],
            (lambda x, d, w: rms.add_rms_norm(x, d, w, EPS)) if add else (lambda x, w: rms.rms_norm(x, w, EPS)),
            plain, 6e-3 if add or back else 4e-3, m * n * 160,
            others=lambda: [(args(m + 3), dys(m + 3, back=back))],
            wanted=tuple(range(2 + add)) if back else (), repeat=8 if m <= 16 else 1,
        )  # fmt: skip

    if add:
        return [case("rms_norm.add", back=False), *([case("rms_norm.backward", back=True)] if m > 64 else [])]
    return [case("rms_norm.backward", back=True)] if backward else [case("rms_norm.forward", back=False)]


def rotary(k: Kernels, row: str, t: int, hq: int, hk: int, d: int) -> list[Case]:
    rope = k.of("kernelswap/layers").rope

    def heads(t: int, h: int) -> Tensor:
        return among_nan(randn(1, t, h, d)).transpose(1, 2)

    def turn(t: int) -> tuple[Tensor, Tensor]:
        angle = torch.arange(t, device=DEVICE)[:, None] * (10000.0 ** (-torch.arange(0, d, 2, device=DEVICE) / d))[None, :]
        return tuple(among_nan(f(torch.cat([angle, angle], -1))[None].to(BF)) for f in (torch.cos, torch.sin))  # type: ignore[return-value]  # two

    def normed(q: Tensor, k: Tensor, w: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rope.formula(eager_rms(q, w), eager_rms(k, v), cos, sin)

    count = copies(t * (hq + hk) * d * 4)
    shared: dict[str, Any] = {"tolerance": 8e-3, "bytes_needed": t * (hq + hk) * d * 100, "repeat": 8 if t <= 16 else 1}

    def with_norm(t: int, count: int) -> list[Any]:
        (cos, sin), w, v = turn(t), randn(d), randn(d)
        return [((heads(t, hq), heads(t, hk), w, v, cos, sin), None) for _ in range(count)]

    def without(t: int, count: int, *, back: bool) -> list[Any]:
        cos, sin = turn(t)
        return [
            ((heads(t, hq), heads(t, hk), cos, sin), (heads(t, hq), heads(t, hk)) if back else None) for _ in range(count)
        ]  # fmt: skip

    text = f"{t} tokens, {hq} and {hk} heads of {d}"
    cases = [
        Case(row, "kernelswap/layers", "rope", f"q/k norm, {text}", lambda: with_norm(t, count),
             lambda q, k, w, v, c, s: rope.norm_rope(q, k, w, v, c, s, EPS), normed, others=lambda: with_norm(t + 3, 1), **shared),
        Case(row, "kernelswap/layers", "rope", text, lambda: without(t, count, back=False), rope.rope, rope.formula,
             others=lambda: without(t + 3, 1, back=False), **shared),
    ]  # fmt: skip
    if t > 64:
        more = {"wanted": (0, 1), "others": lambda: without(t + 3, 1, back=True)}
        cases.append(
            Case(row, "kernelswap/layers", "rope", f"f+b, {text}", lambda: without(t, count, back=True), rope.rope, rope.formula,
                 **shared, **more)
        )  # fmt: skip
    return cases


def gated(k: Kernels, row: str, m: int, n: int) -> list[Case]:
    glu = k.of("kernelswap/layers").glu

    def args(m: int) -> tuple[Tensor, ...]:
        return among_nan(randn(m, n)), among_nan(randn(m, n))

    def case(kernel: str, *, back: bool) -> Case:
        return Case(
            row, "kernelswap/layers", kernel, f"{m}x{n}{' f+b' * back}",
            lambda: [(args(m), (randn(m, n),) if back else None) for _ in range(copies(m * n * 6))],
            glu.act_mul, lambda g, u: F.silu(g) * u, 6e-3, m * n * 120,
            others=lambda: [(args(m + 3), (randn(m + 3, n),) if back else None)] if m > 64 else [],
            wanted=(0, 1) if back else (), repeat=8 if m <= 16 else 1, weight=0.5,
        )  # fmt: skip

    return [case("glu.forward", back=False), *([case("glu.backward", back=True)] if m > 4096 else [])]


def others(k: Kernels, row: str, m: int, n: int) -> list[Case]:
    """LayerNorm, the gated norm with silu, softmax: forward, and backward of many rows."""
    it = k.of("kernelswap/layers")
    calls: dict[str, tuple[str, Callable[..., Tensor], Callable[..., Tensor], int]] = {
        "LN": ("layer_norm", lambda x, w, b: it.layer_norm.layer_norm(x, w, b, EPS), lambda x, w, b: F.layer_norm(x, (n,), w, b, EPS), 1),
        "GN": ("gated_norm", lambda x, z, w: it.gated_norm.rms_norm_gated(x, z, w, EPS),
               lambda x, z, w: it.gated_norm.formula(x, z, w, EPS), 2),
        "SM": ("softmax", it.softmax.softmax, lambda x: x.softmax(-1), 1),
    }  # fmt: skip
    name, call, plain, of_rows = calls[row]

    def args(m: int) -> tuple[Tensor, ...]:
        return tuple(among_nan(randn(m, n) if i < of_rows else randn(n)) for i in range(1 if row == "SM" else 3))

    def case(part: str, *, back: bool) -> Case:
        return Case(
            row, "kernelswap/layers", f"{name}.{part}", f"{m}x{n}{' f+b' * back}",
            lambda: [(args(m), (randn(m, n),) if back else None) for _ in range(copies(m * n * (2 + 2 * of_rows)))],
            call, plain, 8e-3, m * n * 160, others=lambda: [(args(m + 3), (randn(m + 3, n),) if back else None)],
            wanted=tuple(range(1 if row == "SM" else 3)) if back else (), repeat=8 if m <= 16 else 1, weight=0.5,
        )  # fmt: skip

    return [case("forward", back=False), *([case("backward", back=True)] if m > 64 else [])]


def cross_entropy(k: Kernels, row: str, t: int, v: int) -> list[Case]:
    ours = k.of("kernelswap/loss").cross_entropy
    one = torch.ones((), device=DEVICE)

    def args(t: int) -> Any:
        return (among_nan(randn(t, v)), torch.randint(0, v, (t,), device=DEVICE)), (one,)

    def exact(z: Tensor, target: Tensor) -> list[Tensor]:
        loss = torch.zeros((), dtype=torch.float64, device=z.device)
        dz = torch.empty(z.shape, dtype=torch.float32, device=z.device)
        for start in range(0, len(z), 256):  # float64 of all of it would be 20 GB
            part = slice(start, start + 256)
            leaf = z[part].double().requires_grad_()
            some = F.cross_entropy(leaf, target[part], reduction="sum") / len(z)
            dz[part] = torch.autograd.grad(some, leaf)[0]
            loss += some.detach()
        return [loss.float(), dz]

    return [
        Case(row, "kernelswap/loss", "cross_entropy", f"{t}x{v}", lambda: [args(t)], ours.cross_entropy, F.cross_entropy, 6e-3,
             t * v * 48, others=lambda: [args(67)], wanted=(0,), exact=exact, queued=True)
    ]  # fmt: skip


def head(k: Kernels, row: str, t: int, h: int, v: int) -> list[Case]:
    ours = k.of("kernelswap/loss").loss
    one = torch.ones((), device=DEVICE)

    def args() -> Any:
        return (randn(t, h), randn(v, h) * 0.02, torch.randint(0, v, (t,), device=DEVICE)), (one,)

    def exact(x: Tensor, w: Tensor, target: Tensor) -> list[Tensor]:
        wide = w.double()
        loss, dw, dx = (
            torch.zeros((), dtype=torch.float64, device=x.device),
            torch.zeros_like(wide),
            torch.empty(x.shape, device=x.device),
        )
        for start in range(0, t, 256):
            part = slice(start, start + 256)
            rows = x[part].double()
            z = (rows @ wide.t()).requires_grad_()
            some = F.cross_entropy(z, target[part], reduction="sum") / t
            (dz,) = torch.autograd.grad(some, z)
            dx[part] = (dz @ wide).float()
            dw.addmm_(dz.t(), rows)
            loss += some.detach()
        return [loss.float(), dx, dw.float()]

    return [
        Case(row, "kernelswap/loss", "linear_cross_entropy", f"{t}x{h}x{v}", lambda: [args()],
             lambda x, w, target: ours.linear_cross_entropy(x, w, None, target), eager_head, 1e-2,
             v * h * 40 + 256 * v * 40, wanted=(0, 1), exact=exact, queued=True, weight=0.7)
    ]  # fmt: skip


def eager_head(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.t(), target)


def decode(k: Kernels, row: str, b: int, n: int, hq: int, hk: int, d: int) -> list[Case]:  # a shape
    ours = k.of("kernelswap/attention").decode

    def args(n: int, live: Tensor) -> Any:
        q, k, v = (among_nan(randn(b, h, m, d, dtype=HALF)) for h, m in ((hq, 1), (hk, n), (hk, n)))
        return (q, k, v, live), None

    def all_live() -> Tensor:
        return torch.full((b,), n, dtype=torch.int32, device=DEVICE)

    def others() -> list[Any]:
        """Fewer keys live, one of them alone, and what lies behind is NaN where it would be used."""
        fewer = torch.randint(1, n, (b,), dtype=torch.int32, device=DEVICE)
        return [args(n, fewer), args(n, torch.ones_like(fewer)), args(n + 13, all_live() + 13)]

    def reference(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
        out = []
        for i in range(b):
            live = int(length[i])
            scores = q[i].view(hk, hq // hk, d) @ k[i, :, :live].transpose(1, 2) * d**-0.5
            out.append((torch.softmax(scores, -1) @ v[i, :, :live]).view(1, hq, d))
        return torch.stack(out)

    moved = 2 * b * hk * n * d * 2
    return [
        Case(row, "kernelswap/attention", "decode", f"{b}x{n}, {hq} and {hk} heads of {d}",
             lambda: [args(n, all_live()) for _ in range(min(8, copies(moved)))],
             lambda q, k, v, length: ours.decode(q, k, v, scale=d**-0.5, length=length), reference, 6e-3, moved * 16,
             others=others, repeat=8 if moved < 1 << 26 else 1, weight=1.5)
    ]  # fmt: skip


def few(k: Kernels, row: str, m: int, hidden: int, q: int, kv: int, inner: int) -> list[Case]:
    ours = k.of("kernelswap/layers").projections

    def args(m: int, *sizes: int) -> Any:
        return (among_nan(randn(m, hidden)), *(among_nan(randn(n, hidden) / hidden**0.5) for n in sizes)), None

    def case(kernel: str, call: Callable[..., Any], plain: Callable[..., Any], *sizes: int) -> Case:
        weights = sum(sizes) * hidden * 2
        return Case(
            row, "kernelswap/layers", f"projections.{kernel}", f"{m}x{hidden}x{sum(sizes)}",
            lambda: [args(m, *sizes) for _ in range(copies(weights))], call, plain, 8e-3, 8 * weights,
            others=lambda: [args(m - 1, *sizes)] if m > 2 else [],
        )  # fmt: skip

    return [
        case("project", lambda x, *w: ours.project(x, w, (None,) * 3), lambda x, *w: tuple(F.linear(x, one) for one in w), q, kv, kv),
        case("gate_up", ours.gate_up, lambda x, g, u: F.silu(F.linear(x, g)) * F.linear(x, u), inner, inner),
    ]  # fmt: skip


MAKERS: dict[str, Callable[..., list[Case]]] = {
    "K1": norms, "K2": norms, "K3": norms, "K4": rotary, "K5": gated, "LN": others, "GN": others, "SM": others, "K6": cross_entropy, "K7": head, "K8": decode, "K10": few,
}  # fmt: skip


def cases(kernels: Kernels, asked: argparse.Namespace) -> list[Case]:
    """What was asked for; else the benchmark's shapes, those of targets that are hard to reach first."""
    if asked.shape or asked.model:
        shapes = [s.replace("=", " ") for s in asked.shape] + (of_model(asked.model) if asked.model else [])
    else:
        shapes = [*FIRST, *(s for s in (f"{row} {size}" for row, sizes in SIZES.items() for size in sizes) if s not in FIRST)]
        shapes = shapes[: len(FIRST)] if asked.quick else shapes
    found = []
    for text in shapes:
        row, numbers = numbered(text)
        if row in asked.only or not asked.only:
            found += MAKERS[row](kernels, row, *numbers)
    return found


def numbered(text: str) -> tuple[str, list[int]]:
    """`K1 8192x5120` as a row and numbers, those left out as in the benchmark.

    Raises:
        SystemExit: it is no shape of that row.
    """
    row, _, size = text.partition(" ")
    row = row.upper()
    if row not in MAKERS:
        raise SystemExit(f"--shape {text.replace(' ', '=')}: the kernels are {', '.join(MAKERS)}")
    try:
        numbers = [int(n) for n in size.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in PARTS[row] or min(numbers, default=0) < 1:
        example = SIZES[row][0]
        raise SystemExit(f"--shape {row}={size}: not a shape of {row}; one is {row}={example}")
    whole = [int(n) for n in SIZES[row][0].split("x")]
    return row, numbers + whole[len(numbers) :]


def of_model(name: str) -> list[str]:
    """The shapes of a language model's layers: at prefill and training of some thousand tokens, and at decode of one and 32.

    Raises:
        SystemExit: it has no such configuration.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name).get_text_config()
        width, heads, vocab, inner = config.hidden_size, config.num_attention_heads, config.vocab_size, config.intermediate_size
    except (OSError, ValueError, AttributeError) as e:
        raise SystemExit(f"--model {name}: no configuration of a language model: {str(e).strip().splitlines()[0]}") from e
    few = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or width // heads
    longest = min(32768, getattr(config, "max_position_embeddings", 32768))
    many, one = 16384, 1
    return [
        *(f"{row} {t}x{width}" for row in ("K1", "K3") for t in (many, one)),
        *(f"K4 {t}x{heads}x{few}x{dim}" for t in (many, one)),
        *(f"K5 {t}x{inner}" for t in (many, one)),
        *(f"K10 {t}x{width}x{heads * dim}x{few * dim}x{inner}" for t in (one, 8, 32)),
        *(f"K8 {b}x{n}x{heads}x{few}x{dim}" for b, n in ((1, longest), (32, min(8192, longest)))),
        f"K2 {many}x{width}",
        f"K7 8192x{width}x{vocab}",
    ]
