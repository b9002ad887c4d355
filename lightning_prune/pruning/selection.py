"""The k-th smallest of many numbers, exactly, without sorting them: on one device, over tensors, over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Parts = Callable[[], Iterable[Tensor]]
"""Yields tensors of one float dtype without NaN; called once a pass, and the same each time."""

# Floats as integers of the same size.
_INTEGER = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
# A sample of m numbers puts the k-th between two of them that are some 12 * sqrt(m p (1 - p)) apart in it. The more,
# the fewer numbers lie between, and the longer it takes to sort the sample.
_LEAST, _MOST, _OF = 1 << 14, 1 << 20, 256
_DEVIATIONS = 6.0
# Numbers that are compared at once on a CPU: what comes of it stays in its caches.
_CPU_PIECE = 1 << 18


@dataclass(frozen=True)
class Threshold:
    """The k-th smallest value, and how many of each tensor are below it and equal to it."""

    value: Tensor
    below: list[int]
    equal: list[int]


def row_thresholds(scores: Tensor, count: int) -> Tensor:
    """The count-th lowest score of each row of ``[R, C]``, as ``[R, 1]``; what is quickest on a CPU."""
    rows, columns = scores.shape
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # numpy's vectorized partition takes a quarter of the time of torch's kthvalue.
        lowest = np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count]
        return torch.from_numpy(lowest.copy())
    if rows == 1 and columns > 4096:
        return threshold_of(lambda: [scores], count, columns).value.view(1, 1)
    return scores.kthvalue(count, dim=1, keepdim=True).values


def thresholds_by_bisection(scores: Tensor, count: int) -> Tensor:
    """The count-th lowest score of each row of ``[R, C]``, without NaN, as ``[R, 1]``; the host waits for nothing.

    Bit by bit, each by one pass: the lowest number that at least `count` scores of the row are not above.
    """
    integer = _INTEGER[scores.dtype]
    limits, width = torch.iinfo(integer), 8 * scores.element_size()

    def in_order(bits: Tensor) -> Tensor:
        # Negative floats grow in magnitude with their bits. Its own inverse.
        return (bits >> (width - 1)).bitwise_and_(limits.max).bitwise_xor_(bits)

    places = in_order(scores.contiguous().view(integer))
    found = torch.full((len(scores), 1), limits.min, dtype=integer, device=scores.device)
    for bit in reversed(range(width)):
        middle = found + ((1 << bit) - 1)
        found = torch.where((places <= middle).sum(1, keepdim=True) < count, middle + 1, found)
    return in_order(found).view(scores.dtype)


def threshold_of(parts: Parts, k: int, number: int) -> Threshold:
    """The k-th smallest (from 1) of all values in several tensors; reads them three times as a rule.

    Args:
        parts: The tensors.
        k: ``1 <= k <= number``.
        number: Of values in all tensors.
    """
    found = _by_sample(parts, k, number)
    if found is None:  # a sample that is not like the whole
        value = kth_smallest(parts, k)
        found = Threshold(value, *_compared(parts, value))
    return found


def _by_sample(parts: Parts, k: int, number: int) -> Threshold | None:
    """Two numbers of a sample that the k-th lies between, then what lies between them; None if they missed it."""
    lower, upper = _bracket(parts, k, number)
    above, between = [], []  # by tensor: how many are above `lower`; those below `upper` too
    sizes = []
    for part in parts():
        flat, count, inside = part.reshape(-1), torch.zeros((), dtype=torch.int64, device=part.device), []
        low, high = lower.to(part.device), upper.to(part.device)
        for piece in torch.split(flat, _CPU_PIECE if flat.device.type == "cpu" else max(flat.numel(), 1)):
            over = piece > low
            count += torch.count_nonzero(over)
            inside.append(piece[over.logical_and_(piece < high)])
        above.append(count)
        between.append(torch.cat(inside))
        sizes.append(flat.numel())
    up_to = [size - int(count) for size, count in zip(sizes, above, strict=True)]  # at or below `lower`
    candidates = torch.cat([values.to(between[0].device) for values in between])
    place = k - sum(up_to)
    if 1 <= place <= candidates.numel():
        value = _kth(candidates, place)
        inside_below = [int((values < value.to(values.device)).sum()) for values in between]
        equal = [int((values == value.to(values.device)).sum()) for values in between]
        return Threshold(value, [a + b for a, b in zip(up_to, inside_below, strict=True)], equal)
    # Many equal numbers: the k-th may be one of the two itself.
    value = lower if place < 1 else upper
    below, equal = _compared(parts, value)
    return Threshold(value, below, equal) if sum(below) < k <= sum(below) + sum(equal) else None


def _bracket(parts: Parts, k: int, number: int) -> tuple[Tensor, Tensor]:
    """Two values that the k-th smallest lies between, or is one of, in all likelihood."""
    step = _next_prime(number // min(max(number // _OF, _LEAST), _MOST))
    taken: list[Tensor] = []
    start = 0
    for part in parts():
        flat = part.reshape(-1)
        taken.append(flat[start::step].to(taken[0].device if taken else flat.device, copy=True))
        start = (start - flat.numel()) % step
    sample = torch.cat(taken).sort().values
    size, share = sample.numel(), k / number
    width = _DEVIATIONS * math.sqrt(size * share * (1 - share)) + 1 if step > 1 else 0.0
    low, high = math.floor(size * share - width) - 1, math.ceil(size * share + width) - 1
    infinity = sample.new_tensor(math.inf)
    return sample[low] if low >= 0 else -infinity, sample[high] if high < size else infinity


def _next_prime(number: int) -> int:
    """The smallest prime from a number on, so that a step of it meets all columns; 1 for numbers up to 1.

    >>> [_next_prime(n) for n in (0, 1, 2, 8, 256)]
    [1, 1, 2, 11, 257]
    """
    while any(number % divisor == 0 for divisor in range(2, math.isqrt(max(number, 0)) + 1)):
        number += 1
    return max(number, 1)


def _kth(values: Tensor, k: int) -> Tensor:
    if values.device.type == "cpu":
        return row_thresholds(values.view(1, -1), k).view(())
    return values.sort().values[k - 1]


def _compared(parts: Parts, value: Tensor) -> tuple[list[int], list[int]]:
    """How many numbers of each tensor are below a value, and how many equal to it."""
    counts = [[(p < value.to(p.device)).sum(), (p == value.to(p.device)).sum()] for p in parts()]
    return [int(below) for below, _ in counts], [int(equal) for _, equal in counts]


def kth_smallest(parts: Parts, k: int, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The k-th smallest (from 1) of all values in several tensors, by the bits of the numbers.

    Radix selection: one histogram of 65,536 counts for every 16 bits, so float32 takes two passes. `reduce` sums a
    histogram over ranks; the answer is then that of all ranks' values together.

    Args:
        parts: The tensors.
        k: ``1 <= k <= total number of values``.
        reduce: Sums an int64 tensor over ranks; None in a single process.

    Returns:
        A scalar tensor of the values' dtype, on their device; of two zeros either.

    Raises:
        ValueError: `k` is out of range.
    """
    prefix, remaining = 0, k
    shift: int | None = None  # bits below those already known
    while shift != 0:
        known = shift
        counts: Tensor | None = None
        for part in parts():
            if shift is None or shift == known:
                shift = (part.element_size() * 8 if known is None else known) - 16
            bits, dtype = part.reshape(-1).view(_INTEGER[part.dtype]), part.dtype
            if known is None:
                digits = (bits >> shift).int() + (1 << 15)
            else:
                digits = (bits[(bits >> known) == prefix] >> shift) & 0xFFFF
            found = torch.bincount(digits, minlength=1 << 16)
            counts = found if counts is None else counts + found
        assert counts is not None
        assert shift is not None
        if reduce is not None:
            counts = reduce(counts)
        # Negative floats grow in magnitude with their bits, so their digits come in reverse.
        if known is None:
            counts = torch.cat([counts[: 1 << 15].flip(0), counts[1 << 15 :]])
        elif prefix < 0:
            counts = counts.flip(0)
        cumulative, device = counts.cumsum(0), counts.device
        if known is None and not 1 <= k <= int(cumulative[-1]):
            raise ValueError(f"k={k} is not in 1..{int(cumulative[-1])}")
        digit = int(torch.searchsorted(cumulative, remaining))
        remaining -= int(cumulative[digit - 1]) if digit else 0
        if known is None:
            prefix = digit - (1 << 15) if digit >= 1 << 15 else -digit - 1
        else:
            prefix = (prefix << 16) | (0xFFFF - digit if prefix < 0 else digit)
    return torch.tensor(prefix, dtype=_INTEGER[dtype], device=device).view(dtype)
