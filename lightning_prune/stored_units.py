"""The units that are masked in a checkpoint, and not yet sliced off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_prune.checkpoints import Checkpoint, CheckpointError
from lightning_prune.stored_bytes import is_stored_whole
from lightning_prune.structure.masked_units import MaskedUnits
from lightning_prune.structure.sizes import ATTENTION_UNITS

_CALLBACK = "PruningAwarePretraining"


def stored_units(checkpoint: Checkpoint) -> MaskedUnits | None:
    """The units that a `PruningAwarePretraining` callback had masked when it was saved; None where there are none.

    Raises:
        CheckpointError: the callback's state is damaged.
    """
    try:
        return units_in(checkpoint.callbacks)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def units_in(callbacks: Mapping[str, Any], sharded: bool = False) -> MaskedUnits | None:
    """`stored_units` of the states of callbacks.

    Args:
        callbacks: States by key, as in a Lightning checkpoint.
        sharded: Only of a callback whose model was sharded, where units stay masked to the end.

    Raises:
        ValueError: the callback's state is damaged.
    """
    for key, state in callbacks.items():
        if not str(key).startswith(_CALLBACK) or not state:
            continue
        try:
            pending, unit = state["shrinking"]["pending"], state["settings"]["attention_unit"]
            whole = all(isinstance(t, Tensor) and is_stored_whole(t) for places in pending.values() for t in places)
            counts = bool(state.get("sharded")) or not sharded
        except (KeyError, TypeError, AttributeError):
            pending, unit, whole, counts = {}, None, False, False
        if not whole or unit not in ATTENTION_UNITS:
            raise ValueError(f"the state of its {_CALLBACK} callback is damaged: it does not say what is masked")
        if pending and counts:
            return MaskedUnits({str(t): list(places) for t, places in pending.items()}, unit)
    return None
