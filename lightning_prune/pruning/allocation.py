"""How many weights each layer gives up, so that the whole is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.naming import name_matches
from lightning_prune.pruning.scores import kfac_score
from lightning_prune.pruning.selection import kth_smallest, threshold_of
from lightning_prune.pruning.statistics import INPUT_NORM, OUTPUT_GRAD_NORM, LayerStatistics, wide_dtype
from lightning_prune.pruning.targets import Target
from lightning_prune.ranks import Ranks
from lightning_prune.schedules import Share, count_of, is_share

ALLOCATIONS = ("uniform", "owl", "kfac")
Statistics = Mapping[str, LayerStatistics]


@dataclass(frozen=True)
class KFACAllocation:
    """Layer sparsities from one global threshold of the kfac score with gamma = 1.

    The share of a layer's weights below the threshold is clamped to ``[low, high]``, mixed with the uniform
    sparsity, and all are shifted alike so that the total is exact.

    Args:
        mix: Weight of the layer's own share; the uniform sparsity has ``1 - mix``.
        low: Lower clamp.
        high: Upper clamp.
    """

    mix: float = 0.7
    low: float = 0.1
    high: float = 0.9

    def __post_init__(self) -> None:
        if not (0 <= self.mix <= 1 and 0 <= self.low < self.high <= 1):
            raise ValueError(f"{self!r}: mix must be in [0, 1] and 0 <= low < high <= 1")


@dataclass(frozen=True)
class OWLAllocation:
    """Outlier-weighed layer sparsities (Yin et al. 2023, arXiv 2310.05175, sec. 3).

    A decoder block keeps more if more of its Wanda scores are outliers (above `multiple` times their mean).

    Args:
        multiple: M of the paper; 5 or 7 there.
        spread: lambda of the paper: sparsities lie within the uniform one plus or minus this.
    """

    multiple: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not (self.multiple > 0 and 0 <= self.spread < 1):
            raise ValueError(f"{self!r}: multiple must be > 0 and spread in [0, 1)")


Allocation = str | Mapping[str, float] | KFACAllocation | OWLAllocation


def make_allocation(allocation: Allocation) -> Allocation:
    """Names to their objects; the rest as it is.

    Raises:
        ValueError: an unknown name, or a mapping with a sparsity outside [0, 1].
        TypeError: anything else.
    """
    if isinstance(allocation, str):
        if allocation == "kfac":
            return KFACAllocation()
        if allocation == "owl":
            return OWLAllocation()
        if allocation == "uniform":
            return allocation
        raise ValueError(f"allocation={allocation!r} is unknown; choose from {ALLOCATIONS}, or map names to sparsities")
    if isinstance(allocation, Mapping):
        for pattern, sparsity in allocation.items():
            if not is_share(sparsity):
                raise ValueError(f"allocation[{pattern!r}]={sparsity!r} must be a sparsity in [0, 1]")
        return allocation
    if isinstance(allocation, (KFACAllocation, OWLAllocation)):
        return allocation
    raise TypeError(f"allocation={allocation!r} must be one of {ALLOCATIONS}, or map names to sparsities")


def allocation_statistics(allocation: Allocation) -> frozenset[str]:
    """The statistics that an allocation reads."""
    if isinstance(allocation, KFACAllocation):
        return frozenset({INPUT_NORM, OUTPUT_GRAD_NORM})
    return frozenset({INPUT_NORM}) if isinstance(allocation, OWLAllocation) else frozenset()


def uniform_counts(targets: Sequence[Target], sparsity: Share, group: str) -> dict[str, int]:
    """``floor(sparsity * group size)`` of every row, or of every layer."""
    if group == "row":
        return {t.name: t.shape[0] * count_of(sparsity, t.shape[1]) for t in targets}
    return {t.name: count_of(sparsity, t.numel) for t in targets}


def mapping_counts(
    targets: Sequence[Target], mapping: Mapping[str, Share], sparsity: Share | None, lower: Mapping[str, int]
) -> dict[str, int]:
    """Sparsities by name pattern; layers that no pattern matches share what the total of `sparsity` leaves.

    Raises:
        ValueError: a pattern matches nothing; two patterns give one layer different sparsities; the rest cannot
            make up the total.
    """
    fixed: dict[str, Share] = {}
    for pattern, value in mapping.items():
        matched = [t.name for t in targets if name_matches(t.name, pattern)]
        if not matched:
            raise ValueError(f"allocation pattern {pattern!r} matches no target, such as {targets[0].name!r}")
        for name in matched:
            if fixed.setdefault(name, value) != value:
                raise ValueError(
                    f"allocation gives {name!r} both {float(fixed[name])} and {float(value)} (by {pattern!r})"
                )
    rest = [t for t in targets if t.name not in fixed]
    counts = {t.name: count_of(fixed[t.name], t.numel) for t in targets if t.name in fixed}
    total = sum(t.numel for t in targets)
    if not rest:
        reached = sum(counts.values()) / total
        if sparsity is not None and abs(reached - sparsity) > 1e-3:
            raise ValueError(
                f"allocation covers every layer and gives {reached:.4f} in all, but sparsity={float(sparsity)}; leave "
                "sparsity out, or leave some layers to be filled in"
            )
        return counts
    sparsity = 0.5 if sparsity is None else sparsity
    left = count_of(sparsity, total) - sum(counts.values())
    if lower:  # what is pruned stays pruned, also where less is asked for now
        left = max(left, sum(lower.get(t.name, 0) for t in rest))
    room = sum(t.numel for t in rest)
    if not 0 <= left <= room:
        raise ValueError(
            f"allocation leaves {left} of {room} weights to prune in the layers it does not name, to reach "
            f"sparsity={float(sparsity)}; change one of them"
        )
    return counts | exact_counts(rest, {t.name: left / room for t in rest}, left, lower)


def kfac_sparsities(
    targets: Sequence[Target],
    statistics: Statistics,
    sparsity: float,
    allocation: KFACAllocation,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Layer sparsities of `KFACAllocation`, before the shift to the exact total.

    Args:
        targets: The layers.
        statistics: Of each, cut to what `Target.matrix` covers.
        sparsity: Of the whole.
        allocation: Its settings.
        ranks: Whose parts make up the whole; None if every matrix is whole here.
    """
    shares = global_shares(targets, lambda t: kfac_score(_wide(t), statistics[t.name], 1.0), sparsity, ranks)
    return {
        name: allocation.mix * min(max(share, allocation.low), allocation.high) + (1 - allocation.mix) * sparsity
        for name, share in shares.items()
    }


def global_shares(
    targets: Sequence[Target], score: Callable[[Target], Tensor], sparsity: Share, ranks: Ranks | None = None
) -> dict[str, float]:
    """Share of each layer's weights at or below one threshold that prunes `sparsity` of them all."""
    counts = global_counts(targets, score, count_of(sparsity, sum(t.numel for t in targets)), ranks)
    return {t.name: counts[t.name] / t.numel for t in targets}


def global_counts(
    targets: Sequence[Target], score: Callable[[Target], Tensor], count: int, ranks: Ranks | None = None
) -> dict[str, int]:
    """How many of the `count` lowest scores of all layers lie in each; equal scores go from the first layers first.

    Scores are computed again in each pass, so that only one layer's are ever held. With `ranks`, each gives the scores
    of its part of a matrix.
    """
    if count == 0:
        return {t.name: 0 for t in targets}
    if ranks is None:
        found = threshold_of(lambda: map(score, targets), count, sum(t.numel for t in targets))
        counts = [list(pair) for pair in zip(found.below, found.equal, strict=True)]
    else:
        counts = _counts_over_ranks(targets, score, count, ranks)
    below = {t.name: number for t, (number, _) in zip(targets, counts, strict=True)}
    equal = {t.name: number for t, (_, number) in zip(targets, counts, strict=True)}
    ties = count - sum(below.values())
    for name in below:
        taken = min(ties, equal[name])
        below[name] += taken
        ties -= taken
    return below


def _counts_over_ranks(
    targets: Sequence[Target], score: Callable[[Target], Tensor], count: int, ranks: Ranks
) -> list[list[int]]:
    """How many scores of each layer are below the `count`-th lowest of all ranks, and how many equal to it."""

    def counted(target: Target) -> Tensor:
        return score(target) if target.layout.counted else score(target)[:0]

    threshold = kth_smallest(lambda: map(counted, targets), count, ranks.sum_parts)
    pairs = []
    for target in targets:
        scores = counted(target)
        pairs.append(torch.stack([(scores < threshold).sum(), (scores == threshold).sum()]))
    found: list[list[int]] = ranks.sum_parts(torch.stack(pairs)).tolist()  # [layers, 2]
    return found


def owl_sparsities(
    targets: Sequence[Target],
    statistics: Statistics,
    sparsity: float,
    allocation: OWLAllocation,
    blocks: Mapping[str, str],
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Layer sparsities of `OWLAllocation`; `blocks` gives each target's decoder block (its own name if none)."""

    def over_ranks(value: Callable[[Target], Tensor]) -> list[float]:
        own = [value(t) if ranks is None or t.layout.counted else value(t) * 0 for t in targets]
        whole = torch.stack(own).double()
        return (whole if ranks is None else ranks.sum_parts(whole)).tolist()

    sums = over_ranks(lambda t: _wanda(t, statistics).sum(dtype=torch.float64))
    totals: dict[str, list[float]] = {}  # of a block: sum of scores, number of scores
    for target, total in zip(targets, sums, strict=True):
        entry = totals.setdefault(blocks[target.name], [0.0, 0.0])
        entry[0] += total
        entry[1] += target.numel
    limits = {block: allocation.multiple * total / number for block, (total, number) in totals.items()}
    above = over_ranks(lambda t: (_wanda(t, statistics) > limits[blocks[t.name]]).sum())
    outliers = dict.fromkeys(totals, 0.0)
    for target, count in zip(targets, above, strict=True):
        outliers[blocks[target.name]] += count
    ratios = {block: outliers[block] / totals[block][1] for block in totals}
    low, high = min(ratios.values()), max(ratios.values())
    width = (high - low) or 1.0
    # The block with the most outliers is pruned least: sparsity - spread .. sparsity + spread.
    shifted = {b: sparsity + allocation.spread * (1 - 2 * (r - low) / width) for b, r in ratios.items()}
    return {t.name: shifted[blocks[t.name]] for t in targets}


def _wanda(target: Target, statistics: Statistics) -> Tensor:
    return _wide(target).abs() * statistics[target.name].get(INPUT_NORM)


def _wide(target: Target) -> Tensor:
    weight = target.matrix()
    return weight.to(wide_dtype(weight.dtype))


def exact_counts(
    targets: Sequence[Target], sparsities: Mapping[str, float], total: int, lower: Mapping[str, int]
) -> dict[str, int]:
    """Integer counts near the given sparsities, all shifted by one number so that they sum to `total`.

    Args:
        targets: The layers.
        sparsities: Wanted sparsity of each.
        total: Number of weights to prune in all.
        lower: Counts below which a layer must not fall (weights that are pruned already); default 0.

    Raises:
        ValueError: `total` is below the sum of `lower` or above the number of weights.
    """
    sizes = {t.name: t.numel for t in targets}
    floors = {name: lower.get(name, 0) for name in sizes}
    if not sum(floors.values()) <= total <= sum(sizes.values()):
        raise ValueError(
            f"cannot prune {total} weights of {sum(sizes.values())}, {sum(floors.values())} of which are pruned "
            "already; sparsity can only grow"
        )

    def wanted(shift: float) -> dict[str, float]:
        return {n: min(max((sparsities[n] + shift) * sizes[n], floors[n]), sizes[n]) for n in sizes}

    low, high = -1.0 - max(sparsities.values()), 1.0 + max(0.0, -min(sparsities.values()))
    for _ in range(100):
        middle = (low + high) / 2
        if sum(wanted(middle).values()) < total:
            low = middle
        else:
            high = middle
    exact = wanted(high)
    counts = {name: math.floor(value) for name, value in exact.items()}
    # Largest remainders first; the order of layers breaks ties.
    by_remainder = sorted(sizes, key=lambda n: counts[n] - exact[n])
    missing = total - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in by_remainder if missing > 0 else reversed(by_remainder):
            if missing and floors[name] <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
    return counts
