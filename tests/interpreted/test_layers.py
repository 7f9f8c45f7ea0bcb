"""The Triton layers, interpreted, against float64: forward and backward, odd shapes, every dtype, any strides, nothing at all."""

import pytest
import torch

from .conftest import TOLERANCES, both, relative

DTYPES = list(TOLERANCES)


def rms(x, w, offset=0, eps=1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (w + offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 7, 100), (2, 5, 4, 16), (1, 1, 3), (70, 33), (2, 1, 2049)], ids=str)
def test_rms_norm_and_its_gradients(layers, launches, dtype, shape, offset):
    x, w = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    f = layers.rms_norm.rms_norm
    assert both(lambda x, w: f(x, w, 1e-6, offset), lambda x, w: rms(x, w, offset), (x, w)) < TOLERANCES[dtype]
    with torch.no_grad():
        assert relative(f(x, w, 1e-6, offset), rms(x.double(), w.double(), offset)) < TOLERANCES[dtype]
    assert launches == ["_forward", "_backward", "_sum_partials", "_forward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_of_any_strides(layers, launches, dtype):
    f = layers.rms_norm.rms_norm
    w = torch.randn(48, dtype=dtype)
    for x in (
        torch.randn(48, 5, dtype=dtype).t(),
        torch.randn(5, 2, 48, dtype=dtype)[:, 1],
        torch.randn(5, 96, dtype=dtype)[:, ::2],
        torch.randn(1, 48, dtype=dtype).expand(5, 48),
    ):
        assert both(lambda x, w: f(x, w, 1e-6), rms, (x, w)) < TOLERANCES[dtype]
    assert len(launches) == 12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_weight_gives_the_dtype_that_torch_promotes_to(layers, launches, dtype):
    x, w = torch.randn(3, 40, dtype=dtype), torch.randn(40)
    got = layers.rms_norm.rms_norm(x, w, 1e-6)
    assert got.dtype is torch.float32
    assert relative(got, rms(x.double(), w.double())) < TOLERANCES[dtype]
    assert layers.rms_norm.rms_norm(x, w, 1e-6, 1).dtype is dtype
    assert launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(3, 7, 100), (1, 1, 128), (70, 33), (2, 1, 2049)], ids=str)
def test_residual_sum_and_its_norm_in_one_launch(layers, launches, dtype, shape, offset):
    x, d, w = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    f = layers.rms_norm.add_rms_norm
    error = both(lambda x, d, w: f(x, d, w, 1e-6, offset), lambda x, d, w: (x + d, rms(x + d, w, offset)), (x, d, w))
    assert error < 1.5 * TOLERANCES[dtype]
    s, y = f(x, d, w, 1e-6, offset)
    assert relative(s, x + d) < 1e-7 or dtype is torch.bfloat16  # rounded as torch rounds; the interpreter cuts bfloat16 off
    assert relative(y, rms(s.double(), w.double(), offset)) < TOLERANCES[dtype]
    assert launches == ["_add_forward", "_backward", "_sum_partials", "_add_forward"]


def test_residual_sums_of_any_strides_and_either_gradient_alone(layers, launches):
    f = layers.rms_norm.add_rms_norm
    x, d, w = torch.randn(48, 5).t(), torch.randn(5, 96)[:, ::2], torch.randn(48)
    assert both(lambda x, d, w: f(x, d, w, 1e-6), lambda x, d, w: (x + d, rms(x + d, w)), (x, d, w)) < 1e-5
    assert both(lambda x, d, w: f(x, d, w, 1e-6)[1], lambda x, d, w: rms(x + d, w), (x, d, w)) < 1e-5
    assert both(lambda x, d: f(x, d, w, 1e-6)[0], lambda x, d: x + d, (x, d)) < 1e-5
    assert launches
    with pytest.raises(RuntimeError):
        f(torch.randn(3, 48), torch.randn(2, 48), w, 1e-6)
    assert f(torch.empty(0, 48), torch.empty(0, 48), w, 1e-6)[1].shape == (0, 48)


def test_small_rows_are_not_lost_in_eps(layers):
    x, w = torch.randn(4, 64) * 1e-4, torch.randn(64)
    assert relative(layers.rms_norm.rms_norm(x, w, 1e-12), rms(x.double(), w.double(), eps=1e-12)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 300), (7, 101), (1,), (3, 1024)], ids=str)
def test_gated_activations_and_their_gradients(layers, launches, dtype, act, shape):
    g, u = (torch.randn(shape, dtype=dtype) * 3 for _ in range(2))
    f = layers.glu
    assert both(lambda g, u: f.act_mul(g, u, act), lambda g, u: f.formula(g, u, act), (g, u)) < TOLERANCES[dtype]
    assert launches == ["_forward", "_backward"]


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_gated_activations_far_out(layers, launches, act):
    g = torch.tensor([-200.0, -90.0, -20.0, -1e-4, -0.0, 0.0, 1e-4, 20.0, 90.0, 200.0])
    u = torch.ones_like(g)
    f = layers.glu
    assert both(lambda g, u: f.act_mul(g, u, act), lambda g, u: f.formula(g, u, act), (g, u)) < 1e-5
    assert launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 16, 8, 128), (2, 7, 6, 2, 64), (2, 5, 5, 5, 96), (3, 2, 1, 1, 16)], ids=str)
def test_rotary_and_its_gradients(layers, launches, dtype, shape, dim):
    b, s, h, k, d = shape
    q, kk = (torch.randn(b, s, n, d, dtype=dtype) for n in (h, k))
    if dim == 1:
        q, kk = q.transpose(1, 2), kk.transpose(1, 2)
    cos, sin = (torch.randn(b, s, d, dtype=dtype) for _ in range(2))
    f = layers.rope
    error = both(lambda q, k: f.rope(q, k, cos, sin, dim), lambda q, k: f.formula(q, k, cos.double(), sin.double(), dim), (q, kk))
    assert error < TOLERANCES[dtype]
    assert launches == ["_forward", "_forward"]


def test_rotary_of_one_row_of_positions_for_the_whole_batch(layers, launches):
    q, k = torch.randn(3, 4, 5, 32), torch.randn(3, 2, 5, 32)
    cos, sin = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    f = layers.rope
    want = f.formula(q.double(), k.double(), cos.double(), sin.double())
    assert max(map(relative, f.rope(q, k, cos, sin), want)) < 1e-6
    assert launches == ["_forward"]


def test_rotary_of_inner_strides(layers, launches):
    q, k = torch.randn(2, 4, 5, 64)[..., ::2], torch.randn(2, 2, 32, 5).transpose(2, 3)
    cos, sin = torch.randn(2, 5, 32), torch.randn(5, 2, 32).transpose(0, 1)
    f = layers.rope
    want = f.formula(q.double(), k.double(), cos.double(), sin.double())
    assert max(map(relative, f.rope(q, k, cos, sin), want)) < 1e-6
    assert launches == ["_forward"]


@pytest.fixture(params=[False, True], ids=["rotated back first", "one launch back"])
def one_launch(request, layers, monkeypatch):
    monkeypatch.setattr(layers.rope_gradients, "FUSED", request.param)
    return request.param


BACK = ["_backward", "_sum_both"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dim", [1, 2])
def test_norm_and_rotary_in_one_launch(layers, launches, one_launch, dtype, dim, offset):
    b, s, h, k, d = 2, 9, 6, 3, 64
    q, kk = (torch.randn(b, s, n, d, dtype=dtype) for n in (h, k))
    if dim == 1:
        q, kk = q.transpose(1, 2), kk.transpose(1, 2)
    w, v = (torch.randn(d, dtype=dtype) for _ in range(2))
    cos, sin = (torch.randn(b, s, d, dtype=dtype) for _ in range(2))
    f = layers.rope
    error = both(
        lambda q, k, w, v: f.norm_rope(q, k, w, v, cos, sin, 1e-6, dim, offset),
        lambda q, k, w, v: f.formula(rms(q, w, offset), rms(k, v, offset), cos.double(), sin.double(), dim),
        (q, kk, w, v),
    )
    assert error < 1.3 * TOLERANCES[dtype]
    assert launches[0] == "_forward"
    assert (launches[1:] == BACK) == one_launch


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("b", "s", "h", "k", "d"), [(1, 1, 1, 1, 16), (3, 13, 17, 1, 48), (2, 5, 33, 3, 96), (1, 40, 4, 4, 32)], ids=str
)
def test_gradients_of_norm_and_rotary_of_any_number_of_heads_and_any_strides(
    layers, launches, monkeypatch, offset, b, s, h, k, d
):
    monkeypatch.setattr(layers.rope_gradients, "FUSED", True)
    packed = torch.randn(b, s, h + 2 * k, d)
    q, kk = packed[:, :, :h].transpose(1, 2), packed[:, :, h : h + k].transpose(1, 2)
    w, v = torch.randn(d), torch.randn(d)
    cos, sin = (torch.randn(1, s, d) for _ in range(2))
    error = both(
        lambda q, k, w, v: layers.rope.norm_rope(q, k, w, v, cos, sin, 1e-6, 1, offset),
        lambda q, k, w, v: layers.rope.formula(rms(q, w, offset), rms(k, v, offset), cos.double(), sin.double()),
        (q, kk, w, v),
    )
    assert error < 1e-5
    assert launches[1:] == BACK


def test_a_gradient_that_has_no_memory_of_its_own_is_taken(layers, launches, monkeypatch):
    monkeypatch.setattr(layers.rope_gradients, "FUSED", True)
    q, k, w, v = (torch.randn(shape, requires_grad=True) for shape in ((1, 4, 5, 32), (1, 2, 5, 32), (32,), (32,)))
    cos, sin = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    found = torch.autograd.grad(sum(x.sum() for x in layers.rope.norm_rope(q, k, w, v, cos, sin, 1e-6)), (q, k, w, v))
    assert launches[1:] == BACK
    wide = [x.detach().double().requires_grad_() for x in (q, k, w, v)]
    want = layers.rope.formula(rms(wide[0], wide[2]), rms(wide[1], wide[3]), cos.double(), sin.double())
    want = torch.autograd.grad(sum(x.sum() for x in want), wide)
    assert max(map(relative, found, want)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_at_all(layers, launches, dtype):
    x, w = torch.empty(0, 64, dtype=dtype), torch.ones(64, dtype=dtype)
    assert layers.rms_norm.rms_norm(x, w, 1e-6).shape == (0, 64)
    assert layers.glu.act_mul(x, x).shape == (0, 64)
    q, c = torch.empty(2, 3, 0, 64, dtype=dtype), torch.empty(2, 0, 64, dtype=dtype)
    assert layers.rope.rope(q, q, c, c)[0].shape == (2, 3, 0, 64)
    assert launches == []


def test_the_modules_find_their_numbers(layers, launches):
    class Norm(layers.layers.RMSNorm):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(32))
            self.variance_epsilon = 1e-3

    norm, x = Norm(), torch.randn(3, 32)
    assert relative(norm(x), rms(x.double(), norm.weight.double(), eps=1e-3)) < 1e-5
    assert launches == ["_forward"]


@pytest.mark.parametrize("dense", [True, False], ids=["gradients as attention gives them", "gradients as q lies"])
def test_gradients_of_norm_and_rotary_are_copied_nowhere(layers, launches, one_launch, dense, monkeypatch):
    q, k = (torch.randn(2, 9, n, 64).transpose(1, 2).requires_grad_() for n in (6, 3))
    w, v = (torch.randn(64, requires_grad=True) for _ in range(2))
    cos, sin = (torch.randn(2, 9, 64) for _ in range(2))
    a, b = layers.rope.norm_rope(q, k, w, v, cos, sin, 1e-6)
    gradients = [torch.randn_like(x, memory_format=torch.contiguous_format if dense else torch.preserve_format) for x in (a, b)]
    copied, of = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(x.shape) or of(x) if not x.is_contiguous() else x)
    found = torch.autograd.grad((a, b), (q, k, w, v), gradients)
    assert copied == []
    assert found[0].stride() == q.stride()
    f = layers.rope
    wide = [x.detach().double().requires_grad_() for x in (q, k, w, v)]
    want = f.formula(rms(wide[0], wide[2]), rms(wide[1], wide[3]), cos.double(), sin.double())
    want = torch.autograd.grad(want, wide, [g.double() for g in gradients])
    assert max(map(relative, found, want)) < 1e-5


def norms(layers, *weights, eps="variance_epsilon", of=(1e-3, 1e-3)):
    """Modules that hold what the layers read of a norm."""
    made = [torch.nn.Module() for _ in weights]
    for norm, weight, value in zip(made, weights, of, strict=False):
        norm.weight = torch.nn.Parameter(weight)
        setattr(norm, eps, value)
    return made


@pytest.mark.parametrize("eps", ["variance_epsilon", "eps"])
@pytest.mark.parametrize(("name", "offset"), [("residual_norm", 0), ("residual_norm_zero_centered", 1)])
def test_in_the_place_of_a_residual_sum_and_its_norm(layers, launches, name, offset, eps):
    r, h, w = torch.randn(3, 5, 32), torch.randn(3, 5, 32), torch.randn(32)
    (norm,) = norms(layers, w, eps=eps)
    y, s = getattr(layers.layers, name)(norm, r, h)
    assert torch.equal(s, r + h)
    assert relative(y, rms((r + h).double(), w.double(), offset, 1e-3)) < 1e-5
    assert launches == ["_add_forward"]
    (y.sum() + s.sum()).backward()
    assert norm.weight.grad.shape == w.shape


@pytest.mark.parametrize("of", [(1e-3, 1e-3), (1e-3, 1e-1)])
@pytest.mark.parametrize(("name", "offset"), [("norm_rotary", 0), ("norm_rotary_zero_centered", 1)])
def test_in_the_place_of_the_norms_of_q_and_k_and_their_rotary_embedding(layers, launches, name, offset, of):
    q, k = torch.randn(2, 5, 4, 32).transpose(1, 2), torch.randn(2, 5, 2, 32).transpose(1, 2)
    cos, sin, v, w = torch.randn(2, 5, 32), torch.randn(2, 5, 32), torch.randn(32), torch.randn(32)
    with torch.no_grad():
        found = getattr(layers.layers, name)(*norms(layers, v, w, of=of), q, k, cos, sin)
    q, k, v, w = (x.double() for x in (q, k, v, w))
    want = layers.rope.formula(rms(q, v, offset, of[0]), rms(k, w, offset, of[1]), cos.double(), sin.double())
    assert max(map(relative, found, want)) < 1e-5
    assert launches == (["_forward"] if of[0] == of[1] else ["_forward"] * 3)


def test_norms_that_the_kernel_would_misread_go_through_torch(layers, launches):
    q, k, c = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 5, 32), torch.randn(2, 5, 32)
    f = layers.rope
    for v, w in (
        (torch.randn(32).half(), torch.randn(32)),
        (torch.randn(32), torch.randn(64)[::2]),
        (torch.randn(1), torch.randn(32)),
    ):
        want = f.formula(rms(q.double(), v.double()), rms(k.double(), w.double()), c.double(), c.double())
        assert max(map(relative, f.norm_rope(q, k, v, w, c, c, 1e-6), want)) < 1e-5
    assert launches == []


def test_shapes_and_dtypes_that_the_kernels_would_misread_go_through_torch(layers, launches):
    norm, rope, glu = layers.rms_norm.rms_norm, layers.rope, layers.glu
    with pytest.raises(RuntimeError):
        norm(torch.randn(3, 64), torch.randn(32), 1e-6)
    q, k = torch.randn(2, 4, 5, 32), torch.randn(2, 2, 5, 32)
    cos, sin = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    for c, s in ((cos[:, :1], sin[:, :1]), (cos, sin[:1]), (cos.half(), sin), (cos, sin.bfloat16())):
        want = rope.formula(q.double(), k.double(), c.double(), s.double())
        assert max(map(relative, rope.rope(q, k, c, s), want)) < 1e-6
    one_token = torch.randn(2, 2, 1, 32)
    assert relative(rope.rope(q, one_token, cos, sin)[1], rope.formula(q, one_token, cos, sin)[1].double()) < 1e-6
    wide = [x.double() for x in (q, k, cos, sin)]
    assert max(map(relative, rope.rope(*wide), rope.formula(*wide))) < 1e-14
    assert relative(glu.act_mul(wide[0], wide[0]), glu.formula(wide[0], wide[0])) < 1e-14
    assert launches == []


def test_gradients_of_cos_and_sin_are_torchs(layers, launches):
    q, k = torch.randn(1, 2, 3, 32, requires_grad=True), torch.randn(1, 2, 3, 32)
    cos, sin = (torch.randn(1, 3, 32, requires_grad=True) for _ in range(2))
    found = torch.autograd.grad(sum(x.sum() for x in layers.rope.rope(q, k, cos, sin)), (q, cos, sin))
    want = torch.autograd.grad(sum(x.sum() for x in layers.rope.formula(q, k, cos, sin)), (q, cos, sin))
    assert all(map(torch.equal, found, want))
    assert launches == []


def second_derivatives(f, inputs):
    """Of the sum of squares of f's first gradients."""
    out = f(*inputs)
    out = torch.cat([x.flatten() for x in (out if isinstance(out, tuple) else (out,))])
    first = torch.autograd.grad(out.pow(2).sum(), inputs, create_graph=True)
    return torch.autograd.grad(sum(x.pow(2).sum() for x in first), inputs)


def test_second_derivatives_are_those_of_the_formula(layers, launches, one_launch):
    cos, sin = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    q, k, w, v = torch.randn(2, 4, 3, 16), torch.randn(2, 2, 3, 16), torch.randn(16), torch.randn(16)
    norm, glu, rope = layers.rms_norm, layers.glu, layers.rope
    for f, g, inputs in (
        (lambda x, w: norm.rms_norm(x, w, 1e-6), rms, (torch.randn(5, 16), w)),
        (
            lambda x, d, w: norm.add_rms_norm(x, d, w, 1e-6),
            lambda x, d, w: (x + d, rms(x + d, w)),
            (torch.randn(5, 16), torch.randn(5, 16), w),
        ),
        (glu.act_mul, glu.formula, (torch.randn(5, 16), torch.randn(5, 16))),
        (lambda q, k: rope.rope(q, k, cos, sin), lambda q, k: rope.formula(q, k, cos.to(q), sin.to(q)), (q, k)),
        (
            lambda q, k, w, v: rope.norm_rope(q, k, w, v, cos, sin, 1e-6),
            lambda q, k, w, v: rope.formula(rms(q, w), rms(k, v), cos.to(q), sin.to(q)),
            (q, k, w, v),
        ),
    ):
        found = second_derivatives(f, [x.clone().requires_grad_() for x in inputs])
        want = second_derivatives(g, [x.double().requires_grad_() for x in inputs])
        assert max(map(relative, found, want)) < 1e-5
    assert launches


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64], ids=str)
def test_an_address_is_to_triton_what_a_tensor_is(layers, dtype):
    """The launch for a Triton whose launcher is not known hands over addresses; a bare integer would be a number to it."""
    x = torch.zeros(64, dtype=dtype)
    address = layers._launch._Address
    kind = layers._launch.mangle_type
    assert kind(address(x.data_ptr(), dtype), True) == kind(x, True)
    assert kind(x.data_ptr(), True) != kind(x, True)
