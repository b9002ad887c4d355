"""Updates: how the weights that stay make up for those that go, a layer at a time.

An update is any object with the members of `Update`. Most work on the mask that a score has chosen. ALPS chooses by
what the score makes of weights that it has fitted; SparseGPT chooses by itself and stands in the place of the score.

Dimensions: O outputs, I inputs of a layer; r of its rows, all of them unless the weight is sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_prune.pruning.alps import EVERY, ITERATIONS, RHO, alps_support
from lightning_prune.pruning.exact import damped_diagonal, exact_weights
from lightning_prune.pruning.hessian import prune_with_hessian
from lightning_prune.pruning.patterns import NM
from lightning_prune.pruning.scores import Criterion
from lightning_prune.pruning.statistics import HESSIAN, LayerStatistics


@dataclass(frozen=True)
class LayerRows:
    """Whole rows of one layer's matrix, and all that an update may know of them. Nothing in it may be changed.

    Attributes:
        name: The parameter's.
        weight: ``[r, I]``, in its own dtype.
        statistics: Of the layer; what goes by outputs is cut to these rows.
        mask: Bool ``[r, I]``, True = kept: what the score has chosen; None if the update chooses by itself.
        count: Weights to prune in the whole matrix, over all ranks; 0 with a `pattern`.
        pattern: N of every M inputs are kept, or None.
        lowest: Scores ``[r, C]`` of C of the inputs and a count to a bool mask of that shape, True = kept: the lowest
            of the whole layer go, over all ranks, which must all call.
        choose: Scores ``[r, I]`` to a mask as the settings ask for (pattern or group, and the layer's sparsity).
            What was pruned before goes first. Where the weight is sharded every rank must call.
        factors: What the score makes of weights of one, ``[r, I]``, given norms of the inputs ``[I]`` in the place of
            the measured ones. Of a score that is `Score.proportional`; every rank must call.
        total: Sums an integer tensor over the ranks that hold the matrix, each row once; every rank must call.
    """

    name: str
    weight: Tensor
    statistics: LayerStatistics
    mask: Tensor | None
    count: int
    pattern: NM | None
    lowest: Callable[[Tensor, int], Tensor]
    choose: Callable[[Tensor], Tensor]
    factors: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


class Update(Protocol):
    """What `prune` needs of an update.

    Attributes:
        name: As the user writes it.
        statistics: What it reads of a layer, beside what the score reads.
        chooses: Whether it chooses which weights go, so that it gets no mask.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def statistics(self) -> frozenset[str]: ...  # noqa: D102

    @property
    def chooses(self) -> bool: ...  # noqa: D102

    def solve(self, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The new weight ``[r, I]``, exact zeros where pruned, and its mask; rows do not depend on each other.

        Raises:
            CalibrationError: the layer has no solution.
        """
        ...


class OBS:
    """Column by column: each column that goes is made up for by those to its right (Optimal Brain Surgeon)."""

    name = "obs"
    statistics = frozenset({HESSIAN})
    chooses = False

    def solve(self, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The new weight and the mask of the score, ``[r, I]`` each."""
        return prune_with_hessian(rows.weight, rows.statistics.get(HESSIAN), mask=rows.mask)


class Exact:
    """The weights on the mask that change the layer's outputs least."""

    name = "exact"
    statistics = frozenset({HESSIAN})
    chooses = False

    def solve(self, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The new weight and the mask of the score, ``[r, I]`` each."""
        assert rows.mask is not None
        return exact_weights(rows.weight, rows.statistics.get(HESSIAN), rows.mask), rows.mask


@dataclass(frozen=True)
class ALPS:
    """The support by ADMM under the score's factors, then the exact weights on it (Meng et al. 2024, arXiv 2406.07831).

    With ``score="wanda"`` it is ALPS as published, with ``score="kfac"`` its output rows and layers are weighted by
    gradients. The score must be `Score.proportional`. Weights are compared within the layer where the score's own
    group is the row.

    Args:
        rho: Penalty at the start, on the scale of inputs with norm 1; it grows by 10 to 30 % at each look.
        every: Iterations between two looks at how many weights have entered or left the support.
        iterations: At most. It ends at the first look that finds no change, usually after 30 to 40.
    """

    name = "alps"
    statistics = frozenset({HESSIAN})
    chooses = True
    rho: float = RHO
    every: int = EVERY
    iterations: int = ITERATIONS

    def __post_init__(self) -> None:
        if not (0 < self.rho < float("inf") and self.every >= 1 and self.iterations >= 1):
            raise ValueError(f"{self!r}: rho must be a finite number > 0, every and iterations >= 1")

    def solve(self, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The new weight and the mask, ``[r, I]`` each."""
        hessian = rows.statistics.get(HESSIAN)
        factors = rows.factors(damped_diagonal(hessian).sqrt())
        how = (self.rho, self.every, self.iterations)
        mask = alps_support(rows.weight, hessian, factors, rows.choose, *how, total=rows.total)
        return exact_weights(rows.weight, hessian, mask), mask


@dataclass(frozen=True)
class SparseGPT(Criterion):
    """``W_ij^2 / diag(H^-1)_j`` within 128 columns of a layer, with the remaining weights updated.

    Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1. Selection and update are one process.
    """

    name = "sparsegpt"
    statistics = frozenset({HESSIAN})
    chooses = True
    group = "layer"

    def solve(self, rows: LayerRows) -> tuple[Tensor, Tensor]:
        """The new weight and the mask, ``[r, I]`` each."""
        return prune_with_hessian(
            rows.weight,
            rows.statistics.get(HESSIAN),
            count=rows.count,
            pattern=rows.pattern,
            select=rows.lowest,
        )


UPDATES: dict[str, Update] = {update.name: update for update in (OBS(), Exact(), ALPS())}
"""What `prune` knows by name."""
