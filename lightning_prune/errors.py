"""Errors that the package raises beside ValueError and TypeError."""

from __future__ import annotations


class ExportError(ValueError):
    """A checkpoint cannot be read or exported as it was asked for; nothing has been changed."""


class CalibrationError(RuntimeError):
    """Calibration could not give usable statistics; the model is as it was."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read: missing, damaged, of an unknown format, or not safe to open."""


class ResultsError(ValueError):
    """A file holds no measurements."""
