"""The k-th smallest number, whatever the dtype, the ties and the tensors it is spread over."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.pruning import selection
from lightning_prune.pruning.selection import kth_smallest, threshold_of

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 5.9604644775390625e-08, -5.9604644775390625e-08, 65504.0]
quick = settings(max_examples=50, deadline=None)


def as_numpy(scores):
    """Exact for every dtype used here; -0.0 and 0.0 are equal, as in the order asked for."""
    return scores.double().numpy() + 0.0


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
def test_kth_smallest_at_every_rank_of_neighboring_bit_patterns(dtype):
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


def check(parts, k):
    """A threshold against a sort of all numbers, and its counts against numpy's."""
    found = threshold_of(lambda: iter(parts), k, sum(p.numel() for p in parts))
    arrays = [as_numpy(part) for part in parts]
    value = np.partition(np.concatenate([a.ravel() for a in arrays]), k - 1)[k - 1]
    assert found.value.dtype == parts[0].dtype
    assert float(found.value) == value
    assert found.below == [int((a < value).sum()) for a in arrays]
    assert found.equal == [int((a == value).sum()) for a in arrays]


@quick
@given(
    st.lists(st.one_of(st.sampled_from(SPECIAL), st.floats(-100, 100)), min_size=1, max_size=60),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 60), max_size=3),
    st.data(),
)
def test_thresholds_of_several_tensors(values, dtype, cuts, data):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    edges = [0, *sorted(min(c, len(values)) for c in cuts), len(values)]
    check([tensor[a:b] for a, b in itertools.pairwise(edges)], data.draw(st.integers(1, len(values))))


LARGE = {
    "continuous": lambda shape: torch.randn(shape).abs(),
    "signed": torch.randn,
    "few values": lambda shape: torch.randint(5, shape).float(),
    "half pruned before": lambda shape: torch.randn(shape).abs().masked_fill_(torch.rand(shape) < 0.5, -math.inf),
    "columns of other sizes": lambda shape: torch.randn(shape).abs() * 10 ** torch.linspace(-6, 6, shape[1]),
    "sorted": lambda shape: torch.arange(math.prod(shape)).view(shape).float(),
    "one value": lambda shape: torch.full(shape, 3.0),
    "bfloat16": lambda shape: torch.randn(shape).bfloat16(),
}


@pytest.mark.parametrize("kind", LARGE)
def test_thresholds_found_by_a_sample(kind):
    """More numbers than a sample holds, in matrices whose rows a step of a power of two would never leave."""
    torch.manual_seed(0)
    parts = [LARGE[kind](shape) for shape in ((256, 256), (64, 96), (3, 1), (512, 64))]
    total = sum(part.numel() for part in parts)
    assert total > 4 * selection._LEAST
    for k in (1, 2, total // 100, total // 2, total // 2 + 1, total - 7, total):
        check(parts, k)


def test_a_sample_that_is_not_like_the_whole_costs_time_alone(monkeypatch):
    """All the small numbers lie between the places that are looked at."""
    values = torch.rand(1 << 17) + 1.0
    step = selection._next_prime((1 << 17) // selection._LEAST)
    hidden = torch.ones(len(values), dtype=torch.bool)
    hidden[::step] = False
    values[hidden & (torch.rand(len(values)) < 0.5)] -= 1.0
    fell_back = []
    monkeypatch.setattr(selection, "kth_smallest", lambda *args: fell_back.append(1) or kth_smallest(*args))
    for k in (len(values) // 3, len(values) // 2):
        check([values], k)
    assert fell_back
