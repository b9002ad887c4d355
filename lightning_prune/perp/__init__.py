"""PERP: retrain a sliver of a pruned model, and merge without losing a zero (arXiv 2312.15230).

The way through the files: `effective` (the formulas), `layers` (PEFT layers, by name), `substitution` (layers that run
as they are), of these `experts` (stacks of matrices) and `convolutions`, `options` (what a user may ask for), `masks`,
`storage` (files), `adapters` (put on, save, load, merge), `windows` (halves of a block), `fitting` (one window) and
`reconstruction` (block by block).
"""

from lightning_prune.perp.adapters import (
    SparsePeftModel,
    adapter_masks,
    add_adapters,
    load_adapter,
    merge,
    remove_adapters,
    save_adapter,
    trainable_share,
)
from lightning_prune.perp.layers import CombinedLinear, register_adapter
from lightning_prune.perp.masks import set_masks
from lightning_prune.perp.options import ReconstructSettings
from lightning_prune.perp.reconstruction import BlockError, Reconstruction, reconstruct

__all__ = [
    "BlockError",
    "CombinedLinear",
    "ReconstructSettings",
    "Reconstruction",
    "SparsePeftModel",
    "adapter_masks",
    "add_adapters",
    "load_adapter",
    "merge",
    "reconstruct",
    "register_adapter",
    "remove_adapters",
    "save_adapter",
    "set_masks",
    "trainable_share",
]
