"""Read what callbacks left in a checkpoint: masks, masked units, adapters."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_prune.checkpoints.reading import Checkpoint, fail, open_checkpoint
from lightning_prune.errors import CheckpointError
from lightning_prune.naming import clean_name, without_base_layers
from lightning_prune.pruning.clearing import to_bytes
from lightning_prune.pruning.masks import PackedMasks, unpack_masks
from lightning_prune.safety import is_stored_whole
from lightning_prune.structure.saving import MaskedUnits
from lightning_prune.structure.sizes import ATTENTION_UNITS

if TYPE_CHECKING:
    from lightning_prune.perp.layers import SparseLayer

_PRUNING, _SHRINKING, _RETRAINING = "WeightPruning", "PruningAwarePretraining", "PERPRetraining"


def states_of(callbacks: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the states that callbacks of one class of this package, or of its subclasses, left in a checkpoint.

    Args:
        callbacks: States by key, as in a Lightning checkpoint.
        kind: Name of the class.
    """
    return {
        str(key): state
        for key, state in callbacks.items()
        if state
        and (re.match(rf"{kind}\b", str(key)) or (isinstance(state, Mapping) and state.get("callback") == kind))
    }


def shrunk_sizes(callbacks: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Return sizes and parameters of a model before `PruningAwarePretraining` and now; empty for any other."""
    found: dict[str, tuple[Any, Any]] = {}
    for state in states_of(callbacks, _SHRINKING).values():
        shrinking = state.get("shrinking") if isinstance(state, Mapping) else None
        kept = shrinking if isinstance(shrinking, Mapping) else {}
        first, now, history = kept.get("first"), kept.get("sizes"), kept.get("history")
        if isinstance(history, list) and history and all(isinstance(record, Mapping) for record in history):
            found["parameters"] = (history[0].get("parameters"), history[-1].get("parameters"))
        if isinstance(first, Mapping) and isinstance(now, Mapping):
            found |= {str(name): (value, now.get(name)) for name, value in first.items()}
    return {n: (a, b) for n, (a, b) in found.items() if isinstance(a, int) and isinstance(b, int)}


@dataclass(frozen=True)
class StoredMasks:
    """The masks that `WeightPruning` callbacks left in a checkpoint, unpacked one at a time.

    Attributes:
        path: Of the checkpoint, for errors.
        packed: Masks as they are stored, by name.
        score: Name of the score that made them; of several callbacks, all names.
        settings: What else each callback says of how it pruned, in plain values.
        uncounted: Names of embeddings that their names do not show to be such; see `lightning_prune.pruning.coverage`.
        tensors: Names of the tensors that the masks are for; a mask that has the name of one is of no other.
    """

    path: Path
    packed: Mapping[str, Any]
    score: str | None = None
    settings: Sequence[dict[str, Any]] = ()
    uncounted: frozenset[str] = frozenset()
    tensors: frozenset[str] = frozenset()

    @property
    def names(self) -> set[str]:
        """Names of the masks."""
        return set(self.packed)

    @property
    def count(self) -> int:
        """Number of masks."""
        return len(self.packed)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredMasks | None:
        """The masks of all `WeightPruning` callbacks, or None without such a callback."""
        states = states_of(checkpoint.callbacks, _PRUNING).values()
        if not states:
            return None
        packed: dict[str, Any] = {}
        for state in states:
            masks = state.get("masks") if isinstance(state, Mapping) else None
            if not isinstance(masks, Mapping):
                fail(checkpoint.path, "the state of its WeightPruning callback holds no masks; it is damaged")
            packed.update(masks)
        scores = dict.fromkeys(str(state["score"]) for state in states if state.get("score"))
        settings = [dict(s) for state in states if isinstance(s := state.get("settings"), Mapping)]
        uncounted = frozenset(
            name
            for state in states
            if isinstance(names := state.get("uncounted"), (list, tuple))
            for name in names
            if isinstance(name, str)
        )
        tensors = frozenset(map(clean_name, checkpoint))
        return cls(checkpoint.path, packed, ", ".join(scores) or None, settings, uncounted, tensors)

    def counts(self, name: str) -> bool:
        """Whether a tensor may count as a weight that a user would prune: it is not known to be an embedding."""
        return clean_name(name) not in self.uncounted

    def masks(self) -> PackedMasks:
        """All masks by the names they are stored under.

        Raises:
            CheckpointError: a mask is damaged.
        """
        try:
            return unpack_masks(self.packed)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def find(self, name: str) -> str | None:
        """Name of a tensor's mask, or None. Masks may be named from further inside the model than the tensor."""
        name = clean_name(name)
        parts = name.split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        return next((t for t in tails if t in self.packed and (t == name or t not in self.tensors)), None)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of a tensor, or None.

        Raises:
            CheckpointError: the mask is damaged, or not of this shape.
        """
        found = self.find(name)
        if found is None:
            return None
        try:
            mask = unpack_masks({found: self.packed[found]})[found]
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        if tuple(mask.shape) != shape:
            fail(self.path, f"{name!r} has shape {shape}, its mask {tuple(mask.shape)}")
        return mask


def stored_units(checkpoint: Checkpoint) -> MaskedUnits | None:
    """The units that a `PruningAwarePretraining` callback had masked when it was saved; None where there are none.

    Raises:
        CheckpointError: the callback's state is damaged.
    """
    try:
        return units_in(checkpoint.callbacks)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def units_in(callbacks: Mapping[str, Any], sharded: bool = False) -> MaskedUnits | None:
    """`stored_units` of the states of callbacks.

    Args:
        callbacks: States by key, as in a Lightning checkpoint.
        sharded: Only of a callback whose model was sharded, where units stay masked to the end.

    Raises:
        ValueError: the callback's state is damaged.
    """
    for state in states_of(callbacks, _SHRINKING).values():
        try:
            pending, unit = state["shrinking"]["pending"], state["settings"]["attention_unit"]
            whole = all(isinstance(t, Tensor) and is_stored_whole(t) for places in pending.values() for t in places)
            counts = bool(state.get("sharded")) or not sharded
        except (KeyError, TypeError, AttributeError):
            pending, unit, whole, counts = {}, None, False, False
        if not whole or unit not in ATTENTION_UNITS:
            raise ValueError(f"the state of its {_SHRINKING} callback is damaged: it does not say what is masked")
        if pending and counts:
            return MaskedUnits({str(t): list(places) for t, places in pending.items()}, unit)
    return None


# -- groups of optimizers --------------------------------------------------------------------------------------------

# Of the states of torch's schedules.
_FOR_EACH_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs")


def follow_shrunk_checkpoints(trainer: Any) -> None:
    """Have a Trainer's strategy load what `PruningAwarePretraining` has shrunk, or say why not; call it in ``setup``.

    A module of other sizes is refused. Optimizer states are loaded without groups whose layers are gone: optimizers
    that trained on when layers went keep a group of them, empty, since learning rate schedules count groups. Those that
    a module makes for the small model may have none for it.
    """
    strategy = trainer.strategy
    original: Any = strategy.load_optimizer_state_dict
    load_weights: Any = strategy.load_model_state_dict

    @wraps(load_weights)
    def load_model_state_dict(checkpoint: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        shrunk = states_of(checkpoint.get("callbacks", {}), _SHRINKING)
        if shrunk and (misfit := find_misfit(strategy.lightning_module, checkpoint)):
            name = type(strategy.lightning_module).__name__
            raise ValueError(
                f"the checkpoint is of a model that PruningAwarePretraining has shrunk: {misfit}. Put that callback "
                f"into this Trainer too, as it was; or build the small module with {name}.load_from_checkpoint(path)"
            )
        return load_weights(checkpoint, *args, **kwargs)

    @wraps(original)
    def load_optimizer_state_dict(checkpoint: Mapping[str, Any]) -> None:
        if states_of(checkpoint.get("callbacks", {}), _SHRINKING):
            _leave_emptied_groups(checkpoint, strategy)
        original(checkpoint)

    # One by one: a second fit of the Trainer may find that others have put their own in the place of one.
    functions: tuple[Any, ...] = (load_optimizer_state_dict, load_model_state_dict)
    for function in functions:
        if not getattr(getattr(strategy, function.__name__), "of_shrunk", False):
            function.of_shrunk = True
            strategy.__dict__[function.__name__] = function


def find_misfit(module: nn.Module, checkpoint: Mapping[str, Any]) -> str | None:
    """Find a weight of a checkpoint that has another shape in the module, and say both; None where all fit."""
    own = module.state_dict()
    for name, saved in checkpoint.get("state_dict", {}).items():
        if isinstance(saved, Tensor) and name in own and own[name].shape != saved.shape:
            return f"{name!r} has {tuple(saved.shape)} there, {tuple(own[name].shape)} here"
    return None


def _leave_emptied_groups(checkpoint: Mapping[str, Any], strategy: Any) -> None:
    """Change a checkpoint in place, ahead of the states of optimizers and schedules being loaded."""
    for state, optimizer in zip(checkpoint.get("optimizer_states", ()), strategy.optimizers, strict=False):
        groups, own = state["param_groups"], [bool(group["params"]) for group in optimizer.param_groups]
        left: list[bool] = []
        for group in groups:  # an empty one stays where the new optimizer has one in its place
            left.append(bool(group["params"]) or own[sum(left) :][:1] == [False])
        if sum(left) == len(own) < len(groups):
            state["param_groups"] = list(compress(groups, left))
            schedules = zip(strategy.lr_scheduler_configs, checkpoint.get("lr_schedulers", ()), strict=False)
            for config, rates in schedules:
                if getattr(config.scheduler, "optimizer", None) is optimizer:
                    _leave_rates(rates, left)


def _leave_rates(schedule: dict[str, Any], left: Sequence[bool]) -> None:
    """Take what a schedule's state has for each group from those that are gone."""
    for key in _FOR_EACH_GROUP:
        if isinstance(values := schedule.get(key), list) and len(values) == len(left):
            schedule[key] = list(compress(values, left))
    for inner in schedule.get("_schedulers", ()):  # of SequentialLR and ChainedScheduler
        _leave_rates(inner, left)


# -- adapters --------------------------------------------------------------------------------------------------------

# Of a layer's weight, or of one of several parameters of experts.
_MATRIX = re.compile(r"(?P<module>.*)\.(?P<matrix>lora_[AB])\.[^.]+\.(?P<parameter>.+)")
UNMERGED = "unmerged"
"""Where the callback's state holds base weights and adapters, by the names of the module that trains them."""
_Load = Callable[[], Tensor]
_PEFT = "base_model.model."


# -- what is written and resumed -------------------------------------------------------------------------------------


@torch.no_grad()
def save_merged(checkpoint: dict[str, Any], module: nn.Module, attribute: str, state_key: str) -> None:
    """Make a checkpoint that is about to be written one of the plain module, with adapters merged.

    The merged weights are made one after the other, in main memory. What they were made of goes into the callback's
    state, where the checkpoint has one (``save_weights_only=True`` leaves it out).

    Args:
        checkpoint: As Lightning has made it, with what is in the module, or an average of it; changed in place.
        module: The LightningModule, with adapters or without.
        attribute: Name of its attribute with the model that was adapted.
        state_key: Of the callback.
    """
    state: Mapping[str, Tensor] = checkpoint.get("state_dict", {})
    layers = _adapted_layers(module)
    parts = {name: _part_names(name, layer) for name, layer in layers.items()}
    if not all(layer.variant.mergeable for layer in layers.values()):
        return
    if not layers or not all(key in state for keys in parts.values() for key in keys):  # a state dict of the user's own
        return
    owners = {keys[0]: name for name, keys in parts.items()}
    taken = {key for keys in parts.values() for key in keys}
    merged = {}
    for key, tensor in state.items():
        if key in owners:
            _, first, second = parts[owners[key]]
            tensor = layers[owners[key]].merged_with(tensor, state[first], state[second]).cpu()
        elif key in taken:
            continue
        merged[_without_peft(key, attribute)] = tensor
    checkpoint["state_dict"] = merged
    callbacks = checkpoint.get("callbacks")
    if callbacks is not None:
        rename = lambda name: _without_peft(name, attribute)  # noqa: E731
        callbacks = _renamed_masks(callbacks, rename)
        callbacks[state_key] = {**callbacks.get(state_key, {}), UNMERGED: {key: state[key] for key in sorted(taken)}}
        checkpoint["callbacks"] = callbacks


def load_into(checkpoint: dict[str, Any], module: nn.Module, attribute: str, state_key: str) -> None:
    """Make the state dict of a loaded checkpoint one that a module can load, with its adapters or without.

    Args:
        checkpoint: Changed in place.
        module: See `save_merged`.
        attribute: See `save_merged`.
        state_key: See `save_merged`.

    Raises:
        ValueError: the module has adapters, and the checkpoint none for them, or others.
        CheckpointError: see `merged_checkpoint`.
    """
    state, adapted = checkpoint.get("state_dict", {}), bool(_adapted_layers(module))
    if has_adapters(state, module) == adapted:
        return
    callbacks = checkpoint.get("callbacks") or {}
    if not adapted:
        checkpoint["state_dict"], checkpoint["callbacks"] = merged_parts(state, callbacks, "the checkpoint")
        return
    unmerged = (callbacks.get(state_key) or {}).get(UNMERGED)
    if not unmerged:
        raise ValueError(
            "the checkpoint holds a model without the adapters that PERPRetraining has put on this module: it was "
            "written without PERPRetraining, with save_weights_only=True, or after the merge. Load it with "
            "load_from_checkpoint, and start a new fit from there, without ckpt_path"
        )
    check_adapters(unmerged, module)
    names = {_without_peft(key, attribute): key for key in module.state_dict() if not _is_adapter(key)}
    checkpoint["state_dict"] = {**{names.get(key, key): tensor for key, tensor in state.items()}, **unmerged}
    checkpoint["callbacks"] = _renamed_masks(callbacks, lambda name: names.get(name, name))


def check_adapters(tensors: Iterable[str], module: nn.Module) -> None:
    """Refuse a checkpoint whose adapters are not on the layers that have some in the module, or of other ranks.

    Args:
        tensors: Of the checkpoint, by their names in the module that trained them; or these names alone.
        module: To load them.

    Raises:
        ValueError: naming a layer.
    """
    state, others = module.state_dict(), _others(module)
    ours = {key for name, layer in _adapted_layers(module).items() for key in _part_names(name, layer)[1:]}
    saved = {plain_name(name): name for name in tensors if _is_adapter(name) and name not in others}
    own = {plain_name(name): name for name in ours}
    refused = "so it cannot be resumed: give PERPRetraining"

    def layer(name: str) -> str:
        return re.sub(r"\.lora_[AB]\.[^.]+(\.weight$)?", "", name)

    if differing := saved.keys() ^ own.keys():
        name = min(differing)
        here, there = ("an", "none") if name in own else ("no", "one")
        raise ValueError(
            f"{layer(name)!r} has {here} adapter in this module and {there} in the checkpoint, {refused} what says "
            "which layers have one as it was then (target_modules, and exclude_modules, layers_to_transform and "
            "layers_pattern in lora_options)"
        )
    if isinstance(tensors, Mapping):
        for name, key in saved.items():
            then, now = tensors[key].shape[-2], state[own[name]].shape[-2]
            if ".lora_A." in name and then != now:
                raise ValueError(
                    f"the adapter of {layer(name)!r} has the rank {now} in this module and {then} in the checkpoint, "
                    f"{refused} the r, and the rank_pattern in lora_options, that it had then"
                )


def add_states(checkpoint: dict[str, Any], states: Mapping[str, Mapping[str, Any]]) -> None:
    """Have a checkpoint that stays unmerged say how to merge it, also where it was to hold weights only."""
    checkpoint["callbacks"] = {**states, **checkpoint.get("callbacks", {})}


def load_merged_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint for the plain LightningModule, with adapters merged that were being trained.

    Only needed for checkpoints written under FSDP2: others hold it as their ``state_dict``.

    Args:
        path: A ``.ckpt`` file, or the folder of a distributed checkpoint.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its adapters cannot be merged.

    Example::

        module.load_state_dict(load_merged_state("last.ckpt"))
    """
    return dict(merged_checkpoint(open_checkpoint(path)))


def _adapted_layers(module: nn.Module) -> dict[str, SparseLayer]:
    """The layers with adapters, by name."""
    # Imported here, since it takes peft and transformers with it, which reading a plain checkpoint has no need of.
    from lightning_prune.perp.layers import SparseLayer

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, SparseLayer)}


def _part_names(name: str, layer: SparseLayer) -> tuple[str, str, str]:
    """Keys of the base weight, A and B of a layer in the module's state dict."""
    (adapter,), own = layer.lora_A, layer.parameter_name
    base = next(key for key, p in layer.named_parameters(name) if p is layer.base_weight)  # of experts further inside
    return base, f"{name}.lora_A.{adapter}.{own}", f"{name}.lora_B.{adapter}.{own}"


def _without_peft(name: str, attribute: str) -> str:
    """A key of the module's state dict as it is without adapters; other wrappers' parts of it stay."""
    prefix = f"{attribute}.{_PEFT}"
    return without_base_layers(f"{attribute}.{name.removeprefix(prefix)}") if name.startswith(prefix) else name


# -- what is read as if it were merged -------------------------------------------------------------------------------


def has_adapters(names: Iterable[str], module: nn.Module) -> bool:
    """Whether tensors of these names include adapters beside the weights they belong to, others than PEFT's own.

    Args:
        names: Of the tensors of a checkpoint.
        module: To load them. What it has under the same names is none of ours.
    """
    others = _others(module)
    names = [name for name in names if name not in others]
    return any(".lora_A." in name for name in names) and any(".base_layer." in name for name in names)


def _others(module: nn.Module) -> set[str]:
    """Tensors of a module that belong to no adapter of ours, such as adapters of PEFT on another model in it."""
    ours = {key for name, layer in _adapted_layers(module).items() for key in _part_names(name, layer)}
    return set(module.state_dict().keys() - ours)


def merged_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapters merged, tensor by tensor when they are read; any other as it is.

    Adapters of PEFT on another model in the module stay as they are.

    Raises:
        CheckpointError: adapters of something else than `PERPRetraining`, or of a kind that cannot be merged.
    """
    state = _state_of(checkpoint.callbacks)
    prefix = None if state is None else _prefix_in(checkpoint, state, checkpoint.path)
    if prefix is None:
        return checkpoint
    adapters = _Adapters(checkpoint.path, checkpoint.callbacks, checkpoint, prefix)
    return dataclasses.replace(
        checkpoint,
        loaders=dict(adapters.merged(checkpoint.loaders)),
        callbacks=_renamed_masks(checkpoint.callbacks, adapters.plain_name),
        ties={adapters.plain_name(name): adapters.plain_name(first) for name, first in checkpoint.ties.items()},
    )


def merged_parts(
    state: Mapping[str, Tensor], callbacks: Mapping[str, Any], path: str | Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict with its adapters merged, under the names of the plain model, and the callbacks' states with these.

    Raises:
        CheckpointError: see `merged_checkpoint`.
    """
    own = _state_of(callbacks)
    if own is None:
        fail(
            Path(path),
            "holds adapters that PERPRetraining did not make; merge them with the program that did, and save again",
        )
    prefix = _prefix_in(state, own, Path(path))
    if prefix is None:
        return dict(state), dict(callbacks)
    loads: dict[str, _Load] = {name: tensor.detach for name, tensor in state.items()}
    adapters = _Adapters(Path(path), callbacks, loads, prefix)
    merged = {name: load() for name, load in adapters.merged(loads)}
    return merged, _renamed_masks(callbacks, adapters.plain_name)


def _prefix_in(names: Iterable[str], state: Mapping[str, Any], path: Path) -> str | None:
    """What names of the model that `PERPRetraining` adapted begin with; None where it is merged, or never was adapted.

    Args:
        names: Of the tensors.
        state: The callback's.
        path: Of the checkpoint, for errors.

    Raises:
        CheckpointError: it was written by a version that did not say which model it was, and it may be either of two.
    """
    adapted = [name for name in map(clean_name, names) if _is_adapter(name)]
    if UNMERGED in state or not adapted:
        return None
    if isinstance(attribute := state.get("attribute"), str):
        prefix = f"{attribute}.{_PEFT}"
        return prefix if any(name.startswith(prefix) for name in adapted) else None
    found = {name.partition(_PEFT)[0] + _PEFT for name in adapted if _PEFT in name}
    layers = state.get("layers")
    if len(found) > 1 and isinstance(layers, Mapping):
        layers_of = {start: {_adapted_by(name.removeprefix(start)) for name in adapted} for start in found}
        found = {start for start, there in layers_of.items() if layers.keys() <= there}
        if len(found) > 1:
            fail(path, f"{' and '.join(sorted(found))} have adapters of the same layers: resume it, and save it again")
    return next(iter(found), None)


def _adapted_by(name: str) -> str:
    """What the callback's state calls the layer of an adapter's matrix, from the matrix' name in the model."""
    match = _MATRIX.fullmatch(without_base_layers(name))
    module, parameter = match.group("module", "parameter") if match else (name, "weight")
    return module if parameter == "weight" else f"{module}.{parameter}"


def plain_name(name: str) -> str:
    """A parameter's name in the LightningModule without what PEFT puts into it.

    >>> plain_name("model.base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.model.layers.0.mlp.up_proj.weight'
    """
    return without_base_layers(clean_name(name).replace(_PEFT, "", 1))


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _state_of(callbacks: Mapping[str, Any]) -> Mapping[str, Any] | None:
    states = states_of(callbacks, _RETRAINING).values()
    return next((state for state in states if isinstance(state, Mapping)), None)


def _renamed_masks(callbacks: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """States of callbacks, in which masks are those of parameters by other names."""
    return {
        key: {**state, "masks": {rename(name): mask for name, mask in state["masks"].items()}}
        if isinstance(state, Mapping) and isinstance(state.get("masks"), Mapping)
        else state
        for key, state in callbacks.items()
    }


class _Adapters:
    """What the callback's state says of adapters, and the masks of `WeightPruning` or of its own."""

    def __init__(self, path: Path, callbacks: Mapping[str, Any], names: Iterable[str], prefix: str) -> None:
        self._path, self._prefix = path, prefix
        state = _state_of(callbacks) or {}
        settings, layers = state.get("settings"), state.get("layers")
        if not isinstance(settings, Mapping) or not isinstance(layers, Mapping):
            fail(path, f"the state of its {_RETRAINING} callback is damaged, or of another version")
        self._layers, adapter = layers, settings.get("adapter")
        try:
            from lightning_prune.perp.layers import find_variant  # takes peft with it

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
        for other in states_of(_renamed_masks(callbacks, self.plain_name), _PRUNING).values():
            if isinstance(other, Mapping):
                packed.update(other.get("masks") or {})
        self._masks = StoredMasks(path, packed, tensors=frozenset(map(self.plain_name, names)))

    def plain_name(self, name: str) -> str:
        """A parameter's name in the LightningModule without what PEFT puts into it."""
        return plain_name(name) if self._is_inside(name) else clean_name(name)

    def _is_inside(self, name: str) -> bool:
        return clean_name(name).startswith(self._prefix)

    def merged(self, loads: Mapping[str, _Load]) -> Iterator[tuple[str, _Load]]:
        """Plain names, and functions that load what the weights are after the merge."""
        matrices: dict[tuple[str, ...], list[_Load]] = {}
        inside = {name: load for name, load in loads.items() if self._is_inside(name)}
        for name, load in inside.items():
            if (found := _MATRIX.fullmatch(without_base_layers(name))) is not None:
                matrices.setdefault(found.group("module", "parameter", "matrix"), []).append(load)
        for name, load in loads.items():
            if name in inside and _is_adapter(name):
                continue
            parts = self._parts_of(name, matrices) if name in inside else None
            plain = self.plain_name(name)
            yield plain, load if parts is None else self._merging(plain, load, *parts)

    def _parts_of(self, name: str, matrices: Mapping[tuple[str, ...], Sequence[_Load]]) -> tuple[_Load, _Load] | None:
        """How to load A and B of a base layer's weight, or of a parameter of experts; None for any other tensor."""
        if ".base_layer." not in name:
            return None
        module, _, parameter = without_base_layers(name).rpartition(".")
        pair: list[_Load] = []
        for matrix in ("lora_A", "lora_B"):
            own = matrices.get((module, parameter, matrix), ())
            if len(own) != 1:
                if parameter != "weight" and self._layer_of(self.plain_name(name)) is None:
                    return None  # biases
                fail(self._path, f"{module!r} has {len(own)} matrices {matrix}; one was expected")
            pair.extend(own)
        return pair[0], pair[1]

    def _layer_of(self, name: str) -> Any:
        """What the callback's state says of a weight, by its plain name; None where it does not know it."""
        name = name.removeprefix(self._prefix.removesuffix(_PEFT))
        return self._layers.get(name, self._layers.get(name.removesuffix(".weight")))

    def _merging(self, name: str, base: _Load, first: _Load, second: _Load) -> _Load:
        layer = self._layer_of(name)
        if not isinstance(layer, Mapping):
            fail(self._path, f"the state of its {_RETRAINING} callback knows no adapter of {name!r}; it is damaged")
        scaling, transposed = float(layer["scaling"]), bool(layer["transposed"])

        @torch.no_grad()
        def load() -> Tensor:
            weight, a, b = base(), first(), second()
            mask = self._masks.take(name, tuple(weight.shape))
            kept = to_bytes(weight != 0 if mask is None else mask, weight.device)
            factors = self._variant.factors_of(a, b, scaling, transposed)
            return self._variant.combination()(weight, kept, *factors, None)

        return load
