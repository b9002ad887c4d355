"""What happened while a model shrank: one record a pruning, in plain values that a checkpoint can hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ShrinkRecord:
    """The model after a pruning; the first record of a history is the model before the first one.

    Attributes:
        step: Optimizer steps done.
        tokens: Training tokens seen by all processes.
        parameters: Parameters left.
        units: Units left of each type, in one layer (stem, layer: in the model).
        saliency: Mean saliency of the weights of each type's cheapest unit, as compared at this pruning.
    """

    step: int
    tokens: int
    parameters: int
    units: dict[str, int]
    saliency: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ShrinkRecord:
        """The record of `to_dict`."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def pruned_ratios(record: ShrinkRecord, first: ShrinkRecord) -> dict[str, float]:
    """Share of each type's units that have gone since `first`."""
    return {kind: 1 - left / first.units[kind] for kind, left in record.units.items()}
