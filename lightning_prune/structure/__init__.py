"""Shrink a language model: units of attention, FFN, hidden channels and layers (EfficientLLM, arXiv 2502.06663).

The way through the files: `families` (the table of architectures), `sizes` (arithmetic), `units` (which rows and
columns go together, and which may go), `masking` (as zeros) and `removal` (for good), `classes` (whose configuration
takes the sizes), `saving` over `folders` (one takes the place of another); `saliency` (what a unit is worth),
`planning` (which go), `compensation` (the rest takes over), `streaming` and `shrinking` (while training), `oneshot`.
"""

from lightning_prune.structure.families import Family, find_family, known_families, register_family
from lightning_prune.structure.masking import mask_units
from lightning_prune.structure.oneshot import StructuredReport, prune_structured
from lightning_prune.structure.permutation import Permutation, permute_channels
from lightning_prune.structure.removal import remove_units
from lightning_prune.structure.saliency import SaliencyAccumulator
from lightning_prune.structure.saving import save_plain
from lightning_prune.structure.sizes import Sizes
from lightning_prune.structure.units import Structure, read_structure

__all__ = [
    "Family",
    "Permutation",
    "SaliencyAccumulator",
    "Sizes",
    "Structure",
    "StructuredReport",
    "find_family",
    "known_families",
    "mask_units",
    "permute_channels",
    "prune_structured",
    "read_structure",
    "register_family",
    "remove_units",
    "save_plain",
]
