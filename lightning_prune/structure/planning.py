"""Choose which units go next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.structure.sizes import (
    SIZE_NAMES,
    AttentionUnit,
    Shapes,
    Sizes,
    Target,
    UnitType,
    check_types,
    target_count,
    target_sizes,
    unit_of_heads,
    units_to_remove,
)
from lightning_prune.structure.units import (
    Removal,
    Structure,
    check_layers_removable,
    check_removal,
    check_sizes,
    needs_other_class,
    sizes_after,
)

RoundTo = int | Mapping[str, int]
_SIZE_OF = {
    "attention": "num_attention_heads",
    "ffn": "intermediate_size",
    "stem": "hidden_size",
    "layer": "num_hidden_layers",
}


@dataclass(frozen=True)
class Choice:
    """The units of one pruning step.

    Attributes:
        unit_type: Their type.
        units: Indices of the units to remove, ascending, one tensor a place.
        saliency: Mean saliency of those of each type that were compared, also of the types not chosen.
    """

    unit_type: UnitType
    units: list[Tensor]
    saliency: dict[str, float]

    def removal(self) -> Removal:
        """As `remove_units` takes it."""
        return {self.unit_type: self.units}


def check_round_to(round_to: RoundTo) -> dict[str, int]:
    """Multiples by size; an int is for hidden_size and intermediate_size.

    Raises:
        ValueError: a size that is not known, or a multiple below 1.
    """
    if isinstance(round_to, int) and not isinstance(round_to, bool):
        given = {"hidden_size": round_to, "intermediate_size": round_to}
    elif isinstance(round_to, Mapping):
        given = dict(round_to)
    else:
        raise ValueError(f"round_to={round_to!r} must be an int, or a mapping from sizes to ints")
    for name, value in given.items():
        if name not in SIZE_NAMES or isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"round_to={round_to!r} must be an int of 1 or more, or such ints by size ({', '.join(SIZE_NAMES)})"
            )
    return given


def choose(
    saliencies: Mapping[str, Tensor],
    structure: Structure,
    removed: Removal | None = None,
    count: int = 1,
    limit: int | None = None,
    round_to: RoundTo = 1,
) -> Choice | None:
    """The type whose cheapest unit has the smallest saliency, and its cheapest units: one of every place.

    Attention and FFN units compare by the mean over layers of each layer's own cheapest. Ties go to the lower index,
    and of types to the first of attention, ffn, stem, layer.

    Args:
        saliencies: ``[P, U]`` by unit type, from `SaliencyAccumulator.means` or `kfac_saliency`.
        structure: Of the model.
        removed: Units that are masked already.
        count: Units to remove at once, of every place.
        limit: Number of parameters not to go below while any type can be shrunk without; a type whose next units are
            too many is then passed over. When no type is left that fits, the one that ends nearest below is taken.
        round_to: Sizes shrink from one multiple to the next; an int is for hidden_size and intermediate_size.

    Returns:
        None if the limit is reached, or nothing can go any more.

    Raises:
        ValueError: saliencies of another shape, NaN among them, or bad arguments.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count={count!r} must be an int of 1 or more")
    multiples = check_round_to(round_to)
    removal = check_removal(structure, removed or {})
    ranked = {t: _rank(saliencies[t], t, structure, removal) for t in check_types(list(saliencies))}
    curves = {t: values.mean(0) for t, (values, _) in ranked.items()}
    picked = _pick(
        curves, dict.fromkeys(ranked, 0), sizes_after(structure, removal), structure, count, limit, multiples
    )
    if picked is None:
        return None
    unit_type, n, means = picked
    return Choice(unit_type, [order[:n].sort().values for order in ranked[unit_type][1]], means)


def _rank(saliency: Tensor, unit_type: str, structure: Structure, removed: Removal) -> tuple[Tensor, Tensor]:
    """Saliencies in ascending order, ``[P, U]``, and the units they belong to; removed ones last, infinite."""
    wanted = (structure.places(unit_type), structure.units(unit_type))
    if tuple(saliency.shape) != wanted:
        raise ValueError(f"saliencies[{unit_type!r}] have shape {tuple(saliency.shape)}, the model's units {wanted}")
    values = saliency.detach().cpu().double().clone()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"saliencies[{unit_type!r}] hold NaN or infinity; check the data and the precision")
    for place, units in enumerate(removed.get(unit_type, ())):
        values[place, units] = torch.inf
    ordered = values.sort(dim=1, stable=True)
    return ordered.values, ordered.indices


def _pick(
    curves: Mapping[UnitType, Tensor],
    taken: Mapping[UnitType, int],
    sizes: Sizes,
    structure: Structure,
    count: int,
    limit: int | None,
    multiples: Mapping[str, int],
) -> tuple[UnitType, int, dict[str, float]] | None:
    """Type, number of units, and mean saliencies compared; `taken` units of each curve ``[U]`` are gone already."""
    shapes, unit = structure.shapes(), structure.attention_unit
    if limit is not None and shapes.count(sizes) <= limit:
        return None
    means: dict[str, float] = {}
    fitting: list[tuple[float, UnitType, int]] = []
    overshooting: list[tuple[int, float, UnitType, int]] = []
    for unit_type, curve in curves.items():
        steps = steps_down(unit_type, sizes, unit, multiples, count)
        if not steps:
            continue
        means[unit_type] = mean = float(curve[taken[unit_type] :][: steps[0]].mean())
        fits = [n for n in steps if limit is None or shapes.count(sizes.without(unit_type, n, unit)) >= limit]
        if fits:
            fitting.append((mean, unit_type, fits[-1]))
        else:
            overshooting.append((-shapes.count(sizes.without(unit_type, steps[0], unit)), mean, unit_type, steps[0]))
    if fitting:
        _, unit_type, n = min(fitting, key=lambda entry: entry[0])
        return unit_type, n, means
    if overshooting:
        _, _, unit_type, n = min(overshooting, key=lambda entry: entry[:2])
        return unit_type, n, means
    return None


def steps_down(
    unit_type: UnitType, sizes: Sizes, unit: AttentionUnit, multiples: Mapping[str, int], count: int = 1
) -> list[int]:
    """How many units may go at once, ascending: to the next multiple, and on by multiples while up to `count`.

    Args:
        unit_type: Their type.
        sizes: Of the model.
        unit: What an attention unit is.
        multiples: From `check_round_to`.
        count: How many are wanted at once; the first step may be more.

    Returns:
        Empty where none may go: one unit stays, or as many as the smallest multiple.
    """
    steps: list[int] = []
    for n in range(1, sizes.units(unit_type, unit)):
        after = sizes.without(unit_type, n, unit)
        names = ("num_attention_heads", "num_key_value_heads") if unit_type == "attention" else (_SIZE_OF[unit_type],)
        if all(getattr(after, name) % multiples.get(name, 1) == 0 for name in names):
            steps.append(n)
        if n >= count and steps:
            break
    return [n for n in steps if n <= count] or steps[:1]


def plan_removal(
    saliencies: Mapping[str, Tensor], structure: Structure, target: Target, round_to: RoundTo = 1
) -> Removal:
    """All units to remove at once to reach a target, from saliencies that do not change on the way.

    A number of parameters is reached by removing the type with the cheapest next unit, as `choose` does step by step,
    and ends at the target or the nearest below it that the types allow. A mapping of sizes is reached exactly.

    Raises:
        ValueError: a target that removing units of these types cannot reach.
    """
    ranked = {t: _rank(saliencies[t], t, structure, {}) for t in check_types(list(saliencies))}
    if isinstance(target, Mapping):
        counts = counts_of(target, structure, tuple(ranked))
    else:
        counts = _greedy({t: values.mean(0) for t, (values, _) in ranked.items()}, structure, target, round_to)
    removal: Removal = {t: [order[:n].sort().values for order in ranked[t][1]] for t, n in counts.items() if n}
    checked = check_removal(structure, removal)
    check_sizes(structure, sizes_after(structure, checked))
    return checked


def counts_of(target: Mapping[str, int], structure: Structure, types: Sequence[str]) -> dict[UnitType, int]:
    """How many units of each type a mapping of final sizes takes.

    Raises:
        ValueError: it needs a type that is not among `types`, or other attention units.
    """
    wanted = target_sizes(target, structure.sizes, structure.attention_unit)
    check_sizes(structure, wanted)
    counts = units_to_remove(structure.sizes, wanted, structure.attention_unit)
    if missing := [t for t in counts if t not in types]:
        raise ValueError(f"target={dict(target)!r} needs units of type {missing[0]!r}, but types={tuple(types)!r}")
    return counts


def attention_unit_of(target: Target, sizes: Sizes, default: AttentionUnit) -> AttentionUnit:
    """The attention unit that a mapping of sizes needs; the default where any will do."""
    if not isinstance(target, Mapping) or not {"num_attention_heads", "num_key_value_heads"} & set(target):
        return default
    wanted = target_sizes(target, sizes)
    changed = wanted.num_attention_heads != sizes.num_attention_heads
    return (unit_of_heads(sizes, wanted) or default) if changed else default


def check_reachable(structure: Structure, target: Target, types: Sequence[UnitType], round_to: RoundTo = 1) -> None:
    """Refuse a target before any work is done for it.

    Raises:
        ValueError: as `plan_removal` does, whatever the saliencies.
    """
    multiples = check_round_to(round_to)
    check_removable(structure, types, one_by_one=not isinstance(target, Mapping))
    if isinstance(target, Mapping):
        counts_of(target, structure, types)
        return
    check_count(structure, target, types, multiples)


def check_removable(structure: Structure, types: Sequence[UnitType], one_by_one: bool = True) -> None:
    """Refuse unit types that the architecture cannot lose.

    Args:
        structure: Of the model.
        types: Unit types.
        one_by_one: The model must be an ordinary one after every unit, not at the end alone.

    Raises:
        ValueError: naming the rule and what to use instead.
    """
    if "layer" in types:
        check_layers_removable(structure)
    family = structure.family
    if not one_by_one or not {"attention", "stem"} & set(types):
        return
    if family.heads_span_hidden:
        raise ValueError(
            f"types={tuple(types)}: {family.model_type!r} takes head_dim for hidden_size / num_attention_heads, which "
            "ties its heads to its hidden size, so that they cannot go one by one: use types=('ffn',), ('layer',) or "
            "both, or prune_structured with final sizes as target, num_attention_heads * head_dim = hidden_size"
        )
    if family.heads_divide_hidden and (reason := needs_other_class(structure)):
        raise ValueError(
            f"types={tuple(types)}: {family.model_type!r} wants a hidden size that its heads divide, and {reason}, so "
            f"that it cannot be saved as {family.saved_as!r} in between: use types=('ffn',), ('layer',) or both, or "
            "prune_structured with final sizes as target that divide"
        )


def check_count(
    structure: Structure,
    target: float,
    types: Sequence[UnitType],
    multiples: Mapping[str, int],
    first: Sizes | None = None,
) -> None:
    """Refuse a number of parameters that is below what removing units can reach.

    Args:
        structure: Of the model.
        target: A share of the parameters, or their number.
        types: Unit types that may go.
        multiples: From `check_round_to`.
        first: Sizes to begin with, which a share refers to; default the model's.

    Raises:
        ValueError: saying how many are left at least.
    """
    smallest = structure.sizes if first is None else first
    limit = target_count(target, smallest, structure.shapes())
    unit = structure.attention_unit
    for t in types:
        steps = steps_down(t, smallest, unit, multiples, smallest.units(t, unit))
        smallest = smallest.without(t, max(steps, default=0), unit)
    least = structure.shapes().count(smallest)
    if least > limit:
        raise ValueError(
            f"target={target!r} means {limit:,} parameters, but types={tuple(types)!r} leave at least {least:,}: add "
            "unit types, or choose a larger target"
        )


def _greedy(
    curves: Mapping[UnitType, Tensor], structure: Structure, target: Target, round_to: RoundTo
) -> dict[UnitType, int]:
    check_reachable(structure, target, tuple(curves), round_to)
    assert not isinstance(target, Mapping)
    limit = target_count(target, structure.sizes, structure.shapes())
    multiples, sizes = check_round_to(round_to), structure.sizes
    counts: dict[UnitType, int] = dict.fromkeys(curves, 0)
    while (picked := _pick(curves, counts, sizes, structure, 1, limit, multiples)) is not None:
        unit_type, n, _ = picked
        counts[unit_type] += n
        sizes = sizes.without(unit_type, n, structure.attention_unit)
    return counts


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
