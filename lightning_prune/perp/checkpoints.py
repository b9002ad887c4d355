"""Checkpoints that `PERPRetraining` wrote before the merge: read as if the adapters were merged, to the bit.

Such a checkpoint holds base weights and adapters under PEFT's names; how they combine is in the callback's state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checkpoints import Checkpoint, fail
from lightning_prune.enforcement import to_bytes
from lightning_prune.perp.variants import find_variant
from lightning_prune.stored_masks import StoredMasks
from lightning_prune.targets import clean_name

_CALLBACK = "PERPRetraining"
_Load = Callable[[], Tensor]


def has_adapters(names: Iterable[str]) -> bool:
    """Whether tensors of these names include adapters beside the weights they belong to."""
    names = list(names)
    return any(".lora_A." in name for name in names) and any(".base_layer." in name for name in names)


def merged_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapters merged, tensor by tensor when they are read; any other as it is.

    Raises:
        CheckpointError: adapters of something else than `PERPRetraining`, or of a kind that cannot be merged.
    """
    names = checkpoint.names()
    if not has_adapters(names) or _state_of(checkpoint.callbacks) is None:
        return checkpoint
    adapters = _Adapters(checkpoint.path, checkpoint.callbacks)
    kept = [name for name in names if not _is_adapter(name)]
    return dataclasses.replace(
        checkpoint,
        count=len(kept),
        entries=lambda: adapters.merged(dict(checkpoint.entries())),
        callbacks=_renamed_masks(checkpoint.callbacks),
        ties={plain_name(name): plain_name(first) for name, first in checkpoint.ties.items()},
    )


def merged_state(state: Mapping[str, Tensor], callbacks: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """A state dict with its adapters merged, under the names of the plain model.

    Args:
        state: Of a checkpoint.
        callbacks: States of its callbacks.
        path: What errors call the checkpoint.

    Raises:
        CheckpointError: see `merged_checkpoint`.
    """
    if _state_of(callbacks) is None:
        fail(
            Path(path),
            "holds adapters that PERPRetraining did not make; merge them with the program that did, and save again",
        )
    loads: dict[str, _Load] = {name: tensor.detach for name, tensor in state.items()}
    return {name: load() for name, load in _Adapters(Path(path), callbacks).merged(loads)}


def plain_name(name: str) -> str:
    """A parameter's name in the LightningModule without what PEFT puts into it.

    >>> plain_name("model.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.model.layers.0.mlp.up_proj.weight'
    """
    return clean_name(name).replace("base_model.model.", "", 1).replace(".base_layer.", ".")


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _state_of(callbacks: Mapping[str, Any]) -> Mapping[str, Any] | None:
    states = (state for key, state in callbacks.items() if str(key).startswith(_CALLBACK))
    return next((state for state in states if isinstance(state, Mapping) and state), None)


def _renamed_masks(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """States of callbacks, in which `WeightPruning` calls the parameters by their plain names."""
    return {
        key: {**state, "masks": {plain_name(name): mask for name, mask in state["masks"].items()}}
        if isinstance(state, Mapping) and isinstance(state.get("masks"), Mapping)
        else state
        for key, state in callbacks.items()
    }


class _Adapters:
    """What the callback's state says of adapters, and the masks of `WeightPruning` or of its own."""

    def __init__(self, path: Path, callbacks: Mapping[str, Any]) -> None:
        self._path = path
        state = _state_of(callbacks) or {}
        settings, layers = state.get("settings"), state.get("layers")
        if not isinstance(settings, Mapping) or not isinstance(layers, Mapping):
            fail(path, f"the state of its {_CALLBACK} callback is damaged, or of another version")
        self._layers, adapter = layers, settings.get("adapter")
        try:
            self._variant = find_variant(adapter)
        except ValueError as error:
            fail(path, f"its adapters are of another program, or damaged: {error}")
        if not self._variant.mergeable:
            fail(
                path,
                f"its adapters are adapter={adapter!r}, whose product is dense and cannot be merged into pruned "
                "weights: resume with PERPRetraining(merge=False), and keep them apart with "
                "lightning_prune.perp.save_adapter",
            )
        packed = dict(state.get("masks") or {})
        for key, other in _renamed_masks(callbacks).items():
            if str(key).startswith("WeightPruning") and isinstance(other, Mapping):
                packed.update(other.get("masks") or {})
        self._masks = StoredMasks(path, packed, None)

    def merged(self, loads: Mapping[str, _Load]) -> Iterator[tuple[str, _Load]]:
        """Plain names, and functions that load what the weights are after the merge."""
        for name, load in loads.items():
            if _is_adapter(name):
                continue
            parts = self._parts_of(name, loads)
            plain = plain_name(name)
            yield plain, load if parts is None else self._merging(plain, load, *parts)

    def _parts_of(self, name: str, loads: Mapping[str, _Load]) -> tuple[_Load, _Load] | None:
        """How to load A and B of a base layer's weight; None for any other tensor."""
        module, found, parameter = name.rpartition(".base_layer.")
        if not found or parameter != "weight":
            return None
        pair = []
        for matrix in ("lora_A", "lora_B"):
            own = [load for other, load in loads.items() if other.startswith(f"{module}.{matrix}.")]
            if len(own) != 1:
                fail(self._path, f"{module!r} has {len(own)} matrices {matrix}; one was expected")
            pair.extend(own)
        return pair[0], pair[1]

    def _merging(self, name: str, base: _Load, first: _Load, second: _Load) -> _Load:
        tails = (value for key, value in self._layers.items() if f".{name}".endswith(f".{key}.weight"))
        layer = next(tails, None)
        if not isinstance(layer, Mapping):
            fail(self._path, f"the state of its {_CALLBACK} callback knows no adapter of {name!r}; it is damaged")
        scaling, transposed = float(layer["scaling"]), bool(layer["transposed"])

        @torch.no_grad()
        def load() -> Tensor:
            weight, a, b = base(), first(), second()
            mask = self._masks.take(name, tuple(weight.shape))
            kept = to_bytes(weight != 0 if mask is None else mask, weight.device)
            factors = self._variant.factors_of(a, b, scaling, transposed)
            return self._variant.combination()(weight, kept, *factors, None)

        return load
