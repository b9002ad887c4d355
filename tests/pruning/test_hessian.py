"""The Hessian solver against the paper's column loop in float64, without lazy batching."""

import math

import naive
import numpy as np
import pytest
import torch
from layer_problem import problem

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.hessian import inverse_factor, prune_with_hessian
from lightning_prune.pruning.patterns import NM


def error(x, weight, new):
    return float((x @ (weight - new).t()).square().sum())


@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_inverse_factor(damping):
    _, _, hessian = problem(2, 20)
    before = hessian.clone()
    upper = inverse_factor(hessian, damping)
    assert torch.equal(hessian, before)
    assert torch.equal(upper, upper.triu())
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(20, dtype=torch.float64), atol=1e-9, rtol=0)


def test_inputs_that_are_always_zero_get_a_unit_diagonal():
    _, _, hessian = problem(2, 12, dead=(3, 11))
    upper = inverse_factor(hessian)
    filled = hessian.clone()
    filled[3, 3] = filled[11, 11] = 1.0
    damped = filled + 0.01 * filled.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(12, dtype=torch.float64), atol=1e-9, rtol=0)


def test_fewer_tokens_than_inputs_need_the_damping():
    weight, _, hessian = problem(4, 60, tokens=5)
    new, kept = prune_with_hessian(weight, hessian, count=120)
    assert torch.isfinite(new).all()
    assert int((~kept).sum()) == 120


def test_damping_grows_before_giving_up():
    _, _, hessian = problem(2, 10)
    low = torch.linalg.eigvalsh(hessian)[0]
    # Slightly indefinite: 1 % of the mean diagonal is not enough, 10 % is.
    shifted = hessian - (low + 0.05 * hessian.diagonal().mean()) * torch.eye(10, dtype=torch.float64)
    assert torch.isfinite(inverse_factor(shifted)).all()
    with pytest.raises(CalibrationError, match="not positive definite even when damped"):
        inverse_factor(-torch.eye(4))
    with pytest.raises(CalibrationError, match="not positive definite even when damped"):
        inverse_factor(torch.full((3, 3), math.nan))


@pytest.mark.parametrize(
    ("shape", "sparsity"),
    [((8, 40), 0.5), ((4, 160), 0.25), ((16, 128), 0.75), ((4, 260), 0.5), ((4, 16), 0.0), ((2, 16), 1.0)],
)
@pytest.mark.parametrize("dead", [(), (0, 7, 9)])
def test_sparsegpt_unstructured(shape, sparsity, dead):
    weight, _, hessian = problem(*shape, dead=dead)
    before = weight.clone(), hessian.clone()
    new, kept = prune_with_hessian(weight, hessian, count=int(sparsity * weight.numel()))
    expected, mask = naive.sparsegpt(with_dead_first(weight, dead), hessian.numpy(), sparsity=sparsity)
    alive = [j for j in range(shape[1]) if j not in dead]
    np.testing.assert_array_equal(kept.numpy()[:, alive], mask[:, alive])
    np.testing.assert_allclose(new.numpy()[:, alive], expected[:, alive], rtol=1e-7, atol=1e-9)
    assert (new[~kept].view(torch.int64) == 0).all()
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def with_dead_first(weight, dead):
    """The reference sets the weights of inputs that are always zero to zero, so that they are selected first."""
    weight = weight.numpy().copy()
    weight[:, list(dead)] = 0.0
    return weight


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8), (3, 5), (7, 30)])
@pytest.mark.parametrize("inputs", [120, 240])
def test_sparsegpt_with_a_pattern(nm, inputs):
    weight, _, hessian = problem(5, inputs)
    new, kept = prune_with_hessian(weight, hessian, pattern=NM(*nm))
    expected, mask = naive.sparsegpt(weight.numpy(), hessian.numpy(), nm=nm)
    np.testing.assert_array_equal(kept.numpy(), mask)
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert (kept.view(5, -1, nm[1]).sum(-1) == nm[0]).all()


@pytest.mark.parametrize("inputs", [30, 150, 300])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_update_on_a_given_mask(inputs, density):
    weight, x, hessian = problem(6, inputs)
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < density
    mask[0], mask[1] = True, False  # a row that keeps all, and one that loses all
    before = mask.clone()
    new, kept = prune_with_hessian(weight, hessian, mask=mask)
    expected, _ = naive.sparsegpt(weight.numpy(), hessian.numpy(), mask=mask.numpy())
    assert torch.equal(kept, mask)
    assert torch.equal(mask, before)
    np.testing.assert_allclose(new.numpy(), expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(new[0], weight[0])
    assert (new[~mask].view(torch.int64) == 0).all()
    # No better than the optimum in any row, and in all better than leaving the rest alone (damped errors).
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    updated = masked = 0.0
    for row in range(2, 6):
        q = mask[row]
        best = weight[row].clone()
        best[~q] = 0.0
        best[q] += torch.linalg.solve(damped[q][:, q], damped[q][:, ~q] @ weight[row, ~q])
        differences = weight[row] - best, weight[row] - new[row], weight[row] * ~q
        errors = [float(d @ damped @ d) for d in differences]
        assert errors[0] <= errors[1] * (1 + 1e-9)
        updated, masked = updated + errors[1], masked + errors[2]
    assert updated < masked
    assert error(x, weight, new) < error(x, weight, weight * mask)


def test_the_scale_of_the_hessian_does_not_matter():
    weight, _, hessian = problem(4, 32)
    first = prune_with_hessian(weight, hessian, count=64)
    second = prune_with_hessian(weight, hessian * 1000, count=64)
    torch.testing.assert_close(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_other_precisions_are_solved_in_the_hessians(dtype):
    weight, _, hessian = problem(4, 40)
    weight = weight.to(dtype)
    new, kept = prune_with_hessian(weight, hessian.float(), count=80)
    assert new.dtype == torch.float32
    assert kept.dtype == torch.bool
    expected, mask = naive.sparsegpt(weight.double().numpy(), hessian.numpy(), sparsity=0.5)
    np.testing.assert_array_equal(kept.numpy(), mask)
    np.testing.assert_allclose(new.double().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 7, 333, 799, 800])
def test_selected_counts_are_exact(count):
    weight, _, hessian = problem(5, 160)
    _, kept = prune_with_hessian(weight, hessian, count=count)
    assert int((~kept).sum()) == count
    first = int((~kept[:, :128]).sum())
    assert abs(first - count * 128 / 160) < 1
