"""Masks by parameter name: hold as packed bits, apply, count, and store with a check sum."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_prune.naming import clean_name, own_parameters, without_base_layers
from lightning_prune.pruning.bits import pack_mask, unpack_mask
from lightning_prune.pruning.clearing import to_bytes, zero_pruned_
from lightning_prune.pruning.offloading import at_hand, check_offloaded
from lightning_prune.pruning.targets import Target
from lightning_prune.safety import is_stored_whole, restored_on_failure, uninterrupted
from lightning_prune.sharding import (
    as_shard_of,
    count_over_ranks,
    counts_over_ranks,
    gather_whole,
    is_sharded,
    local,
    packed_class,
    take_shard,
)

Masks = MutableMapping[str, Tensor]


class PackedMasks(MutableMapping[str, Tensor]):
    """Bool masks by parameter name, held as one bit a weight.

    A mask is unpacked each time it is asked for, so what is done to it in place is not kept: assign it, as to a dict.

    Args:
        masks: Bool masks by name, whole or sharded; an iterable of pairs is read one by one, so that no two masks need
            to be there unpacked.

    Examples:
        >>> masks = PackedMasks({"weight": torch.tensor([True, False])})
        >>> masks["weight"].tolist(), list(masks)
        ([True, False], ['weight'])
    """

    def __init__(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        # Bits of this rank's part, and an expanded element: its shape and its layout over ranks.
        self._packed: dict[str, tuple[Tensor, Tensor]] = {}
        if isinstance(masks, PackedMasks):
            self._packed = dict(masks._packed)
        else:
            self.update(masks)

    def __getitem__(self, name: str) -> Tensor:
        bits, like = self._packed[name]
        return as_shard_of(like, unpack_mask(bits, local(like).shape))

    def __setitem__(self, name: str, mask: Tensor) -> None:
        own = local(mask)
        if own.dtype != torch.bool:
            raise ValueError(f"the mask of {name!r} has dtype {own.dtype}; masks are torch.bool, True = kept")
        like = torch.ones((), dtype=torch.bool, device=own.device).expand(own.shape)
        self._packed[name] = (pack_mask(own), as_shard_of(mask, like))

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: object) -> bool:
        return name in self._packed  # the mapping's own would unpack

    def __or__(self, others: Mapping[str, Tensor]) -> PackedMasks:
        joined = PackedMasks(self)
        joined._packed |= PackedMasks(others)._packed
        return joined

    def __eq__(self, others: object) -> bool:
        if not isinstance(others, Mapping) or self.keys() != others.keys():
            return False
        return all(torch.equal(local(mask).cpu(), local(others[name]).cpu()) for name, mask in self.items())

    def __copy__(self) -> PackedMasks:
        return PackedMasks(self)

    def __repr__(self) -> str:
        return f"PackedMasks({', '.join(f'{n!r}: {tuple(form.shape)}' for n, form in self.forms().items())})"

    def forms(self) -> dict[str, Tensor]:
        """Tensors of the masks' shapes, dtype and layouts, with nothing unpacked: all are True."""
        return {name: like for name, (_, like) in self._packed.items()}

    def renamed(self, rename: Callable[[str], str]) -> PackedMasks:
        """The same masks by other names."""
        masks = PackedMasks()
        masks._packed = {rename(name): packed for name, packed in self._packed.items()}
        return masks


def forms_of(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the shapes, dtypes and layouts of masks, for what does not ask for their values."""
    return masks.forms() if isinstance(masks, PackedMasks) else masks


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, as they are now."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def follow_names(model: nn.Module, masks: Mapping[str, Tensor]) -> PackedMasks:
    """Masks by the names that their parameters have now: adapters may have been put on or taken off since.

    A name that no parameter has, with PEFT's parts in it or without, stays.
    """
    names = named_weights(model)
    if masks.keys() <= names.keys():
        return PackedMasks(masks)
    now: dict[str, str | None] = {}
    for name in names:
        key = _without_adapters(name)
        now[key] = None if key in now else name
    return PackedMasks(masks).renamed(lambda n: n if n in names else now.get(_without_adapters(n)) or n)


def _without_adapters(name: str) -> str:
    """What a parameter's name has in common with and without PEFT's parts in it."""
    while "base_model.model." in name:  # a module of the user's may be called so too
        name = name.replace("base_model.model.", "")
    return without_base_layers(name)


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that `masks` belong to.

    Raises:
        ValueError: a mask whose parameter does not exist, has another shape or is quantized, or that is not bool.
    """
    weights = named_weights(model)
    chosen = {}
    for name, mask in forms_of(masks).items():
        if name not in weights:
            raise ValueError(
                f"there is a mask for {name!r}, but {type(model).__name__} has no such parameter: the masks "
                "belong to another model"
            )
        if mask.shape != weights[name].shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(weights[name].shape)}: "
                "the masks belong to another model, or to this one before it shrank"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name!r} has dtype {mask.dtype}; masks are torch.bool, True = kept")
        if (packed := packed_class(weights[name])) is not None:
            raise ValueError(f"the parameter {name!r} is quantized ({packed}): mask weights before quantizing them")
        chosen[name] = weights[name]
    return chosen


def current_weight(model: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter of a clean name as it is now, without a list of all others; None if there is none."""
    module: nn.Module | None = model
    *path, last = name.split(".")
    for part in path:
        # A lookup: a list of all children would cost each expert as much as there are experts, several times a step.
        while module is not None and part not in module._modules:
            module = _inside(module)
        module = None if module is None else module._modules[part]
    while module is not None and last not in (own := own_parameters(module)):
        module = _inside(module)
    return None if module is None else own[last]


def _inside(module: nn.Module) -> nn.Module | None:
    """What a compiled or checkpointed module has inside; None in any other."""
    return module._modules.get("_orig_mod", module._modules.get("_checkpoint_wrapped_module"))


def masks_hold(model: nn.Module, masks: Mapping[str, Tensor]) -> bool:
    """Whether masks are those of a model: of its parameters, whose pruned weights are zero.

    Where parameters are sharded every rank must call.
    """
    weights = named_weights(model)
    if any(name not in weights or weights[name].shape != mask.shape for name, mask in forms_of(masks).items()):
        return False
    alive = {}
    for name, mask in masks.items():
        own = local(weights[name].detach())
        alive[name] = as_shard_of(weights[name], (own != 0) & ~part_of(weights[name], mask).to(own.device))
    return not count_over_ranks(alive, lambda part: int(part.count_nonzero()))


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of `model` to zero (+0.0), in place.

    Interrupts wait until every layer is done, so the model is never half pruned.

    Raises:
        ValueError: see `check_masks` and, for offloaded weights, `check_offloaded`; nothing is changed then.
    """
    weights = check_masks(model, masks)
    holders = {p: (m, n) for m in model.modules() for n, p in own_parameters(m).items()}
    check_offloaded(model, [(name, *holders[weight]) for name, weight in weights.items()])
    with uninterrupted(), restored_on_failure() as originals:
        for name, weight in weights.items():
            module, attribute = holders[weight]
            with at_hand(module, undo=originals.undo.append):
                own = local(getattr(module, attribute))
                zero_pruned_(own, to_bytes(part_of(weight, masks[name]), own.device))


def part_of(weight: Tensor, mask: Tensor) -> Tensor:
    """This rank's part of a mask, which may be whole where the weight is sharded."""
    return local(mask) if is_sharded(mask) else take_shard(weight, mask)


def shard_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> PackedMasks:
    """Masks laid out over ranks as their parameters are; whole masks are cut, where the parameters are sharded.

    Raises:
        ValueError: see `check_masks`.
    """
    weights = check_masks(model, masks)
    return PackedMasks((n, as_shard_of(weight, part_of(weight, masks[n]))) for n, weight in weights.items())


def masks_from_zeros(targets: Sequence[Target]) -> PackedMasks:
    """Masks of the weights that are not exactly zero.

    Raises:
        ValueError: no weight is zero.
    """
    masks = PackedMasks()
    for name, target in {t.parameter: t for t in targets}.items():
        with at_hand(target.module):
            kept = local(target.weight.detach()) != 0
        masks[name] = as_shard_of(target.weight, kept.cpu() if target.offloaded else kept)
    if not pruned_count(masks):
        raise ValueError(
            f"score='keep' takes the masks from the zeros of the loaded weights, but none of the {len(masks)} "
            "layers has one; load the pruned model, or choose another score"
        )
    return masks


def mask_sparsity(masks: Mapping[str, Tensor]) -> float:
    """Share of pruned weights over all masks; see `pruned_count`."""
    total = sum(mask.numel() for mask in forms_of(masks).values())
    return pruned_count(masks) / total if total else 0.0


def pruned_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of pruned weights of each mask; where they are sharded, over all ranks, which must all call."""
    return counts_over_ranks(masks, lambda mask: mask.numel() - int(mask.count_nonzero()))


def pruned_count(masks: Mapping[str, Tensor]) -> int:
    """Number of pruned weights over all masks; where they are sharded, over all ranks, which must all call."""
    return sum(pruned_counts(masks).values())


# -- storage ---------------------------------------------------------------------------------------------------------


def _check_sum(bits: Tensor, shape: Sequence[int]) -> int:
    return zlib.crc32(bits.contiguous().cpu().numpy().tobytes(), zlib.crc32(repr(tuple(shape)).encode()))


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """A state of tensors, lists and numbers only, loadable with ``torch.load(weights_only=True)``.

    Sharded masks are gathered one after the other; every rank must call, and rank 0 alone gets them.
    """
    state: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        if is_sharded(mask):  # gathered one by one, and kept by the rank that writes checkpoints
            mask = gather_whole(mask.to(torch.uint8))
            if dist.get_rank():
                continue
        bits = pack_mask(mask).cpu()
        state[name] = {"bits": bits, "shape": list(mask.shape), "crc32": _check_sum(bits, mask.shape)}
    return state


_DAMAGED = "take another checkpoint, or start from its weights with score='keep'"


def unpack_masks(state: Mapping[str, Any]) -> PackedMasks:
    """The inverse of `pack_masks`.

    Raises:
        ValueError: naming the parameter whose mask is damaged.
    """
    masks = PackedMasks()
    for name, entry in state.items():
        try:
            bits, shape, crc32 = entry["bits"], torch.Size(entry["shape"]), entry["crc32"]
            sound = (
                isinstance(bits, Tensor)
                and bits.dtype == torch.uint8
                and all(size >= 0 for size in shape)
                and bits.shape == ((math.prod(shape) + 7) // 8,)  # numel() of a torch.Size overflows
                and is_stored_whole(bits)  # before memory is taken for an expanded one
                and _check_sum(bits, shape) == crc32
            )
        except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError) as error:
            raise ValueError(f"the saved mask of {name!r} is damaged: {error!r}; {_DAMAGED}") from error
        if not sound:
            raise ValueError(f"the saved mask of {name!r} is damaged (length or check sum); {_DAMAGED}")
        masks[name] = unpack_mask(bits.cpu(), shape)
    return masks
