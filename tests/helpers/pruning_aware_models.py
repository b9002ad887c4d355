"""A small language model, its data and a Trainer, for the tests of `PruningAwarePretraining`."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from tiny import make_tokens
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, PruningAwarePretraining

SMALL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.1,
    "tie_word_embeddings": True,
}  # fmt: skip


def make_module(seed: int = 0, config: dict[str, Any] | None = None, **changes: Any) -> CausalLM:
    torch.manual_seed(seed)
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "lr_schedule": "constant"}
    return CausalLM(config=config or SMALL, **{**settings, **changes})


def batches(batch_size: int = 4, samples: int = 64) -> DataLoader:
    """Sequences that repeat, so that there is something to learn."""
    ids = make_tokens(samples, 8, vocab=64).repeat(1, 2)
    return DataLoader([{"input_ids": row} for row in ids], batch_size=batch_size)


def make_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    defaults = {
        "accelerator": "cpu", "devices": 1, "max_steps": 12, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def fit(callback: PruningAwarePretraining, module: Any = None, *others: L.Callback, **settings: Any) -> Any:
    module = make_module() if module is None else module
    make_trainer(callback, *others, **settings).fit(module, batches())
    return module


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}
