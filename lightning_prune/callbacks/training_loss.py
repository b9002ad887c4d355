"""Run a LightningModule's own training step for its loss, and leave no trace of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torchmetrics import Metric

_MODULE_INTERNALS = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, set, type(None))


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
def no_trace(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Undo what a training step does beside its loss.

    Logging goes nowhere; plain attributes (counters, lists), torchmetrics states, buffers and all random states
    (torch, CUDA, numpy, Python) are afterwards what they were.
    """
    random_states = _collect_rng_states(include_cuda=True)
    attributes = [(m, _plain_attributes(m)) for m in module.modules()]
    metrics = [(m, _metric_state(m)) for m in module.modules() if isinstance(m, Metric)]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    silenced = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
    module.__dict__.update(silenced)
    try:
        yield
    finally:
        for name in silenced:
            module.__dict__.pop(name, None)
        trainer.loggers = loggers
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for metric, state in metrics:
            metric.__dict__.update(state)
        for owner, values in attributes:
            _restore_attributes(owner, values)
        _set_rng_states(random_states)


def _plain_attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Name to the object and, for containers, a copy of its content."""
    return {
        name: (value, copy.copy(value))
        for name, value in module.__dict__.items()
        if name not in _MODULE_INTERNALS and isinstance(value, _PLAIN)
    }


def _restore_attributes(module: nn.Module, values: dict[str, tuple[Any, Any]]) -> None:
    for name in [n for n in _plain_attributes(module) if n not in values]:
        del module.__dict__[name]
    for name, (value, content) in values.items():
        # The same list or dict object, since others may hold it.
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)) and value != content:
            value.clear()
            value.update(content)
        module.__dict__[name] = value


def _metric_state(metric: Metric) -> dict[str, Any]:
    names = [*metric._defaults, "_update_count", "_computed", "_forward_cache"]
    return {name: copy.deepcopy(metric.__dict__[name]) for name in names if name in metric.__dict__}
