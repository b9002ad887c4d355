"""Give adapters their masks: checked against the weights, and held as a rank's parts where FSDP2 shards them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_prune.naming import plain_name
from lightning_prune.perp.layers import sparse_layers
from lightning_prune.pruning.masks import part_of
from lightning_prune.sharding import (
    as_shard_of,
    count_over_ranks,
    gathered_dtypes,
    local,
    reshard,
)


@torch.no_grad()
def set_masks(model: nn.Module, masks: Mapping[str, Tensor] | None = None, gather: bool = True) -> None:
    """Give the adapters of a model their masks.

    Where FSDP2 shards the model every rank must call; each holds its part of the masks from then on.

    Args:
        model: A model of `add_adapters`.
        masks: Bool, True = kept, of the weights' shapes, by parameter name, with or without the names that PEFT puts
            in between; whole, or sharded as the weights are. A layer without a mask here takes its weight's exact
            zeros, and so do all with None. Masks of weights without an adapter are passed over.
        gather: Gather parameters that FSDP2 shards, to see the dtype that they are gathered in. False where that is
            not known yet, since the model is about to be converted: then call it again after.

    Raises:
        ValueError: a mask of another shape or dtype, or one that does not hold: a pruned weight is not zero. Nothing
            is changed then.
    """
    given = {plain_name(name): mask for name, mask in (masks or {}).items()}
    layers = dict(sparse_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no sparse adapters to give masks to; call add_adapters first")
    reshard(model)
    new = {}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"the adapter of {name!r} is merged, and its mask cannot change; unmerge it first")
        layer.check_sharded_with_adapter()
        weight = layer.base_weight.detach()
        mask = given.get(layer.weight_name(name))
        if mask is not None:
            new[name] = checked_mask(layer.weight_name(name), mask, weight)
        else:
            new[name] = (local(weight) != 0) | layer.stays_dense
    dtypes = gathered_dtypes(model) if gather else {}
    for name, layer in layers.items():
        layer.hold(new[name], dtypes.get(layer.get_base_layer()))


def copy_masks(model: nn.Module, copies: Iterable[nn.Module]) -> None:
    """Give copies of a model with adapters, such as averages of it, the masks that its adapters have."""
    layers = dict(sparse_layers(model))
    for other in copies:
        for name, layer in sparse_layers(other):
            layer.kept = layers[name].kept.to(layer.kept.device, copy=True)


def checked_mask(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """A mask on the device of its weight; refused if it is of another shape or dtype, or does not hold.

    Of a sharded weight it is this rank's part of the mask, and every rank must call.
    """
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask of {name!r} is {mask.dtype} {tuple(mask.shape)}; it must be torch.bool of the weight's shape "
            f"{tuple(weight.shape)}, True = kept"
        )
    own = local(weight)
    mask = part_of(weight, mask).to(own.device)
    alive = as_shard_of(weight, (own != 0) & ~mask)
    filled = count_over_ranks({name: alive}, lambda part: int(part.count_nonzero()))
    if filled:
        raise ValueError(
            f"{filled} weights of {name!r} are pruned by the mask but are not zero: the masks belong to another model, "
            "or were not applied; call apply_masks(model, masks) first"
        )
    return mask
