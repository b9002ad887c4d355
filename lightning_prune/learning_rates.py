"""Learning rates over the steps of a training: pure functions."""

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int = 0, schedule: Schedule = "cosine", min_ratio: float = 0.0
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

    Example:
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
