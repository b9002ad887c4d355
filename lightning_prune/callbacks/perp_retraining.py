"""`PERPRetraining`: train adapters of a pruned model in a Trainer, and merge them at the end."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.averages import averages
from lightning_prune.callbacks.calibration_data import CalibrationData, calibration_loss, no_trace
from lightning_prune.callbacks.checks import (
    check_after_shrinking,
    check_order,
    check_pruner,
    check_strategy,
    neighbor,
)
from lightning_prune.callbacks.copies import copied_state
from lightning_prune.callbacks.distillation import Distillation, undistilled
from lightning_prune.callbacks.kinds import callbacks_of, is_kind
from lightning_prune.callbacks.perp_agreement import check_left_on, check_same, check_scalings, settings_of
from lightning_prune.callbacks.perp_checkpoints import follow_checkpoints
from lightning_prune.callbacks.pruning_aware_pretraining import PruningAwarePretraining
from lightning_prune.callbacks.rewrapping import put_in_place, without_wrapper
from lightning_prune.callbacks.teardown import BeforeTeardown
from lightning_prune.callbacks.traces import WatchedParameters
from lightning_prune.callbacks.weight_pruning import WeightPruning, pruners_of, ranks_of
from lightning_prune.checkpoints.reading import check_checkpoint_of, open_checkpoint
from lightning_prune.checkpoints.states import UNMERGED, check_adapters
from lightning_prune.errors import check_bool
from lightning_prune.naming import plain_name
from lightning_prune.perp.adapters import (
    adaptable,
    adapter_masks,
    adapters_aside,
    attach,
    check_any_adapted,
    check_unshared,
    fold,
    has_pruned,
    merge,
    remove_adapters,
    trainable_share,
    without_adapter,
)
from lightning_prune.perp.layers import SparseLayer, sparse_layers
from lightning_prune.perp.masks import copy_masks, set_masks
from lightning_prune.perp.options import ReconstructSettings, WholeNames, check_adapter, check_options, check_parts
from lightning_prune.perp.reconstruction import Reconstruction, reconstruct
from lightning_prune.perp.record import Retraining, find_retraining, unwrapped
from lightning_prune.pruning.holding import with_inner
from lightning_prune.pruning.masks import Masks, mask_sparsity, named_weights, pack_masks, unpack_masks
from lightning_prune.pruning.plan import needs_of
from lightning_prune.pruning.running import quiet_model
from lightning_prune.pruning.targets import Target, find_targets, parameters_of, select_layers
from lightning_prune.sharding import reshard

_STATE_VERSION = 1


class PERPRetraining(L.Callback):
    """Retrain a pruned model through adapters and a few of its own parameters; merge at the end (PERP).

    The adapters go on in ``setup``, so the module's ``configure_optimizers`` finds them; it has to leave out what
    requires no gradient, or give it to an optimizer that passes over parameters without one. With `WeightPruning` in
    the same Trainer, in either order, the model is pruned at fit start and the adapters take its masks (layers that
    were frozen before stay dense, without an adapter, unless its `targets` names them); without it the masks are the
    exact zeros of a model pruned before, or `masks`. At fit end the adapters are merged, and the module's model is the
    plain transformers model again, with every pruned weight at +0.0.

    Only adapters and the parts in `train` require gradients, so only they have gradients and optimizer states.
    While training, checkpoints hold the merged model under the plain module's names, so that ``load_from_checkpoint``
    and ``test(ckpt_path="best")`` take them, also those of ``save_weights_only=True``. A full one has base weights and
    adapters besides, in this callback's state, and a Trainer with this callback resumes from it to the bit (start from
    the pruned model, or name `target_modules`, if not every decoder layer has an adapter). An interrupted fit leaves
    the adapters on: fit again, or call `merge`.

    Under DDP every rank builds the same adapters from `seed`, gradients of what is trained alone are averaged, and
    every rank merges the same numbers.

    Under ``ModelParallelStrategy`` with FSDP2 adapters are sharded with the weights: the module's ``configure_model``
    finds the transformers model with adapters in its layers, and calls ``fully_shard`` as it would without. Every rank
    holds its part of the masks and merges its part of the weights. Checkpoints hold base weights and adapters under
    PEFT's names there, which `CausalLM`, ``lightning-prune export`` and `load_merged_state` read as the merged model:
    shards are loaded before anything could put them together. Tensor parallelism, `reconstruct` under shards,
    ``FSDPStrategy`` and DeepSpeed are refused; so are a module that makes its model in ``configure_model``, and one
    that an earlier fit has sharded and merged, since its layers can get no new adapters.

    With `PruningAwarePretraining` and `WeightPruning` in the same Trainer, in any order, the adapters go on when the
    model has its final size and its masks. In the optimizer they join the group of their layer's weight, which leaves
    it; learning rates go on as they were. What cannot wait so long is refused: `reconstruct`, `masks`, averaged
    weights.

    With a schedule of `WeightPruning` (IMP with PERP) every update of the masks first merges the adapters into the
    weights, scores the merged weights, and begins the adapters anew on the new masks, without optimizer states.

    Args:
        adapter: ``"mask_lora"``, ``"scale_lora"``, ``"hira"``, ``"lora_prune"``, ``"lora"`` (needs ``merge=False``),
            one of your own, or None; see `lightning_prune.perp.add_adapters`.
        train: Any of ``"bias"``, ``"norm"``, ``"head"`` (of a classifier too: a new one has to be named, since all else
            in the model is frozen) and ``"embedding"``.
        merge: Merge at fit end.
        masks: Bool masks by the transformers model's parameter names; default those of `WeightPruning`, else zeros.
        r: Rank of the adapters.
        lora_alpha: Scaling times rank; default ``2 * r``. None for scale_lora and hira, which have none.
        target_modules: Layers with an adapter, as in PEFT; default every pruned one, or the targets of
            `WeightPruning`.
        lora_options: Further options of `add_adapters`, such as ``{"use_rslora": True}``.
        adapt_head: Put an adapter on the output embeddings too; see `lightning_prune.perp.add_adapters`.
        reconstruct: Fit the pruned model block by block to the dense one before training: True, or a mapping with any
            of ``dense`` (default: the weights as `WeightPruning` finds them in this fit), ``calibration`` (batches as
            the model takes them; default: samples drawn from the training data, whose order is untouched, with which
            the training step calls the model) and the options of
            `lightning_prune.perp.reconstruct`, such as ``{"train": "all"}``; ``num_samples`` are over all ranks,
            ``adapter`` and its options default to this one's. Not done again when a checkpoint is resumed.
        distill_from: A dense source model whose logits to stay close to: a causal language model, or where to load
            one from (folder, hub id, ``.gguf`` file). It takes part in training steps alone, and in no checkpoint.
        distill_weight: Share of the divergence in the loss, above 0 and at most 1.
        temperature: Of both distributions in the divergence.
        seed: Of the adapters' initial values; the Trainer's random states are left alone.
        attribute: Name of the module's attribute that holds the model: one of transformers, or any other module.

    Attributes:
        reconstruction: The errors of the blocks before and after `reconstruct`; None without it.

    Raises:
        TypeError, ValueError: from the constructor for values that no model could take; at setup, before anything
            changes, for those that do not fit this one; at train start if nothing is pruned.

    Example::

        trainer = L.Trainer(callbacks=[WeightPruning(score="kfac", sparsity=0.5), PERPRetraining()])
        trainer.fit(module, datamodule)
        module.save_pretrained("pruned")
    """

    def __init__(
        self,
        adapter: str | None = "mask_lora",
        train: Sequence[str] = ("bias", "norm"),
        merge: bool = True,
        masks: Mapping[str, Tensor] | None = None,
        r: int = 16,
        lora_alpha: float | None = None,
        target_modules: list[str] | str | None = None,
        lora_options: dict[str, Any] | None = None,
        adapt_head: bool = False,
        reconstruct: bool | dict[str, Any] = False,
        distill_from: str | nn.Module | None = None,
        distill_weight: float = 0.5,
        temperature: float = 1.0,
        seed: int = 0,
        attribute: str = "model",
    ) -> None:
        super().__init__()
        check_bool("merge", merge)
        check_bool("adapt_head", adapt_head)
        check_adapter(adapter)
        self.train = check_parts(train)
        self.options: dict[str, Any] = {}
        if adapter is not None:
            named = {"lora_alpha": lora_alpha, "target_modules": target_modules}
            self.options = {**(lora_options or {}), "r": r, **{k: v for k, v in named.items() if v is not None}}
        elif lora_options or target_modules or lora_alpha is not None:
            raise ValueError("adapter=None has no use for lora_alpha, target_modules and lora_options; leave them out")
        elif not self.train:
            raise ValueError("adapter=None with an empty train leaves nothing to train; name a part, such as 'norm'")
        check_options(adapter, self.options)
        if adapter == "lora" and merge:
            raise ValueError(
                "adapter='lora' cannot be merged, since its product is dense: pass merge=False, or adapter='mask_lora'"
            )
        if adapt_head and adapter is None:
            raise ValueError("adapt_head=True with adapter=None has no adapter to put on the head; remove one of them")
        self.adapter = adapter
        self.adapt_head = adapt_head
        self.merge = merge
        self.reconstruct = before_training(reconstruct, adapter, self.train, self.options)
        self.reconstruction: Reconstruction | None = None
        self.masks = masks
        self.distill_from = distill_from
        self.distill_weight = distill_weight
        self.temperature = temperature
        self._distillation = Distillation.of(distill_from, distill_weight, temperature)
        self.seed = seed
        self.attribute = attribute
        self._loaded_masks: Masks = {}
        self._module: weakref.ref[L.LightningModule] | None = None
        self._beside_pruner = False
        self._resumed = self._started = False
        self._left_on = False  # adapters that were trained before this fit
        self._waits = False  # for a model that shrinks first
        self._goes_on = False  # from a checkpoint of the time after
        self._unmerged: Mapping[str, Tensor] | None = None  # its base weights and adapters
        self._end: BeforeTeardown | None = None
        self._frozen: dict[Tensor, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: settings and loaded masks, nothing of a module or of a fit that runs."""
        return copied_state(self, _module=None, _started=False, _end=None, _distillation=None, _frozen={})

    # -- life of a fit -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the adapters on, before optimizers are made and before a checkpoint is loaded."""
        check_checkpoint_of(trainer)
        follow_checkpoints(trainer, self, lambda: self._states(trainer))
        if stage != "fit":
            return
        pruners = pruners_of(trainer)
        model = self._model(pl_module)
        found = find_retraining(model)
        check_strategy(trainer.strategy, pl_module, found is not None, self.reconstruct is not None, self.merge)
        callbacks = callbacks_of(trainer)
        if self in callbacks:
            check_order(callbacks, self)
        if self.reconstruct is not None:
            check_dense_is_known(self.reconstruct, pruners)
        for pruner in pruners:
            check_pruner(pruner, self)
        self._beside_pruner, self._unmerged = bool(pruners), None
        if self._module is None or self._module() is not pl_module:
            self._loaded_masks = {}  # another module's, such as one that was tested
        self._resumed = self._started = self._goes_on = False
        self._left_on = found is not None
        self._waits = neighbor(trainer, PruningAwarePretraining) is not None
        if self._waits:
            check_after_shrinking(trainer, pruners, self, self._left_on)
            self._module = None
            return
        self._distillation = self._distillation or Distillation.of(
            self.distill_from, self.distill_weight, self.temperature
        )
        if self._distillation is not None:
            self._distillation.load(pl_module)
        if found is None:
            self._put_on(pruners, pl_module)
        else:  # left on by an interrupted fit, or by merge=False
            options, later, _ = self._asked(pruners, pl_module)
            check_left_on(model, self._record(options), self.masks or {}, later, self.adapt_head)
        for pruner in pruners:
            self._rename_masks(pruner, pl_module)
            pruner.wrap_updates(partial(self._settled, trainer, pl_module))
            if self.reconstruct is not None and self.reconstruct.dense is None:
                pruner.keep_dense_weights()
        self._module = weakref.ref(pl_module)
        if is_kind(trainer.strategy, "ModelParallelStrategy"):
            self._shard_plain_model(pl_module)

    def _put_on(self, pruners: Sequence[WeightPruning], module: L.LightningModule) -> None:
        """Freeze the model and put the adapters on."""
        model = self._model(module)
        options, pruned_later, targets = self._asked(pruners, module)
        chosen = self.adapter is None or self.options.get("target_modules") is not None
        if pruners and not chosen and (left := without_adapter(list(targets.values()))):
            rank_zero_warn(f"PERPRetraining: {left}")
        told = any(pruner.settings.keeps_zeros for pruner in pruners)  # of all that nobody holds, at fit start
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            wrapped = attach(
                model, self.adapter, self.masks, self.train, options, pruned_later, self.adapt_head, told, targets
            )
        try:  # the module may have more of the weights than the model has
            check_unshared(module, {name: layer.base_weight for name, layer in sparse_layers(wrapped)})
        except ValueError as error:
            remove_adapters(wrapped)
            raise ValueError(
                f"{error}. Where {type(module).__name__} has a second attribute for a part of attribute="
                f"{self.attribute!r}, make that a property which returns the part, so that every weight has one name"
            ) from None
        setattr(module, self.attribute, wrapped)

    def _asked(
        self, pruners: Sequence[WeightPruning], module: L.LightningModule
    ) -> tuple[dict[str, Any], bool, dict[str, Target]]:
        """The options of the adapters, `pruned_later` of `attach`, and what pruners beside will prune of the model."""
        model, options = self._model(module), dict(self.options)
        targets = {name: target for pruner in pruners for name, target in self._targets_of(pruner, module)}
        if pruners and self.adapter is not None and options.get("target_modules") is None:
            names = [name.removeprefix(f"{self.attribute}.") for name in adaptable(targets.values())]
            options["target_modules"] = WholeNames(names if find_retraining(model) is None else map(plain_name, names))
            check_any_adapted(model, options["target_modules"])
        # Weights to be pruned at fit start, or to be loaded from a checkpoint, have no zeros yet; that one will be
        # loaded is not known before.
        return options, bool(pruners) or not (self.masks or _has_zeros(model)), targets

    def _record(self, options: dict[str, Any]) -> Retraining:
        """What `add_adapters` would remember, as far as it is asked for."""
        return Retraining(self.adapter, self.train, options, (), frozenset())

    def _rename_masks(self, pruner: WeightPruning, module: L.LightningModule) -> None:
        actual = {self._plain(name): name for name in named_weights(module)}
        pruner.rename_masks(lambda name: actual.get(self._plain(name), name))

    # -- after a model has shrunk ------------------------------------------------------------------------------------

    def _begin_after_shrinking(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Put the adapters on while training runs; they take the place of the weights that are frozen now."""
        pruners = pruners_of(trainer)
        with without_wrapper(trainer, module):
            self._put_on(pruners, module)
            model = self._model(module)
            for _, layer in sparse_layers(model):
                layer.to(layer.base_weight.device)
            successors: dict[Tensor, tuple[Tensor, ...]] = {
                layer.base_weight: layer.matrices() for _, layer in sparse_layers(model)
            }
            put_in_place(list(with_inner(trainer.optimizers)), successors)
        for pruner in pruners:
            self._rename_masks(pruner, module)
        self._module, self._waits = weakref.ref(module), False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin once `PruningAwarePretraining` and `WeightPruning` in the same Trainer are done."""
        shrinker = neighbor(trainer, PruningAwarePretraining)
        if self._waits and shrinker is not None and shrinker.finished and all(p.finished for p in pruners_of(trainer)):
            self._begin_after_shrinking(trainer, pl_module)
            self._take_masks(trainer, pl_module)

    def _shard_plain_model(self, module: L.LightningModule) -> None:
        """Have ``configure_model`` find the transformers model: it stays after the merge, and names are as it knows."""
        original = module.configure_model

        @wraps(original)
        def configure_model() -> None:
            module.__dict__.pop("configure_model", None)
            model = self._model(module)
            plain = unwrapped(model)
            setattr(module, self.attribute, plain)
            try:
                original()
                if getattr(module, self.attribute) is not plain:
                    raise ValueError(
                        f"configure_model of {type(module).__name__} puts another module into attribute="
                        f"{self.attribute!r}, which has no adapters: make the model in __init__, and call fully_shard "
                        "on it in configure_model"
                    )
            finally:
                setattr(module, self.attribute, model)
            if self.adapter is not None:
                # From here on no rank holds whole masks. A module of bfloat16 is converted only after this hook, and
                # FSDP2 would go on gathering in the dtype that it saw first.
                set_masks(model, adapter_masks(model), gather=False)

        module.__dict__["configure_model"] = configure_model

    @contextmanager
    def _settled(self, trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
        """Around new masks: what adapters have learned goes into the weights first, and they begin anew after."""
        if self.adapter is None:
            yield
            return
        model = self._model(module)
        if trainer.global_step or self._left_on:
            # An average of factors from before and after would be of neither: it begins anew from the same ones.
            for part in (model, *self._averages(trainer)):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(self.seed + trainer.global_step)
                    fold(part)
            _forget(trainer, (p for _, layer in sparse_layers(model) for p in layer.matrices()))
        elif self.options.get("init_lora_weights", True) is False:  # adapters that change the model from the start
            yield
            self._set_masks(trainer, model)
            return
        with _switched_off(layer for _, layer in sparse_layers(model)):
            yield
        self._set_masks(trainer, model)

    def _set_masks(self, trainer: L.Trainer, model: nn.Module) -> None:
        set_masks(model, self._masks_for(trainer))
        copy_masks(model, self._averages(trainer))  # validations and the fit's end take theirs with the weights

    def _averages(self, trainer: L.Trainer) -> list[nn.Module]:
        """The adapted models of averages, which have adapters too (see `check_order`)."""
        return [self._model(average) for average in averages(trainer)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the adapters merged at the end, where it may not be reached by training."""
        self._end = BeforeTeardown(trainer.strategy, partial(self._finish, trainer, pl_module))
        shrinker = neighbor(trainer, PruningAwarePretraining)
        if self._goes_on and shrinker is not None:  # a checkpoint of the time after; optimizer states come next
            shrinker.begin(trainer, pl_module)
            self._begin_after_shrinking(trainer, pl_module)
            check_adapters(self._unmerged or {}, pl_module)
            pl_module.load_state_dict(self._unmerged or {}, strict=False)
            self._unmerged = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the masks: every callback has pruned by now, and a checkpoint is restored."""
        if not self._waits:
            self._take_masks(trainer, pl_module)

    def _take_masks(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        reshard(pl_module)
        model = self._model(pl_module)
        self._started = True
        if self.reconstruct is not None and not self._resumed:
            self._reconstruct(trainer, model)
        pruned = ""
        if self.adapter is not None:
            self._set_masks(trainer, model)
            sparsity = mask_sparsity(adapter_masks(model))
            if not sparsity and all(trainer.global_step >= pruner.schedule.end for pruner in pruners_of(trainer)):
                setattr(pl_module, self.attribute, remove_adapters(model))
                raise ValueError(
                    "no weight with an adapter is pruned, so there is no sparsity to keep: load a pruned model, put "
                    "WeightPruning(...) into the same Trainer, or pass masks"
                )
            pruned = f", on weights of which {sparsity:.2%} are pruned"
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rank_zero_info(
            f"PERPRetraining: {trained:,} parameters are trained, {trainable_share(model):.3%} of the model's "
            f"({', '.join([self.adapter or 'no adapter', *self.train])}{pruned})"
        )
        self._frozen = self._pruned_weights(trainer, model)
        if self._distillation is not None:
            self._distillation.begin(pl_module, model)

    def _pruned_weights(self, trainer: L.Trainer, model: nn.Module) -> dict[Tensor, str]:
        """The weights that nothing but a merge may change, and their names; those that a pruner holds aside."""
        if self.adapter is not None:
            return {layer.base_weight: name for name, layer in sparse_layers(model)}
        targets = {} if pruners_of(trainer) else parameters_of(find_targets(model, frozen=True, parametrized=False))
        return {p: name for name, p in targets.items() if not p.requires_grad and has_pruned(p, None)}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Refuse a step that would train what is frozen, whoever has unfrozen it."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter in self._frozen:
                    raise ValueError(
                        f"{self._frozen[parameter]!r} is pruned and was frozen by PERPRetraining, but has a gradient, "
                        f"and this step of {type(optimizer).__name__} would fill its zeros: another callback, such as "
                        "BackboneFinetuning, or a hook of the module has made it trainable since. Leave that out; name "
                        "what else is to be trained in train, or train the weights themselves under masks "
                        "(WeightPruning without PERPRetraining)"
                    )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show how far the model is from the source that it is distilled from."""
        if self._distillation is not None:
            self._distillation.log(pl_module)

    def _reconstruct(self, trainer: L.Trainer, model: nn.Module) -> None:
        assert self.reconstruct is not None
        masks, prefix = self._masks_for(trainer), f"{self.attribute}."
        masks = None if masks is None else {plain_name(name): mask for name, mask in masks.items()}
        with adapters_aside(model) as plain:
            self.reconstruction = done = reconstruct_before_training(
                trainer,
                plain,
                self.reconstruct,
                masks,
                pruners_of(trainer),
                lambda name: self._plain(name).removeprefix(prefix),
                self.seed,
            )
        changed = sum(block.changed for block in done.blocks)
        rank_zero_info(
            f"PERPRetraining: reconstructed {changed} of {len(done.blocks)} blocks; their mean error fell from "
            f"{done.before:.4g} to {done.after:.4g}"
        )

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the adapters, and give the module its transformers model back."""
        self._let_go(trainer, pl_module)
        if self._waits:
            rank_zero_warn(
                "PERPRetraining: training ended before the model had its size and its masks, so no adapters were "
                "trained: let PruningAwarePretraining(end=...) and the schedule of WeightPruning end earlier"
            )
            return
        reshard(pl_module)
        if not self._started and self.adapter is not None:  # a fit that had nothing left to train
            self._set_masks(trainer, self._model(pl_module))
        if not self.merge:
            return
        setattr(pl_module, self.attribute, merge(self._model(pl_module)))
        for pruner in pruners_of(trainer):
            pruner.rename_masks(self._plain)
        self._module, self._loaded_masks = None, {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Let go of the pruner; the adapters stay on."""
        self._let_go(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go where there was neither an end nor an exception, such as after a Tuner."""
        self._let_go(trainer, pl_module)

    def _let_go(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Give back what was wrapped for the time of a fit."""
        self._frozen = {}
        if self._end is not None:
            self._end.remove()
            self._end = None
        if self._distillation is not None:
            self._distillation.end()
        module.__dict__.pop("configure_model", None)
        for pruner in pruners_of(trainer):
            pruner.wrap_updates(None)
            pruner.take_dense_weights()

    # -- the model in the module -------------------------------------------------------------------------------------

    def _model(self, module: nn.Module) -> nn.Module:
        model = getattr(module, self.attribute, None)
        if not isinstance(model, nn.Module):
            children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
            raise ValueError(
                f"attribute={self.attribute!r}: {type(module).__name__} has no such module; name the attribute that "
                f"holds the model, of {', '.join(map(repr, children)) or 'none'}. Adapters need one that is built in "
                "__init__; if these are the model's layers, put them into one module (self.model = ...), whose place "
                "the adapted model can take"
            )
        return model

    def _plain(self, name: str) -> str:
        """A parameter's name in the LightningModule as it is without adapters."""
        prefix = f"{self.attribute}."
        return prefix + plain_name(name.removeprefix(prefix)) if name.startswith(prefix) else name

    def _targets_of(self, pruner: WeightPruning, module: L.LightningModule) -> Iterator[tuple[str, Target]]:
        """What the pruner will prune of the transformers model, by the names that this has for it."""
        prefix = f"{self.attribute}."
        # Where nothing is trained yet, it says nothing of what is to be pruned once adapters are.
        frozen = not any(parameter.requires_grad for parameter in self._model(module).parameters())
        targets, ignore, needs = pruner.settings.targets, pruner.settings.ignore, needs_of(pruner.settings)
        pruned = parameters_of(select_layers(module, targets, ignore, frozen=frozen, **needs).targets)
        for target in find_targets(module, targets, ignore, frozen):  # as layers, also where scores see projections
            if target.parameter in pruned and target.name.startswith(prefix):
                yield target.name.removeprefix(prefix), target

    def _masks_for(self, trainer: L.Trainer) -> Mapping[str, Tensor] | None:
        """Masks of the pruner, of a checkpoint, or the user's; None for the weights' zeros."""
        if pruners := pruners_of(trainer):
            prefix = f"{self.attribute}."
            return {name.removeprefix(prefix): mask for pruner in pruners for name, mask in pruner.masks.items()}
        return self._loaded_masks or self.masks

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The settings, how each layer is merged, and the masks packed to bits where no `WeightPruning` saves them.

        What is written also has the base weights and adapters, see `lightning_prune.checkpoints.states.save_merged`.
        """
        module = None if self._module is None else self._module()
        state: dict[str, Any] = {"version": _STATE_VERSION, "callback": "PERPRetraining", "masks": {}, "layers": {}}
        state["attribute"] = self.attribute
        state["settings"] = settings_of(self._record(self.options))
        state["begun"], state["started"] = not self._waits, self._started
        if module is not None and self.adapter is not None:
            model = self._model(module)
            state["layers"] = {name: layer.combining() for name, layer in sparse_layers(model)}
            if not self._beside_pruner:
                state["masks"] = pack_masks(adapter_masks(model))
            elif self.adapt_head:  # which the pruner has no mask of
                heads = {layer.weight_name(name) for name, layer in sparse_layers(model) if layer.stays_dense}
                state["masks"] = pack_masks({n: mask for n, mask in adapter_masks(model).items() if n in heads})
        return state

    def _states(self, trainer: L.Trainer) -> dict[str, dict[str, Any]]:
        """This callback's state and that of the pruner beside, as a full checkpoint has them."""
        return {callback.state_key: callback.state_dict() for callback in (self, *pruners_of(trainer))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint, which become the adapters' at train start.

        Raises:
            ValueError: an unknown version, adapters made with other settings, or a damaged mask.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(f"the checkpoint's PERPRetraining state has version {version!r}, not {_STATE_VERSION}")
        check_same(state_dict["settings"], settings_of(self._record(self.options)), "the checkpoint's adapters were")
        module = None if self._module is None else self._module()
        if module is not None and self.adapter is not None:
            check_scalings(state_dict["layers"], self._model(module))
        self._loaded_masks = unpack_masks(state_dict["masks"])
        self._resumed = state_dict.get("started", True)
        if self._waits and state_dict.get("begun", True):
            self._goes_on, self._unmerged = True, state_dict.get(UNMERGED)


def _step(
    loss_fn: Callable[[nn.Module, Any], Any], parameters: WatchedParameters, model: nn.Module, batch: Any
) -> None:
    """Run the training step of a module; what it writes to parameters is put back later."""
    with parameters:
        loss_fn(model, batch)


def _has_zeros(model: nn.Module) -> bool:
    return any(
        has_pruned(weight, None)
        for weight in parameters_of(find_targets(model, frozen=True, parametrized=False)).values()
    )


@contextmanager
def _switched_off(layers: Iterable[SparseLayer]) -> Iterator[None]:
    """Run layers without their adapters, which have just begun and change nothing.

    So scores see the weight itself where a module multiplies with it (``F.linear(x, layer.weight)``).
    """
    layers = list(layers)
    trained = [(matrix, matrix.requires_grad) for layer in layers for matrix in layer.matrices()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for matrix, required in trained:  # PEFT would train what a user has frozen
            matrix.requires_grad_(required)


def _forget(trainer: L.Trainer, parameters: Iterable[Tensor]) -> None:
    """Clear gradients and optimizer states, which are those of values that are gone."""
    for parameter in parameters:
        parameter.grad = None
        for optimizer in with_inner(trainer.optimizers):
            optimizer.state.pop(parameter, None)


@dataclass(frozen=True)
class BeforeTraining:
    """A reconstruction that comes before training.

    Attributes:
        settings: How blocks are fitted.
        dense: The weights from before pruning, or a path; None: those that the pruner finds.
        calibration: Batches; None: samples of the training data.
    """

    settings: ReconstructSettings
    dense: Any = None
    calibration: Any = None


def before_training(
    given: bool | Mapping[str, Any], adapter: str | None, train: Sequence[str], lora_options: Mapping[str, Any]
) -> BeforeTraining | None:
    """Return a reconstruction from what a user gives, complete and checked; None for none.

    Raises:
        TypeError, ValueError: an unknown option, or a value that no model could take.
    """
    if given is False:
        return None
    if given is not True and not isinstance(given, Mapping):
        raise TypeError(f"reconstruct={given!r} must be True, False, or a mapping such as {{'steps': 100}}")
    options = {} if given is True else dict(given)
    dense, calibration = options.pop("dense", None), options.pop("calibration", None)
    if options.get("train") != "all":
        options = {"adapter": adapter, "train": [part for part in train if part in ("bias", "norm")], **options}
        if options["adapter"] == adapter:
            options = {**{k: v for k, v in lora_options.items() if k != "target_modules"}, **options}
    return BeforeTraining(ReconstructSettings.of(options), dense, calibration)


def check_dense_is_known(before: BeforeTraining, pruners: Sequence[WeightPruning]) -> None:
    """Dense weights come from the user, or from pruners that have them when they prune.

    Raises:
        ValueError: neither will have them.
        CheckpointError: the user's cannot be read.
    """
    if isinstance(before.dense, (str, Path)):
        open_checkpoint(before.dense, argument="dense")  # before anybody prunes
    if before.dense is not None:
        return
    if not pruners:
        raise ValueError(
            "reconstruct needs the weights from before pruning: pass reconstruct={'dense': FOLDER} (or a model, or "
            "weights by name), or prune in the same Trainer with WeightPruning(...)"
        )
    if any(pruner.settings.keeps_zeros for pruner in pruners):
        raise ValueError(
            "WeightPruning(score='keep') prunes nothing, so it never has the dense weights that reconstruct needs: "
            "pass reconstruct={'dense': FOLDER}"
        )


def reconstruct_before_training(
    trainer: L.Trainer,
    model: nn.Module,
    before: BeforeTraining,
    masks: Mapping[str, Tensor] | None,
    pruners: Sequence[WeightPruning],
    rename: Callable[[str], str],
    seed: int,
) -> Reconstruction:
    """Reconstruct the plain transformers model of a module that is about to train.

    Args:
        trainer: The Trainer.
        model: The transformers model, without adapters.
        before: What is to be done.
        masks: By parameter name; None for the weights' zeros.
        pruners: The `WeightPruning` callbacks beside, which may have the dense weights.
        rename: From their names of parameters to those of the model.
        seed: See `reconstruct`; also of the draw of calibration samples.

    Raises:
        ValueError: see `reconstruct`; or the pruner has not pruned in this fit.
    """
    dense: Any = before.dense
    if isinstance(dense, (str, Path)):
        dense = open_checkpoint(dense, argument="dense")
    taken = {rename(n): weight for pruner in pruners for n, weight in pruner.take_dense_weights().items()}
    if dense is None and not taken:
        raise ValueError(
            "the module was pruned before this fit, so the weights from before are not known to reconstruct: pass "
            "reconstruct={'dense': FOLDER}, or reconstruct=False for another fit"
        )
    module, loss_fn = trainer.lightning_module, None
    with ExitStack() as stack:
        if before.calibration is None and module.automatic_optimization:
            # What training reads is for the training step, which alone may know how to call the model.
            stack.enter_context(undistilled(module))
            parameters = stack.enter_context(no_trace(trainer, module))
            stack.enter_context(quiet_model(module, freeze=False))
            loss_fn = partial(_step, calibration_loss(module), parameters)
        data = stack.enter_context(CalibrationData.of(trainer, before.calibration, before.settings.num_samples, seed))
        return reconstruct(
            model,
            data,
            taken if dense is None else dense,
            masks,
            seed=seed,
            forward_context=trainer.precision_plugin.train_step_context,
            ranks=ranks_of(trainer),
            loss_fn=loss_fn,
            **{**before.settings.options(), "num_samples": data.local_samples},
        )
