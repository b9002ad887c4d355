"""`PruningAwarePretraining`: a language model shrinks while it pretrains (EfficientLLM, arXiv 2502.06663)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, float64, nn, tensor
from torch.optim import Optimizer

from lightning_prune.callbacks.averages import averages
from lightning_prune.callbacks.checks import (
    check_module,
    check_neighbors,
    check_not_masked,
    check_optimizers,
    check_settings,
    check_states,
    check_trained,
    check_trainer,
    masked_while_shrinking,
    neighbor,
    units_stay,
    warn_of_pruned,
    warn_of_readers,
)
from lightning_prune.callbacks.copies import copied_state
from lightning_prune.callbacks.distillation import Distillation
from lightning_prune.callbacks.pruning_notices import last_step, warn_of_an_end_too_late
from lightning_prune.callbacks.resuming import (
    before_loading,
    check_before_loading,
    epsilon_of,
    refuse_other_shapes,
    take_saved_shapes,
    unsaid_fields,
    updating_hyper_parameters,
)
from lightning_prune.callbacks.rewrapping import without_wrapper
from lightning_prune.callbacks.teardown import BeforeTeardown
from lightning_prune.callbacks.weight_pruning import WeightPruning
from lightning_prune.checkpoints.reading import check_checkpoint_of
from lightning_prune.checkpoints.states import follow_shrunk_checkpoints
from lightning_prune.progress import is_main_process
from lightning_prune.pruning.batches import padding_mask
from lightning_prune.pruning.holding import with_inner
from lightning_prune.report.figures import shrinking_picture
from lightning_prune.schedules import ShrinkSchedule
from lightning_prune.sharding import reshard
from lightning_prune.structure.compensation import StreamedMoments
from lightning_prune.structure.device_goals import LatencyTable, is_latency, latency_of
from lightning_prune.structure.planning import make_planner
from lightning_prune.structure.removal import sliced_masks
from lightning_prune.structure.saliency import SaliencyAccumulator, StreamedKFAC
from lightning_prune.structure.shrinking import Shrinking, ShrinkRecord, pruned_ratios
from lightning_prune.structure.sizes import AttentionUnit, Sizes, check_types
from lightning_prune.structure.units import Structure, find_language_model, language_models, read_structure

_STATE_VERSION = 2
# What the accumulated statistics of a checkpoint were made with.
_SAME = ("types", "saliency", "saliency_decay", "second_order", "attention_unit", "round_to")


class PruningAwarePretraining(L.Callback):
    """Shrink a language model while it trains, until it has the target size; then it trains on.

    At every pruning the type of unit whose cheapest unit has the lowest mean saliency loses it: a head or key/value
    group of every layer (``"attention"``), an intermediate channel of every layer (``"ffn"``), a hidden channel of the
    whole model (``"hidden"``), or a whole layer (``"layer"``, not in the paper), or an expert of every layer
    (``"expert"``, which is sliced off at once). Saliency comes from the training's own
    gradients, right before each optimizer step (averaged over processes, summed over accumulated batches, not yet
    clipped). A pruned unit is zero at first; every `compact_every` prunings, and when the target is reached, zeros are
    sliced off: parameters, optimizer states, averaged weights (``WeightAveraging``), the configuration. The loss does
    not change by that. Hidden channels under LayerNorms are sliced off at once too. What is left is an ordinary model
    of its family.

    Works with automatic optimization of one optimizer (Adam, AdamW, SGD, ... : states of the weights' shapes) on one
    device or under DDP, with accumulation, clipping, mixed precision, gradient checkpointing and tied embeddings. DDP
    is wrapped anew at each compaction. Refused: FSDP1, tensor parallelism, DeepSpeed, compiled modules, manual
    optimization.

    With `WeightPruning` in the same Trainer, in any order, the model ends small and sparse. It may prune once the model
    has its size (a schedule that starts after `end`), or from the start: masks are sliced with the weights then, N:M
    groups go as wholes (`round_to` has to be a multiple of M), units are sliced off at every pruning, and when the
    model has its size masks are completed to the sparsity that was asked for. With `PERPRetraining` too, adapters go on
    when both are done, and take the place of the frozen weights in the optimizer; its learning rates go on. Not under
    ``ModelParallelStrategy``.

    Under ``ModelParallelStrategy`` with FSDP2 shards cannot be sliced: pruned units stay zeros (`compact_every` has no
    effect), and steps cost what they did. ``save_pretrained`` of `CausalLM`, which every process calls, writes the
    small model, and so do `lightning_prune.structure.save_plain` and ``lightning-prune export`` of a checkpoint. Each
    process scores and masks its shards; the second moments of variant B are whole on each. A full checkpoint
    (``save_distributed_checkpoint=False``) can be resumed on one device or under DDP, which slice from there on; theirs
    are refused under FSDP2, and so are ``WeightAveraging`` and ``precision="16-mixed"``.

    Checkpoints can be taken, and training resumed, at any step. One that is taken inside a step, by a callback ahead of
    this one or after an exception, lacks what that step showed of the second moments (variant B).
    ``load_from_checkpoint`` of `CausalLM` builds the small model; in a module of yours, hyper-parameters that hold the
    configuration (a mapping with ``model_type``), or single fields of it under their own names, are kept up to date.

    Args:
        target: A share of the model's parameters (float), their number (int), final sizes by name
            (``hidden_size``, ``intermediate_size``, ``num_attention_heads``, ``num_key_value_heads``,
            ``num_hidden_layers``, ``num_experts``), ``{"bytes": B}`` or ``{"seconds_per_token": S, "batch": N}``, see
            `prune_structured`; a time is measured when the fit starts, and its table kept in checkpoints. Shares and
            numbers count all parameters, tied ones once, and are reached from above: the first size that is not larger.
        types: Any of ``"attention"``, ``"ffn"``, ``"hidden"``, ``"layer"`` and ``"expert"``, that the family can lose.
        every_n_steps: Optimizer steps between prunings (N in the paper, section 4: 1 or 2).
        start: Optimizer steps before saliency is accumulated.
        end: Step at which the target is reached, along a straight line of parameters: each pruning takes as many units
            as that needs. None: `units_per_pruning` at each, until the target is reached.
        saliency: ``"taylor2"``, ``abs(g w - 1/2 g^2 w^2)`` (LLM-Pruner, arXiv 2305.11627, with the diagonal
            Fisher); ``"taylor1"``, ``abs(g w)``; ``"magnitude"``, ``abs(w)``; or ``"kfac"``,
            ``sum over i of W_ij^2 E[delta_i^2] E[x_j^2]`` of the layers that read a unit, from the training's
            own passes; with `second_order`, of what is left of the unit when the others have been updated for it.
        saliency_decay: Share of the saliency so far that a pruning keeps for the next, from 0 (the paper: only
            what came since the last pruning counts) to below 1. With small batches and few steps between prunings
            a running mean chooses better units.
        second_order: Also update what remains, by each layer's second moments of its inputs (variant B).
        second_order_every: Optimizer steps between those on which the moments are observed.
        second_order_decay: Weight of an observation in the moments against the next one's; of all there have been, they
            are the weighted mean.
        compact_every: Prunings between compactions; without effect where parameters are sharded, and while the masks of
            `WeightPruning` are sliced with the weights.
        round_to: Multiple that the FFN and hidden sizes are kept at; for the default see `prune_structured`.
        units_per_pruning: Units at a pruning, where `end` is None. In a layer, for attention and ffn.
        attention_unit: ``"group"``, a key/value head with its query heads, or ``"head"``, one query head of each group.
        distill_from: A source model whose logits to stay close to: a causal language model, or where to load one from
            (folder, hub id, ``.gguf`` file). It takes part in training steps alone, and in no checkpoint.
        distill_weight: Share of the divergence in the loss, above 0 and at most 1.
        temperature: Of both distributions in the divergence.
        picture: File to draw saliency, pruned ratios and size over tokens into, when training ends.

    Attributes:
        tokens: Tokens that training has seen, over all processes. Padding is left out where a batch names it
            (``attention_mask``, see `lightning_prune.prune`); of any other batch every position counts.

    Raises:
        TypeError, ValueError: from the constructor for values that no model could take; when a fit starts, before
            anything changes, for those that do not fit the model or the Trainer.

    Example::

        trainer = L.Trainer(max_steps=2000, callbacks=[PruningAwarePretraining(target=0.5, end=1500)])
        trainer.fit(module, datamodule)
        module.save_pretrained("small")
    """

    def __init__(
        self,
        target: float | int | dict[str, Any],
        types: Sequence[str] = ("attention", "ffn", "hidden"),
        every_n_steps: int = 1,
        start: int = 0,
        end: int | None = None,
        saliency: str = "taylor2",
        saliency_decay: float = 0.0,
        second_order: bool = False,
        second_order_every: int = 4,
        second_order_decay: float = 0.9,
        compact_every: int = 16,
        round_to: int | None = None,
        units_per_pruning: int = 1,
        attention_unit: AttentionUnit = "group",
        distill_from: str | nn.Module | None = None,
        distill_weight: float = 0.5,
        temperature: float = 1.0,
        picture: str | None = None,
    ) -> None:
        super().__init__()
        self.target = target
        self.types = check_types(types)
        self.schedule = ShrinkSchedule(start, end, every_n_steps, units_per_pruning)
        self.saliency = saliency
        self.saliency_decay = saliency_decay
        self.second_order = second_order
        self.second_order_every = second_order_every
        self.second_order_decay = second_order_decay
        self.compact_every = compact_every
        self.round_to = round_to
        self.attention_unit = attention_unit
        self.distill_from = distill_from
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.picture = picture
        check_settings(self)
        self.tokens = 0
        self._shrinking: Shrinking | None = None
        self._owner: weakref.ref[L.LightningModule] | None = None
        self._loading: weakref.ref[L.LightningModule] | None = None  # what a checkpoint is being loaded into
        self._loaded: dict[str, Any] | None = None  # of a checkpoint, not yet bound to the module
        self._copied = False  # what is loaded comes from a copied callback, whose module is not known
        self._distillation: Distillation | None = None
        self._unwrap: list[Callable[[], None]] = []
        self._waiting = False  # for a checkpoint
        self._begun = False  # in this fit
        self._unchecked = True  # states of the optimizers after a step of this fit
        self._passed_over = 0  # prunings of this fit that knew no finite gradient
        self._seen_step = 0
        self._saved_step: int | None = None  # that the state of a checkpoint is of; None once training goes on from it

    @property
    def finished(self) -> bool:
        """Whether the model has its final size, with nothing left to slice off."""
        return self._shrinking is not None and self._shrinking.reached and not self._shrinking.pending

    @property
    def history(self) -> list[ShrinkRecord]:
        """One record a pruning, after one of the model before the first."""
        if self._shrinking is not None:
            return self._shrinking.history
        saved = [] if self._loaded is None else self._loaded["history"]
        return [ShrinkRecord.from_dict(record) for record in saved]

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: settings and what a checkpoint would hold, nothing of a module or of a fit that runs.

        A fit of the copy goes on from there if its module has shrunk to those very sizes, and else begins anew. Where
        parameters are sharded the sums are spread over processes, and stay behind.
        """
        shrinking, state = self._shrinking, self._loaded
        if shrinking is not None:
            state = None if shrinking.compact_every is None else shrinking.state_dict()
        loaded = {"_loaded": state, "_copied": self._copied or shrinking is not None}
        return copied_state(
            self,
            _shrinking=None,
            _owner=None,
            _loading=None,
            _distillation=None,
            _unwrap=[],
            _waiting=False,
            _begun=False,
            _saved_step=None,
            **loaded,
        )

    # -- life of a fit -------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what could not be shrunk, and be there when a checkpoint is loaded."""
        check_checkpoint_of(trainer)
        follow_shrunk_checkpoints(trainer)
        if built := bool(language_models(pl_module)) or not _builds_later(pl_module):
            find_language_model(pl_module)
        if stage == "fit":
            check_trainer(trainer, self)
            check_module(pl_module, trainer.strategy)
            if (pruner := neighbor(trainer, WeightPruning)) is not None:  # before that one prunes anything
                if built:
                    check_neighbors(trainer, self, read_structure(pl_module, self.attention_unit))
                pruner.do_first(partial(self.begin, trainer, pl_module))
            if built:
                self._load_source(pl_module)

        def prepare(checkpoint: dict[str, Any]) -> None:
            state = checkpoint.get("callbacks", {}).get(self.state_key)
            if state is None:
                refuse_other_shapes(pl_module, checkpoint)
                return
            averaged = averages(trainer) if stage == "fit" else ()  # there are none before
            with updating_hyper_parameters(pl_module):
                take_saved_shapes([pl_module, *averaged], state, self.attention_unit)

        self._let_go()
        self._begun = False
        self._unwrap = [before_loading(pl_module, prepare)]
        if trainer.strategy.restore_checkpoint_after_setup:
            undo = check_before_loading(trainer.strategy, pl_module, self.state_key, self.attention_unit)
            self._unwrap.append(undo)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the units; take up a checkpoint, or an earlier fit of the same module."""
        # Sharded weights, and the state of this callback with them, are restored only after this hook, if they are:
        # that there is a checkpoint is not known yet.
        end = BeforeTeardown(trainer.strategy, partial(self._finish, trainer, pl_module))
        self._unwrap.append(end.remove)
        self._waiting = trainer.strategy.restore_checkpoint_after_setup
        if not self._waiting:
            self.begin(trainer, pl_module)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the units, once a fit; a callback beside this one may have it done before it changes the module."""
        if self._begun:
            return
        self._waiting, self._begun, self._unchecked, self._passed_over = False, True, True, 0
        reshard(pl_module)
        self._load_source(pl_module)
        state = self._loaded or (None if self._shrinking is None else self._shrinking.state_dict())
        if self._owner is not None and self._owner() is not pl_module:
            state = self._saved_step = None  # another module's, such as one that was tested
        structure = read_structure(pl_module, self.attention_unit)
        if self._copied and state is not None and not _shrunk_to(state, structure.sizes):
            state = None
        stay, blocks = units_stay(structure, trainer.strategy, self.types), check_neighbors(trainer, self, structure)
        check_module(pl_module, trainer.strategy)  # once more: configure_model may have compiled it
        if state is None:
            check_not_masked(structure)
            if neighbor(trainer, WeightPruning) is None:
                warn_of_pruned(structure)
        first = None if state is None else Sizes(**state["first"])
        table = None if state is None or not state["latency"] else LatencyTable.from_dict(state["latency"])
        if table is None and is_latency(self.target):
            table = _measured_once(structure, self.target, trainer)
        planner = make_planner(structure, self.target, self.types, self.round_to, first, blocks=blocks, table=table)
        moments = None
        if self.second_order:
            moments = StreamedMoments(structure, self.types, self.second_order_decay)
        if self.saliency == "kfac":
            saliency: SaliencyAccumulator = StreamedKFAC(
                structure,
                self.types,
                sum_of(trainer),
                self.saliency_decay,
                None if moments is None else moments.unexplained,
            )
        else:
            saliency = SaliencyAccumulator(structure, self.types, self.saliency, self.saliency_decay)
        # Masks are sliced with the weights: no unit waits for it, so that masks and scores know only what is there.
        every = None if stay else 1 if masked_while_shrinking(trainer, self) else self.compact_every
        shrinking = Shrinking(structure, planner, saliency, moments, every, agree_of(trainer))
        if state is not None:
            shrinking.load_state_dict(state)
        else:
            self.tokens = 0
        if not shrinking.reached:
            check_optimizers(structure, trainer.optimizers, saliency, self.types)
        self._shrinking, self._owner, self._loaded = shrinking, weakref.ref(pl_module), None
        self._copied = False
        if not shrinking.reached:
            shrinking.watch()
            self._warn_of_checkpoints(trainer, pl_module)
            if "hidden" in self.types:
                warn_of_readers(pl_module, structure)
        if self._distillation is not None:
            self._distillation.begin(pl_module, structure.model)

    def _load_source(self, module: L.LightningModule) -> None:
        if self.distill_from is not None and self._distillation is None:
            distillation = Distillation(self.distill_from, self.distill_weight, self.temperature)
            distillation.load(module)
            self._distillation = distillation

    def _warn_of_checkpoints(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Say which way checkpoints of the small model will load, where the usual one will not."""
        planner, name = self._now.planner, type(module).__name__
        missing = unsaid_fields(module.hparams, self._now.structure, planner.changing_sizes())
        if trainer.checkpoint_callback is None or not missing:
            return
        rank_zero_warn(
            f"PruningAwarePretraining: the hyper-parameters of {name} do not say the sizes of its model "
            f"({', '.join(missing)}), so "
            f"{name}.load_from_checkpoint(path) will build the large one, which checkpoints of the small one do not "
            "fit. Build it from a hyper-parameter that holds the configuration (a mapping with model_type, see "
            f"save_hyperparameters), or load them by Trainer(callbacks=[PruningAwarePretraining(...)]).validate("
            f"{name}(...), ckpt_path=path)"
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where it begins: a checkpoint's step is known only now."""
        if self._waiting:
            self.begin(trainer, pl_module)
        saved, self._saved_step = self._saved_step, None
        self._seen_step = trainer.global_step
        self._now.begin(trainer.global_step, self.tokens)
        end = self.schedule.end
        if end is not None and not self._now.reached and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            last = last_step(trainer, pl_module)
            warn_of_an_end_too_late(f"PruningAwarePretraining: {end=}", end, last, "the target will not be reached")
        # Saved before the step's pruning, by a callback ahead of this one or after an exception.
        if saved is not None and saved < trainer.global_step:
            self._end_step(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Observe layers on the steps chosen for it."""
        self._now.listen(trainer.global_step - self.schedule.start, self.second_order_every, batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Gradient checkpointing runs the forward again: once is enough."""
        self._now.rest()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Accumulate saliency of the step's gradients, and keep masked units from coming back."""
        self._now.mask_gradients()
        if trainer.global_step >= self.schedule.start and not self._now.reached:
            if self._now.saliency.stream is None:  # others see what passes, also through weights frozen by now
                check_trained(self._now.structure, self._now.saliency, self.types)
            self._now.saliency.add(_loss_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prune and compact when it is due."""
        self._now.rest()  # a batch without a loss has no backward
        self.tokens += count_tokens(batch) * trainer.world_size
        if trainer.global_step == self._seen_step:
            return
        self._end_step(trainer, pl_module)
        self._seen_step = trainer.global_step
        shown: dict[str, Any] = {"parameters_M": self._now.parameters / 1e6}
        if self._distillation is not None and self._distillation.last is not None:
            shown["distillation"] = self._distillation.last
        pl_module.log_dict(shown, prog_bar=True, logger=False, on_step=True, on_epoch=False)

    def _end_step(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        shrinking, step = self._now, trainer.global_step
        if self._unchecked and not shrinking.reached:  # an optimizer's first step says the last word on its states
            optimizers = list(with_inner(trainer.optimizers))
            check_states(shrinking.structure, optimizers, self.types)
            self._unchecked = not any(optimizer.state for optimizer in optimizers)  # as while losses are scaled anew
        if shrinking.moments is not None:
            shrinking.moments.end_step(sum_of(trainer))
        if self.schedule.due(step) and not shrinking.reached:
            self._prune(trainer, step)
        if shrinking.compaction_due:
            self._compact(trainer, module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Slice off what is masked, so that the module ends as an ordinary small model; draw."""
        shrinking = self._now
        self._compact(trainer, pl_module)
        if not shrinking.reached:
            lost = self._passed_over
            why = f"{lost} prunings were passed over, as no gradient before them was finite (lower learning_rate?); "
            rank_zero_warn(
                f"PruningAwarePretraining: training ended at {shrinking.parameters:,} parameters, before the target "
                f"({self.target!r}); {why if lost else ''}train longer, "
                + ("set end, or raise units_per_pruning" if self.schedule.end is None else "or give an earlier end")
            )
        if self.picture is not None and len(self.history) > 1 and is_main_process():
            shrinking_picture(self.history, self.picture)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take all hooks off."""
        if self._waiting:  # nothing was left to train
            self.begin(trainer, pl_module)
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take all hooks off; masked units stay masked, and a next fit goes on from there."""
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the module its own hooks back."""
        self._release()

    @property
    def _now(self) -> Shrinking:
        """The state of the fit that runs."""
        assert self._shrinking is not None
        return self._shrinking

    def _release(self) -> None:
        if self._shrinking is not None:
            self._shrinking.release()
        if self._distillation is not None:
            self._distillation.end()
        self._begun = False
        self._let_go()

    def _let_go(self) -> None:
        for undo in self._unwrap:
            undo()
        self._unwrap = []

    # -- pruning -------------------------------------------------------------------------------------------------

    def _prune(self, trainer: L.Trainer, step: int) -> None:
        shrinking, optimizers = self._now, list(with_inner(trainer.optimizers))
        planner, down_to = shrinking.planner, None
        if self.schedule.end is not None:
            down_to = self.schedule.goal(step, planner.cost(planner.first), planner.final)
            # Final sizes are reached one by one, not when their product is.
            down_to = -1 if planner.final_sizes is not None and step >= self.schedule.end else down_to
        self._passed_over += not shrinking.saliency.steps
        reshard(shrinking.structure.model)
        record = shrinking.prune(step, self.tokens, self.schedule.units, down_to, optimizers, averages(trainer))
        if record is None:
            return
        if (pruner := neighbor(trainer, WeightPruning)) is not None:
            pruner.hold_masks()  # what is left has been re-fitted (variant B)
        for logger in trainer.loggers:
            logger.log_metrics(metrics(record, shrinking), step=step)
        if shrinking.reached:
            rank_zero_info(
                f"PruningAwarePretraining: the target is reached at step {step}, {record.parameters:,} parameters, "
                f"{shrinking.sizes.as_dict()}"
            )
            shrinking.release()

    def _compact(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        shrinking = self._now
        if not shrinking.pending or shrinking.compact_every is None:
            return
        pruner = neighbor(trainer, WeightPruning)
        masks = {} if pruner is None else sliced_masks(shrinking.structure, shrinking.pending, pruner.masks)
        with updating_hyper_parameters(module), without_wrapper(trainer, module):
            shrinking.compact(list(with_inner(trainer.optimizers)), averages(trainer))
        if pruner is not None:
            pruner.change_masks(trainer, module, masks, complete=shrinking.reached)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Sizes, masked units, accumulated saliency and moments, history: plain values and tensors."""
        shrinking = self._shrinking
        if shrinking is None:
            return {}
        return {
            "version": _STATE_VERSION,
            "callback": "PruningAwarePretraining",
            "settings": self._settings(),
            "tokens": self.tokens,
            "step": self._seen_step if self._saved_step is None else self._saved_step,
            "sharded": shrinking.compact_every is None,
            "epsilon": epsilon_of(shrinking.structure),
            "shrinking": shrinking.state_dict(),
        }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which module the state of a checkpoint is of."""
        self._loading = weakref.ref(pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a checkpoint; it is bound to the model when the fit starts, or at once in the midst of one.

        Raises:
            ValueError: an unknown version, or statistics made with other settings.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(
                f"the checkpoint's PruningAwarePretraining state has version {version!r}, not {_STATE_VERSION}"
            )
        saved, mine = state_dict["settings"], self._settings()
        for name in _SAME:
            if saved.get(name) != mine[name]:
                raise ValueError(
                    f"the checkpoint was made with {name}={saved.get(name)!r}, this PruningAwarePretraining has "
                    f"{mine[name]!r}; resume with the same, or start a new training from load_from_checkpoint"
                )
        self.tokens = int(state_dict["tokens"])
        self._owner, self._loading, self._copied = self._loading, None, False
        self._saved_step = state_dict.get("step")
        if self._begun:  # by a callback that tries something and goes back, such as a LearningRateFinder
            self._now.load_state_dict(state_dict["shrinking"])
        else:
            self._loaded = state_dict["shrinking"]

    def _settings(self) -> dict[str, Any]:
        return {name: list(self.types) if name == "types" else getattr(self, name) for name in _SAME}


def _measured_once(structure: Structure, target: Any, trainer: L.Trainer) -> LatencyTable:
    """A table of latencies as the first process has measured it."""
    table = latency_of(structure, target).table
    if (agree := agree_of(trainer)) is None:
        return table
    values = tensor([*table.weights, *table.seconds, table.rest], dtype=float64)
    agree(values)
    *found, rest = values.tolist()
    return LatencyTable(tuple(found[: len(table.weights)]), tuple(found[len(table.weights) :]), rest)


def _builds_later(module: L.LightningModule) -> bool:
    """Whether a module has hooks that may build its model, and come after a callback's ``setup``."""
    hooks = ("setup", "configure_model")
    return any(getattr(type(module), hook) is not getattr(L.LightningModule, hook) for hook in hooks)


def _loss_scale(trainer: L.Trainer, optimizer: Optimizer) -> float:
    """How many times too large gradients are before a step: some optimizers unscale those of a scaled loss in it."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    # As Lightning tells them; those with fused=True have it, while of single groups that are fused it is not set.
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and unscales else 1.0


def _shrunk_to(state: dict[str, Any], sizes: Sizes) -> bool:
    """Whether a model of these sizes is what a copied callback has shrunk."""
    return Sizes(**state["sizes"]) == sizes != Sizes(**state["first"])


def metrics(record: ShrinkRecord, shrinking: Shrinking) -> dict[str, float]:
    """What a logger gets of a pruning."""
    sizes = {f"shrink/{name}": value for name, value in shrinking.sizes.as_dict().items() if name != "head_dim"}
    saliency = {f"shrink/saliency_{t}": value for t, value in record.saliency.items()}
    pruned = {f"shrink/pruned_{t}": value for t, value in pruned_ratios(record, shrinking.history[0]).items()}
    return {"shrink/parameters": record.parameters, "shrink/tokens": record.tokens, **sizes, **saliency, **pruned}


def agree_of(trainer: L.Trainer) -> Callable[[Tensor], None] | None:
    """Makes a CPU tensor that of rank 0, so that no rounding lets ranks choose differently."""
    if trainer.world_size == 1:
        return None
    device = trainer.strategy.root_device

    def agree(values: Tensor) -> None:
        shared = values.to(device)
        dist.broadcast(shared, 0)
        values.copy_(shared)

    return agree


def sum_of(trainer: L.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over processes; None where there is one."""
    if trainer.world_size == 1:
        return None

    def total(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    return total


def count_tokens(batch: Any) -> int:
    """Tokens of a batch, or batches in it: of ``input_ids``, or of the first tensor, without the padding it names."""
    if (mask := padding_mask(batch)) is not None:
        return int(mask.sum())
    if isinstance(batch, Mapping) and "input_ids" in batch:
        batch = batch["input_ids"]
    elif isinstance(batch, (Mapping, list, tuple)):
        parts = list(batch.values() if isinstance(batch, Mapping) else batch)
        tensor_first = next((v for v in parts if isinstance(v, Tensor)), None)
        if tensor_first is None:  # batches in a batch, as of a CombinedLoader
            return sum(map(count_tokens, parts))
        batch = tensor_first
    return batch.numel() if isinstance(batch, Tensor) else 0
