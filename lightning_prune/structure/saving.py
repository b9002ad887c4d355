"""Save a shrunken model as an ordinary one, with units left out that are masked and not yet sliced off."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, device, nn

from lightning_prune.naming import clean_name
from lightning_prune.progress import is_main_process
from lightning_prune.sharding import whole_state
from lightning_prune.structure.removal import remove_units
from lightning_prune.structure.sizes import AttentionUnit
from lightning_prune.structure.units import (
    Removal,
    check_removal,
    find_language_model,
    kept_indices,
    read_structure,
)


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
    whole = state if state is not None else {clean_name(name): p.detach() for name, p in model.named_parameters()}
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
        ValueError: masked units are not zero any more.
    """
    inner = find_language_model(model)[1]
    state = whole_state(inner)
    if state is not None and not is_main_process():
        return
    plain: Any = without_masked_units(inner, state)
    plain.save_pretrained(str(folder), state_dict=state_to_write(plain, state if plain is inner else None))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def state_to_write(model: nn.Module, state: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the weights that `save_pretrained` of transformers has to be given; None where it finds them itself.

    It writes parts that are compiled (``model.layers[0] = torch.compile(...)``) by names that no model loads.

    Args:
        model: A transformers model.
        state: Its whole weights, where its parameters are shards.
    """
    if state is not None:
        return dict(state)  # transformers takes weights that are tied out of what it is given
    own = model.state_dict()
    return {clean_name(name): t for name, t in own.items()} if any(name != clean_name(name) for name in own) else None


_NOTE = "_lightning_prune_masked_units"


@dataclass(frozen=True)
class MaskedUnits:
    """Units that are zero and still there.

    Attributes:
        removal: Their indices by type, see `lightning_prune.structure.units.check_removal`.
        attention_unit: See `lightning_prune.structure.read_structure`.
    """

    removal: Removal
    attention_unit: AttentionUnit


def note_masked_units(model: nn.Module, removal: Removal, attention_unit: AttentionUnit) -> None:
    """Note on a transformers model that it is to be saved without these units; an empty removal takes the note off."""
    vars(model).pop(_NOTE, None)
    if removal:
        vars(model)[_NOTE] = MaskedUnits(removal, attention_unit)


def noted_units(model: nn.Module) -> MaskedUnits | None:
    """What `note_masked_units` has noted on the transformers model that `model` is or holds; None without a note."""
    return next((vars(m)[_NOTE] for m in model.modules() if _NOTE in vars(m)), None)


def slice_masked_units(model: nn.Module, units: MaskedUnits) -> None:
    """Remove masked units for good, in place; the model computes what it did.

    Args:
        model: A causal language model of whole parameters. Its buffers may be on the meta device.
        units: That are zero in it.

    Raises:
        ValueError: units that the model does not have, or that are not zero (any more); nothing is changed then.
    """
    structure = read_structure(model, units.attention_unit)
    removal, parameters = check_removal(structure, units.removal), structure.parameters()
    alive = [
        name
        for name, kept in kept_indices(structure, removal).items()
        for entry in kept
        if bool(parameters[name].detach().index_select(entry.dim, entry.gone).any())
    ]
    layers = removal["layer"][0].tolist() if "layer" in removal else []
    alive += [name for i in layers for name in structure.in_layer(i) if bool(parameters[name].detach().any())]
    if alive:
        raise ValueError(
            f"pruned units of {alive[0]!r} are not zero any more, so they cannot be left out: the weights were changed "
            "after PruningAwarePretraining pruned them"
        )
    remove_units(model, removal, attention_unit=units.attention_unit)


def sliced_copy(model: nn.Module, state: Mapping[str, Tensor], units: MaskedUnits) -> nn.Module:
    """A model of the same weights without masked units; `model` stays as it is.

    Args:
        model: A transformers causal language model; its parameters may be shards.
        state: Its whole weights, on the CPU.
        units: That are zero in it.

    Raises:
        ValueError: see `slice_masked_units`.
    """
    from transformers import AutoModelForCausalLM

    source: Any = model
    with device("meta"):  # names and shapes only
        small: Any = AutoModelForCausalLM.from_config(copy.deepcopy(source.config), trust_remote_code=False)
    missing, unexpected = small.load_state_dict(dict(state), assign=True, strict=False)
    small.tie_weights()  # of a tied weight one name is enough
    if unexpected or any(p.is_meta for p in small.parameters()):
        raise ValueError(f"the weights are not those of a {type(small).__name__}: {[*unexpected, *missing][:3]}")
    small.generation_config = source.generation_config
    slice_masked_units(small, units)
    return small  # type: ignore[no-any-return]
