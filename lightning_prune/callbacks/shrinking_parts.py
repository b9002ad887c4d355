"""What `PruningAwarePretraining` asks of a Trainer, a batch and a source model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch.distributed as dist
from torch import Tensor, nn

from lightning_prune.batches import padding_mask
from lightning_prune.structure.history import ShrinkRecord, pruned_ratios
from lightning_prune.structure.shrinking import Shrinking
from lightning_prune.structure.units import find_language_model


def metrics(record: ShrinkRecord, shrinking: Shrinking) -> dict[str, float]:
    """What a logger gets of a pruning."""
    sizes = {f"shrink/{name}": value for name, value in shrinking.sizes.as_dict().items() if name != "head_dim"}
    saliency = {f"shrink/saliency_{t}": value for t, value in record.saliency.items()}
    pruned = {f"shrink/pruned_{t}": value for t, value in pruned_ratios(record, shrinking.history[0]).items()}
    return {"shrink/parameters": record.parameters, "shrink/tokens": record.tokens, **sizes, **saliency, **pruned}


def agree_of(trainer: L.Trainer) -> Callable[[Tensor], None] | None:
    """Makes a CPU tensor that of rank 0, so that no rounding lets ranks choose differently."""
    if trainer.world_size == 1:
        return None
    device = trainer.strategy.root_device

    def agree(values: Tensor) -> None:
        shared = values.to(device)
        dist.broadcast(shared, 0)
        values.copy_(shared)

    return agree


def sum_of(trainer: L.Trainer) -> Callable[[Tensor], Tensor] | None:
    """Sums a tensor over processes; None where there is one."""
    if trainer.world_size == 1:
        return None

    def total(values: Tensor) -> Tensor:
        dist.all_reduce(values)
        return values

    return total


def count_tokens(batch: Any) -> int:
    """Tokens of a batch: of ``input_ids``, or of the first tensor, without padding."""
    if (mask := padding_mask(batch)) is not None:
        return int(mask.sum())
    if isinstance(batch, Mapping):
        batch = batch.get("input_ids", next((v for v in batch.values() if isinstance(v, Tensor)), None))
    elif isinstance(batch, (list, tuple)):
        batch = next((v for v in batch if isinstance(v, Tensor)), None)
    return batch.numel() if isinstance(batch, Tensor) else 0


def load_source(source: str | nn.Module, module: L.LightningModule) -> nn.Module:
    """The source model of distillation, checked against the module's.

    Raises:
        ValueError: another vocabulary, or the very model that shrinks.
    """
    from lightning_prune.pretrained import load_pretrained

    model: nn.Module = source if isinstance(source, nn.Module) else load_pretrained(source)
    _, student = find_language_model(module)
    mine, theirs = student.config.vocab_size, getattr(getattr(model, "config", None), "vocab_size", None)  # type: ignore[union-attr]
    if mine != theirs:
        raise ValueError(
            f"distill_from: the source has a vocabulary of {theirs}, the model one of {mine}; use the model it began as"
        )
    if next(model.parameters()) is next(student.parameters()):
        raise ValueError(
            "distill_from is the model that shrinks: pass a copy of it (copy.deepcopy), or where to load it"
        )
    return model
