"""Prune language models, and any PyTorch Lightning module, with a callback, and keep them sparse.

Names are imported when first used, so that tools which need no Trainer start without lightning and transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_prune.callbacks.hold_masks_callback import HoldMasksCallback as HoldMasksCallback
    from lightning_prune.callbacks.perp_retraining import PERPRetraining as PERPRetraining
    from lightning_prune.callbacks.pruning_aware_pretraining import PruningAwarePretraining as PruningAwarePretraining
    from lightning_prune.callbacks.sparsity_monitor import SparsityMonitor as SparsityMonitor
    from lightning_prune.callbacks.weight_pruning import WeightPruning as WeightPruning
    from lightning_prune.checkpoints.export import export as export
    from lightning_prune.checkpoints.inspection import inspect as inspect
    from lightning_prune.checkpoints.mask_files import load_masks as load_masks
    from lightning_prune.checkpoints.mask_files import save_masks as save_masks
    from lightning_prune.checkpoints.reading import open_checkpoint as open_checkpoint
    from lightning_prune.checkpoints.states import load_merged_state as load_merged_state
    from lightning_prune.errors import CalibrationError as CalibrationError
    from lightning_prune.evaluation.evaluate import evaluate as evaluate
    from lightning_prune.evaluation.latency import benchmark as benchmark
    from lightning_prune.evaluation.perplexity import perplexity as perplexity
    from lightning_prune.pruning.allocation import KFACAllocation as KFACAllocation
    from lightning_prune.pruning.allocation import OWLAllocation as OWLAllocation
    from lightning_prune.pruning.coverage import measure_coverage as measure_coverage
    from lightning_prune.pruning.elsa import ELSA as ELSA
    from lightning_prune.pruning.holding import hold_masks as hold_masks
    from lightning_prune.pruning.masks import apply_masks as apply_masks
    from lightning_prune.pruning.masks import mask_sparsity as mask_sparsity
    from lightning_prune.pruning.memory import walk_memory as walk_memory
    from lightning_prune.pruning.pipeline import prune as prune
    from lightning_prune.pruning.scores import Score as Score
    from lightning_prune.pruning.statistics import LayerStatistics as LayerStatistics
    from lightning_prune.pruning.targets import DEFAULT_IGNORE as DEFAULT_IGNORE
    from lightning_prune.pruning.updates import ALPS as ALPS
    from lightning_prune.ranks import Ranks as Ranks
    from lightning_prune.schedules import CubicSchedule as CubicSchedule
    from lightning_prune.schedules import LinearSchedule as LinearSchedule
    from lightning_prune.schedules import OneShot as OneShot
    from lightning_prune.structure.oneshot import prune_structured as prune_structured
    from lightning_prune.text.compress import compress as compress
    from lightning_prune.text.compress import shrink as shrink
    from lightning_prune.text.data import TextDataModule as TextDataModule
    from lightning_prune.text.module import CausalLM as CausalLM

_HOMES = {
    "ALPS": "pruning.updates",
    "CalibrationError": "errors",
    "CausalLM": "text.module",
    "CubicSchedule": "schedules",
    "DEFAULT_IGNORE": "pruning.targets",
    "ELSA": "pruning.elsa",
    "HoldMasksCallback": "callbacks.hold_masks_callback",
    "KFACAllocation": "pruning.allocation",
    "LayerStatistics": "pruning.statistics",
    "LinearSchedule": "schedules",
    "OWLAllocation": "pruning.allocation",
    "OneShot": "schedules",
    "PERPRetraining": "callbacks.perp_retraining",
    "PruningAwarePretraining": "callbacks.pruning_aware_pretraining",
    "Ranks": "ranks",
    "Score": "pruning.scores",
    "SparsityMonitor": "callbacks.sparsity_monitor",
    "TextDataModule": "text.data",
    "WeightPruning": "callbacks.weight_pruning",
    "apply_masks": "pruning.masks",
    "benchmark": "evaluation.latency",
    "compress": "text.compress",
    "evaluate": "evaluation.evaluate",
    "export": "checkpoints.export",
    "hold_masks": "pruning.holding",
    "inspect": "checkpoints.inspection",
    "load_masks": "checkpoints.mask_files",
    "load_merged_state": "checkpoints.states",
    "mask_sparsity": "pruning.masks",
    "measure_coverage": "pruning.coverage",
    "open_checkpoint": "checkpoints.reading",
    "perplexity": "evaluation.perplexity",
    "prune": "pruning.pipeline",
    "prune_structured": "structure.oneshot",
    "save_masks": "checkpoints.mask_files",
    "shrink": "text.compress",
    "walk_memory": "pruning.memory",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except AttributeError as error:  # Python would say that the name cannot be imported, and not why
        raise ImportError(f"{__name__}.{_HOMES[name]} cannot be imported: {error}") from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return list(__all__)
