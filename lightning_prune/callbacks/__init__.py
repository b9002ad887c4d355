"""Lightning callbacks: hooks only; the algorithms are the functions of the package."""

from lightning_prune.callbacks.sparsity_monitor import SparsityMonitor
from lightning_prune.callbacks.weight_pruning import WeightPruning

__all__ = ["SparsityMonitor", "WeightPruning"]
