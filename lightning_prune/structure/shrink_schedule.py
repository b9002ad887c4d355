"""When a model that shrinks while it trains gives up units, and how many: pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.schedules import LinearSchedule


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
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{_ARGUMENTS[name]}={value!r} must be a whole number of at least {least}")
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
