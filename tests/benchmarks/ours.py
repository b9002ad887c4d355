"""lightning_prune's side of every benchmark: the one place to adapt when its functions change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

from lightning_prune import open_checkpoint, prune, prune_structured
from lightning_prune.evaluation.evaluate import evaluate
from lightning_prune.perp import reconstruct
from lightning_prune.pruning import pipeline
from lightning_prune.pruning.allocation import KFACAllocation, exact_counts, kfac_sparsities
from lightning_prune.pruning.alps import alps_support
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.exact import exact_weights, normalized
from lightning_prune.pruning.patterns import lowest_in_layer, lowest_in_rows, nm_mask, parse_pattern
from lightning_prune.pruning.scores import kfac_score
from lightning_prune.pruning.statistics import Accumulator
from lightning_prune.pruning.targets import find_targets
from lightning_prune.structure import permute_channels, read_structure, remove_units

# What a sweep collects for each score.
STATISTICS = {
    "wanda": ("input_norm",),
    "gblm": ("input_norm", "gradient_l2"),
    "kfac": ("input_norm", "output_grad_norm"),
}


def ours_prune(
    model: nn.Module,
    sequences: Tensor,
    score: str,
    sparsity: float,
    pattern: str,
    batch_size: int = 4,
    **options: Any,
) -> dict[str, Tensor]:
    """`lightning_prune.prune` end to end: masks by parameter name, weights masked in place."""
    return prune(
        model,
        common.batched(sequences, batch_size),
        score=score,
        sparsity=sparsity if pattern == "unstructured" else None,
        pattern=pattern,
        num_samples=len(sequences),
        progress=False,
        **options,
    )


def ours_permute(model: nn.Module, sequences: Tensor, pattern: str, batch_size: int) -> dict[str, list[float]]:
    """`permute_channels` end to end: the share of the scores that a mask keeps, before and after, of every kind."""
    batches = common.batched(sequences, batch_size)
    done = permute_channels(model, batches, pattern, num_samples=len(sequences), progress=False)
    return {kind: [done.before[kind], done.after[kind]] for kind in done.before}


def ours_stages() -> dict[str, list[tuple[Any, str]]]:
    """Where a pruning spends its time besides the passes through the model: holders and names of functions."""
    return {"hessians": [(Accumulator, "input_increments")], "solver": [(pipeline._Run, "_prune_layer")]}


def ours_reconstruct(
    model: nn.Module, sequences: Tensor, dense: Path | dict[str, Tensor], masks: dict[str, Tensor], **options: Any
) -> dict[str, tuple[float, float]]:
    """`lightning_prune.perp.reconstruct` end to end: the error of each block before and after."""
    batches = common.batched(sequences, options["batch_size"])
    source = open_checkpoint(dense) if isinstance(dense, Path) else dense
    done = reconstruct(model, batches, source, masks, num_samples=len(sequences), progress=False, **options)
    return {block.name: (block.before, block.after) for block in done.blocks}


def ours_structured(model: nn.Module, sequences: Tensor, **how: Any) -> dict[str, Any]:
    """`prune_structured` end to end: what is left."""
    report = prune_structured(model, common.batched(sequences, 4), num_samples=len(sequences), progress=False, **how)
    return {"parameters": report.parameters, "sizes": report.sizes.as_dict()}


def ours_remove_experts(model: nn.Module, sequences: Tensor, keep: int, saliency: str, seed: int) -> None:
    """`prune_structured` of experts end to end; or so many at random of every layer."""
    if saliency != "random":
        ours_structured(model, sequences, target={"num_experts": keep}, types=("expert",), saliency=saliency)
        return
    structure, generator = read_structure(model), torch.Generator().manual_seed(seed)
    experts = structure.units("expert")
    gone = [torch.randperm(experts, generator=generator)[keep:] for _ in range(structure.places("expert"))]
    remove_units(model, {"expert": gone})


def ours_tasks(model: nn.Module, tokenizer: Any, folder: str, limit: int | None) -> dict[str, Any]:
    """Accuracy on every file of minimal pairs in a folder, their mean and its standard error."""
    found = evaluate(model, tasks=[f"blimp:{folder}"], tokenizer=tokenizer, limit=limit, batch_size=32, progress=False)
    *tasks, mean = found.models[0].tasks
    accuracy = {task.task: task.value for task in tasks}
    return {"accuracy": accuracy, "mean": mean.value, "stderr": mean.stderr, "samples": mean.samples}


def ours_sweep(model: nn.Module, sequences: Tensor, score: str, batch_size: int) -> dict[str, Any]:
    """The calibration sweep of a score alone: statistics by parameter name."""
    return collect(
        model,
        common.batched(sequences, batch_size),
        find_targets(model, ignore=("lm_head",)),
        STATISTICS[score],
        num_samples=len(sequences),
        progress=False,
    )


def ours_select(scores: Iterable[Tensor], sparsity: float, group: str) -> list[Tensor]:
    """Selection alone; `group` is "row", "layer" or an N:M pattern."""
    if group == "row":
        return [lowest_in_rows(s, s.shape[0] * int(sparsity * s.shape[1])) for s in scores]
    if group == "layer":
        return [lowest_in_layer(s, int(sparsity * s.numel())) for s in scores]
    pattern = parse_pattern(group)
    return [nm_mask(s, pattern) for s in scores]


def ours_normalized(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian of inputs that have norm 1, and their norms."""
    return normalized(hessian)


def ours_exact(weight: Tensor, hessian: Tensor, mask: Tensor) -> Tensor:
    return exact_weights(weight, hessian, mask)


def ours_nm_mask(weight: Tensor, hessian: Tensor, pattern: str) -> Tensor:
    """Wanda's mask."""
    return nm_mask(weight.abs() * normalized(hessian)[1], parse_pattern(pattern))


def ours_alps_mask(weight: Tensor, hessian: Tensor, pattern: str) -> Tensor:
    """ALPS's mask as published."""
    return alps_support(weight, hessian, normalized(hessian)[1], lambda s: nm_mask(s, parse_pattern(pattern)))


class OursKfac:
    """kfac masks of many settings from the statistics of one sweep over the dense model."""

    def __init__(self, model: nn.Module, sequences: Tensor, batch_size: int) -> None:
        self.targets = find_targets(model, ignore=("lm_head",))
        self.statistics = ours_sweep(model, sequences, "kfac", batch_size)
        self.shares: dict[float, dict[str, float]] = {}

    @torch.no_grad()
    def masks(self, sparsity: float, gamma: float, mix: float, low: float, high: float) -> dict[str, Tensor]:
        """Masks by parameter name; the weights must be the dense ones."""
        if sparsity not in self.shares:  # shares don't depend on the settings: mix=1 without clamp shows them
            raw = KFACAllocation(mix=1.0, low=0.0, high=1.0)
            self.shares[sparsity] = kfac_sparsities(self.targets, self.statistics, sparsity, raw)
        wanted = {
            name: mix * min(max(share, low), high) + (1 - mix) * sparsity
            for name, share in self.shares[sparsity].items()
        }
        counts = exact_counts(self.targets, wanted, int(sparsity * sum(t.numel for t in self.targets)), {})
        masks = {}
        for target in self.targets:
            score = kfac_score(target.matrix().float(), self.statistics[target.name], gamma)
            masks[target.name] = target.to_parameter(lowest_in_layer(score, counts[target.name]))
        return masks
