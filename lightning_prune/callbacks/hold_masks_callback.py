"""Keep a model pruned while transformers' ``Trainer`` trains it; needs no Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_prune.checkpoints.mask_files import load_masks, save_masks
from lightning_prune.pruning.holding import MaskHold, hold_masks
from lightning_prune.pruning.masks import PackedMasks, check_masks, follow_names, masks_from_zeros, masks_hold
from lightning_prune.pruning.targets import find_targets
from lightning_prune.sharding import joins

MASK_FILE = "masks.safetensors"


class HoldMasksCallback(TrainerCallback):  # type: ignore[misc]
    """Keep pruned weights at zero in transformers' ``Trainer``, and in those that are made of it, such as TRL's.

    Holds from the first step to the end of ``train()``, see `lightning_prune.hold_masks`. Every checkpoint has the
    masks beside the weights, as ``masks.safetensors``, and ``train(resume_from_checkpoint=...)`` takes them from there.
    Works on one device and under DDP; with FSDP2 (``fsdp_config={"version": 2}``) masks are shards as the weights are.

    Args:
        masks: Bool masks by the model's parameter names, True = kept, as `prune` returns them; a file of
            `save_masks`; or None for the exact zeros of the model's linear layers when training starts.

    Attributes:
        hold: The hold of a training that runs or has ended, whose `update` takes other masks; None before.

    Raises:
        TypeError: `masks` is something else.
        ValueError: when training starts, before any weight changes: see `hold_masks`; DeepSpeed, which keeps its own
            copies of the weights; or masks that are not those of the checkpoint that training is resumed from.
        CheckpointError: the file of masks is missing or damaged.

    Example::

        masks = prune(model, batches, sparsity=0.5)
        trainer = Trainer(model, args, train_dataset=data, callbacks=[HoldMasksCallback(masks)])
        trainer.train()
    """

    def __init__(self, masks: Mapping[str, Tensor] | str | Path | None = None) -> None:
        if not isinstance(masks, (Mapping, str, Path, type(None))):
            raise TypeError(
                f"masks={masks!r:.80} is a {type(masks).__name__}; pass the masks that prune returns, a file of "
                "save_masks, or None for the zeros of the model"
            )
        self._given = masks
        self.hold: MaskHold | None = None

    def __getattr__(self, name: str) -> NoReturn:
        """Say whose callback this is where a Trainer of Lightning asks for something of its own."""
        raise AttributeError(
            f"HoldMasksCallback has no {name!r}: it is a callback of transformers' Trainer. A Trainer of Lightning "
            "holds the zeros of its model by WeightPruning(score='keep')"
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **rest: Any,
    ) -> None:
        """Take the masks, once weights and optimizer states of a checkpoint are there, and hold the weights to them."""
        assert model is not None
        assert optimizer is not None
        if args.deepspeed is not None:
            raise ValueError(
                "HoldMasksCallback does not support deepspeed, whose optimizer steps copies of the weights; leave it "
                "out, or shard with FSDP2 (fsdp_config={'version': 2})"
            )
        if self.hold is not None:
            self.hold.remove()  # of an earlier training, which may have failed
        masks = self._resumed_masks(args, state, model) if state.global_step else self._masks(model)
        self.hold = hold_masks(model, masks, optimizer)

    def _masks(self, model: nn.Module) -> PackedMasks:
        if self._given is None:
            return masks_from_zeros(find_targets(model, frozen=True, parametrized=False))
        return follow_names(model, load_masks(self._given) if isinstance(self._given, (str, Path)) else self._given)

    def _resumed_masks(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> PackedMasks:
        """The masks of the checkpoint, which the Trainer does not name; or those given, if they are of its weights."""
        file = _folder(args, state) / MASK_FILE
        if file.is_file():
            masks, origin = follow_names(model, load_masks(file)), str(file)
        else:
            masks, origin = self._masks(model), "HoldMasksCallback(masks)"
        check_masks(model, masks)
        if not masks_hold(model, masks):
            raise ValueError(
                f"training is resumed at step {state.global_step}, but weights that {origin} prunes are not zero "
                f"there: pass masks=FOLDER/{MASK_FILE} of the checkpoint that is resumed from, and its parent as "
                f"output_dir={args.output_dir!r}"
            )
        return masks

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Write the masks beside the weights."""
        folder = _folder(args, state)
        if self.hold is None or not folder.is_dir():
            return
        if joins(rest["model"], args.should_save):
            save_masks(self.hold.masks, folder / MASK_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        """Hold the best checkpoint too, if it was loaded, and let go."""
        if self.hold is not None:
            self.hold.mask_weights()
            self.hold.remove()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The Trainer's checkpoint of a step."""
    return Path(args.output_dir or "", f"checkpoint-{state.global_step}")
