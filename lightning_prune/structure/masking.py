"""Units as masks: zero everything a unit occupies, so that the model computes what it will after their removal.

A zero unit stays zero in training, without anything being enforced: the gradients of all its weights vanish, since
each is a product with another of them. Only what an optimizer remembers of it has to be cleared. Of two kinds some
weights have gradients all the same, which `mask_gradients` sets to zero: the biases that a whole layer adds to the
hidden states, and the columns that read one query head of a group, whose values are there for the others. Channels of
an RMS norm's input that are zero leave its divisor the number of all channels, which slicing makes up for. LayerNorm
subtracts a mean, so a masked one computes over the kept channels alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.pruning.holding import bare_optimizer, with_inner
from lightning_prune.pruning.masks import Masks
from lightning_prune.safety import uninterrupted
from lightning_prune.sharding import local, shard_bounds
from lightning_prune.structure.sizes import AttentionUnit
from lightning_prune.structure.units import (
    KeptIndices,
    Removal,
    Structure,
    check_data,
    check_removal,
    kept_indices,
    read_structure,
)


class KeptChannelsNorm(nn.LayerNorm):
    """LayerNorm over some of its channels; the others become zero.

    Attributes:
        kept_channels: Indices, int64. No buffer, since averages of a model would average it.
    """

    kept_channels: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to ``[..., C]``."""
        self.kept_channels = kept = self.kept_channels.to(x.device)
        weight = None if self.weight is None else self.weight[kept]
        bias = None if self.bias is None else self.bias[kept]
        y = F.layer_norm(x[..., kept], (len(kept),), weight, bias, self.eps)
        # Under autocast the norm computes in float32, whatever x is.
        return torch.zeros_like(x, dtype=y.dtype).index_copy(-1, kept, y)


def unit_masks(model: nn.Module, removal: Mapping[str, Any], attention_unit: AttentionUnit = "group") -> Masks:
    """Bool masks of the parameters' shapes by name (of the transformers model), False where a unit is removed.

    Whole tensors, also of sharded parameters; `lightning_prune.pruning.masks.apply_masks` cuts them.

    Raises:
        ValueError: see `lightning_prune.structure.units.check_removal`.
    """
    structure = read_structure(model, attention_unit)
    checked = check_removal(structure, removal)
    check_maskable(checked)
    return dict(_masks(structure, checked))


def check_maskable(removal: Mapping[str, Any]) -> None:
    """Refuse to mask experts.

    Raises:
        ValueError: a router goes on choosing an expert that is zero.
    """
    if "expert" in removal:
        raise ValueError(
            "experts cannot be masked, since a router would go on choosing them: remove them (remove_units)"
        )


def _masks(structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> Iterable[tuple[str, Tensor]]:
    for name, kept in kept_indices(structure, removal).items():
        mask = torch.ones(structure.lengths[name], dtype=torch.bool, device="cpu")
        for entry in kept:
            mask.index_fill_(entry.dim, entry.gone, False)
        yield name, mask
    for name in _removed_layers(structure, removal):
        yield name, torch.zeros(structure.lengths[name], dtype=torch.bool, device="cpu")


def _removed_layers(structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> list[str]:
    indices = removal["layer"][0].tolist() if "layer" in removal else []
    return [name for i in indices for name in structure.in_layer(i)]


@torch.no_grad()
def mask_units(
    model: nn.Module,
    removal: Mapping[str, Any],
    optimizers: Sequence[Optimizer] = (),
    attention_unit: AttentionUnit = "group",
) -> None:
    """Set units to zero, in place: weights, gradients and optimizer states.

    The model then computes what `remove_units` with the same removal leaves. Calling it again, with the same units or
    more of them, is cheap: it writes only the rows and columns of the units; after every step of a training where
    layers, or query heads alone, are masked (see `mask_gradients`). Sharded parameters are masked where
    they are (their gradients and states too).

    Args:
        model: A causal language model of a known family, or a module that holds one.
        removal: Unit indices by type, see `lightning_prune.structure.units.check_removal`.
        optimizers: Whose states of the parameters' shapes (momentum, variance) are to be cleared, and of those that
            they step.
        attention_unit: See `read_structure`.

    Raises:
        ValueError: see `check_removal` and `read_structure`; nothing is changed then.
    """
    structure = read_structure(model, attention_unit)
    checked = check_removal(structure, removal)
    check_maskable(checked)
    check_data(structure)
    kept = kept_indices(structure, checked)
    removed = set(_removed_layers(structure, checked))
    norms = _layer_norms(structure) if structure.family.norm == "layernorm" and "hidden" in checked else {}
    parameters, stepped = structure.parameters(), list(with_inner(map(bare_optimizer, optimizers)))
    with uninterrupted():
        for name in kept.keys() | removed:
            p = parameters[name]
            for tensor in [p.data, p.grad, *state_tensors(p, stepped)]:
                if tensor is None:
                    continue
                if name in removed:
                    local(tensor).zero_()
                else:
                    for entry in kept[name]:
                        _zero(tensor, entry)
        if norms:
            _mask_norms(norms, checked["hidden"][0], structure)


def gradients_left(structure: Structure, removal: Removal) -> dict[str, list[KeptIndices]]:
    """Where masked units have gradients that do not vanish by themselves, for `mask_gradients`.

    Args:
        structure: Of the model.
        removal: The units, in their normal form (see `check_removal`).

    Returns:
        By parameter, along which dimensions; nothing said of one that is to have none at all.
    """
    heads = structure.attention_unit == "head" and "attention" in removal
    entries = kept_indices(structure, {"attention": removal["attention"]}) if heads else {}
    return entries | {name: [] for name in _removed_layers(structure, removal)}


@torch.no_grad()
def mask_gradients(structure: Structure, left: Mapping[str, Sequence[KeptIndices]]) -> None:
    """Set gradients to zero before an optimizer step, where `gradients_left` says."""
    parameters = structure.parameters() if left else {}
    for name, entries in left.items():
        if (gradient := parameters[name].grad) is None:
            continue
        if not entries:
            local(gradient).zero_()
        for entry in entries:
            _zero(gradient, entry)


def _zero(tensor: Tensor, entry: KeptIndices) -> None:
    """Zero what goes along a dimension; of a shard, what this rank has of it."""
    start, stop = shard_bounds(tensor)[entry.dim]
    gone = entry.gone[(entry.gone >= start) & (entry.gone < stop)] - start
    local(tensor).index_fill_(entry.dim, gone.to(tensor.device), 0.0)


def _layer_norms(structure: Structure) -> dict[str, nn.LayerNorm]:
    """The LayerNorms over the hidden channels, by name; one that the configuration leaves out is None."""
    modules, found = structure.modules(), {}
    for name in structure.norm_names():
        holder, _, attribute = name.rpartition(".")
        norm = modules.get(name)
        if norm is None and getattr(modules.get(holder), attribute, ...) is None:  # OPT's `_remove_final_layer_norm`
            continue
        if not isinstance(norm, nn.LayerNorm) or type(norm) not in (nn.LayerNorm, KeptChannelsNorm):
            raise ValueError(
                f"{name!r} is a {type(norm).__name__}, not a plain torch.nn.LayerNorm: hidden channels cannot "
                "be masked there"
            )
        found[name] = norm
    return found


def _mask_norms(norms: Mapping[str, nn.LayerNorm], gone: Tensor, structure: Structure) -> None:
    hidden, parameters = structure.sizes.hidden_size, structure.parameters()
    for name, norm in norms.items():
        stays = torch.ones(hidden, dtype=torch.bool, device="cpu")
        stays[gone] = False
        if isinstance(norm, KeptChannelsNorm):
            before = torch.zeros(hidden, dtype=torch.bool, device="cpu")
            before[norm.kept_channels.cpu()] = True
            stays &= before
        norm.__class__ = KeptChannelsNorm
        # A norm without weights is where the rest of its layer is.
        beside = [p for n, p in parameters.items() if n.startswith(f"{name.rpartition('.')[0]}.")]
        device = next((p.device for p in (*norm.parameters(), *reversed(beside))), torch.device("cpu"))
        norm.kept_channels = stays.nonzero().flatten().to(device)


def masked_channels(structure: Structure) -> Tensor:
    """Hidden channels that the model's LayerNorms leave out, sorted; empty where none is masked."""
    for name, module in structure.modules().items():
        if isinstance(module, KeptChannelsNorm) and name in set(structure.norm_names()):
            stays = torch.zeros(structure.sizes.hidden_size, dtype=torch.bool, device="cpu")
            stays[module.kept_channels.cpu()] = True
            return (~stays).nonzero().flatten()
    return torch.empty(0, dtype=torch.int64, device="cpu")


def unmask_norms(model: nn.Module) -> None:
    """Make LayerNorms that `mask_units` changed plain ones again."""
    for module in model.modules():
        if isinstance(module, KeptChannelsNorm):
            del module.kept_channels
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]


def state_tensors(parameter: nn.Parameter, optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Optimizer states of a parameter's shape."""
    return [
        value
        for optimizer in optimizers
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim() > 0
    ]
