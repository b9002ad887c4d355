"""Where a shrinking model is to end, and which units may still go: arithmetic on sizes, nothing of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.structure.sizes import (
    AttentionUnit,
    Shapes,
    Sizes,
    Target,
    UnitType,
    check_types,
    target_count,
    target_sizes,
    units_to_remove,
)
from lightning_prune.structure.units import Structure, check_layers_removable, needs_other_class

# Types whose sizes are made multiples; heads and layers are few, and hardware does not ask it of them.
_ROUNDED = ("ffn", "stem")


@dataclass(frozen=True)
class ShrinkGoal:
    """The end of a model's way.

    Attributes:
        types: Unit types that may go.
        shapes: Of the model.
        attention_unit: ``"group"`` or ``"head"``.
        round_to: Multiple that the FFN and hidden sizes are kept at, from the first unit of the type on.
        first: Sizes before the first pruning.
        final: Parameters to end with.
        final_sizes: Sizes to end with, where the target names sizes.
    """

    types: tuple[UnitType, ...]
    shapes: Shapes
    attention_unit: AttentionUnit
    round_to: int
    first: Sizes
    final: int
    final_sizes: Sizes | None

    def parameters(self, sizes: Sizes) -> int:
        """Number of parameters of a model of these sizes."""
        return self.shapes.count(sizes)

    def next_units(self, unit_type: UnitType, sizes: Sizes) -> int:
        """How many units of a type go together next (in every layer, for attention and ffn); 0 where none may."""
        left = sizes.units(unit_type, self.attention_unit)
        floor = 1 if self.final_sizes is None else self.final_sizes.units(unit_type, self.attention_unit)
        count = 1
        if unit_type in _ROUNDED:
            count = left % self.round_to or self.round_to
        return count if left - count >= floor else 0

    def unit_weights(self, unit_type: UnitType, sizes: Sizes) -> int:
        """Weights of one unit in a model of these sizes: in one layer for attention and ffn, in the model for stem."""
        lost = self.parameters(sizes) - self.parameters(sizes.without(unit_type, 1, self.attention_unit))
        return lost // sizes.num_hidden_layers if unit_type in ("attention", "ffn") else lost

    def reached(self, sizes: Sizes) -> bool:
        """Whether nothing more is to go."""
        small = self.final_sizes is None and self.parameters(sizes) <= self.final
        return small or not any(self.next_units(t, sizes) for t in self.types)


def make_goal(
    structure: Structure,
    target: Target,
    types: tuple[str, ...] | list[str],
    round_to: int = 1,
    first: Sizes | None = None,
) -> ShrinkGoal:
    """Check a target against a model.

    Args:
        structure: Of the model.
        target: A share of the parameters, their number, or final sizes by name.
        types: Unit types that may go.
        round_to: Multiple for the FFN and hidden sizes.
        first: Sizes that a share refers to; default the model's.

    Raises:
        ValueError: a target that cannot be reached with these types, or types that this architecture cannot lose one
            by one.
    """
    checked = check_types(types)
    _check_family(structure, checked)
    shapes, unit = structure.shapes(), structure.attention_unit
    first = structure.sizes if first is None else first
    sizes = target_sizes(target, first, unit) if isinstance(target, Mapping) else None
    final = shapes.count(sizes) if sizes is not None else target_count(target, first, shapes)
    goal = ShrinkGoal(checked, shapes, unit, round_to, first, final, sizes)
    if sizes is not None:
        _check_sizes(goal, sizes)
    elif shapes.count(smallest := _smallest(goal)) > final:
        raise ValueError(
            f"target={target!r} asks for {final:,} parameters, but removing types={checked} leaves at least "
            f"{shapes.count(smallest):,}; name more types, or a larger target"
        )
    return goal


def _check_family(structure: Structure, types: tuple[UnitType, ...]) -> None:
    family, both = structure.family, {"attention", "stem"} & set(types)
    if family.heads_span_hidden and both:
        raise ValueError(
            f"types={types}: {family.model_type!r} takes head_dim for hidden_size / num_attention_heads, so heads and "
            "hidden channels cannot go one by one; use types=('ffn',), ('layer',) or both, or prune_structured with "
            "the final sizes"
        )
    if family.heads_divide_hidden and both and (reason := needs_other_class(structure)):
        raise ValueError(
            f"types={types}: {family.model_type!r} wants a hidden size that its heads divide, and {reason}, so that it "
            f"cannot be saved as {family.saved_as!r} in between; use types=('ffn',), ('layer',) or both"
        )
    if "layer" in types:
        check_layers_removable(structure)


def _check_sizes(goal: ShrinkGoal, final: Sizes) -> None:
    for unit_type, count in units_to_remove(goal.first, final, goal.attention_unit).items():
        if unit_type not in goal.types:
            raise ValueError(
                f"the target's sizes take {count} units of {unit_type!r}, which is not in types={goal.types}; add it"
            )
        left = final.units(unit_type, goal.attention_unit)
        if unit_type in _ROUNDED and left % goal.round_to:
            raise ValueError(
                f"the target leaves {left} units of {unit_type!r}, no multiple of round_to={goal.round_to}"
            )


def _smallest(goal: ShrinkGoal) -> Sizes:
    sizes = goal.first
    for unit_type in goal.types:
        left = sizes.units(unit_type, goal.attention_unit)
        floor = min(goal.round_to, left) if unit_type in _ROUNDED else 1
        sizes = sizes.without(unit_type, left - floor, goal.attention_unit)
    return sizes
