"""The masks that are stored in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_prune.checkpoints import Checkpoint, CheckpointError, fail
from lightning_prune.masks import unpack_masks
from lightning_prune.targets import clean_name


class StoredMasks:
    """The masks that `WeightPruning` callbacks left in a checkpoint, unpacked one at a time.

    Attributes:
        score: Name of the score that made them; of several callbacks, all names.
        settings: What else each callback says of how it pruned, in plain values.
        uncounted: Names of embeddings that their names do not show to be such; see `lightning_prune.coverage`.
    """

    def __init__(
        self,
        path: Path,
        packed: dict[str, Any],
        score: str | None,
        settings: list[dict[str, Any]] | None = None,
        uncounted: frozenset[str] = frozenset(),
    ) -> None:
        self._path = path
        self._packed = packed
        self.score = score
        self.settings = settings or []
        self.uncounted = uncounted

    @property
    def names(self) -> set[str]:
        """Names of the masks."""
        return set(self._packed)

    @property
    def count(self) -> int:
        """Number of masks."""
        return len(self._packed)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredMasks | None:
        """The masks of all `WeightPruning` callbacks, or None without such a callback."""
        states = [
            state for key, state in checkpoint.callbacks.items() if str(key).startswith("WeightPruning") and state
        ]
        if not states:
            return None
        packed: dict[str, Any] = {}
        for state in states:
            masks = state.get("masks") if isinstance(state, Mapping) else None
            if not isinstance(masks, Mapping):
                fail(checkpoint.path, "the state of its WeightPruning callback holds no masks; it is damaged")
            packed.update(masks)
        scores = dict.fromkeys(str(state["score"]) for state in states if state.get("score"))
        settings = [dict(s) for state in states if isinstance(s := state.get("settings"), Mapping)]
        uncounted = frozenset(
            name
            for state in states
            if isinstance(names := state.get("uncounted"), (list, tuple))
            for name in names
            if isinstance(name, str)
        )
        return cls(checkpoint.path, packed, ", ".join(scores) or None, settings, uncounted)

    def counts(self, name: str) -> bool:
        """Whether a tensor may count as a weight that a user would prune: it is not known to be an embedding."""
        return clean_name(name) not in self.uncounted

    def masks(self) -> dict[str, Tensor]:
        """All masks, unpacked, by the names they are stored under.

        Raises:
            CheckpointError: a mask is damaged.
        """
        try:
            return unpack_masks(self._packed)
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {error}") from error

    def find(self, name: str) -> str | None:
        """Name of a tensor's mask, or None. Masks may be named from further inside the model than the tensor."""
        parts = clean_name(name).split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        return next((tail for tail in tails if tail in self._packed), None)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of a tensor, or None.

        Raises:
            CheckpointError: the mask is damaged, or not of this shape.
        """
        found = self.find(name)
        if found is None:
            return None
        try:
            mask = unpack_masks({found: self._packed[found]})[found]
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        if tuple(mask.shape) != shape:
            fail(self._path, f"{name!r} has shape {shape}, its mask {tuple(mask.shape)}")
        return mask
