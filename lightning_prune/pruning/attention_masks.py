"""Which positions are real, read from attention masks of all shapes.

Letters: B samples, H heads, T tokens (queries by keys where twice).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Added to attention scores, anything below masks: -inf, the dtype's minimum, -1e9 and -10000 are all in use.
_MASKED = -1e3


def real_positions(mask: Any, shape: torch.Size | None) -> Tensor | None:
    """Read which positions are real from an attention mask.

    Args:
        mask: ``[B, T]`` (1 = real), that of samples with several sequences each ``[B, C, T]``, who may attend to whom
            ``[B, T, T]`` or ``[B, H, T, T]`` (bool or 0 / 1: 1 = may; other floats are added to the scores), or a
            mapping of such masks, one a kind of layer.
        shape: Of the token ids, where known.

    Returns:
        ``[B, T]`` bool (``[B * C, T]`` of several sequences), or None where the mask is None.

    Raises:
        ValueError: a mask that does not say which positions are padding.
    """
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        found = [real for value in mask.values() if (real := real_positions(value, shape)) is not None]
        return torch.stack(found).any(0) if found else None
    if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.dim() > 4:
        what = f"has shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"is a {type(mask).__name__}"
        raise ValueError(
            f"the batch's attention mask {what}, from which padding cannot be read: give attention_mask of shape "
            "(samples, tokens), 1 where a token is real"
        )
    if shape is not None and mask.shape == shape:
        return mask.flatten(0, -2).bool()
    if mask.dim() == 2 and not (shape is not None and len(shape) == 2 and mask.shape == (shape[1], shape[1])):
        return mask.bool()
    if mask.shape[-1] != mask.shape[-2]:
        raise ValueError(
            f"the batch's attention mask has shape {tuple(mask.shape)}, with other queries than keys: padding cannot "
            "be read from it; give attention_mask of shape (samples, tokens), 1 where a token is real"
        )
    real = _attended(_pairs(mask))
    return real if shape is None else real.expand(shape[0], -1)


def hides_previous(mask: Any, shape: torch.Size) -> Tensor | None:
    """Find the tokens that may not attend to the one before them, as the first ones of texts in a packed row.

    Args:
        mask: As of `real_positions`, where that has read it.
        shape: Of the token ids, ``[B, T]``.

    Returns:
        ``[B, T]`` or ``[1, T]`` bool, or None where the mask is none of pairs of tokens.
    """
    if isinstance(mask, Mapping):
        found = [hidden for value in mask.values() if (hidden := hides_previous(value, shape)) is not None]
        return reduce(torch.logical_and, found) if found else None
    if not isinstance(mask, Tensor) or mask.shape == shape or mask.shape[-2:] != (shape[1], shape[1]):
        return None
    return F.pad(~_pairs(mask).diagonal(-1, 1, 2), (1, 0), value=True)


def _pairs(mask: Tensor) -> Tensor:
    """Who may attend to whom, ``[B, T, T]`` bool: True where a query may attend to a key, in any head."""
    if not mask.is_floating_point():
        allowed = mask.bool()
    elif bool((mask < 0).any()) or not bool(mask.any()):  # added to the scores
        allowed = mask > _MASKED
    else:
        allowed = mask.bool()
    return allowed.any(1) if allowed.dim() == 4 else allowed[None] if allowed.dim() == 2 else allowed


def _attended(allowed: Tensor) -> Tensor:
    """Positions that are real, from who may attend to whom ``[B, T, T]``: those that another one attends to.

    In causal masks nobody attends to the last token of a text either; it is told from padding by what it attends to:
    one after another, padding on the right attends to the same text, and tokens of other texts to others.
    """
    length = allowed.shape[-1]
    if length == 1:
        return allowed[:, :, 0]
    above = torch.ones(length, length, dtype=torch.bool, device=allowed.device).triu(1)
    own = torch.eye(length, dtype=torch.bool, device=allowed.device)
    # Rows that attend to nothing are sometimes opened to everything, so that their softmax is finite.
    opened = allowed.all(2) & ~allowed.flatten(1).all(1)[:, None]
    opened[:, -1] = False
    rest = allowed & ~opened[:, :, None]
    closed = torch.where((rest & above).flatten(1).any(1)[:, None, None], allowed, rest)
    causal = ~(closed & above).flatten(1).any(1)
    others = closed & ~own
    alone = ~others.any(1)  # no other position attends to it
    real = ~alone
    for sample in (alone & closed.diagonal(dim1=1, dim2=2) & causal[:, None]).any(1).nonzero().flatten().tolist():
        real[sample] |= _text_ends(others[sample], alone[sample] & closed[sample].diagonal())
        if not bool(real[sample].any()):  # a single token, attending to itself like the padding before it
            real[sample, -1] = True
    return real


def _text_ends(others: Tensor, alone: Tensor) -> Tensor:
    """Of positions that nobody else attends to, those that end a text; `others` ``[T, T]`` is who attends to whom."""
    ends = alone & others.any(1)
    run = len(alone) - int(alone.flip(0).long().cumprod(0).sum())  # where the positions alone at the end begin
    reads = others[run:].float()
    shared = (reads @ reads.t()).fill_diagonal_(0.0).any(1)
    ends[run:] &= ~shared
    return ends
