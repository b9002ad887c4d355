"""Where a shrinking model is to end, and which units may still go: arithmetic on sizes, nothing of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.structure.choice import check_count, check_removable, check_round_to, steps_down
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
from lightning_prune.structure.units import Structure


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
        steps = steps_down(unit_type, sizes, self.attention_unit, check_round_to(self.round_to))
        if not steps:
            return 0
        left = sizes.units(unit_type, self.attention_unit) - steps[0]
        floor = 1 if self.final_sizes is None else self.final_sizes.units(unit_type, self.attention_unit)
        return steps[0] if left >= floor else 0

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
    check_removable(structure, checked)
    shapes, unit = structure.shapes(), structure.attention_unit
    first = structure.sizes if first is None else first
    sizes = target_sizes(target, first, unit) if isinstance(target, Mapping) else None
    final = shapes.count(sizes) if sizes is not None else target_count(target, first, shapes)
    goal = ShrinkGoal(checked, shapes, unit, round_to, first, final, sizes)
    if sizes is not None:
        _check_sizes(goal, sizes)
    elif not isinstance(target, Mapping):
        check_count(structure, target, checked, check_round_to(round_to), first)
    return goal


def _check_sizes(goal: ShrinkGoal, final: Sizes) -> None:
    for unit_type, count in units_to_remove(goal.first, final, goal.attention_unit).items():
        if unit_type not in goal.types:
            raise ValueError(
                f"the target's sizes take {count} units of {unit_type!r}, which is not in types={goal.types}; add it"
            )
        left = final.units(unit_type, goal.attention_unit)
        if unit_type in ("ffn", "stem") and left % goal.round_to:
            raise ValueError(
                f"the target leaves {left} units of {unit_type!r}, no multiple of round_to={goal.round_to}"
            )
