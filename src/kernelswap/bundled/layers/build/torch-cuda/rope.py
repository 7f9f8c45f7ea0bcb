"""Rotary position embedding of q and k in one launch, with or without the RMSNorm of each head before it.

    out1 = x1 * cos1 - x2 * sin1        out2 = x2 * cos2 + x1 * sin2        of the first r of d dimensions; the rest passes through

    form             x1 and x2, out1 and out2       cos1 and cos2 of pair i (sin likewise)
    HALVES           the halves of r                i and r/2 + i of r       GPT-NeoX, Llama and most
    PAIRS            even and odd dimensions        i of r, both             GLM, Ernie, Helium
    PAIRS_WIDE       even and odd dimensions        2i and 2i + 1 of r       Cohere
    HALVES_NARROW    the halves of r                i of r/2, both           GPT-OSS
    PAIRS_TO_HALVES  even and odd; the halves       i of r, both             DeepSeek-V3

Source: Su et al. 2021, arXiv:2104.09864, which has pairs; halves are GPT-NeoX's; q/k norm: Qwen3.
Backward is the same rotation with -sin, then the norm's (`rope_gradients.py`). Bytes: q, k read once and written once, cos and sin once per token.
Layout: tokens by heads by d, with any strides over batch, sequence and head; d contiguous.
"""

# long: five forms of one rotation, with and without the norm before it, share one kernel and one host side.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import INTERPRETED, bind, current_device, current_stream, multiprocessors
from ._second import differentiable, recorded
from .rms_norm import formula as _norm_formula
from .rope_gradients import gradients
from .tuning import bound, size, space


@triton.jit(do_not_specialize=["S", "eps"])
def _forward(
    Q, K, COS, SIN, QO, KO, QW, KW, S, eps, sqb, sqs, sqh, skb, sks, skh, oqb, oqs, oqh, okb, oks, okh, scb, scs,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, INVERSE: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, FORM: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """HB heads of one token a program: the q heads of a token first, then its k heads."""
    GQ: tl.constexpr = (HQ + HB - 1) // HB
    GK: tl.constexpr = (HK + HB - 1) // HB
    token = tl.program_id(0) // (GQ + GK)
    group = tl.program_id(0) % (GQ + GK)
    b = (token // S).to(tl.int64)
    s = (token % S).to(tl.int64)
    c = b * scb + s * scs
    if group < GQ:
        _rotate(
            Q, QO, QW, COS, SIN, b * sqb + s * sqs, sqh, b * oqb + s * oqs, oqh, c, group * HB, eps,
            HQ, D, HB, HALF, NORM, INVERSE, R, REST, FORM, EVICT,
        )  # fmt: skip
    else:
        _rotate(
            K, KO, KW, COS, SIN, b * skb + s * sks, skh, b * okb + s * oks, okh, c, (group - GQ) * HB, eps,
            HK, D, HB, HALF, NORM, INVERSE, R, REST, FORM, EVICT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["S", "T", "programs", "eps"])
def _forward_staying(
    Q, K, COS, SIN, QO, KO, QW, KW, S, T, programs, eps, sqb, sqs, sqh, skb, sks, skh, oqb, oqs, oqh, okb, oks, okh, scb, scs,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, HALF: tl.constexpr,
    NORM: tl.constexpr, INVERSE: tl.constexpr, R: tl.constexpr, REST: tl.constexpr, FORM: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The same in programs that stay with their group of heads and go from token to token of T."""
    GQ: tl.constexpr = (HQ + HB - 1) // HB
    GK: tl.constexpr = (HK + HB - 1) // HB
    group = tl.program_id(0) % (GQ + GK)
    first = tl.program_id(0) // (GQ + GK)
    if group < GQ:
        for token in tl.range(first, T, programs, num_stages=STAGES):
            b = (token // S).to(tl.int64)
            s = (token % S).to(tl.int64)
            _rotate(
                Q, QO, QW, COS, SIN, b * sqb + s * sqs, sqh, b * oqb + s * oqs, oqh, b * scb + s * scs, group * HB, eps,
                HQ, D, HB, HALF, NORM, INVERSE, R, REST, FORM, EVICT,
            )  # fmt: skip
    else:
        for token in tl.range(first, T, programs, num_stages=STAGES):
            b = (token // S).to(tl.int64)
            s = (token % S).to(tl.int64)
            _rotate(
                K, KO, KW, COS, SIN, b * skb + s * sks, skh, b * okb + s * oks, okh, b * scb + s * scs, (group - GQ) * HB, eps,
                HK, D, HB, HALF, NORM, INVERSE, R, REST, FORM, EVICT,
            )  # fmt: skip


@triton.jit
def _rotate(
    X, O, W, COS, SIN, base, sh, obase, oh, c, h0, eps,
    H: tl.constexpr, D: tl.constexpr, HB: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, INVERSE: tl.constexpr,
    R: tl.constexpr, REST: tl.constexpr, FORM: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    # FORM as in the table above; PAIRS_TO_HALVES goes the other way in INVERSE
    FROM_PAIRS: tl.constexpr = FORM == 1 or FORM == 2 or (FORM == 4 and not INVERSE)
    TO_PAIRS: tl.constexpr = FORM == 1 or FORM == 2 or (FORM == 4 and INVERSE)
    h = h0 + tl.arange(0, HB)
    i = tl.arange(0, HALF)
    j = tl.arange(0, 2 * HALF)
    m = i < R // 2
    inside = (h < H)[:, None] & m[None, :]
    pairs = (h < H)[:, None] & (j < R)[None, :]
    at = base + h[:, None].to(tl.int64) * sh + i[None, :]
    wide = base + h[:, None].to(tl.int64) * sh + j[None, :]
    if FROM_PAIRS:  # neighbours in one load, taken apart in registers
        x = tl.load(X + wide, mask=pairs, other=0.0, eviction_policy=EVICT).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(x, (HB, HALF, 2)))
    else:
        x1 = tl.load(X + at, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
        x2 = tl.load(X + at + R // 2, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if FORM == 2:
        c1, c2 = tl.split(tl.reshape(tl.load(COS + c + j, mask=j < R, other=0.0).to(tl.float32), (HALF, 2)))
        s1, s2 = tl.split(tl.reshape(tl.load(SIN + c + j, mask=j < R, other=0.0).to(tl.float32), (HALF, 2)))
    else:
        c1 = tl.load(COS + c + i, mask=m, other=0.0).to(tl.float32)
        s1 = tl.load(SIN + c + i, mask=m, other=0.0).to(tl.float32)
        if FORM == 0:
            c2 = tl.load(COS + c + R // 2 + i, mask=m, other=0.0).to(tl.float32)
            s2 = tl.load(SIN + c + R // 2 + i, mask=m, other=0.0).to(tl.float32)
        else:
            c2 = c1
            s2 = s1
    if NORM:
        w1 = tl.load(W + i, mask=m, other=0.0).to(tl.float32)
        w2 = tl.load(W + D // 2 + i, mask=m, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(x1 * x1 + x2 * x2, axis=1) / D + eps)
        dt = X.dtype.element_ty
        if NORM == 2:  # Gemma's: 1 + w, rounded once
            x1 = (x1 * rstd[:, None] * (1.0 + w1)[None, :]).to(dt).to(tl.float32)
            x2 = (x2 * rstd[:, None] * (1.0 + w2)[None, :]).to(dt).to(tl.float32)
        else:
            x1 = ((x1 * rstd[:, None]).to(dt).to(tl.float32) * w1[None, :]).to(dt).to(tl.float32)
            x2 = ((x2 * rstd[:, None]).to(dt).to(tl.float32) * w2[None, :]).to(dt).to(tl.float32)
    if INVERSE:
        y1 = x1 * c1[None, :] + x2 * s2[None, :]
        y2 = x2 * c2[None, :] - x1 * s1[None, :]
    else:
        y1 = x1 * c1[None, :] - x2 * s1[None, :]
        y2 = x2 * c2[None, :] + x1 * s2[None, :]
    if TO_PAIRS:
        to = obase + h[:, None].to(tl.int64) * oh + j[None, :]
        tl.store(O + to, tl.reshape(tl.join(y1, y2), (HB, 2 * HALF)), mask=pairs)
    else:
        to = obase + h[:, None].to(tl.int64) * oh + i[None, :]
        tl.store(O + to, y1, mask=inside)
        tl.store(O + to + R // 2, y2, mask=inside)
    if REST:
        beyond = R + tl.arange(0, REST)
        left = (h < H)[:, None] & (beyond < D)[None, :]
        x = tl.load(X + base + h[:, None].to(tl.int64) * sh + beyond[None, :], mask=left)
        tl.store(O + obase + h[:, None].to(tl.int64) * oh + beyond[None, :], x, mask=left)


# -- host side ----------------------------------------------------------------------------------------------------

_PLAIN = (Tensor, torch.nn.Parameter)
_bound: dict[tuple[Any, ...], Any] = {}
_shapes: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]] = {}
space(
    "rope", _bound, _shapes, HB=(1, 2, 4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8), EVICT=("evict_first", ""),
    PROGRAMS=(0, 4, 8, 16, 32),  # that stay, on each multiprocessor, for all groups of heads together; 0: one for each token and group
    STAGES=(1, 2, 3), needs={"STAGES": "PROGRAMS"},
    also=(
        {"HB": 32},
        {"HB": 8, "num_warps": 2},
        {"HB": 8, "num_warps": 1},
        {"HB": 16, "num_warps": 2},
        {"HB": 32, "num_warps": 8},
        {"HB": 4, "num_warps": 1},
        {"HB": 8, "num_warps": 2, "PROGRAMS": 16, "STAGES": 2},
        {"HB": 8, "num_warps": 2, "PROGRAMS": 32, "STAGES": 1},
        {"HB": 8, "num_warps": 4, "PROGRAMS": 8, "STAGES": 3},
    ),
)  # fmt: skip
MAX_SHAPES = 4096  # one entry per (q, k, cos) layout ever seen; forgotten all at once, and found again at the next call


HALVES, PAIRS, PAIRS_WIDE, HALVES_NARROW, PAIRS_TO_HALVES = range(5)
_DENSE = {PAIRS, HALVES_NARROW, PAIRS_TO_HALVES}  # whose answers models put together, which makes them contiguous


def _half(x: Tensor) -> Tensor:
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def formula(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, form: int = HALVES) -> tuple[Tensor, Tensor]:
    """The same in plain torch: for tracing, for tensor subclasses, for shapes the kernel does not take, and to read."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    if form != HALVES:
        return _turned(q, cos, sin, form), _turned(k, cos, sin, form)
    width = cos.shape[-1]
    if width == q.shape[-1]:
        return q * cos + _half(q) * sin, k * cos + _half(k) * sin
    a, b = q[..., :width], k[..., :width]
    a, b = a * cos + _half(a) * sin, b * cos + _half(b) * sin
    return torch.cat((a, q[..., width:]), dim=-1), torch.cat((b, k[..., width:]), dim=-1)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, form: int) -> Tensor:
    """One of the other forms: in float32 or wider, rounded once."""
    kind = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(kind), sin.to(kind)
    width = cos.shape[-1] * (2 if form == HALVES_NARROW else 1)
    f = x[..., :width].to(kind)
    x1, x2 = f.chunk(2, dim=-1) if form == HALVES_NARROW else (f[..., ::2], f[..., 1::2])
    if form == PAIRS_WIDE:
        c1, c2, s1, s2 = cos[..., ::2], cos[..., 1::2], sin[..., ::2], sin[..., 1::2]
    else:
        c1, s1 = cos[..., : width // 2], sin[..., : width // 2]
        c2, s2 = c1, s1
    y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    y = torch.stack((y1, y2), dim=-1).flatten(-2) if form in (PAIRS, PAIRS_WIDE) else torch.cat((y1, y2), dim=-1)
    return torch.cat((y.to(x.dtype), x[..., width:]), dim=-1)


def takes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, form: int = HALVES) -> bool:
    """The kernel can take these; everything else goes through the formula."""
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and q.is_cuda is not INTERPRETED
        and q.dim() == 4
        and cos.dim() == 3
        and unsqueeze_dim in (1, 2)
        and q.dtype is k.dtype
        and sin.dtype is cos.dtype
        and (cos.dtype is q.dtype or (form != HALVES and cos.dtype is not torch.float64))
        and cos.device == q.device
        and q.dtype is not torch.float64
        and _agree(q.shape, k.shape, cos.shape, sin.shape, 3 - unsqueeze_dim, cos.shape[2] * (2 if form == HALVES_NARROW else 1))
        and not (torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
    )


def _agree(q: torch.Size, k: torch.Size, cos: torch.Size, sin: torch.Size, tokens: int, width: int) -> bool:
    """One batch, one number of tokens and of dimensions, of which `width` turn; cos and sin for each sequence or for all."""
    return (
        len(k) == 4
        and cos == sin
        and q[0] == k[0]
        and q[tokens] == k[tokens] == cos[1]
        and q[3] == k[3] >= width > 0
        and not width & 1
        and cos[0] in (1, q[0])
        and not q[3] & 15
        and q.numel() > 0
        and k.numel() > 0
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, form: int = HALVES) -> tuple[Tensor, Tensor]:
    """Rotate q (B, HQ, S, D) and k (B, HK, S, D) by cos, sin (B or 1, S, R), R <= D; `unsqueeze_dim` 2: (B, S, H, D).

    cos and sin (S, R), as broadcasting has it: q and k (B, S, H, D) or (S, H, D), or heads first with `unsqueeze_dim` 0.
    HALVES_NARROW: R / 2 in the place of R. Any strides with D contiguous; outputs lie as the inputs, or
    contiguously where a model's own do (a part; PAIRS, HALVES_NARROW, PAIRS_TO_HALVES). Inputs are not written.
    """
    if cos.dim() == 2 and sin.dim() == 2 and unsqueeze_dim in (0, 1) and 3 <= q.dim() == k.dim() <= 4:
        if q.dim() == 3:
            a, b = rope(q[None], k[None], cos[None], sin[None], 1 + unsqueeze_dim, form)
            return a[0], b[0]
        return rope(q, k, cos[None], sin[None], 1 + unsqueeze_dim, form)
    if torch.compiler.is_compiling() or type(q) not in _PLAIN or type(k) not in _PLAIN:
        return formula(q, k, cos, sin, unsqueeze_dim, form)
    key = _key(q, k, cos, sin, unsqueeze_dim, 0, 0, False, form)
    launch = _shapes.get(key)
    if launch is None:
        if not takes(q, k, cos, sin, unsqueeze_dim, form):
            return formula(q, k, cos, sin, unsqueeze_dim, form)
        launch = _prepared(key, q, k, cos, sin, unsqueeze_dim, None, 0, 0, False, form)
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            return formula(q, k, cos, sin, unsqueeze_dim, form)
        if q.requires_grad or k.requires_grad:
            return _Rope.apply(q, k, cos, sin, unsqueeze_dim, form, launch)  # type: ignore[no-any-return]  # autograd.Function is untyped
    return launch(q, k, cos, sin, None, None, 0.0)


def norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float,
    unsqueeze_dim: int = 1, offset: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """RMSNorm of every head of q and k (weights (D,)), then `rope`: Qwen3's attention between projection and scores.

    `offset` 1: the norm scales by 1 + weight, as Gemma 3's.
    """
    if (
        torch.compiler.is_compiling()
        or type(q) not in _PLAIN
        or type(k) not in _PLAIN
        or q_weight.dtype is not q.dtype
        or k_weight.dtype is not q.dtype
        or q_weight.shape != q.shape[3:]
        or k_weight.shape != q.shape[3:]
        or q_weight.stride(0) != 1
        or k_weight.stride(0) != 1
    ):
        return _both(q, k, q_weight, k_weight, cos, sin, eps, unsqueeze_dim, offset)
    key = _key(q, k, cos, sin, unsqueeze_dim, 0, 1 + offset, False, HALVES)
    launch = _shapes.get(key)
    if launch is None:
        if not takes(q, k, cos, sin, unsqueeze_dim) or cos.shape[2] != q.shape[3]:
            return _both(q, k, q_weight, k_weight, cos, sin, eps, unsqueeze_dim, offset)
        launch = _prepared(key, q, k, cos, sin, unsqueeze_dim, q_weight, 0, 1 + offset, False, HALVES)
    if torch.is_grad_enabled():
        if cos.requires_grad or sin.requires_grad:
            return _both(q, k, q_weight, k_weight, cos, sin, eps, unsqueeze_dim, offset)
        if q.requires_grad or k.requires_grad or q_weight.requires_grad or k_weight.requires_grad:
            return _NormRope.apply(q, k, q_weight, k_weight, cos, sin, eps, unsqueeze_dim, offset, launch)  # type: ignore[no-any-return]  # untyped
    return launch(q, k, cos, sin, q_weight, k_weight, eps)


def _both(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, cos: Tensor, sin: Tensor, eps: float, dim: int, offset: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return formula(_norm_formula(q, v, eps, offset), _norm_formula(k, w, eps, offset), cos, sin, dim)


def _key(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, inverse: int, norm: int, rows: bool, form: int
) -> tuple[Any, ...]:
    """Everything that `takes` and `_prepare` look at, but for the types of q and k and what wants a gradient."""
    return (
        q.dtype, q.shape, q.stride(), k.dtype, k.shape, k.stride(), cos.dtype, cos.shape, cos.stride(), sin.dtype, sin.shape, sin.stride(),
        unsqueeze_dim, inverse, norm, rows, form, q.device, cos.device,
    )  # fmt: skip


def _run(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, inverse: int, norm: int = 0, rows: bool = False,
    form: int = HALVES,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`norm`: 0 none, 1 Llama's, 2 Gemma's. `rows`: the outputs lie in memory token by token, whatever the inputs' order."""
    key = _key(q, k, cos, sin, unsqueeze_dim, inverse, norm, rows, form)
    launch = _shapes.get(key) or _prepared(key, q, k, cos, sin, unsqueeze_dim, q_weight, inverse, norm, rows, form)
    return launch(q, k, cos, sin, q_weight, k_weight, eps)


def _prepared(
    key: tuple[Any, ...], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int,
    weight: Tensor | None, inverse: int, norm: int, rows: bool, form: int,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """What `_prepare` makes, kept under `key`. Only for what `takes` took, since whoever finds it does not ask again."""
    if len(_shapes) >= MAX_SHAPES:
        _shapes.clear()
    launch = _shapes[key] = _prepare(q, k, cos, sin, unsqueeze_dim, weight, inverse, norm, rows, form)
    return launch


def _prepare(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int,
    weight: Tensor | None, inverse: int, norm: int, rows: bool, form: int,
) -> Callable[..., tuple[Tensor, Tensor]]:  # fmt: skip
    """A launch with everything that shapes and strides decide filled in."""
    if q.stride(3) != 1 or k.stride(3) != 1 or cos.stride(2) != 1 or sin.stride() != cos.stride():

        def copied(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, qw: Any, kw: Any, eps: float) -> tuple[Tensor, Tensor]:
            return _run(
                q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous(), unsqueeze_dim, qw, kw, eps, inverse, norm,
                rows, form,
            )  # fmt: skip

        return copied
    h_dim, s_dim = unsqueeze_dim, 3 - unsqueeze_dim
    qs, ks, cs = q.stride(), k.stride(), cos.stride()
    dense = cos.shape[2] != q.shape[3] or form in _DENSE
    qo, ko = (_like(x, unsqueeze_dim, rows, dense).stride() for x in (q, k))
    batch, seq = q.shape[0], q.shape[s_dim]
    heads, kv_heads, dim = q.shape[h_dim], k.shape[h_dim], q.shape[3]
    device, dtype = q.get_device(), q.dtype
    strides = (
        qs[0], qs[s_dim], qs[h_dim], ks[0], ks[s_dim], ks[h_dim],
        qo[0], qo[s_dim], qo[h_dim], ko[0], ko[s_dim], ko[h_dim], cs[0] if cos.shape[0] == batch else 0, cs[1],
    )  # fmt: skip
    turned = cos.shape[2] * (2 if form == HALVES_NARROW else 1)
    rest = triton.next_power_of_2(dim - turned) if turned < dim else 0
    odd = any(x & 15 for x in strides)
    large = max(strides) > 2147483647
    tokens = batch * seq
    many = size(tokens, 64, 4096)
    bucket = (
        f"{str(dtype).removeprefix('torch.')}, {str(cos.dtype).removeprefix('torch.')}; {heads} and {kv_heads} heads of {dim}, "
        f"{turned} turned, form {form}, {('no norm', 'norm', 'centred norm')[norm]}{', inverse' * inverse}; {many} tokens"
    )
    default = {
        "HB": min(16, triton.next_power_of_2(max(heads, kv_heads))), "num_warps": 4, "EVICT": "evict_first",
        "PROGRAMS": 0, "STAGES": 2,
    }  # fmt: skip

    def compiled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, low: int) -> tuple[Any, int]:
        key = (dtype, cos.dtype, heads, kv_heads, dim, turned, form, device, inverse, norm, odd, large, many, low)
        found = _bound.get(key)
        if found is None:

            def make(c: dict[str, Any]) -> tuple[Any, int, int]:
                example = (1 << 32 if large else 4096) + odd
                extra = weight if weight is not None else q
                counts, more = ((17,), {}) if not c["PROGRAMS"] else ((17, 17, 17), {"STAGES": c["STAGES"]})
                launch = bind(
                    _forward_staying if c["PROGRAMS"] else _forward,
                    (q, k, cos, sin, q, k, extra, extra, *counts, 1e-6, *((example,) * 14)), device=device, num_warps=c["num_warps"],
                    HQ=heads, HK=kv_heads, D=dim, HB=c["HB"], HALF=triton.next_power_of_2(turned // 2), NORM=norm, INVERSE=inverse,
                    R=turned, REST=rest, FORM=form, EVICT=c["EVICT"], **more,
                )  # fmt: skip
                groups = -(-heads // c["HB"]) - (-kv_heads // c["HB"])
                return launch, groups, c["PROGRAMS"] and max(1, multiprocessors(device) * c["PROGRAMS"] // groups)

            found = _bound[key] = bound("rope", default, bucket, device, make)
        launch, groups, most = found
        if not most:
            return launch, tokens * groups
        programs = min(most, tokens)

        def staying(blocks: int, stream: int, *call: Any) -> None:
            launch(blocks, stream, *call[:9], tokens, programs, *call[9:])

        return staying, programs * groups

    launches: dict[int, tuple[Any, int]] = {}

    def run(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, qw: Any, kw: Any, eps: float) -> tuple[Tensor, Tensor]:
        if rows or dense:
            a, b = _like(q, unsqueeze_dim, rows, dense), _like(k, unsqueeze_dim, rows, dense)
        else:
            a, b = torch.empty_like(q), torch.empty_like(k)
        pq, pk, pc, ps = q.data_ptr(), k.data_ptr(), cos.data_ptr(), sin.data_ptr()
        pw, pv = (qw.data_ptr(), kw.data_ptr()) if norm else (pq, pk)
        low = (pq | pk | pc | ps | pw | pv) & 15
        found = launches.get(low)
        if found is None:
            found = launches[low] = compiled(q, k, cos, sin, low)
        launch, blocks = found
        if device == current_device():
            launch(blocks, current_stream(device), pq, pk, pc, ps, a.data_ptr(), b.data_ptr(), pw, pv, seq, eps, *strides)
        else:
            with torch.cuda.device(device):
                launch(blocks, current_stream(device), pq, pk, pc, ps, a.data_ptr(), b.data_ptr(), pw, pv, seq, eps, *strides)
        return a, b

    return run


def _like(x: Tensor, unsqueeze_dim: int, rows: bool, dense: bool) -> Tensor:
    if dense:
        return x.new_empty(x.shape)
    if not rows:
        return torch.empty_like(x)
    b, m, n, d = x.shape
    return x.new_empty((b, n, m, d)).transpose(1, 2) if unsqueeze_dim == 1 else x.new_empty(x.shape)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, form: int, launch: Any
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim, ctx.form = unsqueeze_dim, form
        if launch is None:
            return _run(q, k, cos, sin, unsqueeze_dim, None, None, 0.0, 0, form=form)
        return launch(q, k, cos, sin, None, None, 0.0)  # type: ignore[no-any-return]  # two tensors

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch types *Any
        cos, sin = ctx.saved_tensors
        if recorded():  # linear in the gradients
            return *_RopeBack.apply(dq, dk, cos, sin, ctx.unsqueeze_dim, ctx.form), None, None, None, None, None
        return *_run(dq, dk, cos, sin, ctx.unsqueeze_dim, None, None, 0.0, 1, form=ctx.form), None, None, None, None, None


class _RopeBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int, form: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.unsqueeze_dim, ctx.form = unsqueeze_dim, form
        return _run(dq, dk, cos, sin, unsqueeze_dim, None, None, 0.0, 1, form=form)

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]  # torch types *Any
        return *_Rope.apply(q, k, *ctx.saved_tensors, ctx.unsqueeze_dim, ctx.form, None), None, None, None, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, eps: float, dim: int,
        offset: int, launch: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps, ctx.dim, ctx.offset = eps, dim, offset
        return launch(q, k, cos, sin, q_weight, k_weight, eps)  # type: ignore[no-any-return]  # two tensors

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # torch types *Any
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        if recorded():
            eps, dim, offset = ctx.eps, ctx.dim, ctx.offset

            def both(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
                return _both(q, k, v, w, cos, sin, eps, dim, offset)

            return *differentiable(both, (q, k, q_weight, k_weight), dq, dk), None, None, None, None, None, None

        def back(dq: Tensor, dk: Tensor) -> tuple[Tensor, Tensor]:
            return _run(dq, dk, cos, sin, ctx.dim, None, None, 0.0, 1, rows=True)

        found = gradients(back, dq, dk, q, k, q_weight, k_weight, cos, sin, ctx.eps, ctx.dim, ctx.offset)
        return *found, None, None, None, None, None, None
