"""Run a LightningModule's own training step for its loss, and leave no trace of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_prune.callbacks.traces import WatchedParameters, unchanged
from lightning_prune.statistics import CalibrationError

_WHEN = (
    "The training step ran to calibrate a pruning when the fit starts, which is before the module's and other "
    "callbacks' on_fit_start, on_train_start, on_train_epoch_start and on_train_batch_start, and before "
    "trainer.train_dataloader and trainer.num_training_batches are known. If it needs what they make: make it in "
    "__init__ or setup, give the module calibration_loss(batch), pass loss_fn=f(module, batch) to the callback, or "
    "prune after the first step (schedule=OneShot(1))."
)


def calibration_loss(module: L.LightningModule) -> Callable[[nn.Module, Any], Tensor]:
    """The loss a LightningModule trains with, as ``loss_fn(module, batch)``.

    A module's own ``calibration_loss(batch)``, one loss a sample ``[B]``, is preferred where it has one; else
    ``training_step``.

    Raises:
        ValueError: the training step optimises by itself (manual optimization) or takes the data iterator.
    """
    own = getattr(module, "calibration_loss", None)
    if callable(own):
        return lambda _, batch: own(batch)
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} uses manual optimization, so its training_step would step the optimizers; pass "
            "loss_fn=f(module, batch) to the callback, or give the module a method calibration_loss(batch)"
        )
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise ValueError(
            "a training_step that takes dataloader_iter cannot be calibrated; pass loss_fn to the callback"
        )
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    extra = (0,) if len(positional) > 1 or "batch_idx" in parameters else ()

    def loss(_: nn.Module, batch: Any) -> Tensor:
        output = module.training_step(batch, *extra)
        found = output["loss"] if isinstance(output, dict) and "loss" in output else output
        if not isinstance(found, Tensor):
            raise ValueError(
                f"training_step returned {type(output).__name__}, not a loss; pass loss_fn to the callback"
            )
        return found

    return loss


@contextmanager
def no_trace(trainer: L.Trainer, module: L.LightningModule) -> Iterator[WatchedParameters]:
    """Undo what a training step does beside its loss.

    Logging goes nowhere; attributes (counters, containers however nested, tensors, arrays, random generators, objects
    of the user's classes), torchmetrics states, buffers, parameters and all random states (torch, CUDA, numpy, Python)
    are afterwards what they were. What cannot be put back (iterators, files, what threads share) is named in a warning.

    Yields what to run the loss in, so that parameters that it writes to are copied first.
    """
    isolated = isolate_rng()
    isolated.__enter__()
    loggers = trainer.loggers
    silenced = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    try:
        with unchanged({type(module).__name__: module}) as state:
            if state.unknown:
                named = ", ".join(f"{name} ({kind})" for name, kind in state.unknown.items())
                rank_zero_warn(f"what a training step draws from or writes to {named} in calibration cannot be undone")
            parameters = WatchedParameters(state.parameters)
            trainer.loggers = [DummyLogger() for _ in loggers]
            module.__dict__.update(silenced)
            try:
                yield parameters
            finally:
                for name in silenced:
                    module.__dict__.pop(name, None)
                trainer.loggers = loggers
                parameters.put_back()
    finally:
        isolated.__exit__(None, None, None)  # by hand, since after an error it restores nothing


def watched_loss(
    loss_fn: Callable[[nn.Module, Any], Tensor],
    parameters: WatchedParameters,
    pruned: Iterable[Tensor],
    before_hooks: bool,
) -> Callable[[nn.Module, Any], Tensor]:
    """A loss that may write to parameters, though not to those that are pruned.

    Args:
        loss_fn: The loss.
        parameters: From `no_trace`.
        pruned: The parameters that are being pruned.
        before_hooks: Whether the hooks of training have not run yet, to say so where the loss fails.

    Raises:
        CalibrationError: the loss fails as code does that misses something which hooks make.
        ValueError: it writes to a pruned parameter.
    """
    ours = {id(parameter) for parameter in pruned}

    def loss(module: nn.Module, batch: Any) -> Tensor:
        try:
            with parameters:
                value = loss_fn(module, batch)
        except (AttributeError, TypeError, LookupError, ArithmeticError, NameError) as error:
            if not before_hooks:
                raise
            raise CalibrationError(f"the calibration loss failed: {type(error).__name__}: {error}. {_WHEN}") from error
        changed = [name for name, (parameter, *_) in parameters.changed.items() if id(parameter) in ours]
        if changed:
            raise ValueError(
                f"the loss writes to {', '.join(changed[:4])}, which is being pruned; the weights are unchanged. Do "
                "that in a hook (on_train_batch_start, on_train_batch_end), add the layer to `ignore`, or pass loss_fn "
                "to the callback"
            )
        return value

    return loss
