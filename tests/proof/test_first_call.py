"""The first real call: what comes back, what it costs, and what it must leave alone."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from tests.proof.zoo import ORIGINALS, implementation, site
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from kernelswap.proof import Check, Verdicts, keys
from kernelswap.proof import real as real_calls
from kernelswap.types import Run


def fused(self, hidden_states):
    wide = hidden_states.float()
    hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return (hat * self.weight.float()).to(hidden_states.dtype)


def ask(check, module, forward, *args, training=False, kind="module", original=None, **kwargs):
    probe = "rotary" if kind == "function" else "rows"
    return check.first_call(
        site(module, probe, kind),
        module,
        original or type(module).forward,
        implementation(forward, kind),
        Run(training=training),
        args,
        kwargs,
    )


@pytest.fixture
def norm():
    torch.manual_seed(0)
    module = LlamaRMSNorm(64)
    nn.init.normal_(module.weight)
    return module


def counted(forward):
    calls = []

    def counting(self, *args, **kwargs):
        calls.append(args[0].numel() if args else 0)
        return forward(self, *args, **kwargs)

    counting.calls = calls
    return counting


def test_an_accepted_kernel_answers_the_first_call_itself(norm):
    x = torch.randn(2, 5, 64)
    out, verdict = ask(Check(None), norm, fused, x)
    assert verdict.accepted
    assert torch.equal(out, fused(norm, x))
    assert 0 < verdict.error_kernel < 1e-6
    assert verdict.key


def test_a_refused_kernel_leaves_the_answer_to_the_original(norm):
    x = torch.randn(2, 5, 64)
    out, verdict = ask(Check(None), norm, lambda self, x: fused(self, x) * 1.01, x)
    assert not verdict.accepted
    assert "differs in output" in verdict.reason
    assert torch.equal(out, norm(x))


def test_a_kernel_that_raises_leaves_the_answer_to_the_original(norm):
    def broken(self, x):
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    x = torch.randn(3, 64)
    out, verdict = ask(Check(None), norm, broken, x)
    assert verdict.reason.startswith("raises RuntimeError: no kernel image is available for execution on the device")
    assert torch.equal(out, norm(x))


def test_a_kernel_that_damages_its_input_does_not_reach_the_users_tensor(norm):
    def damaging(self, x):
        out = fused(self, x)
        x.data.zero_()
        return out

    x = torch.randn(3, 64)
    before = x.clone()
    out, verdict = ask(Check(None), norm, damaging, x)
    assert "in place" in verdict.reason
    assert torch.equal(x, before)
    assert torch.equal(out, norm(before))


def test_a_kernel_wrong_only_for_one_row_is_found_though_the_call_has_many(norm):
    wrong = lambda self, x: fused(self, x) * (1.01 if x.numel() == 64 else 1.0)  # noqa: E731  # shorter than its name
    _, verdict = ask(Check(None), norm, wrong, torch.randn(2, 30, 64))
    assert "on its first row alone" in verdict.reason


def test_a_kernel_wrong_only_for_gaps_between_rows_is_found(norm):
    wrong = lambda self, x: fused(self, x) * (1.0 if x.is_contiguous() else 1.01)  # noqa: E731  # same
    _, verdict = ask(Check(None), norm, wrong, torch.randn(2, 30, 64))
    assert "non-contiguous" in verdict.reason


@pytest.mark.parametrize("grad", [True, False])
def test_gradients_of_the_answer_are_the_kernels_own(norm, grad):
    x = torch.randn(4, 64, requires_grad=True)
    with torch.set_grad_enabled(grad):
        out, verdict = ask(Check(None), norm, fused, x, training=True)
    assert verdict.accepted
    assert out.requires_grad == grad
    if grad:
        out.sum().backward()
        mine = x.grad.clone(), norm.weight.grad.clone()
        x.grad = norm.weight.grad = None
        fused(norm, x).sum().backward()
        assert torch.equal(mine[0], x.grad)
        assert torch.equal(mine[1], norm.weight.grad)


def test_a_wrong_gradient_is_found_when_gradients_are_wanted(norm):
    wrong = lambda self, x: fused(self, x.detach() + (x - x.detach()) * 1.05)  # noqa: E731  # same
    x = torch.randn(4, 64, requires_grad=True)
    out, verdict = ask(Check(None), norm, wrong, x, training=True)
    assert "gradient of hidden_states" in verdict.reason
    out.sum().backward()
    with torch.no_grad():
        assert ask(Check(None), norm, wrong, x.detach())[1].accepted


def test_nothing_of_the_users_changes(norm):
    x = torch.randn(2, 7, 64, requires_grad=True)
    norm.weight.grad = torch.ones_like(norm.weight)
    norm.weight.requires_grad_(False)
    before = x.detach().clone(), norm.weight.detach().clone(), dict(vars(norm))
    versions = x._version, norm.weight._version
    state = torch.get_rng_state()
    ask(Check(None), norm, fused, x, training=True)
    ask(Check(None), norm, lambda self, x: fused(self, x) + 1, x, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, before[0])
    assert torch.equal(norm.weight, before[1])
    assert vars(norm) == before[2]
    assert (x._version, norm.weight._version) == versions
    assert torch.equal(norm.weight.grad, torch.ones(64))
    assert x.grad is None
    assert not norm.weight.requires_grad


def test_in_inference_mode(norm):
    with torch.inference_mode():
        x = torch.randn(2, 5, 64)
        out, verdict = ask(Check(None), norm, fused, x)
        assert verdict.accepted
        assert out.is_inference()
        assert torch.is_inference_mode_enabled()


def test_under_autocast_both_are_asked_under_it():
    module = ORIGINALS["mlp"].make(32)
    seen = []

    def kernel(self, x):
        gate = self.gate_proj(x)
        seen.append(gate.dtype)
        return self.down_proj(nn.functional.silu(gate) * self.up_proj(x))

    with torch.autocast("cpu", torch.bfloat16):
        out, verdict = Check(None).first_call(
            site(module, "mlp"), module, type(module).forward, implementation(kernel), Run(), (torch.randn(2, 5, 32),), {}
        )
    assert verdict.accepted, verdict.reason
    assert out.dtype == torch.bfloat16
    assert set(seen) == {torch.bfloat16}
    assert 1e-4 < verdict.error_original < 0.1


@pytest.mark.parametrize("wrong", ["its dtype", "its precision"])
def test_a_kernel_that_is_wrong_under_autocast_alone_is_refused_there(wrong):
    module = ORIGINALS["mlp"].make(32)

    def kernel(self, x):
        autocast = torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=autocast and wrong != "its dtype"):
            gate = self.gate_proj(x)
            if autocast and wrong == "its precision":
                gate = gate.to(torch.float8_e4m3fn).to(gate.dtype)
            return self.down_proj(nn.functional.silu(gate) * self.up_proj(x))

    check, x = Check(None), torch.randn(2, 5, 32)
    asked = site(module, "mlp"), module, type(module).forward, implementation(kernel)
    assert check.equivalent(*asked, Run()).accepted
    assert check.first_call(*asked, Run(), (x,), {})[1].accepted
    with torch.autocast("cpu", torch.bfloat16):
        out, verdict = check.first_call(*asked, Run(), (x,), {})
        assert torch.equal(out, module(x))
    assert {"its dtype": "dtype torch.float32", "its precision": "differs in output"}[wrong] in verdict.reason


def test_a_proof_on_random_tensors_knows_no_autocast(norm):
    seen = set()

    def kernel(self, x):
        seen.add(torch.is_autocast_enabled("cpu"))
        return fused(self, x)

    with torch.autocast("cpu", torch.bfloat16):
        assert Check(None).equivalent(site(norm, "rows"), norm, LlamaRMSNorm.forward, implementation(kernel), Run()).accepted
        assert torch.is_autocast_enabled("cpu")
    assert seen == {False}


def test_gradient_checkpointing_recomputes_what_it_saw(norm):
    check = Check(None)
    served = SimpleNamespace(verdict=None)

    def block(x):
        if served.verdict is None:
            out, served.verdict = ask(check, norm, fused, x, training=True)
            return out
        return fused(norm, x)

    x = torch.randn(4, 64, requires_grad=True)
    torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum().backward()
    assert served.verdict.accepted
    want = x.grad.clone()
    x.grad = None
    fused(norm, x).sum().backward()
    assert torch.equal(x.grad, want)


def test_a_known_verdict_costs_one_call_of_the_kernel_and_none_of_the_original(norm):
    check, x = Check(None), torch.randn(2, 5, 64)
    original, kernel = counted(LlamaRMSNorm.forward), counted(fused)
    run = lambda: check.first_call(site(norm, "rows"), norm, original, implementation(kernel, digest="k"), Run(), (x,), {})  # noqa: E731  # same
    run()
    original.calls.clear(), kernel.calls.clear()
    run()
    assert (len(original.calls), len(kernel.calls)) == (0, 1)


def test_a_second_layer_of_the_same_shape_needs_no_second_check(norm):
    check, other = Check(None), LlamaRMSNorm(64)
    kernel = counted(fused)
    run = lambda m: check.first_call(  # noqa: E731  # same
        site(m, "rows"), m, LlamaRMSNorm.forward, implementation(kernel, digest="k"), Run(), (torch.randn(2, 5, 64),), {}
    )
    run(norm)
    kernel.calls.clear()
    assert run(other)[1].accepted
    assert len(kernel.calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x, m: (x[:1, :1], m),
        lambda x, m: (x.repeat(1, 60, 1), m),
        lambda x, m: (x.transpose(0, 1), m),
        lambda x, m: (x.double(), m),
        lambda x, m: (x.clone().requires_grad_(), m),
        lambda x, m: (x, setattr(m, "variance_epsilon", 1e-5) or m),
        lambda x, m: (x, m.to(torch.bfloat16)),
    ],
    ids=["fewer rows", "more rows", "layout", "dtype", "gradients", "eps", "dtype of the weight"],
)
def test_a_verdict_is_void_when_what_it_holds_for_changes(norm, change, tmp_path):
    store = Verdicts(tmp_path / "verdicts", key=tmp_path / "key")
    x = torch.randn(2, 5, 64)
    run = lambda x, m: Check(store).first_call(  # noqa: E731  # same
        site(m, "rows"), m, LlamaRMSNorm.forward, implementation(fused, digest="k"), Run(), (x,), {}
    )[1]
    first = run(x, norm)
    assert run(x.clone(), norm).key == first.key
    assert run(*change(x, norm)).key != first.key


@pytest.mark.parametrize("what", ["torch", "python", "chip", "instructions", "build", "its dependency", "layer"])
def test_a_verdict_is_void_on_another_machine_and_for_another_kernel(norm, what, monkeypatch, tmp_path):
    store, x = Verdicts(tmp_path / "verdicts", key=tmp_path / "key"), torch.randn(2, 5, 64)
    one = implementation(fused, digest="k")
    ask = lambda kernel: Check(store).first_call(  # noqa: E731  # same
        site(norm, "rows"), norm, LlamaRMSNorm.forward, kernel, Run(), (x,), {}
    )[1]
    before = ask(one)
    assert ask(one).key == before.key
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "99.0")
    elif what == "python":
        monkeypatch.setattr(keys.platform, "python_version", lambda: "3.99.0")
    elif what == "chip":
        monkeypatch.setattr(keys, "_cpu", lambda: "another chip")
    elif what == "instructions":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX99")
    elif what == "build":
        one = implementation(fused, digest="l")
    elif what == "its dependency":
        one = replace(one, origin=replace(one.origin, depends=(implementation(fused, digest="l").origin,)))
    else:
        one = replace(one, layer="Other")
    keys.place.cache_clear()
    try:
        assert ask(one).key != before.key
    finally:
        keys.place.cache_clear()


def test_a_verdict_is_void_when_the_originals_code_changes(norm):
    def forward(self, hidden_states):
        return LlamaRMSNorm.forward(self, hidden_states)

    def changed(self, hidden_states):
        return LlamaRMSNorm.forward(self, hidden_states * 1.0)

    changed.__qualname__ = forward.__qualname__
    x = torch.randn(2, 64)
    keys = {ask(Check(None), norm, fused, x, original=f)[1].key for f in (forward, changed)}
    assert len(keys) == 2


def test_a_large_call_is_checked_by_rows_of_it_and_compared_whole(norm, monkeypatch):
    monkeypatch.setattr(real_calls, "PART", 64 * 100)
    original, x = counted(LlamaRMSNorm.forward), torch.randn(1000, 64)
    out, verdict = ask(Check(None), norm, fused, x, original=original)
    assert verdict.accepted
    assert original.calls.count(x.numel()) == 1, "one extra forward at full size"
    assert max(n for n in original.calls if n != x.numel()) <= 64 * 100

    def one_row(self, x):
        out = fused(self, x).clone()
        if x.shape[0] == 1000:
            out[501] = 0
        return out

    out, verdict = ask(Check(None), norm, one_row, x)
    assert "of rows 501" in verdict.reason
    assert torch.equal(out, norm(x))


def test_rows_that_stand_out_are_judged_by_the_reference(monkeypatch):
    monkeypatch.setattr(real_calls, "PART", 64 * 100)
    module = nn.LayerNorm(64)
    x = torch.randn(1000, 64)
    x[501] = 3.7 + 1e-6 * torch.randn(64)  # hardly any spread: two right kernels differ in the second digit

    def kernel(self, x):
        centred = x - x.mean(-1, keepdim=True)
        hat = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + self.eps)
        return hat * self.weight + self.bias

    _, verdict = ask(Check(None), module, kernel, x)
    assert verdict.accepted, verdict.reason


def test_functions_are_checked_with_positions_taken_from_the_call():
    module = ORIGINALS["rotary"].make(32)
    q, k = torch.randn(2, 4, 9, 32), torch.randn(2, 2, 9, 32)
    angle = torch.randn(2, 9, 16).repeat(1, 1, 2)
    wrong = lambda q, k, cos, sin, unsqueeze_dim=1: tuple(  # noqa: E731  # same
        t * (1.0 if q.shape[2] > 1 else 1.1) for t in apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)
    )
    run = lambda f: ask(Check(None), module, f, q, k, angle.cos(), angle.sin(), kind="function", original=apply_rotary_pos_emb)  # noqa: E731  # same
    assert run(apply_rotary_pos_emb)[1].accepted
    assert "first row alone" in run(wrong)[1].reason


def test_a_module_that_writes_its_own_buffers_is_left_alone():
    module = nn.BatchNorm1d(64).train()
    before = module.running_mean.clone()
    x = torch.randn(7, 64)
    _, verdict = ask(Check(None), module, lambda self, x: x, x)
    assert "the original changes" in verdict.reason
    assert module.num_batches_tracked == 1, "once, by the call itself"
    assert torch.allclose(module.running_mean, before * 0.9 + x.mean(0) * 0.1)


def test_a_cache_cannot_be_given_twice(norm):
    class Cache:
        def __init__(self):
            self.keys = torch.zeros(3)

    _, verdict = ask(
        Check(None), norm, lambda self, x, cache: fused(self, x), torch.randn(2, 64), Cache(), original=lambda self, x, cache: x
    )
    assert "given a Cache" in verdict.reason


def test_the_modes(norm):
    x = torch.randn(2, 64)
    wrong = lambda self, x: fused(self, x) * 2  # noqa: E731  # same
    assert ask(Check(None, mode="off"), norm, wrong, x)[1].accepted
    assert [Check(None, mode=m).every for m in ("first-use", "always", "sample:7", "off")] == [0, 1, 7, None]
    for mode in ("always", "sample:3"):
        check, kernel = Check(None, mode=mode), counted(fused)
        for _ in range(2):
            kernel.calls.clear()
            assert check.first_call(
                site(norm, "rows"), norm, LlamaRMSNorm.forward, implementation(kernel, digest="k"), Run(), (x,), {}
            )[1].accepted
            assert len(kernel.calls) > 1
    with pytest.raises(ValueError, match="none of first-use"):
        Check(None, mode="sometimes")


def test_offloaded_weights_are_compared_without_a_copy(norm):
    class Sharded(nn.Parameter):
        pass

    norm.weight = Sharded(norm.weight.detach())
    x = torch.randn(3, 64, requires_grad=True)
    _, verdict = ask(Check(None), norm, fused, x, training=True)
    assert verdict.accepted
    assert dict(verdict.details)["reference"].startswith("the original itself")
    assert norm.weight.requires_grad
    assert not ask(Check(None), norm, lambda self, x: fused(self, x) * 1.05, x, training=True)[1].accepted


def test_two_threads_check_one_site_and_nobody_waits_for_ever(norm):
    check, x = Check(None), torch.randn(4, 64)
    state = torch.get_rng_state()
    results = []

    def run():
        results.append(ask(check, norm, fused, x)[1])

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [v.accepted for v in results] == [True] * 4
    assert torch.equal(torch.get_rng_state(), state)


def test_a_site_inside_of_a_site_is_checked_in_the_real_call_alone():
    check, mlp = Check(None), ORIGINALS["mlp"].make(32)
    inner, activation = [], type(mlp.act_fn)

    class Nested(activation):
        def forward(self, x):
            out, verdict = check.first_call(
                site(self, "elementwise"),
                self,
                activation.forward,
                implementation(lambda self, x: nn.functional.silu(x)),
                Run(),
                (x,),
                {},
            )
            inner.append(verdict.accepted)
            return out

    mlp.act_fn.__class__ = Nested
    kernel = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # noqa: E731  # same
    x = torch.randn(2, 5, 32)
    out, verdict = check.first_call(site(mlp, "mlp"), mlp, type(mlp).forward, implementation(kernel), Run(), (x,), {})
    assert verdict.accepted, verdict.reason
    assert inner[-1]
    assert torch.equal(out, type(mlp).forward(mlp, x))


def test_defaults_of_the_user_do_not_matter(norm):
    previous = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        with torch.device("meta"):
            x = torch.randn(4, 64, dtype=torch.float32, device="cpu")
            assert ask(Check(None), norm, LlamaRMSNorm.forward, x)[1].accepted
            for name in ("llama", "rotary", "gelu"):
                module = ORIGINALS[name].make(64) if name == "gelu" else None
                if module is None:
                    with torch.device("cpu"):
                        module = ORIGINALS[name].make(64).float()
                forward = ORIGINALS[name].function or type(module).forward
                kind = "function" if ORIGINALS[name].function else "module"
                where = replace(site(module, ORIGINALS[name].probe, kind), device="cpu", dtype="torch.float32")
                verdict = Check(None).equivalent(where, module, forward, implementation(forward, kind), Run(training=True))
                assert verdict.accepted, verdict.reason
    finally:
        torch.set_default_dtype(previous)


def test_whatever_stands_in_the_way_of_a_proof_is_a_reason(norm):
    where = site(norm, "rows")
    for field, value, says in (
        ("dtype", "torch.float8_e4m3fn", "no way to test"),
        ("dtype", "torch.nonsense", "no way to test"),
        ("device", "cuda:99", "no way to test"),
        ("row", replace(where.row, probe="telepathy"), "no recipe 'telepathy'"),
        ("row", replace(where.row, probe="mlp"), "finds no sizes"),
    ):
        verdict = Check(None).equivalent(
            replace(where, **{field: value}), norm, LlamaRMSNorm.forward, implementation(fused), Run()
        )
        assert not verdict.accepted
        assert says in verdict.reason
    backward = implementation(fused, backward=False)
    assert Check(None).equivalent(where, norm, LlamaRMSNorm.forward, backward, Run(training=True)).reason == "has no backward"


def test_a_warm_lookup_costs_microseconds_and_a_warm_start_reads_one_small_file(norm, tmp_path):
    store = Verdicts(tmp_path / "verdicts", key=tmp_path / "key")
    kernel = counted(fused)
    run = lambda check: check.equivalent(  # noqa: E731  # same
        site(norm, "rows"), norm, LlamaRMSNorm.forward, implementation(kernel, digest="k"), Run()
    )
    check = Check(store)
    first = run(check)
    kernel.calls.clear()
    start = time.perf_counter()
    for _ in range(100):
        assert run(check) == first
    assert (time.perf_counter() - start) / 100 < 1e-3, "about 30 us; a hundred times less than a millisecond would be noise here"
    assert run(Check(Verdicts(store.path, key=store._key_file))) == first
    assert not kernel.calls


def test_the_kernel_runs_on_the_users_threads_and_they_are_given_back(norm):
    before, seen = torch.get_num_threads(), set()

    def kernel(self, x):
        seen.add(torch.get_num_threads())
        return fused(self, x)

    torch.set_num_threads(3)
    try:
        assert ask(Check(None), norm, kernel, torch.randn(4, 64))[1].accepted
        assert (
            Check(None)
            .equivalent(site(norm, "rows"), norm, LlamaRMSNorm.forward, implementation(kernel), Run(training=True))
            .accepted
        )
        ask(Check(None), norm, lambda self, x: 1 / 0, torch.randn(4, 64))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {3}
