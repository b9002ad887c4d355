"""One layer to prune: a weight, inputs that are correlated, and what a change of the weight costs."""

from __future__ import annotations

from collections.abc import Sequence

import naive
import torch
from torch import Tensor


def problem(
    outputs: int, inputs: int, tokens: int | None = None, seed: int = 0, dead: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight ``[O, I]``, inputs ``[T, I]``, and their ``X^T X`` up to a factor, float64.

    Neighboring inputs are correlated; those in `dead` are always zero.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(tokens or 3 * inputs, inputs, generator=generator, dtype=torch.float64)
    x = x + 0.8 * x.roll(1, dims=1) + 0.5 * x[:, :1]
    x[:, list(dead)] = 0.0
    return weight, x, x.t() @ x / 7


def damped(hessian: Tensor) -> Tensor:
    """`naive.damped` of a tensor."""
    return torch.from_numpy(naive.damped(hessian.numpy()))


def cost(hessian: Tensor, difference: Tensor) -> float:
    """Squared change of the outputs, ``tr(D H D^T)``."""
    return float((difference @ hessian * difference).sum())
