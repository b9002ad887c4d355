"""`PERPRetraining`: train adapters on a pruned model in a Trainer, and merge them when it is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_prune.callbacks.weight_pruning import WeightPruning
from lightning_prune.masks import Masks, mask_sparsity, named_weights, pack_masks, unpack_masks
from lightning_prune.perp.adapters import adapter_masks, attach, merge, remove_adapters, trainable_share
from lightning_prune.perp.layers import plain_name, set_masks
from lightning_prune.perp.model import Retraining, find_retraining
from lightning_prune.perp.options import check_adapter, check_options
from lightning_prune.perp.selection import check_parts
from lightning_prune.schedules import OneShot
from lightning_prune.sharding import has_sharded_parameters
from lightning_prune.targets import find_targets

_STATE_VERSION = 1
# What adapters must have been made with to be trained on: otherwise the same tensors mean something else.
_SAME = ("adapter", "train", "r", "lora_alpha", "use_rslora")


class PERPRetraining(L.Callback):
    """Retrain a pruned model through adapters and a few of its own parameters; merge at the end (PERP).

    The adapters go on in ``setup``, so the module's ``configure_optimizers`` finds them; it has to leave out what
    requires no gradient, or give it to an optimizer that passes over parameters without one. With `WeightPruning` in
    the same Trainer, in either order, the model is pruned at fit start and the adapters take its masks; without it the
    masks are the exact zeros of a model pruned before, or `masks`. At fit end the adapters are merged, and the
    module's model is the plain transformers model again, with every pruned weight at +0.0.

    Only adapters and the parts in `train` require gradients, so only they have gradients and optimizer states.
    While training, checkpoints hold the base weights and the adapters under PEFT's names; a Trainer with this callback
    resumes from them to the bit (start from the pruned model, or name `target_modules`, if not every decoder layer has
    an adapter). An interrupted fit leaves the adapters on: fit again, or call `merge`.

    Under DDP every rank builds the same adapters from `seed`, gradients of what is trained alone are averaged, and
    every rank merges the same numbers. Strategies that shard parameters (FSDP, FSDP2, DeepSpeed) are refused.

    Args:
        adapter: ``"mask_lora"``, ``"scale_lora"``, ``"lora_prune"``, ``"lora"`` (needs ``merge=False``), or None; see
            `lightning_prune.perp.add_adapters`.
        train: Any of ``"bias"``, ``"norm"``, ``"head"`` and ``"embedding"``.
        merge: Merge at fit end.
        masks: Bool masks by the transformers model's parameter names; default those of `WeightPruning`, else zeros.
        r: Rank of the adapters.
        lora_alpha: Scaling times rank; default ``2 * r``. None for scale_lora, which has none.
        target_modules: Layers with an adapter, as in PEFT; default every pruned one, or the targets of
            `WeightPruning`.
        lora_options: Further options of `add_adapters`, such as ``{"use_rslora": True}``.
        seed: Of the adapters' initial values; the Trainer's random states are left alone.
        attribute: Name of the module's attribute that holds the transformers model.

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
        seed: int = 0,
        attribute: str = "model",
    ) -> None:
        super().__init__()
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
        self.adapter = adapter
        self.merge = merge
        self.masks = masks
        self.seed = seed
        self.attribute = attribute
        self._loaded_masks: Masks = {}
        self._module: weakref.ref[L.LightningModule] | None = None
        self._beside_pruner = False

    # -- life of a fit -----------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the adapters on, before optimizers are made and before a checkpoint is loaded."""
        if stage != "fit":
            return
        pruner = _pruner_of(trainer)
        self._check(trainer, pl_module, pruner)
        model = self._model(pl_module)
        found = find_retraining(model)
        if found is None:
            options = dict(self.options)
            if pruner is not None and self.adapter is not None and options.get("target_modules") is None:
                options["target_modules"] = self._targets_of(pruner, pl_module)
            # Weights to be pruned at fit start, or to be loaded from a checkpoint, have no zeros yet; that one will be
            # loaded is not known in this hook.
            pruned_later = pruner is not None or not (self.masks or _has_zeros(model))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                wrapped = attach(model, self.adapter, self.masks, self.train, options, pruned_later=pruned_later)
            setattr(pl_module, self.attribute, wrapped)
        else:  # left on by an interrupted fit, or by merge=False
            _check_same(_settings(found), _settings_of(self), "the module's adapters were")
        if pruner is not None:
            actual = {self._plain(name): name for name in named_weights(pl_module)}
            _rename_masks(pruner, lambda name: actual.get(self._plain(name), name))
        self._module, self._beside_pruner = weakref.ref(pl_module), pruner is not None

    def _check(self, trainer: L.Trainer, module: L.LightningModule, pruner: WeightPruning | None) -> None:
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)) or (
            has_sharded_parameters(module)
        ):
            raise ValueError(
                f"PERPRetraining does not support {type(trainer.strategy).__name__}: adapters of sharded weights "
                "(DTensor) are not there yet; use one device or strategy='ddp'"
            )
        if pruner is None:
            return
        if self.masks is not None:
            raise ValueError("masks are those of the WeightPruning callback in the same Trainer; leave masks out")
        if not isinstance(pruner.schedule, OneShot) or pruner.schedule.start:
            raise ValueError(
                f"WeightPruning(schedule={pruner.schedule!r}) prunes while the adapters train, which would leave them "
                "trained for weights that are gone; use schedule=None, and fit once for each sparsity"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the masks: every callback has pruned by now, and a checkpoint is restored."""
        model = self._model(pl_module)
        pruned = ""
        if self.adapter is not None:
            set_masks(model, self._masks_for(trainer))
            sparsity = mask_sparsity(adapter_masks(model))
            if not sparsity:
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

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge the adapters, and give the module its transformers model back."""
        if not self.merge:
            return
        setattr(pl_module, self.attribute, merge(self._model(pl_module)))
        pruner = _pruner_of(trainer)
        if pruner is not None:
            _rename_masks(pruner, self._plain)
        self._module, self._loaded_masks = None, {}

    # -- the model in the module -------------------------------------------------------------------------------------

    def _model(self, module: L.LightningModule) -> nn.Module:
        model = getattr(module, self.attribute, None)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"attribute={self.attribute!r}: {type(module).__name__} has no such module; name the attribute that "
                "holds the transformers model"
            )
        return model

    def _plain(self, name: str) -> str:
        """A parameter's name in the LightningModule as it is without adapters."""
        prefix = f"{self.attribute}."
        return prefix + plain_name(name.removeprefix(prefix)) if name.startswith(prefix) else name

    def _targets_of(self, pruner: WeightPruning, module: L.LightningModule) -> list[str]:
        """Modules, as the transformers model names them, that the pruner will prune."""
        prefix = f"{self.attribute}."
        names = [t.name for t in find_targets(module, pruner.targets, pruner.ignore) if t.kind.name != "Conv2d"]
        return [n.removeprefix(prefix).removesuffix(".weight") for n in names if n.startswith(prefix)]

    def _masks_for(self, trainer: L.Trainer) -> Mapping[str, Tensor] | None:
        """Masks of the pruner, of a checkpoint, or the user's; None for the weights' zeros."""
        pruner = _pruner_of(trainer)
        if pruner is not None:
            prefix = f"{self.attribute}."
            return {name.removeprefix(prefix): mask for name, mask in pruner.masks.items()}
        return self._loaded_masks or self.masks

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The settings, and the masks packed to bits where no `WeightPruning` saves them."""
        module = None if self._module is None else self._module()
        state: dict[str, Any] = {"version": _STATE_VERSION, "settings": _settings_of(self), "masks": {}}
        if module is not None and self.adapter is not None and not self._beside_pruner:
            state["masks"] = pack_masks(adapter_masks(self._model(module)))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the masks of a checkpoint, which become the adapters' at train start.

        Raises:
            ValueError: an unknown version, adapters made with other settings, or a damaged mask.
        """
        version = state_dict.get("version")
        if version != _STATE_VERSION:
            raise ValueError(f"the checkpoint's PERPRetraining state has version {version!r}, not {_STATE_VERSION}")
        _check_same(state_dict["settings"], _settings_of(self), "the checkpoint's adapters were")
        self._loaded_masks = unpack_masks(state_dict["masks"])


def _settings_of(callback: PERPRetraining) -> dict[str, Any]:
    return _settings(Retraining(callback.adapter, callback.train, callback.options, (), frozenset(), frozenset()))


def _settings(record: Retraining) -> dict[str, Any]:
    """What has to agree for adapters to be trained on, in plain values."""
    options = record.options
    rank = options.get("r") if record.adapter is not None else None
    alpha = None if rank is None or record.adapter == "scale_lora" else options.get("lora_alpha", 2 * rank)
    values = (record.adapter, list(record.train), rank, alpha, bool(options.get("use_rslora", False)))
    return dict(zip(_SAME, values, strict=True))


def _check_same(found: Mapping[str, Any], mine: Mapping[str, Any], whose: str) -> None:
    for name in _SAME:
        if found.get(name) != mine[name]:
            raise ValueError(
                f"{whose} made with {name}={found.get(name)!r}, but this PERPRetraining has {mine[name]!r}; use the "
                "same setting, or merge what is there first"
            )


def _has_zeros(model: nn.Module) -> bool:
    return any(not bool(t.matrix().all()) for t in find_targets(model))


def _pruner_of(trainer: L.Trainer) -> WeightPruning | None:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, WeightPruning)), None)


def _rename_masks(pruner: WeightPruning, rename: Callable[[str], str]) -> None:
    """Call the pruner's masks as the parameters are called now: PEFT puts names in between, and takes them away."""
    pruner._masks = {rename(name): mask for name, mask in pruner._masks.items()}
    if pruner._enforcer is not None:
        pruner._enforcer._weights = {rename(name): weight for name, weight in pruner._enforcer._weights.items()}
