"""Errors that the package raises beside ValueError and TypeError, and what all errors have in common."""

from __future__ import annotations

from typing import Any


class ExportError(ValueError):
    """A checkpoint cannot be read or exported as it was asked for; nothing has been changed."""


class CalibrationError(RuntimeError):
    """Calibration could not give usable statistics; the model is as it was."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read: missing, damaged, of an unknown format, or not safe to open."""


class ResultsError(ValueError):
    """A file holds no measurements."""


def first_line(error: BaseException) -> str:
    """What an error says first, or its type."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def check_whole(name: str, value: Any, least: int = 1, hint: str = "") -> None:
    """Refuse what is no whole number, or a smaller one.

    Args:
        name: Of the argument.
        value: What was given; a bool is no number.
        least: The smallest that is accepted.
        hint: Put behind the message.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{hint}")
