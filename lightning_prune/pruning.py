"""`prune`: the whole pipeline without a Trainer: targets, calibration, scores, masks, and the weight update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.allocation import (
    Allocation,
    KFACAllocation,
    OWLAllocation,
    exact_counts,
    global_counts,
    kfac_sparsities,
    mapping_counts,
    owl_sparsities,
    uniform_counts,
)
from lightning_prune.calibration import LossFn, collect, collect_forward
from lightning_prune.masks import Masks, apply_masks, masks_from_zeros, uninterrupted
from lightning_prune.obs import prune_with_hessian
from lightning_prune.patterns import check_scores, lowest_in_layer, lowest_in_rows, nm_mask
from lightning_prune.plan import PruningPlan, make_plan
from lightning_prune.progress import progress_bar
from lightning_prune.running import forward, on_device, quiet_model, synchronized_errors
from lightning_prune.scores import Keep, Score, SparseGPT, make_score
from lightning_prune.sequential import BlockWalk
from lightning_prune.statistics import FORWARD_STATISTICS, HESSIAN, CalibrationError, LayerStatistics
from lightning_prune.targets import DEFAULT_IGNORE, Target


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    score: str | Score = "gblm",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    group: str | None = None,
    allocation: Allocation | None = None,
    update: str | None = None,
    num_samples: int = 128,
    alpha: float = 100.0,
    gamma: float = 0.7,
    grad_norm: str = "l2",
    sequential: bool = False,
    loss_fn: LossFn | None = None,
    targets: Sequence[str | type[nn.Module]] | None = None,
    ignore: Sequence[str | type[nn.Module]] = DEFAULT_IGNORE,
    seed: int = 0,
    gradient_dtype: str | torch.dtype = "float32",
    gradient_device: torch.device | str | None = None,
    progress: bool = True,
) -> Masks:
    """Prune a model in place and return its masks.

    Everything is validated first; if calibration fails or is interrupted, the weights are bit-identical to before.

    Args:
        model: Any module; a transformers model needs nothing more, others need `loss_fn` for scores with gradients.
        batches: Calibration data, an iterable of what the model takes: dicts with input_ids and optionally
            attention_mask and labels, tensors, or tuples whose first part is the input. Tensors are moved to the
            model's device. Not needed for magnitude, random and keep. With `sequential` and a score that also needs
            gradients or an allocation from data, it is iterated twice (a list or a DataLoader, no generator).
        score: ``"magnitude"``, ``"random"``, ``"wanda"``, ``"gradient"``, ``"gblm"``, ``"sparsegpt"``, ``"kfac"``,
            ``"keep"`` (the zeros that are there), or an object (see `lightning_prune.scores.Score`).
        sparsity: Share of the weights to prune, in [0, 1]; default 0.5, or what an N:M pattern or a complete
            `allocation` mapping implies.
        pattern: ``"unstructured"`` or ``"N:M"``: N *kept* of every M consecutive inputs (NVIDIA's 2:4).
        group: What weights are compared within: ``"row"``, ``"layer"`` or ``"global"``; default the score's own.
            Exactly ``floor(sparsity * group size)`` are pruned in each.
        allocation: Layer sparsities: ``"uniform"``, ``"owl"``, ``"kfac"``, an `OWLAllocation` or `KFACAllocation`,
            or a mapping from name patterns to sparsities; default the score's own. The total is exact,
            ``floor(sparsity * number of weights)``.
        update: ``"obs"`` updates the remaining weights with each layer's Hessian, on the mask of any score.
        num_samples: Calibration samples (sequences).
        alpha: Weight of gblm's gradient term.
        gamma: Power of kfac's output-gradient norm.
        grad_norm: ``"l1"`` or ``"l2"`` over per-sample gradients (gradient, gblm).
        sequential: Decoder block by decoder block, each on the outputs of the pruned blocks before it; holds one
            block's activations. For wanda, gblm, sparsegpt and every `update`; other scores' masks need the whole
            model at once. Without it all statistics come from the dense model in one sweep.
        loss_fn: ``loss_fn(model, batch)``, a scalar or one loss a sample ``[B]``; also drives the forward pass of
            scores without gradients.
        targets: Layer types, type names or name patterns to prune; default every Linear, Conv1D, Conv2d.
        ignore: The same, left out.
        seed: Of ``"random"``.
        gradient_dtype: ``"float32"`` or ``"bfloat16"`` for the gradient aggregate, one buffer a pruned weight. Sums
            in bfloat16 stop growing after some 256 samples of equal size.
        gradient_device: Device of the gradient aggregate, such as ``"cpu"``; default the weight's.
        progress: Show progress bars in a terminal.

    Returns:
        Bool masks of the parameters' shapes by parameter name, True = kept.

    Raises:
        ValueError: an argument or a combination that is not supported; the message names value and choices.
        TypeError: an argument of the wrong type.
        CalibrationError: calibration could not give finite statistics of every layer.
    """
    plan = make_plan(
        model,
        score=make_score(score, alpha=alpha, gamma=gamma, grad_norm=grad_norm, seed=seed),
        sparsity=sparsity,
        pattern=pattern,
        group=group,
        allocation=allocation,
        update=update,
        num_samples=num_samples,
        sequential=sequential,
        targets=targets,
        ignore=ignore,
        gradient_dtype=gradient_dtype,
        gradient_device=gradient_device,
        progress=progress,
    )
    if plan.needs_data and batches is None:
        raise ValueError(f"score={plan.score.name!r} needs calibration data: pass batches")
    return run_plan(plan, model, batches if batches is None else _Moved(model, batches), loss_fn)


class _Moved:
    """Batches on the model's device; can be iterated as often as the batches can."""

    def __init__(self, model: nn.Module, batches: Iterable[Any]) -> None:
        self.model, self.batches = model, batches

    def __iter__(self) -> Iterator[Any]:
        return on_device(self.model, self.batches)


# -- running ---------------------------------------------------------------------------------------------------------


def run_plan(
    plan: PruningPlan,
    model: nn.Module,
    batches: Iterable[Any] | None,
    loss_fn: LossFn | None = None,
    *,
    fraction: float = 1.0,
    previous: Mapping[str, Tensor] | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    distributed: bool = False,
) -> Masks:
    """Carry out a plan. `prune` and the callbacks both end here.

    Args:
        plan: From `make_plan`, for this model.
        model: The model.
        batches: Calibration batches on the model's device (of this rank, if distributed).
        loss_fn: See `prune`.
        fraction: Share of the plan's sparsity to reach, for a step of a schedule.
        previous: Masks whose pruned weights stay pruned.
        forward_context: Makes the context that forward passes run in.
        distributed: Sum statistics over the ranks of the default process group; every rank must call.

    Returns:
        Masks by parameter name.
    """
    if isinstance(plan.score, Keep):
        masks = masks_from_zeros(plan.targets)
        apply_masks(model, masks)  # -0.0 to 0.0
        return masks
    run = _Run(plan, model, batches, loss_fn, fraction, previous or {}, forward_context, distributed)
    return run.masks()


class _Run:
    """One pruning in progress."""

    def __init__(
        self,
        plan: PruningPlan,
        model: nn.Module,
        batches: Iterable[Any] | None,
        loss_fn: LossFn | None,
        fraction: float,
        previous: Mapping[str, Tensor],
        forward_context: Callable[[], AbstractContextManager[Any]],
        distributed: bool,
    ) -> None:
        self.plan = plan
        self.model = model
        self.batches = batches
        self.loss_fn = loss_fn
        self.fraction = fraction
        self.previous = previous
        self.forward_context = forward_context
        self.distributed = distributed
        self.statistics: dict[str, LayerStatistics] = {}
        self.counts: dict[str, int] = {}

    def masks(self) -> Masks:
        """Calibrate, select, update; then change the model."""
        plan = self.plan
        if plan.dense_statistics:
            assert self.batches is not None
            self.statistics = collect(
                self.model,
                self.batches,
                plan.targets,
                plan.dense_statistics,
                num_samples=plan.num_samples,
                loss_fn=self.loss_fn,
                gradient_dtype=plan.gradient_dtype,
                gradient_device=plan.gradient_device,
                forward_context=self.forward_context,
                distributed=self.distributed,
                progress=plan.progress,
            )
        with torch.no_grad():
            self.counts = self._allocate()
            if not plan.sequential and not plan.updates_weights:
                masks = {t.name: self._select(t, self.statistics.get(t.name)) for t in self._tracked("Selecting")}
                apply_masks(self.model, masks)
                return masks
            with _restored_on_failure() as keep:
                masks = self._walk(keep) if plan.sequential else self._update_all(keep)
                return masks

    def _tracked(self, description: str) -> Iterator[Target]:
        with progress_bar(description, len(self.plan.targets), self.plan.progress) as advance:
            for target in self.plan.targets:
                yield target
                advance()

    # -- selection -----------------------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, int]:
        """Number of weights to prune in each layer; empty for N:M."""
        plan, targets = self.plan, self.plan.targets
        if plan.pattern is not None:
            return {}
        lower = {name: mask.numel() - int(mask.sum()) for name, mask in self.previous.items()}
        if isinstance(plan.allocation, Mapping):
            mapping = {name: value * self.fraction for name, value in plan.allocation.items()}
            wished = None if plan.sparsity is None else plan.sparsity * self.fraction
            return mapping_counts(targets, mapping, wished, lower)
        sparsity = (0.5 if plan.sparsity is None else plan.sparsity) * self.fraction
        total = math.floor(sparsity * sum(t.numel for t in targets))
        if plan.group == "global":
            return global_counts(targets, lambda t: self._scores(t, self.statistics.get(t.name)), total)
        if isinstance(plan.allocation, KFACAllocation):
            wanted = kfac_sparsities(targets, self.statistics, sparsity, plan.allocation)
            return exact_counts(targets, wanted, total, lower)
        if isinstance(plan.allocation, OWLAllocation):
            wanted = owl_sparsities(targets, self.statistics, sparsity, plan.allocation, self._blocks_of_targets())
            return exact_counts(targets, wanted, total, lower)
        return uniform_counts(targets, sparsity, plan.group)

    def _blocks_of_targets(self) -> dict[str, str]:
        blocks = {id(m): name for name, block in self.plan.blocks for m in block.modules()}
        return {t.name: blocks.get(id(t.module), t.name) for t in self.plan.targets}

    def _scores(self, target: Target, statistics: LayerStatistics | None) -> Tensor:
        """Scores ``[O, I]``; weights that are pruned already come first."""
        # A copy: a user's score may work in place.
        weight = target.matrix().to(torch.float32, copy=True)
        scores = self.plan.score(weight, statistics or LayerStatistics(samples=0), target.name)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score {self.plan.score.name!r} returned {got} for {target.name!r}, not {target.shape}")
        scores = scores if scores.is_floating_point() else scores.float()
        check_scores(scores, target.name)
        previous = self.previous.get(target.name)
        if previous is not None:
            scores = scores.masked_fill(~target.kind.to_matrix(previous.to(scores.device)), -math.inf)
        return scores

    def _select(self, target: Target, statistics: LayerStatistics | None) -> Tensor:
        """The mask of one layer, in the parameter's shape."""
        scores = self._scores(target, statistics).contiguous()
        if self.plan.pattern is not None:
            mask = nm_mask(scores, self.plan.pattern)
        elif self.plan.group == "row":
            mask = lowest_in_rows(scores, self.counts[target.name])
        else:
            mask = lowest_in_layer(scores, self.counts[target.name])
        return target.to_parameter(mask).contiguous()

    # -- weight updates ------------------------------------------------------------------------------------------

    def _prune_layer(self, target: Target, statistics: LayerStatistics) -> Tensor:
        """Select, update if asked for, write the weight; returns the mask in the parameter's shape."""
        mask = None if isinstance(self.plan.score, SparseGPT) else self._select(target, statistics)
        if not self.plan.updates_weights:
            assert mask is not None
            target.weight.masked_fill_(~mask, 0.0)
            return mask
        weight, kept = prune_with_hessian(
            target.matrix(),
            statistics.get(HESSIAN),
            mask=None if mask is None else target.kind.to_matrix(mask),
            count=self.counts.get(target.name, 0),
            pattern=self.plan.pattern,
        )
        if not bool(torch.isfinite(weight).all()):
            raise CalibrationError(f"the weight update of {target.name!r} is not finite; the weights are unchanged")
        target.weight.copy_(target.to_parameter(weight))
        return target.to_parameter(kept).contiguous()

    def _update_all(self, keep: Callable[[Target], None]) -> Masks:
        """Every layer with the Hessian of its dense inputs."""
        masks: Masks = {}
        for target in self._tracked("Updating weights"):
            keep(target)
            masks[target.name] = self._prune_layer(target, self.statistics[target.name])
        return masks

    def _walk(self, keep: Callable[[Target], None]) -> Masks:
        """Block by block, each on the outputs of the pruned blocks before it."""
        plan = self.plan
        masks: Masks = {}
        by_module = {id(t.module): t for t in plan.targets}
        assert self.batches is not None

        def run(model: nn.Module, batch: Any) -> None:
            if self.loss_fn is not None:
                self.loss_fn(model, batch)
            else:
                forward(model, batch, plan.targets)

        with quiet_model(self.model, freeze=False):
            with synchronized_errors(self.distributed):
                modules = [block for _, block in plan.blocks]
                walk = BlockWalk(self.model, modules, self.batches, plan.num_samples, run, self.forward_context)
            with progress_bar("Pruning blocks", len(modules), plan.progress) as advance:
                for index, block in enumerate(modules):
                    layers = [by_module[id(m)] for m in block.modules() if id(m) in by_module]
                    steps = ((batch.keep, batch.samples) for batch in walk.run(index)) if layers else ()
                    statistics = collect_forward(layers, plan.block_statistics, steps, self.distributed)
                    for target in layers:
                        keep(target)
                        masks[target.name] = self._prune_layer(
                            target, _merge(statistics[target.name], self.statistics.get(target.name))
                        )
                    if index + 1 < len(modules):
                        for _ in walk.run(index, keep_output=True):
                            pass
                    advance()
        return {t.name: masks[t.name] for t in plan.targets}


def _merge(block: LayerStatistics, dense: LayerStatistics | None) -> LayerStatistics:
    """Forward statistics of the walk, gradient statistics of the dense sweep."""
    if dense is None:
        return block
    seen = {name: getattr(block, name) for name in FORWARD_STATISTICS}
    return replace(dense, **{name: value for name, value in seen.items() if value is not None})


@contextmanager
def _restored_on_failure() -> Iterator[Callable[[Target], None]]:
    """Give a function that remembers a weight before it changes; put all back if the block fails.

    Copies are held in main memory, one of every pruned weight at most.
    """
    copies: dict[str, tuple[Target, Tensor]] = {}

    def keep(target: Target) -> None:
        copies.setdefault(target.name, (target, target.weight.detach().to("cpu", copy=True)))

    try:
        yield keep
    except BaseException:
        with uninterrupted(), torch.no_grad():
            for target, copy in copies.values():
                target.weight.copy_(copy)
        raise
