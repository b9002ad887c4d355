"""Second moments of layer inputs, ``X^T X``, streamed from training batches: what variant B updates weights with.

Dimensions: N tokens, I inputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.units import Structure, kept_indices


class StreamedMoments:
    """A decayed sum of ``X^T X`` for every layer that reads units, from the training's own forward passes.

    Layers that take the same tensor (queries, keys and values; gate and up) share one matrix. An observed step adds
    ``X^T X / N`` of all its tokens: ``H <- decay * H + (1 - decay) * X^T X / N``; a matrix that has seen nothing yet
    takes the first as it is.

    Args:
        structure: Of the model.
        types: Unit types whose readers are watched.
        decay: Weight of what was known before, at each observed step.
    """

    def __init__(self, structure: Structure, types: Sequence[str], decay: float) -> None:
        self.decay = decay
        self.listening = False
        self.keep: Tensor | None = None  # bool, one for each token of the batch: False where it is padding
        self.observations = 0
        self._handles: list[Any] = []
        self._sums: dict[str, Tensor] = {}  # of the step that is running
        self._tokens: dict[str, int] = {}
        self._moments: dict[str, Tensor] = {}  # [I, I] by the first layer of a group
        self._group = _groups(structure, types)
        self._columns = {t: [g for place in structure.readers(t) for g in place] for t in types if t != "layer"}

    # -- watching ----------------------------------------------------------------------------------------------------

    def watch(self, structure: Structure) -> None:
        """Put hooks on the layers; they do nothing unless `listening`."""
        modules = structure.modules()
        for name in dict.fromkeys(self._group.values()):
            self._handles.append(modules[name].register_forward_pre_hook(self._hook(name)))

    def release(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self.listening:
                self.add(name, args[0].detach())

        return take

    def add(self, name: str, x: Tensor) -> None:
        """Take in the inputs ``[..., I]`` of a layer."""
        rows = x.reshape(-1, x.shape[-1])
        if self.keep is not None and self.keep.numel() == rows.shape[0]:
            rows = rows[self.keep.reshape(-1)]
        with torch.autocast(x.device.type, enabled=False):
            product = rows.t().float() @ rows.float()
        self._tokens[name] = self._tokens.get(name, 0) + rows.shape[0]
        if name in self._sums:
            self._sums[name] += product
        else:
            self._sums[name] = product

    def end_step(self, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """The observed step is complete: fold its products into the moments.

        Args:
            reduce: Sums a tensor over processes, which must have observed the same step.
        """
        if not self._sums:
            return
        self.observations += 1
        for name, total in self._sums.items():
            tokens = torch.tensor(float(self._tokens[name]), device=total.device)
            if reduce is not None:
                total, tokens = reduce(total), reduce(tokens)
            mean = total / tokens
            if not bool(torch.isfinite(mean.sum())):  # an overflowing step, which the optimizer skips too
                continue
            before = self._moments.get(name)
            self._moments[name] = mean if before is None else before.lerp_(mean, 1 - self.decay)
        self._sums, self._tokens = {}, {}

    # -- reading -----------------------------------------------------------------------------------------------------

    def of(self, layer: str) -> Tensor | None:
        """``X^T X / N`` of a layer's inputs, ``[I, I]`` float32; None before the first observation."""
        return self._moments.get(self._group[layer])

    def for_units(self, unit_type: str) -> dict[str, Tensor]:
        """Moments by layer of those that read units of a type."""
        return {name: self._moments[self._group[name]] for name in self._columns[unit_type]}

    @property
    def ready(self) -> bool:
        """Whether every layer has been seen."""
        return set(self._group.values()) <= self._moments.keys()

    # -- following the model -----------------------------------------------------------------------------------------

    def mask(self, structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> None:
        """Forget the inputs that are masked, which are zero from now on."""
        for name, _, gone in self._touched(structure, removal):
            moment = self._moments[name]
            moment[gone] = 0.0
            moment[:, gone] = 0.0

    def compact(self, structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> None:
        """Drop the inputs that are removed; `structure` is the one before the removal."""
        for name, kept, _ in self._touched(structure, removal):
            self._moments[name] = self._moments[name].index_select(0, kept).index_select(1, kept)

    def _touched(
        self, structure: Structure, removal: Mapping[str, Sequence[Tensor]]
    ) -> list[tuple[str, Tensor, Tensor]]:
        """Matrices whose inputs go: name, indices that stay, indices that go."""
        found = []
        for unit_type, places in removal.items():
            if unit_type not in self._columns:
                continue
            tables = kept_indices(structure, {unit_type: places})
            for name in dict.fromkeys(self._group[layer] for layer in self._columns[unit_type]):
                if name not in self._moments:
                    continue
                device = self._moments[name].device
                # A tied head is listed as the embedding, whose columns are the same.
                entries = tables.get(f"{name}.weight") or tables[_embedding(structure)]
                inputs = len(self._moments[name])
                (entry,) = [e for e in entries if len(e.kept) + len(e.gone) == inputs][-1:]
                found.append((name, entry.kept.to(device), entry.gone.to(device)))
        return found

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Moments and counters; nothing of a step that is running."""
        return {"observations": self.observations, "moments": dict(self._moments)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take up the moments of `state_dict`."""
        self.observations = int(state["observations"])
        self._moments = {name: moment.to(device) for name, moment in state["moments"].items()}


def _groups(structure: Structure, types: Sequence[str]) -> dict[str, str]:
    """The layer that stands for each reader: the first with the same parent among those of one type."""
    group: dict[str, str] = {}
    for unit_type in types:
        if unit_type == "layer":
            continue
        for place in structure.readers(unit_type):
            first: dict[str, str] = {}
            for name in place:
                group[name] = first.setdefault(name.rpartition(".")[0], name)
    return group


def _embedding(structure: Structure) -> str:
    embedding = structure.model.get_input_embeddings()  # type: ignore[operator]
    return next(f"{name}.weight" for name, module in structure.modules().items() if module is embedding)
