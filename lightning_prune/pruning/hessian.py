"""The Hessian solver: select weights and update the rest so that a layer's outputs change least.

Minimizes ``||X W^T - X W'^T||^2`` column by column (Optimal Brain Surgeon, Hassibi & Stork 1993; in this form
SparseGPT, Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1). It serves SparseGPT, which selects as it goes, and
the weight update on a mask that any other score has chosen.

Dimensions: O outputs, I inputs, C columns of one block. The weight is worked on transposed, ``[I, O]``, so that each
column of W is contiguous.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.patterns import NM, lowest_in_layer, nm_mask
from lightning_prune.pruning.precision import full_precision

DAMPING = 0.01
_INDEFINITE = "the layer's Hessian X^T X is not positive definite even when damped; use more calibration samples"
BLOCK = 128


@full_precision()
def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper triangular U with ``U^T U = (H + damping * mean(diag H) * 1)^-1``.

    Inputs that were always zero get a unit diagonal. If the matrix is not positive definite to working precision,
    damping grows tenfold, three times at most.

    Args:
        hessian: ``X^T X``, ``[I, I]``, symmetric; not changed.
        damping: Share of the mean diagonal; 0.01 in the reference.

    Returns:
        ``[I, I]``, float32 (or float64, as given).

    Raises:
        CalibrationError: the matrix stays indefinite.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    for _ in range(4):
        damped = hessian.clone()
        damped.diagonal().add_(diagonal.mean(), alpha=damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            factor: Tensor
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(factor).all()):
                return factor
        damping *= 10
    raise CalibrationError(_INDEFINITE)


@full_precision()
def prune_with_hessian(
    weight: Tensor,
    hessian: Tensor,
    *,
    mask: Tensor | None = None,
    count: int = 0,
    pattern: NM | None = None,
    damping: float = DAMPING,
    select: Callable[[Tensor, int], Tensor] = lowest_in_layer,
) -> tuple[Tensor, Tensor]:
    """Prune a matrix and update what remains.

    Args:
        weight: ``[O, I]``; not changed.
        hessian: ``X^T X`` of the layer's inputs, ``[I, I]``, up to a factor.
        mask: Bool ``[O, I]``, True = kept: update on this mask. Default: select as SparseGPT does.
        count: Weights to prune when selecting; spread evenly over blocks of 128 columns.
        pattern: Select N of every M inputs instead.
        damping: See `inverse_factor`.
        select: Scores ``[O, C]`` of a block and a count to its mask. Rows are independent but for this choice, so
            `weight` may be some rows of a matrix if `select` compares with the others.

    Returns:
        The new weight (exact zeros where pruned) and its mask, ``[O, I]`` each, weight in the Hessian's dtype.

    Raises:
        CalibrationError: see `inverse_factor`.
    """
    inputs = weight.shape[1]
    dead = hessian.diagonal() == 0
    upper = inverse_factor(hessian, damping)
    columns = weight.t().to(upper.dtype, copy=True).contiguous()  # [I, O]
    kept = torch.empty_like(columns, dtype=torch.bool) if mask is None else mask.t().contiguous()
    size = BLOCK if pattern is None else max(BLOCK // pattern.m, 1) * pattern.m
    for start in range(0, inputs, size):
        stop = min(start + size, inputs)
        block, factor = columns[start:stop], upper[start:stop, start:stop]  # [C, O], [C, C]
        diagonal = factor.diagonal()
        if mask is None and pattern is None:
            scores = _losses(block, diagonal, dead[start:stop])
            # Whole blocks add up to `count` exactly, whatever its remainder.
            share = count * stop // inputs - count * start // inputs
            kept[start:stop] = select(scores.t(), share).t()
        errors = torch.empty_like(block)
        for i in range(stop - start):
            if mask is None and pattern is not None and i % pattern.m == 0:
                group = slice(i, i + pattern.m)
                scores = _losses(block[group], diagonal[group], dead[start:stop][group])  # [M, O]
                kept[start + i : start + i + pattern.m] = nm_mask(scores.t().contiguous(), pattern).t()
            error = block[i].masked_fill(kept[start + i], 0.0).div_(diagonal[i])  # [O]
            errors[i] = error
            block[i + 1 :].addr_(factor[i, i + 1 :], error, alpha=-1)
        columns[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    columns.masked_fill_(~kept, 0.0)
    return columns.t(), kept.t()


def _losses(columns: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """What removing each weight ``[C, O]`` costs; below all others, by size, those of inputs that were always zero."""
    scores = columns.square() / diagonal.square()[:, None]
    return torch.where(dead[:, None], -1 / (columns.abs() + 1e-30), scores)


@full_precision()
def compensated(weight: Tensor, hessian: Tensor, lost: Tensor, damping: float = DAMPING) -> Tensor:
    """A weight that does without some of its inputs.

    Args:
        weight: ``[O, I]``; not changed.
        hessian: ``X^T X`` of the layer's inputs, ``[I, I]``, up to a factor; not changed. Solved in float64 (float32
            on MPS).
        lost: Indices of inputs that go, or are gone already.
        damping: Share of the mean diagonal (of inputs that were not always zero) that is added to it; grows tenfold,
            three times at most, if the matrix is not positive definite to working precision.

    Returns:
        ``[O, I]`` in the weight's dtype, zero in the lost columns.

    Raises:
        CalibrationError: the matrix stays indefinite, or the result is not finite.
    """
    stays = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
    stays[lost.to(hessian.device)] = False
    kept, lost = stays.nonzero().flatten(), (~stays).nonzero().flatten()
    diagonal, scale = _diagonal(hessian)
    dtype = diagonal.dtype
    qq = hessian[kept][:, kept].to(dtype)  # [q, q]
    qp = hessian[kept][:, lost].to(dtype)  # [q, p]
    for attempt in range(4):
        qq.diagonal().copy_(diagonal[kept] + damping * 10**attempt * scale)
        factor, failed = torch.linalg.cholesky_ex(qq)
        if not int(failed):
            fit = torch.cholesky_solve(qp, factor)  # [q, p]: lost inputs as sums of kept ones
            wide = weight.to(device=hessian.device, dtype=dtype)
            result = torch.zeros_like(wide)
            result[:, kept] = wide[:, kept] + wide[:, lost] @ fit.t()
            result = result.to(weight)
            if bool(torch.isfinite(result).all()):
                return result
    raise CalibrationError(_INDEFINITE)


def _diagonal(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The diagonal in float64 (float32 on MPS), with its mean in place of zeros, and that mean, which leaves them out.

    Zeros are inputs that were always zero, such as units that are masked already.
    """
    diagonal = hessian.diagonal().to(torch.float32 if hessian.device.type == "mps" else torch.float64).clone()
    alive = diagonal != 0
    scale = diagonal[alive].mean() if bool(alive.any()) else torch.ones_like(diagonal[0])
    return torch.where(alive, diagonal, scale), scale


@full_precision()
def unexplained(hessian: Tensor, groups: Tensor, damping: float = DAMPING) -> Tensor:
    """Of each group of inputs, the second moments that all other inputs cannot stand in for.

    With ``A`` this matrix of a group, a row of weights ``w`` on it changes the layer's output by ``w A w^T`` when the
    group goes and `compensated` has updated the others: the least that is possible (optimal brain surgeon, Hassibi &
    Stork 1992). It is the inverse of the group's block in the inverse Hessian.

    Args:
        hessian: ``X^T X``, ``[I, I]``, up to a factor; not changed.
        groups: Indices of inputs, ``[U, M]``.
        damping: See `compensated`.

    Returns:
        ``[U, M, M]``, up to the same factor, in float64 (float32 on MPS).

    Raises:
        CalibrationError: the matrix stays indefinite.
    """
    inverse, added = _inverse(hessian, damping)
    return _others_cannot(inverse, added, groups.to(hessian.device))


@full_precision()
def removal_costs(
    weight: Tensor, hessian: Tensor, groups: Tensor, importance: Tensor, damping: float = DAMPING, steps: int = 64
) -> Tensor:
    """Of each group of inputs, by how much the layer's output changes when it goes after the cheaper ones.

    The cheapest go, the other weights and the inverse Hessian are updated for it, and what is left is judged anew
    (structured optimal brain surgeon; ZipLM, Kurtic, Frantar & Alistarh 2023, arXiv 2302.04089, algorithm 1, which
    takes one group at a time). So of inputs that can stand in for each other one stays.

    Args:
        weight: ``[O, I]``; not changed.
        hessian: ``X^T X`` of the layer's inputs, ``[I, I]``, up to a factor; not changed. Computed in float64 (float32
            on MPS).
        groups: Indices of inputs, ``[U, M]``, each at most once.
        importance: Of an output's squared error, ``[O]``.
        damping: See `compensated`.
        steps: In how many parts the groups go.

    Returns:
        ``[U]``, up to the factor of the Hessian; none is less than that of a group that went before.

    Raises:
        CalibrationError: the matrix stays indefinite.
    """
    inverse, added = _inverse(hessian, damping)
    groups, rows = groups.to(hessian.device), weight.to(inverse) * importance.to(inverse).sqrt()[:, None]
    left = torch.arange(len(groups), device=groups.device)
    costs = inverse.new_zeros(len(groups))
    least = inverse.new_zeros(1)
    while len(left):
        theirs = rows[:, groups].permute(1, 0, 2)  # [U, O, M]
        found = ((theirs @ _others_cannot(inverse, added, groups)) * theirs).sum((1, 2))
        order = found.argsort(stable=True)[: -(-len(costs) // steps)]
        ascending = torch.cat([least, found[order]]).cummax(0).values
        costs[left[order]], least = ascending[1:], ascending[-1:]
        lost = groups[order].flatten()
        stays = torch.ones(len(inverse), dtype=torch.bool, device=lost.device)
        stays[lost] = False
        fit = torch.linalg.solve(inverse[lost][:, lost], inverse[lost][:, stays])
        rows = rows[:, stays] - rows[:, lost] @ fit
        inverse, added = inverse[stays][:, stays] - inverse[stays][:, lost] @ fit, added[stays]
        here = torch.ones_like(left, dtype=torch.bool)
        here[order] = False
        left, groups = left[here], (stays.cumsum(0) - 1)[groups[here]]
    return costs


def _inverse(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The inverse of the damped matrix, and what was added to its diagonal."""
    diagonal, scale = _diagonal(hessian)
    damped = hessian.to(diagonal.dtype, copy=True)
    for attempt in range(4):
        damped.diagonal().copy_(diagonal + damping * 10**attempt * scale)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_inverse(factor), damped.diagonal() - hessian.diagonal()
    raise CalibrationError(_INDEFINITE)


def _others_cannot(inverse: Tensor, added: Tensor, groups: Tensor) -> Tensor:
    """`unexplained`, from the inverse."""
    blocks: Tensor = torch.linalg.inv(inverse[groups[:, :, None], groups[:, None, :]])
    return blocks - torch.diag_embed(added[groups])
