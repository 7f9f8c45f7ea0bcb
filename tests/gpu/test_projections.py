"""Projections of few rows on a GPU: the kernels against float64, in captured graphs, and in whole models that ask for them."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from tests.fusion import make

from kernelswap.api import Swapper
from kernelswap.types import Mode, Swap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning"),
]
BUILD = Path(__file__).parents[2] / "src" / "kernelswap" / "bundled" / "layers" / "build" / "torch-cuda"
TOLERANCES = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
F = torch.nn.functional
ACTS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}
ROWS = [1, 2, 7, 16, 32]


@pytest.fixture(scope="module")
def kernels():
    package = types.ModuleType("projections_cuda_under_test")
    package.__path__ = [str(BUILD)]
    sys.modules[package.__name__] = package
    yield importlib.import_module(f"{package.__name__}.projections")
    for name in [m for m in sys.modules if m.startswith(package.__name__)]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def some(*shape, dtype=torch.float32):
    return torch.randn(shape, device="cuda").to(dtype)


def made(k, sizes, dtype, biases=(0, 0, 0)):
    weights = tuple((some(n, k) / k**0.5).to(dtype) for n in sizes)
    return weights, tuple(some(n, dtype=dtype) if b else None for n, b in zip(sizes, biases, strict=False))


def linear(x, w, b):
    return F.linear(x.double(), w.double(), None if b is None else b.double())


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biases", [(0, 0, 0), (1, 1, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize(
    ("k", "sizes"),
    [(1024, (2048, 1024, 1024)), (4096, (4096, 1024, 1024)), (896, (896, 128, 128)), (37, (5, 1, 33)), (1, (3, 2, 1)), (5000, (70, 3, 9))],
    ids=str,
)  # fmt: skip
def test_three_products_in_one_launch(kernels, dtype, rows, biases, k, sizes):
    x, (weights, given) = some(rows, 1, k, dtype=dtype), made(k, sizes, dtype, biases)
    kept = [t.clone() for t in (x, *weights)]
    found, again = (kernels.project(x, weights, given) for _ in range(2))
    for y, w, b in zip(found, weights, given, strict=True):
        assert (y.shape, y.dtype, y.is_contiguous()) == ((rows, 1, w.shape[0]), dtype, True)
        assert error(y, linear(x, w, b)) < TOLERANCES[dtype]
    assert all(map(torch.equal, found, again))
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, *weights), strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(
    ("k", "n", "biases"), [(1024, 3072, (0, 0)), (4096, 12288, (0, 0)), (37, 5, (1, 1)), (530, 21, (0, 1))], ids=str
)
def test_gate_and_up_with_what_follows_in_one_launch(kernels, dtype, rows, act, k, n, biases):
    x, (weights, given) = some(1, rows, k, dtype=dtype), made(k, (n, n), dtype, biases)
    found = kernels.gate_up(x, *weights, *given, act)
    want = ACTS[act](linear(x, weights[0], given[0])) * linear(x, weights[1], given[1])
    assert (found.shape, found.dtype) == ((1, rows, n), dtype)
    assert error(found, want) < TOLERANCES[dtype]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_memory_that_has_gaps_or_is_not_aligned(kernels, dtype, rows):
    k, sizes = 192, (64, 32, 32)
    weights, _ = made(k, sizes, dtype)
    held = some(sizes[1] * k + 1, dtype=dtype)
    odd = (weights[0], held[1:].view(sizes[1], k), weights[2])
    wide = some(rows, 3 * k + 1, dtype=dtype)
    for given in (weights, odd, weights):
        for x in (wide[:, 1 : 1 + k], wide[:, :k].t().contiguous().t(), wide[:1, :k].expand(rows, k)):
            found = kernels.project(x, given, (None,) * 3)
            assert max(error(y, linear(x, w, None)) for y, w in zip(found, given, strict=True)) < TOLERANCES[dtype]


def test_a_nan_stays_in_its_row(kernels):
    x, (weights, given) = some(9, 256, dtype=torch.bfloat16), made(256, (64, 32, 32), torch.bfloat16)
    x[4, 7] = torch.nan
    for y in kernels.project(x, weights, given):
        assert y[4].isnan().all()
        assert y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_calls_that_are_not_for_it_are_left_to_the_modules(kernels):
    x, (weights, none) = some(2, 64, dtype=torch.bfloat16), made(64, (8, 8, 8), torch.bfloat16)
    left = {
        "more rows": (some(33, 64, dtype=torch.bfloat16), weights),
        "no rows": (x[:0], weights),
        "another dtype": (x.double(), tuple(w.double() for w in weights)),
        "two dtypes": (x.float(), weights),
        "on the CPU": (x.cpu(), tuple(w.cpu() for w in weights)),
        "meta": (x.to("meta"), tuple(w.to("meta") for w in weights)),
    }
    for what, (given, held) in left.items():
        assert kernels.project(given, held, none) is None, what
        assert kernels.gate_up(given, *held[:2]) is None, what
    with torch.autocast("cuda", dtype=torch.float16):
        assert kernels.project(x, weights, none) is None
    with torch.enable_grad():
        assert kernels.project(x, tuple(map(torch.nn.Parameter, weights)), none) is None
    assert kernels.project(x, tuple(map(torch.nn.Parameter, weights)), none) is not None


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_captured_graph_computes_what_is_in_its_memory(kernels, rows):
    x, (weights, given) = some(rows, 1024, dtype=torch.bfloat16), made(1024, (2048, 1024, 1024), torch.bfloat16)
    gate, up = made(1024, (3072, 3072), torch.bfloat16)[0]
    graph = torch.cuda.CUDAGraph()
    kernels.project(x, weights, given), kernels.gate_up(x, gate, up)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        three, one = kernels.project(x, weights, given), kernels.gate_up(x, gate, up)
    for _ in range(2):
        x.copy_(some(rows, 1024, dtype=torch.bfloat16))
        weights[1].mul_(-1.5)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, three, kernels.project(x, weights, given)))
        assert torch.equal(one, kernels.gate_up(x, gate, up))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_the_one_that_computes(kernels):
    x, (weights, given) = some(2, 64).to("cuda:1"), made(64, (8, 8, 8), torch.float32)
    weights = tuple(w.to("cuda:1") for w in weights)
    found = kernels.project(x, weights, given)
    assert max(error(y, linear(x, w, None)) for y, w in zip(found, weights, strict=True)) < 1e-5


# -- whole models ---------------------------------------------------------------------------------------------------

LAYERS = "kernelswap/layers"
ASKED = {
    "projections": f"{LAYERS}:projections",
    "SwiGLUMLP": f"{LAYERS}:SwiGLUMLPFused",
    "GeGLUMLP": f"{LAYERS}:GeGLUMLPFused",
}
KINDS = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]
BIG = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "vocab_size": 512}
MODELS = {torch.float32: (2e-4, 1e-3), torch.float16: (2e-2, 2e-2), torch.bfloat16: (8e-2, 8e-2)}


@pytest.fixture(scope="module")
def swapper(tmp_path_factory):
    return Swapper(cache=tmp_path_factory.mktemp("gpu"), offline=True)


def asked(kind):
    act = "GeGLUMLP" if kind.startswith("gemma") else "SwiGLUMLP"
    return {layer: spec for layer, spec in ASKED.items() if layer in {"projections", act}}


def ids(batch, tokens):
    return (torch.arange(batch * tokens).reshape(batch, tokens) * 7 % 500).cuda()


def launched(applied, monkeypatch):
    """Calls that the kernels answered, from here on."""
    seen = []
    for layer, name in (("projections", "project"), ("MLP", "gate_up")):
        found = next(o.inference.implementation for o in applied.outcomes if o.site.layer.endswith(layer) and isinstance(o, Swap))
        scope = found.forward.__globals__

        def noted(*args, _of=scope[name], _name=name):
            answer = _of(*args)
            seen.append(_name) if answer is not None else None
            return answer

        monkeypatch.setitem(scope, name, noted)
    return seen


@pytest.mark.parametrize("dtype", MODELS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_few_rows_and_of_many(swapper, kind, dtype, monkeypatch):
    model = make(kind, "cuda", dtype, **BIG)
    few, many = ids(2, 4), ids(2, 40)
    plain = [model(given).logits for given in (few, many)]
    applied = swapper.swap(model, table=asked(kind))
    for _ in range(2):
        for given, want in zip((many, few), plain[::-1], strict=True):
            torch.testing.assert_close(model(given).logits, want, atol=MODELS[dtype][0], rtol=MODELS[dtype][1])
    assert applied.refusals == (), applied.explain()
    seen = launched(applied, monkeypatch)
    model(many)
    assert seen == []
    model(few)
    assert sorted(seen) == ["gate_up"] * 2 + ["project"] * 2
    applied.undo()
    assert torch.equal(model(few).logits, plain[0])


def test_unasked_a_model_keeps_its_own_projections(swapper):
    applied = swapper.swap(make("qwen3", "cuda"))
    assert not [o for o in applied.outcomes if o.site.layer == "projections"]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 40])
def test_generation_gives_the_same_text(swapper, batch, graphs):
    model, more = make("qwen3", "cuda", **BIG), {"max_new_tokens": 16, "do_sample": False}
    static = {"cache_implementation": "static"} if graphs else {}
    plain = model.generate(ids(batch, 21), **more, **static, **({"disable_compile": True} if graphs else {}))
    applied = swapper.swap(model, table=asked("qwen3"), graphs=graphs)
    for _ in range(2):
        assert torch.equal(model.generate(ids(batch, 21), **more, **static), plain), applied.explain()
    assert applied.refusals == ()
    if graphs:
        assert applied.report["graphs"]["replayed"] > 0


def test_a_training_step_is_that_of_the_modules(swapper):
    model, plain = make("qwen2", "cuda", **BIG).train(), make("qwen2", "cuda", **BIG).train()
    swapper.swap(model, table=asked("qwen2"))
    with torch.enable_grad():
        for _ in range(2):
            for one in (model, plain):
                one.zero_grad()
                one(ids(2, 5), labels=ids(2, 5)).loss.backward()
            for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
                scale = q.grad.abs().max() + 1e-6
                torch.testing.assert_close(
                    p.grad / scale, q.grad / scale, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
def test_compiled_models_trace_the_modules_in_one_graph(swapper):
    model = make("qwen3", "cuda", **BIG)
    plain = model(ids(1, 5)).logits
    swapper.swap(model, table=asked("qwen3"))
    model(ids(1, 5))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids(1, 5), use_cache=False).logits, plain, atol=2e-4, rtol=1e-3)


def test_hooks_on_a_projection_are_called(swapper):
    model, plain, seen = make("llama", "cuda", **BIG), make("llama", "cuda", **BIG), []
    swapper.swap(model, table=asked("llama"))
    model(ids(1, 5))
    for one in (model, plain):
        layer = one.model.layers[0]
        for projection in (layer.self_attn.k_proj, layer.mlp.up_proj):
            projection.register_forward_hook(lambda m, args, out: seen.append(m) or out * 2)
    torch.testing.assert_close(model(ids(1, 5)).logits, plain(ids(1, 5)).logits, atol=2e-4, rtol=1e-3)
    assert len(seen) == 4


def test_what_was_measured_serves_by_the_number_of_rows(swapper):
    model = make("qwen3", "cuda", torch.bfloat16, **{**BIG, "hidden_size": 1024, "intermediate_size": 3072})
    wanted = {"only": ["SwiGLUMLP", "projections"], "mode": Mode.INFERENCE}
    swapper.measure(model, seconds=60, compile=False, **wanted)
    plain = [model(ids(1, tokens)).logits for tokens in (1, 40)]
    applied = swapper.swap(model, choose="measured", **wanted)
    told = repr(applied.outcomes)  # served, or passed over with what was measured
    assert "SwiGLUMLPFused" in told
    assert "layers:projections" in told
    for _ in range(2):
        for tokens, want in zip((1, 40), plain, strict=True):
            torch.testing.assert_close(model(ids(1, tokens)).logits, want, atol=8e-2, rtol=8e-2)
