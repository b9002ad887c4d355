"""The exact remaining weights of a fixed mask: what changes a layer's outputs least.

Minimizes ``tr((W - W_dense) H (W - W_dense)^T)`` over all W that are zero where the mask is, row by row a least-squares
problem of its own, by conjugate gradients with the diagonal of H as preconditioner (ALPS, Meng et al. 2024,
arXiv 2406.07831, section 3.3; the optimum is that of OPTIMA's quadratic programs, arXiv 2512.13886).

All rows run at once, each with its own step, and nothing is factorized: a singular or badly conditioned H is no error,
and rows may be some of a matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.pruning.hessian import DAMPING
from lightning_prune.pruning.precision import full_precision

ITERATIONS = 10


def damped_diagonal(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """The diagonal of H plus `damping` times its mean over inputs that were not always zero, ``[I]``, all above zero.

    Args:
        hessian: ``X^T X``, ``[I, I]``, up to a factor.
        damping: Share of the mean.
    """
    diagonal = hessian.diagonal()
    alive = (diagonal > 0).sum().clamp(min=1)
    damped = diagonal.clamp(min=0) + damping * diagonal.clamp(min=0).sum() / alive
    return torch.where(damped > 0, damped, 1.0)


def normalized(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """H damped and with a diagonal of ones, ``E H E``, and ``E^-1``: the norms of the inputs, ``[I]``.

    Weights times these norms are weights of inputs that all have norm 1.
    """
    diagonal = damped_diagonal(hessian, damping)
    norms = diagonal.sqrt()
    result = hessian / norms / norms[:, None]
    result.diagonal().copy_(diagonal / norms.square())
    return result, norms


@full_precision()
def exact_weights(
    weight: Tensor, hessian: Tensor, mask: Tensor, *, damping: float = DAMPING, iterations: int = ITERATIONS
) -> Tensor:
    """Fit the remaining weights of a matrix.

    Nothing waits for the device: the number of iterations is fixed, and a row that is solved makes no more steps.

    Args:
        weight: ``[O, I]``, the dense weight, any float dtype; not changed.
        hessian: ``X^T X`` of the layer's inputs, ``[I, I]``, up to a factor; not changed. Its dtype is computed in.
        mask: Bool ``[O, I]``, True = kept.
        damping: Share of the mean diagonal (of inputs that were not always zero) that is added to it.
        iterations: Of conjugate gradients.

    Returns:
        ``[O, I]`` in the Hessian's dtype, zero where pruned. A row that keeps all its weights keeps their values.
    """
    dense = weight.to(hessian.dtype)
    hessian, norms = normalized(hessian, damping)
    keep = mask.to(dense.dtype)
    step = torch.zeros_like(dense)  # from the dense weight times the mask, in normalized inputs
    residual = (dense * norms * (1 - keep) @ hessian).mul_(keep)
    direction = residual.clone()
    squares = residual.square().sum(1, keepdim=True)  # [O, 1]
    for _ in range(iterations):
        product = (direction @ hessian).mul_(keep)
        curvature = (direction * product).sum(1, keepdim=True)
        # No step where there is nothing left to do, nor along a direction in which H is not positive.
        length = torch.where(curvature > 0, squares / curvature, 0.0)
        step.addcmul_(length, direction)
        residual.addcmul_(length, product, value=-1)
        before, squares = squares, residual.square().sum(1, keepdim=True)
        direction.mul_(torch.where(before > 0, squares / before, 0.0)).add_(residual)
    return (dense + step / norms).masked_fill_(~mask, 0.0)
