"""What the functions need to know of a batch: its size, its parts, its padding. B samples, T tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.attention_masks import real_positions


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


def samples(batches: Iterable[Any], count: int) -> Iterator[tuple[Any, int]]:
    """Batches with their sizes until `count` samples have been seen; the last batch is cut to fit.

    A batch of unknown size counts as one sample.
    """
    left = count
    if left <= 0:
        return
    for batch in batches:
        size = batch_size(batch)
        if size == 0:
            continue
        if size is not None and size > left:
            batch, size = take(batch, 0, left), left
        yield batch, size or 1
        left -= size or 1
        # Leave before asking for another batch: a loader must not be run further than needed.
        if left <= 0:
            return


def padding_mask(batch: Any) -> Tensor | None:
    """``(B, T)`` bool, True where a token is real; None where nothing is padded.

    Read from ``attention_mask`` of any shape (see `lightning_prune.attention_masks.real_positions`); from a mask whose
    name ends in ``padding_mask``, where bool True and torch's ``-inf`` mean padding and an integer 1 a real token; and
    from ``cu_seq_lens_q`` of packed texts.

    Raises:
        ValueError: a mask from which padding cannot be read.
    """
    if not isinstance(batch, Mapping):
        return None
    if batch.get("attention_mask") is not None:
        real = real_positions(batch["attention_mask"], _token_shape(batch))
    elif (name := next((key for key in batch if _names_padding(key)), None)) is not None:
        real = _from_padding_name(name, batch[name])
    elif (ends := batch.get("cu_seq_lens_q")) is not None and (shape := _token_shape(batch)) is not None:
        real = (torch.arange(shape[1], device=ends.device) < ends[-1]).expand(shape[0], -1)
    else:
        return None
    return None if real is None or bool(real.all()) else real


def _token_shape(batch: Mapping[str, Any]) -> torch.Size | None:
    ids, embedded = batch.get("input_ids"), batch.get("inputs_embeds")
    if isinstance(ids, Tensor):
        return ids.shape
    return embedded.shape[:-1] if isinstance(embedded, Tensor) else None


def _names_padding(key: Any) -> bool:
    others = ("decoder", "tgt", "target", "memory", "label")  # masks of other sequences
    return isinstance(key, str) and key.endswith("padding_mask") and not key.startswith(others)


def _from_padding_name(name: str, mask: Any) -> Tensor | None:
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            f"{name} of the batch is no tensor of shape (samples, tokens), so padding cannot be read from it: give "
            "attention_mask of that shape, 1 where a token is real"
        )
    torchs = mask.dtype == torch.bool or mask.is_floating_point()
    real = mask.logical_not() if torchs else mask.bool()
    if not bool(real.any(1).all()):
        raise ValueError(
            f"{name} ({mask.dtype}) is read as {'True = padding' if torchs else '1 = a real token'}, which leaves a "
            "sample without a token: give attention_mask of shape (samples, tokens), 1 where a token is real"
        )
    return real


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
