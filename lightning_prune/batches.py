"""What the functions need to know of a batch: its size, its parts, its padding. B samples, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.losses import IGNORE_INDEX


def batch_size(batch: Any) -> int | None:
    """Number of samples: the leading dimension that all tensors of the batch share; None if it has none."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        return int(batch["input_ids"].shape[0])
    sizes = {t.shape[0] for t in _tensors(batch) if t.dim() > 0}
    return sizes.pop() if len(sizes) == 1 else None


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start:stop`` of a batch whose `batch_size` is known; what is not per sample stays whole."""
    size = batch_size(batch)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[start:stop] if value.dim() > 0 and value.shape[0] == size else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(cut, value))
        if isinstance(value, (list, tuple)):
            if value and len(value) == size and not any(isinstance(v, Tensor) for v in value):
                return value[start:stop]
            return type(value)(map(cut, value))
        return value

    return cut(batch)


def samples(batches: Iterable[Any], count: int, cut: Callable[[], bool] = lambda: True) -> Iterator[tuple[Any, int]]:
    """Batches with their sizes until `count` samples have been seen; the last batch is cut to fit, if `cut` allows it.

    A batch of unknown size counts as one sample.
    """
    left = count
    if left <= 0:
        return
    for batch in batches:
        size = batch_size(batch)
        if size == 0:
            continue
        if size is not None and size > left and cut():
            batch, size = take(batch, 0, left), left
        yield batch, size or 1
        left -= size or 1
        # Leave before asking for another batch: a loader must not be run further than needed.
        if left <= 0:
            return


def without_label(batch: Any) -> bool:
    """Whether a batch holds labels and all are -100, so that no loss can be computed from it.

    The first position of a sequence does not count: a causal model predicts no token there.
    """
    whole_numbers = [t for t in _tensors(batch) if t.dim() > 0 and not t.is_floating_point() and t.dtype != torch.bool]
    return any(bool((t[:, 1:] if t.dim() > 1 and t.shape[1] > 1 else t).eq(IGNORE_INDEX).all()) for t in whole_numbers)


def padding_mask(batch: Any) -> Tensor | None:
    """``(B, T)`` bool, True where a token is real; None where nothing is padded."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def is_sequences(batch: Any) -> bool:
    """Whether samples are sequences: token ids ``[B, T]`` or features ``[B, T, C]``, with T > 1."""
    x = batch.get("input_ids", batch.get("inputs_embeds")) if isinstance(batch, Mapping) else batch
    x = x[0] if isinstance(x, (list, tuple)) and x else x
    return isinstance(x, Tensor) and x.dim() == (3 if x.is_floating_point() else 2) and x.shape[1] > 1


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
