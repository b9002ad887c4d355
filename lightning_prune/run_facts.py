"""What a report has to know of a run to be repeated: versions, seed, devices, settings of callbacks and data."""

from __future__ import annotations

import dataclasses
import inspect
import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("lightning-prune", "torch", "lightning", "transformers", "peft", "datasets")
"""Packages whose versions decide a result."""

_SEED_VARIABLE = "PL_GLOBAL_SEED"  # where seed_everything leaves the seed
_LONGEST = 200


def run_facts(trainer: Any, module: Any) -> dict[str, Any]:
    """Plain values for JSON.

    Args:
        trainer: A Trainer in its fit.
        module: Its LightningModule.
    """
    seed = os.environ.get(_SEED_VARIABLE, "")
    data = trainer.datamodule
    return {
        "versions": versions(),
        "seed": int(seed) if seed.isdigit() else None,
        "module": type(module).__name__,
        "strategy": type(trainer.strategy).__name__,
        "accelerator": type(trainer.accelerator).__name__,
        "processes": trainer.world_size,
        "precision": str(trainer.precision),
        "max_steps": trainer.max_steps,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": plain(trainer.gradient_clip_val),
        "callbacks": [
            {"name": type(callback).__name__, "settings": settings_of(callback)}
            for callback in trainer.callbacks
            if type(callback).__module__.startswith("lightning_prune.")
        ],
        "data": None if data is None else {"name": type(data).__name__, "settings": plain(dict(data.hparams))},
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def settings_of(callback: Any) -> dict[str, Any]:
    """Arguments of a callback as it keeps them: as attributes, or in its ``settings`` or ``options``."""
    kept: dict[str, Any] = {}
    for name in inspect.signature(type(callback).__init__).parameters:
        for place in (getattr(callback, "settings", None), getattr(callback, "options", None), vars(callback)):
            if isinstance(place, Mapping) and name in place:
                kept[name] = plain(place[name])
                break
    return kept


def plain(value: Any) -> Any:
    """The value if JSON can hold it; otherwise what it is, in words.

    >>> plain({"sparsity": 0.5, "targets": [int]})
    {'sparsity': 0.5, 'targets': ['int']}
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _LONGEST:
        return [plain(item) for item in value]
    if isinstance(value, type):
        return value.__name__
    # Scores, schedules and allocations print themselves as they are written; other objects as their type alone.
    return plain(repr(value)) if dataclasses.is_dataclass(value) else type(value).__name__
