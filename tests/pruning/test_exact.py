"""The exact weights of a mask against the normal equations of every row, solved one by one in float64."""

import naive
import pytest
import torch
from layer_problem import cost, damped, problem

from lightning_prune.pruning.exact import exact_weights
from lightning_prune.pruning.hessian import prune_with_hessian


def normal_equations(weight, hessian, mask):
    return torch.from_numpy(naive.exact(weight.numpy(), hessian.numpy(), mask.numpy()))


@pytest.mark.parametrize("dead", [(), (0, 7)])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_every_row_solves_its_normal_equations(density, dead):
    weight, _, hessian = problem(12, 40, dead=dead)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < density
    mask[0], mask[1] = True, False  # a row that keeps all, and one that loses all
    before = weight.clone(), hessian.clone(), mask.clone()
    new = exact_weights(weight, hessian, mask, iterations=60)
    torch.testing.assert_close(new, normal_equations(weight, damped(hessian), mask), rtol=1e-8, atol=1e-9)
    assert torch.equal(new[0], weight[0])
    assert (new[~mask].view(torch.int64) == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(before, (weight, hessian, mask), strict=True))
    # What a dead input is multiplied with is nobody's business.
    assert torch.equal(new[:, list(dead)], (weight * mask)[:, list(dead)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_iterations_in_float32_leave_a_hundredth_of_what_can_be_gained(dtype):
    weight, _, hessian = problem(16, 96)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    weight = weight.to(dtype)
    new = exact_weights(weight, hessian.float(), mask)
    assert new.dtype == torch.float32
    wide, full = weight.double(), damped(hessian)
    best, masked = cost(full, normal_equations(wide, full, mask) - wide), cost(full, wide * mask - wide)
    updated, _ = prune_with_hessian(wide, hessian, mask=mask)
    ours = cost(full, new.double() - wide)
    assert best < ours < best + 0.01 * (masked - best)
    assert ours < cost(full, updated - wide) < masked


@pytest.mark.parametrize("tokens", [1, 5])
def test_fewer_tokens_than_inputs(tokens):
    weight, x, hessian = problem(6, 50, tokens=tokens)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    new = exact_weights(weight, hessian, mask, damping=0.0, iterations=60)
    error = (x @ (new - weight).t()).square().sum()
    assert error < 1e-9 * (x @ (weight * mask - weight).t()).square().sum()  # the kept ones can make up for all


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_hessian_that_says_nothing_leaves_the_weights(sign):
    weight, _, hessian = problem(3, 10)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    assert torch.equal(exact_weights(weight, sign * hessian, mask, damping=0.0), weight * mask)


def test_an_indefinite_hessian_gives_finite_weights_no_worse_than_the_mask():
    weight, _, hessian = problem(8, 30)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    low = torch.linalg.eigvalsh(hessian)[0]
    shifted = hessian - (low + 0.05 * hessian.diagonal().mean()) * torch.eye(30, dtype=torch.float64)
    new = exact_weights(weight, shifted, mask)
    assert torch.isfinite(new).all()
    assert cost(shifted, new - weight) <= cost(shifted, weight * mask - weight)


def test_rows_and_the_scale_of_the_hessian_do_not_matter():
    weight, _, hessian = problem(8, 32)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(6)) < 0.5
    new = exact_weights(weight, hessian, mask)
    torch.testing.assert_close(exact_weights(weight, 1000 * hessian, mask), new)
    torch.testing.assert_close(exact_weights(weight[2:5], hessian, mask[2:5]), new[2:5])
