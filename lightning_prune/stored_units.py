"""The units that are masked in a checkpoint, and not yet sliced off."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_prune.checkpoints import Checkpoint, fail
from lightning_prune.structure.masked_units import MaskedUnits
from lightning_prune.structure.sizes import ATTENTION_UNITS


def stored_units(checkpoint: Checkpoint) -> MaskedUnits | None:
    """The units that a `PruningAwarePretraining` callback had masked when it was saved; None where there are none.

    Raises:
        CheckpointError: the callback's state is damaged.
    """
    for key, state in checkpoint.callbacks.items():
        if not str(key).startswith("PruningAwarePretraining") or not state:
            continue
        try:
            pending, unit = state["shrinking"]["pending"], state["settings"]["attention_unit"]
        except (KeyError, TypeError):
            fail(checkpoint.path, "the state of its PruningAwarePretraining callback names no units; it is damaged")
        if unit not in ATTENTION_UNITS or not isinstance(pending, Mapping):
            fail(checkpoint.path, "the state of its PruningAwarePretraining callback is damaged")
        if not all(isinstance(t, Tensor) for places in pending.values() for t in places):
            fail(checkpoint.path, "the units of its PruningAwarePretraining callback are damaged")
        if pending:
            return MaskedUnits({str(t): list(places) for t, places in pending.items()}, unit)
    return None
