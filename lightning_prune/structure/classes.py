"""Give a model the class whose configuration takes its sizes, in place, so that whatever saves it writes what loads."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_prune.naming import clean_name
from lightning_prune.sharding import plain_class
from lightning_prune.structure.families import Family, find_family

_OWN = "_lightning_prune_own_family"


@dataclass(frozen=True)
class ClassChange:
    """The classes that a model and its parts are to have; nothing to do without a `model_type`.

    Attributes:
        model_type: Of the configuration to have.
        classes: By the class that they have.
    """

    model_type: str | None = None
    classes: Mapping[type, type] = field(default_factory=dict)


def own_family(model: nn.Module) -> Family:
    """Return the family that a model was of before its sizes made it another's."""
    return vars(model).get(_OWN) or find_family(model)


def is_own_class(model: nn.Module) -> bool:
    """Return whether the class of a model is one that transformers has not."""
    return not plain_class(model).__module__.startswith("transformers.")


def class_for(model: nn.Module, hidden_size: int, heads: int) -> ClassChange:
    """Look up which classes take these sizes; nothing is changed.

    Llama's configuration wants a hidden size that its heads divide. Otherwise a model becomes a Mistral without sliding
    window, which computes the same with the same parameters; and a Llama again when they divide again.

    Raises:
        ValueError: transformers cannot build the other class from this configuration.
    """
    family, config = own_family(model), _config_of(model)
    refused = family.heads_divide_hidden and hidden_size % heads != 0
    wanted = family.saved_as if refused else family.model_type
    if wanted is None or wanted == config.model_type:
        return ClassChange()
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # names and classes only
        # Of sizes that any configuration takes: the classes do not depend on them. Rotations do on a head's dimensions.
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = {"hidden_size": heads, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": head_dim}
        other = AutoModelForCausalLM.from_config(_converted(config, wanted, **sizes), trust_remote_code=False)
    classes = {name: type(part) for name, part in other.named_modules()}
    ours = type(model).__module__
    parts = {clean_name(name): type(part) for name, part in model.named_modules() if type(part).__module__ == ours}
    return ClassChange(wanted, {part: classes.get(name, part) for name, part in parts.items()})


def change_class(model: nn.Module, change: ClassChange) -> None:
    """Give a model, its parts and its configuration other classes; parameters, buffers and hooks stay what they are."""
    if change.model_type is None:
        return
    vars(model)[_OWN] = own_family(model)
    before = _config_of(model)
    config = _converted(before, change.model_type)
    for part in model.modules():
        part.__class__ = change.classes.get(type(part), type(part))
        if getattr(getattr(part, "config", None), "model_type", None) == before.model_type:
            part.config = config


def _config_of(model: Any) -> Any:
    return model.config


def _converted(config: Any, model_type: str, **sizes: int) -> Any:
    """The configuration as one of another model type, with all fields that this knows."""
    from transformers import AutoConfig

    fields = copy.deepcopy(config.to_dict())
    known = AutoConfig.for_model(model_type).to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    fields = {name: value for name, value in fields.items() if name in known} | sizes
    if "sliding_window" in known:
        fields["sliding_window"] = None
    # Written by no `to_dict`, and read by no public name.
    return AutoConfig.for_model(model_type, **fields, attn_implementation=config._attn_implementation)
