"""Recognize Lightning's own classes by name, in `lightning` and in `pytorch_lightning`.

The two packages hold the same code as different classes, so a Trainer of the one has none of the other's strategies;
and a version may lack a class that later ones have.
"""

from __future__ import annotations

from typing import Any

import lightning as L

_PACKAGES = ("lightning.", "pytorch_lightning.", "lightning_fabric.")


def is_kind(value: object, *names: str) -> bool:
    """Return whether an object is of one of Lightning's classes of these names, or of a class made from one."""
    return any(c.__name__ in names and c.__module__.startswith(_PACKAGES) for c in type(value).__mro__)


def has_own(value: object, hook: str) -> bool:
    """Return whether a module or data module has a hook of its own, in place of Lightning's."""
    home = next((c for c in type(value).__mro__ if hook in vars(c)), None)
    return hook in vars(value) or (home is not None and not home.__module__.startswith(_PACKAGES))


def callbacks_of(trainer: L.Trainer) -> list[Any]:
    """Return the callbacks of a Trainer, in its order; Lightning declares no type for the attribute."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def start_method(strategy: object) -> str | None:
    """Return how a strategy starts processes that live for one fit, of which the weights alone come back; else None."""
    method: str = getattr(strategy, "_start_method", "popen")
    return None if method == "popen" else method
