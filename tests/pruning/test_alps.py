"""The ADMM of ALPS against its formula, with an eigendecomposition and all its matrices written out, in float64."""

import math
from functools import partial

import naive
import numpy as np
import pytest
import torch
from layer_problem import cost, damped, problem

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.alps import alps_support
from lightning_prune.pruning.exact import exact_weights
from lightning_prune.pruning.patterns import NM, lowest_in_layer, lowest_in_rows, nm_mask


def by_the_formula(weight, hessian, factors, select, **settings):
    return naive.alps(weight.numpy(), damped(hessian).numpy(), factors.numpy(), select, **settings)


SELECTIONS = {
    "layer": (partial(lowest_in_layer, count=300), partial(naive.layer_mask, count=300)),
    "row": (partial(lowest_in_rows, count=301), partial(naive.row_mask, count=301)),
    "2:4": (partial(nm_mask, pattern=NM(2, 4)), partial(naive.nm_mask, n=2, m=4)),
    "4:8": (partial(nm_mask, pattern=NM(4, 8)), partial(naive.nm_mask, n=4, m=8)),
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("rows", ["alike", "weighted"])
def test_the_formula(selection, rows):
    weight, _, hessian = problem(12, 48)
    gradients = torch.ones(12, 1) if rows == "alike" else torch.rand(12, 1, generator=torch.Generator().manual_seed(1))
    factors = gradients.double() * damped(hessian).diagonal().sqrt()
    ours, theirs = SELECTIONS[selection]
    before = weight.clone(), hessian.clone(), factors.clone()
    mask = alps_support(weight, hessian, factors, ours)
    expected, iterations = by_the_formula(weight, hessian, factors, theirs)
    assert 6 < iterations < 100
    np.testing.assert_array_equal(mask.numpy(), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, factors), strict=True))
    assert torch.equal(mask, alps_support(weight, hessian, factors, ours))
    # float32 decides otherwise between weights that are worth the same, and only there.
    single = alps_support(weight.float(), hessian.float(), factors.float(), ours)
    assert (single != mask).sum() <= 4


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_better_support_than_the_largest_scores(selection):
    weight, _, hessian = problem(32, 96)
    full = damped(hessian)
    norms = full.diagonal().sqrt()
    select = SELECTIONS[selection][0]
    if "count" in select.keywords:
        select = partial(select.func, count=1536)
    errors = {}
    for name, mask in {
        "wanda": select(weight.abs() * norms),
        "alps": alps_support(weight, hessian, norms, select),
    }.items():
        new = exact_weights(weight, hessian, mask)
        errors[name] = cost(full, new - weight)
        assert errors[name] < cost(full, weight * mask - weight)
    assert errors["alps"] < 0.9 * errors["wanda"]


def test_the_penalty_and_the_number_of_iterations_are_settings():
    weight, _, hessian = problem(12, 48)
    factors, (ours, theirs) = damped(hessian).diagonal().sqrt(), SELECTIONS["layer"]
    for rho, most in ((0.5, 300), (0.1, 5)):
        mask = alps_support(weight, hessian, factors, ours, rho=rho, iterations=most)
        np.testing.assert_array_equal(
            mask.numpy(), by_the_formula(weight, hessian, factors, theirs, rho=rho, most=most)[0]
        )


def test_inputs_that_are_always_zero_go_first():
    weight, _, hessian = problem(6, 24, dead=(3, 8))
    mask = alps_support(weight, hessian, damped(hessian).diagonal().sqrt(), partial(lowest_in_layer, count=72))
    assert not mask[:, [3, 8]].any()
    assert int(mask.sum()) == 72


def test_without_any_input_the_largest_weights_stay():
    weight, _, hessian = problem(6, 24)
    mask = alps_support(weight, 0 * hessian, torch.ones(24, dtype=torch.float64), partial(lowest_in_layer, count=72))
    best = lowest_in_layer(weight.abs(), 72)
    assert (weight * mask).square().sum() > 0.999 * (weight * best).square().sum()


@pytest.mark.parametrize("count", [0, 1, 143, 144])
def test_counts_at_the_ends(count):
    weight, _, hessian = problem(6, 24)
    mask = alps_support(weight, hessian, torch.ones(1, dtype=torch.float64), partial(lowest_in_layer, count=count))
    assert int((~mask).sum()) == count


def test_hessians_that_are_singular_indefinite_or_not_finite():
    weight, _, hessian = problem(6, 24)
    select, ones = partial(lowest_in_layer, count=72), torch.ones(1, dtype=torch.float64)
    for bad in (torch.zeros_like(hessian), problem(6, 24, tokens=3)[2], hessian - 3 * hessian.diagonal().diag()):
        assert int(alps_support(weight, bad, ones, select).sum()) == 72
    with pytest.raises(CalibrationError, match="not finite"):
        alps_support(weight, torch.full_like(hessian, math.nan), ones, select)


def test_rows_that_live_elsewhere_count_towards_the_changes():
    """Half the rows, with the selection and the sums of the whole, get the mask of the whole."""
    weight, _, hessian = problem(12, 48)
    factors = damped(hessian).diagonal().sqrt()
    whole, totals = [], []

    def select(scores):
        whole.append(lowest_in_rows(scores, 12 * 24))
        return whole[-1]

    def total(counts):
        totals.append(counts)
        return counts

    expected = alps_support(weight, hessian, factors, select, total=total)
    looks = iter(totals)
    half = alps_support(weight[:6], hessian, factors, lambda s: lowest_in_rows(s, 6 * 24), total=lambda _: next(looks))
    assert torch.equal(half, expected[:6])
