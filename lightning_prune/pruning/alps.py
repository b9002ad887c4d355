"""ALPS: choose which weights of a layer to keep with the correlations of its inputs.

Alternates between weights that change the layer's outputs least and the nearest ones with enough zeros, until the set
of kept weights stands (ADMM; Meng et al. 2024, arXiv 2406.07831, algorithm 1). Published ALPS keeps the largest weights
of normalized inputs, which are those with the largest Wanda scores; here any score that is ``abs(W)`` times a factor
says which are the largest. With the factors of kfac, output rows that matter more to the loss keep more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.exact import normalized
from lightning_prune.pruning.hessian import DAMPING
from lightning_prune.pruning.precision import full_precision

RHO, EVERY, ITERATIONS = 0.1, 3, 300
# By how much the penalty grows if at least this share of the kept weights has changed.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


@full_precision()
def alps_support(
    weight: Tensor,
    hessian: Tensor,
    factors: Tensor,
    select: Callable[[Tensor], Tensor],
    rho: float = RHO,
    every: int = EVERY,
    iterations: int = ITERATIONS,
    *,
    damping: float = DAMPING,
    total: Callable[[Tensor], Tensor] = lambda count: count,
) -> Tensor:
    """The mask of a matrix.

    The host waits for the device once in `every` iterations: queueing more of them before it knows whether the support
    stands would cost more than the wait.

    Args:
        weight: ``[O, I]``, the dense weight, any float dtype; not changed.
        hessian: ``X^T X`` of the layer's inputs, ``[I, I]``, up to a factor; not changed. Its dtype is computed in.
        factors: Importance of a weight of one, ``[O, I]`` or what broadcasts to it: a weight is worth its absolute
            value times this.
        select: Scores ``[O, I]`` to the mask, True = kept; as many at every call.
        rho: Penalty at the start, on the scale of inputs with norm 1; it grows by 10 to 30 % at each look.
        every: Iterations between two looks at how many weights have entered or left the support.
        iterations: At most. It ends at the first look that finds no change, usually after 30 to 40.
        damping: Share of the mean diagonal (of inputs that were not always zero) that is added to it.
        total: Sums a count over the ranks that hold the other rows, if `weight` is some rows of a matrix.

    Returns:
        Bool ``[O, I]``, True = kept.

    Raises:
        CalibrationError: the Hessian is not finite.
    """
    dead = hessian.diagonal() == 0
    dead = dead & ~dead.all()  # if all are (an expert that sees no token), the weights alone decide
    hessian, norms = normalized(hessian, damping)
    dense = (weight.to(hessian.dtype) * norms).masked_fill_(dead, 0.0)  # inputs that were always zero go first
    factors = factors / norms
    fixed = dense @ hessian
    inverse, definite = _inverse(hessian, rho)
    # Where kept, the sparse weight D; where pruned, the scaled multiplier V / rho. One of the two is always zero.
    state, mask = dense, torch.ones_like(dense, dtype=torch.bool)
    seen = mask
    for iteration in range(1, iterations + 1):
        fitted = torch.where(mask, state, -state).mul_(rho).add_(fixed) @ inverse
        state = fitted.add_(state.masked_fill(mask, 0.0))
        mask = select((state * factors).abs_())
        if iteration % every:
            continue
        changed, kept = total(torch.stack([(mask != seen).sum(), mask.sum()])).tolist()
        if changed == 0:
            break
        growth = next(by for share, by in _GROWTH if changed >= share * kept)
        rho *= growth
        state = torch.where(mask, state, state / growth)  # the multiplier V stays
        inverse, _ = _inverse(hessian, rho, definite)
        seen = mask
    return mask


def _inverse(hessian: Tensor, rho: float, definite: bool = False) -> tuple[Tensor, bool]:
    """``(H + rho)^-1``, and whether that is definite; if not, the inverse is of rho grown tenfold until it is.

    If it is known to be `definite`, since it was with a smaller rho, the device is not asked.
    """
    for growth in range(10):
        shifted = hessian.clone()
        shifted.diagonal().add_(rho)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if definite or not int(failed):
            return torch.cholesky_inverse(lower), not growth
        rho *= 10
    raise CalibrationError("the layer's Hessian X^T X is not finite; check the calibration data")
