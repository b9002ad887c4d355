"""Masks by parameter name: apply, count, and store as packed bits with a check sum."""

from __future__ import annotations

import signal
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.targets import Target, clean_name

Masks = dict[str, Tensor]


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by clean name, as they are now."""
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def check_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The parameters that `masks` belong to.

    Raises:
        ValueError: a mask whose parameter does not exist or has another shape, or that is not bool.
    """
    weights = named_weights(model)
    chosen = {}
    for name, mask in masks.items():
        if name not in weights:
            raise ValueError(
                f"there is a mask for {name!r}, but {type(model).__name__} has no such parameter: the masks "
                "belong to another model"
            )
        if mask.shape != weights[name].shape:
            raise ValueError(
                f"the mask of {name!r} has shape {tuple(mask.shape)}, the parameter {tuple(weights[name].shape)}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of {name!r} has dtype {mask.dtype}; masks are torch.bool, True = kept")
        chosen[name] = weights[name]
    return chosen


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set the pruned weights of `model` to zero (+0.0), in place.

    Interrupts wait until every layer is done, so the model is never half pruned.

    Raises:
        ValueError: see `check_masks`; nothing is changed then.
    """
    weights = check_masks(model, masks)
    with uninterrupted():
        for name, weight in weights.items():
            weight.masked_fill_(~masks[name].to(weight.device), 0.0)


def masks_from_zeros(targets: Sequence[Target]) -> Masks:
    """Masks of the weights that are not exactly zero.

    Raises:
        ValueError: no weight is zero.
    """
    masks = {t.name: t.weight.detach() != 0 for t in targets}
    if all(bool(mask.all()) for mask in masks.values()):
        raise ValueError(
            f"score='keep' takes the masks from the zeros of the loaded weights, but none of the {len(masks)} "
            "layers has one; load the pruned model, or choose another score"
        )
    return masks


def mask_sparsity(masks: Mapping[str, Tensor]) -> float:
    """Share of pruned weights over all masks."""
    total = sum(mask.numel() for mask in masks.values())
    return 1.0 - sum(int(mask.sum()) for mask in masks.values()) / total if total else 0.0


# -- storage ---------------------------------------------------------------------------------------------------------


def pack_mask(mask: Tensor) -> Tensor:
    """Bool mask to bits, uint8 ``[ceil(numel / 8)]``, first element in the highest bit of the first byte.

    >>> pack_mask(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist()
    [129, 128]
    """
    flat = mask.detach().reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    packed = torch.zeros(flat.shape[0], dtype=torch.uint8, device=flat.device)
    for bit in range(8):
        packed |= flat[:, bit] << (7 - bit)
    return packed.cpu()


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_mask`."""
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8)
    flat = ((packed[:, None] >> shifts) & 1).bool().view(-1)
    size = torch.Size(shape)
    return flat[: size.numel()].view(size)


def _check_sum(bits: Tensor, shape: Sequence[int]) -> int:
    return zlib.crc32(bits.contiguous().cpu().numpy().tobytes(), zlib.crc32(repr(tuple(shape)).encode()))


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """A state of tensors, lists and numbers only, loadable with ``torch.load(weights_only=True)``."""
    state: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        bits = pack_mask(mask)
        state[name] = {"bits": bits, "shape": list(mask.shape), "crc32": _check_sum(bits, mask.shape)}
    return state


def unpack_masks(state: Mapping[str, Any]) -> Masks:
    """The inverse of `pack_masks`.

    Raises:
        ValueError: naming the parameter whose mask is damaged.
    """
    masks: Masks = {}
    for name, entry in state.items():
        try:
            bits, shape, crc32 = entry["bits"], torch.Size(entry["shape"]), entry["crc32"]
            sound = (
                isinstance(bits, Tensor)
                and bits.dtype == torch.uint8
                and bits.shape == ((shape.numel() + 7) // 8,)
                and all(size >= 0 for size in shape)
                and _check_sum(bits, shape) == crc32
            )
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"the saved mask of {name!r} is damaged: {error!r}") from error
        if not sound:
            raise ValueError(
                f"the saved mask of {name!r} is damaged (length or check sum); take another checkpoint, or start "
                "from its weights with score='keep'"
            )
        masks[name] = unpack_mask(bits.cpu(), shape)
    return masks


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done (main thread only; elsewhere Python sends none)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    previous: dict[int, Any] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        if signal.getsignal(number) is not None:  # None: installed outside Python, cannot be restored
            previous[number] = signal.signal(number, lambda n, frame: received.append((n, frame)))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0][0])
