"""Shrink a model while it trains: the state between two prunings, and its history."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.pruning.padding import PaddingFinder
from lightning_prune.structure.compensation import StreamedMoments, compensate, lost_inputs
from lightning_prune.structure.masking import gradients_left, mask_gradients, mask_units
from lightning_prune.structure.planning import Planner
from lightning_prune.structure.removal import remove_units
from lightning_prune.structure.saliency import SaliencyAccumulator
from lightning_prune.structure.saving import note_masked_units
from lightning_prune.structure.sizes import Sizes, UnitType
from lightning_prune.structure.streaming import StreamedStatistics
from lightning_prune.structure.units import (
    KeptIndices,
    Removal,
    Structure,
    merge_removals,
    read_structure,
    sizes_after,
)


class Shrinking:
    """The state of a shrinking model.

    Args:
        structure: Of the model as it is.
        planner: Says which units go, and where it is to end.
        saliency: Accumulates unit saliencies of `planner.types`.
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
        planner: Planner,
        saliency: SaliencyAccumulator,
        moments: StreamedMoments | None = None,
        compact_every: int | None = 16,
        agree: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.structure = structure
        self.planner = planner
        self.saliency = saliency
        self.moments = moments
        self.compact_every = compact_every
        self.pending: Removal = {}
        self.history: list[ShrinkRecord] = []
        self.layers_left = list(range(planner.first.num_hidden_layers))
        self._agree = agree
        self._since = 0  # prunings since the last compaction
        self._left: dict[str, list[KeptIndices]] = {}
        self._finder = PaddingFinder(structure.model)
        self._watching = ExitStack()

    @property
    def sizes(self) -> Sizes:
        """Sizes without the masked units."""
        return sizes_after(self.structure, self.pending)

    @property
    def parameters(self) -> int:
        """Parameters without the masked units."""
        return self.planner.parameters(self.sizes)

    @property
    def reached(self) -> bool:
        """Whether the target is reached."""
        return self.planner.reached(self.sizes)

    @property
    def compaction_due(self) -> bool:
        """Whether masked units should be sliced off now; at once those that weights of zero alone do not mask.

        Those are experts, and hidden channels of LayerNorms, which subtract a mean over all of them: in a checkpoint,
        or wherever the model is saved, nothing would say that their norms leave these out.
        """
        if self.compact_every is None or not self.pending:
            return False
        normed = "hidden" in self.pending and self.structure.family.norm == "layernorm"
        return self._since >= self.compact_every or self.reached or normed or "expert" in self.pending

    # -- watching ----------------------------------------------------------------------------------------------------

    @property
    def streams(self) -> list[StreamedStatistics]:
        """What has hooks on the model's layers."""
        return [o.stream for o in (self.moments, self.saliency) if o is not None and o.stream is not None]

    def watch(self) -> None:
        """Put hooks on the layers that are to be observed, and on what says which of their tokens are padding."""
        self.release()
        for stream in self.streams:
            self._watching.callback(stream.release)
            stream.watch()
        if self.streams:
            self._watching.enter_context(self._finder.watching())

    def release(self) -> None:
        """Take the hooks off."""
        self._watching.close()

    def listen(self, step: int, moments_every: int, batch: Any) -> None:
        """Observe the passes of a batch, until `rest`.

        Args:
            step: Optimizer steps since it began; before 0 nothing is observed.
            moments_every: Steps between those on which moments are observed.
            batch: What the model is about to be given.

        Raises:
            ValueError: a mask from which padding cannot be read.
        """
        for observer, every in ((self.moments, moments_every), (self.saliency, 1)):
            if observer is not None and observer.stream is not None:
                observer.stream.listening = step >= 0 and step % every == 0 and not self.reached

        padding = self._finder.find(batch) if any(stream.listening for stream in self.streams) else None
        for stream in self.streams:
            stream.padding = padding

    def rest(self) -> None:
        """Observe nothing until the next batch."""
        for stream in self.streams:
            stream.listening, stream.padding = False, None
        self._finder.rest()
        self._finder.warn()

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
            down_to: In place of `units`: as many as it takes to cost no more than this, see `Planner`.
            optimizers: Whose states of the units are cleared.
            averages: Averaged copies of the model, which are masked too.

        Returns:
            The record; None if nothing is left to go, or no step with finite gradients was seen since the last time.
        """
        if self.reached or not self.saliency.steps or (self.moments is not None and not self.moments.ready):
            return None
        absent = self.pending["layer"][0].tolist() if "layer" in self.pending else ()
        removal, saliency = self.planner.choose(
            self._saliency(), self.sizes, units if down_to is None else None, down_to, absent
        )
        self.saliency.reset()
        if not removal:
            return None
        merged = merge_removals(self.structure, self.pending, removal)
        if self.moments is not None:
            compensate(self.structure, removal, self.moments.by_layer())
            self.moments.mask(self.structure, removal)
        self.pending = merged
        masked = {t: places for t, places in self.pending.items() if t != "expert"}
        mask_units(self.structure.model, masked, optimizers, attention_unit=self.structure.attention_unit)
        for average in averages:
            mask_units(average, masked, attention_unit=self.structure.attention_unit)
        self._note()
        self._since += 1
        self.history.append(self._record(step, tokens, saliency))
        return self.history[-1]

    def _saliency(self) -> dict[UnitType, Tensor]:
        """Return the mean saliency over each unit's weights, ``[P, U]`` in float64; infinite for masked ones."""
        found: dict[UnitType, Tensor] = {}
        for t in self.planner.types:
            values = self.saliency.sums(t).double().cpu() / self.planner.unit_weights(t, self.sizes)
            for row, gone in zip(values, self.pending.get(t, ()), strict=False):
                row[gone] = torch.inf
            if self._agree is not None:
                self._agree(values)
            found[t] = values
        return found

    def _note(self) -> None:
        if self.compact_every is None:
            note_masked_units(self.structure.model, self.pending, self.structure.attention_unit)
        heads = {"attention": self.pending["attention"]} if "attention" in self.pending else {}
        # A masked query head averages the values of its group, which are there for the others.
        masked = lost_inputs(self.structure, heads) if self.structure.attention_unit == "head" else {}
        for stream in self.streams:
            stream.masked = masked
        self._left = gradients_left(self.structure, self.pending)

    def mask_gradients(self) -> None:
        """Keep masked units from coming back in the optimizer step that is next."""
        mask_gradients(self.structure, self._left)

    def _record(self, step: int, tokens: int, saliency: dict[str, float]) -> ShrinkRecord:
        sizes = self.sizes
        units: dict[str, int] = {t: sizes.units(t, self.planner.attention_unit) for t in self.planner.types}
        return ShrinkRecord(step, tokens, self.planner.parameters(sizes), units, saliency)

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
        self.structure = replace(read_structure(before.model, unit), prefix=before.prefix)
        gone = self.pending["layer"][0].tolist() if "layer" in self.pending else []
        self.layers_left = [layer for i, layer in enumerate(self.layers_left) if i not in gone]
        self.saliency.follow(self.structure, self.pending)
        if self.moments is not None:
            self.moments.compact(lost, gone, before, self.structure)
        self.pending, self._since = {}, 0
        self._note()

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""
        return {
            "first": self.planner.first.as_dict(),
            "sizes": self.structure.sizes.as_dict(),
            "layers_left": list(self.layers_left),
            "pending": {t: list(places) for t, places in self.pending.items()},
            "since": self._since,
            "history": [record.to_dict() for record in self.history],
            "saliency": self.saliency.state_dict(),
            "moments": None if self.moments is None else self.moments.state_dict(),
            "latency": None if self.planner.latency is None else self.planner.latency.table.to_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where `state_dict` was; the model must have its sizes."""
        if (saved := Sizes(**state["sizes"])) != self.structure.sizes:
            raise ValueError(
                f"what a checkpoint or an earlier fit has left is of a model of {saved.as_dict()}, and this one has "
                f"{self.structure.sizes.as_dict()}: it was changed in between. Shrink it further with a new "
                "PruningAwarePretraining"
            )
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
        units: Units left of each type, in one layer (hidden, layer: in the model).
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
