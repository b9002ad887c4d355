"""Scores: what a weight is worth. Pure functions of a weight matrix and its layer's statistics; larger = keep.

A score is any object with the attributes of `Score`; the classes here are the built-in ones. Shapes: weights and
scores ``[O, I]``, ``input_norm [I]`` (of grouped convolutions ``[O, I]``), ``output_grad_norm [O]``, gradient
aggregates ``[O, I]``.
"""

from __future__ import annotations

import inspect
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.pruning.statistics import GRADIENT_L1, GRADIENT_L2, INPUT_NORM, OUTPUT_GRAD_NORM, LayerStatistics

GROUPS = ("row", "layer", "global")
# Weights that no sample gives an input or a gradient rank below all others, by what else is known of them, not by
# position. The number is lost in rounding beside any norm.
_TIE = 1e-25


class Criterion(ABC):
    """What decides which weights go: a `Score`, or one of the objects that make masks without scoring a weight.

    Attributes:
        name: Shown in messages and saved with the masks.
        statistics: Names out of `lightning_prune.pruning.statistics.ALL_STATISTICS` that it reads; default none.
        group: Weights are compared within ``"row"``, ``"layer"`` or ``"global"``, unless the user says otherwise.
        allocation: Layer sparsities: ``"uniform"``, ``"owl"`` or ``"kfac"``, unless the user says otherwise.
    """

    @property
    @abstractmethod
    def name(self) -> str: ...  # noqa: D102

    @property
    def statistics(self) -> frozenset[str]:  # noqa: D102
        return frozenset()

    @property
    def group(self) -> str:  # noqa: D102
        return "row"

    @property
    def allocation(self) -> str:  # noqa: D102
        return "uniform"


class Score(Criterion):
    """What `prune` needs of a score; a class that inherits from it has the defaults.

    Attributes:
        name: See `Criterion`, as for `statistics`, `group` and `allocation`.
        elementwise: Whether each number depends only on its own weight, row and column, so that a rank can score its
            part of a sharded weight alone. Otherwise (the default) a sharded weight and its statistics are gathered,
            one layer at a time.
        proportional: Whether each number is ``abs(W)`` of its own weight times a factor in which no weight has a part,
            so that ``update="alps"`` can weigh weights that it makes itself. Default: no.
    """

    @property
    def proportional(self) -> bool:  # noqa: D102
        return False

    @property
    def elementwise(self) -> bool:  # noqa: D102
        return False

    @abstractmethod
    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]`` of the `weight` ``[O, I]`` of the parameter `name`, float32, or float64 if it is so."""
        ...


SCORE_MEMBERS = ("name", "statistics", "group", "allocation", "elementwise", "__call__")


def missing_members(candidate: object) -> list[str]:
    """What an object lacks to be a `Score`, by name; its properties are not run to find out."""
    return [name for name in SCORE_MEMBERS if inspect.getattr_static(candidate, name, None) is None]


@dataclass(frozen=True)
class Magnitude(Score):
    """``abs(W)``, within a layer (Han et al. 2015, arXiv 1506.02626)."""

    name = "magnitude"
    elementwise = True
    proportional = True
    group = "layer"

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        return weight.abs()


@dataclass(frozen=True)
class Random(Score):
    """Uniform random scores, within a layer: the floor every method is measured from.

    Args:
        seed: Each parameter draws from its own generator, seeded by this and its name: the same on every rank.
    """

    name = "random"
    group = "layer"
    seed: int = 0

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self.seed)
        # In main memory and float32 whatever the caller's defaults are: the same everywhere, and hardly a tie.
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(weight.device)


@dataclass(frozen=True)
class Wanda(Score):
    """``abs(W_ij) * norm2(X_j)``, within an output row (Sun et al. 2023, arXiv 2306.11695, sec. 3)."""

    name = "wanda"
    elementwise = True
    proportional = True
    statistics = frozenset({INPUT_NORM})

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        return weight.abs() * (statistics.get(INPUT_NORM) + _TIE)


@dataclass(frozen=True)
class Gradient(Score):
    """``abs(W) * Gbar``, within an output row (Das et al. 2023, arXiv 2311.04902, sec. 4).

    Args:
        grad_norm: ``"l1"`` or ``"l2"`` over the samples' gradients.
    """

    name = "gradient"
    elementwise = True
    proportional = True
    grad_norm: str = "l2"

    @property
    def statistics(self) -> frozenset[str]:
        """The gradient aggregate of the chosen norm."""
        return frozenset({_aggregate(self.grad_norm)})

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        gradient = statistics.get(_aggregate(self.grad_norm)).to(weight)
        return weight.abs().mul_(gradient).add_(weight.abs(), alpha=_TIE)


@dataclass(frozen=True)
class GBLM(Score):
    """``abs(W_ij) * (norm2(X_j) + alpha * Gbar_ij)``, within an output row (Das et al. 2023, arXiv 2311.04902, eq. 4).

    Args:
        alpha: Weight of the gradient term; 100 in the paper. It does not carry over between models: gradients
            shrink with a model's size and, for l1, the aggregate grows with the number of samples.
        grad_norm: ``"l1"`` or ``"l2"`` over the samples' gradients.
    """

    name = "gblm"
    elementwise = True
    proportional = True
    alpha: float = 100.0
    grad_norm: str = "l2"

    @property
    def statistics(self) -> frozenset[str]:
        """Input norms and the gradient aggregate of the chosen norm."""
        return frozenset({INPUT_NORM, _aggregate(self.grad_norm)})

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Scores ``[O, I]``."""
        gradient = statistics.get(_aggregate(self.grad_norm)).to(weight)
        return torch.add(statistics.get(INPUT_NORM) + _TIE, gradient, alpha=self.alpha).mul_(weight.abs())


@dataclass(frozen=True)
class KFAC(Score):
    """``abs(W_ij) * norm2(X_j) * norm2(delta_i)^gamma``, within a layer, with the layer sparsities of ``"kfac"``.

    The square of the score at gamma = 1 is the loss increase of removing a weight under the diagonal of the
    Kronecker-factored Fisher, ``1/2 W_ij^2 E[x_j^2] E[delta_i^2]`` (factors: Martens & Grosse 2015,
    arXiv 1503.05671). It needs O + I numbers a layer and no weight gradient. Under an N:M pattern the row factor
    cancels, so the mask is that of Wanda.

    Args:
        gamma: Power of the output-gradient norm; 0 is Wanda's score compared within the layer.
    """

    name = "kfac"
    elementwise = True
    proportional = True
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
    return (weight.abs() * (statistics.get(INPUT_NORM) + _TIE)).mul_(rows[:, None])


@dataclass(frozen=True)
class Keep(Criterion):
    """The mask of the weights that are not zero already: trains a model sparse that was pruned elsewhere."""

    name = "keep"


def _aggregate(grad_norm: str) -> str:
    return {"l1": GRADIENT_L1, "l2": GRADIENT_L2}[grad_norm]
