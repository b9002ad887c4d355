"""Shrink a language model: units of attention, FFN, hidden channels and layers (EfficientLLM, arXiv 2502.06663).

The way through the files: `families` (the table of architectures) → `sizes` (arithmetic) → `units` (which rows and
columns go together) → `removal_checks` (what may go) → `unit_masks` (as zeros) and `removal` (for good) →
`masked_units` (zeros of shards, left out of what is saved) → `ordinary` (saving); `saliency` (what a unit is worth) →
`choice` (which go) → `compensation` (the rest takes over) → `oneshot` (all of it, without a Trainer).
"""

from lightning_prune.structure.choice import Choice, choose
from lightning_prune.structure.families import Family, find_family, known_families, register_family
from lightning_prune.structure.oneshot import StructuredReport, prune_structured
from lightning_prune.structure.ordinary import plain_model, save_plain
from lightning_prune.structure.removal import remove_units
from lightning_prune.structure.saliency import SaliencyAccumulator
from lightning_prune.structure.sizes import Sizes
from lightning_prune.structure.unit_masks import mask_units
from lightning_prune.structure.units import Structure, read_structure

__all__ = [
    "Choice",
    "Family",
    "SaliencyAccumulator",
    "Sizes",
    "Structure",
    "StructuredReport",
    "choose",
    "find_family",
    "known_families",
    "mask_units",
    "plain_model",
    "prune_structured",
    "read_structure",
    "register_family",
    "remove_units",
    "save_plain",
]
