"""Validate pruning settings against a model before any computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lightning_prune.pruning.allocation import Allocation, allocation_statistics, make_allocation, mapping_counts
from lightning_prune.pruning.coverage import Coverage, coverage_of
from lightning_prune.pruning.patterns import NM, parse_pattern
from lightning_prune.pruning.scores import GROUPS, Keep, Score, SparseGPT
from lightning_prune.pruning.statistics import FORWARD_STATISTICS, HESSIAN
from lightning_prune.pruning.targets import Target, find_stacks, select_layers
from lightning_prune.schedules import is_share

UPDATES = (None, "obs")
_GRADIENT_DTYPES: dict[str | torch.dtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16,
}


@dataclass(frozen=True)
class PruningPlan:
    """Validated settings of one pruning, bound to the layers of a model."""

    targets: list[Target]
    coverage: Coverage
    score: Score
    sparsity: float | None
    pattern: NM | None
    group: str
    allocation: Allocation
    update: str | None
    num_samples: int
    sequential: bool
    stacks: list[list[tuple[str, nn.Module]]]
    gradient_dtype: torch.dtype = torch.float32
    gradient_device: torch.device | str | None = None
    progress: bool = True

    def with_samples(self, num_samples: int) -> PruningPlan:
        """The plan for another number of samples (a rank's share)."""
        return replace(self, num_samples=num_samples)

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
    def updates_weights(self) -> bool:
        """Whether remaining weights change too."""
        return self.update is not None or isinstance(self.score, SparseGPT)

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
        if self.updates_weights and not self.sequential:
            needed = needed | {HESSIAN}
        return needed | allocation_statistics(self.allocation)

    @property
    def block_statistics(self) -> frozenset[str]:
        """What is collected block by block."""
        if not self.sequential:
            return frozenset()
        needed = self.score.statistics & FORWARD_STATISTICS if self.scores_in_walk else frozenset()
        return needed | ({HESSIAN} if self.updates_weights else frozenset())


def check_settings(
    *,
    score: Score,
    sparsity: float | None,
    pattern: str,
    group: str | None,
    allocation: Allocation | None,
    update: str | None,
    num_samples: int,
    sequential: bool,
    gradient_dtype: str | torch.dtype,
    gradient_device: torch.device | str | None,
    progress: bool,
) -> None:
    """Refuse settings that no model could take.

    Raises:
        ValueError, TypeError: see `prune`.
    """
    nm = parse_pattern(pattern)
    _check_sparsity(sparsity)
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or not 1 <= num_samples < 2**31:
        raise ValueError(f"num_samples={num_samples!r} must be an integer >= 1, below 2**31")
    if update not in UPDATES:
        raise ValueError(f"update={update!r} must be None or 'obs'")
    if group is not None and group not in GROUPS:
        raise ValueError(f"group={group!r} must be one of {GROUPS}, or None for the score's own")
    if score.group not in GROUPS:
        raise ValueError(f"score {score.name!r} has group={score.group!r}; it must be one of {GROUPS}")
    if gradient_dtype not in _GRADIENT_DTYPES:
        raise ValueError(f"gradient_dtype={gradient_dtype!r} must be 'float32' or 'bfloat16'")
    if gradient_device is not None:
        torch.device(gradient_device)
    if nm is not None:
        if sparsity is not None and abs(sparsity - nm.sparsity) > 1e-6:
            raise ValueError(f"pattern={pattern!r} prunes {nm.sparsity:.4f} of the weights, but sparsity={sparsity}")
        if allocation not in (None, "uniform"):
            raise ValueError(f"pattern={pattern!r} fixes the sparsity of every layer: leave allocation out")
        if group not in (None, "row"):
            raise ValueError(f"pattern={pattern!r} compares within groups of a row: leave group={group!r} out")
    chosen = make_allocation("uniform" if allocation is None else allocation)
    if (group or score.group) == "global" and chosen != "uniform":
        raise ValueError("group='global' decides the layers' sparsities itself: leave allocation out")
    if isinstance(score, SparseGPT) and (group not in (None, "layer") or update):
        raise ValueError("score='sparsegpt' selects within 128 columns and updates by itself: no group, no update")
    if isinstance(score, Keep) and (update or sequential or sparsity is not None or nm or group or allocation):
        raise ValueError(
            "score='keep' takes the zeros as they are: leave sparsity, pattern, group, allocation, update and "
            "sequential out"
        )


def make_plan(
    model: nn.Module,
    *,
    targets: Sequence[str | type[nn.Module]] | None,
    ignore: Sequence[str | type[nn.Module]],
    **settings: Any,
) -> PruningPlan:
    """Validate the arguments of `prune` against the model; nothing is computed.

    Args:
        model: The model.
        targets: See `prune`.
        ignore: See `prune`.
        **settings: The arguments of `check_settings`.

    Raises:
        ValueError, TypeError: see `prune`.
    """
    check_settings(**settings)
    score, nm = settings["score"], parse_pattern(settings["pattern"])
    group = settings["group"] or score.group
    allocation = settings["allocation"]
    if allocation is None:
        allocation = "uniform" if nm is not None or group == "global" else score.allocation
    allocation = make_allocation(allocation)
    statistics = score.statistics | allocation_statistics(allocation) | ({HESSIAN} if settings["update"] else set())
    selection = select_layers(model, targets, ignore, called=bool(statistics))
    found = selection.targets
    _check_layers(found, nm, statistics)
    if isinstance(allocation, Mapping):  # fail now, not after calibration
        mapping_counts(found, allocation, settings["sparsity"], {})
    plan = PruningPlan(
        targets=found,
        coverage=coverage_of(model, selection, keeps_zeros=isinstance(score, Keep)),
        score=score,
        sparsity=settings["sparsity"] if nm is None else nm.sparsity,
        pattern=nm,
        group=group,
        allocation=allocation,
        update=settings["update"],
        num_samples=settings["num_samples"],
        sequential=settings["sequential"],
        stacks=find_stacks(model),
        gradient_dtype=_GRADIENT_DTYPES[settings["gradient_dtype"]],
        gradient_device=settings["gradient_device"],
        progress=settings["progress"],
    )
    if plan.sequential:
        _check_sequential(plan, model)
    return plan


def _check_sparsity(value: object) -> None:
    if value is None:
        return
    if not is_share(value):
        raise ValueError(f"sparsity={value!r} must be a number in [0, 1]: the share of weights to prune, such as 0.5")


def _check_layers(targets: Sequence[Target], nm: NM | None, statistics: Iterable[str]) -> None:
    statistics = frozenset(statistics)
    for target in targets:
        inputs = target.shape[1]
        if nm is not None and inputs % nm.m:
            raise ValueError(
                f"pattern={str(nm)!r}: the {inputs} inputs of {target.name!r} do not divide by {nm.m}; add the layer "
                "to `ignore`, or choose another pattern"
            )
        for module in target.modules:
            if statistics and isinstance(module, nn.Conv2d) and module.groups > 1:
                raise ValueError(
                    f"{target.name!r} is a grouped convolution, for which activations and gradients per input are not "
                    "defined here; use score='magnitude', or add the layer to `ignore`"
                )


def _check_sequential(plan: PruningPlan, model: nn.Module) -> None:
    if not plan.blocks:
        raise ValueError(
            f"sequential=True, but {type(model).__name__} names no decoder blocks (_no_split_modules); use "
            "sequential=False"
        )
    if not plan.block_statistics:
        raise ValueError(
            f"sequential=True changes nothing for score={plan.score.name!r}, whose masks need the whole model at once; "
            "use sequential=False, or add update='obs'"
        )
    if plan.group == "global":
        raise ValueError(
            "sequential=True prunes block by block and cannot compare globally; use group='row' or 'layer'"
        )
    inside = {id(m) for _, block in plan.blocks for m in block.modules()}
    outside = [t.name for t in plan.targets if id(t.module) not in inside]
    if outside:
        raise ValueError(
            f"sequential=True, but {', '.join(map(repr, outside[:4]))} lie outside the decoder blocks; add them to "
            "`ignore`, or use sequential=False"
        )


@contextmanager
def memory_advice(plan: PruningPlan) -> Iterator[None]:
    """Add to an out-of-memory error what was going on and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = ["smaller calibration batches, or shorter samples"]
        aggregates = plan.dense_statistics & {"gradient_l1", "gradient_l2"}
        if aggregates:
            advice.append("gradient_device='cpu' or gradient_dtype='bfloat16' for the gradient aggregates")
        if (plan.updates_weights or "hessian" in plan.dense_statistics) and not plan.sequential:
            advice.append("sequential=True, which holds the Hessians of one block")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
        raise torch.OutOfMemoryError(
            f"{reason} (while pruning with score={plan.score.name!r}; the weights are as they were). Try "
            + "; ".join(advice)
        ) from error
