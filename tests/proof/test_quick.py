"""A kernel that random tensors accepted, at its first real call: what is still found, and what it costs."""

from dataclasses import dataclass, field

import pytest
import torch
from tests.proof.zoo import ORIGINALS, implementation, site
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernelswap.proof import Check, quick
from kernelswap.types import Run


@dataclass
class Site:
    """A site whose kernel was accepted on random tensors, before it turned wrong."""

    module: nn.Module
    original: object
    kernel: object
    probe: str = "rows"
    kind: str = "module"
    training: bool = False
    originals: list[int] = field(default_factory=list)
    """Elements of every call of the original, since it was accepted."""
    kernels: list[int] = field(default_factory=list)
    evil: object = None

    def __post_init__(self):
        skip = 1 if self.kind == "module" else 0

        def forward(*args, **kwargs):
            self.kernels.append(args[skip].numel())
            if self.evil is not None:
                return self.evil(*args, **kwargs)
            return self.kernel(*args, **kwargs)

        def original(*args, **kwargs):
            if not torch.compiler.is_compiling():
                self.originals.append((args[skip].numel(), args[skip].dtype))
            return self.original(*args, **kwargs)

        self.check = Check(None)
        self.asked = site(self.module, self.probe, self.kind), self.module, original, implementation(forward, self.kind)
        verdict = self.check.equivalent(*self.asked, Run(training=self.training))
        assert verdict.accepted, verdict.reason
        self.originals.clear(), self.kernels.clear()

    def __call__(self, *args, **kwargs):
        memo = self.check._memo  # every call is a first one here
        for key in [k for k in memo if k[0] == "real"]:
            del memo[key]
        with torch.set_grad_enabled(self.training):
            return self.check.first_call(*self.asked, Run(training=self.training), args, kwargs)


def fused(self, hidden_states):
    wide = hidden_states.float()
    hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (hat * self.weight.float()).to(hidden_states.dtype)


def norm(dtype=torch.float32, n=64, **more):
    module = LlamaRMSNorm(n).to(dtype)
    nn.init.normal_(module.weight)
    return Site(module, LlamaRMSNorm.forward, fused, **more)


def full(calls, n):
    return [c for c in calls if c[0] == n] if calls and isinstance(calls[0], tuple) else [c for c in calls if c == n]


@pytest.mark.parametrize("rows", [700, 70_000])
def test_it_costs_one_forward_of_the_original_and_few_rows_in_float64(rows):
    """At full size the original runs once, in its own dtype, and the kernel once: that is the answer."""
    one = norm()
    x = torch.randn(rows, 64)
    out, verdict = one(x)
    assert verdict.accepted
    assert torch.equal(out, fused(one.module, x))
    assert full(one.originals, x.numel()) == [(x.numel(), torch.float32)]
    assert full(one.kernels, x.numel()) == [x.numel()]
    rest = [size for size, _ in one.originals if size != x.numel()]
    assert sum(rest) <= 3 * 3 * quick.FEW * 64
    assert sum(one.kernels) - x.numel() <= (1 + quick.GAPS + sum(quick.OTHERS)) * 64


def test_in_training_both_run_once_more_with_gradients_and_few_rows_in_float64():
    one = norm(training=True)
    x = torch.randn(700, 64, requires_grad=True)
    out, verdict = one(x)
    assert verdict.accepted
    out.sum().backward()
    assert x.grad is not None
    assert len(full(one.originals, x.numel())) == 1
    assert len(full(one.kernels, x.numel())) == 2, "one is compared, one answers, in the caller's graph"
    assert sum(size for size, _ in one.originals) - x.numel() <= 3 * 3 * quick.FEW * 64


def test_what_was_found_is_told_as_ever():
    _, verdict = norm(torch.bfloat16)(torch.randn(40, 64).bfloat16())
    assert "as accurate as the original: error" in verdict.reason
    assert 1e-4 < verdict.error_original < 1e-2
    assert dict(verdict.details)["reference"] == "float64"


ROWS = 1500
X = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(1))


def in_row(index, change):
    def evil(self, x):
        out = fused(self, x)
        if len(x) == ROWS:
            change(out[index])
        return out

    return evil


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda row: row.mul_(1.02), "[1234"),
        (lambda row: row[7:8].add_(0.05), "[1234, 7]"),
        (lambda row: row.fill_(torch.nan), "NaN where"),
        (lambda row: row[3:4].fill_(torch.inf), "infinite where"),
    ],
)
def test_one_wrong_row_of_many_is_found_and_the_original_answers(change, says):
    one = norm()
    one.evil = in_row(1234, change)
    out, verdict = one(X)
    assert not verdict.accepted
    assert says.replace("1234", "").strip("[]") in verdict.reason or "differs in output" in verdict.reason
    assert torch.equal(out, LlamaRMSNorm.forward(one.module, X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_less_accurate_than_the_original_in_every_row_is_refused(dtype):
    """By more than its roundings allow, and by less than two right ones may differ."""
    one = norm(dtype)
    unit = torch.finfo(dtype).eps / 2
    one.evil = lambda self, x: (fused(self, x.float()) * (1 + (60 if dtype == torch.float32 else 6) * unit)).to(x.dtype)
    _, verdict = one(X.to(dtype))
    assert "differs in output" in verdict.reason


@pytest.mark.parametrize("wrong", [1, quick.GAPS, 199, 263])
def test_a_kernel_wrong_for_other_numbers_of_rows_is_found_in_the_call_of_one_number(wrong):
    one = norm()
    one.evil = lambda self, x: fused(self, x) * (1.01 if len(x) == wrong else 1.0)
    for rows in (5, 100, 700):
        if wrong in quick.OTHERS and quick.keys.size_of(wrong) == quick.keys.size_of(rows):
            continue
        _, verdict = one(X[:rows].clone())
        assert "differs in output" in verdict.reason, rows


def test_a_kernel_that_writes_into_its_input_finds_nothing_of_the_users():
    one = norm()

    def evil(self, x):
        out = fused(self, x)
        x.zero_()
        return out

    one.evil = evil
    x = X.clone()
    out, verdict = one(x)
    assert "changes its input" in verdict.reason
    assert torch.equal(x, X)
    assert torch.equal(out, LlamaRMSNorm.forward(one.module, X))


def test_random_numbers_that_it_draws_are_found_and_put_back():
    one = norm()
    one.evil = lambda self, x: fused(self, x) + 0 * torch.rand(())
    before = torch.get_rng_state()
    _, verdict = one(X)
    assert "draws random numbers" in verdict.reason
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kernel_that_returns_its_input_is_found():
    one = norm()
    one.evil = lambda self, x: x.copy_(fused(self, x))
    _, verdict = one(X)
    assert "in place" in verdict.reason or "memory of its input" in verdict.reason


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale = ctx.saved_tensors
        hat, g = x * scale, dy * weight
        dx = scale * (g - hat * (g * hat).mean(-1, keepdim=True))
        return dx, (dy * hat)[:1024].sum(0), None  # as if the partial sums had been counted wrong


def test_a_gradient_that_is_wrong_only_in_a_large_call_is_found():
    one = norm(training=True)
    one.evil = lambda self, x: _Wrong.apply(x, self.weight, self.variance_epsilon)
    for rows, says in ((1000, ""), (ROWS, "gradient of weight")):
        _, verdict = one(X[:rows].clone().requires_grad_())
        assert verdict.accepted == (not says)
        assert says in verdict.reason


def test_functions_by_position():
    module = ORIGINALS["rotary"].make(32)
    one = Site(module, apply_rotary_pos_emb, apply_rotary_pos_emb, "rotary", "function")
    q, k, angle = torch.randn(2, 4, 300, 32), torch.randn(2, 2, 300, 32), torch.randn(2, 300, 16).repeat(1, 1, 2)
    given = q, k, angle.cos(), angle.sin()
    out, verdict = one(*given)
    assert verdict.accepted, verdict.reason
    assert torch.equal(out[0], apply_rotary_pos_emb(*given)[0])
    assert len(full(one.originals, q.numel())) == 1

    def evil(q, k, cos, sin, unsqueeze_dim=1):
        out = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
        if q.shape[2] == 299:
            out[1][1, 1, 250, 4] += 0.1
        return out

    one.evil = evil
    _, verdict = one(*(t[..., :299, :].contiguous() for t in given))
    assert "output 1" in verdict.reason


@pytest.mark.parametrize("training", [False, True])
def test_where_the_original_cancels_to_zero_a_more_accurate_kernel_is_right(training):
    """In bfloat16 each product of a rotation is rounded, and of millions of differences some come out as 0 that are not."""
    module = ORIGINALS["rotary"].make(128).bfloat16()

    def exact(q, k, cos, sin, unsqueeze_dim=1):
        wide = apply_rotary_pos_emb(*(t.float() for t in (q, k, cos, sin)), unsqueeze_dim=unsqueeze_dim)
        return tuple(t.bfloat16() for t in wide)

    one = Site(module, apply_rotary_pos_emb, exact, "rotary", "function", training=training)
    angle = torch.outer(torch.arange(2048.0), 1e4 ** -torch.linspace(0, 1, 64)).repeat(1, 2)[None]
    q, k = (torch.randn(2, 2048, heads, 128).bfloat16().transpose(1, 2).requires_grad_(training) for heads in (16, 8))
    given = q, k, angle.cos().bfloat16(), angle.sin().bfloat16()
    cancelled = (apply_rotary_pos_emb(*given)[0] == 0) & (exact(*given)[0].abs() > 1e-3)
    assert cancelled.any()
    _, verdict = one(*given)
    assert verdict.accepted, verdict.reason

    def evil(q, k, cos, sin, unsqueeze_dim=1):
        out = exact(q, k, cos, sin, unsqueeze_dim)
        if q.shape[2] > 1000:
            out[0].view(-1)[out[0].detach().abs().argmin()] += 0.05  # small for its row, large for itself
        return out

    one.evil = evil
    _, verdict = one(*given)
    assert not verdict.accepted


@pytest.mark.parametrize("rows", [3, 600])
def test_many_weights_meet_float64_only_where_the_call_is_as_large(rows, monkeypatch):
    monkeypatch.setattr(quick, "MANY_WEIGHTS", 1000)
    module = ORIGINALS["mlp"].make(64)
    kernel = lambda self, x: self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731  # shorter than its name
    one = Site(module, type(module).forward, kernel, "mlp")
    x = torch.randn(rows, 64)
    assert one(x)[1].accepted
    assert (torch.float64 in {dtype for _, dtype in one.originals}) == (rows >= quick.WORTH)
    one.evil = lambda self, x: kernel(self, x) * 1.001
    _, verdict = one(x)
    assert "differs in output" in verdict.reason


def test_who_asks_ahead_of_time_has_all_of_the_call_held_against_float64():
    one = norm()
    one.check.thorough = True
    assert one(X)[1].accepted
    assert (X.numel(), torch.float64) in one.originals
    assert sum(size == X.numel() for size in one.kernels) > 1


@pytest.mark.parametrize("why", ["autocast", "another dtype", "never proved"])
def test_where_random_tensors_say_nothing_about_the_call_all_of_it_is_looked_at(why):
    one, x = norm(), X
    if why == "another dtype":
        x = X.double()
    elif why == "never proved":
        one.check._memo.clear()
    with torch.autocast("cpu", enabled=why == "autocast"):
        assert one(x)[1].accepted
    assert sum(size == X.numel() for size in one.kernels) > 1
