"""Inspect and slice batches: number of samples, padding, device. B samples, T tokens."""

from __future__ import annotations

import copy
import enum
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_prune.pruning.attention_masks import real_positions

_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic, enum.Enum, slice, torch.Size)
_PLAIN_TORCH = (torch.dtype, torch.device)
# Keys whose tensors lead with the samples, and how many dimensions they have then.
_MARKED = {"input_ids": 2, "inputs_embeds": 3}


def batch_size(batch: Any) -> int | None:
    """Number of samples of a batch that can be taken apart; None for any other, which is run whole as one sample.

    Token ids ``[B, T]`` under ``input_ids`` (or ``inputs_embeds``, ``[B, T, C]``) say how many samples there are.
    Without them, it is the leading dimension that all tensors share. A batch cannot be taken apart if one of its parts
    leads with something else (image patches, nodes of a graph, time), or holds an object of a kind unknown here.

    A dimension that happens to be as long as the batch cannot be told from it: time before samples with T == B, class
    weights with as many classes as samples, a plain list of images of as many colors each. Give such a batch its
    samples first, and what is of no sample to the module.
    """
    # Ids of a single sequence, `[T]`, and batches of different sizes in one have no samples that could be told.
    sizes = {int(t.shape[0]) if t.dim() >= dims else None for t, dims in _marked(batch)} or set(_leading(batch))
    size = sizes.pop() if len(sizes) == 1 else None
    return size if size is not None and _fits(batch, size, top=True) else None


def take(batch: Any, start: int, stop: int) -> Any:
    """Samples ``start:stop`` of a batch whose `batch_size` is known; what is not per sample stays whole.

    Raises:
        ValueError: the batch cannot be taken apart.
    """
    size = batch_size(batch)
    if size is None:
        raise ValueError(f"a batch ({type(batch).__name__}) of unknown size cannot be taken apart")

    def cut(value: Any) -> Any:
        if isinstance(value, (Tensor, np.ndarray)):
            return value[start:stop] if value.ndim > 0 and value.shape[0] == size else value
        if isinstance(value, (list, tuple)) and _one_a_sample(value, size):
            return value[start:stop]
        return _rebuilt(value, cut)

    # The outermost list is what a loader returns: inputs and labels, not samples.
    return _rebuilt(batch, cut) if isinstance(batch, (list, tuple)) else cut(batch)


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


def check_repeatable(batches: Any, passes: int, argument: str, why: str = "") -> None:
    """Refuse an iterator, which yields its batches once, where they are read several times.

    Args:
        batches: The batches, if there are any.
        passes: How often a pruning reads them.
        argument: What the caller knows them as.
        why: What else reads them again.

    Raises:
        ValueError: it would run dry.
    """
    if isinstance(batches, Iterator) and (passes > 1 or why):
        reason = why or "sequential=True with a score or allocation that first needs the dense model"
        raise ValueError(
            f"{argument}={type(batches).__name__} can be read once, but {reason} reads it again: pass a list or a "
            "DataLoader"
        )


def padding_mask(batch: Any) -> Tensor | None:
    """``(B, T)`` bool, True where a token is real; None where nothing is padded. Read as `named_mask`."""
    return unless_all(named_mask(batch))


def unless_all(mask: Tensor | None) -> Tensor | None:
    """A mask, or None where all of it is True."""
    return None if mask is None or bool(mask.all()) else mask


def named_mask(batch: Any) -> Tensor | None:
    """``(B, T)`` bool, True where a token is real; None where a batch, or a call's arguments, do not name them.

    Read from ``attention_mask`` of any shape (see `attention_masks.real_positions`); from a mask whose
    name ends in ``padding_mask``, where bool True and torch's ``-inf`` mean padding and an integer 1 a real token; and
    from ``cu_seq_lens_q`` of packed texts.

    Raises:
        ValueError: a mask from which padding cannot be read.
    """
    if not isinstance(batch, Mapping):
        return None
    if batch.get("attention_mask") is not None:
        return real_positions(batch["attention_mask"], _token_shape(batch))
    elif (name := next((key for key in batch if _names_padding(key)), None)) is not None:
        return _from_padding_name(name, batch[name])
    elif (ends := batch.get("cu_seq_lens_q")) is not None and (shape := _token_shape(batch)) is not None:
        real: Tensor = torch.arange(shape[1], device=ends.device) < ends[-1]
        return real.expand(shape[0], -1)
    return None


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
    """The batch with its tensors on `device`; those that inference mode has made are copied, to be of use outside."""
    if isinstance(batch, (Tensor, PackedSequence)):
        moved: Tensor = cast(Tensor, batch).to(device, non_blocking=True)
        return moved.clone() if isinstance(moved, Tensor) and moved.is_inference() else moved
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
        return _fields_set(value).values()
    return None


def _fields_set(value: Any) -> dict[str, Any]:
    """Fields of a dataclass by name, but those that it has no value of (``field(init=False)``)."""
    return {field.name: getattr(value, field.name) for field in fields(value) if hasattr(value, field.name)}


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
        other = copy.copy(value)
        for name, item in _fields_set(value).items():
            object.__setattr__(other, name, change(item))
        return other
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
    return all(map(_is_plain, items)) or (_alike(items) and not all(_fits(item, size) for item in items))


def _fits(value: Any, size: int, top: bool = False) -> bool:
    """Whether all pieces of a part are known to be of one sample, out of `size`, or of none."""
    if isinstance(value, (Tensor, np.ndarray)):
        if value.ndim == 0:
            return True
        sliced = not isinstance(value, Tensor) or (value.layout == torch.strided and not value.is_nested)
        return sliced and value.shape[0] in (1, size)
    if _is_plain(value):
        return True
    parts = _children(value)
    if parts is None:
        return False
    fit = all(_fits(part, size) for part in parts)
    listed = not top and isinstance(value, (list, tuple)) and not hasattr(value, "_fields")
    if listed and len(value) == size and _alike(value):
        # One item a sample; unless, of two samples or more, its items would be batches of that size as well.
        return not fit or size == 1
    return fit


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in containers too."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, PackedSequence):
        yield value.data
    else:
        for item in _children(value) or ():
            yield from tensors_of(item)


def form_of(batch: Any) -> Any:
    """What a batch is made of, whatever its sizes: equal for two batches that a module has no cause to treat apart."""
    if isinstance(batch, (list, tuple)):  # what a loader returns: arguments, whose number counts
        return type(batch), *map(_form, batch)
    return _form(batch)


def _form(value: Any) -> Any:
    """What a part is made of; hashable, whatever it is."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim, value.dtype
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return type(value), value.name  # its value may not be hashable, and it may compare as that
    if isinstance(value, _PLAIN):
        return type(value)
    if isinstance(value, Mapping):
        keys = (key if isinstance(key, (str, int)) else type(key) for key in value)
        return type(value), *zip(keys, map(_form, value.values()), strict=True)
    return type(value), *dict.fromkeys(map(_form, _children(value) or ()))
