"""Remove units for good: slice parameters and optimizer states, and write the new sizes everywhere.

All new tensors are made before the first old one goes, so a failure leaves the model as it was. Parameters keep their
identity, so optimizers and ties go on working.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.pruning.holding import bare_optimizer, with_inner
from lightning_prune.safety import uninterrupted
from lightning_prune.sharding import refuse_shards, type_name
from lightning_prune.structure.classes import change_class, class_for
from lightning_prune.structure.masking import masked_channels, unmask_norms
from lightning_prune.structure.sizes import AttentionUnit, Sizes
from lightning_prune.structure.units import (
    KeptIndices,
    Removal,
    Structure,
    check_data,
    check_layers_removable,
    check_removal,
    check_sizes,
    kept_indices,
    read_structure,
    renumbered,
    sizes_after,
    write_sizes,
)

# How a state scales when its weight does: a gradient goes with 1 / factor. States by the names torch.optim gives them.
_GRADIENT_POWER = {
    "exp_avg": 1,
    "exp_avg_sq": 2,
    "max_exp_avg_sq": 2,
    "exp_inf": 1,
    "momentum_buffer": 1,
    "square_avg": 2,
    "grad_avg": 1,
    "sum": 2,
    "prev": 1,
    "acc_delta": -2,
    "step_size": -1,
}


@dataclass(frozen=True)
class _Scale:
    """``weight * factor``, or of a norm that multiplies with 1 + weight, ``(1 + weight) * factor - 1``."""

    factor: float
    plus_one: bool = False

    def weight(self, tensor: Tensor) -> Tensor:
        wide = tensor.double()
        return (((1 + wide) * self.factor - 1) if self.plus_one else wide * self.factor).to(tensor.dtype)

    def state(self, tensor: Tensor, name: str) -> Tensor:
        return (tensor.double() / self.factor ** _GRADIENT_POWER[name]).to(tensor.dtype)


@torch.inference_mode(False)  # new parameters are for training
@torch.no_grad()
def remove_units(
    model: nn.Module,
    removal: Mapping[str, Any],
    optimizers: Sequence[Optimizer] = (),
    attention_unit: AttentionUnit = "group",
) -> Sizes:
    """Slice units out of a model, in place; it computes what it did with these units masked (see `mask_units`).

    Where hidden channels go, from d to d': RMS norms get ``epsilon * d / d'`` and ``weight * sqrt(d / d')``, since they
    divide by the number of channels; norms of single heads that share epsilon have their projection multiplied with
    ``sqrt(d / d')``; an embedding that is multiplied with ``sqrt(d)`` makes up for it. Optimizer states of weights that
    are so rescaled follow their gradients. The function is the same then. Training on from it differs from training
    with masks in one thing: Adam still changes a rescaled weight by the learning rate, now ``sqrt(d' / d)`` as much of
    its size.

    A Llama whose heads do not divide its hidden size becomes a Mistral in place, which computes the same: Llama's
    configuration would refuse to load (see `lightning_prune.structure.classes`).

    Args:
        model: A causal language model of a known family, or a module that holds one.
        removal: Unit indices by type, see `lightning_prune.structure.units.check_removal`.
        optimizers: Whose states are sliced alongside, and of those that they step. Removed layers leave their
            parameter groups.
        attention_unit: See `read_structure`.

    Returns:
        The new sizes.

    Raises:
        ValueError: a removal that does not fit the model or leaves no ordinary configuration; sharded parameters; an
            optimizer state that cannot be sliced; masked hidden channels that are to stay. Nothing is changed then.
    """
    structure = read_structure(model, attention_unit)
    checked = check_removal(structure, removal)
    sizes = sizes_after(structure, checked)
    check_sizes(structure, sizes)
    _check_removable(structure, checked)
    kept = kept_indices(structure, checked)
    scales = _scales(structure, sizes)
    parameters = structure.parameters()
    leaving = [parameters[n] for i in _layers(checked) for n in structure.in_layer(i)]
    gone = {id(p) for p in leaving}
    changed = {n: p for n, p in parameters.items() if (n in kept or n in scales) and id(p) not in gone}
    change = class_for(structure.model, sizes.hidden_size, sizes.num_attention_heads)
    raw = list(with_inner(map(bare_optimizer, optimizers)))

    weights = {n: _sliced(p.data, kept.get(n, ()), scales.get(n)) for n, p in changed.items()}
    states = [_sliced_states(o, n, p, kept.get(n, ()), scales.get(n)) for o in raw for n, p in changed.items()]
    with uninterrupted():
        for name, p in changed.items():
            p.data, p.grad = weights[name], None
        for state, new in states:
            state.update(new)
        _forget(raw, gone, structure, checked)
        _rewrite(structure, checked, sizes)
        change_class(structure.model, change)
    return sizes


def _layers(removal: Removal) -> list[int]:
    return removal["layer"][0].tolist() if "layer" in removal else []


def _check_removable(structure: Structure, removal: Removal) -> None:
    for name, p in structure.parameters().items():
        refuse_shards(
            p,
            f"{name!r} is sharded over processes and cannot be sliced: mask the units (mask_units), gather the model, "
            "and remove them then",
        )
    check_data(structure)
    if "layer" in removal:
        check_layers_removable(structure)
    masked = masked_channels(structure)
    if "hidden" in removal and len(missing := masked[~torch.isin(masked, removal["hidden"][0])]):
        raise ValueError(
            f"the hidden channels {missing.tolist()} are masked but not removed; remove all masked channels together"
        )


def sliced_masks(structure: Structure, removal: Removal, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks as they are of the parameters after `remove_units`, by the names those have then.

    Args:
        structure: Of the model before the removal.
        removal: In its normal form, see `check_removal`.
        masks: By parameter names of the module that `structure` was read from. Those of other parameters stay.
    """
    kept, prefix = kept_indices(structure, removal), structure.prefix
    sliced = {name: _sliced(mask, kept.get(name.removeprefix(prefix), ()), None) for name, mask in masks.items()}
    return renumbered(sliced, [f"{prefix}{name}" for name in structure.layer_names()], _layers(removal))


# -- new tensors -----------------------------------------------------------------------------------------------------


def _sliced(tensor: Tensor, kept: Sequence[KeptIndices], scale: _Scale | None) -> Tensor:
    for entry in kept:
        tensor = tensor.index_select(entry.dim, entry.kept.to(tensor.device))
    return tensor if scale is None else scale.weight(tensor)


def _sliced_states(
    optimizer: Optimizer, name: str, p: nn.Parameter, kept: Sequence[KeptIndices], scale: _Scale | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The optimizer's states of a parameter, and what is new of them."""
    state, new = optimizer.state.get(p, {}), {}
    for key, value in state.items():
        if not isinstance(value, Tensor):
            if holds_tensors(value):
                raise ValueError(_unknown_state(optimizer, key, name, type(value).__name__))
            continue
        if value.numel() <= 1 and p.numel() > 1:  # a step count
            continue
        if value.shape != p.shape:
            raise ValueError(_unknown_state(optimizer, key, name, f"a tensor {tuple(value.shape)}"))
        if scale is not None and key not in _GRADIENT_POWER:
            raise ValueError(_unscaled_state(optimizer, key, name))
        sliced = _sliced(value, kept, None)
        new[key] = sliced if scale is None else scale.state(sliced, key)
    return state, new


def holds_tensors(held: object, least: int = 2) -> bool:
    """Return whether something is, or holds, a tensor of so many elements; single numbers need no slicing."""
    if isinstance(held, Tensor):
        return held.numel() >= least and not isinstance(held, nn.Parameter)
    if isinstance(held, Mapping):
        held = list(held.values())
    return isinstance(held, (list, tuple)) and any(holds_tensors(item, least) for item in held)


def _unknown_state(optimizer: Optimizer, key: str, name: str, found: str) -> str:
    return (
        f"{type(optimizer).__name__} keeps the state {key!r} of {name!r} as {found}, which cannot be sliced; use an "
        "optimizer whose states have the weight's shape (Adam, AdamW, SGD, RMSprop, Adagrad), or clear optimizer.state"
    )


def _scales(structure: Structure, sizes: Sizes) -> dict[str, _Scale]:
    """Weights that are rescaled because hidden channels go, by name."""
    family, before, after = structure.family, structure.sizes.hidden_size, sizes.hidden_size
    if before == after:
        return {}
    scales: dict[str, _Scale] = {}
    factor = math.sqrt(before / after)
    if family.norm != "layernorm":
        for norm in structure.norm_names():
            scales[f"{norm}.weight"] = _Scale(factor, plus_one=family.norm == "rmsnorm_plus_one")
        for layer in structure.layer_names():
            for projection in family.head_norms.values():
                for part in ("weight", "bias"):
                    if (name := f"{layer}.{projection}.{part}") in structure.axes:
                        scales[name] = _Scale(factor)
    if family.scaled_embedding is not None:
        embedding = f"{family.scaled_embedding}.weight"
        scale = _embedding_scale(structure, after)
        scales[embedding] = _Scale(scale)
        head: Any = structure.model.get_output_embeddings()  # type: ignore[operator]
        if head is not None and head.weight is structure.parameters()[embedding]:  # logits must not grow with it
            final = f"{family.final_norm}.weight"
            scales[final] = _Scale(scales[final].factor / scale, scales[final].plus_one)
    return scales


def check_rescaling(
    structure: Structure, optimizers: Sequence[Optimizer], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Refuse optimizer states of which is not known how they follow weights that are rescaled when hidden channels go.

    Args:
        structure: Of the model.
        optimizers: That step it.
        parameters: What the optimizers know its parameters as, by their names.

    Raises:
        ValueError: naming the optimizer and the state.
    """
    scaled = [name for name in _scales(structure, structure.sizes.without("hidden", 1)) if name in parameters]
    for name in scaled:
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameters[name], {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and key not in _GRADIENT_POWER:
                    raise ValueError(_unscaled_state(optimizer, key, name))


def _unscaled_state(optimizer: Optimizer, key: str, name: str) -> str:
    return (
        f"{type(optimizer).__name__} keeps the state {key!r} of {name!r}, and how that follows is not known when "
        "hidden channels go and the weight is rescaled: use an optimizer of torch.optim (Adam, AdamW, SGD, RMSprop, "
        "Adagrad), or leave 'hidden' out of types"
    )


def _embedding_scale(structure: Structure, hidden: int) -> float:
    """What a scaled embedding has to be multiplied with, both factors rounded as its forward pass rounds them."""
    assert structure.family.scaled_embedding is not None
    module: Any = structure.module(structure.family.scaled_embedding)
    old, new = module.embed_scale, torch.tensor(hidden**0.5, dtype=module.embed_scale.dtype, device="cpu")
    if old.is_meta:  # read from a file that does not hold it
        old = torch.tensor(module.scalar_embed_scale, dtype=old.dtype, device="cpu")
    dtype = module.weight.dtype
    return float(old.cpu().to(dtype).double() / new.to(dtype).double())


# -- everything else that knows a size -------------------------------------------------------------------------------


def _forget(optimizers: Sequence[Optimizer], gone: set[int], structure: Structure, removal: Removal) -> None:
    """Take removed parameters out of optimizers, and give the others the names that they have from now on."""
    before = {name: name for name in structure.axes}
    new = {old: name for name, old in renumbered(before, structure.layer_names(), _layers(removal)).items()}
    ours = {id(p): name for name, p in structure.parameters().items()}
    for optimizer in optimizers if gone else ():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in gone:
                    optimizer.state.pop(p, None)
            left = [(i, p) for i, p in enumerate(group["params"]) if id(p) not in gone]
            if (names := group.get("param_names")) is not None:  # of an optimizer that was given named_parameters()
                found = [(names[i], ours.get(id(p), "")) for i, p in left]
                group["param_names"] = [
                    name.removesuffix(old) + new[old] if old in new and name.endswith(old) else name
                    for name, old in found
                ]
            group["params"] = [p for _, p in left]


def _rewrite(structure: Structure, removal: Removal, sizes: Sizes) -> None:
    """New sizes in the configuration and in the attributes of modules."""
    if "hidden" in removal:
        unmask_norms(structure.model)
        _resize_layer_norms(structure, sizes.hidden_size)
        _rescale_epsilon(structure, structure.sizes.hidden_size / sizes.hidden_size)
    _remove_layers(structure, _layers(removal))
    for config in _configs(structure):
        write_sizes(config, structure, sizes, _layers(removal))
    attributes = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "embed_dim": sizes.hidden_size,
        "split_size": sizes.num_attention_heads * sizes.head_dim,
        "num_heads": sizes.num_attention_heads,
        "num_attention_heads": sizes.num_attention_heads,
        "num_key_value_heads": sizes.num_key_value_heads,
        "num_key_value_groups": sizes.queries_per_group,
        "num_experts": sizes.num_experts,
    }
    holder, _, _ = structure.family.layers.rpartition(".")
    layers = structure.module(structure.family.layers)
    for module in (structure.model, structure.module(holder), *layers.modules()):
        for name, value in attributes.items():
            if value and isinstance(vars(module).get(name), int):
                setattr(module, name, value)
    for module in structure.model.modules():
        _refresh(module)
    if structure.family.scaled_embedding is not None and "hidden" in removal:
        embedding: Any = structure.module(structure.family.scaled_embedding)
        embedding.scalar_embed_scale = sizes.hidden_size**0.5
        embedding.embed_scale.fill_(sizes.hidden_size**0.5)


def _configs(structure: Structure) -> list[Any]:
    """The model's configuration, and copies of it that its parts hold."""
    found = {id(structure.config): structure.config}
    for module in structure.model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) == structure.family.model_type:
            found[id(config)] = config
    return list(found.values())


def _rescale_epsilon(structure: Structure, factor: float) -> None:
    family = structure.family
    if family.norm == "layernorm" or family.eps_field is None:
        return
    set_epsilon(structure, getattr(structure.config, family.eps_field) * factor)


def _resize_layer_norms(structure: Structure, hidden: int) -> None:
    """Tell LayerNorms without weights, which `_refresh` could ask, the number of hidden channels."""
    modules = structure.modules()
    for name in structure.norm_names():
        if isinstance(norm := modules.get(name), nn.LayerNorm):
            norm.normalized_shape = (hidden,)


def set_epsilon(structure: Structure, epsilon: float) -> None:
    """Set epsilon of all RMS norms, in the modules and in the configuration."""
    family, modules = structure.family, structure.modules()
    assert family.eps_field is not None
    for config in _configs(structure):
        setattr(config, family.eps_field, epsilon)
    heads = [f"{layer}.{norm}" for layer in structure.layer_names() for norm in family.head_norms]
    for name in [*structure.norm_names(), *heads]:
        norm = modules[name]
        setattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps", epsilon)


def _remove_layers(structure: Structure, removed: Sequence[int]) -> None:
    layers = structure.module(structure.family.layers)
    assert isinstance(layers, nn.ModuleList)
    for i in sorted(removed, reverse=True):
        del layers[i]
    for i, layer in enumerate(layers if removed else ()):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                module.layer_idx = i  # type: ignore[assignment]


def _refresh(module: nn.Module) -> None:
    """Sizes that a layer remembers, from its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif type_name(module) == "Conv1D":
        module.nx, module.nf = module.weight.shape  # type: ignore[misc, assignment]
