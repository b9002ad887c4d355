"""Load checkpoints of shrunken models: resize the module before its weights are loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import lightning as L
from torch import Tensor, arange, nn, tensor
from transformers import PretrainedConfig

from lightning_prune.checkpoints.reading import open_checkpoint
from lightning_prune.checkpoints.states import find_misfit
from lightning_prune.errors import CheckpointError
from lightning_prune.structure.removal import remove_units, set_epsilon
from lightning_prune.structure.sizes import SIZE_NAMES, AttentionUnit, Sizes, units_to_remove
from lightning_prune.structure.units import Structure, read_structure


def before_loading(module: L.LightningModule, prepare: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
    """Call `prepare(checkpoint)` ahead of the module's own ``on_load_checkpoint``, where shapes can still change.

    A callback's ``on_load_checkpoint`` comes after the weights.

    Returns:
        What takes it off again.
    """
    original = module.on_load_checkpoint

    def on_load_checkpoint(checkpoint: dict[str, Any]) -> None:
        prepare(checkpoint)
        original(checkpoint)

    module.__dict__["on_load_checkpoint"] = on_load_checkpoint
    return lambda: module.__dict__.pop("on_load_checkpoint", None)


def check_before_loading(
    strategy: Any, module: L.LightningModule, state_key: str, attention_unit: AttentionUnit
) -> Callable[[], None]:
    """Have a strategy that loads into shards refuse what would not fit, or not be what it was, before it loads any.

    Shards cannot be sliced when the checkpoint is known, and a full one that is larger would be cut to fit. Lightning
    numbers the optimizer states of a full checkpoint as the model's parameters; other strategies number them as the
    optimizer's, which would give them to other parameters.

    Args:
        strategy: Whose ``load_checkpoint`` is wrapped.
        module: To load into.
        state_key: Of the callback whose state says the sizes.
        attention_unit: See `read_structure`.

    Returns:
        What takes it off again.
    """
    original = strategy.load_checkpoint

    @wraps(original)
    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            state = open_checkpoint(checkpoint_path).callbacks.get(state_key)
        except CheckpointError:  # Lightning's to say, which may have been told to trust it
            state = None
        if state:
            _check_for_shards(state, read_structure(module, attention_unit).sizes)
        return original(checkpoint_path, *args, **kwargs)

    strategy.__dict__["load_checkpoint"] = load_checkpoint
    return lambda: strategy.__dict__.pop("load_checkpoint", None)


def _check_for_shards(state: Mapping[str, Any], sizes: Sizes) -> None:
    if not state.get("sharded"):
        raise ValueError(
            "the checkpoint was written on one device or under DDP, and its optimizer states cannot be loaded into "
            "shards: resume there, or start a new training from CausalLM.load_from_checkpoint(path)"
        )
    if (saved := Sizes(**state["shrinking"]["sizes"])) != sizes:
        raise ValueError(
            f"the checkpoint's model has {saved.as_dict()}, the module {sizes.as_dict()}: build the module with the "
            "configuration that the training began with"
        )


def refuse_other_shapes(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of weights alone, which does not say what a model has lost, where they do not fit.

    Raises:
        ValueError: naming a weight, and how to load them.
    """
    if "callbacks" not in checkpoint and (misfit := find_misfit(module, checkpoint)):
        raise ValueError(
            f"the checkpoint has weights alone (save_weights_only=True), in other sizes than the module: {misfit}. "
            f"Load it with {type(module).__name__}.load_from_checkpoint(path), if hyper-parameters of the module hold "
            "the configuration, and leave ckpt_path out; to resume, save full checkpoints"
        )


def take_saved_shapes(modules: Iterable[nn.Module], state: Mapping[str, Any], attention_unit: AttentionUnit) -> None:
    """`take_shapes` with what a callback's state of a checkpoint says."""
    saved = state["shrinking"]
    for module in modules:
        take_shapes(module, Sizes(**saved["sizes"]), saved["layers_left"], state["epsilon"], attention_unit)


def take_shapes(
    model: nn.Module,
    sizes: Sizes,
    layers_left: list[int],
    epsilon: float | None,
    attention_unit: AttentionUnit = "group",
) -> None:
    """Shrink a model to the sizes of a checkpoint; its weights, which are to be loaded, become arbitrary ones.

    Args:
        model: A causal language model, or a module that holds one. One that has the sizes already is left as it is.
        sizes: To end with.
        layers_left: The layers of the first model that are left, which tell layers by their number.
        epsilon: Of the RMS norms; None for LayerNorms.
        attention_unit: See `read_structure`.

    Raises:
        ValueError: the model is smaller, or of other heads.
    """
    structure = read_structure(model, attention_unit)
    counts = units_to_remove(structure.sizes, sizes, attention_unit)
    if structure.sizes.head_dim != sizes.head_dim or any(count < 0 for count in counts.values()):
        raise ValueError(
            f"the checkpoint's model has {sizes.as_dict()}, which the module's {structure.sizes.as_dict()} cannot "
            "shrink to: load it into a module that is built anew, with the configuration that the training began with, "
            "by a Trainer with PruningAwarePretraining; or with load_from_checkpoint, if hyper-parameters of the "
            "module hold the configuration"
        )
    removal: dict[str, list[Tensor]] = {}
    for unit_type, count in counts.items():
        if unit_type == "layer":
            gone = sorted(set(range(structure.sizes.num_hidden_layers)) - set(layers_left))
            if len(gone) != count:
                raise ValueError(
                    f"the checkpoint kept the layers {layers_left} of the first model, which the module's "
                    f"{structure.sizes.num_hidden_layers} layers are not: build it with the first configuration"
                )
            removal[unit_type] = [tensor(gone)]
        else:
            units = structure.units(unit_type)
            removal[unit_type] = [arange(units - count, units)] * structure.places(unit_type)
    if removal:
        remove_units(model, removal, attention_unit=attention_unit)
    if epsilon is not None:
        set_epsilon(read_structure(model, attention_unit), epsilon)


def epsilon_of(structure: Structure) -> float | None:
    """Epsilon of the RMS norms, which changes with the hidden size; None for LayerNorms."""
    name = structure.family.eps_field
    return None if name is None else float(getattr(structure.config, name))


def unsaid_fields(hyper_parameters: Mapping[str, Any], structure: Structure, changing: Iterable[str]) -> list[str]:
    """Name the fields of the configuration that change, and that hyper-parameters of a module do not hold.

    Args:
        hyper_parameters: Of the module; one that holds the configuration says all.
        structure: Of its model.
        changing: Sizes that may change.
    """
    if any(map(_is_config, hyper_parameters.values())):
        return []
    family, other = structure.family, _other_names(structure.config)
    names = [family.fields_of(size)[0] for size in changing]
    if "hidden_size" in names and family.eps_field is not None:
        names.append(family.eps_field)
    return [name for name in names if hyper_parameters.keys().isdisjoint({name, other.get(name, name)})]


def _is_config(value: Any) -> bool:
    """Whether a hyper-parameter is a configuration: an object of transformers', or a mapping that names its family."""
    named = value.get("model_type") if isinstance(value, Mapping) else None
    return isinstance(value, PretrainedConfig) or isinstance(named, str)


def _same(value: Any, other: Any) -> bool:
    """Whether a hyper-parameter, of any kind, holds a value of a configuration."""
    try:
        return bool(value == other)
    except (RuntimeError, TypeError, ValueError):  # arrays
        return False


def _other_names(config: Any) -> Mapping[str, str]:
    """Fields by the names that other configurations have for them, such as GPT-2's ``n_embd`` for ``hidden_size``."""
    return getattr(config, "attribute_map", {})


@contextmanager
def updating_hyper_parameters(module: L.LightningModule) -> Iterator[None]:
    """Write what the block changes in the configuration into the module's hyper-parameters, which checkpoints carry.

    A hyper-parameter called as a field of the configuration, and mappings or configurations of the model's sizes, are
    updated where they hold the old values; all else, such as a teacher's, is the module's own business.
    """
    structure, found = read_structure(module), module.hparams
    model: Any = structure.model
    old, before, other = model.config, copy.deepcopy(model.config.to_dict()), _other_names(model.config)
    sizes = {other.get(name, name) for size in SIZE_NAMES for name in structure.family.fields_of(size)} | {"model_type"}

    def plain(config: Any) -> dict[str, Any]:
        fields = config.to_dict() if isinstance(config, PretrainedConfig) else config
        return {other.get(name, name): value for name, value in fields.items()}

    own = {
        name
        for name, value in found.items()
        if value is old
        or (
            _is_config(value)
            and all(v is None or _same(v, before.get(k)) for k, v in plain(value).items() if k in sizes)
        )
    }
    try:
        yield
    finally:  # what has failed after the model has changed, too
        after = copy.deepcopy(model.config.to_dict())
        changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
        for name, value in list(found.items()) if after != before else ():
            if name in own and isinstance(value, Mapping):
                found[name] = {**plain(value), **after}  # all of it: defaults follow from sizes, and from the class
            elif name in own:
                found[name] = model.config if value is old else copy.deepcopy(model.config)
            elif name in changed and _same(value, before[name]):
                found[name] = after[name]
