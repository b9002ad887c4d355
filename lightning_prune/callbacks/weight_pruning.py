"""`WeightPruning`: prune when training starts, or along a schedule, and keep the weights pruned."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.averages import mask_averages
from lightning_prune.callbacks.calibration_data import CalibrationData, calibration_loss, no_trace, watched_loss
from lightning_prune.callbacks.copies import copied_state
from lightning_prune.callbacks.distillation import Distillation, undistilled
from lightning_prune.callbacks.elsa_training import ELSATraining, check_elsa_fit, check_elsa_settings
from lightning_prune.callbacks.kinds import callbacks_of, is_kind
from lightning_prune.callbacks.pruning_notices import (
    last_step,
    warn_of_a_schedule_that_ends_too_late,
    warn_of_choice_by_score,
    warn_of_masks_that_stay_behind,
    warn_of_missing_sparsity,
    warn_of_other_settings,
    warn_of_untrained,
)
from lightning_prune.callbacks.teardown import BeforeTeardown, refuse_offloaded
from lightning_prune.checkpoints.reading import check_checkpoint_of
from lightning_prune.checkpoints.states import follow_shrunk_checkpoints, states_of
from lightning_prune.history import described, plain
from lightning_prune.pruning.allocation import KFACAllocation, OWLAllocation
from lightning_prune.pruning.batches import check_repeatable
from lightning_prune.pruning.elsa import ELSA
from lightning_prune.pruning.holding import MaskHold
from lightning_prune.pruning.masks import (
    Masks,
    PackedMasks,
    follow_names,
    masks_hold,
    named_weights,
    pack_masks,
    pruned_counts,
    unpack_masks,
)
from lightning_prune.pruning.pipeline import run_plan
from lightning_prune.pruning.plan import PruningPlan, make_plan
from lightning_prune.pruning.score_histograms import ScoreSummary
from lightning_prune.pruning.scores import Criterion
from lightning_prune.pruning.settings import PruningSettings, make_score
from lightning_prune.pruning.targets import DEFAULT_IGNORE, find_targets, parameters_of
from lightning_prune.pruning.updates import ALPS
from lightning_prune.ranks import Ranks
from lightning_prune.safety import Originals
from lightning_prune.schedules import BuiltInSchedule, LinearSchedule, OneShot, Schedule, check_schedule, fraction_at
from lightning_prune.sharding import at_rest, local, refuse_shards, reshard

_STATE_VERSION = 1


class WeightPruning(L.Callback):
    """Prune the weights of a LightningModule and keep them at exactly zero while it trains.

    At fit start (or along `schedule`) calibration samples run through the module, every weight is scored, and the
    lowest go. After every optimizer step pruned weights are set to zero again, whatever the optimizer, precision or
    accumulation; their gradients are zeroed before clipping, and before a gradient scaler looks for infinities, and
    their optimizer states when a mask changes. The masks are saved in the callback's state of a checkpoint, packed to
    bits; the checkpoint's ``state_dict`` stays that of the plain module.

    At fit start it says what share of the weights it prunes, and by name what it leaves out and why: what cannot be
    pruned, frozen layers, routers, heads. Below 90 % of the matrices outside embeddings and heads it is a warning.

    Averages of the weights are held to the masks too, whatever the order of callbacks: those of Lightning's
    ``WeightAveraging`` and ``StochasticWeightAveraging``, and every ``torch.optim.swa_utils.AveragedModel`` that is an
    attribute of the module or of a callback. A parameter that is replaced during training is masked in turn, with a
    warning; one that is gone or has got another shape is an error.

    Warnings say when a schedule cannot end in time, when training ended with less sparsity than was asked for, when a
    checkpoint's masks were made with other settings, and when a monitored metric would compare weights of different
    sparsities (see `finished`).

    A copy (``copy.deepcopy``, pickle), of a fit that runs too, has the settings and the masks. In a fit of its own it
    goes on with those masks if they hold in the module, that is if its pruned weights are zero, and else prunes anew.

    Several of them in one Trainer prune layers of their own, each by its `targets` and `ignore`, in the order of the
    callbacks; a later one is calibrated on what the earlier have left, and if it fails, they are put back. Their
    ``state_key`` says which layers are whose.

    Works with automatic and manual optimization on one device, under DDP, and under ``ModelParallelStrategy`` (FSDP2,
    tensor parallelism), where scores, aggregates and masks are shards as the parameters are, and `masks` are DTensors.

    Args:
        score: See `lightning_prune.prune`, which also documents the other arguments up to `ignore`. ``"keep"`` trains
            a model sparse that was pruned before.
        sparsity: Share of the weights to prune.
        pattern: ``"unstructured"`` or ``"N:M"``.
        group: ``"row"``, ``"layer"``, ``"global"``, or None for the score's own.
        allocation: Layer sparsities.
        update: None, ``"exact"``, ``"alps"`` (or an `ALPS`), ``"obs"``.
        num_samples: Calibration samples over all ranks, at least one for each data-parallel rank.
        alpha: Weight of gblm's gradient term.
        gamma: Power of kfac's output-gradient norm.
        grad_norm: ``"l1"`` or ``"l2"``.
        sequential: Block by block.
        loss_fn: ``loss_fn(module, batch)``, a scalar or one loss a sample. Default: the module's
            ``calibration_loss(batch)`` if it has one, else its ``training_step``, run without any trace in logs,
            random states, attributes, metrics, buffers, parameters or modes; at fit start, before the module's hooks.
        targets: Layers to prune.
        ignore: Layers to leave, beside output layers; with ``[]`` these are pruned too.
        schedule: None for one shot at fit start, or `OneShot`, `LinearSchedule`, `CubicSchedule`. Scores are computed
            anew at each update; what is pruned stays pruned. Or `ELSA`: train into the sparsity, then prune.
        calibration: A DataLoader or iterable of batches; an iterator serves a single update. Default: samples drawn
            from the training data, as its sampler yields them, or read from a copy of a stream; the training data and
            its order are untouched.
        seed: Of the draw of calibration samples, and of ``score="random"``.
        gradient_dtype: ``"float32"`` (float64 for float64 weights) or ``"bfloat16"`` for the gradient aggregate.
        gradient_device: Device of the gradient aggregate, such as ``"cpu"``; default the weight's.
        progress: Show progress bars in a terminal.
        distill_from: A dense source model whose logits to stay close to: a causal language model, or where to load
            one from (folder, hub id, ``.gguf`` file). It takes part in training steps alone, in no score and in no
            checkpoint.
        distill_weight: Share of the divergence in the loss, above 0 and at most 1.
        temperature: Of both distributions in the divergence.

    Raises:
        ValueError, TypeError: from the constructor for values that no model could take, and at fit start, before any
            weight changes, for those that do not fit this one.

    Example::

        trainer = L.Trainer(callbacks=[WeightPruning(sparsity=0.5)])
        trainer.fit(module, datamodule)
    """

    def __init__(
        self,
        score: str | Criterion = "kfac",
        sparsity: float | None = None,
        pattern: str = "unstructured",
        group: str | None = None,
        allocation: str | dict[str, float] | KFACAllocation | OWLAllocation | None = None,
        update: str | ALPS | None = None,
        num_samples: int = 128,
        alpha: float = 100.0,
        gamma: float = 0.7,
        grad_norm: str = "l2",
        sequential: bool = False,
        loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
        targets: list[str | type[nn.Module]] | None = None,
        ignore: Iterable[str | type[nn.Module]] = DEFAULT_IGNORE,
        schedule: OneShot | LinearSchedule | BuiltInSchedule | Schedule | None = None,
        calibration: Iterable[Any] | None = None,
        seed: int = 0,
        gradient_dtype: str = "float32",
        gradient_device: str | None = None,
        progress: bool = True,
        distill_from: str | nn.Module | None = None,
        distill_weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.schedule = check_schedule(schedule)
        chosen = make_score(score, alpha=alpha, gamma=gamma, grad_norm=grad_norm, seed=seed)
        how = (sparsity, pattern, group, allocation, update, num_samples, sequential)
        which = (targets, ignore if isinstance(ignore, str) else tuple(ignore))
        self.settings = PruningSettings(chosen, *how, *which, gradient_dtype, gradient_device, progress)
        self._check_schedule_fits()
        self.loss_fn = loss_fn
        self.calibration = calibration
        self.seed = seed
        self.distill_from, self.distill_weight, self.temperature = distill_from, distill_weight, temperature
        self._distillation = Distillation.of(distill_from, distill_weight, temperature)
        self._elsa: ELSATraining | None = None  # until it has pruned
        self._elsa_state: dict[str, Any] | None = None  # of a checkpoint
        self._masks = PackedMasks()
        self._owner: weakref.ref[L.LightningModule] | None = None  # None: of masks that no Trainer has loaded
        self._loading: weakref.ref[L.LightningModule] | None = None  # what a checkpoint is being loaded into
        self._hold: MaskHold | None = None
        self._plan: PruningPlan | None = None
        self._uncounted: tuple[str, ...] = ()
        self._trained: dict[str, bool] = {}  # by parameter: whether it required a gradient when the fit started
        self._data: CalibrationData | None = None  # of a stream that cannot be copied once training reads it
        self._teardown: BeforeTeardown | None = None
        self._copied = False  # masks of a copy, whose module is not known
        self._counts: dict[str, tuple[int, int]] = {}  # by parameter, over all ranks: weights pruned, weights
        self._target_names: tuple[str, ...] = ()
        self._planned: int | None = None  # of the targets, in the end; None before a fit, and with score="keep"
        self._seen_step = 0
        self._saved_step: int | None = None  # that masks of a checkpoint are of; None once training goes on from it
        self._prepared = False  # all that can be checked before weights change, in this fit
        self._first: Callable[[], None] | None = None
        self._before: Originals | None = None  # weights, until every one in the Trainer has pruned
        self._started = False  # training, in this fit
        self._restored = False  # from a checkpoint, in the midst of training
        self._reported = False
        self._said: set[str] = set()
        self._stage: str | None = None
        self._scores = ScoreSummary()
        self._around_update: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._dense: dict[str, Tensor] | None = None  # not None: weights are to be copied before they are pruned

    def _check_schedule_fits(self) -> None:
        gradual, how = not isinstance(self.schedule, OneShot), self.settings
        if how.keeps_zeros and (gradual or self.schedule.start):
            raise ValueError("score='keep' reads the zeros of the loaded weights at fit start: leave schedule out")
        if gradual and how.nm is not None:
            raise ValueError(
                f"pattern={how.pattern!r} has one sparsity: use schedule=None or OneShot(step), not {self.schedule!r}"
            )
        if gradual and how.solver is not None:
            raise ValueError(
                f"score={how.score.name!r} with update={how.update!r} prunes once: use schedule=None or OneShot(step), "
                f"not {self.schedule!r}"
            )
        if isinstance(self.schedule, ELSA):
            check_elsa_settings(how, self.schedule)

    @property
    def masks(self) -> PackedMasks:
        """Bool masks by parameter name, True = kept, sharded as the parameters are; empty before pruning.

        They are held as one bit a weight, and each is unpacked when it is asked for.
        """
        if self._hold is not None:
            return self._hold.masks
        module = None if self._owner is None else self._owner()
        return self._masks if module is None else follow_names(module, self._masks)

    @property
    def sparsity(self) -> float:
        """Share of pruned weights over all targets and ranks; 0.0 before pruning. Any rank may ask, alone."""
        pruned, total = self._counted(self._counts)
        return pruned / total if total else 0.0

    def _counted(self, names: Iterable[str]) -> tuple[int, int]:
        counts = [self._counts.get(name, (0, 0)) for name in names]
        return sum(pruned for pruned, _ in counts), sum(total for _, total in counts)

    @property
    def finished(self) -> bool:
        """Whether as many weights are pruned as was asked for; from then on metrics can be compared."""
        pruned, total = self._counted(self._target_names or self._counts)
        return bool(total) and (self._planned is None or pruned >= self._planned)

    @property
    def scores(self) -> ScoreSummary:
        """Histograms of the scores of the last pruning, by parameter; empty before it, and for keep and sparsegpt."""
        return self._scores

    @property
    def saliency(self) -> dict[str, float]:
        """Mean score of each layer in the last pruning, by parameter name; what `SparsityMonitor` logs."""
        return {name: layer.mean for name, layer in self._scores.layers.items()}

    # -- for callbacks beside this one ---------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The class's name and, where they are not the defaults, which layers: what tells two callbacks apart."""
        which: dict[str, Any] = {}
        if self.settings.targets is not None:
            which["targets"] = plain(self.settings.targets)
        if tuple(self.settings.ignore) != DEFAULT_IGNORE:
            which["ignore"] = plain(self.settings.ignore)
        return self._generate_state_key(**which) if which else super().state_key

    def rename_masks(self, rename: Callable[[str], str]) -> None:
        """Follow parameters that have got other names, such as those of layers that adapters were put around.

        Args:
            rename: From a parameter's name as masks have it to its name now.
        """
        self._masks = self._masks.renamed(rename)
        self._counts = {rename(name): counts for name, counts in self._counts.items()}
        self._target_names = tuple(map(rename, self._target_names))
        self._trained = {rename(name): trained for name, trained in self._trained.items()}
        if self._hold is not None:
            self._hold.rename(rename)

    def wrap_updates(self, around: Callable[[], AbstractContextManager[Any]] | None) -> None:
        """Have every computation of new masks happen within a context.

        What trains the weights by proxy can so settle up with them before they are scored, and take up the new
        masks after.

        Args:
            around: Makes the context; None for none again.
        """
        self._around_update = around or nullcontext

    def do_first(self, action: Callable[[], None]) -> None:
        """Have something done in the next fit before any weight is pruned, which may refuse the fit."""
        self._first = action

    def keep_dense_weights(self) -> None:
        """Ask for a copy of the weights, in main memory, as they are right before they are pruned the next time."""
        self._dense = {}

    def take_dense_weights(self) -> dict[str, Tensor]:
        """The copy that was asked for, by parameter name, which is let go of; empty if nothing was pruned since."""
        dense, self._dense = self._dense or {}, None
        return dense

    def change_masks(self, trainer: L.Trainer, module: L.LightningModule, masks: Masks, complete: bool) -> None:
        """Follow parameters whose shapes have changed.

        Args:
            trainer: In its fit.
            module: Its module, as it is now.
            masks: By parameter name, of the new shapes.
            complete: Whether to prune further where, by now, more of the weights were to be pruned.
        """
        self._plan = self._make_plan(module)
        if masks:
            self._bind(trainer, module, masks)
            if complete and not self.finished:
                self._prune(trainer, module)

    def hold_masks(self) -> None:
        """Set pruned weights to zero again, which somebody has changed who knows of it."""
        if self._hold is not None:
            self._hold.mask_weights()

    # -- life of a fit -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse unsafe checkpoints, and strategies whose shards the masks could not follow."""
        check_checkpoint_of(trainer)
        follow_shrunk_checkpoints(trainer)
        self._stage, self._prepared = stage, False
        if stage == "fit":
            refuse_offloaded(trainer.strategy, pl_module)
        if stage == "fit" and is_kind(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy"):
            raise ValueError(
                f"WeightPruning does not support {type(trainer.strategy).__name__}, whose flat shards hide the "
                "weights; use strategy=ModelParallelStrategy(), which shards with FSDP2 (fully_shard in "
                "configure_model), or 'ddp'"
            )
        if stage == "fit":
            warn_of_masks_that_stay_behind(trainer.strategy)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune, or take up the masks that are there, before the first batch."""
        pruners = pruners_of(trainer)
        for pruner in (*pruners, self):  # what one of them refuses leaves all weights as they are
            pruner._prepare(trainer, pl_module)
        # Sharded weights, and the masks with them, are restored only after this hook.
        if not (trainer.ckpt_path and trainer.strategy.restore_checkpoint_after_setup):
            last = self is pruners[-1]
            if not last and self._plan is not None and self._prunes_now(trainer):
                self._before = Originals()
                for weight in parameters_of(self._plan.targets).values():
                    self._before.keep(weight)
            try:
                self._begin(trainer, pl_module)
            except BaseException:  # and what one fails in, or Ctrl-C
                for pruner in pruners:
                    pruner._put_back()
                raise
            if last:
                for pruner in pruners:
                    pruner._before = None

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check everything, once a fit; no weight changes."""
        if self._prepared:
            return
        self._prepared = True
        self._trained = trained_now(pl_module)
        plan = self._make_plan(pl_module, self._check_others(trainer, pl_module))
        self._teardown = BeforeTeardown(trainer.strategy, lambda: self._finish(trainer))
        if not is_kind(trainer.strategy, "ModelParallelStrategy"):
            refuse_shards(
                pl_module,
                f"parameters are sharded (DTensor) under {type(trainer.strategy).__name__}, which does not say which "
                "ranks see the same samples; use strategy=ModelParallelStrategy()",
            )
        self._plan, self._uncounted, self._reported = plan, plan.coverage.uncounted, False
        stranger = self._owner is not None and self._owner() is not pl_module
        if stranger or (self._copied and not masks_hold(pl_module, self._masks)):
            self._keep(PackedMasks())  # another module's
            self._elsa = self._elsa_state = self._saved_step = None
        self._copied = False
        self._check_data(trainer, plan)
        if isinstance(self.schedule, ELSA) and not self._masks:
            check_elsa_fit(trainer, plan, self.schedule)
        self._distillation = self._distillation or Distillation.of(
            self.distill_from, self.distill_weight, self.temperature
        )
        if self._distillation is not None:
            self._distillation.load(pl_module)
        if self._first is not None:
            self._first()
        (rank_zero_warn if plan.coverage.worrying else rank_zero_info)(f"WeightPruning: {plan.coverage}")
        if not self.settings.keeps_zeros:
            warn_of_untrained(parameters_of(plan.targets), trainer.optimizers)

    def _check_others(self, trainer: L.Trainer, module: L.LightningModule) -> frozenset[str]:
        """Names of the weights that other callbacks prune; refused where they are this one's, before any prunes."""
        if any(is_kind(other, "ModelPruning") for other in callbacks_of(trainer)):
            raise ValueError(
                "ModelPruning takes weights away from their layers (weight_orig), where masks could not follow: leave "
                "it out, or run it in a fit of its own, and WeightPruning(score='keep') after it, which holds its zeros"
            )
        others = [pruner for pruner in pruners_of(trainer) if pruner is not self]
        own = _weights_to_prune(self, module) if others else {}
        beside: set[str] = set()
        for other in others:
            names = _weights_to_prune(other, module)
            if shared := [name for name in own if name in names]:
                raise ValueError(
                    f"two WeightPruning in one Trainer would both prune {len(shared)} weights, first {shared[0]!r}: "
                    f"targets={self.settings.targets!r} and targets={other.settings.targets!r}; give each layer to "
                    "one of them, with targets or ignore"
                )
            if self.distill_from is not None and other.distill_from is not None:
                raise ValueError("distill_from is given to two WeightPruning in one Trainer: give it to one of them")
            beside |= names.keys()
        return frozenset(beside)

    def _make_plan(self, module: L.LightningModule, beside: frozenset[str] = frozenset()) -> PruningPlan:
        # Layers that are frozen or unfrozen along the way stay what the summary at fit start says they are.
        with required_grad(module, self._trained):
            plan = make_plan(module, self.settings, beside)
        self._planned, self._target_names = plan.planned_count, tuple(parameters_of(plan.targets))
        return plan

    def _check_data(self, trainer: L.Trainer, plan: PruningPlan) -> None:
        """Refuse calibration data that a later update could not read; keep what it could not get any more."""
        gradual = not isinstance(self.schedule, OneShot)
        if not plan.needs_data or (self._masks and not gradual):
            return
        if self.loss_fn is None:
            calibration_loss(trainer.lightning_module)  # for what it refuses
        updates = "more than one update" if gradual else ""
        check_repeatable(self.calibration, plan.passes, "calibration", updates)
        with CalibrationData.of(trainer, self.calibration, plan.num_samples, self.seed) as data:
            if data.once and (gradual or self.schedule.start):
                raise ValueError(
                    f"{self.schedule!r} prunes while training reads its stream, whose data set cannot be copied: pass "
                    "calibration= (a DataLoader or a list of batches) to the callback"
                )
            self._data = data if data.kept else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Catch up with a checkpoint: steps and optimizer states are restored only now."""
        self._started = True
        self._take_up(trainer, pl_module)
        if self._distillation is not None:
            self._distillation.begin(pl_module)
        if not self.finished and self._planned is not None:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                warn_of_a_schedule_that_ends_too_late(self.schedule, last_step(trainer, pl_module))
            if trainer.global_step < self.schedule.end:
                warn_of_choice_by_score(trainer, self.schedule)

    def _take_up(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._restored, self._seen_step = False, trainer.global_step
        saved, self._saved_step = self._saved_step, None
        loaded = self._hold is not None or bool(self._masks)
        if self._hold is None:
            self._begin(trainer, module)
        else:
            self._hold.clear_states()
            self._mask_averages(trainer, module)  # a checkpoint may have brought them
        if isinstance(self.schedule, ELSA) and self._hold is None:
            self._elsa = self._elsa_of(trainer, module)
        # Saved before the step's update, by a callback ahead of this one or after an exception.
        if saved is not None and (loaded or self._elsa is not None):
            self._update(trainer, module, saved, trainer.global_step)

    def _update(self, trainer: L.Trainer, module: L.LightningModule, seen: int, step: int) -> None:
        """Do what the schedule says for the steps after `seen`, up to `step`."""
        if self._elsa is not None:
            self._elsa.choose(seen, step)
        # With several optimizers a batch makes several steps. A second fit begins with what the first has pruned.
        if not self.finished and any(self._due(s) for s in range(seen + 1, step + 1)):
            self._prune(trainer, module)

    def _elsa_of(self, trainer: L.Trainer, module: L.LightningModule) -> ELSATraining:
        assert isinstance(self.schedule, ELSA)
        assert self._plan is not None
        state, self._elsa_state = self._elsa_state, None
        if self._elsa is not None:  # of an earlier fit
            state = self._elsa.state_dict()
        return ELSATraining(trainer, module, self._plan, self.schedule, ranks_of(trainer), state)

    def _begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._masks:
            self._bind(trainer, module, self._masks)
        elif self._prunes_now(trainer):
            self._prune(trainer, module)
        self._owner = weakref.ref(module)

    def _prunes_now(self, trainer: L.Trainer) -> bool:
        """Whether training begins with new masks."""
        return not self._masks and any(self._due(step) for step in range(trainer.global_step + 1))

    def _put_back(self) -> None:
        """Undo what this one has pruned in this fit, whose pruning another could not complete."""
        if self._before is None:
            return
        self._before.restore()
        if self._hold is not None:
            self._hold.remove()
        self._before = self._hold = None
        self._masks, self._counts, self._scores = PackedMasks(), {}, ScoreSummary()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Follow parameters that something has replaced since the last batch."""
        self._follow(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow replaced parameters, and prune further if the schedule says so."""
        self._follow(trainer)
        if self._hold is not None:
            self._hold.mask_unstepped()
        step, seen = trainer.global_step, self._seen_step
        if self._distillation is not None:
            self._distillation.log(pl_module)
        self._update(trainer, pl_module, seen, step)
        self._seen_step = step  # a failure before leaves the update to a resumed fit

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate the weights, or their average, as pruned as they are to be."""
        self._follow(trainer)
        self._mask_averages(trainer, pl_module)

    def _due(self, step: int) -> bool:
        """Whether the schedule prunes something at a step."""
        return self.schedule.updates_at(step) and self.schedule.fraction(step) > 0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never save a pruned weight that something else has revived, be it in an average."""
        self._follow(trainer)
        self._repair()
        self._mask_averages(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hold averages that become the final weights to the masks; say what was not reached."""
        self._follow(trainer)
        self._repair()
        self._mask_averages(trainer, pl_module)
        self._report(trainer)

    def _report(self, trainer: L.Trainer) -> None:
        """Warn once a fit if fewer weights are pruned than was asked for."""
        pruned, _ = self._counted(self._target_names)
        if self._reported or self._planned is None or pruned >= self._planned or self._plan is None:
            return
        self._reported = True
        total = sum(target.numel for target in self._plan.targets)
        warn_of_missing_sparsity(self.schedule, trainer.global_step, pruned, self._planned, total)

    def _finish(self, trainer: L.Trainer) -> None:
        """Check what other callbacks have left, and let go of the optimizers."""
        self._repair()
        self._report(trainer)  # of a fit that had nothing left to train
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the optimizers; masks stay."""
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go where neither of the two was told, such as after a Tuner."""
        self._release()

    def _release(self) -> None:
        if self._teardown is not None:
            self._teardown.remove()
        self._masks = self._masks_at_rest()
        if self._hold is not None:
            self._hold.remove()
        # What ELSA has come to stays, for a checkpoint that is saved now, or another fit.
        self._hold = self._plan = self._data = self._teardown = self._first = self._before = None
        self._started = self._prepared = False
        self._trained = {}
        if self._distillation is not None:
            self._distillation.end()

    def _masks_at_rest(self) -> PackedMasks:
        """The masks in main memory; shards stay on the devices of their mesh."""
        return PackedMasks((n, at_rest(mask)) for n, mask in self.masks.items())

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: settings and masks, nothing of a module, an optimizer or a fit that runs."""
        return copied_state(
            self,
            _masks=self._masks_at_rest(),
            _hold=None,
            _plan=None,
            _data=None,
            _teardown=None,
            _owner=None,
            _loading=None,
            _started=False,
            _prepared=False,
            _first=None,
            _before=None,
            _copied=self._copied or self._owner is not None,
            _around_update=nullcontext,
            _dense=None,
            _trained={},
            _elsa=None,
            _distillation=None,
        )

    # -- pruning -------------------------------------------------------------------------------------------------

    def _prune(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        started = time.monotonic()
        self._plan = self._make_plan(module)  # layers may have been replaced since the last time
        with self._around_update():
            masks = self._new_masks(trainer, module, self._plan)
            self._bind(trainer, module, masks)
        pruned = {name: count for name, (count, _) in self._counts.items()}
        total = sum(size for _, size in self._counts.values())
        counted, everything = self._plan.coverage.pruned_shares(pruned)
        rank_zero_info(
            f"WeightPruning: {self.sparsity:.2%} of {total:,} weights in {len(pruned)} layers "
            f"are pruned, {counted:.2%} of the countable weights, {everything:.2%} of all parameters "
            f"({self._plan.score.name}, {self._plan.pattern or 'unstructured'}; {time.monotonic() - started:.1f} s)"
        )

    def _new_masks(self, trainer: L.Trainer, module: L.LightningModule, plan: PruningPlan) -> PackedMasks:
        loss_fn, data, summary, previous = None, None, ScoreSummary(), self.masks
        reshard(module)
        if self._dense is not None:
            self._dense = {
                name: local(weight.detach()).to("cpu", copy=True)
                for name, weight in parameters_of(plan.targets).items()
            }
        if isinstance(self.schedule, ELSA):
            elsa, self._elsa = self._elsa or self._elsa_of(trainer, module), None
            return elsa.settle()
        with ExitStack() as stack:
            stack.enter_context(undistilled(module))
            if plan.needs_data:
                parameters = stack.enter_context(no_trace(trainer, module))
                epochs = trainer.fit_loop.epoch_progress.current
                data = stack.enter_context(
                    CalibrationData.of(trainer, self.calibration, plan.num_samples, self.seed, self._data)
                )
                loss_fn = watched_loss(
                    self.loss_fn or calibration_loss(module, data),
                    parameters,
                    list(parameters_of(plan.targets).values()),
                    before_hooks=epochs.ready == epochs.completed,
                )
                plan = plan.with_samples(data.local_samples)
            masks = run_plan(
                plan,
                module,
                data,
                loss_fn,
                fraction=fraction_at(self.schedule, trainer.global_step),
                previous=previous,
                forward_context=trainer.precision_plugin.train_step_context,
                ranks=ranks_of(trainer),
                summary=summary,
            )
        self._scores = summary
        # Layers that are no targets any more, of a checkpoint made with others, stay as they are.
        return previous | masks

    def _bind(self, trainer: L.Trainer, module: L.LightningModule, masks: Mapping[str, Tensor]) -> None:
        """Make masks those of the module's parameters as they are now, and of the optimizers' states."""
        if self._hold is None:
            # On a CPU a gradient is masked while it is in the cache; a module that steps by itself clips by itself.
            hook = module.device.type == "cpu" or not module.automatic_optimization
            self._hold = MaskHold(module, masks, hook_gradients=hook)
        else:
            self._hold.update(masks)
        self._hold.watch(trainer.optimizers)
        self._keep(self._hold.masks)
        self._masks = PackedMasks()  # the hold has them
        self._mask_averages(trainer, module)

    def _mask_averages(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        hold = self._hold
        if hold is None:
            return
        for problem in mask_averages(trainer, module, lambda: hold.masks):
            if problem not in self._said:
                self._said.add(problem)
                rank_zero_warn(problem)

    def _keep(self, masks: PackedMasks) -> None:
        """Take masks and count them; where they are sharded every rank must call."""
        self._masks = masks
        pruned = pruned_counts(masks)
        self._counts = {name: (pruned[name], form.numel()) for name, form in masks.forms().items()}

    def _follow(self, trainer: L.Trainer) -> None:
        """Give the masks to the parameters, and to the optimizers, that are there now."""
        if self._restored:  # by a callback that tries something and goes back, such as a LearningRateFinder
            self._take_up(trainer, trainer.lightning_module)
        if self._hold is not None:
            self._hold.watch(trainer.optimizers)
            self._hold.follow()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Mask gradients before a gradient scaler looks for infinities, which skips a step for those of any weight."""
        if self._hold is not None and getattr(trainer.precision_plugin, "scaler", None) is not None:
            self._hold.mask_gradients()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Mask gradients, before they are clipped; or let ELSA change them first."""
        if self._elsa is not None:
            self._elsa.pull(optimizer)
        if self._hold is not None:
            self._hold.mask_gradients()

    def _repair(self) -> None:
        revived = {} if self._hold is None else self._hold.mask_weights()
        if revived:
            rank_zero_warn(
                f"WeightPruning: {sum(revived.values())} pruned weights in {len(revived)} layers "
                f"({next(iter(revived))}, ...) were changed outside optimizer steps, and have been set to zero again"
            )

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Masks packed to bits (uint8 tensors), and what made them; loads under ``weights_only=True``.

        Where weights are sharded every rank must call, and rank 0, which writes the checkpoint, alone gets the bits.
        """
        elsa = self._elsa_state if self._elsa is None else self._elsa.state_dict()
        return {
            "version": _STATE_VERSION,
            "callback": "WeightPruning",  # also of a subclass, which its key does not say
            "score": self.settings.score.name,
            "pattern": self.settings.pattern,
            "masks": pack_masks(self.masks),
            "scores": self._scores.state_dict(),
            "uncounted": list(self._uncounted),
            "settings": self._described(),
            "step": self._seen_step if self._saved_step is None else self._saved_step,
            **({} if elsa is None else {"elsa": elsa}),
        }

    def describe_masks(self) -> dict[str, Any]:
        """Return score, settings and number of the masks in plain values, for a model card."""
        masks = len(self._counts)  # in a fit too, when the hold has them
        return {"score": self.settings.score.name, "settings": self._described(), "masks": masks}

    def _described(self) -> dict[str, Any]:
        """The settings that say how the masks came about, in plain values, for model cards and for a resumed run."""
        return {**self.settings.describe(), "seed": described(self.seed), "schedule": described(self.schedule)}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the masks of a checkpoint that another choice of layers was made for; refuse to leave any behind.

        Raises:
            ValueError: the checkpoint has masks of a `WeightPruning` that is not in the Trainer.
        """
        self._loading = weakref.ref(pl_module)
        states = checkpoint["callbacks"]
        pruners = pruners_of(trainer)
        left = states_of(states, "WeightPruning").keys() - {pruner.state_key for pruner in pruners}
        if len(left) == len(pruners) == 1 and self.state_key not in states:  # it prunes by other names now
            states[self.state_key] = states.pop(left.pop())
        if left and self._stage == "fit":
            raise ValueError(
                f"the checkpoint has masks of {sorted(left)}, which no WeightPruning in the Trainer would hold: its "
                f"callbacks have the keys {sorted(p.state_key for p in pruners)}. Resume with the targets and ignore "
                "that each had"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take masks from a checkpoint; they are bound to the parameters when training starts or goes on.

        Raises:
            ValueError: an unknown version, or a damaged mask, with the parameter's name.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(f"the checkpoint's WeightPruning state has version {version!r}, not {_STATE_VERSION}")
        masks = unpack_masks(state_dict["masks"])
        if masks and self._stage in (None, "fit"):
            score = self.settings.score
            own = {"score": score.name, "pattern": self.settings.pattern}
            saved = {**(state_dict.get("settings") or {}), **{name: state_dict.get(name) for name in own}}
            warn_of_other_settings(saved, {**own, **self._described()}, score)
        self._keep(masks)
        self._elsa, self._elsa_state = None, state_dict.get("elsa")
        self._scores = ScoreSummary.from_state(state_dict.get("scores"))
        self._uncounted = tuple(state_dict.get("uncounted", ()))
        self._saved_step = state_dict.get("step")
        self._owner, self._loading = self._loading, None
        self._copied, self._restored = False, self._started
        if self._hold is not None:
            self._hold.remove()
            self._hold = None


def pruners_of(trainer: L.Trainer) -> list[WeightPruning]:
    """The `WeightPruning` callbacks of a Trainer, in its order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, WeightPruning)]


def trained_now(module: nn.Module) -> dict[str, bool]:
    """Whether each parameter requires a gradient, by clean name."""
    return {name: weight.requires_grad for name, weight in named_weights(module).items()}


@contextmanager
def required_grad(module: nn.Module, trained: Mapping[str, bool]) -> Iterator[None]:
    """Have parameters require a gradient, or none, as they once did.

    Args:
        module: Which has them.
        trained: Whether each required one, by clean name; one that is gone is passed over.
    """
    now = named_weights(module)
    changed = [now[name] for name, before in trained.items() if name in now and now[name].requires_grad != before]
    for weight in changed:
        weight.requires_grad_(not weight.requires_grad)
    try:
        yield
    finally:
        for weight in changed:
            weight.requires_grad_(not weight.requires_grad)


def _weights_to_prune(pruner: WeightPruning, module: nn.Module) -> dict[str, nn.Parameter]:
    return parameters_of(find_targets(module, pruner.settings.targets, pruner.settings.ignore))


def ranks_of(trainer: L.Trainer) -> Ranks | None:
    """The ranks that prune together under a strategy."""
    strategy: Any = trainer.strategy
    if is_kind(strategy, "ModelParallelStrategy"):
        return Ranks(strategy.device_mesh["data_parallel"].get_group(), lockstep=True)
    return Ranks() if trainer.world_size > 1 else None
