"""Masks from scores: exact counts and the order of a stable sort, whatever the dtype, the ties and the sizes."""

import itertools
import math

import naive
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.pruning.patterns import (
    NM,
    check_scores,
    kth_smallest,
    lowest_in_layer,
    lowest_in_rows,
    nm_mask,
    parse_pattern,
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


@quick
@given(
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(-100, 100)), min_size=1, max_size=60),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 60), max_size=3),
    st.data(),
)
def test_kth_smallest_of_several_tensors(values, dtype, cuts, data):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    edges = [0, *sorted(min(c, len(values)) for c in cuts), len(values)]
    parts = [tensor[a:b] for a, b in itertools.pairwise(edges)]  # some are empty
    k = data.draw(st.integers(1, len(values)))
    found = kth_smallest(lambda: iter(parts), k)
    assert found.dtype == dtype
    assert found.shape == ()
    assert float(found) == np.sort(as_numpy(tensor))[k - 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_kth_smallest_at_every_rank_of_neighbouring_bit_patterns(dtype):
    # Numbers that share their first 16 bits, and numbers either side of zero.
    near = torch.tensor([1.0], dtype=dtype).view({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    values = torch.cat([(near + i) for i in range(6)]).view(dtype)
    values = torch.cat([values, -values, torch.zeros(2, dtype=dtype), -torch.zeros(2, dtype=dtype)])
    expected = np.sort(as_numpy(values))
    for k in range(1, len(values) + 1):
        assert float(kth_smallest(lambda: [values[::2], values[1::2].reshape(-1, 1)], k)) == expected[k - 1]


def test_kth_smallest_sums_histograms_over_ranks():
    mine, theirs = torch.randn(500), torch.randn(300)
    parts = [lambda: [mine], lambda: [theirs]]
    # The histograms of both ranks, as an all-reduce would add them: recorded from a run over each part's passes.
    everything = torch.cat([mine, theirs]).sort().values

    def together(k):
        calls = []

        def reduce(counts):
            calls.append(counts)
            return counts + other[len(calls) - 1]

        other = []
        kth_smallest(lambda: [mine, theirs], k, reduce=lambda c: other.append(c) or c)
        other = [c - own for c, own in zip(other, own_histograms(parts[0], k), strict=True)]
        return kth_smallest(parts[0], k, reduce=reduce)

    def own_histograms(part, k):
        full, own = [], []
        kth_smallest(lambda: [mine, theirs], k, reduce=lambda c: full.append(c) or c)
        kth_smallest(part, k, reduce=lambda c: own.append(c) or full[len(own) - 1])
        return own

    for k in (1, 17, 400, 800):
        assert float(together(k)) == float(everything[k - 1])


@pytest.mark.parametrize("k", [0, -3, 11])
def test_kth_smallest_refuses_a_rank_that_does_not_exist(k):
    with pytest.raises(ValueError, match=rf"k={k} is not in 1\.\.10"):
        kth_smallest(lambda: [torch.rand(4), torch.rand(6)], k)


def test_nan_scores_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'layer\.weight' hold NaN"):
        check_scores(torch.tensor([1.0, math.nan]), "layer.weight")
    scores = torch.tensor([1.0, math.inf])
    assert check_scores(scores, "layer.weight") is scores


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
