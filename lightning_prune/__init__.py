"""Prune language models, and any PyTorch Lightning module, with a callback, and keep them sparse."""

from lightning_prune.masks import apply_masks
from lightning_prune.pruning import prune

__all__ = ["apply_masks", "prune"]
