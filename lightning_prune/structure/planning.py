"""Decide which units go next, and which goals can be reached at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_prune.pruning.running import model_device
from lightning_prune.structure.device_goals import (
    Latency,
    LatencyTable,
    check_device_goal,
    default_multiples,
    is_latency,
    latency_of,
    names_sizes,
    parameters_in,
)
from lightning_prune.structure.sizes import (
    IN_LAYERS,
    SIZE_NAMES,
    AttentionUnit,
    Goal,
    Shapes,
    Sizes,
    UnitType,
    check_types,
    goal_count,
    goal_sizes,
    unit_of_heads,
    units_to_remove,
)
from lightning_prune.structure.units import (
    Removal,
    Structure,
    check_layers_removable,
    check_removal,
    check_sizes,
    check_unit_types,
    needs_other_class,
)

RoundTo = int | Mapping[str, int]
_SIZES_OF = {
    "attention": ("num_attention_heads", "num_key_value_heads"),
    "ffn": ("intermediate_size",),
    "hidden": ("hidden_size",),
    "layer": ("num_hidden_layers",),
    "expert": ("num_experts",),
}


def check_round_to(round_to: RoundTo) -> dict[str, int]:
    """Return multiples by size; an int is for hidden_size and intermediate_size.

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


@dataclass(frozen=True)
class Planner:
    """Choose units, the cheapest first, until a model has the size that is wanted.

    Attributes:
        types: Unit types that may go.
        shapes: Of the model.
        attention_unit: ``"group"`` or ``"head"``.
        multiples: Of sizes, which shrink from one multiple to the next, from the first unit of the type on.
        first: Sizes before the first unit goes.
        final: What to end with, as `cost` counts it.
        final_sizes: Sizes to end with, where the goal names sizes.
        blocks: Units of a type that go together, side by side, as N:M masks need it; 1 where it is not there.
        latency: What sizes cost, where the goal is a time; otherwise they cost their parameters.
    """

    types: tuple[UnitType, ...]
    shapes: Shapes
    attention_unit: AttentionUnit
    multiples: Mapping[str, int]
    first: Sizes
    final: int
    final_sizes: Sizes | None = None
    blocks: Mapping[UnitType, int] = field(default_factory=dict)
    latency: Latency | None = None

    def parameters(self, sizes: Sizes) -> int:
        """Return the number of parameters of a model of these sizes."""
        return self.shapes.count(sizes)

    def changing_sizes(self) -> list[str]:
        """Return the names of the sizes that are to shrink, or may."""
        names = [name for t in self.types for name in _SIZES_OF[t]]
        final = self.final_sizes
        return [name for name in names if final is None or getattr(final, name) != getattr(self.first, name)]

    def cost(self, sizes: Sizes) -> int:
        """Return what the goal limits: parameters, or nanoseconds of a step."""
        return self.parameters(sizes) if self.latency is None else _nanoseconds(self.latency.seconds(sizes))

    def without(self, sizes: Sizes, unit_type: UnitType, count: int) -> Sizes:
        """Return the sizes after the removal of units."""
        return sizes.without(unit_type, count, self.attention_unit)

    def unit_weights(self, unit_type: UnitType, sizes: Sizes) -> int:
        """Count the weights of one unit: in one layer for types of `IN_LAYERS`, in the model for others."""
        lost = self.parameters(sizes) - self.parameters(self.without(sizes, unit_type, 1))
        return lost // sizes.num_hidden_layers if unit_type in IN_LAYERS else lost

    def weights_saving(self, unit_type: UnitType, sizes: Sizes) -> float:
        """Return how many weights of a type go for one of what the goal limits; infinite where that saves nothing.

        Of a time in the mean over all of the type that may go, since a single unit's share of it is noise.
        """
        if self.latency is None:
            return 1.0
        least = self.least([unit_type], sizes)
        saved = self.cost(sizes) - self.cost(least)
        return (self.parameters(sizes) - self.parameters(least)) / saved if saved > 0 else float("inf")

    def least(self, types: Sequence[UnitType], sizes: Sizes) -> Sizes:
        """Return the sizes when all has gone of some types that may go."""
        for t in types:
            sizes = self.without(sizes, t, max(self.steps_down(t, sizes), default=0))
        return sizes

    def steps_down(self, unit_type: UnitType, sizes: Sizes) -> Iterator[int]:
        """Yield how many units of a type may go, ascending: those that lead to a multiple; see `Sizes.least`."""
        for count in range(1, sizes.units(unit_type, self.attention_unit) - sizes.least(unit_type) + 1):
            after = self.without(sizes, unit_type, count)
            if all(getattr(after, name) % self.multiples.get(name, 1) == 0 for name in _SIZES_OF[unit_type]):
                yield count

    def next_units(self, unit_type: UnitType, sizes: Sizes) -> int:
        """Return how many units go together next (in every layer, for `IN_LAYERS`); 0 where none may."""
        count = next(self.steps_down(unit_type, sizes), 0)
        floor = 1 if self.final_sizes is None else self.final_sizes.units(unit_type, self.attention_unit)
        return count if sizes.units(unit_type, self.attention_unit) - count >= floor else 0

    def reached(self, sizes: Sizes) -> bool:
        """Return whether nothing more is to go."""
        small = self.final_sizes is None and self.cost(sizes) <= self.final
        return small or not any(self.next_units(t, sizes) for t in self.types)

    def choose(
        self,
        saliency: Mapping[UnitType, Tensor],
        sizes: Sizes,
        units: int | None = None,
        down_to: int | None = None,
        absent: Sequence[int] = (),
    ) -> tuple[Removal, dict[str, float]]:
        """Choose the type whose cheapest unit has the lowest saliency, and that unit of every place, again and again.

        Attention and FFN units compare by the mean over layers of each layer's own cheapest. Where the goal is a time,
        types compare by what they lose for the time they save, and one that saves none stays. A type whose next units
        would lead below the goal is passed over while others fit that can reach it; if none fits, the one that ends
        nearest goes.
        Equal units go in the order of their indices, equal types in that of `types`.

        Args:
            saliency: Mean over a unit's weights, ``[P, U]`` by type; infinite for units that are gone already.
            sizes: Of the model without those.
            units: How many to choose at most; None for no limit.
            down_to: Cost to stop at, if it is above the goal's.
            absent: Layers that are gone, whose units are not compared.

        Returns:
            Units by type, sorted; and the saliency of each type's cheapest before the first was chosen.
        """
        queues = {t: _Queue(saliency[t], absent, self.blocks.get(t, 1)) for t in self.types}
        compared: dict[str, float] = {}
        prices = {t: p for t in self.types if (p := self.weights_saving(t, sizes)) < float("inf")}
        taken = 0
        while not self.reached(sizes) and taken != units and not (down_to and self.cost(sizes) <= down_to):
            counts = {t: n for t in prices if (n := self.next_units(t, sizes))}
            if not counts:
                break
            costs = {t: queues[t].cost(n) for t, n in counts.items()}
            compared = compared or {str(t): cost for t, cost in costs.items()}
            costs = {t: cost * prices[t] for t, cost in costs.items()}
            after = {t: self.cost(self.without(sizes, t, n)) for t, n in counts.items()}
            fitting = [t for t in counts if self.final_sizes is not None or after[t] >= self.final]
            if fitting and len(fitting) < len(counts) and self.cost(self.least(fitting, sizes)) > self.final:
                fitting = list(counts)  # those that fit would all go, and not be enough
            if fitting:
                chosen = min(fitting, key=lambda t: costs[t])
            else:
                chosen = min(counts, key=lambda t: (-after[t], costs[t]))
            queues[chosen].taken += counts[chosen]
            sizes = self.without(sizes, chosen, counts[chosen])
            taken += 1
        return {t: queue.units() for t, queue in queues.items() if queue.taken}, compared


@dataclass
class _Queue:
    """The units of one type, the cheapest of each place first."""

    saliency: Tensor  # [P, U]
    absent: Sequence[int]
    block: int = 1
    taken: int = 0
    order: Tensor = field(init=False)  # [P, U]
    means: Tensor = field(init=False)  # [U], over places

    def __post_init__(self) -> None:
        places, units = self.saliency.shape
        blocks = self.saliency.view(places, units // self.block, self.block).mean(2, keepdim=True)
        values, self.order = blocks.expand(-1, -1, self.block).reshape(places, units).sort(dim=1, stable=True)
        present = [i for i in range(places) if i not in self.absent]
        self.means = (values[present] if places > 1 else values).mean(0)

    def cost(self, count: int) -> float:
        return float(self.means[self.taken : self.taken + count].mean())

    def units(self) -> list[Tensor]:
        return [order[: self.taken].sort().values for order in self.order]


def make_planner(
    structure: Structure,
    goal: Goal,
    types: Sequence[str],
    round_to: RoundTo | None = None,
    first: Sizes | None = None,
    one_by_one: bool = True,
    blocks: Mapping[UnitType, int] | None = None,
    table: LatencyTable | None = None,
) -> Planner:
    """Check a goal against a model.

    Args:
        structure: Of the model.
        goal: A share of the parameters, their number, final sizes by name, or what a device allows, see `Goal`.
        types: Unit types that may go.
        round_to: Multiples, see `check_round_to`. None: those of `default_multiples` for the model's device.
        first: Sizes that a share refers to; default the model's.
        one_by_one: Whether the model must be an ordinary one after every unit, not at the end alone.
        blocks: See `Planner`; multiples have to be such of them.
        table: Of latencies, for a goal that is a time; measured now if it is not given.

    Raises:
        ValueError: a goal that cannot be reached with these types, whatever the saliencies, or types that this
            architecture cannot lose.
    """
    checked = check_types(types)
    check_device_goal(goal)
    multiples = multiples_of(round_to, structure, goal)
    _check_removable(structure, checked, one_by_one)
    shapes, unit = structure.shapes(), structure.attention_unit
    first = structure.sizes if first is None else first
    if unit == "head" and "attention" in checked and first.queries_per_group == 1:  # not: there is one left
        raise ValueError(
            f"attention_unit='head' needs several query heads a key/value head, here are {first.num_attention_heads} "
            "of both; use 'group', which is one head then"
        )
    sizes = latency = None
    if isinstance(goal, Mapping) and is_latency(goal):
        latency, final = latency_of(structure, goal, table), _nanoseconds(goal["seconds_per_token"])
    elif isinstance(goal, Mapping) and names_sizes(goal):
        sizes = goal_sizes(goal, first, unit)
        final = shapes.count(sizes)
    else:
        final = goal_count(parameters_in(goal, structure, first), first, shapes)
    planner = Planner(checked, shapes, unit, multiples, first, final, sizes, blocks or {}, latency)
    if sizes is not None:
        _check_sizes(planner, structure, sizes)
    else:
        _check_count(planner, goal)
    return planner


def multiples_of(round_to: RoundTo | None, structure: Structure, goal: Goal) -> dict[str, int]:
    """Return multiples by size; None stands for `default_multiples` of the model's device."""
    if round_to is not None:
        return check_round_to(round_to)
    return default_multiples(structure, goal, model_device(structure.model))


def plan_removal(
    saliencies: Mapping[str, Tensor], structure: Structure, planner: Planner, down_to: int | None = None
) -> Removal:
    """Choose all units to remove at once to reach a goal, from saliencies that do not change on the way.

    Args:
        saliencies: Mean over a unit's weights, ``[P, U]`` by type.
        structure: Of the model.
        planner: With its goal; the model has to be an ordinary one at the end alone.
        down_to: Cost to stop at, see `Planner.choose`.

    Raises:
        ValueError: saliencies of another shape, or not finite.
    """
    values = {t: _checked(saliencies[t], t, structure) for t in planner.types}
    return check_removal(structure, planner.choose(values, structure.sizes, down_to=down_to)[0])


def _checked(saliency: Tensor, unit_type: str, structure: Structure) -> Tensor:
    wanted = (structure.places(unit_type), structure.units(unit_type))
    if tuple(saliency.shape) != wanted:
        raise ValueError(f"saliencies[{unit_type!r}] have shape {tuple(saliency.shape)}, the model's units {wanted}")
    values = saliency.detach().cpu().double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"saliencies[{unit_type!r}] hold NaN or infinity; check the data and the precision")
    return values


def attention_unit_of(goal: Goal, sizes: Sizes, default: AttentionUnit) -> AttentionUnit:
    """Return the attention unit that a mapping of sizes needs; the default where any will do."""
    if not isinstance(goal, Mapping) or not set(_SIZES_OF["attention"]) & set(goal):
        return default
    wanted = goal_sizes(goal, sizes)
    changed = wanted.num_attention_heads != sizes.num_attention_heads
    return (unit_of_heads(sizes, wanted) or default) if changed else default


def _check_removable(structure: Structure, types: Sequence[UnitType], one_by_one: bool) -> None:
    check_unit_types(structure, types)
    if "layer" in types:
        check_layers_removable(structure)
    family = structure.family
    if not one_by_one or not {"attention", "hidden"} & set(types):
        return
    if family.heads_span_hidden:
        raise ValueError(
            f"types={tuple(types)}: {family.model_type!r} takes head_dim for hidden_size / num_attention_heads, which "
            "ties its heads to its hidden size, so that they cannot go one by one: use types=('ffn',), ('layer',) or "
            "both, or prune_structured in one round with final sizes as target, num_attention_heads * head_dim = "
            "hidden_size"
        )
    if family.heads_divide_hidden and (reason := needs_other_class(structure)):
        raise ValueError(
            f"types={tuple(types)}: {family.model_type!r} wants a hidden size that its heads divide, and {reason}, so "
            "that it cannot be saved as another family in between: use types=('ffn',), ('layer',) or both, or "
            "prune_structured in one round with final sizes as target that divide"
        )
    for unit_type in {"attention", "hidden"} & set(types):
        fewer = structure.sizes.without(unit_type, 1, structure.attention_unit)
        if min(fewer.num_attention_heads, fewer.hidden_size) > 0:  # the last one stays
            check_sizes(structure, fewer)


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


def _check_count(planner: Planner, goal: Goal) -> None:
    least = planner.cost(planner.least(planner.types, planner.first))
    if planner.latency is not None and (now := planner.cost(planner.first)) <= planner.final:
        raise ValueError(
            f"target={goal!r}: the model takes {now / 1e9:.3g} seconds already, which is no more; give fewer"
        )
    if planner.latency is not None and least > planner.final:
        raise ValueError(
            f"target={goal!r}, but types={planner.types!r} leave at least {least / 1e9:.3g} seconds per token on this "
            "device: add unit types ('layer' saves most), or choose a larger target"
        )
    if least > planner.final:
        raise ValueError(
            f"target={goal!r} means {planner.final:,} parameters, but types={planner.types!r} leave at least "
            f"{least:,}: add unit types, or choose a larger target"
        )


def _check_sizes(planner: Planner, structure: Structure, final: Sizes) -> None:
    check_sizes(structure, final)
    for unit_type, count in units_to_remove(planner.first, final, planner.attention_unit).items():
        if unit_type not in planner.types:
            raise ValueError(
                f"the target's sizes take {count} units of {unit_type!r}, which is not in types={planner.types}; add it"
            )
        for name in _SIZES_OF[unit_type]:
            size, multiple = getattr(final, name), planner.multiples.get(name, 1)
            if size % multiple:
                raise ValueError(
                    f"target[{name!r}]={size} is no multiple of round_to={multiple}; take one, or round_to=1"
                )
