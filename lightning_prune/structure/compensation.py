"""Re-fit what remains when units go, from second moments of inputs, at once or while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import CalibrationError
from lightning_prune.progress import progress_bar
from lightning_prune.pruning.hessian import DAMPING, compensated, removal_costs, unexplained
from lightning_prune.pruning.statistics import HESSIAN
from lightning_prune.ranks import shard_group
from lightning_prune.safety import uninterrupted
from lightning_prune.sharding import local
from lightning_prune.structure.saliency import INPUT_AXIS, Costs, Unexplained, reader_targets
from lightning_prune.structure.streaming import StreamedStatistics
from lightning_prune.structure.units import Removal, Structure, renumbered, unit_indices


def observed_layers(structure: Structure, types: Sequence[str]) -> dict[str, str]:
    """By the name of each layer that can be re-fitted, that of the layer whose inputs to observe for it.

    Layers of one module that read hidden channels (queries, keys, values) read the same tensor, so the first stands for
    all; every other layer stands for itself. A head that is tied to the embedding is left out: changing it would
    change the embedding.
    """
    found: dict[str, str] = {}
    for unit_type in (t for t in types if t in INPUT_AXIS):
        first: dict[str, str] = {}
        for name in (name for names in structure.readers(unit_type) for name in names):
            if f"{name}.weight" in structure.axes:  # not a tied head
                found[name] = first.setdefault(name.rpartition(".")[0], name)
    return found


@torch.no_grad()
def compensation(
    structure: Structure,
    removal: Removal,
    moments: Mapping[str, Tensor],
    damping: float = DAMPING,
    progress: bool = False,
) -> dict[str, Tensor]:
    """New weights of all layers that lose inputs, by parameter name, in the parameters' shapes; the model is unchanged.

    All at once, on moments of the model before the removal. Where hidden channels go, what their loss changes in the
    divisor of a norm is left out. Of a sharded weight each rank re-fits the rows that it has (of one that is cut along
    its inputs, it gets whole rows for that); every rank must call, with the same moments.

    Args:
        structure: Of the model.
        removal: From `check_removal`. Units that are masked already need not be in it if their moments are zero.
        moments: ``X^T X`` up to a factor, ``[I, I]``, by the name of each layer in `observed_layers`.
        damping: See `compensated`.
        progress: Show a progress bar.

    Raises:
        CalibrationError: see `compensated`; on every rank, if it happens on one.
    """
    targets = {t.name: t for t in reader_targets(structure, [t for t in removal if t in INPUT_AXIS])}
    lost = lost_inputs(structure, removal)
    weights: dict[str, Tensor] = {}
    failure: CalibrationError | None = None
    with progress_bar("Compensating", len(lost), progress) as advance:
        for name, indices in lost.items():
            target = targets[f"{name}.weight"]
            rows = target.rows()
            try:
                rows = compensated(rows, moments[name], indices, damping)
            except CalibrationError as error:
                failure = error  # raised at the end: other ranks wait in the exchange of rows
            weights[target.name] = target.to_parameter(target.layout.from_rows(rows))
            advance()
    if int(shard_group(structure.parameters()).sum(torch.tensor(int(failure is not None)))):
        raise failure or CalibrationError("a layer's update failed on another rank; use more calibration samples")
    return weights


@torch.no_grad()
def compensate(structure: Structure, removal: Removal, moments: Mapping[str, Tensor], damping: float = DAMPING) -> None:
    """Write the weights of `compensation` into the model, once all are known.

    Raises:
        CalibrationError: see `compensated`; nothing is changed then.
    """
    weights, parameters = compensation(structure, removal, moments, damping), structure.parameters()
    with uninterrupted():
        for name, weight in weights.items():
            local(parameters[name].data).copy_(local(weight))


def lost_inputs(structure: Structure, removal: Removal) -> dict[str, Tensor]:
    """Inputs that go, by name of the layer; of layers that stay."""
    gone = [f"{structure.family.layers}.{i}." for i in removal["layer"][0].tolist()] if "layer" in removal else []
    found: dict[str, Tensor] = {}
    for unit_type, places in removal.items():
        if unit_type not in INPUT_AXIS:
            continue
        indices = unit_indices(structure.sizes, unit_type, structure.attention_unit)[INPUT_AXIS[unit_type]]
        for names, units in zip(structure.readers(unit_type), places, strict=True):
            for name in names:
                if f"{name}.weight" in structure.axes and not name.startswith(tuple(gone)):
                    found[name] = indices[units].reshape(-1)
    return found


def unexplained_of(moments: Mapping[str, Tensor]) -> Unexplained:
    """Return what `kfac_saliency` asks of the layers that have such moments, by name."""

    def left(layer: str, units: Tensor) -> Tensor | None:
        hessian = moments.get(layer)
        return None if hessian is None else unexplained(hessian, units) / _total(hessian)

    return left


def costs_of(moments: Mapping[str, Tensor], advance: Callable[[], None]) -> Costs:
    """Return what `kfac_saliency` asks of the layers that alone read units, with such moments, by name.

    Args:
        moments: As for `compensation`.
        advance: Called after each layer.
    """

    def costs(layer: str, units: Tensor, weight: Tensor, importance: Tensor) -> Tensor:
        found = removal_costs(weight, moments[layer], units, importance) / _total(moments[layer])
        advance()
        return found

    return costs


def _total(hessian: Tensor) -> Tensor:
    """All inputs' second moments, or 1 where they were always zero."""
    total = hessian.diagonal().sum()
    return torch.where(total > 0, total, 1)


class StreamedMoments:
    """A decayed mean of ``X^T X`` for every layer that reads units, from the training's own forward passes.

    Layers that take the same tensor (queries, keys and values; gate and up) share one matrix, under the name of the
    first. A step that was observed ``a`` observed steps ago weighs ``decay^a``, and the weights are divided by their
    sum (as Adam corrects the bias of its moments): early on this is nearly the plain mean, where a mean that starts
    with the first small batch would stay with it for ``1 / (1 - decay)`` steps. Where parameters are sharded, the
    moments are whole on every rank.

    Args:
        structure: Of the model.
        types: Unit types whose readers are watched.
        decay: Weight of an observed step against the one after it, from 0 to below 1.

    Attributes:
        stream: The hooks on those layers.
        hessians: ``[I, I]`` float32 (float64 of float64 weights), by the name of the layer that was observed.
        weights: The sum of the weights of the steps in each of them.
    """

    def __init__(self, structure: Structure, types: Sequence[str], decay: float) -> None:
        self.types = types
        self.decay = decay
        self.hessians: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}
        self._unexplained: dict[str, Tensor] = {}
        self.stream = StreamedStatistics(structure, {})
        self._follow(structure)

    def _follow(self, structure: Structure) -> None:
        self._unexplained.clear()
        self._observed = observed_layers(structure, self.types)
        self.stream.follow(structure, dict.fromkeys(self._observed.values(), frozenset({HESSIAN})))

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Fold what was observed of a complete optimizer step into the moments.

        Args:
            reduce: Sums a tensor over processes, which must have observed the same step.
        """
        seen = dict(self.stream.tokens)
        for name, sums in sorted(self.stream.take().items()):
            total = sums.sums[HESSIAN]
            tokens = torch.tensor(float(seen[name]), device=total.device)
            if reduce is not None:
                total, tokens = reduce(total), reduce(tokens)
            mean = total / tokens
            if not bool(torch.isfinite(mean.sum())):  # an overflowing step, which a gradient scaler skips too
                continue
            self._unexplained.pop(name, None)
            before, weight = self.hessians.get(name), 1 + self.decay * self.weights.get(name, 0.0)
            self.hessians[name] = mean if before is None else before.to(mean.device).lerp_(mean, 1 / weight)
            self.weights[name] = weight

    @property
    def ready(self) -> bool:
        """Whether every layer has been seen."""
        return set(self._observed.values()) <= self.hessians.keys()

    def by_layer(self) -> dict[str, Tensor]:
        """Return the moments of every layer's inputs, as `compensate` takes them."""
        return {name: self.hessians[observed] for name, observed in self._observed.items()}

    def unexplained(self, layer: str, units: Tensor) -> Tensor | None:
        """Return what of a layer's inputs the others cannot stand in for, as a share of all inputs' second moments.

        Args:
            layer: Its name.
            units: All its inputs by unit, ``[U, M]``.

        Returns:
            ``[U, M, M]``, see `lightning_prune.pruning.hessian.unexplained`; None of a layer that is not re-fitted, or
            was not seen yet.
        """
        name = self._observed.get(layer, "")
        if name not in self.hessians:
            return None
        if name not in self._unexplained:  # once for queries, keys and values, until their moments change
            left = unexplained_of(self.hessians)(name, units)
            assert left is not None
            self._unexplained[name] = left
        return self._unexplained[name]

    # -- following the model -----------------------------------------------------------------------------------------

    def mask(self, structure: Structure, removal: Removal) -> None:
        """Forget the inputs that are masked, which are zero from now on."""
        for name, lost in lost_inputs(structure, removal).items():
            if name in self.hessians:
                self._unexplained.pop(name, None)
                hessian = self.hessians[name]
                lost = lost.to(hessian.device)
                hessian[lost] = 0.0
                hessian[:, lost] = 0.0

    def compact(
        self, lost_by_layer: Mapping[str, Tensor], gone: Sequence[int], before: Structure, after: Structure
    ) -> None:
        """Drop the inputs, and the layers, that have been removed.

        Args:
            lost_by_layer: Inputs by layer, from `lost_inputs` while the model still had them.
            gone: Numbers of removed layers.
            before: Structure of the model before the removal.
            after: Structure of the model after it.
        """
        for name, lost in lost_by_layer.items():
            if name in self.hessians:
                hessian = self.hessians[name]
                stays = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
                stays[lost.to(hessian.device)] = False
                self.hessians[name] = hessian[stays][:, stays]
        if gone:
            self.hessians = renumbered(self.hessians, before.layer_names(), gone)
            self.weights = renumbered(self.weights, before.layer_names(), gone)
        self._follow(after)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the moments and their weights; nothing of a step that is running."""
        return {"hessians": dict(self.hessians), "weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]], device: torch.device) -> None:
        """Take up the moments of `state_dict`."""
        self._unexplained.clear()
        self.hessians = {name: hessian.to(device) for name, hessian in state["hessians"].items()}
        self.weights = {name: float(weight) for name, weight in state["weights"].items()}
