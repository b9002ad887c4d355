"""The shrunken model as an ordinary one: a configuration that transformers reads, without remote code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_prune.progress import is_main_process
from lightning_prune.sharding import has_sharded_parameters
from lightning_prune.structure.families import find_family
from lightning_prune.structure.masked_units import noted_units, sliced_copy
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


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model on the CPU of the first process, empty on the others; every process must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def without_masked_units(model: nn.Module, state: Mapping[str, Tensor] | None) -> nn.Module:
    """A copy of a model without the units that are noted as masked on it; the model itself where there are none.

    Args:
        model: A transformers causal language model.
        state: Its whole weights, where its parameters are shards.

    Raises:
        ValueError: they are not zero any more.
    """
    noted = noted_units(model)
    if noted is None:
        return model
    whole = state if state is not None else {name: p.detach() for name, p in model.named_parameters()}
    return sliced_copy(model, whole, noted)


def save_plain(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Save as a plain transformers folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Where parameters are sharded (FSDP2) every process must call, and the first writes, gathering the whole weights in
    its main memory; units that `PruningAwarePretraining` has masked are left out.

    Args:
        model: A causal language model of a known family, or a module that holds one.
        folder: Created if it does not exist.
        tokenizer: Saved beside it.

    Raises:
        ValueError: see `plain_model`; or masked units are not zero any more.
    """
    sharded, inner = has_sharded_parameters(model), find_language_model(model)[1]
    state = whole_state(inner) if sharded else None
    if sharded and not is_main_process():
        return
    plain: Any = plain_model(without_masked_units(inner, state))
    plain.save_pretrained(str(folder), state_dict=state if noted_units(inner) is None else None)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
