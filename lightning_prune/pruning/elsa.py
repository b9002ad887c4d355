"""Train into a sparsity by ADMM: while weights train, pull them to a sparse copy of themselves (ELSA).

arXiv 2510.01650. A weight x has a sparse copy z and a scaled dual variable u, and every optimizer step adds
``lambda (x - z + u)`` to its gradient. Now and then z becomes what is kept of x + u, and u what is not: so kept weights
are pulled to z, and pruned ones to -u, ever more strongly as long as they are not zero. As z and u are never both
other than zero, one tensor holds them: the anchor ``z - u``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import check_whole
from lightning_prune.naming import to_ignore
from lightning_prune.pruning.masks import pack_masks, part_of, unpack_masks
from lightning_prune.pruning.scores import Score
from lightning_prune.pruning.statistics import LayerStatistics
from lightning_prune.schedules import OneShot
from lightning_prune.sharding import as_shard_of, gather_whole, local, take_shard

SECOND_MOMENT = "exp_avg_sq"


@dataclass(frozen=True)
class ELSA(OneShot):
    """Schedule of `WeightPruning`: train into the sparsity until a step, then prune and train on with fixed masks.

    Weights are chosen by ``v (x + u)^2``, where v is Adam's second moment, so `WeightPruning` needs
    ``score="magnitude"`` and the optimizer has to be of Adam's kind. For 80 to 90 %, where no pruning at once is
    usable; a few thousand steps. The first `every_n_steps` steps are plain training, from which v comes.

    Attributes:
        step: Optimizer steps after which the weights become their sparse copies.
        every_n_steps: Steps between two choices of what is kept (the paper: 32).
        penalty: lambda (the paper: 0.01, with Adam at a learning rate of 2e-4).

    Example::

        WeightPruning(score="magnitude", sparsity=0.8, schedule=ELSA(step=4096))
    """

    step: int = 4096
    every_n_steps: int = 32
    penalty: float = 0.01

    def __post_init__(self) -> None:
        for name in ("step", "every_n_steps"):
            check_whole(name, getattr(self, name))
        if self.every_n_steps > self.step:
            raise ValueError(
                f"every_n_steps={self.every_n_steps} of ELSA is more than step={self.step}: nothing would be chosen "
                "before the end; use a smaller one"
            )
        if not 0 < self.penalty < float("inf"):
            raise ValueError(f"penalty={self.penalty!r} of ELSA must be a number above 0, such as 0.01")

    def chooses_at(self, step: int) -> bool:
        """Return whether what is kept is chosen anew after a step."""
        return 0 < step < self.step and step % self.every_n_steps == 0


@dataclass(frozen=True)
class SparseCopyScore(Score):
    """The score ``v (x + u)^2`` of weights that an `ADMM` holds, in their layers' own shapes.

    Attributes:
        values: Gives the score of this rank's part of a parameter as a matrix, ``[o, i]``, by the parameter's name.
    """

    values: Callable[[str], Tensor]
    name = "elsa"
    elementwise = True

    def __call__(self, weight: Tensor, statistics: LayerStatistics, name: str) -> Tensor:
        """Return the scores of the part of the matrix that is here."""
        return self.values(name)


class ADMM:
    """Sparse copies and dual variables of weights; of sharded ones, of this rank's parts.

    One float32 tensor of a weight's size (float64 for float64 weights) and a byte for each weight.

    Args:
        weights: Parameters by name.
        penalty: lambda.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], penalty: float) -> None:
        self.weights = dict(weights)
        self.penalty = penalty
        self._anchors: dict[str, Tensor] = {}  # z - u; empty before anything was chosen
        self._kept: dict[str, Tensor] = {}
        self._names = {id(parameter): name for name, parameter in self.weights.items()}

    @torch.no_grad()
    def pull(self, parameters: Iterable[Tensor]) -> None:
        """Add ``lambda (x - z + u)`` to the gradients of those parameters that have one."""
        for parameter in parameters:
            anchor = self._anchors.get(self._names.get(id(parameter), ""))
            if anchor is not None and parameter.grad is not None:
                x = local(parameter.detach())
                local(parameter.grad).add_(x.to(anchor.dtype) - anchor, alpha=self.penalty)

    @torch.no_grad()
    def sums(self, name: str) -> Tensor:
        """Return x + u of a parameter's part, in float32 at least."""
        x = local(self.weights[name].detach())
        wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        if name not in self._anchors:
            return wide
        return wide.sub_(self._anchors[name].masked_fill(self._kept[name], 0.0))  # the anchor is -u where pruned

    @torch.no_grad()
    def values(self, name: str, optimizers: Iterable[Optimizer]) -> Tensor:
        """Return ``v (x + u)^2`` of a parameter's part.

        Raises:
            ValueError: no optimizer has second moments of the parameter.
        """
        parameter = self.weights[name]
        states = (optimizer.state.get(parameter, {}) for optimizer in optimizers)
        moment = next((state[SECOND_MOMENT] for state in states if SECOND_MOMENT in state), None)
        if not isinstance(moment, Tensor):
            raise ValueError(
                f"no optimizer has Adam's second moments of {name!r}, by which ELSA chooses: train it with Adam or "
                f"AdamW, or add {to_ignore(name)}"
            )
        sums = self.sums(name)
        return sums.square_().mul_(local(moment).to(sums.device, sums.dtype))

    @torch.no_grad()
    def choose(self, masks: Mapping[str, Tensor]) -> None:
        """Make z what the masks keep of x + u, and u the rest.

        Args:
            masks: Bool, True = kept, laid out as the parameters are.
        """
        for name in self.weights:
            kept, sums = local(masks[name]), self.sums(name)
            self._anchors[name], self._kept[name] = torch.where(kept, sums, -sums), kept

    @torch.no_grad()
    def settle(self, masks: Mapping[str, Tensor]) -> None:
        """Let the weights be their sparse copies: what masks keep of x + u, and +0.0."""
        for name, parameter in self.weights.items():
            local(parameter.detach()).copy_(self.sums(name).masked_fill_(~local(masks[name]), 0.0))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return anchors and masks, whole and in main memory; where weights are sharded every rank must call."""
        parts = {name: as_shard_of(self.weights[name], anchor) for name, anchor in self._anchors.items()}
        return {
            "anchors": {name: gather_whole(part).cpu() for name, part in parts.items()},
            "kept": pack_masks({name: as_shard_of(self.weights[name], kept) for name, kept in self._kept.items()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` gave, also of other shards.

        Raises:
            ValueError: it is damaged, or of other weights.
        """
        anchors, kept = state["anchors"], unpack_masks(state["kept"])
        if anchors and not anchors.keys() == kept.keys() == self.weights.keys():
            strange = sorted(anchors.keys() ^ self.weights.keys()) or sorted(kept.keys() ^ anchors.keys())
            raise ValueError(f"the checkpoint's ELSA state is of other weights ({strange[0]!r}); train the same layers")
        for name, anchor in anchors.items():
            parameter = self.weights[name]
            if anchor.shape != parameter.shape or kept[name].shape != parameter.shape:
                raise ValueError(
                    f"the checkpoint's ELSA state of {name!r} has shape {tuple(anchor.shape)}, the parameter "
                    f"{tuple(parameter.shape)}; it is of another model"
                )
            own = local(parameter.detach())
            dtype = torch.promote_types(own.dtype, torch.float32)
            self._anchors[name] = take_shard(parameter, anchor).to(own.device, dtype, copy=True)
            self._kept[name] = part_of(parameter, kept[name]).to(own.device)
