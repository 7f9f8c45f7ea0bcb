"""One table, and nothing that hides: not small rows, not single elements, not what is no number."""

import math

import pytest
import torch

from kernelswap.proof.tolerance import LARGE, SOME, TOLERANCES, compare

DTYPES = list(TOLERANCES)


def generic(dtype, rows=61, n=256, seed=0):
    reference = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return reference, reference.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_within_and_four_roundings_of_one_element_are_not(dtype):
    reference, original = generic(dtype)
    assert compare(original, original, reference, generic=True).wrong is None
    kernel = original.clone()
    row, column = 7, int(reference[7].abs().argmax())
    kernel[row, column] *= 1 + 200 * TOLERANCES[dtype].unit
    found = compare(kernel, original, reference)
    assert f"[{row}, {column}]" in found.wrong


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_in_which_every_element_is_a_little_off_is_no_row_with_one_such_element(dtype):
    """As far off as single elements may be, and a row as a whole may not."""
    reference = torch.ones(7, 64, dtype=torch.float64)
    original = reference.to(dtype)
    off = 1 - 1.5 * TOLERANCES[dtype].row * TOLERANCES[dtype].unit
    kernel = original.clone()
    kernel[3, 5] = off
    assert compare(kernel, original, reference).wrong is None
    kernel[3] = off
    assert compare(kernel, original, reference).wrong.startswith("row [3, :]: error")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_row_is_judged_by_its_own_size(dtype, scale):
    reference, _ = generic(torch.float64)
    reference[5] *= scale
    original = reference.to(dtype)
    kernel = original.clone()
    kernel[5] *= 1.05
    assert "[5," in compare(kernel, original, reference).wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_element_beside_an_outlier_is_judged_by_its_own_size_in_sixteen_bits(dtype):
    reference, _ = generic(torch.float64)
    reference[3, 100] = 60.0
    reference[3, 9] = 1.0
    original = reference.to(dtype)
    kernel = original.clone()
    kernel[3, 9] = 1.0 + 16 * TOLERANCES[dtype].unit
    assert "element [3, 9]" in compare(kernel, original, reference).wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_common_factor_far_below_one_rounding_is_seen_in_generic_inputs(dtype):
    reference, original = generic(dtype, n=1024)
    unit = TOLERANCES[dtype].unit
    kernel = (reference * (1 + 0.3 * unit)).to(dtype)
    assert "common factor" in compare(kernel, original, reference, generic=True).wrong
    assert compare(kernel, original, reference).wrong is None
    each = torch.where(torch.arange(61)[:, None] % 2 == 0, 1.0, -1.0)
    kernel = (reference * (1 + each * 0.5 * unit)).to(dtype)
    assert "every row" in compare(kernel, original, reference, generic=True).wrong


def test_an_original_that_is_exact_by_luck_sets_no_trap():
    reference, exact = generic(torch.bfloat16)
    source = torch.Generator().manual_seed(1)
    noisy = [(reference * (1 + 0.02 * torch.randn(reference.shape, generator=source))).bfloat16() for _ in range(2)]
    original, kernel = noisy
    reference[11] = exact[11].double()
    original[11] = exact[11]
    assert compare(kernel, original, reference).wrong is None


def test_where_the_question_is_ill_conditioned_no_answer_is_held_to_more_digits_than_it_has():
    reference, original = generic(torch.float32)
    kernel = original.clone()
    kernel[4] *= 1 + 1e-4
    assert compare(kernel, original, reference).wrong is not None
    moved = reference.clone()
    moved[4] *= 1 + 5e-5
    assert compare(kernel, original, reference, moved=moved).wrong is None


@pytest.mark.parametrize(
    ("kernel", "original", "reference", "says"),
    [
        (math.nan, 1.0, 1.0, "NaN where the original has a number"),
        (math.inf, 1.0, 1.0, "infinite where the original is finite"),
        (1.0, math.nan, math.nan, "hides a NaN"),
        (1.0, math.inf, math.inf, "finite where the original is infinite"),
        (-math.inf, math.inf, math.inf, "wrong sign"),
        (math.nan, math.inf, math.inf, "NaN where"),
    ],
)
def test_what_is_no_number_must_agree(kernel, original, reference, says):
    r, o = generic(torch.float32)
    k = o.clone()
    r[2, 3], o[2, 3], k[2, 3] = reference, original, kernel
    found = compare(k, o, r)
    assert says in found.wrong
    assert "[2, 3]" in found.wrong


@pytest.mark.parametrize(
    ("kernel", "original", "reference"), [(math.nan, math.nan, math.nan), (math.inf, math.inf, 7e4), (6.4e4, math.inf, 6.4e4)]
)
def test_what_overflows_in_the_original_may_overflow_or_be_right(kernel, original, reference):
    r, o = generic(torch.float16)
    k = o.clone()
    r[2, 3], o[2, 3], k[2, 3] = reference, original, kernel
    assert compare(k, o, r).wrong is None


def test_zeros_must_be_zeros():
    reference, original = generic(torch.float32)
    reference[1] = original[1] = 0
    kernel = original.clone()
    assert compare(kernel, original, reference).wrong is None
    kernel[1, 1] = 1e-20
    assert "[1, 1]" in compare(kernel, original, reference).wrong


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 4), (3, 0), (2, 3, 4, 1)])
def test_any_shape(shape):
    reference = torch.ones(shape, dtype=torch.float64)
    assert compare(reference.float(), reference.float(), reference).wrong is None
    if reference.numel():
        assert compare(reference.float() * 1.1, reference.float(), reference).wrong is not None


def test_integers_are_compared_exactly():
    a = torch.arange(6).reshape(2, 3)
    b = a.clone()
    assert compare(a, b, b).wrong is None
    b[1, 2] = 0
    assert "[1, 2]" in compare(a, b, b).wrong


@pytest.mark.parametrize("where", [0, 777, 3 * SOME - 1])
@pytest.mark.parametrize("value", [math.nan, 100.0, 1.5])
def test_in_a_large_tensor_every_row_counts_though_few_are_looked_at(where, value):
    rows = 3 * SOME
    reference, original = generic(torch.float32, rows=rows, n=LARGE // rows + 64)
    where = min(where, rows - 1)
    kernel = original.clone()
    kernel[where, 17] = value
    before = kernel.clone(), original.clone()
    found = compare(kernel, original, reference)
    assert f"[{where}, 17]" in found.wrong
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip((kernel, original), before, strict=True))
    assert compare(original, original, reference).wrong is None
    reference[where], original[where] = math.nan, math.nan
    assert compare(original.clone(), original, reference).wrong is None


def test_parameters_of_tiny_share_are_judged_by_the_usual_row():
    reference, original = generic(torch.bfloat16)
    reference[8] *= 1e-4
    original = reference.to(torch.bfloat16)
    kernel = original.clone()
    kernel[8] *= 1.5
    assert compare(kernel, original, reference, gradient=True).wrong is not None
    assert compare(kernel, original, reference, gradient=True, level=1.0).wrong is None


def test_a_row_whose_right_answer_is_as_good_as_zero_is_judged_and_its_relative_error_not_told():
    """A constant row through a LayerNorm without weights: the rounding that is left there is infinitely large beside it."""
    reference, original = generic(torch.float32)
    reference[3], reference[4] = 0.0, 1e-17
    original[3], original[4] = 1e-9, -1e-9
    found = compare(original, original, reference)
    assert found.wrong is None
    assert found.original < 1e-5
    assert found.kernel < 1e-5
    assert compare(original[4:5], original[4:5], reference[4:5]).original == 0  # also where there is nothing else
    kernel = original.clone()
    kernel[3, 5] = 0.5
    assert "[3, 5]" in compare(kernel, original, reference).wrong
