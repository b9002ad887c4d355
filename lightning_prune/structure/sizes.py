"""Sizes of a model: how many parameters they make, and which sizes a target stands for. Arithmetic only.

Letters: h query heads, k key/value heads, e dimensions of a head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from lightning_prune.schedules import count_of

UnitType = Literal["attention", "ffn", "hidden", "layer", "expert"]
UNIT_TYPES: tuple[UnitType, ...] = ("attention", "ffn", "hidden", "layer", "expert")
IN_LAYERS: tuple[UnitType, ...] = ("attention", "ffn", "expert")
"""Types of which every layer has units of its own."""
AttentionUnit = Literal["group", "head"]
ATTENTION_UNITS: tuple[AttentionUnit, ...] = ("group", "head")

SIZE_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "num_hidden_layers",
    "num_experts",
)
Goal = float | int | Mapping[str, Any]
"""A share of all parameters (float), their number (int), final sizes by name, or what a device allows:
``{"bytes": B}`` or ``{"seconds_per_token": S, "batch": N}`` (`lightning_prune.structure.device_goals`)."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder, named as transformers' configurations name them; 0 for what a family does not have.

    The size of an attention unit depends on what a unit is: ``"group"``, one key/value head with all the query heads
    it serves, or ``"head"``, one query head of every group.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    num_hidden_layers: int
    head_dim: int
    num_experts: int = 0
    num_experts_per_tok: int = 0

    @property
    def queries_per_group(self) -> int:
        """Query heads that share a key/value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def axis(self, axis: str) -> int:
        """Length of an axis of `lightning_prune.structure.families`."""
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        attention = {"q": q, "kv": kv, "qkv": q + 2 * kv, "heads": q + 2 * kv}
        ffn = {"f": self.intermediate_size, "ff": 2 * self.intermediate_size}
        return {"d": self.hidden_size, "x": self.num_experts, **attention, **ffn}[axis]

    def units(self, unit_type: str, attention_unit: AttentionUnit = "group") -> int:
        """Number of units of a type (in every layer, for those of `IN_LAYERS`)."""
        return {
            "attention": self.num_key_value_heads if attention_unit == "group" else self.queries_per_group,
            "ffn": self.intermediate_size,
            "hidden": self.hidden_size,
            "layer": self.num_hidden_layers,
            "expert": self.num_experts,
        }[unit_type]

    def least(self, unit_type: str) -> int:
        """How many units of a type have to stay: one, and as many experts as a token is sent to."""
        return self.num_experts_per_tok if unit_type == "expert" else 1

    def without(self, unit_type: str, count: int, attention_unit: AttentionUnit = "group") -> Sizes:
        """Sizes after the removal of `count` units (of every layer, for those of `IN_LAYERS`)."""
        if unit_type == "attention" and attention_unit == "group":
            return replace(
                self,
                num_attention_heads=self.num_attention_heads - count * self.queries_per_group,
                num_key_value_heads=self.num_key_value_heads - count,
            )
        if unit_type == "attention":
            return replace(self, num_attention_heads=self.num_attention_heads - count * self.num_key_value_heads)
        names = {"ffn": "intermediate_size", "hidden": "hidden_size", "layer": "num_hidden_layers"}
        name = {**names, "expert": "num_experts"}[unit_type]
        return replace(self, **{name: getattr(self, name) - count})

    def as_dict(self) -> dict[str, int]:
        """Sizes by name; those of experts where there are any."""
        return {name: size for name, size in asdict(self).items() if size or "experts" not in name}


@dataclass(frozen=True)
class Shapes:
    """Parameters of a model as products of sizes: what a parameter count needs.

    Attributes:
        inside: Axes of every parameter of a layer; a number where a dimension never shrinks.
        outside: Those of the others; a tied parameter once.
    """

    inside: tuple[tuple[str | int, ...], ...]
    outside: tuple[tuple[str | int, ...], ...]

    def count(self, sizes: Sizes) -> int:
        """Number of parameters of a model of these sizes."""

        def numel(axes: tuple[str | int, ...]) -> int:
            return math.prod(a if isinstance(a, int) else sizes.axis(a) for a in axes)

        return sizes.num_hidden_layers * sum(map(numel, self.inside)) + sum(map(numel, self.outside))


def check_types(types: Collection[str]) -> tuple[UnitType, ...]:
    """Unit types in their fixed order.

    Raises:
        TypeError: a bare string, or no sequence.
        ValueError: none, or an unknown one.
    """
    if isinstance(types, str):
        raise TypeError(f"types must be a sequence, got the string {types!r}; write types=({types!r},)")
    if not isinstance(types, Collection):
        raise TypeError(f"types={types!r} must be several of {', '.join(map(repr, UNIT_TYPES))}")
    unknown = [t for t in types if t not in UNIT_TYPES]
    if unknown or not types:
        raise ValueError(f"types={types!r} must be one or more of {', '.join(map(repr, UNIT_TYPES))}")
    return tuple(t for t in UNIT_TYPES if t in types)


def goal_count(target: Goal, sizes: Sizes, shapes: Shapes) -> int:
    """The number of parameters that a float or int target allows.

    Args:
        target: Share of the present parameters to keep, in (0, 1]; or a number of parameters.
        sizes: Present sizes.
        shapes: Of the model.

    Raises:
        ValueError: out of range.
    """
    total = shapes.count(sizes)
    if isinstance(target, float):
        if not 0.0 < target <= 1.0:
            raise ValueError(
                f"target={target!r} as a float is the share of all parameters to keep, in (0, 1]; for a number of "
                "parameters give an int"
            )
        return count_of(target, total)
    if isinstance(target, bool) or not isinstance(target, int):
        raise ValueError(
            f"target={target!r} must be a float (share), an int (parameters) or a mapping of sizes, bytes or seconds"
        )
    if not 1 < target <= total:
        raise ValueError(
            f"target={target} as an int is the number of parameters to end with, in [2, {total}] (the model has "
            f"{total}); for a share of them give a float"
        )
    return target


def goal_sizes(target: Mapping[str, int], sizes: Sizes, attention_unit: AttentionUnit | None = None) -> Sizes:
    """Final sizes of a mapping target.

    Args:
        target: Any of ``hidden_size``, ``intermediate_size``, ``num_attention_heads``, ``num_key_value_heads``,
            ``num_hidden_layers``, ``num_experts``. Of the two kinds of heads, one alone fixes the other: in groups, if
            their ratio can stay, with attention units of ``"group"``.
        sizes: Present sizes.
        attention_unit: Default: what the target needs.

    Raises:
        ValueError: an unknown name, a size that is out of range, or heads that no removal of units leads to.
    """
    if unknown := set(target) - set(SIZE_NAMES):
        raise ValueError(f"target has the sizes {sorted(unknown)}; known are {', '.join(SIZE_NAMES)}")
    for name, value in target.items():
        now = getattr(sizes, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= now:
            raise ValueError(f"target[{name!r}]={value!r} must be an int in [1, {now}], the size the model has")
    if target.get("num_experts", sizes.num_experts) < sizes.num_experts_per_tok:
        raise ValueError(
            f"target['num_experts']={target['num_experts']} is less than the {sizes.num_experts_per_tok} experts that "
            "every token is sent to (num_experts_per_tok)"
        )
    wanted = replace(sizes, **target)
    ratio = sizes.queries_per_group
    if "num_key_value_heads" in target and "num_attention_heads" not in target:
        wanted = replace(wanted, num_attention_heads=wanted.num_key_value_heads * ratio)
    elif "num_attention_heads" in target and "num_key_value_heads" not in target and attention_unit != "head":
        groups, rest = divmod(wanted.num_attention_heads, ratio)
        if not rest:
            wanted = replace(wanted, num_key_value_heads=groups)
    unit = unit_of_heads(sizes, wanted)
    if unit is None or (attention_unit is not None and unit != attention_unit and _heads(sizes) != _heads(wanted)):
        raise ValueError(
            f"no removal of attention units leads from {_heads(sizes)} to {_heads(wanted)} query and key/value heads: "
            f"remove whole groups ({ratio} query heads with their key/value head; attention_unit='group'), or the same "
            "number of query heads of every group (attention_unit='head')"
        )
    return wanted


def unit_of_heads(sizes: Sizes, wanted: Sizes) -> AttentionUnit | None:
    """The attention unit whose removal leads from one number of heads to another; None if neither does."""
    if wanted.num_attention_heads == wanted.num_key_value_heads * sizes.queries_per_group:
        return "group"
    if wanted.num_key_value_heads == sizes.num_key_value_heads:
        return "head" if wanted.num_attention_heads % sizes.num_key_value_heads == 0 else None
    return None


def units_to_remove(sizes: Sizes, wanted: Sizes, attention_unit: AttentionUnit) -> dict[UnitType, int]:
    """How many units of each type lead from one set of sizes to another; those with none left out."""
    counts = {t: sizes.units(t, attention_unit) - wanted.units(t, attention_unit) for t in UNIT_TYPES}
    return {t: n for t, n in counts.items() if n}


def _heads(sizes: Sizes) -> tuple[int, int]:
    return sizes.num_attention_heads, sizes.num_key_value_heads
