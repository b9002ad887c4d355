"""Compute shares, and what depends on the step: sparsity, the size of a shrinking model, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any, Literal, Protocol, runtime_checkable

from lightning_prune.errors import check_whole


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


class BuiltInSchedule:
    """What the package's own schedules have in common: files name them by their class alone (``CubicSchedule``)."""


@dataclass(frozen=True)
class OneShot(BuiltInSchedule):
    """Everything at one step.

    Args:
        step: Optimizer steps done before pruning; 0 = at fit start.
    """

    step: int = 0

    def __post_init__(self) -> None:
        check_whole("step", self.step, 0)

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
class LinearSchedule(BuiltInSchedule):
    """Sparsity grows in equal parts, every `every` steps from `start` to `end`.

    Examples:
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
        # A step such as 0.5 * 1001 would never come, and its masks neither.
        whole = all(type(value) is int for value in (self.start, self.end, self.every))
        if not (whole and 0 <= self.start < self.end and self.every >= 1):
            raise ValueError(f"{self!r} needs 0 <= start < end and every >= 1, all of them whole numbers")

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

    Examples:
        >>> CubicSchedule(start=0, end=100, every=10).fraction(50)
        0.875
    """

    exponent = 3


def fraction_at(schedule: Schedule, step: int) -> Fraction:
    """A schedule's fraction at a step, for products that become counts."""
    if isinstance(schedule, LinearSchedule) and type(schedule).fraction is LinearSchedule.fraction:
        return schedule.exact_fraction(step)
    return exact_share(schedule.fraction(step))


def check_schedule(schedule: Schedule | BuiltInSchedule | None) -> Schedule:
    """The schedule, `OneShot` for None.

    Raises:
        TypeError: something else.
    """
    if schedule is None:
        return OneShot()
    if isinstance(schedule, type) or not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule={schedule!r} must be None (one shot at fit start), OneShot(step), LinearSchedule(start, end, "
            "every), CubicSchedule(start, end, every) or ELSA(step)"
        )
    return schedule


Share = float | Fraction
# No share with more decimals than these is written by hand.
_WRITTEN = 12
_RATIO = 10**6


def exact_share(value: Share) -> Fraction:
    """The decimal or ratio that a number is written as.

    Of a float, numpy's included, that is the shortest decimal that stands for it; or, if that has more digits than
    anybody writes, a ratio of small numbers that does.

    >>> exact_share(0.29), exact_share(1 / 3)
    (Fraction(29, 100), Fraction(1, 3))
    """
    if isinstance(value, Fraction):
        return value
    decimal = Fraction(str(value))
    if -int(Decimal(str(value)).as_tuple().exponent) > _WRITTEN:
        ratio = decimal.limit_denominator(_RATIO)
        if float(ratio) == float(value):
            return ratio
    return decimal


def count_of(share: Share, size: int) -> int:
    """How many of `size` things a share is, rounded down; the only place where a share becomes a count.

    >>> count_of(0.29, 100), int(0.29 * 100)
    (29, 28)
    """
    return math.floor(exact_share(share) * size)


def is_share(value: Any) -> bool:
    """Whether a value is a number in [0, 1], numpy's included; True and False are none."""
    return not isinstance(value, bool) and isinstance(value, Real) and 0 <= float(value) <= 1


@dataclass(frozen=True)
class ShrinkSchedule:
    """Pruning every `every` steps: a fixed number of units, or as many as it takes to arrive at `end`.

    Steps are optimizer steps as ``trainer.global_step`` counts them. The first pruning comes `every` steps after
    `start`, since saliency needs gradients first.

    >>> ShrinkSchedule(start=10, every=5).due(15)
    True
    >>> ShrinkSchedule(start=0, end=100, every=10).goal(50, initial=1000, final=500)
    750

    Args:
        start: Step from which saliency is accumulated.
        end: Step of the last pruning, at which the final size is reached; None: `units` at a time until it is.
        every: Steps between prunings (N in the paper). With `end`, the last pruning is at `end` whether or not it
            divides.
        units: Units at a pruning, without `end`.

    Raises:
        ValueError: a value out of range.
    """

    start: int = 0
    end: int | None = None
    every: int = 1
    units: int = 1

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("every", 1), ("units", 1)):
            check_whole(_ARGUMENTS[name], getattr(self, name), least)
        if self.end is not None and (not isinstance(self.end, int) or self.end <= self.start):
            raise ValueError(
                f"end={self.end!r} must be a step after start={self.start}, or None for units_per_pruning units at "
                "each pruning until the target is reached"
            )

    def due(self, step: int) -> bool:
        """Whether units go once `step` optimizer steps are done."""
        if self.end is None:
            return step > self.start and (step - self.start) % self.every == 0
        # Past the end a model that is not small enough (a second fit, another target) catches up.
        return (self._line.updates_at(step) and step > self.start) or step > self.end

    def goal(self, step: int, initial: int, final: int) -> int:
        """Parameters that may be left after the pruning at `step`, with `end`: a straight line down to `final`."""
        if self.end is None:
            return final
        return round(initial - (initial - final) * self._line.fraction(step))

    @property
    def _line(self) -> LinearSchedule:
        assert self.end is not None
        return LinearSchedule(self.start, self.end, self.every)


# Called as in the callback, which is where the values come from.
_ARGUMENTS = {"start": "start", "every": "every_n_steps", "units": "units_per_pruning"}


LearningRateSchedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int = 0, schedule: LearningRateSchedule = "cosine", min_ratio: float = 0.0
) -> float:
    """Share of the peak learning rate at an optimizer step.

    The warm-up is (step + 1) / warmup_steps, so that the first step is not wasted on a rate of zero. After it, with
    p the progress from 0 to 1: linear 1 - p, cosine (1 + cos(pi p)) / 2, both scaled to end at `min_ratio`.

    Args:
        step: Optimizer steps done so far.
        steps: All optimizer steps of the training.
        warmup_steps: Steps of warm-up among them.
        schedule: "constant", "linear" or "cosine".
        min_ratio: Value at the end.

    Returns:
        The factor, in [0, 1].

    Examples:
        >>> [learning_rate_factor(step, 6, 2, "linear") for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    falling = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return min_ratio + (1 - min_ratio) * falling
