"""Shrink a model while it trains: the state between two prunings, and its history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.structure.compensation import StreamedMoments, compensate, lost_inputs
from lightning_prune.structure.masking import mask_units
from lightning_prune.structure.planning import ShrinkGoal
from lightning_prune.structure.removal import remove_units
from lightning_prune.structure.saliency import SaliencyAccumulator
from lightning_prune.structure.saving import note_masked_units
from lightning_prune.structure.sizes import Sizes, UnitType
from lightning_prune.structure.units import Removal, Structure, merge_removals, read_structure, sizes_after


class Shrinking:
    """The state of a shrinking model.

    Args:
        structure: Of the model as it is.
        goal: Where it is to end.
        saliency: Accumulates unit saliencies of `goal.types`.
        moments: Input second moments, to update what remains (variant B); None for variant A.
        compact_every: Prunings between compactions; the last pruning is always followed by one. None: units stay
            masked, since the parameters are shards, and are noted on the model (see `note_masked_units`).
        agree: Makes a tensor that of the first process, in place.

    Attributes:
        pending: Units that are masked and not yet sliced off, numbered as in `structure`.
        history: One record a pruning, after one of the model before.
    """

    def __init__(
        self,
        structure: Structure,
        goal: ShrinkGoal,
        saliency: SaliencyAccumulator,
        moments: StreamedMoments | None = None,
        compact_every: int | None = 16,
        agree: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.structure = structure
        self.goal = goal
        self.saliency = saliency
        self.moments = moments
        self.compact_every = compact_every
        self.pending: Removal = {}
        self.history: list[ShrinkRecord] = []
        self.layers_left = list(range(goal.first.num_hidden_layers))
        self._agree = agree
        self._since = 0  # prunings since the last compaction

    @property
    def sizes(self) -> Sizes:
        """Sizes without the masked units."""
        return sizes_after(self.structure, self.pending)

    @property
    def parameters(self) -> int:
        """Parameters without the masked units."""
        return self.goal.parameters(self.sizes)

    @property
    def reached(self) -> bool:
        """Whether the target is reached."""
        return self.goal.reached(self.sizes)

    @property
    def compaction_due(self) -> bool:
        """Whether masked units should be sliced off now."""
        if self.compact_every is None:
            return False
        return bool(self.pending) and (self._since >= self.compact_every or self.reached)

    def begin(self, step: int, tokens: int) -> None:
        """Note the model before the first pruning."""
        if not self.history:
            self.history.append(self._record(step, tokens, {}))

    # -- pruning -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prune(
        self,
        step: int,
        tokens: int,
        units: int = 1,
        down_to: int | None = None,
        optimizers: Sequence[Optimizer] = (),
        averages: Sequence[nn.Module] = (),
    ) -> ShrinkRecord | None:
        """Mask the cheapest units, and start to accumulate saliency anew.

        Args:
            step: Optimizer steps done.
            tokens: Training tokens seen.
            units: How many (each of every layer, for attention and ffn; `round_to` at once where that is set).
            down_to: In place of `units`: as many as it takes to have no more parameters than this.
            optimizers: Whose states of the units are cleared.
            averages: Averaged copies of the model, which are masked too.

        Returns:
            The record; None if nothing is left to go, or no step with finite gradients was seen since the last time.
        """
        if self.reached or not self.saliency.steps or (self.moments is not None and not self.moments.ready):
            return None
        removal, saliency = self._choose(units, down_to)
        self.saliency.reset()
        if not removal:
            return None
        merged = merge_removals(self.structure, self.pending, removal)
        if self.moments is not None:
            compensate(self.structure, removal, self.moments.by_layer())
            self.moments.mask(self.structure, removal)
        self.pending = merged
        mask_units(self.structure.model, self.pending, optimizers, attention_unit=self.structure.attention_unit)
        for average in averages:
            mask_units(average, self.pending, attention_unit=self.structure.attention_unit)
        self._note()
        self._since += 1
        self.history.append(self._record(step, tokens, saliency))
        return self.history[-1]

    def _choose(self, units: int, down_to: int | None) -> tuple[Removal, dict[str, float]]:
        """The units to go, and the saliency of each type's cheapest before the first went."""
        sums = self._sums()
        sizes, compared, taken = self.sizes, dict[str, float](), 0
        chosen: dict[str, list[list[Tensor]]] = {}
        while not self.goal.reached(sizes):
            if taken >= units if down_to is None else self.goal.parameters(sizes) <= down_to:
                break
            options = {t: self._cheapest(t, sums[t], sizes) for t in self.goal.types if self.goal.next_units(t, sizes)}
            compared = compared or {t: value for t, (value, _) in options.items()}
            unit_type = min(options, key=lambda t: options[t][0])  # the first of equals, in the order of the types
            indices = options[unit_type][1]  # [P, n]
            sums[unit_type].scatter_(1, indices, torch.inf)
            chosen.setdefault(unit_type, []).append(list(indices))
            sizes = sizes.without(unit_type, indices.shape[1], self.goal.attention_unit)
            taken += 1
        removal: Removal = {
            t: [torch.cat(parts) for parts in zip(*rounds, strict=True)] for t, rounds in chosen.items()
        }
        return merge_removals(self.structure, removal), compared

    def _sums(self) -> dict[UnitType, Tensor]:
        """Saliency of every unit, summed over its weights, ``[P, U]`` in float64; infinite for masked ones."""
        sums = {t: self.saliency.sums(t).double().cpu() for t in self.goal.types}
        for unit_type, values in sums.items():
            if unit_type in self.pending:
                for row, gone in zip(values, self.pending[unit_type], strict=True):
                    row[gone] = torch.inf
        if self._agree is not None:
            for values in sums.values():
                self._agree(values)
        return sums

    def _cheapest(self, unit_type: UnitType, sums: Tensor, sizes: Sizes) -> tuple[float, Tensor]:
        """Mean saliency of the weights of the cheapest units of a type, and their indices ``[P, n]``."""
        count = self.goal.next_units(unit_type, sizes)
        values, indices = sums.sort(dim=1, stable=True)
        alive = torch.ones(len(sums), dtype=torch.bool)
        if "layer" in self.pending and len(sums) > 1:  # masked layers have nothing to compare
            alive[self.pending["layer"][0]] = False
        return float(values[alive, :count].mean()) / self.goal.unit_weights(unit_type, sizes), indices[:, :count]

    def _note(self) -> None:
        if self.compact_every is None:
            note_masked_units(self.structure.model, self.pending, self.structure.attention_unit)

    def _record(self, step: int, tokens: int, saliency: dict[str, float]) -> ShrinkRecord:
        sizes = self.sizes
        units: dict[str, int] = {t: sizes.units(t, self.goal.attention_unit) for t in self.goal.types}
        return ShrinkRecord(step, tokens, self.goal.parameters(sizes), units, saliency)

    # -- compaction --------------------------------------------------------------------------------------------------

    def compact(self, optimizers: Sequence[Optimizer] = (), averages: Sequence[nn.Module] = ()) -> None:
        """Slice the masked units off: parameters, optimizer states, averaged copies, configuration."""
        if not self.pending:
            return
        before, unit = self.structure, self.structure.attention_unit
        lost = {} if self.moments is None else lost_inputs(before, self.pending)
        remove_units(before.model, self.pending, optimizers, attention_unit=unit)
        note_masked_units(before.model, {}, unit)
        for average in averages:
            remove_units(average, self.pending, attention_unit=unit)
        self.structure = read_structure(before.model, unit)
        gone = self.pending["layer"][0].tolist() if "layer" in self.pending else []
        self.layers_left = [layer for i, layer in enumerate(self.layers_left) if i not in gone]
        self.saliency.follow(self.structure, self.pending)
        if self.moments is not None:
            self.moments.compact(lost, gone, before, self.structure)
        self.pending, self._since = {}, 0

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "first": self.goal.first.as_dict(),
            "sizes": self.structure.sizes.as_dict(),
            "layers_left": list(self.layers_left),
            "pending": {t: list(places) for t, places in self.pending.items()},
            "since": self._since,
            "history": [record.to_dict() for record in self.history],
            "saliency": self.saliency.state_dict(),
            "moments": None if self.moments is None else self.moments.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was; the model must have its sizes."""
        if (saved := Sizes(**state["sizes"])) != self.structure.sizes:
            raise ValueError(f"the checkpoint's model has {saved}, this one {self.structure.sizes}")
        self.pending = merge_removals(self.structure, state["pending"])
        self.layers_left = list(state["layers_left"])
        self._since = int(state["since"])
        self.history = [ShrinkRecord.from_dict(record) for record in state["history"]]
        self.saliency.load_state_dict(state["saliency"])
        if self.moments is not None and state["moments"] is not None:
            self.moments.load_state_dict(state["moments"], next(self.structure.model.parameters()).device)
        if self.pending:  # what is masked besides weights: LayerNorms
            mask_units(self.structure.model, self.pending, attention_unit=self.structure.attention_unit)
        self._note()


@dataclass(frozen=True)
class ShrinkRecord:
    """The model after a pruning; the first record of a history is the model before the first one.

    Attributes:
        step: Optimizer steps done.
        tokens: Training tokens seen by all processes.
        parameters: Parameters left.
        units: Units left of each type, in one layer (stem, layer: in the model).
        saliency: Mean saliency of the weights of each type's cheapest unit, as compared at this pruning.
    """

    step: int
    tokens: int
    parameters: int
    units: dict[str, int]
    saliency: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShrinkRecord:
        """The record of `to_dict`."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def pruned_ratios(record: ShrinkRecord, first: ShrinkRecord) -> dict[str, float]:
    """Share of each type's units that have gone since `first`."""
    return {kind: 1 - left / first.units[kind] for kind, left in record.units.items()}
