"""Schedules: pure functions from the training step to the sparsity wanted at it."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol, runtime_checkable

from lightning_prune.shares import exact_share


@runtime_checkable
class Schedule(Protocol):
    """When masks change during training, and to which share of the final sparsity.

    Steps are optimizer steps as ``trainer.global_step`` counts them.
    """

    @property
    def start(self) -> int:
        """First step at which weights are pruned (0: before training)."""
        ...

    @property
    def end(self) -> int:
        """Step from which the sparsity is final."""
        ...

    def updates_at(self, step: int) -> bool:
        """Whether masks are computed anew once `step` optimizer steps are done."""
        ...

    def fraction(self, step: int) -> float:
        """Share of the final sparsity reached at `step`: from 0 to exactly 1."""
        ...


@dataclass(frozen=True)
class OneShot:
    """Everything at one step.

    Args:
        step: Optimizer steps done before pruning; 0 = at fit start.
    """

    step: int = 0

    def __post_init__(self) -> None:
        if self.step < 0:
            raise ValueError(f"step={self.step} must be >= 0")

    @property
    def start(self) -> int:
        """The step."""
        return self.step

    @property
    def end(self) -> int:
        """The step."""
        return self.step

    def updates_at(self, step: int) -> bool:
        """True at the step alone."""
        return step == self.step

    def fraction(self, step: int) -> float:
        """0 before the step, then 1."""
        return float(step >= self.step)


@dataclass(frozen=True)
class LinearSchedule:
    """Sparsity grows in equal parts, every `every` steps from `start` to `end`.

    >>> LinearSchedule(start=0, end=100, every=10).fraction(50)
    0.5

    Args:
        start: Step of the first update.
        end: Step of the last one, at which the sparsity is final.
        every: Steps between updates; the last update is at `end` whether or not it divides.
    """

    start: int
    end: int
    every: int = 1
    exponent = 1

    def __post_init__(self) -> None:
        if not (0 <= self.start < self.end and self.every >= 1):
            raise ValueError(f"{self!r} needs 0 <= start < end and every >= 1")

    def updates_at(self, step: int) -> bool:
        """True at start, start + every, ... and at end."""
        return step == self.end or (self.start <= step < self.end and (step - self.start) % self.every == 0)

    def fraction(self, step: int) -> float:
        """``1 - (1 - t)^exponent`` with t from 0 at start to 1 at end."""
        return float(self.exact_fraction(step))

    def exact_fraction(self, step: int) -> Fraction:
        """`fraction` without rounding, so that no count falls below what the formula gives."""
        left = Fraction(min(max(self.end - step, 0), self.end - self.start), self.end - self.start)  # 1 - t
        return 1 - left**self.exponent


@dataclass(frozen=True)
class CubicSchedule(LinearSchedule):
    """Sparsity grows fast, then ever slower: ``s * (1 - (1 - t)^3)`` (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1).

    >>> CubicSchedule(start=0, end=100, every=10).fraction(50)
    0.875
    """

    exponent = 3


def fraction_at(schedule: Schedule, step: int) -> Fraction:
    """A schedule's fraction at a step, for products that become counts."""
    if isinstance(schedule, LinearSchedule) and type(schedule).fraction is LinearSchedule.fraction:
        return schedule.exact_fraction(step)
    return exact_share(schedule.fraction(step))


def check_schedule(schedule: Schedule | None) -> Schedule:
    """The schedule, `OneShot` for None.

    Raises:
        TypeError: something else.
    """
    if schedule is None:
        return OneShot()
    if isinstance(schedule, type) or not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule={schedule!r} must be None (one shot at fit start), OneShot(step), LinearSchedule(start, end, "
            "every) or CubicSchedule(start, end, every)"
        )
    return schedule
