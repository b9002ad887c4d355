"""Read the checkpoint that a Trainer is about to load, before anything in it is unpickled."""

from __future__ import annotations

import lightning as L

from lightning_prune.checkpoints import check_loads_safely


def check_checkpoint_of(trainer: L.Trainer) -> None:
    """Refuse a checkpoint that is damaged, or that could run code; call it in ``setup``, which comes before loading.

    Raises:
        CheckpointError: see `check_loads_safely`.
    """
    if trainer.ckpt_path:
        check_loads_safely(trainer.ckpt_path)


class CheckpointCheck(L.Callback):
    """Calls `check_checkpoint_of`, for modules and callbacks that do not."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See `check_checkpoint_of`."""
        check_checkpoint_of(trainer)
