"""Projections of few rows, interpreted, against float64. bfloat16 of more rows than one needs a GPU: the interpreter has no such product."""

import importlib.util

import pytest
import torch
from tests.interpreted.conftest import BUNDLED, TOLERANCES, relative

from kernelswap import reads
from kernelswap.slots.obstacles import bypass

spec = importlib.util.spec_from_file_location("layers_reference", BUNDLED / "layers" / "torch-ext" / "layers" / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)
ACTS = ("silu", "gelu", "gelu_tanh")


def some(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def made(k, sizes, dtype, biases):
    weights = tuple(some(n, k) / k**0.5 for n in sizes)
    return tuple(w.to(dtype) for w in weights), tuple(
        some(n, dtype=dtype) if b else None for n, b in zip(sizes, biases, strict=True)
    )


def wide(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


def exact(x, weights, biases):
    return reference.project(x.double(), wide(weights), wide(biases))


KINDS = [
    pytest.param(dtype, rows, id=f"{str(dtype)[6:]}-{rows}")
    for dtype in TOLERANCES
    for rows in (1, 3, 16, 29)
    if rows == 1 or dtype is not torch.bfloat16
]


@pytest.mark.parametrize("biases", [(0, 0, 0), (1, 1, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize(("k", "sizes"), [(64, (32, 16, 16)), (37, (5, 1, 33)), (1, (3, 2, 1)), (1030, (40, 8, 8))], ids=str)
@pytest.mark.parametrize(("dtype", "rows"), KINDS)
def test_three_products_in_one_launch(layers, launches, dtype, rows, k, sizes, biases):
    x, (weights, given) = some(1, rows, k, dtype=dtype), made(k, sizes, dtype, biases)
    kept = [t.clone() for t in (x, *weights)]
    with torch.no_grad():
        found = layers.projections.project(x, weights, given)
    assert launches == ["_project"]
    for y, want in zip(found, exact(x, weights, given), strict=True):
        assert (y.shape, y.dtype) == (want.shape, dtype)
        assert y.is_contiguous()
        assert relative(y, want) < TOLERANCES[dtype]
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, *weights), strict=True))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("k", "n", "biases"), [(64, 48, (0, 0)), (37, 5, (1, 1)), (530, 21, (0, 1))], ids=str)
@pytest.mark.parametrize(("dtype", "rows"), KINDS)
def test_gate_and_up_with_what_follows_in_one_launch(layers, launches, dtype, rows, k, n, biases, act):
    x, (weights, given) = some(rows, 1, k, dtype=dtype), made(k, (n, n), dtype, biases)
    with torch.no_grad():
        found = layers.projections.gate_up(x, *weights, *given, act)
    assert launches == ["_gate_up"]
    want = reference.gate_up(x.double(), wide(weights), wide(given), act)
    assert (found.shape, found.dtype) == (want.shape, dtype)
    assert relative(found, want) < 2 * TOLERANCES[dtype]


def ways(x):
    """The same numbers, held in other ways."""
    rows, k = x.shape
    gaps = torch.full((rows, 2 * k + 3), torch.nan, dtype=x.dtype)
    gaps[:, 1 : 1 + k] = x
    return {"slice": gaps[:, 1 : 1 + k], "transposed": x.t().contiguous().t(), "expanded": x[:1].expand(rows, k)}


@pytest.mark.parametrize("way", ["slice", "transposed", "expanded"])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_that_are_not_contiguous(layers, launches, rows, way):
    x, (weights, given) = ways(some(rows, 24))[way], made(24, (8, 8, 4), torch.float32, (1, 0, 0))
    with torch.no_grad():
        found = layers.projections.project(x, weights, given)
    assert launches == ["_project"]
    assert max(relative(y, w) for y, w in zip(found, exact(x, weights, given), strict=True)) < 1e-5


def test_memory_that_is_not_aligned_has_a_launch_of_its_own(layers, launches):
    k = 32
    held = some(8 * k + 1)
    weights = tuple(some(8, k) for _ in range(3))
    odd = (held[1:].view(8, k), *weights[1:])
    x = some(1, k)
    with torch.no_grad():
        for given in (weights, odd, weights):
            found = layers.projections.project(x, given, (None,) * 3)
            assert max(relative(y, w) for y, w in zip(found, exact(x, given, (None,) * 3), strict=True)) < 1e-5
    assert len(layers.projections._projects) == 2


def test_a_row_is_what_it_is_alone_and_equal_calls_give_equal_bits(layers):
    x, (weights, given) = some(9, 40), made(40, (8, 8, 8), torch.float32, (0, 0, 0))
    x[4] = torch.nan
    with torch.no_grad():
        first, again = (layers.projections.project(x, weights, given) for _ in range(2))
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, again, strict=True))
        assert all(y[4].isnan().all() and y[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all() for y in first)


def left_alone():
    x, (weights, given) = some(2, 24), made(24, (8, 8, 8), torch.float32, (0, 0, 0))
    wide = some(24, 16)
    yield "more rows than it takes", some(33, 24), weights, given
    yield "no rows", some(0, 24), weights, given
    yield "no columns", some(2, 0), tuple(some(8, 0) for _ in range(3)), given
    yield "another dtype", x.double(), tuple(w.double() for w in weights), given
    yield "two dtypes", x.half(), weights, given
    yield "a bias of another dtype", x, weights, (some(8).double(), None, None)
    yield "a weight by columns", x, (wide[:, :8].t(), *weights[1:]), given
    yield "a weight without rows", x, (some(0, 24), *weights[1:]), given
    yield "a number", torch.tensor(1.0), weights, given


def test_calls_that_are_not_for_it_are_left_to_the_modules(layers, launches):
    for what, x, weights, biases in left_alone():
        assert layers.projections.project(x, weights, biases) is None, what
        assert layers.projections.gate_up(x, *weights[:2], *biases[:2]) is None, what
    assert launches == []


def test_gradients_autocast_and_transforms_are_left_to_the_modules(layers, launches):
    project, gate_up = layers.projections.project, layers.projections.gate_up
    x, (weights, none) = some(2, 24), made(24, (8, 8, 8), torch.float32, (0, 0, 0))
    parameters = tuple(map(torch.nn.Parameter, weights))
    assert project(x, parameters, none) is None
    assert gate_up(x, *parameters[1:]) is None
    assert project(x.clone().requires_grad_(), weights, none) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert project(x, weights, none) is None
    formula = layers.projections.formula
    seen = []
    torch.func.vmap(lambda row: seen.append(project(row[None], weights, none)) or formula(row, weights, none))(x)
    assert seen == [None]
    assert launches == []
    with torch.no_grad():
        assert project(x, parameters, none) is not None


def mlp(act, k, n, bias=False):
    torch.manual_seed(3)
    made = torch.nn.Module()
    made.gate_proj, made.up_proj = torch.nn.Linear(k, n, bias=bias), torch.nn.Linear(k, n, bias=bias)
    made.down_proj = torch.nn.Linear(n, k, bias=bias)
    made.plain = lambda x: made.down_proj(reference.ACTS[act](made.gate_proj(x)) * made.up_proj(x))
    return made


FUSED = {"silu": "SwiGLUMLPFused", "gelu_tanh": "GeGLUMLPFused", "gelu": "GeGLUErfMLPFused"}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", FUSED)
def test_the_layers_of_an_mlp(layers, launches, act, bias):
    module, forward = mlp(act, 24, 20, bias), getattr(layers.layers, FUSED[act]).forward
    few, many = some(2, 3, 24), some(36, 24)
    with torch.no_grad():
        assert relative(forward(module, few), module.plain(few)) < 1e-5
        assert launches == ["_gate_up"]
        assert relative(forward(module, many), module.plain(many)) < 1e-5
        assert launches == ["_gate_up", "_forward"]
    few.requires_grad_()
    ours, theirs = (
        torch.autograd.grad(f(few).sum(), [few, *module.parameters()]) for f in (lambda x: forward(module, x), module.plain)
    )
    assert max(relative(a, b) for a, b in zip(ours, theirs, strict=True)) < 1e-5


class Loud(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def changed(module, how):
    if how == "hook":
        module.up_proj.register_forward_hook(lambda m, args, out: out * 2)
    elif how == "its own forward":
        plain = module.up_proj.forward
        module.up_proj.forward = lambda x: plain(x) * 2
    elif how == "another class":
        module.up_proj.__class__ = Loud
    else:
        module.up_proj = torch.nn.Sequential(module.up_proj)


@pytest.mark.parametrize("how", ["hook", "its own forward", "another class", "something else"])
def test_what_is_around_a_projection_stays_in_effect(layers, launches, how):
    module, forward = mlp("silu", 24, 20), layers.layers.SwiGLUMLPFused.forward
    changed(module, how)
    x = some(1, 24)
    with torch.no_grad():
        assert relative(forward(module, x), module.plain(x)) < 1e-5
    assert "_gate_up" not in launches


def test_compiled_code_calls_the_modules_in_one_graph(layers, launches):
    module, forward = mlp("silu", 24, 20), layers.layers.SwiGLUMLPFused.forward
    x = some(1, 24)
    with torch.no_grad():
        compiled = torch.compile(lambda x: forward(module, x), backend="eager", fullgraph=True)
        assert relative(compiled(x), module.plain(x)) < 1e-5
    assert launches == []


def test_a_flop_counter_and_fake_tensors_see_the_modules(layers, launches):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    module, forward = mlp("silu", 24, 20), layers.layers.SwiGLUMLPFused.forward
    x = some(2, 24)
    with torch.no_grad():
        plain = module.plain(x)
        counter = FlopCounterMode(display=False)
        with counter:
            assert relative(forward(module, x), plain) < 1e-5
        assert counter.get_total_flops() == 3 * 2 * 2 * 24 * 20
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert forward(module, mode.from_tensor(x)).shape == plain.shape
        assert "_gate_up" not in launches
        forward(module, x)
    assert launches[-1] == "_gate_up"


def test_three_modules_as_the_statements_call_them(layers, launches):
    q, k, v = (torch.nn.Linear(24, n, bias=n == 8) for n in (16, 8, 4))
    projections = layers.layers.projections
    with torch.no_grad():
        for rows, wanted in ((3, ["_project"]), (33, ["_project"])):
            x = some(1, rows, 24)
            for ours, theirs in zip(projections(q, k, v, x), (q(x), k(x), v(x)), strict=True):
                assert relative(ours, theirs) < 1e-5
            assert launches == wanted


def test_a_plan_knows_what_the_layers_read_and_keeps_them_off_an_mlp_with_hooks(layers):
    for name in FUSED.values():
        module, found = mlp("silu", 8, 8), reads.of(getattr(layers.layers, name).forward)
        assert set(found) == {"gate_proj", "up_proj", "down_proj()"}
        assert bypass(module, found) is None
        module.gate_proj.register_forward_hook(lambda *_: None)
        assert bypass(module, found) == "the kernel reads gate_proj instead of calling gate_proj, which has forward hooks"
