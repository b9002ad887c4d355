"""Removals before they happen: checked, merged, and what sizes and indices they leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.structure.sizes import UNIT_TYPES, Sizes
from lightning_prune.structure.units import Removal, Structure


def check_removal(structure: Structure, removal: Mapping[str, Any]) -> Removal:
    """A removal in its normal form: sorted int64 indices on the CPU, empty types left out.

    Args:
        structure: Of the model.
        removal: Unit indices by type: for attention and ffn one sequence or tensor a layer, of the same length in all;
            for stem and layer one (a list with one tensor is taken too).

    Raises:
        ValueError: an unknown type, a wrong number of layers, unequal counts, an index that does not exist or comes
            twice, or nothing left of a type.
    """
    if unknown := set(removal) - set(UNIT_TYPES):
        raise ValueError(f"removal has the unit types {sorted(unknown)}; known are {UNIT_TYPES}")
    checked: Removal = {}
    for unit_type in UNIT_TYPES:
        if unit_type in removal:
            places = _checked_places(structure, unit_type, removal[unit_type])
            if places[0].numel():
                checked[unit_type] = places
    return checked


def _checked_places(structure: Structure, unit_type: str, given: Any) -> list[Tensor]:
    if structure.places(unit_type) == 1 and unit_type in ("stem", "layer"):
        single = isinstance(given, (list, tuple)) and len(given) == 1 and isinstance(given[0], Tensor)
        given = [given[0] if single else given]
    places = [torch.as_tensor(indices, dtype=torch.int64).cpu().reshape(-1).sort().values for indices in given]
    units = structure.units(unit_type)
    if len(places) != structure.places(unit_type):
        raise ValueError(
            f"removal[{unit_type!r}] has {len(places)} entries; give one for each of the "
            f"{structure.places(unit_type)} layers"
        )
    if len({len(p) for p in places}) != 1:
        raise ValueError(
            f"removal[{unit_type!r}] removes {sorted({len(p) for p in places})} units from different layers: every "
            "layer must lose as many, or the model is no ordinary configuration"
        )
    for p in places:
        if p.numel() and (int(p[0]) < 0 or int(p[-1]) >= units or bool((p[1:] == p[:-1]).any())):
            raise ValueError(f"removal[{unit_type!r}] has {p.tolist()}: units are 0 to {units - 1}, each at most once")
    if len(places[0]) >= units:
        raise ValueError(f"removal[{unit_type!r}] removes all {units} units; at least one must stay")
    return places


def merge_removals(structure: Structure, *removals: Mapping[str, Any]) -> Removal:
    """The union of removals that number the units of the same model; units named twice count once."""
    merged: dict[str, list[Tensor]] = {}
    for removal in removals:
        for unit_type, places in check_removal(structure, removal).items():
            before = merged.get(unit_type, [torch.empty(0, dtype=torch.int64)] * len(places))
            merged[unit_type] = [torch.unique(torch.cat([a, b])) for a, b in zip(before, places, strict=True)]
    return check_removal(structure, merged)


def sizes_after(structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> Sizes:
    """Sizes of the model after a (checked) removal."""
    sizes = structure.sizes
    for unit_type, places in removal.items():
        # Groups keep their ratio, so the order of removals does not matter.
        sizes = sizes.without(unit_type, len(places[0]), structure.attention_unit)
    return sizes


def check_sizes(structure: Structure, sizes: Sizes) -> None:
    """Refuse sizes that no ordinary configuration of the family, or of the one it is saved as, can have.

    Raises:
        ValueError: naming the rule and what to remove instead.
    """
    family, heads, hidden = structure.family, sizes.num_attention_heads, sizes.hidden_size
    if family.heads_span_hidden and heads * sizes.head_dim != hidden:
        raise ValueError(
            f"{family.model_type!r} takes head_dim for hidden_size / num_attention_heads, so {heads} heads of "
            f"{sizes.head_dim} and a hidden size of {hidden} are no configuration of it: remove {sizes.head_dim} "
            "hidden channels (stem) with every head (attention), or ffn channels and layers alone"
        )
    if family.heads_divide_hidden and hidden % heads and needs_other_class(structure) is not None:
        raise ValueError(
            f"{family.model_type!r} refuses a hidden size ({hidden}) that its {heads} heads do not divide, and "
            f"{needs_other_class(structure)}, so the model cannot be saved as {family.saved_as!r} either: choose sizes "
            "that divide (round_to)"
        )


def check_layers_removable(structure: Structure) -> None:
    """Refuse the removal of layers where one computes something else under another number.

    Raises:
        ValueError: naming the field of the configuration.
    """
    matters = structure.family.layer_index_matters
    if matters and getattr(structure.config, matters, False):
        raise ValueError(
            f"layers cannot be removed with {matters}=True: a layer computes something else under another number"
        )


def needs_other_class(structure: Structure) -> str | None:
    """Why the model cannot be saved as the family its own stands in for; None if it can."""
    target = structure.family.saved_as
    if target is None:
        return "no other family has the same parameters"
    biases = [name for name in structure.axes if name.endswith(".bias")]
    return f"it has biases ({biases[0]})" if biases else None


@dataclass(frozen=True)
class KeptIndices:
    """What stays of a parameter: the dimension, and the indices along it, int64."""

    dim: int
    kept: Tensor
    gone: Tensor


def kept_indices(structure: Structure, removal: Mapping[str, Sequence[Tensor]]) -> dict[str, list[KeptIndices]]:
    """For every parameter that loses rows or columns, what stays along each dimension that shrinks."""
    found: dict[str, list[KeptIndices]] = {}
    for unit_type, places in removal.items():
        if unit_type == "layer":
            continue
        for slices, units in zip(structure.slices(unit_type), places, strict=True):
            for s in slices:
                gone = s.indices[units].reshape(-1).sort().values
                stays = torch.ones(structure.lengths[s.name][s.dim], dtype=torch.bool)
                stays[gone] = False
                found.setdefault(s.name, []).append(KeptIndices(s.dim, stays.nonzero().flatten(), gone))
    return found
