"""The shrunken model as an ordinary one: a configuration that transformers reads, without remote code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.structure.families import find_family
from lightning_prune.structure.removal_checks import check_sizes, needs_other_class
from lightning_prune.structure.units import find_language_model, read_structure
from lightning_prune.targets import clean_name


def plain_model(model: nn.Module) -> nn.Module:
    """The model to save: itself, or one of another class with the same parameters where its configuration refuses.

    Llama's configuration wants a hidden size that its heads divide. Otherwise the parameters become those of a Mistral
    without sliding window, which computes the same. Parameters are shared, not copied.

    Args:
        model: A causal language model of a known family, or a module that holds one.

    Raises:
        ValueError: no ordinary configuration has the model's sizes.
    """
    _, inner = find_language_model(model)
    family = find_family(inner)
    config: Any = inner.config
    if not family.heads_divide_hidden or config.hidden_size % config.num_attention_heads == 0:
        return inner
    structure = read_structure(inner)
    check_sizes(structure, structure.sizes)
    assert needs_other_class(structure) is None
    assert family.saved_as is not None
    return _converted(inner, family.saved_as)


def _converted(model: Any, model_type: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = model.config.to_dict()
    known = AutoConfig.for_model(model_type).to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        fields.pop(name, None)
    fields = {name: value for name, value in fields.items() if name in known}
    config = AutoConfig.for_model(model_type, **{**fields, "sliding_window": None})
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):  # names only; the tensors are the model's own
        plain: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    plain.load_state_dict(dict(model.named_parameters(remove_duplicate=False)), assign=True, strict=True)
    plain.tie_weights()
    buffers = {clean_name(name): b for name, b in model.named_buffers()}
    for name, _ in list(plain.named_buffers()):  # not saved, so not in the state dict: rotary frequencies
        owner, _, attribute = name.rpartition(".")
        plain.get_submodule(owner)._buffers[attribute] = buffers[name]
    plain.generation_config = model.generation_config
    return plain.train(model.training)  # type: ignore[no-any-return]


def save_plain(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Save as a plain transformers folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Args:
        model: A causal language model of a known family, or a module that holds one.
        folder: Created if it does not exist.
        tokenizer: Saved beside it.

    Raises:
        ValueError: see `plain_model`.
    """
    plain: Any = plain_model(model)
    plain.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
