"""A module of a user's own and a Trainer for PERP, small."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import make_tokens
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, WeightPruning

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.1,
}


GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "initializer_range": 0.1,
}


def make_module(config: dict[str, Any] = LLAMA, seed: int = 0, **kwargs: Any) -> CausalLM:
    L.seed_everything(seed, verbose=False)
    return CausalLM(config=config, learning_rate=1e-2, lr_schedule="constant", **kwargs)


def loader(samples: int = 24) -> DataLoader:
    # A pattern that can be learnt: each sample counts up by its own step.
    start, step = make_tokens(samples, 1, 64), 1 + make_tokens(samples, 1, 3, seed=2)
    ids = (start + step * torch.arange(12)) % 64
    return DataLoader([{"input_ids": row} for row in ids], batch_size=4)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
        self.values.append(outputs["loss"].item())


def make_trainer(path: Any, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    defaults = {
        "default_root_dir": path,
        "max_epochs": 3,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    return L.Trainer(**{**defaults, **kwargs}, callbacks=list(callbacks))


def pruning(**kwargs: Any) -> WeightPruning:
    return WeightPruning(**{"score": "magnitude", "sparsity": 0.5, "num_samples": 8, "progress": False, **kwargs})
