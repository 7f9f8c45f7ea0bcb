"""Whatever a bundled kernel may be launched with gives the same answers: every value of every axis, and what is tried first."""

import itertools
import types

import pytest
import torch

from kernelswap.tuning import Tunings, hand_in, place

from .conftest import MODULES, package, relative

DIGEST = "d" * 64
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def kernels():
    """Packages of their own: what a test hands in stays in them."""
    layers = package("layers_tuned", "layers/build/torch-cuda", *MODULES, "tuning")
    attention = package("attention_tuned", "attention/build/torch-universal", "decode", "tuning")
    loss = package("loss_tuned", "loss/build/torch-universal", "cross_entropy", "loss", "tuning")
    return {"layers": layers, "attention": attention, "loss": loss}


def fresh_layers(*names):
    """A package of its own: what was bound and handed in before is not there."""
    return package(f"layers_fresh_{next(NUMBERS)}", "layers/build/torch-cuda", *names)


def rms(x, w):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


def among_nan(t):
    around = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
    around[32:-32] = t.flatten()
    return around[32:-32].view(t.shape)


def case_rms(it):
    x, w = among_nan(torch.randn(67, 40)), among_nan(torch.randn(40))
    return lambda: [it.rms_norm.rms_norm(x, w, 1e-6)], lambda: [rms(x.double(), w.double())]


def case_add(it):
    x, d, w = among_nan(torch.randn(67, 40)), among_nan(torch.randn(67, 40)), among_nan(torch.randn(40))
    return lambda: it.rms_norm.add_rms_norm(x, d, w, 1e-6), lambda: [
        x.double() + d.double(),
        rms(x.double() + d.double(), w.double()),
    ]


def gradients(f, *inputs, dtype=None):
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = f(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.manual_seed(1)
    dys = [torch.randn(o.shape).to(o.dtype) for o in outs]
    return torch.autograd.grad(outs, leaves, dys)


def case_rms_backward(it):
    x, w = among_nan(torch.randn(23, 40)), among_nan(torch.randn(40))
    return lambda: gradients(lambda x, w: it.rms_norm.rms_norm(x, w, 1e-6), x, w), lambda: gradients(
        rms, x, w, dtype=torch.float64
    )


def rotated(it, *, back):
    q, k = among_nan(torch.randn(1, 5, 6, 16)).transpose(1, 2), among_nan(torch.randn(1, 5, 2, 16)).transpose(1, 2)
    cos, sin, v, w = torch.randn(1, 5, 16), torch.randn(1, 5, 16), torch.randn(16), torch.randn(16)
    double = [t.double() for t in (cos, sin, v, w)]
    if back:
        return (
            lambda: gradients(lambda q, k: it.rope.rope(q, k, cos, sin), q, k),
            lambda: gradients(lambda q, k: it.rope.formula(q, k, *double[:2]), q, k, dtype=torch.float64),
        )
    return (
        lambda: it.rope.norm_rope(q, k, v, w, cos, sin, 1e-6),
        lambda: it.rope.formula(rms(q.double(), double[2]), rms(k.double(), double[3]), *double[:2]),
    )


def case_glu(it, *, back=False):
    g, u = among_nan(torch.randn(7, 99)), among_nan(torch.randn(7, 99))
    if back:
        return lambda: gradients(it.glu.act_mul, g, u), lambda: gradients(it.glu.formula, g, u, dtype=torch.float64)
    return lambda: [it.glu.act_mul(g, u)], lambda: [it.glu.formula(g.double(), u.double())]


def case_projections(it, rows, *, gated):
    x, weights = among_nan(torch.randn(rows, 300)), [among_nan(torch.randn(n, 300)) for n in (37, 37, 5)]
    exact, none = [x.double() @ w.double().t() for w in weights], (None,) * 3
    if gated:
        return lambda: [it.projections.gate_up(x, *weights[:2])], lambda: [torch.nn.functional.silu(exact[0]) * exact[1]]
    return lambda: it.projections.project(x, tuple(weights), none), lambda: exact


def case_decode(it):
    q, k, v = (among_nan(torch.randn(2, h, n, 16, dtype=torch.float16)) for h, n in ((4, 1), (2, 300), (2, 300)))
    length = torch.tensor([300, 37], dtype=torch.int32)

    def exact():
        out = []
        for i in range(2):
            keys, values = k[i, :, : length[i]].double(), v[i, :, : length[i]].double()
            scores = q[i].double().view(2, 2, 16) @ keys.transpose(1, 2) / 4
            out.append((torch.softmax(scores, -1) @ values).view(1, 4, 16))
        return [torch.stack(out)]

    return lambda: [it.decode.decode(q, k, v, scale=0.25, length=length)], exact


def case_cross_entropy(it):
    z, target = among_nan(torch.randn(3, 5000)), torch.tensor([0, 4999, 17])

    def both(z):
        return (
            it.cross_entropy.cross_entropy(z, target)
            if z.dtype is torch.float32
            else torch.nn.functional.cross_entropy(z, target)
        )

    return lambda: gradients(both, z), lambda: gradients(both, z, dtype=torch.float64)


def case_layer_norm(it, *, back=False):
    x, w, b = among_nan(torch.randn(67, 40)), among_nan(torch.randn(40)), among_nan(torch.randn(40))

    def plain(x, w, b):
        return torch.nn.functional.layer_norm(x, (40,), w, b, 1e-5)

    def ours(x, w, b):
        return it.layer_norm.layer_norm(x, w, b, 1e-5)

    if back:
        return lambda: gradients(ours, x, w, b), lambda: gradients(plain, x, w, b, dtype=torch.float64)
    return lambda: [ours(x, w, b)], lambda: [plain(x.double(), w.double(), b.double())]


def case_gated(it, *, back=False):
    x, z, w = among_nan(torch.randn(67, 40)), among_nan(torch.randn(67, 40)), among_nan(torch.randn(40))

    def ours(x, z, w):
        return it.gated_norm.rms_norm_gated(x, z, w, 1e-6, "silu", 2)

    def plain(x, z, w):
        return it.gated_norm.formula(x, z, w, 1e-6, "silu", 2)

    if back:
        return lambda: gradients(ours, x, z, w), lambda: gradients(plain, x, z, w, dtype=torch.float64)
    return lambda: [ours(x, z, w)], lambda: [plain(x.double(), z.double(), w.double())]


def case_softmax(it, *, back=False, width=40):
    x = among_nan(torch.randn(5, width))
    if back:
        return lambda: gradients(it.softmax.softmax, x), lambda: gradients(lambda x: x.softmax(-1), x, dtype=torch.float64)
    return lambda: [it.softmax.softmax(x)], lambda: [x.double().softmax(-1)]


CASES = {
    "layer_norm.forward": ("layers", case_layer_norm, 1e-5),
    "layer_norm.backward": ("layers", lambda it: case_layer_norm(it, back=True), 1e-5),
    "gated_norm.forward": ("layers", case_gated, 1e-5),
    "gated_norm.backward": ("layers", lambda it: case_gated(it, back=True), 1e-5),
    "softmax.forward": ("layers", case_softmax, 1e-5),
    "softmax.backward": ("layers", lambda it: case_softmax(it, back=True), 1e-5),
    "softmax.forward, by blocks": ("layers", lambda it: case_softmax(it, width=20000), 1e-5),
    "softmax.backward, by blocks": ("layers", lambda it: case_softmax(it, back=True, width=20000), 1e-5),
    "rms_norm.forward": ("layers", case_rms, 1e-5),
    "rms_norm.add": ("layers", case_add, 1e-5),
    "rms_norm.backward": ("layers", case_rms_backward, 1e-5),
    "rope": ("layers", lambda it: rotated(it, back=False), 1e-5),
    "rope, inverse": ("layers", lambda it: rotated(it, back=True), 1e-5),
    "glu.forward": ("layers", case_glu, 1e-5),
    "glu.backward": ("layers", lambda it: case_glu(it, back=True), 1e-5),
    "projections.project, 1": ("layers", lambda it: case_projections(it, 1, gated=False), 1e-5),
    "projections.project, 19": ("layers", lambda it: case_projections(it, 19, gated=False), 1e-5),
    "projections.gate_up, 1": ("layers", lambda it: case_projections(it, 1, gated=True), 1e-5),
    "projections.gate_up, 3": ("layers", lambda it: case_projections(it, 3, gated=True), 1e-5),
    "decode": ("attention", case_decode, 1e-3),
    "cross_entropy": ("loss", case_cross_entropy, 1e-5),
}


def changes(space, default):
    """What is tried first, and each value of each axis with whatever it needs."""
    yield from (change for change in space.also if set(change) <= set(default))
    for name, values in space.axes.items():
        if name not in default:
            continue
        on = {space.needs[name]: next(v for v in space.axes[space.needs[name]] if v)} if name in space.needs else {}
        yield from ({**on, name: value} for value in values if value != default[name] or on)


@pytest.mark.parametrize("case", CASES)
def test_every_configuration_is_right(kernels, case):
    repository, make, tolerance = CASES[case]
    it, kernel = kernels[repository], case.partition(",")[0]
    tuning, (call, exact) = it.tuning, make(kernels[repository])
    wanted = exact()
    with tuning.Trial(kernel, {}) as trial:
        call()
    assert trial.defaults, "the kernel did not ask"
    default = next(reversed(trial.defaults.values()))
    for change in changes(tuning.SPACES[kernel], default):
        assert tuning.SPACES[kernel].holds(default, change), change
        with tuning.Trial(kernel, change):
            got = call()
        for a, b in zip(got, wanted, strict=True):
            assert relative(a, b) < tolerance, (change, relative(a, b))


def test_every_space_is_tried_here(kernels):
    named = {name for it in kernels.values() for name in it.tuning.SPACES}
    assert named == {case.partition(",")[0] for case in CASES} | {"linear_cross_entropy"}  # no kernel: how rows are cut


@pytest.mark.parametrize(("mib", "even", "rows"), [(592, 0, 1920), (594, 0, 2048), (592, 1, 1664), (594, 1, 2048)])
def test_the_head_is_cut_as_its_configuration_says(kernels, mib, even, rows):
    it = kernels["loss"]
    x = torch.empty(8192, 64, dtype=torch.bfloat16, device="meta")
    with it.tuning.Trial("linear_cross_entropy", {"MIB": mib, "EVEN": even}) as trial:
        assert it.loss._step(8192, 151936, x, None, on_gpu=True) == rows
    assert list(trial.defaults) == ["bfloat16; 64 to 151936; 8192-16383 rows"]


def test_a_measured_choice_serves_and_is_told(kernels, tmp_path):
    """Kept by one process, found by the kernel of another; a value that it does not name, or a device of another name, is none."""
    bucket = "float32, float32; 48 wide, over 64 rows, 1-33554432 elements"
    x, w = torch.randn(70, 48), torch.randn(48)
    here, tunings = place(-1), Tunings(tmp_path)
    tunings.put(DIGEST, here, "rms_norm.forward", bucket, {"config": {"ROWS": 4, "PROGRAMS": 2}})
    tunings.put(DIGEST, {**here, "device": "another"}, "rms_norm.forward", bucket, {"config": {"ROWS": 8}})
    fresh = fresh_layers("rms_norm", "tuning")
    module = types.SimpleNamespace(tuning=fresh.tuning)
    hand_in(module, DIGEST, tunings)
    assert relative(fresh.rms_norm.rms_norm(x, w, 1e-6), rms(x.double(), w.double())) < 1e-5
    assert fresh.tuning.serving == {("rms_norm.forward", bucket, -1): {"ROWS": 4, "PROGRAMS": 2}}
    other = Tunings(tmp_path / "other")
    other.put(DIGEST, here, "rms_norm.forward", bucket, {"config": {"ROWS": 8}})
    hand_in(module, DIGEST, other)  # the first one handed in counts
    fresh.rms_norm._forwards.clear()
    fresh.rms_norm.rms_norm(x, w, 1e-6)
    assert fresh.tuning.serving["rms_norm.forward", bucket, -1]["ROWS"] == 4


@pytest.mark.parametrize("config", [{"ROWS": 3}, {"ROWS": 4.0}, {"ROWS": True}, {"BLOCK": 64}, {"num_warps": 64}, {}])
def test_a_choice_outside_the_space_is_none(config):
    bucket = "float32, float32; 48 wide, over 64 rows, 1-33554432 elements"
    fresh = fresh_layers("rms_norm", "tuning")
    asked = []
    fresh.tuning.use(lambda *of: asked.append(of) or config)
    fresh.rms_norm.rms_norm(torch.randn(70, 48), torch.randn(48), 1e-6)
    assert asked == [("rms_norm.forward", bucket, -1)]
    assert not fresh.tuning.serving


def test_it_is_asked_when_a_launch_is_bound_and_never_again():
    fresh = fresh_layers("rms_norm", "rope", "tuning")
    asked = []
    fresh.tuning.use(lambda name, *_: asked.append(name))
    q, k, cos = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 3, 16), torch.randn(1, 3, 16)
    for _ in range(3):
        fresh.rms_norm.rms_norm(torch.randn(2, 48), torch.randn(48), 1e-6)
        fresh.rope.rope(q, k, cos, cos)
    assert asked == ["rms_norm.forward", "rope"]


def test_what_the_gpu_cannot_run_gives_way_to_the_default(monkeypatch):
    fresh = fresh_layers("rms_norm", "tuning", "_launch")
    bind = fresh.rms_norm.bind

    def small(fn, args, *, num_warps, **more):
        if num_warps > 8:
            raise fresh._launch.OutOfResources(1 << 20, 1 << 16, "threads")
        return bind(fn, args, num_warps=num_warps, **more)

    monkeypatch.setattr(fresh.rms_norm, "bind", small)
    fresh.tuning.use(lambda *_: {"num_warps": 16})
    x, w = torch.randn(70, 48), torch.randn(48)
    assert relative(fresh.rms_norm.rms_norm(x, w, 1e-6), rms(x.double(), w.double())) < 1e-5
    assert not fresh.tuning.serving


def test_two_trials_take_turns_and_leave_nothing(kernels):
    it = kernels["layers"]
    x, w = torch.randn(70, 56), torch.randn(56)
    it.rms_norm.rms_norm(x, w, 1e-6)
    before = dict(it.rms_norm._forwards)
    one, two = (it.tuning.Trial("rms_norm.forward", {"ROWS": rows}) for rows in (2, 4))
    tiles = []
    for trial in (one, two, one, two):
        with trial:
            it.rms_norm.rms_norm(x, w, 1e-6)
            tiles.append([tile for _, tile in it.rms_norm._forwards.values()])
    assert tiles == [[2], [4], [2], [4]]
    assert it.rms_norm._forwards == before
    with one, pytest.raises(RuntimeError, match="is being tried already"), two:
        pass
