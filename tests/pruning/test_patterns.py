"""Masks from scores: exact counts and the order of a stable sort, whatever the dtype, the ties and the sizes."""

import math

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import Waits

from lightning_prune.pruning.patterns import (
    NM,
    lowest_by_bisection,
    lowest_in_layer,
    lowest_in_rows,
    nm_mask,
    parse_pattern,
    refuse_nan,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 5.9604644775390625e-08, -5.9604644775390625e-08, 65504.0]
quick = settings(max_examples=50, deadline=None)


def draw_scores(shape, dtype, distinct, seed, special=False):
    """Random values, only `distinct` different ones (0: no limit)."""
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(distinct) if distinct else None
    if special:
        pool = np.array(SPECIAL)
    values = rng.choice(pool, size=shape) if pool is not None else rng.standard_normal(shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def as_numpy(scores):
    """Exact for every dtype used here; -0.0 and 0.0 are equal, as in the order asked for."""
    return scores.double().numpy() + 0.0


layouts = st.tuples(
    st.integers(1, 7),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 1, 2, 5]),
    st.integers(0, 10**6),
    st.booleans(),
)
ratios = st.one_of(st.sampled_from([0.0, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.99, 1.0]), st.floats(0, 1))


@quick
@given(layouts, ratios)
def test_layer_masks_prune_the_first_of_a_stable_sort(layout, ratio):
    rows, columns, dtype, distinct, seed, special = layout
    scores = draw_scores((rows, columns), dtype, distinct, seed, special)
    count = math.floor(ratio * scores.numel())
    mask = lowest_in_layer(scores, count)
    assert mask.dtype == torch.bool
    assert int((~mask).sum()) == count
    np.testing.assert_array_equal(mask.numpy(), naive.layer_mask(as_numpy(scores), count))


@quick
@given(layouts, ratios)
def test_row_masks_prune_the_same_number_in_every_row(layout, ratio):
    rows, columns, dtype, distinct, seed, special = layout
    scores = draw_scores((rows, columns), dtype, distinct, seed, special)
    each = math.floor(ratio * columns)
    mask = lowest_in_rows(scores, rows * each)
    assert (~mask).sum(1).tolist() == [each] * rows
    np.testing.assert_array_equal(mask.numpy(), naive.row_mask(as_numpy(scores), rows * each))


@quick
@given(layouts, ratios)
def test_counts_that_do_not_divide_by_the_rows_go_to_the_first_rows(layout, ratio):
    rows, columns, dtype, distinct, seed, special = layout
    scores = draw_scores((rows, columns), dtype, distinct, seed, special)
    count = math.floor(ratio * scores.numel())
    mask = lowest_in_rows(scores, count)
    assert int((~mask).sum()) == count
    np.testing.assert_array_equal(mask.numpy(), naive.row_mask(as_numpy(scores), count))


@quick
@given(layouts, st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (15, 16), (2, 16), (7, 17), (8, 32), (1, 64)]))
def test_nm_masks_keep_the_n_highest_of_every_group(layout, nm):
    rows, groups, dtype, distinct, seed, special = layout
    n, m = nm
    scores = draw_scores((rows, (groups % 5 + 1) * m), dtype, distinct, seed, special)
    mask = nm_mask(scores, NM(n, m))
    assert (mask.view(rows, -1, m).sum(-1) == n).all()
    np.testing.assert_array_equal(mask.numpy(), naive.nm_mask(as_numpy(scores), n, m))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distinct", [0, 2, 300])
@pytest.mark.parametrize("shape", [(1, 4097), (70, 73), (3, 7000)])
def test_large_layers_take_the_radix_path_to_the_same_masks(dtype, distinct, shape):
    scores = draw_scores(shape, dtype, distinct, 3)
    for ratio in (0.0003, 0.5, 0.9999):
        count = math.floor(ratio * scores.numel())
        mask = lowest_in_layer(scores, count)
        np.testing.assert_array_equal(mask.numpy(), naive.layer_mask(as_numpy(scores), count))


@pytest.mark.parametrize("distinct", [1, 3, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_gpus_do_gives_the_same_masks_without_waiting(dtype, distinct):
    generator = torch.Generator().manual_seed(distinct)
    scores = (torch.randint(distinct, (5, 301), generator=generator) / distinct - 0.3).to(dtype)
    scores[0, :9], scores[1, ::7], scores[2, 5:90] = -math.inf, math.inf, -0.0
    for matrix, count in ((scores, 1), (scores, 150), (scores, 300), (scores.reshape(1, -1), 753)):
        order = matrix.double().numpy().argsort(axis=1, kind="stable")[:, :count]
        expected = torch.ones(matrix.shape, dtype=torch.bool).scatter_(1, torch.from_numpy(order), False)
        with Waits() as waits:
            found = lowest_by_bisection(matrix, count)
        assert torch.equal(found, expected)
        assert not waits.operations


def test_minus_infinity_goes_first_and_infinity_last_in_a_large_layer():
    scores = torch.rand(80, 80)
    scores[5, 7:20] = -math.inf
    scores[9, :30] = math.inf
    scores[11] = -0.0
    scores[12] = 0.0
    for count in (13, 14, 100, 173, 174, 6370, 6371):
        mask = lowest_in_layer(scores, count)
        np.testing.assert_array_equal(mask.numpy(), naive.layer_mask(as_numpy(scores), count))


def test_masks_of_scores_that_are_not_contiguous():
    scores = torch.rand(40, 30).t()
    np.testing.assert_array_equal(lowest_in_layer(scores, 500).numpy(), naive.layer_mask(scores.double().numpy(), 500))
    np.testing.assert_array_equal(lowest_in_rows(scores, 305).numpy(), naive.row_mask(scores.double().numpy(), 305))


def test_scores_are_not_changed():
    scores = draw_scores((9, 600), torch.float32, 3, 0, special=True)
    before = scores.clone()
    lowest_in_layer(scores, 3000)
    lowest_in_rows(scores, 3001)
    nm_mask(scores, NM(2, 4))
    assert torch.equal(scores.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("select", [lowest_in_layer, lowest_in_rows])
@pytest.mark.parametrize("count", [-1, 25])
def test_impossible_counts_are_refused(select, count):
    with pytest.raises(ValueError, match=rf"cannot prune {count} of 24 weights"):
        select(torch.rand(4, 6), count)


def test_nm_refuses_inputs_that_do_not_divide():
    with pytest.raises(ValueError, match="6 inputs do not divide by M=4"):
        nm_mask(torch.rand(4, 6), NM(2, 4))


def test_nan_scores_are_refused_by_name():
    refuse_nan({})
    refuse_nan({"first": torch.tensor(False)})
    with pytest.raises(ValueError, match=r"'layer\.weight' hold NaN"):
        refuse_nan({"first": torch.tensor(False), "layer.weight": torch.tensor(True)})


@pytest.mark.parametrize(("text", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("16:64", 16, 64)])
def test_parse_pattern(text, n, m):
    pattern = parse_pattern(text)
    assert pattern == NM(n, m)
    assert str(pattern) == text
    assert pattern.sparsity == 1 - n / m


def test_unstructured_is_no_pattern():
    assert parse_pattern("unstructured") is None


@pytest.mark.parametrize(
    "bad", ["4:2", "4:4", "0:4", "2-4", "2:4:8", " 2:4", "2:4\n", "-1:4", "Unstructured", "", None, 0.5]
)
def test_bad_patterns_are_refused_with_their_value(bad):
    with pytest.raises(ValueError, match=r"is neither 'unstructured' nor 'N:M'") as caught:
        parse_pattern(bad)
    assert repr(bad) in str(caught.value)
