"""Remember of a model how it is being retrained: which adapters, which parts, which masks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from torch import nn

from lightning_prune.pruning.targets import RETRAINING as _RECORD


@dataclass(frozen=True)
class Retraining:
    """What `add_adapters` did to a model, kept at the plain model until the merge.

    Attributes:
        adapter: The variant, or None.
        train: Parts of the model trained beside it.
        options: LoRA options, with target_modules as the list of adapted modules.
        trained: Names of the model's own parameters that are trained.
        required_grad: Names of those that required a gradient before.
        input_grads: Whether the embeddings' outputs have been made to require gradients, for re-entrant checkpoints.
    """

    adapter: str | None
    train: tuple[str, ...]
    options: dict[str, Any]
    trained: tuple[str, ...]
    required_grad: frozenset[str] = field(repr=False)
    input_grads: bool = False


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is."""
    if not isinstance(model, PeftModel):
        return model
    plain = model.get_base_model()
    assert isinstance(plain, nn.Module)
    return plain


def find_retraining(model: nn.Module) -> Retraining | None:
    """The record of `add_adapters`, or None."""
    record = unwrapped(model).__dict__.get(_RECORD)
    return record if isinstance(record, Retraining) else None


def retraining_of(model: nn.Module) -> Retraining:
    """The record of `add_adapters`.

    Raises:
        ValueError: the model is none of `add_adapters`.
    """
    record = find_retraining(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} is no model of add_adapters; call model = add_adapters(model) first")
    return record


def remember(model: nn.Module, record: Retraining | None) -> None:
    """Attach the record to a plain model, or remove it."""
    if record is None:
        model.__dict__.pop(_RECORD, None)
    else:
        # Not through nn.Module, which looks every attribute over for parameters.
        model.__dict__[_RECORD] = record
