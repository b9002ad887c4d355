"""What the functions need to know of a batch: its size, its parts, its padding. B samples, T tokens."""

from __future__ import annotations

import copy
import enum
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, slice, torch.Size)
_PLAIN_TORCH = (torch.dtype, torch.device)
# Keys whose tensors lead with the samples, and how many dimensions they have then.
_MARKED = {"input_ids": 2, "inputs_embeds": 3}


def batch_size(batch: Any) -> int | None:
    """Number of samples; None if it cannot be known, so that the batch is one sample.

    Token ids ``[B, T]`` under ``input_ids`` (or ``inputs_embeds``, ``[B, T, C]``) decide. Without them, it is the
    leading dimension that all tensors share. A dimension that happens to be as long as the batch cannot be told from
    it: time before samples with T == B, class weights with as many classes as samples, images in a plain list whose
    leading dimension is that of colors. Give such data its samples first, or as a dict with token ids.
    """
    # Ids of a single sequence, `[T]`, and batches of different sizes in one have no samples that could be told.
    if marked := {int(t.shape[0]) if t.dim() >= dims else None for t, dims in _marked(batch)}:
        return marked.pop() if len(marked) == 1 else None
    sizes = set(_leading(batch))
    size = sizes.pop() if len(sizes) == 1 else None
    return None if size is None or _fits(batch, size, top=True) is False else size


def separable(batch: Any) -> bool:
    """Whether samples can be taken out of a batch: of every part of it, it is known which sample it belongs to.

    Not where a tensor leads with something else (image patches, nodes of a graph), nor where the batch holds an object
    of a kind unknown here.
    """
    size = batch_size(batch)
    return size is not None and _fits(batch, size, top=True) is True


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start:stop`` of a batch that is `separable`; what is not per sample stays whole.

    Raises:
        ValueError: it cannot be taken apart.
    """
    size = batch_size(batch)
    if size is None or not separable(batch):
        raise ValueError(
            f"a batch ({type(batch).__name__}) that has parts with other leading dimensions than its samples, or of an "
            "unknown kind, cannot be taken apart"
        )

    def cut(value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return value[start:stop] if value.ndim > 0 and value.shape[0] == size else value
        if isinstance(value, (list, tuple)) and _one_a_sample(value, size):
            return value[start:stop]
        return _rebuilt(value, cut)

    # The outermost list is what a loader returns: inputs and labels, not samples.
    return _rebuilt(batch, cut) if isinstance(batch, (list, tuple)) else cut(batch)


def samples(batches: Iterable[Any], count: int) -> Iterator[tuple[Any, int]]:
    """Batches with their sizes until `count` samples have been seen; the last batch is cut to fit, if it can be.

    A batch of unknown size counts as one sample.
    """
    left = count
    if left <= 0:
        return
    for batch in batches:
        size = batch_size(batch)
        if size == 0:
            continue
        if size is not None and size > left and separable(batch):
            batch, size = take(batch, 0, left), left
        yield batch, size or 1
        left -= size or 1
        # Leave before asking for another batch: a loader must not be run further than needed.
        if left <= 0:
            return


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
    if isinstance(batch, (Tensor, PackedSequence)):
        return batch.to(device, non_blocking=True)
    return _rebuilt(batch, lambda part: to_device(part, device))


# -- parts of a batch ------------------------------------------------------------------------------------------------


def _children(value: Any) -> Iterable[Any] | None:
    """The parts of a container; None for anything else."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, PackedSequence):
        return None  # a tuple, but its parts mean nothing by themselves
    if isinstance(value, (list, tuple)):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    return None


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A container of the same class with each part changed; anything else as it is."""
    if isinstance(value, Mapping):
        parts = {key: change(item) for key, item in value.items()}
        if not isinstance(value, MutableMapping) or type(value) is dict:
            return parts
        new = copy.copy(value)
        if isinstance(new, UserDict):  # transformers' BatchEncoding keeps something for each sample beside its tensors
            vars(new).update({name: change(item) for name, item in vars(new).items() if name != "data"})
        for key, item in parts.items():
            new[key] = item
        return new
    if isinstance(value, (torch.Size, PackedSequence)):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(change, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(change, value))
    if is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in fields(value):
            object.__setattr__(new, field.name, change(getattr(value, field.name)))
        return new
    return value


def _marked(value: Any) -> Iterator[tuple[Tensor, int]]:
    """Tensors under keys that say that samples come first, and how many dimensions they have if so."""
    if isinstance(value, Mapping):
        for key, dims in _MARKED.items():
            if isinstance(item := value.get(key), Tensor):
                yield item, dims
    for item in _children(value) or ():
        yield from _marked(item)


def _leading(value: Any) -> Iterator[int]:
    """Leading dimensions of tensors, but of those in a list of alike containers, which may be one a sample."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim:
            yield int(value.size(0)) if isinstance(value, Tensor) else len(value)
    elif isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])
    elif (parts := _children(value)) is not None:
        several = isinstance(value, (list, tuple)) and len(value) > 1
        if several and not isinstance(value[0], (Tensor, np.ndarray)) and _children(value[0]) and _alike(value):
            return
        for item in parts:
            yield from _leading(item)


def _is_plain(value: Any) -> bool:
    """Whether a value holds no tensors, however deep, and nothing of a kind unknown here."""
    if isinstance(value, _PLAIN) or type(value) in _PLAIN_TORCH:
        return True
    parts = value if isinstance(value, Set) else _children(value)
    return parts is not None and all(map(_is_plain, parts))


def _alike(items: Sequence[Any]) -> bool:
    """Whether the items of a list are of one kind, as samples are, where inputs and labels would not be."""

    def kind(item: Any) -> Any:
        if isinstance(item, (Tensor, np.ndarray)):
            return item.ndim, item.dtype
        return (type(item), *sorted(map(str, item))) if isinstance(item, Mapping) else type(item)

    return len({kind(item) for item in items}) == 1


def _one_a_sample(items: Sequence[Any], size: int) -> bool:
    """Whether a list has an item for each sample, rather than parts that are batches themselves."""
    if len(items) != size or isinstance(items, (PackedSequence, torch.Size)) or hasattr(items, "_fields"):
        return False
    return all(map(_is_plain, items)) or (_alike(items) and _all_fit(items, size) is not True)


def _fits(value: Any, size: int, top: bool = False) -> bool | None:
    """Whether a part can be of a batch of `size` samples, and be cut: True, None if that is not known, or False."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim == 0:
            return True
        if isinstance(value, Tensor) and (value.is_nested or value.layout != torch.strided):
            return None if value.size(0) == size else False  # cannot be sliced
        return value.shape[0] in (1, size)
    if isinstance(value, PackedSequence):
        return None if value.batch_sizes[0] == size else False
    if _is_plain(value):
        return True
    parts = _children(value)
    if parts is None:
        return None
    whole = _all_fit(parts, size)
    if top or not isinstance(value, (list, tuple)) or hasattr(value, "_fields") or len(value) != size:
        return whole
    # As long as the batch: one a sample, unless its parts would be batches of that size as well.
    return (None if whole else True) if _alike(value) else whole


def _all_fit(parts: Iterable[Any], size: int) -> bool | None:
    found = {_fits(part, size) for part in parts}
    return False if False in found else None if None in found else True
