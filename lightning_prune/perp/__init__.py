"""PERP: retrain a sliver of a pruned model, and merge without losing a zero (arXiv 2312.15230).

The way through the files: `effective` (the formulas) → `layers` (PEFT layers) → `variants` (by name) → `options`,
`selection` (what a user may ask for) → `adapters` (put on, merge) → `storage` (save, load) → `dense`, `fitting`,
`reconstruction` (block by block) → `callback` (in a Trainer).
"""

from lightning_prune.perp.adapters import adapter_masks, add_adapters, merge, remove_adapters, trainable_share
from lightning_prune.perp.checkpoints import load_merged_state
from lightning_prune.perp.layers import CombinedLinear
from lightning_prune.perp.mask_setting import set_masks
from lightning_prune.perp.model import SparsePeftModel
from lightning_prune.perp.reconstruction import BlockError, Reconstruction, reconstruct
from lightning_prune.perp.storage import load_adapter, save_adapter
from lightning_prune.perp.variants import register_adapter

__all__ = [
    "BlockError",
    "CombinedLinear",
    "Reconstruction",
    "SparsePeftModel",
    "adapter_masks",
    "add_adapters",
    "load_adapter",
    "load_merged_state",
    "merge",
    "reconstruct",
    "register_adapter",
    "remove_adapters",
    "save_adapter",
    "set_masks",
    "trainable_share",
]
