"""Rotary embedding in the forms that models have it, interpreted: pairs, a part of the dimensions, narrow cos, any positions."""

import pytest
import torch
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.glm import modeling_glm
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from .conftest import TOLERANCES, both, relative

DTYPES = list(TOLERANCES)
HALVES, PAIRS, PAIRS_WIDE, HALVES_NARROW, PAIRS_TO_HALVES = range(5)
FORMS = {
    HALVES: ("apply_rotary_pos_emb", modeling_glm4_moe.apply_rotary_pos_emb),
    PAIRS: ("apply_rotary_pos_emb_pairs", modeling_glm.apply_rotary_pos_emb),
    PAIRS_WIDE: ("apply_rotary_pos_emb_pairs_wide", modeling_cohere.apply_rotary_pos_emb),
    HALVES_NARROW: ("apply_rotary_pos_emb_halves_narrow", modeling_gpt_oss.apply_rotary_pos_emb),
    PAIRS_TO_HALVES: ("apply_rotary_pos_emb_interleave", modeling_deepseek_v3.apply_rotary_pos_emb_interleave),
}
WHOLE_ONLY = (PAIRS_WIDE, HALVES_NARROW, PAIRS_TO_HALVES)
"""Forms whose models rotate every dimension; Cohere's also computes in float32 at most."""


def inputs(b, s, h, k, d, r, form, dtype=torch.float32, dim=1):
    q, kk = (torch.randn(b, s, n, d, dtype=dtype) for n in (h, k))
    if dim == 1:
        q, kk = q.transpose(1, 2), kk.transpose(1, 2)
    r = r // 2 if form == HALVES_NARROW else r
    angle = torch.rand(b, s, r, dtype=torch.float64) * 7
    return q, kk, angle.cos().to(dtype), angle.sin().to(dtype)


def want(form, q, k, cos, sin, dim):
    """What the model's own function gives; of Cohere's, which would go down to float32, its formula."""
    if form == PAIRS_WIDE:
        cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
        return tuple(x * cos + modeling_cohere.rotate_half(x) * sin for x in (q, k))
    return FORMS[form][1](q, k, cos, sin, unsqueeze_dim=dim)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize(
    "shape", [(2, 7, 6, 2, 64, 64), (1, 1, 5, 5, 96, 96), (2, 5, 3, 1, 48, 20), (1, 3, 4, 2, 64, 32)], ids=str
)
def test_every_form_and_its_gradients(layers, launches, form, dtype, dim, shape):
    if shape[-1] < shape[-2] and form in WHOLE_ONLY:
        shape = (*shape[:-2], 32, 32)
    q, k, cos, sin = inputs(*shape, form, dtype, dim)
    f = layers.rope.rope
    error = both(
        lambda q, k: f(q, k, cos, sin, dim, form), lambda q, k: want(form, q, k, cos.double(), sin.double(), dim), (q, k)
    )
    assert error < TOLERANCES[dtype]
    assert launches == ["_forward", "_forward"]


@pytest.mark.parametrize("form", [PAIRS_WIDE, HALVES_NARROW, PAIRS_TO_HALVES])
def test_a_part_rotates_in_the_other_forms_too_and_the_rest_is_untouched(layers, launches, form):
    q, k, cos, sin = inputs(2, 5, 3, 2, 64, 24, form)
    found = layers.rope.rope(q, k, cos, sin, 1, form)
    for x, y in zip((q, k), found, strict=True):
        assert relative(y[..., :24], want(form, *(x[..., :24].double(),) * 2, cos.double(), sin.double(), 1)[0]) < 1e-6
        assert torch.equal(y[..., 24:], x[..., 24:])
    assert launches == ["_forward"]


@pytest.mark.parametrize("form", FORMS)
def test_one_row_of_positions_for_all_or_packed_tokens_without_a_batch(layers, launches, form):
    q, k, cos, sin = inputs(3, 5, 4, 2, 32, 32, form)
    f, c, s = layers.rope.rope, cos[:1], sin[:1]
    exact = want(form, q.double(), k.double(), c.double(), s.double(), 1)
    assert max(map(relative, f(q, k, c, s, 1, form), exact)) < 1e-6
    assert max(map(relative, f(q, k, c[0], s[0], 0, form), exact)) < 1e-6
    assert max(map(relative, f(q[0], k[0], c[0], s[0], 0, form), (x[0] for x in exact))) < 1e-6
    tokens = q.transpose(1, 2), k.transpose(1, 2)
    turned = [x.transpose(1, 2) for x in exact]
    assert max(map(relative, f(*tokens, c[0], s[0], 1, form), turned)) < 1e-6
    assert max(map(relative, f(tokens[0][0], tokens[1][0], c[0], s[0], 1, form), (x[0] for x in turned))) < 1e-6
    assert launches == ["_forward"] * 5


@pytest.mark.parametrize("form", FORMS)
def test_any_strides_and_nothing_at_all(layers, launches, form):
    q, k, cos, sin = inputs(2, 5, 4, 2, 64, 32, form)
    f = layers.rope.rope
    q, k = torch.randn(2, 4, 5, 64)[..., ::2], torch.randn(2, 2, 32, 5).transpose(2, 3)
    assert (
        max(map(relative, f(q, k, cos, sin, 1, form), want(form, q.double(), k.double(), cos.double(), sin.double(), 1))) < 1e-6
    )
    packed = torch.randn(2, 5, 8, 32)
    q, k = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:6].transpose(1, 2)
    assert (
        max(map(relative, f(q, k, cos, sin, 1, form), want(form, q.double(), k.double(), cos.double(), sin.double(), 1))) < 1e-6
    )
    assert launches == ["_forward"] * 2
    assert f(q[:, :, :0], k[:, :, :0], cos[:, :0], sin[:, :0], 1, form)[0].shape == (2, 4, 0, 32)
    assert len(launches) == 2


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rotated", [32, 16])
def test_answers_are_contiguous_where_the_models_are_and_else_lie_as_the_inputs(layers, launches, form, rotated):
    if rotated == 16 and form in WHOLE_ONLY:
        return
    q, k, cos, sin = inputs(2, 5, 4, 2, 32, rotated, form)
    theirs = modeling_llama.apply_rotary_pos_emb if form == HALVES and rotated == 32 else FORMS[form][1]
    for mine, original in zip(layers.rope.rope(q, k, cos, sin, 1, form), theirs(q, k, cos, sin), strict=True):
        assert mine.is_contiguous() == original.is_contiguous()
    assert launches == ["_forward"]


def test_cos_in_float32_does_not_change_the_dtype_of_the_other_forms(layers, launches):
    for form in (PAIRS, PAIRS_WIDE, HALVES_NARROW, PAIRS_TO_HALVES):
        q, k, cos, sin = inputs(2, 5, 4, 2, 32, 32, form)
        found = layers.rope.rope(q.bfloat16(), k.bfloat16(), cos, sin, 1, form)
        exact = want(form, q.bfloat16().double(), k.bfloat16().double(), cos.double(), sin.double(), 1)
        assert [x.dtype for x in found] == [torch.bfloat16] * 2
        assert max(map(relative, found, exact)) < TOLERANCES[torch.bfloat16]
    assert launches == ["_forward"] * 4


@pytest.mark.parametrize("form", FORMS)
def test_the_formula_is_the_same_and_is_what_a_compiler_sees(layers, launches, form):
    q, k, cos, sin = inputs(2, 5, 4, 2, 32, 32, form)
    exact = want(form, q.double(), k.double(), cos.double(), sin.double(), 1)
    f = layers.rope
    assert max(map(relative, f.formula(q.double(), k.double(), cos.double(), sin.double(), 1, form), exact)) < 1e-14
    compiled = torch.compile(lambda q, k: f.rope(q, k, cos, sin, 1, form), fullgraph=True, backend="aot_eager")
    assert max(map(relative, compiled(q, k), exact)) < 1e-6
    assert launches == []


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_the_rotations(layers, launches, form):
    q, k, cos, sin = inputs(1, 3, 2, 1, 16, 16, form)

    def second(f, leaves):
        out = f(*leaves)
        first = torch.autograd.grad(sum(x.pow(3).sum() for x in out), leaves, create_graph=True)
        return torch.autograd.grad(sum(x.pow(2).sum() for x in first), leaves)

    found = second(lambda q, k: layers.rope.rope(q, k, cos, sin, 1, form), [x.clone().requires_grad_() for x in (q, k)])
    exact = second(lambda q, k: want(form, q, k, cos.double(), sin.double(), 1), [x.double().requires_grad_() for x in (q, k)])
    assert max(map(relative, found, exact)) < 1e-5
    assert launches


@pytest.mark.parametrize("form", FORMS)
def test_functions_stand_in_for_the_models_and_for_no_others(layers, launches, form):
    """With halves of cos alike, as most models make it, the forms still differ: the proof tells them apart."""
    name, original = FORMS[form]
    q, k, cos, sin = inputs(2, 5, 4, 2, 32, 32, form)
    if form != HALVES_NARROW:
        cos, sin = (torch.cat([x[..., :16]] * 2, -1) for x in (cos, sin))
    exact = original(q, k, cos, sin)
    for other, (its, _) in FORMS.items():
        if HALVES_NARROW in (form, other) and form != other:
            continue  # takes cos of another width
        close = max(map(relative, getattr(layers.layers, its)(q, k, cos, sin), exact)) < 1e-5
        assert close == (its == name)
    assert launches


@pytest.mark.parametrize("rotated", [32, 16])
def test_functions_that_put_a_part_and_the_rest_together_are_contiguous_even_without_a_rest(layers, launches, rotated):
    q, k, cos, sin = inputs(2, 5, 4, 2, 32, rotated, HALVES)
    found, theirs = (
        layers.layers.apply_rotary_pos_emb_part(q, k, cos, sin),
        modeling_glm4_moe.apply_rotary_pos_emb(q, k, cos, sin),
    )
    assert max(map(relative, found, (x.double() for x in theirs))) < 1e-6
    assert all(x.is_contiguous() for x in (*found, *theirs))
    assert launches == ["_forward"]


class Marked(torch.Tensor):
    """A subclass: the kernel does not know what it means."""


def test_a_shape_that_is_known_is_not_taken_for_what_only_looks_like_it(layers, launches):
    """What is looked up first holds everything that decides: another dtype, shape, kind or wish for a gradient is another question."""
    rope = layers.rope
    q, k, cos, sin = torch.randn(1, 2, 3, 16), torch.randn(1, 1, 3, 16), torch.randn(1, 3, 16), torch.randn(1, 3, 16)
    w = torch.randn(16)
    for _ in range(2):
        rope.rope(q, k, cos, sin)
        rope.norm_rope(q, k, w, w, cos, sin, 1e-6)
    assert launches == ["_forward"] * 4
    for call in (lambda c, s: rope.rope(q, k, c, s), lambda c, s: rope.norm_rope(q, k, w, w, c, s, 1e-6)):
        launches.clear()
        c, s = cos.clone().requires_grad_(), sin.clone().requires_grad_()
        sum(t.sum() for t in call(c, s)).backward()
        assert c.grad is not None
        assert s.grad is not None
        call(cos.double(), sin.double())
        assert launches == []
        with torch.no_grad():
            call(c, s)
        assert launches == ["_forward"]
    launches.clear()
    rope.rope(q.as_subclass(Marked), k, cos, sin)
    rope.rope(q, k.double(), cos, sin)
    with pytest.raises(RuntimeError):  # as the original raises
        rope.rope(q, k, cos, sin[:, :2])
    assert launches == []
