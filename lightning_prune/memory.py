"""Running out of memory while pruning, said with what helps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightning_prune.plan import PruningPlan


@contextmanager
def memory_advice(plan: PruningPlan) -> Iterator[None]:
    """Add to an out-of-memory error what was going on and which settings need less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        advice = ["smaller calibration batches, or shorter samples"]
        aggregates = plan.dense_statistics & {"gradient_l1", "gradient_l2"}
        if aggregates:
            advice.append("gradient_device='cpu' or gradient_dtype='bfloat16' for the gradient aggregates")
        if (plan.updates_weights or "hessian" in plan.dense_statistics) and not plan.sequential:
            advice.append("sequential=True, which holds the Hessians of one block")
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
        raise torch.OutOfMemoryError(
            f"{reason} (while pruning with score={plan.score.name!r}; the weights are as they were). Try "
            + "; ".join(advice)
        ) from error
