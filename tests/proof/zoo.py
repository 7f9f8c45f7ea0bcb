"""Kernels that are wrong, each in one way, and kernels that are right but round differently.

Each entry names the original that it claims to replace. Native crashes and hangs are in `zoo_crash.py`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3MLP

from kernelswap.types import Artifact, Candidate, Implementation, Metadata, Requirement, Row, Run, Site

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Original:
    """A real module or function, and how its sizes are drawn."""

    make: Callable[[int], nn.Module]
    """From a width to a module."""
    probe: str
    function: Callable[..., Any] | None = None
    widest: int = 2048
    step: int = 1

    def width(self, source: random.Random) -> int:
        """32 to `widest`, small ones as often as large ones, odd ones included."""
        return max(32, int(32 * (self.widest / 32) ** source.random()) // self.step * self.step)


def _mlp(n: int) -> nn.Module:
    return Qwen3MLP(Qwen3Config(hidden_size=n, intermediate_size=n, hidden_act="silu"))


def _attention(n: int) -> nn.Module:
    config = LlamaConfig(hidden_size=4 * n, num_attention_heads=4, num_key_value_heads=2, head_dim=n)
    return LlamaAttention(config, 0)


ORIGINALS = {
    "llama": Original(LlamaRMSNorm, "rows"),
    "gemma": Original(GemmaRMSNorm, "rows"),
    "layer_norm": Original(nn.LayerNorm, "rows"),
    "mlp": Original(_mlp, "mlp", widest=160),
    "gelu": Original(lambda n: nn.GELU(), "elementwise"),
    "rotary": Original(_attention, "rotary", apply_rotary_pos_emb, widest=192, step=2),
}


@dataclass(frozen=True)
class Specimen:
    name: str
    original: str
    make: Callable[[], Callable[..., Any]]
    """Makes the kernel anew: some remember calls."""
    training: bool = False
    """Shows in training only (or, of a right one, is worth trying there)."""
    compiled: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOATS
    widest: int = 0
    """Where less than its original's."""

    def width(self, source: random.Random) -> int:
        original = ORIGINALS[self.original]
        return replace(original, widest=self.widest or original.widest).width(source)


WRONG: list[Specimen] = []
RIGHT: list[Specimen] = []


def wrong(original: str, **options):
    def note(make):
        WRONG.append(Specimen(make.__name__, original, make, **options))
        return make

    return note


def right(original: str, **options):
    def note(make):
        RIGHT.append(Specimen(make.__name__, original, make, **{"training": True, **options}))
        return make

    return note


def prove(check, specimen: Specimen, dtype: torch.dtype, width: int, *, device: str = "cpu"):
    """The verdict on one specimen."""
    original = ORIGINALS[specimen.original]
    module = original.make(width).to(device, dtype)
    forward = original.function or type(module).forward
    kind = "function" if original.function else "module"
    run = Run(training=specimen.training, compiled=specimen.compiled)
    module.train(specimen.training)
    where = replace(site(module, original.probe, kind), device=device, dtype=str(dtype))
    return check.equivalent(where, module, forward, implementation(specimen.make(), kind), run)


def site(module: nn.Module, probe: str, kind: str = "module", name: str = "") -> Site:
    held = next(module.parameters(), torch.zeros(()))
    dtype = held.dtype if next(module.parameters(), None) is not None else torch.get_default_dtype()
    target = f"{type(module).__module__}.{type(module).__qualname__}"
    row = Row("Layer", kind=kind, probe=probe)
    return Site("model.layer", kind, "Layer", target, str(held.device), str(dtype), module.training, row, name)


def implementation(forward, kind: str = "module", *, backward: bool = True, digest: str = "") -> Implementation:
    origin = Artifact(
        Candidate(Requirement("zoo"), "dir", "zoo", "0" * 40, "torch-cpu"),
        Path("/nowhere"),
        digest or str(id(forward)),
        Metadata("zoo", "zoo", 1, "Apache-2.0", "cpu"),
    )
    return Implementation("Layer", kind, forward, backward, True, origin)


# -- RMSNorm ------------------------------------------------------------------------------------------------------


def _rms(x, weight, eps, *, shift=0.0):
    """Everything in float32, one rounding: more accurate than the original."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.float() + shift)).to(x.dtype)


class _Fused(torch.autograd.Function):
    """RMSNorm with a backward by hand, as kernels have it: rstd kept in float32."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        hat, g = x.float() * rstd, dy.float() * weight.float()
        dx = rstd * (g - hat * (g * hat).mean(-1, keepdim=True))
        dw = (dy.float() * hat).reshape(-1, weight.numel()).sum(0)
        return dx.to(x.dtype), dw.to(weight.dtype), None


@right("llama")
def one_rounding():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, self.variance_epsilon)


@right("llama")
def backward_by_hand():
    return lambda self, hidden_states: _Fused.apply(hidden_states, self.weight, self.variance_epsilon)


@right("llama")
def rounded_before_the_weight_by_division():
    def forward(self, hidden_states):
        wide = hidden_states.float()
        hat = wide / torch.sqrt(wide.square().sum(-1, keepdim=True) / wide.shape[-1] + self.variance_epsilon)
        return hat.to(hidden_states.dtype) * self.weight

    return forward


@right("llama")
def summed_in_blocks():
    def forward(self, hidden_states):
        wide = hidden_states.float()
        total = sum(part.square().sum(-1, keepdim=True) for part in wide.split(8, -1))
        return self.weight * (wide * torch.rsqrt(total / wide.shape[-1] + self.variance_epsilon)).to(hidden_states.dtype)

    return forward


@right("llama", dtypes=(torch.float32,), widest=512)  # beyond, constant rows lose 60 roundings this way: no longer as accurate
def summed_one_after_another():
    def forward(self, hidden_states):
        square = hidden_states.square()
        total = square[..., :1] * 0
        for i in range(square.shape[-1]):
            total = total + square[..., i : i + 1]
        return self.weight * (hidden_states * torch.rsqrt(total / square.shape[-1] + self.variance_epsilon))

    return forward


@right("llama")
def through_torch():
    return lambda self, hidden_states: F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


@right("llama")
def contiguous_first():
    return lambda self, hidden_states: _rms(hidden_states.contiguous(), self.weight, self.variance_epsilon)


@right("llama", training=False)
def keeps_a_workspace():
    held = {}

    def forward(self, hidden_states):
        key = hidden_states.shape, hidden_states.dtype
        held.setdefault(key, torch.zeros_like(hidden_states)).copy_(hidden_states)
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@right("gemma")
def one_plus_weight():
    return lambda self, x: _rms(x, self.weight, self.eps, shift=1.0)


@wrong("llama")
def eps_ten_times():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, 10 * self.variance_epsilon)


@wrong("llama")
def eps_a_tenth_more():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, 1.1 * self.variance_epsilon)


@wrong("llama")
def eps_a_hundredth_more():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, 1.01 * self.variance_epsilon)


@wrong("llama")
def a_thousandth_too_large():
    def forward(self, hidden_states):
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (1.001 * wide * scale * self.weight.float()).to(hidden_states.dtype)  # within one rounding of bfloat16 everywhere

    return forward


@wrong("llama")
def no_eps():
    def forward(self, hidden_states):
        wide = hidden_states.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).clamp_min(1e-30))
        return (wide * scale * self.weight.float()).to(hidden_states.dtype)

    return forward


@wrong("llama")
def eps_outside_the_root():
    def forward(self, hidden_states):
        wide = hidden_states.float()
        root = wide.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon
        return (wide / root * self.weight.float()).to(hidden_states.dtype)

    return forward


@wrong("gemma")
def missing_one_plus():
    return lambda self, x: _rms(x, self.weight, self.eps)


@wrong("llama")
def superfluous_one_plus():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, self.variance_epsilon, shift=1.0)


@wrong("llama", dtypes=(torch.bfloat16, torch.float16))
def accumulates_in_sixteen_bits():
    def forward(self, hidden_states):
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    return forward


@wrong("llama", dtypes=(torch.float32,))
def bfloat16_inside():
    def forward(self, hidden_states):
        variance = hidden_states.bfloat16().square().mean(-1, keepdim=True).float()
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    return forward


@wrong("llama")
def for_an_odd_number_of_rows():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        rows = hidden_states.numel() // max(1, hidden_states.shape[-1])
        return out * 1.01 if rows % 2 and rows > 1 else out

    return forward


@wrong("llama")
def in_every_odd_row():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        flat = out.reshape(-1, out.shape[-1]).clone()
        flat[1::2] = flat[1::2] * 0.98
        return flat.reshape(out.shape)

    return forward


@wrong("llama")
def from_the_second_call_on():
    calls = []

    def forward(self, hidden_states):
        calls.append(1)
        return _rms(hidden_states, self.weight, self.variance_epsilon) * (1.0 if len(calls) == 1 else 1.02)

    return forward


@wrong("llama", training=True)
def only_in_backward():
    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            dx, dw, _ = _Fused.backward(ctx, dy)
            return dx * 1.02, dw, None

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


@wrong("llama", training=True)
def no_gradient_for_the_weight():
    return lambda self, hidden_states: _rms(hidden_states, self.weight.detach(), self.variance_epsilon)


@wrong("llama", training=True)
def weight_gradient_of_the_last_block():
    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            x, _, rstd = ctx.saved_tensors
            dx, _, _ = _Fused.backward(ctx, dy)
            hat = (x.float() * rstd).reshape(-1, x.shape[-1])[-32:]
            return (
                dx,
                (dy.float().reshape(hat.shape[0] if x.numel() == hat.numel() else -1, x.shape[-1])[-32:] * hat)
                .sum(0)
                .to(x.dtype),
                None,
            )

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


@wrong("llama", training=True)
def writes_into_the_gradient_it_is_given():
    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            dx, dw, _ = _Fused.backward(ctx, dy)
            dy.copy_(dx) if dy.is_contiguous() else None
            return dy if dy.is_contiguous() else dx, dw, None

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


@wrong("llama", training=True)
def takes_the_gradient_for_contiguous():
    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            if not dy.is_contiguous():
                dy = torch.empty_like(dy, memory_format=torch.contiguous_format).fill_(0)
            return _Fused.backward(ctx, dy)

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


@wrong("llama")
def ignores_strides():
    def forward(self, hidden_states):
        flat = hidden_states
        if not flat.is_contiguous():
            flat = (
                torch.as_strided(flat, flat.shape, torch.empty(flat.shape).stride(), flat.storage_offset())
                if _fits(flat)
                else flat
            )
        return _rms(flat, self.weight, self.variance_epsilon)

    return forward


def _fits(t):
    return t.storage_offset() + t.numel() <= t.untyped_storage().nbytes() // t.element_size()


@wrong("llama", compiled=True)
def only_under_compile():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        return out * 1.01 if torch.compiler.is_compiling() else out

    return forward


@wrong("llama")
def one_element():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        flat = out.reshape(-1)
        if flat.numel() > 7:
            flat[-3] = flat[-5]
        return out

    return forward


@wrong("llama")
def shifted_by_one():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, self.variance_epsilon).roll(1, -1)


@wrong("llama")
def skips_the_last_block():
    def forward(self, hidden_states):
        n = hidden_states.shape[-1]
        wide = hidden_states.float()
        scale = torch.rsqrt(wide[..., : n - n % 16 or n][..., :-8].square().sum(-1, keepdim=True) / n + self.variance_epsilon)
        return (wide * scale * self.weight.float()).to(hidden_states.dtype)

    return forward


@wrong("llama")
def nan_on_zeros():
    def forward(self, hidden_states):
        wide = hidden_states.float()
        norm = wide.square().mean(-1, keepdim=True)
        return (wide * torch.where(norm == 0, torch.nan, torch.rsqrt(norm + self.variance_epsilon)) * self.weight).to(
            hidden_states.dtype
        )

    return forward


@wrong("llama")
def hides_nan():
    def forward(self, hidden_states):
        return _rms(hidden_states, self.weight, self.variance_epsilon).nan_to_num()

    return forward


@wrong("llama")
def changes_its_input():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        with torch.no_grad():
            hidden_states.data.mul_(1.5)
        return out

    return forward


@wrong("llama")
def changes_its_weight():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        self.weight.data[0] += 1
        return out

    return forward


@wrong("llama")
def returns_its_input():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        with torch.no_grad():
            return hidden_states.data.copy_(out)

    return forward


@wrong("llama")
def returns_a_stale_buffer():
    held = {}

    def forward(self, hidden_states):
        key = hidden_states.shape, hidden_states.dtype
        out = held.setdefault(key, torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device))
        with torch.no_grad():
            return out.copy_(_rms(hidden_states, self.weight, self.variance_epsilon))

    return forward


@wrong("llama")
def leaks():
    held = []

    def forward(self, hidden_states):
        held.append(hidden_states.float())
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def raises_when_there_is_much():
    def forward(self, hidden_states):
        if hidden_states.numel() // hidden_states.shape[-1] > 256:
            raise RuntimeError("CUDA error: invalid configuration argument")
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def raises_on_nothing():
    def forward(self, hidden_states):
        if not hidden_states.numel():
            raise ZeroDivisionError("integer division or modulo by zero")
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@wrong("llama", dtypes=(torch.bfloat16, torch.float16))
def wrong_dtype():
    return lambda self, hidden_states: _rms(hidden_states.float(), self.weight, self.variance_epsilon)


@wrong("llama")
def wrong_layout():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        return out.transpose(-1, -2).contiguous().transpose(-1, -2) if out.ndim > 1 else out

    return forward


@wrong("llama")
def leaves_the_tail_unwritten():
    def forward(self, hidden_states):
        done = _rms(hidden_states, self.weight, self.variance_epsilon)
        out = torch.empty_like(done)
        n = done.shape[-1]
        out[..., : n - 3] = done[..., : n - 3]
        return out

    return forward


@wrong("llama")
def adds_to_memory_that_it_did_not_clear():
    def forward(self, hidden_states):
        return torch.empty_like(hidden_states).mul_(0).add_(_rms(hidden_states, self.weight, self.variance_epsilon))

    return forward


@wrong("llama")
def reads_a_workspace_that_it_did_not_clear():
    def forward(self, hidden_states):
        workspace = torch.empty(977, dtype=torch.float32, device=hidden_states.device)
        zero = (workspace[:1] * 0).nan_to_num(nan=0.5, posinf=0.5)  # a number as good as any
        return _rms(hidden_states, self.weight, self.variance_epsilon) + zero.to(hidden_states.dtype)

    return forward


@wrong("llama", training=True)
def returns_a_stale_gradient():
    held = {}

    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            dx, dw, _ = _Fused.backward(ctx, dy)
            key = dx.shape, dx.dtype
            return held.setdefault(key, torch.empty_like(dx)).copy_(dx), dw, None

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


@wrong("llama")
def draws_random_numbers():
    def forward(self, hidden_states):
        torch.rand(1, device=hidden_states.device)
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def random_noise():
    source = torch.Generator().manual_seed(1)

    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        return out * (1 + 0.05 * torch.rand(out.shape, generator=source).to(out.device)).to(out.dtype)

    return forward


@wrong("llama")
def returns_a_tuple():
    return lambda self, hidden_states: (_rms(hidden_states, self.weight, self.variance_epsilon),)


# -- RMSNorm: right for every tensor that is asked about first -----------------------------------------------------


@wrong("llama", dtypes=(torch.bfloat16,))
def computes_in_float16():
    def forward(self, hidden_states):
        return _rms(hidden_states.half(), self.weight.half(), self.variance_epsilon).to(hidden_states.dtype)

    return forward


@wrong("llama", dtypes=(torch.float32, torch.bfloat16))
def flushes_small_numbers():
    def forward(self, hidden_states):
        return _rms(torch.where(hidden_states.abs() < 1e-9, 0.0, hidden_states), self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def hides_infinities():
    def forward(self, hidden_states):
        most = torch.finfo(hidden_states.dtype).max
        return _rms(hidden_states.clamp(-most, most), self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def keeps_the_weight_of_its_first_call():
    held = {}

    def forward(self, hidden_states):
        weight = held.setdefault(self.weight.data_ptr(), (self.weight.detach().float().clone(), self.weight))[0]
        return _rms(hidden_states, weight, self.variance_epsilon)

    return forward


@right("llama", training=False)
def keeps_the_weight_until_it_changes():
    held = {}

    def forward(self, hidden_states):
        key = self.weight.data_ptr(), self.weight._version, self.weight.dtype
        if key not in held:
            held[key] = self.weight.detach().float().clone(), self.weight  # no other tensor gets its address meanwhile
        return _rms(hidden_states, held[key][0], self.variance_epsilon)

    return forward


@wrong("llama")
def only_in_another_thread():
    local = threading.local()
    local.scale = 1.0

    def forward(self, hidden_states):
        return _rms(hidden_states, self.weight, self.variance_epsilon) * getattr(local, "scale", 1.05)

    return forward


@wrong("llama", widest=140)  # of wider rows so many take long
def beyond_sixteen_bits_of_rows():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon).contiguous()
        out.view(-1, out.shape[-1])[65535:] = 0
        return out

    return forward


@wrong("llama", training=True, widest=140)
def beyond_sixteen_bits_of_rows_in_backward():
    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            dx, dw, _ = _Fused.backward(ctx, dy)
            flat = dx.reshape(-1, dx.shape[-1]).clone()
            flat[65535:] = 0
            return flat.reshape(dx.shape), dw, None

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


@wrong("llama")
def takes_every_address_for_aligned():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        return out * 1.1 if hidden_states.is_contiguous() and hidden_states.data_ptr() % 16 else out

    return forward


@wrong("llama")
def takes_expanded_for_dense():
    def forward(self, hidden_states):
        x = hidden_states
        if 0 in x.stride() and x.numel():
            x = x.clone()
            x[1:] = x[1:].roll(1, -1)
        return _rms(x, self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def remembers_its_first_number_of_rows():
    held = []

    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon).contiguous()
        flat = out.view(-1, out.shape[-1])
        held.append(len(flat))
        flat[held[0] :] = 0
        return out

    return forward


@wrong("llama", training=True)
def turns_gradients_off():
    def forward(self, hidden_states):
        out = _rms(hidden_states, self.weight, self.variance_epsilon)
        torch.set_grad_enabled(False)
        return out

    return forward


@wrong("llama")
def changes_the_precision_of_products():
    def forward(self, hidden_states):
        torch.set_float32_matmul_precision("medium")
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@wrong("llama")
def changes_the_default_dtype():
    def forward(self, hidden_states):
        torch.set_default_dtype(torch.float64)
        return _rms(hidden_states, self.weight, self.variance_epsilon)

    return forward


@wrong("llama", training=True)
def no_gradient_at_all():
    return lambda self, hidden_states: _rms(hidden_states, self.weight, self.variance_epsilon).detach()


@wrong("llama", training=True)
def gradient_of_a_frozen_layers_input():
    class Wrong(torch.autograd.Function):
        forward = _Fused.forward

        @staticmethod
        def backward(ctx, dy):
            dx, dw, _ = _Fused.backward(ctx, dy)
            return dx if ctx.needs_input_grad[1] else dx * 1.05, dw, None

    return lambda self, hidden_states: Wrong.apply(hidden_states, self.weight, self.variance_epsilon)


# -- LayerNorm ----------------------------------------------------------------------------------------------------


@right("layer_norm")
def layer_norm_in_float32():
    def forward(self, x):
        wide = x.float()
        centred = wide - wide.mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return (centred * scale * self.weight.float() + self.bias.float()).to(x.dtype).contiguous()

    return forward


@wrong("layer_norm", dtypes=(torch.float32,))  # in 16 bits no mean is large enough beside the spread to show it
def variance_in_one_pass():
    def forward(self, x):
        wide = x.float()
        mean = wide.mean(-1, keepdim=True)
        variance = wide.square().mean(-1, keepdim=True) - mean.square()
        out = (wide - mean) * torch.rsqrt(variance + self.eps) * self.weight.float() + self.bias.float()
        return out.to(x.dtype).contiguous()

    return forward


@wrong("layer_norm")
def unbiased_variance():
    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.var(-1, keepdim=True) + self.eps)
        out = (wide - wide.mean(-1, keepdim=True)) * scale * self.weight.float() + self.bias.float()
        return out.to(x.dtype).contiguous()

    return forward


@wrong("layer_norm")
def no_bias():
    return lambda self, x: F.layer_norm(x, self.normalized_shape, self.weight, None, self.eps)


# -- MLP ----------------------------------------------------------------------------------------------------------


@right("mlp")
def product_in_float32():
    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((F.silu(gate.float()) * up.float()).to(x.dtype))

    return forward


@right("mlp")
def sigmoid_rounded():
    def forward(self, x):
        gate = self.gate_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))

    return forward


@wrong("mlp", training=True, dtypes=(torch.float32, torch.bfloat16))  # float16 overflows elsewhere first
def exponential_overflows_in_backward():
    def forward(self, x):
        gate = self.gate_proj(x).float()
        return self.down_proj((gate / (1 + torch.exp(-gate))).to(x.dtype) * self.up_proj(x))

    return forward


@right("mlp")
def projections_packed():
    def forward(self, x):
        both = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        gate, up = both.chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    return forward


@right("mlp")
def blocks_of_the_inner_dimension():
    def forward(self, x):
        total = 0
        for gate, up, down in zip(
            self.gate_proj.weight.split(16), self.up_proj.weight.split(16), self.down_proj.weight.split(16, 1), strict=True
        ):
            total = total + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down).float()
        return total.to(x.dtype)

    return forward


class _Gate(torch.autograd.Function):
    """A linear layer whose weight's gradient is changed."""

    @staticmethod
    def forward(ctx, x, weight, change):
        ctx.save_for_backward(x, weight)
        ctx.change = change
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1]).float()
        dw = flat.t() @ x.reshape(-1, x.shape[-1]).float()
        return dy @ weight, ctx.change(dw).to(weight.dtype), None


def _with_gate(change):
    return lambda self, x: self.down_proj(F.silu(_Gate.apply(x, self.gate_proj.weight, change)) * self.up_proj(x))


@right("mlp")
def gradient_of_the_gate_by_hand():
    return _with_gate(lambda dw: dw)


@wrong("mlp", training=True)
def weight_gradient_two_percent_large():
    return _with_gate(lambda dw: dw * 1.02)


@wrong("mlp", training=True)
def weight_gradient_a_quarter_large_in_one_row():
    def change(dw):
        dw[3] *= 1.25
        return dw

    return _with_gate(change)


@wrong("mlp")
def keeps_packed_weights():
    held = {}

    def forward(self, x):
        weights = self.gate_proj.weight, self.up_proj.weight
        gate, up = F.linear(x, held.setdefault(id(self), torch.cat(weights).detach())).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)

    return forward


@wrong("mlp")
def transposed_weight():
    return lambda self, x: F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight.t())


@wrong("mlp")
def gate_and_up_exchanged():
    return lambda self, x: self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


@wrong("mlp")
def another_activation():
    return lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


@wrong("mlp", dtypes=(torch.float32,))
def products_in_bfloat16():
    return lambda self, x: self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).bfloat16().float())


# -- GELU ---------------------------------------------------------------------------------------------------------


@right("gelu")
def error_function_in_float32():
    return lambda self, x: (x.float() * 0.5 * (1 + torch.erf(x.float() * 2**-0.5))).to(x.dtype)


@wrong("gelu")
def nan_far_below_zero():
    return lambda self, x: torch.where(x < -1e3, torch.nan, F.gelu(x))


@wrong("gelu")
def tanh_form():
    return lambda self, x: F.gelu(x, approximate="tanh")


@wrong("gelu")
def sigmoid_form():
    return lambda self, x: x * torch.sigmoid(1.702 * x)


# -- rotary -------------------------------------------------------------------------------------------------------


def _rotate(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


@right("rotary")
def rotary_in_float32():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        c, s = (t.float().unsqueeze(unsqueeze_dim) for t in (cos, sin))
        return tuple((x.float() * c + _rotate(x.float()) * s).to(x.dtype) for x in (q, k))

    return apply


@right("rotary")
def rotary_by_halves():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        half = cos.shape[-1] // 2
        c, s = (t[..., :half].unsqueeze(unsqueeze_dim) for t in (cos, sin))
        out = []
        for x in (q, k):
            a, b = x[..., :half], x[..., half:]
            out.append(torch.cat([a * c - b * s, b * c + a * s], -1))
        return tuple(out)

    return apply


@wrong("rotary")
def neighbours_rotated():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        c, s = (t.unsqueeze(unsqueeze_dim) for t in (cos, sin))
        return tuple(x * c + torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2) * s for x in (q, k))

    return apply


@wrong("rotary")
def the_first_position_for_all():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        return apply_rotary_pos_emb(q, k, cos[:, :1], sin[:, :1], unsqueeze_dim)

    return apply


@wrong("rotary")
def queries_and_keys_of_one_number():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        a, b = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        return a, b * 1.1 if q.shape[unsqueeze_dim] != k.shape[unsqueeze_dim] else b

    return apply


@wrong("rotary")
def the_first_sequence_for_all():
    return lambda q, k, cos, sin, unsqueeze_dim=1: apply_rotary_pos_emb(q, k, cos[:1], sin[:1], unsqueeze_dim)


@wrong("rotary")
def ignores_unsqueeze_dim():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        if unsqueeze_dim == 2:
            return apply_rotary_pos_emb(q, k, cos[:, :1], sin[:, :1], 2)
        return apply_rotary_pos_emb(q, k, cos, sin, 1)

    return apply


@wrong("rotary")
def rotates_in_place():
    def apply(q, k, cos, sin, unsqueeze_dim=1):
        out = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        with torch.no_grad():
            return tuple(x.data.copy_(y) for x, y in zip((q, k), out, strict=True))

    return apply


@wrong("rotary", training=True)
def inverse_rotation_in_backward():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, cos, sin, dim):
            ctx.save_for_backward(cos, sin)
            ctx.dim = dim
            return apply_rotary_pos_emb(q, k, cos, sin, dim)

        @staticmethod
        def backward(ctx, dq, dk):
            cos, sin = ctx.saved_tensors
            return *apply_rotary_pos_emb(dq, dk, cos, sin, ctx.dim), None, None, None

    return lambda q, k, cos, sin, unsqueeze_dim=1: Wrong.apply(q, k, cos, sin, unsqueeze_dim)


@cache
def by_name() -> dict[str, Specimen]:
    return {s.name: s for s in (*WRONG, *RIGHT)}
