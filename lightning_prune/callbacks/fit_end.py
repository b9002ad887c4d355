"""The end of ``lightning-prune fit``: no run without a checkpoint and a measurement, and a word on what comes next."""

from __future__ import annotations

import shlex
from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from safetensors import SafetensorError

from lightning_prune.checkpoints.export import check_apart
from lightning_prune.errors import first_line
from lightning_prune.naming import has_class
from lightning_prune.safety import expanded
from lightning_prune.structure.folders import check_replaceable


def check_saving(module: L.LightningModule, folder: str | None) -> None:
    """Refuse a folder for `finish_fit` before training starts.

    Raises:
        ValueError: the module has no ``save_pretrained``; the folder holds other things than a model, or the model that
            training begins with.
    """
    if folder is None:
        return
    if not callable(getattr(module, "save_pretrained", None)):
        raise ValueError(
            f"save_pretrained={folder!r}: {type(module).__name__} has no method save_pretrained(folder); train a "
            "CausalLM, or write one that saves your model"
        )
    target, source = expanded(folder, "save_pretrained").resolve(), module.hparams.get("model")
    if isinstance(source, str) and (here := expanded(source, "model")).exists():  # no hub id
        check_apart(here, target)
    check_replaceable(target, overwrite=True, keep=True)


def finish_fit(
    trainer: L.Trainer, module: L.LightningModule, datamodule: L.LightningDataModule | None, folder: str | None = None
) -> None:
    """Validate and save what was trained where the Trainer has done neither, and print how to go on.

    With `folder` the module is also saved there as a transformers folder.

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
    if folder is not None:
        try:
            module.save_pretrained(expanded(folder, "save_pretrained"))  # type: ignore[operator]  # on every rank
        except (OSError, SafetensorError) as error:
            kept = "" if path is None else f"; what was trained is in the checkpoint {path}"
            raise OSError(f"save_pretrained={folder!r} cannot be written: {first_line(error)}{kept}") from error
    _say(path, folder, has_class(module, "CausalLM"))


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
def _say(path: Path | None, folder: str | None, language_model: bool) -> None:
    if path is not None:
        print(f"Checkpoint: {path}")
    if not language_model:  # whose checkpoints alone say how to build the model
        if folder is not None:
            print(f"Saved by save_pretrained: {folder}")
        if path is not None:
            print(f"What is zero in it: lightning-prune inspect {shlex.quote(str(path))}")
        return
    if folder is not None:
        print(f"A plain transformers folder of it: {folder}")
    elif path is not None:
        print(f"A plain transformers folder of it: lightning-prune export {shlex.quote(str(path))} model")
    if folder or path:
        print(f"Perplexity on a text of yours: lightning-prune evaluate {shlex.quote(str(folder or path))} --text FILE")
