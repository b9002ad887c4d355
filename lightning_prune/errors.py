"""Errors that the package raises beside ValueError and TypeError, and what all errors have in common."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy


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


def check_bool(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: a word like "no" would count as true.

    Args:
        name: Of the argument.
        value: What was given.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def check_model(model: Any, loss_fn: Any = None) -> None:
    """Refuse what is no module, and a loss function that cannot be called.

    Raises:
        TypeError: naming the argument.
    """
    if not isinstance(model, nn.Module):
        hint = ", which AutoModelForCausalLM.from_pretrained(...) loads" if isinstance(model, (str, PathLike)) else ""
        kind = type(model).__name__
        raise TypeError(f"model={model!r:.80} of type {kind} is no model: pass a torch.nn.Module{hint}")
    if loss_fn is not None and not callable(loss_fn):
        kind = type(loss_fn).__name__
        raise TypeError(
            f"loss_fn={loss_fn!r:.80} of type {kind} cannot be called: pass a function, loss_fn(model, batch), or none"
        )


def refuse_inference_tensors(parameters: Iterable[tuple[str, Any]], frozen: bool = True) -> None:
    """Refuse parameters that torch.inference_mode has made: they can have no gradient, nor be changed in place.

    Args:
        parameters: By name.
        frozen: Whether those that require no gradient are in the way too, as they are of a backward pass.

    Raises:
        ValueError: naming the first of them.
    """
    for name, parameter in parameters:
        if not is_lazy(parameter) and parameter.is_inference() and (frozen or parameter.requires_grad):
            raise ValueError(
                f"{name!r} was made under torch.inference_mode, outside of which it can neither be changed nor "
                "trained: build or load the model outside of that mode (torch.no_grad does no harm), or take "
                "copy.deepcopy(model) outside of it"
            )
