"""Scores: what a weight is worth. Pure functions of a weight matrix and its layer's statistics; larger = keep.

A score is any object with the attributes of `Score`; the classes here are the built-in ones. Shapes: weights and
scores ``[O, I]``, ``input_norm [I]``, ``output_grad_norm [O]``, gradient aggregates ``[O, I]``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_prune.pruning.statistics import (
    GRADIENT_L1,
    GRADIENT_L2,
    HESSIAN,
    INPUT_NORM,
    OUTPUT_GRAD_NORM,
    LayerStatistics,
)

GROUPS = ("row", "layer", "global")
# Weights that no sample gives a gradient rank below all others, by what else is known of them, not by position. The
# number is lost in rounding beside any gradient.
_TIE = 1e-25


@runtime_checkable
class Score(Protocol):
    """What `prune` needs of a score.

    Attributes:
        name: Shown in messages and saved with the masks.
        statistics: Names out of `lightning_prune.pruning.statistics.ALL_STATISTICS` that the score reads.
        group: Weights are compared within ``"row"``, ``"layer"`` or ``"global"``, unless the user says otherwise.
        allocation: Layer sparsities: ``"uniform"``, ``"owl"`` or ``"kfac"``, unless the user says otherwise.

    A score may also have ``elementwise = True``: each number depends only on its own weight, row and column, so that a
    rank can score its part of a sharded weight alone. Without it, a sharded weight and its statistics are gathered,
    one layer at a time.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def statistics(self) -> frozenset[str]: ...  # noqa: D102

    @property
    def group(self) -> str: ...  # noqa: D102

    @property
    def allocation(self) -> str: ...  # noqa: D102

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]`` of the `weight` ``[O, I]`` of the parameter `name`, float32, or float64 if it is so."""
        ...


class _BuiltIn:
    """Defaults of the built-in scores."""

    name: ClassVar[str]
    statistics: ClassVar[frozenset[str]] = frozenset()
    group: ClassVar[str] = "row"
    allocation: ClassVar[str] = "uniform"
    elementwise: ClassVar[bool] = True


class Magnitude(_BuiltIn):
    """``abs(W)``, within a layer (Han et al. 2015, arXiv 1506.02626)."""

    name = "magnitude"
    group = "layer"

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        return weight.abs()


@dataclass(frozen=True)
class Random(_BuiltIn):
    """Uniform random scores, within a layer: the floor every method is measured from.

    Args:
        seed: Each parameter draws from its own generator, seeded by this and its name: the same on every rank.
    """

    name = "random"
    group = "layer"
    elementwise = False
    seed: int = 0

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)


class Wanda(_BuiltIn):
    """``abs(W_ij) * norm2(X_j)``, within an output row (Sun et al. 2023, arXiv 2306.11695, sec. 3)."""

    name = "wanda"
    statistics = frozenset({INPUT_NORM})

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        return weight.abs() * statistics.get(INPUT_NORM)


@dataclass(frozen=True)
class Gradient(_BuiltIn):
    """``abs(W) * Gbar``, within an output row (Das et al. 2023, arXiv 2311.04902, sec. 4).

    Args:
        grad_norm: ``"l1"`` or ``"l2"`` over the samples' gradients.
    """

    name = "gradient"
    grad_norm: str = "l2"

    @property
    def statistics(self) -> frozenset[str]:  # type: ignore[override]
        """The gradient aggregate of the chosen norm."""
        return frozenset({_aggregate(self.grad_norm)})

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        gradient = statistics.get(_aggregate(self.grad_norm)).to(weight)
        return weight.abs().mul_(gradient).add_(weight.abs(), alpha=_TIE)


@dataclass(frozen=True)
class GBLM(_BuiltIn):
    """``abs(W_ij) * (norm2(X_j) + alpha * Gbar_ij)``, within an output row (Das et al. 2023, arXiv 2311.04902, eq. 4).

    Args:
        alpha: Weight of the gradient term; 100 in the paper. It does not carry over between models: gradients
            shrink with a model's size and, for l1, the aggregate grows with the number of samples.
        grad_norm: ``"l1"`` or ``"l2"`` over the samples' gradients.
    """

    name = "gblm"
    alpha: float = 100.0
    grad_norm: str = "l2"

    @property
    def statistics(self) -> frozenset[str]:  # type: ignore[override]
        """Input norms and the gradient aggregate of the chosen norm."""
        return frozenset({INPUT_NORM, _aggregate(self.grad_norm)})

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        gradient = statistics.get(_aggregate(self.grad_norm)).to(weight)
        return torch.add(statistics.get(INPUT_NORM), gradient, alpha=self.alpha).mul_(weight.abs())


@dataclass(frozen=True)
class KFAC(_BuiltIn):
    """``abs(W_ij) * norm2(X_j) * norm2(delta_i)^gamma``, within a layer, with the layer sparsities of ``"kfac"``.

    The square of the score at gamma = 1 is the loss increase of removing a weight under the diagonal of the
    Kronecker-factored Fisher, ``1/2 W_ij^2 E[x_j^2] E[delta_i^2]`` (factors: Martens & Grosse 2015,
    arXiv 1503.05671). It needs O + I numbers a layer and no weight gradient. Under an N:M pattern the row factor
    cancels, so the mask is that of Wanda.

    Args:
        gamma: Power of the output-gradient norm; 0 is Wanda's score compared within the layer.
    """

    name = "kfac"
    statistics = frozenset({INPUT_NORM, OUTPUT_GRAD_NORM})
    group = "layer"
    allocation = "kfac"
    gamma: float = 0.7

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        return kfac_score(weight, statistics, self.gamma)


def kfac_score(weight: Tensor, statistics: LayerStatistics, gamma: float) -> Tensor:
    """Scores ``[O, I]`` of `KFAC`; the norms are scaled to mean 1 over all layers only by the caller, if at all."""
    rows = statistics.get(OUTPUT_GRAD_NORM).pow(gamma) + _TIE  # [O]
    return (weight.abs() * statistics.get(INPUT_NORM)).mul_(rows[:, None])


class SparseGPT(_BuiltIn):
    """``W_ij^2 / diag(H^-1)_j`` within 128 columns of a layer, with the remaining weights updated.

    Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1. Selection and update are one process
    (`lightning_prune.pruning.hessian.prune_with_hessian`), so this object carries only what it needs.
    """

    name = "sparsegpt"
    statistics = frozenset({HESSIAN})
    group = "layer"

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Not used: SparseGPT scores weights while it updates them."""
        raise NotImplementedError("SparseGPT selects weights inside its solver, lightning_prune.pruning.hessian")


class Keep(_BuiltIn):
    """The mask of the weights that are not zero already: trains a model sparse that was pruned elsewhere."""

    name = "keep"

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``: 1 where the weight is not zero."""
        return (weight != 0).to(weight.dtype)


def _aggregate(grad_norm: str) -> str:
    return {"l1": GRADIENT_L1, "l2": GRADIENT_L2}[grad_norm]


_FACTORIES: dict[str, Callable[[float, float, str, int], Any]] = {
    "magnitude": lambda alpha, gamma, grad_norm, seed: Magnitude(),
    "random": lambda alpha, gamma, grad_norm, seed: Random(seed),
    "wanda": lambda alpha, gamma, grad_norm, seed: Wanda(),
    "gradient": lambda alpha, gamma, grad_norm, seed: Gradient(grad_norm),
    "gblm": lambda alpha, gamma, grad_norm, seed: GBLM(alpha, grad_norm),
    "sparsegpt": lambda alpha, gamma, grad_norm, seed: SparseGPT(),
    "kfac": lambda alpha, gamma, grad_norm, seed: KFAC(gamma),
    "keep": lambda alpha, gamma, grad_norm, seed: Keep(),
}
SCORES = tuple(_FACTORIES)


def make_score(
    score: str | Score, *, alpha: float = 100.0, gamma: float = 0.7, grad_norm: str = "l2", seed: int = 0
) -> Score:
    """A built-in score by name, or the user's own object as it is.

    Raises:
        ValueError: an unknown name, `grad_norm` not l1 or l2, a negative or non-finite `alpha` or `gamma`.
        TypeError: an object without the attributes of `Score`.
    """
    if grad_norm not in ("l1", "l2"):
        raise ValueError(f"grad_norm={grad_norm!r} must be 'l1' or 'l2'")
    for argument, value in (("alpha", alpha), ("gamma", gamma)):
        if not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise ValueError(f"{argument}={value!r} must be a finite number >= 0")
    if isinstance(score, str):
        if score not in _FACTORIES:
            raise ValueError(f"score={score!r} is unknown; choose from {SCORES}, or give an object (see Score)")
        made: Score = _FACTORIES[score](alpha, gamma, grad_norm, seed)
        return made
    if isinstance(score, type) or not isinstance(score, Score):
        raise TypeError(
            f"score={score!r} must be one of {SCORES} or an object with name, statistics, group, allocation and "
            "__call__(weight, statistics, name); see lightning_prune.pruning.scores.Score"
        )
    return score
