"""The end of ``lightning-prune fit``: no run without a checkpoint and a measurement, and a word on what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only


def finish_fit(trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None) -> None:
    """Validate and save what was trained where the Trainer has done neither, and print how to go on.

    A schedule of validation or checkpoints by batches may name a batch that a short run never reaches. Nothing is done
    that the Trainer was told to leave out (``limit_val_batches=0``, ``enable_checkpointing=False``), and no validation
    is added on several processes, or to a module that has no validation step or no data for it.
    """
    if getattr(trainer, "fast_dev_run", False):
        return
    path = _checkpoint_of(trainer)  # before a validation, which would be a run of its own
    measured = any(name.startswith("val_") for name in trainer.callback_metrics)
    if not measured and trainer.enable_validation and trainer.world_size == 1:
        trainer.validate(module, datamodule=datamodule)
    if path is not None:
        _say(path)


def _checkpoint_of(trainer: L.Trainer) -> Path | None:
    """The newest checkpoint of the run, which is written now if there is none yet; None where none is wanted."""
    keeper = trainer.checkpoint_callback
    if keeper is None:
        return None
    for name in ("last_model_path", "best_model_path"):
        if path := getattr(keeper, name, ""):
            return Path(path)
    folder = getattr(keeper, "dirpath", None) or trainer.default_root_dir
    path = Path(folder, f"step={trainer.global_step}.ckpt")
    trainer.save_checkpoint(path)
    return path


@rank_zero_only
def _say(path: Path) -> None:
    name = shlex.quote(str(path))
    print(f"Checkpoint: {path}\nA plain transformers folder of it: lightning-prune export {name} model")
    print(f"Perplexity on a text of yours: lightning-prune evaluate {name} --text FILE")
