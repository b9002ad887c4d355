"""Plan a pruning: its settings, fitted to the layers of a model, before any computation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import torch
from torch import nn

from lightning_prune.errors import refuse_inference_tensors
from lightning_prune.naming import and_alike, to_ignore
from lightning_prune.pruning.allocation import (
    Allocation,
    KFACAllocation,
    OWLAllocation,
    allocation_statistics,
    make_allocation,
    mapping_counts,
    uniform_counts,
)
from lightning_prune.pruning.coverage import Coverage, coverage_of
from lightning_prune.pruning.layer_kinds import INNER
from lightning_prune.pruning.offloading import check_offloaded
from lightning_prune.pruning.patterns import NM
from lightning_prune.pruning.scores import Criterion
from lightning_prune.pruning.settings import PruningSettings
from lightning_prune.pruning.stacks import find_stacks, likely_stacks
from lightning_prune.pruning.statistics import BACKWARD_STATISTICS, FORWARD_STATISTICS, HESSIAN
from lightning_prune.pruning.targets import Target, parameters_of, select_layers
from lightning_prune.pruning.zeros import CONVOLUTIONS
from lightning_prune.ranks import Ranks, ShortOfMemoryError
from lightning_prune.schedules import Share, count_of, exact_share
from lightning_prune.sharding import local, type_name


@dataclass(frozen=True)
class PruningPlan:
    """Settings of one pruning, bound to the layers of a model; None in them has become the score's own."""

    settings: PruningSettings
    targets: list[Target]
    coverage: Coverage
    stacks: list[list[tuple[str, nn.Module]]]
    group: str
    allocation: Allocation
    num_samples: int
    likely: bool = False  # whether the stacks are only what may be blocks

    def with_samples(self, num_samples: int) -> PruningPlan:
        """The plan for another number of samples (a rank's share)."""
        return replace(self, num_samples=num_samples)

    @property
    def score(self) -> Criterion:
        """What decides which weights go."""
        return self.settings.scored_by

    @property
    def pattern(self) -> NM | None:
        """The N:M pattern, or None for unstructured."""
        return self.settings.nm

    @property
    def sequential(self) -> bool:
        """Whether blocks are pruned one after the other."""
        return self.settings.sequential

    @property
    def sparsity(self) -> Fraction:
        """The share to prune, exactly, where no pattern and no mapping says it."""
        return exact_share(0.5 if self.settings.sparsity is None else self.settings.sparsity)

    def mapped(self, fraction: Fraction) -> tuple[dict[str, Share], Share | None]:
        """Sparsities by name pattern, and that of the whole, at a fraction of the way there."""
        assert isinstance(self.allocation, Mapping)
        mapping: dict[str, Share] = {name: exact_share(value) * fraction for name, value in self.allocation.items()}
        return mapping, None if self.settings.sparsity is None else self.sparsity * fraction

    @property
    def planned_count(self) -> int | None:
        """How many weights are pruned in all; None where the weights themselves decide (score="keep")."""
        targets, pattern = self.targets, self.pattern
        if self.settings.keeps_zeros:
            return None
        if pattern is not None:
            return sum(t.numel // pattern.m * (pattern.m - pattern.n) for t in targets)
        if isinstance(self.allocation, Mapping):
            return sum(mapping_counts(targets, *self.mapped(Fraction(1)), {}).values())
        if self.group == "global" or isinstance(self.allocation, (KFACAllocation, OWLAllocation)):
            return count_of(self.sparsity, sum(t.numel for t in targets))
        return sum(uniform_counts(targets, self.sparsity, self.group).values())

    @property
    def blocks(self) -> list[tuple[str, nn.Module]]:
        """Name and module of the blocks of all stacks."""
        return [block for stack in self.stacks for block in stack]

    @property
    def needs_data(self) -> bool:
        """Whether calibration samples are needed."""
        return bool(self.dense_statistics or self.block_statistics)

    @property
    def passes(self) -> int:
        """How often the calibration samples are read."""
        return bool(self.dense_statistics) + bool(self.block_statistics)

    @property
    def scores_in_walk(self) -> bool:
        """Whether activations are seen block by block, on the outputs of pruned blocks, by the score too."""
        return self.sequential and bool(self.score.statistics & FORWARD_STATISTICS)

    @property
    def dense_statistics(self) -> frozenset[str]:
        """What one sweep through the dense model must collect."""
        needed = self.score.statistics
        if self.scores_in_walk:
            needed = needed - FORWARD_STATISTICS
        if not self.sequential:
            needed = needed | self._solver_statistics
        return needed | allocation_statistics(self.allocation)

    @property
    def block_statistics(self) -> frozenset[str]:
        """What is collected block by block."""
        if not self.sequential:
            return frozenset()
        needed = self.score.statistics & FORWARD_STATISTICS if self.scores_in_walk else frozenset()
        return needed | self._solver_statistics

    @property
    def _solver_statistics(self) -> frozenset[str]:
        solver = self.settings.solver
        return frozenset() if solver is None else solver.statistics


def make_plan(
    model: nn.Module, settings: PruningSettings, beside: Collection[str] = (), offloaded: bool = False
) -> PruningPlan:
    """Fit settings to a model, and refuse those that do not; nothing is computed.

    Args:
        model: Any module.
        settings: What was asked for.
        beside: Names of weights that another pruning takes, which is no reason to worry.
        offloaded: Whether to take weights that a `device_map` keeps in main memory or on disk.

    Raises:
        ValueError, TypeError: see `prune`.
    """
    nm, group, allocation, read = settings.nm, settings.compared_within, _allocation_of(settings), _read_by(settings)
    selection = select_layers(model, settings.targets, settings.ignore, **needs_of(settings), offloaded=offloaded)
    found = selection.targets
    _check_layers(found, nm, read)
    _check_memory(found)
    if isinstance(allocation, Mapping):  # fail now, not after calibration
        mapping_counts(found, allocation, settings.sparsity, {})
    coverage = coverage_of(model, selection, keeps_zeros=settings.keeps_zeros, beside=beside)
    stacks = find_stacks(model)
    likely = settings.sequential and not stacks
    stacks = likely_stacks(model) if likely else stacks
    plan = PruningPlan(settings, found, coverage, stacks, group, allocation, settings.num_samples, likely)
    if plan.sequential:
        _check_sequential(plan, model)
    _check_offloaded(plan, model)
    backward = bool(plan.dense_statistics & BACKWARD_STATISTICS)
    refuse_inference_tensors(model.named_parameters(), frozen=backward)
    return plan


def needs_of(settings: PruningSettings) -> dict[str, bool]:
    """What `select_layers` has to know of settings: they leave some layers alone, which they cannot score."""
    read = _read_by(settings)
    return {"called": bool(read), "hessian": HESSIAN in read}


def _allocation_of(settings: PruningSettings) -> Allocation:
    given = settings.allocation
    if given is None:
        uniform = settings.nm is not None or settings.compared_within == "global"
        given = "uniform" if uniform else settings.scored_by.allocation
    return make_allocation(given)


def _read_by(settings: PruningSettings) -> frozenset[str]:
    """The statistics that are read of any layer."""
    solver = frozenset() if settings.solver is None else settings.solver.statistics
    return settings.scored_by.statistics | allocation_statistics(_allocation_of(settings)) | solver


def _check_offloaded(plan: PruningPlan, model: nn.Module) -> None:
    away = [t for t in plan.targets if t.offloaded]
    # Autograd holds every weight that a forward pass has met until its backward, unless blocks run again then.
    if away and plan.dense_statistics & BACKWARD_STATISTICS and (plan.likely or not plan.blocks):
        raise ValueError(
            f"score={plan.score.name!r}, or its allocation, needs a backward pass, and {type(model).__name__} names no "
            "decoder blocks (_no_split_modules) whose weights could be brought one after the other, so all offloaded "
            f"weights (device_map) would be held at once, such as {away[0].name!r}: choose a score without gradients "
            "(wanda, sparsegpt, magnitude), or load the model whole"
        )
    check_offloaded(model, [(t.name, t.module, t.parameter.rpartition(".")[2]) for t in away])


def _check_layers(targets: Sequence[Target], nm: NM | None, statistics: frozenset[str]) -> None:
    for target in targets:
        inputs = target.shape[1]
        if nm is not None and inputs % nm.m:
            odd = {t.parameter: None for t in targets if t.shape[1] % nm.m}
            others = {t.parameter for t in targets} - odd.keys()
            raise ValueError(
                f"pattern={str(nm)!r}: the {inputs} inputs of {target.name!r} do not divide by {nm.m}; add "
                f"{to_ignore(target.parameter)}, or choose another pattern{and_alike(list(odd), others)}"
            )
        if statistics and target.kind is INNER:
            raise ValueError(
                f"{target.name!r} is multiplied inside of {type_name(target.module)}, where activations and gradients "
                f"are not seen: {_without_data(target)}"
            )
        if HESSIAN in statistics and target.groups > 1:
            raise ValueError(
                f"{target.name!r} is a grouped convolution, which has a Hessian in each group, and none are made here: "
                "choose a score without one (wanda, gblm, kfac, magnitude) and no update, or add "
                f"{to_ignore(target.parameter)}"
            )
        groups = {module.groups for module in target.modules if isinstance(module, CONVOLUTIONS)}
        if statistics and len(groups) > 1:
            raise ValueError(
                f"{target.name!r} is the weight of convolutions in {sorted(groups)} groups, whose rows meet different "
                f"inputs: {_without_data(target)}"
            )


def _check_memory(targets: Sequence[Target]) -> None:
    """Refuse parameters that are views of one memory, which would all get the zeros of all masks."""
    spans = []
    for name, weight in parameters_of(targets).items():
        part = local(weight.detach())
        # Of one with gaps another may lie in them, as the halves of a matrix do.
        whole = sum((n - 1) * step for n, step in zip(part.shape, part.stride(), strict=True)) + 1 == part.numel()
        if part.numel() and whole and not part.is_meta:
            spans.append((str(part.device), part.data_ptr(), part.nbytes, name))
    for (device, start, size, one), (other_device, other_start, _, other) in pairwise(sorted(spans)):
        if device == other_device and other_start < start + size:
            raise ValueError(
                f"{one!r} and {other!r} are two parameters in the same memory (such as a Parameter made of "
                "weight.data.t()): each would get a mask, and both the zeros of both. Use one parameter (the same "
                f"object, or F.linear with the weight transposed), or add {to_ignore(other)}"
            )


def _without_data(target: Target) -> str:
    return (
        "use score='magnitude', without an update or an allocation ('owl', 'kfac') that reads them too, or add "
        f"{to_ignore(target.parameter)}"
    )


def _check_sequential(plan: PruningPlan, model: nn.Module) -> None:
    if not plan.blocks:
        raise ValueError(
            f"sequential=True, but {type(model).__name__} names no decoder blocks (_no_split_modules), and has no "
            "nn.ModuleList or nn.Sequential of modules of one class either that could be such blocks; use "
            "sequential=False"
        )
    if not plan.block_statistics:
        raise ValueError(
            f"sequential=True changes nothing for score={plan.score.name!r}, whose masks need the whole model at once; "
            "use sequential=False, or add update='exact'"
        )
    if plan.group == "global":
        raise ValueError(
            "sequential=True prunes block by block and cannot compare globally; use group='row' or 'layer'"
        )
    homes: dict[int, set[str]] = {}
    for name, block in plan.blocks:
        for module in block.modules():
            homes.setdefault(id(module), set()).add(name)
    outside = list(dict.fromkeys(t.parameter for t in plan.targets if not all(id(m) in homes for m in t.holders)))
    if outside:
        raise ValueError(
            f"sequential=True, but {', '.join(map(repr, outside[:4]))} lie outside the decoder blocks; use "
            f"sequential=False, or add {to_ignore(*outside)}"
        )
    for target in plan.targets:
        if len(shared := sorted({name for m in target.holders for name in homes[id(m)]})) > 1:
            raise ValueError(
                f"sequential=True, but {target.parameter!r} is a weight of several blocks ({', '.join(shared[:4])}), "
                "and would be pruned by what it meets in the first of them alone; use sequential=False, or add "
                f"{to_ignore(target.parameter)}"
            )


@contextmanager
def memory_advice(plan: PruningPlan, ranks: Ranks | None) -> Iterator[None]:
    """Add to an out-of-memory error where it was, what was going on and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = ["smaller calibration batches, or shorter samples"]
        aggregates = plan.dense_statistics & {"gradient_l1", "gradient_l2"}
        if aggregates:
            advice.append("gradient_device='cpu' or gradient_dtype='bfloat16' for the gradient aggregates")
        if HESSIAN in plan.dense_statistics:
            advice.append("sequential=True, which holds the Hessians of one block")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
        told = isinstance(error, ShortOfMemoryError) and not error.here  # by the rank that it names
        where = "" if ranks is None or told else f"on rank {ranks.rank}, "
        raise torch.OutOfMemoryError(
            f"{reason} ({where}while pruning with score={plan.score.name!r}; the weights are as they were). Try "
            + "; ".join(advice)
        ) from error
