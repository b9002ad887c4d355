"""Prune a model without a Trainer: targets, calibration, scores, masks, and the weight update."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError, check_model
from lightning_prune.progress import progress_bar, warn
from lightning_prune.pruning.allocation import (
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
from lightning_prune.pruning.batches import check_repeatable
from lightning_prune.pruning.batches import samples as first_samples
from lightning_prune.pruning.blocks import BlockWalk, Samples, walk_stacks
from lightning_prune.pruning.calibration import LossFn, collect, collect_forward, warn_of_unrouted
from lightning_prune.pruning.masks import PackedMasks, apply_masks, masks_from_zeros
from lightning_prune.pruning.offloading import at_hand, put_away
from lightning_prune.pruning.patterns import lowest_in_rows, nm_mask, refuse_nan
from lightning_prune.pruning.plan import PruningPlan, make_plan, memory_advice
from lightning_prune.pruning.room import Room
from lightning_prune.pruning.running import ForwardContext, forward, on_device, quiet_model
from lightning_prune.pruning.score_histograms import ScoreSummary
from lightning_prune.pruning.scores import Criterion, Score
from lightning_prune.pruning.settings import GRADIENT_DTYPES, PruningSettings, make_score
from lightning_prune.pruning.statistics import FORWARD_STATISTICS, LayerStatistics, wide_dtype
from lightning_prune.pruning.targets import DEFAULT_IGNORE, Target, join_masks
from lightning_prune.pruning.updates import ALPS, LayerRows
from lightning_prune.ranks import Ranks, ShortOfMemoryError, synchronized_errors
from lightning_prune.safety import Originals, restored_on_failure
from lightning_prune.schedules import Share, count_of, exact_share
from lightning_prune.sharding import gathered_around, has_sharded_parameters

_log = logging.getLogger("lightning_prune")


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    score: str | Criterion = "kfac",
    sparsity: float | None = None,
    pattern: str = "unstructured",
    group: str | None = None,
    allocation: Allocation | None = None,
    update: str | ALPS | None = None,
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
    ranks: Ranks | None = None,
) -> PackedMasks:
    """Prune a model in place and return its masks.

    What is left out is said: a warning if less than 90 % of the matrices outside embeddings and heads are pruned (see
    `lightning_prune.pruning.coverage`), else a log entry of ``lightning_prune``.

    Everything is validated first; if calibration fails or is interrupted, the weights are bit-identical to before.

    Args:
        model: Any module; a transformers model needs nothing more, others need `loss_fn` for scores with gradients.
        batches: Calibration data, an iterable of what the model takes: dicts with input_ids and optionally
            attention_mask and labels, tensors, or tuples whose first part is the input. A causal language model
            predicts each next token; any other transformers model is scored by its own loss, so its batches need
            labels; an encoder-decoder's always do, or decoder_input_ids. Tensors are moved to the model's device. Not
            needed for magnitude, random and keep. With `sequential` and a score that also needs gradients or an
            allocation from data, it is iterated twice (a list or a DataLoader, no generator).
        score: ``"magnitude"``, ``"random"``, ``"wanda"``, ``"gradient"``, ``"gblm"``, ``"sparsegpt"``, ``"kfac"``,
            ``"keep"`` (the zeros that are there), or an object (see `lightning_prune.pruning.scores.Score`).
        sparsity: Share of the weights to prune, in [0, 1]; default 0.5, or what an N:M pattern or a complete
            `allocation` mapping implies.
        pattern: ``"unstructured"`` or ``"N:M"``: N *kept* of every M consecutive inputs (NVIDIA's 2:4).
        group: What weights are compared within: ``"row"``, ``"layer"`` or ``"global"``; default the score's own.
            Exactly ``floor(sparsity * group size)`` are pruned in each, of the decimal that was written: 29 of 100
            at 0.29.
        allocation: Layer sparsities: ``"uniform"``, ``"owl"``, ``"kfac"``, an `OWLAllocation` or `KFACAllocation`,
            or a mapping from name patterns to sparsities; default the score's own. The total is exact,
            ``floor(sparsity * number of weights)``.
        update: How the remaining weights make up for the others, with each layer's Hessian: ``"exact"`` as well as
            they can, on the mask of any score; ``"alps"``, or an `ALPS`, by choosing the mask with the Hessian too
            (scores that are ``abs(W)`` times a factor: all built-in ones but random); ``"obs"`` column by column, as
            SparseGPT does, on the mask of any score.
        num_samples: Calibration samples (sequences).
        alpha: Weight of gblm's gradient term.
        gamma: Power of kfac's output-gradient norm.
        grad_norm: ``"l1"`` or ``"l2"`` over per-sample gradients (gradient, gblm).
        sequential: Block by block, each on the outputs of the pruned blocks before it, through every stack in the
            order they run (encoder, decoder); holds one block's activations. For wanda, gblm, sparsegpt and every
            `update`; other scores' masks need the whole model at once. Without it all statistics come from the dense
            model in one sweep.
        loss_fn: ``loss_fn(model, batch)``, a scalar or one loss a sample ``[B]``; also drives the forward pass of
            scores without gradients.
        targets: Layer types, type names or name patterns to prune; default all (Linear, Conv1D, Conv1d to Conv3d,
            experts, what is inside of attention and recurrent layers) but frozen ones, routers and output layers; a
            selector that matches nothing else names those too.
        ignore: The same, left out beside output layers; default these alone, by transformers' names for them. With
            ``[]`` output layers are pruned too.
        seed: Of ``"random"``.
        gradient_dtype: ``"float32"`` (float64 for float64 weights) or ``"bfloat16"`` for the gradient aggregate, one
            buffer a pruned weight. Sums in bfloat16 stop growing after some 256 samples of equal size.
        gradient_device: Device of the gradient aggregate, such as ``"cpu"``; default the weight's, main memory
            where that is offloaded.
        progress: Show progress bars in a terminal.
        ranks: The processes that prune together, each with batches and `num_samples` of its own (see
            `lightning_prune.Ranks`); every one must call. Where parameters are sharded over one mesh dimension it is
            found from the model.

    Returns:
        Bool masks of the parameters' shapes by parameter name, True = kept; laid out over ranks as the parameters are.
        They are held as one bit a weight, and unpacked when they are asked for.

    Raises:
        ValueError: an argument or a combination that is not supported; the message names value and choices.
        TypeError: an argument of the wrong type.
        CalibrationError: calibration could not give finite statistics of every layer.
    """
    check_model(model, loss_fn)
    chosen = make_score(score, alpha=alpha, gamma=gamma, grad_norm=grad_norm, seed=seed)
    how = (sparsity, pattern, group, allocation, update, num_samples, sequential)
    settings = PruningSettings(chosen, *how, targets, ignore, gradient_dtype, gradient_device, progress)
    plan = make_plan(model, settings, offloaded=True)
    if plan.needs_data and batches is None:
        raise ValueError(f"score={plan.score.name!r} needs calibration data: pass batches")
    check_repeatable(batches, plan.passes, "batches")
    if plan.coverage.worrying:
        warn(f"prune: {plan.coverage}")
    else:
        _log.info("prune: %s", plan.coverage)
    moved = None if batches is None else _Moved(model, batches)
    return run_plan(plan, model, moved, loss_fn, ranks=ranks or _ranks_of(model, plan.targets))


def _ranks_of(model: nn.Module, targets: Sequence[Target]) -> Ranks | None:
    """The ranks that a sharded model is spread over; None where no parameter is sharded."""
    if not has_sharded_parameters(model):
        return None
    meshes = {mesh for t in targets if (mesh := t.layout.mesh) is not None}
    if any(mesh.ndim > 1 for mesh in meshes):
        raise ValueError(
            "the model is sharded over a device mesh of several dimensions: say over which of them samples differ, "
            "with ranks=Ranks(data_group=mesh['data_parallel'].get_group(), lockstep=True)"
        )
    return Ranks(lockstep=True)


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
    fraction: Share = 1.0,
    previous: Mapping[str, Tensor] | None = None,
    forward_context: ForwardContext = contextlib.nullcontext,
    ranks: Ranks | None = None,
    summary: ScoreSummary | None = None,
    apply: bool = True,
) -> PackedMasks:
    """Carry out a plan. `prune` and the callbacks both end here.

    Args:
        plan: From `make_plan`, for this model.
        model: The model.
        batches: Calibration batches on the model's device (of this rank, if distributed).
        loss_fn: See `prune`.
        fraction: Share of the plan's sparsity to reach, for a step of a schedule.
        previous: Masks whose pruned weights stay pruned.
        forward_context: Makes the context that forward passes run in.
        ranks: The processes that prune together; every one must call. Needed where parameters are sharded.
        summary: Filled with what the scores looked like; stays empty where there are none (keep, sparsegpt).
        apply: Zero the weights; False, of a plan that updates no weights, to choose only.

    Returns:
        Masks by parameter name.
    """
    if plan.settings.keeps_zeros:
        masks = masks_from_zeros(plan.targets)
        apply_masks(model, masks)  # -0.0 to 0.0
        return masks
    share, before = exact_share(fraction), previous or {}
    run = _Run(plan, model, batches, loss_fn, share, before, forward_context, ranks, summary, apply)
    try:
        with memory_advice(plan, ranks):
            masks = run.masks()
    except BaseException:
        put_away(model)
        raise
    warn_of_unrouted(run.unrouted)
    if summary is not None and run.parts is not None:
        summary.sum_over(run.parts)
    return masks


def _warn_of_untouched(targets: Sequence[Target], plan: PruningPlan) -> None:
    """Name layers in whose groups not even one weight goes."""
    if not targets:
        return
    names, size = [t.name for t in targets], targets[0].shape[1] if plan.group == "row" else targets[0].numel
    warn(
        f"nothing is pruned in {len(names)} of {len(plan.targets)} layers ({', '.join(names[:4])}"
        f"{', ...' if len(names) > 4 else ''}): sparsity={float(plan.sparsity)} of a group of {size} weights "
        f"(group={plan.group!r}) is less than one. Compare within larger groups (group='layer', 'global'), or add them "
        "to `ignore`",
    )


@dataclass
class _Run:
    """One pruning in progress; for the arguments see `run_plan`."""

    plan: PruningPlan
    model: nn.Module
    batches: Iterable[Any] | None
    loss_fn: LossFn | None
    fraction: Fraction
    previous: Mapping[str, Tensor]
    forward_context: ForwardContext
    ranks: Ranks | None
    summary: ScoreSummary | None
    apply: bool
    statistics: dict[str, LayerStatistics] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    nan: dict[str, Tensor] = field(default_factory=dict)  # whether there is any in a layer's scores
    unrouted: dict[str, None] = field(default_factory=dict)  # experts' matrices that some sweep has no token for

    @property
    def parts(self) -> Ranks | None:
        """Whose parts make up the whole, where weights are sharded."""
        return self.ranks if self.ranks is not None and self.ranks.lockstep else None

    def masks(self) -> PackedMasks:
        """Calibrate, select, update; then change the model."""
        plan = self.plan
        if plan.likely and self.parts is not None:  # which run in lock step, and a comparison of blocks would not
            raise ValueError(
                f"sequential=True, but {type(self.model).__name__} names no decoder blocks (_no_split_modules), and "
                "where parameters are sharded others are not tried: use sequential=False"
            )
        if plan.dense_statistics:
            assert self.batches is not None
            self.statistics = collect(
                self.model,
                self.batches,
                plan.targets,
                plan.dense_statistics,
                num_samples=plan.num_samples,
                loss_fn=self.loss_fn,
                gradient_dtype=GRADIENT_DTYPES[plan.settings.gradient_dtype],
                gradient_device=plan.settings.gradient_device,
                forward_context=self.forward_context,
                ranks=self.ranks,
                progress=plan.settings.progress,
                unrouted=self.unrouted,
            )
        with torch.no_grad():
            self.counts = self._allocate()
            if not plan.sequential and plan.settings.solver is None:
                tracked = self._tracked("Selecting")
                parts = PackedMasks((t.name, self._mask_of(t)) for t in tracked)
                self._refuse_nan()
                masks = PackedMasks(join_masks(plan.targets, parts))
                if self.apply:
                    apply_masks(self.model, masks)
                return masks
            if plan.sequential:
                return self._walk_in_pieces()
            with restored_on_failure() as originals:
                return self._update_all(originals)

    def _tracked(self, description: str) -> Iterator[Target]:
        with progress_bar(description, len(self.plan.targets), self.plan.settings.progress) as advance:
            for target in self.plan.targets:
                yield target
                advance()

    # -- selection -----------------------------------------------------------------------------------------------

    def _allocate(self) -> dict[str, int]:
        """Number of weights to prune in each layer; empty for N:M."""
        plan, targets = self.plan, self.plan.targets
        if plan.pattern is not None:
            return {}
        lower = self._pruned_before()
        if isinstance(plan.allocation, Mapping):
            counts = mapping_counts(targets, *plan.mapped(self.fraction), lower)
            return {name: max(count, lower.get(name, 0)) for name, count in counts.items()}
        exact = plan.sparsity * self.fraction
        # What is pruned stays pruned, also where less is asked for now (by other settings, or in a second fit).
        total, sparsity = max(count_of(exact, sum(t.numel for t in targets)), sum(lower.values())), float(exact)
        if plan.group == "global":
            return global_counts(targets, lambda t: self._scores(t, self.statistics.get(t.name)), total, self.parts)
        if isinstance(plan.allocation, KFACAllocation):
            wanted = kfac_sparsities(targets, self._here(), sparsity, plan.allocation, self.parts)
            return exact_counts(targets, wanted, total, lower)
        if isinstance(plan.allocation, OWLAllocation):
            blocks = self._blocks_of_targets()
            wanted = owl_sparsities(targets, self._here(), sparsity, plan.allocation, blocks, self.parts)
            return exact_counts(targets, wanted, total, lower)
        counts = uniform_counts(targets, exact, plan.group)
        if self.fraction == 1 and exact:
            _warn_of_untouched([t for t in targets if not counts[t.name]], plan)
        return {name: max(count, lower.get(name, 0)) for name, count in counts.items()}

    def _pruned_before(self) -> dict[str, int]:
        """How many weights of each target are pruned already; none of targets without a mask."""
        before = [(t, m) for t in self.plan.targets if (m := self.previous.get(t.parameter)) is not None]
        if not before:
            return {}
        here = [int((~t.part(m)).count_nonzero()) if self.parts is None or t.layout.counted else 0 for t, m in before]
        counts = torch.tensor(here, dtype=torch.int64)
        counts = counts if self.parts is None else self.parts.sum_parts(counts)
        return {t.name: n for (t, _), n in zip(before, counts.tolist(), strict=True)}

    def _here(self) -> dict[str, LayerStatistics]:
        """Statistics cut to the part of each matrix that is here."""
        return {t.name: self.statistics[t.name].part(t.layout.bounds) for t in self.plan.targets}

    def _blocks_of_targets(self) -> dict[str, str]:
        blocks = {id(m): name for name, block in self.plan.blocks for m in block.modules()}
        return {t.name: blocks.get(id(t.module), t.name) for t in self.plan.targets}

    def _scores(self, target: Target, statistics: LayerStatistics | None) -> Tensor:
        """Scores of the part of the matrix that is here, ``[o, i]``; weights that are pruned already come first."""
        statistics = LayerStatistics(samples=0) if statistics is None else self._with_hessian(target, statistics)
        scores = self._worth(target, target.matrix(), statistics)
        if (previous := self.previous.get(target.parameter)) is not None:
            scores = scores.masked_fill(~target.part(previous).to(scores.device), -math.inf)
        return scores

    def _with_hessian(self, target: Target, statistics: LayerStatistics) -> LayerStatistics:
        """The statistics of a layer with all rows of its Hessian, which ranks keep a part of each."""
        rows, ranks = statistics.hessian, self.ranks
        if rows is None or ranks is None or not ranks.spreads(target.layout) or statistics.whole:
            return statistics
        return replace(statistics, hessian=ranks.whole_of_rows(rows), whole=True)

    def _worth(self, target: Target, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """Scores of a weight in the place of the part of the matrix that is here, ``[o, i]``."""
        bounds = target.layout.bounds
        if cast(Score, self.plan.score).elementwise:
            return self._scored(target, weight, statistics.part(bounds))
        whole = self._scored(target, target.whole(weight), statistics.with_gradients(target.whole))
        return whole[slice(*bounds[0]), slice(*bounds[1])]

    def _scored(self, target: Target, weight: Tensor, statistics: LayerStatistics) -> Tensor:
        """What the score makes of a matrix or a part of it, ``[o, i]``; a failure is every rank's."""
        score = cast(Score, self.plan.score)
        with synchronized_errors(self.parts):
            # A copy: a user's score may work in place.
            scores = score(weight.to(wide_dtype(weight.dtype), copy=True), statistics, target.name)
            if not isinstance(scores, Tensor) or scores.shape != weight.shape:
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise ValueError(
                    f"score {score.name!r} returned {got} for {target.name!r}, not {tuple(weight.shape)}: it must "
                    "give one number for each weight"
                )
            self.nan[target.name] = torch.isnan(scores).any()
            return scores if scores.is_floating_point() else scores.float()

    def _refuse_nan(self) -> None:
        """Refuse NaN in scores since the last time; a failure is every rank's."""
        found, self.nan = self.nan, {}
        with synchronized_errors(self.parts):
            refuse_nan(found)

    def _mask_of(self, target: Target) -> Tensor:
        """The mask of the part of one matrix that is here, kept where the matrix is kept."""
        mask = self._select(target, self.statistics.get(target.name))
        return mask.cpu() if target.offloaded else mask

    def _select(self, target: Target, statistics: LayerStatistics | None) -> Tensor:
        """The mask of the part of one matrix that is here."""
        own, layout = self._scores(target, statistics).contiguous(), target.layout
        mask = layout.from_rows(self._choose(target, target.rows(own)))
        mask = self._without_previous(target, mask)  # counts may be spread over rows in another way than before
        self._summarize(target, own, mask)
        return mask

    def _summarize(self, target: Target, own: Tensor, mask: Tensor) -> None:
        """Note scores and mask of the part that is here, if anyone wants to know."""
        if self.summary is None:
            return
        if self.parts is None or target.layout.counted:
            self.summary.add(target.name, own, mask, target.numel)
        else:
            self.summary.leave_out(target.name)

    def _choose(self, target: Target, scores: Tensor) -> Tensor:
        """The mask of whole rows from their scores, ``[r, I]``."""
        plan, layout = self.plan, target.layout
        if plan.pattern is not None:
            return nm_mask(scores, plan.pattern)
        if plan.group == "row":
            return lowest_in_rows(scores, self.counts[target.name], layout.row_bounds[0], layout.shape[0])
        return target.lowest(self.parts)(scores, self.counts[target.name])

    def _total(self, target: Target, count: Tensor) -> Tensor:
        """The sum of what every rank counts in the rows that it has; of copies, one counts."""
        if self.parts is None:
            return count
        return self.parts.sum_parts(count if target.layout.counted else torch.zeros_like(count))

    def _without_previous(self, target: Target, mask: Tensor) -> Tensor:
        """A mask of the part that is here, without what is pruned already."""
        previous = self.previous.get(target.parameter)
        return mask if previous is None else mask & target.part(previous).to(mask.device)

    # -- weight updates ------------------------------------------------------------------------------------------

    def _prune_layer(self, target: Target, statistics: LayerStatistics) -> Tensor:
        """Select, update if asked for, write the weight; returns the mask of the part that is here."""
        mask = self._pruned(target, statistics)
        return mask.cpu() if target.offloaded else mask

    def _pruned(self, target: Target, statistics: LayerStatistics) -> Tensor:
        settings, layout = self.plan.settings, target.layout
        statistics = self._with_hessian(target, statistics)
        mask = None if settings.selects_itself else self._select(target, statistics)
        if mask is not None:
            self._refuse_nan()
        if settings.solver is None:
            assert mask is not None
            target.mask(mask)
            return mask
        told = mask is None and settings.update is not None and self.summary is not None
        scores = self._scores(target, statistics) if told else None
        previous = self.previous.get(target.parameter)
        pruned = None if previous is None else ~target.rows(target.part(previous).to(target.weight.device))
        weight, kept = settings.solver.solve(
            LayerRows(
                name=target.name,
                weight=target.rows(),
                statistics=statistics.part((layout.row_bounds, (0, layout.shape[1]))),
                mask=None if mask is None else target.rows(mask),
                count=self.counts.get(target.name, 0),
                pattern=self.plan.pattern,
                lowest=target.lowest(self.parts),
                choose=lambda scores: self._choose(
                    target, scores if pruned is None else scores.masked_fill(pruned, -math.inf)
                ),
                factors=lambda norms: target.rows(
                    self._worth(target, torch.ones_like(target.matrix()), replace(statistics, input_norm=norms))
                ),
                total=lambda count: self._total(target, count),
            )
        )
        with synchronized_errors(self.parts):
            if not bool(torch.isfinite(weight).all()):
                raise CalibrationError(
                    f"the weight update of {target.name!r} is not finite; the weights are unchanged. Give more samples "
                    "(num_samples), or prune in float32 or without update"
                )
        kept = self._without_previous(target, layout.from_rows(kept))
        self._refuse_nan()  # in what an update that chooses has asked the score
        if scores is not None:
            self._summarize(target, scores, kept)
        target.write(layout.from_rows(weight).masked_fill(~kept, 0.0))
        return kept

    def _update_all(self, originals: Originals) -> PackedMasks:
        """Every layer with the Hessian of its dense inputs."""
        parts = PackedMasks()
        for target in self._tracked("Updating weights"):
            with at_hand(target.module, undo=originals.undo.append):
                if not target.offloaded:
                    originals.keep(target.weight)
                parts[target.name] = self._prune_layer(target, self.statistics[target.name])
        return PackedMasks(join_masks(self.plan.targets, parts))

    def _walk_in_pieces(self) -> PackedMasks:
        """Walk; where a batch does not fit, from the beginning with smaller ones, on every rank."""
        assert self.batches is not None
        with synchronized_errors(self.ranks):
            drawn = list(first_samples(self.batches, self.plan.num_samples))
        batches, count = [batch for batch, _ in drawn], sum(size for _, size in drawn)
        if 0 < count < self.plan.num_samples and not self.plan.dense_statistics:  # a sweep before has said it
            told = f"calibration data ended after {count} of num_samples={self.plan.num_samples}"
            warnings.warn(told, stacklevel=2)
        room = Room()
        while True:
            try:
                with restored_on_failure() as originals:
                    masks = self._walk(originals, batches, room)
                break
            except ShortOfMemoryError as caught:
                problem = caught.with_traceback(None)  # whose frames hold what did not fit
            put_away(self.model)
            room.queue.clear()
            numbers, size = room.missed
            room.make(problem, numbers, size, divisible=numbers > 0, ranks=self.ranks)
        if told := str(room):
            warnings.warn(told, stacklevel=2)
        return masks

    def _walk(self, originals: Originals, batches: Sequence[Any], room: Room) -> PackedMasks:
        """Block by block, each on the outputs of the pruned blocks before it.

        Where weights are only masked they are put back behind the walk, and masked together when all masks are known:
        copies are held of one block. A stack that comes later, and layers that are tied, must meet the pruned weights,
        so there all copies stay.
        """
        plan = self.plan
        parts = PackedMasks()
        by_module: dict[int, list[Target]] = {}
        for target in plan.targets:
            by_module.setdefault(id(target.module), []).append(target)

        def run(model: nn.Module, batch: Any) -> None:
            if self.loss_fn is not None:
                self.loss_fn(model, batch)
            else:
                forward(model, batch, plan.targets)

        stacks = [[block for _, block in stack] for stack in plan.stacks]
        stacks = [s for s in stacks if any(id(m) in by_module for block in s for m in block.modules())]
        only_masked = plan.settings.solver is None and len(stacks) == 1
        with (
            quiet_model(self.model, freeze=False),
            progress_bar("Pruning blocks", sum(map(len, stacks)), plan.settings.progress) as advance,
        ):
            # A comparison brings offloaded weights here twice more; but a loss may run the blocks several times.
            compared = plan.likely or self.loss_fn is not None or not any(t.offloaded for t in plan.targets)
            how: dict[str, Any] = {"room": room, "compared": compared}
            samples = Samples(self.model, batches, plan.num_samples, run, self.forward_context, self.parts, **how)
            for _, walk in walk_stacks(samples, stacks, errors=None if self.parts else self.ranks):
                for index, block in enumerate(walk.blocks):
                    layers = [target for m in block.modules() for target in by_module.get(id(m), ())]
                    with at_hand(*block.modules(), undo=originals.undo.append, discard=only_masked):
                        parts.update(self._prune_block(walk, index, layers, originals))
                    if only_masked:
                        alone = [t for t in layers if len(t.modules) == 1 and not t.offloaded]
                        originals.put_back(target.weight for target in alone)
                    advance()
            masks = PackedMasks(join_masks(plan.targets, parts))
            if only_masked:
                apply_masks(self.model, masks)
        return masks

    def _prune_block(self, walk: BlockWalk, index: int, layers: Sequence[Target], originals: Originals) -> PackedMasks:
        """Prune a block on its inputs, which become its outputs; returns the mask of each layer, as `_prune_layer`."""
        parts, block = PackedMasks(), walk.blocks[index]
        with gathered_around(self.model, block):
            statistics = collect_forward(
                layers,
                self.plan.block_statistics,
                ((b.padding, 0 if b.again else b.samples, b.counting) for b in walk.run(index)) if layers else (),
                self.ranks,
                self.unrouted,
            )
        for target in layers:
            if not target.offloaded:  # what is changed of those is kept apart
                originals.keep(target.weight)
            parts[target.name] = self._prune_layer(
                target, _merge(statistics[target.name], self.statistics.get(target.name))
            )
        if index + 1 < len(walk.blocks):
            with synchronized_errors(None if self.parts else self.ranks), gathered_around(self.model, block):
                for _ in walk.run(index, keep_output=True):
                    pass
        return parts


def _merge(block: LayerStatistics, dense: LayerStatistics | None) -> LayerStatistics:
    """Forward statistics of the walk, gradient statistics of the dense sweep."""
    if dense is None:
        return block
    seen = {name: getattr(block, name) for name in FORWARD_STATISTICS}
    return replace(dense, **{name: value for name, value in seen.items() if value is not None})
