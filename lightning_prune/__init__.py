"""Prune language models, and any PyTorch Lightning module, with a callback, and keep them sparse.

Names are imported when first used, so that tools which need no Trainer start without lightning and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.allocation import KFACAllocation, OWLAllocation
    from lightning_prune.callbacks import WeightPruning
    from lightning_prune.callbacks.pruning_aware_pretraining import PruningAwarePretraining
    from lightning_prune.language_model import CausalLM
    from lightning_prune.masks import apply_masks
    from lightning_prune.perp.callback import PERPRetraining
    from lightning_prune.pruning import prune
    from lightning_prune.ranks import Ranks
    from lightning_prune.schedules import CubicSchedule, LinearSchedule, OneShot
    from lightning_prune.statistics import CalibrationError
    from lightning_prune.structure.oneshot import prune_structured
    from lightning_prune.text_data import TextDataModule

_HOMES = {
    "CalibrationError": "statistics",
    "CausalLM": "language_model",
    "CubicSchedule": "schedules",
    "KFACAllocation": "allocation",
    "LinearSchedule": "schedules",
    "OWLAllocation": "allocation",
    "OneShot": "schedules",
    "TextDataModule": "text_data",
    "PERPRetraining": "perp.callback",
    "PruningAwarePretraining": "callbacks.pruning_aware_pretraining",
    "Ranks": "ranks",
    "WeightPruning": "callbacks",
    "apply_masks": "masks",
    "prune": "pruning",
    "prune_structured": "structure.oneshot",
}

__all__ = [
    "CalibrationError",
    "CausalLM",
    "CubicSchedule",
    "KFACAllocation",
    "LinearSchedule",
    "OWLAllocation",
    "OneShot",
    "PERPRetraining",
    "PruningAwarePretraining",
    "Ranks",
    "TextDataModule",
    "WeightPruning",
    "apply_masks",
    "prune",
    "prune_structured",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
