"""Read the checkpoint that a Trainer is about to load, before anything in it is unpickled."""

from __future__ import annotations

from functools import wraps
from typing import Any

import lightning as L

from lightning_prune.checkpoints import check_loads_safely


def check_checkpoint_of(trainer: L.Trainer) -> None:
    """Have a Trainer's strategy refuse checkpoints that are damaged, or could run code; call it in ``setup``.

    That hook comes before anything is loaded, but the Trainer does not say yet what will be: the strategy's
    ``load_checkpoint`` is wrapped, once. It then raises what `check_loads_safely` does.
    """
    original: Any = trainer.strategy.load_checkpoint
    if getattr(original, "reads_safely", False):
        return

    @wraps(original)
    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        check_loads_safely(checkpoint_path)
        return original(checkpoint_path, *args, **kwargs)

    load_checkpoint.reads_safely = True  # type: ignore[attr-defined]
    trainer.strategy.__dict__["load_checkpoint"] = load_checkpoint


class CheckpointCheck(L.Callback):
    """Calls `check_checkpoint_of`, for modules and callbacks that do not."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See `check_checkpoint_of`."""
        check_checkpoint_of(trainer)
