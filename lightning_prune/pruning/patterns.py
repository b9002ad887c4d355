"""From scores to masks: exact counts, deterministic ties. Masks are bool, True = kept, shaped ``(O, I)`` as the scores.

The order is that of a stable ascending sort: the lowest score goes first, and of equal scores the one that comes
first in the matrix. So every rank and every re-run prunes the same weights, exactly as many as asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.pruning.selection import kth_smallest, row_thresholds, thresholds_by_bisection
from lightning_prune.pruning.statistics import values_of
from lightning_prune.ranks import Ranks

# Up to this group size, counting for each element how many of its group are smaller beats sorting.
_PAIRWISE_GROUP = 16


@dataclass(frozen=True)
class NM:
    """N:M sparsity: of every M consecutive inputs of a row, the N with the highest scores are kept."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """Share of pruned weights, ``1 - N/M``."""
        return 1.0 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def parse_pattern(pattern: str) -> NM | None:
    """``"unstructured"`` to None, ``"N:M"`` (N kept of M) to `NM`.

    >>> parse_pattern("2:4")
    NM(n=2, m=4)

    Raises:
        ValueError: any other value, or not 0 < N < M.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match and 0 < int(match[1]) < int(match[2]):
        return NM(int(match[1]), int(match[2]))
    raise ValueError(
        f"pattern={pattern!r} is neither 'unstructured' nor 'N:M' with 0 < N < M (N kept of every M consecutive "
        "inputs), such as '2:4'"
    )


def refuse_nan(found: Mapping[str, Tensor]) -> None:
    """Refuse scores that hold NaN; the host waits once for all of them.

    Args:
        found: Whether there is any, bool scalars by the name of the weight.

    Raises:
        ValueError: naming the weight.
    """
    for name, bad in zip(found, values_of(found.values()), strict=True):
        if bad:
            raise ValueError(f"the scores of {name!r} hold NaN; the weights are unchanged")


def lowest_in_layer(scores: Tensor, count: int) -> Tensor:
    """Mask that prunes the `count` lowest scores of the whole matrix."""
    return _lowest(scores.reshape(1, -1), count).view(scores.shape)


def lowest_over_ranks(scores: Tensor, count: int, ranks: Ranks, first_row: int, counted: bool) -> Tensor:
    """Mask of this rank's rows of a matrix, of which the `count` lowest scores over all ranks are pruned.

    Args:
        scores: ``[r, I]``, whole rows.
        count: Weights to prune in the whole matrix.
        ranks: Every rank must call.
        first_row: Where this rank's rows begin, which decides between equal scores.
        counted: False on ranks that hold copies of another's rows.
    """
    mine = [scores] if counted else [scores[:0]]
    total = int(ranks.sum_parts(torch.tensor(sum(s.numel() for s in mine))))
    _check_count(count, total)
    if count == 0 or count == total:
        return torch.full_like(scores, count == 0, dtype=torch.bool)
    threshold = kth_smallest(lambda: mine, count, ranks.sum_parts)
    below, equal = scores < threshold, scores == threshold
    here = [first_row, int(counted), int(below.sum()), int(equal.sum())]
    parts = [part for part in ranks.gather(here) if part[1]]
    ties = count - sum(part[2] for part in parts)  # equal scores to prune, the first in the matrix first
    before = sum(part[3] for part in parts if part[0] < first_row)
    order = equal.flatten().cumsum(0, dtype=torch.int64).view(scores.shape)
    return ~(below | (equal & (order <= ties - before)))


def lowest_in_rows(scores: Tensor, count: int, first_row: int = 0, all_rows: int | None = None) -> Tensor:
    """Mask that prunes `count` weights in equal numbers from every row.

    What does not divide by the number of rows goes one more to each of the first rows.

    Args:
        scores: ``[R, I]``.
        count: Weights to prune in the whole matrix.
        first_row: Index of the first row of `scores` in the whole matrix, of which they may be a part.
        all_rows: Number of rows of the whole matrix; default R.
    """
    rows, columns = scores.shape
    all_rows = rows if all_rows is None else all_rows
    _check_count(count, all_rows * columns)
    each, extra = divmod(count, all_rows)
    extra = min(max(extra - first_row, 0), rows)  # of these rows
    if not extra:
        return _lowest(scores, each)
    return torch.cat([_lowest(scores[:extra], each + 1), _lowest(scores[extra:], each)])


def nm_mask(scores: Tensor, pattern: NM) -> Tensor:
    """Mask that keeps the N highest scores of every M consecutive inputs.

    Raises:
        ValueError: the number of inputs does not divide by M.
    """
    rows, columns = scores.shape
    if columns % pattern.m:
        raise ValueError(f"{columns} inputs do not divide by M={pattern.m}")
    groups = scores.view(rows, columns // pattern.m, pattern.m)  # [O, I/M, M]
    pruned = pattern.m - pattern.n
    if pattern.m > _PAIRWISE_GROUP:
        order = groups.argsort(dim=-1, stable=True)
        mask = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., :pruned], False)
        return mask.view(rows, columns)
    # rank = how many of the group come before; each pair is compared once.
    members = [groups[..., i] for i in range(pattern.m)]
    ranks = [torch.zeros(member.shape, dtype=torch.int8, device=scores.device) for member in members]
    for i in range(pattern.m):
        for j in range(i + 1, pattern.m):
            first = members[i] <= members[j]
            ranks[j] += first
            ranks[i] += ~first
    return torch.stack([rank >= pruned for rank in ranks], dim=-1).view(rows, columns)


def _check_count(count: int, size: int) -> None:
    if not 0 <= count <= size:
        raise ValueError(f"cannot prune {count} of {size} weights")


def _lowest(scores: Tensor, count: int) -> Tensor:
    """Mask that prunes the `count` lowest scores of each row of ``[R, C]``."""
    rows, columns = scores.shape
    _check_count(count, columns)
    if count == 0 or count == columns or not rows:
        return torch.full_like(scores, count == 0, dtype=torch.bool)
    if scores.device.type != "cpu":
        return lowest_by_bisection(scores, count)
    threshold = row_thresholds(scores, count)
    mask = scores > threshold
    # Of the scores equal to the threshold, the last ones stay until the number is right.
    integer = torch.int32 if columns < 2**31 else torch.int64
    missing = (columns - count) - mask.sum(dim=1, dtype=integer)  # [R]
    short = missing.nonzero().flatten()
    if len(short):
        mask[short] |= _last_equal(scores[short] == threshold[short], missing[short, None], integer)
    return mask


def lowest_by_bisection(scores: Tensor, count: int) -> Tensor:
    """Mask that prunes the `count` lowest scores of each row of ``[R, C]``, while the host waits for nothing.

    Args:
        scores: Without NaN, on any device; made for GPUs.
        count: More than none, and less than all.
    """
    threshold = thresholds_by_bisection(scores, count)
    mask = scores > threshold
    integer = torch.int32 if scores.shape[1] < 2**31 else torch.int64
    missing = (scores.shape[1] - count) - mask.sum(1, keepdim=True, dtype=integer)
    return mask.logical_or_(_last_equal(scores == threshold, missing, integer))


def _last_equal(equal: Tensor, number: Tensor, integer: torch.dtype) -> Tensor:
    """The last `number` ``[R, 1]`` of what is true in each row of ``[R, C]``."""
    order = equal.cumsum(1, dtype=integer)
    return equal & (order > order[:, -1:] - number)
