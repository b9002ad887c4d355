"""Save a shrunken model as an ordinary one, with units left out that are masked and not yet sliced off."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, device, nn

from lightning_prune.naming import clean_name, uncompiled
from lightning_prune.progress import is_main_process
from lightning_prune.safety import add_check_sums, expanded
from lightning_prune.sharding import plain_class, whole_state
from lightning_prune.structure.classes import is_own_class
from lightning_prune.structure.folders import replacing
from lightning_prune.structure.masking import KeptChannelsNorm
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

    The folder appears whole or not at all; what it held beside an older model stays. Where parameters are sharded
    (FSDP2) every process must call, and the first writes, gathering the whole weights in its main memory; units that
    `PruningAwarePretraining` has masked are left out.

    Args:
        model: A causal language model of a known family, or a module that holds one.
        folder: Created if it does not exist.
        tokenizer: Saved beside it, without a padding token that was only added when it was loaded here.

    Raises:
        ValueError: masked units are not zero any more; parameters that the configuration does not say; `folder` is a
            file.
    """
    inner = find_language_model(model)[1]
    state = whole_state(inner)
    if state is not None and not is_main_process():
        return
    plain = without_masked_units(inner, state)
    with writing_plain(plain, expanded(folder, "folder"), state if plain is inner else None, tokenizer):
        pass


@contextmanager
def writing_plain(
    model: nn.Module, folder: Path, state: Mapping[str, Tensor] | None, tokenizer: Any = None
) -> Iterator[Path]:
    """A folder that holds a model, and takes the place of another one once the block is done.

    Args:
        model: A transformers model without masked units.
        folder: To write; what it holds beside a model stays.
        state: The model's whole weights, where its parameters are shards.
        tokenizer: To save beside it.

    Raises:
        ValueError: parameters that the configuration does not say; `folder` is a file.
    """
    _check_said(model)
    if any(isinstance(module, KeptChannelsNorm) for module in model.modules()):
        raise ValueError(
            "hidden channels are masked (mask_units) in the model's LayerNorms, which leave them out of their mean, as "
            "no program that loads it would: remove them for good (remove_units), with all that is masked"
        )
    if folder.is_file():
        raise ValueError(f"folder={str(folder)!r} is a file; give the name of a folder")
    plain: Any = model
    with replacing(folder.resolve(), overwrite=True, keep=True) as new:
        plain.save_pretrained(str(new), state_dict=state_to_write(model, state))
        add_check_sums(sorted(new.glob("*.safetensors")))
        if tokenizer is not None:
            save_tokenizer(tokenizer, new)
        yield new


def _check_said(model: nn.Module) -> None:
    """Refuse parameters that a model of the same configuration has not, has besides, or shares: loading brings others.

    Raises:
        ValueError: naming some.
    """
    whole: Any = uncompiled(model)
    # Only its author can build one of an own class; quantized layers come with the weights.
    if is_own_class(whole) or getattr(whole.config, "quantization_config", None) is not None:
        return
    kind: Any = plain_class(whole)
    with device("meta"):  # names only
        built = kind(copy.deepcopy(whole.config))
    built.tie_weights()
    names, said = ({clean_name(name) for name in m.state_dict()} for m in (whole, built))
    own, wanted = ({clean_name(name) for name, _ in m.named_parameters()} for m in (whole, built))
    if lost := sorted(own - said):
        raise ValueError(
            f"the model has {len(lost)} parameters that its configuration does not say, such as {lost[0]!r}, and no "
            "program that loads it would read them: take them away, set the field of model.config that says them (such "
            "as attention_bias=True), or keep them with torch.save(model.state_dict(), file)"
        )
    if absent := sorted(wanted - names):
        raise ValueError(
            f"the model lacks {len(absent)} parameters that its configuration says, such as {absent[0]!r}, which every "
            "program that loads it would make up: give it to the model, or change the field of model.config"
        )
    # `save_pretrained` of transformers writes weights that are shared under one name.
    if len(own) < len(wanted):
        raise ValueError(
            f"the model shares the parameter {min(wanted - own)!r} with another, which its configuration does not say, "
            "so that every program that loads it would make it up: set model.config.tie_word_embeddings=True (where it "
            "is a head tied to the embeddings), or give it a copy of its own"
        )


PADS_WITH = "_lightning_prune_pads_with"
"""Name of the note on a tokenizer that it has a padding token from `lightning_prune` alone."""


def save_tokenizer(tokenizer: Any, folder: str | Path) -> None:
    """Write a tokenizer as it was: without a padding token if it got one when it was loaded here.

    With one that ends texts too, other programs would leave out the ends of texts with the padding.
    """
    pad = tokenizer.pad_token
    own = pad is None or vars(tokenizer).get(PADS_WITH) != pad
    try:
        if not own:
            tokenizer.pad_token = None
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.pad_token = pad


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
