"""Run by the tests in processes of their own: fit a small language model, write what each rank ended with.

Usage: worker.py OUT DEVICES STRATEGY SETTINGS_JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_prune import CubicSchedule, WeightPruning
from lightning_prune.losses import causal_lm_losses

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "ddp_static_graph": lambda: DDPStrategy(process_group_backend="gloo", static_graph=True),
    "ddp_bucket_view": lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
    "ddp_find_unused": lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
}


class Tokens(Dataset):
    """Random token sequences that repeat, so that there is something to learn; some are padded."""

    def __init__(self, n: int = 48) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 64, (n, 8), generator=generator).repeat(1, 3)
        self.mask = torch.ones_like(self.ids)
        self.mask[::3, -5:] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index]}


class Model(L.LightningModule):
    def __init__(self, fail_on_rank: int | None = None) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )  # fmt: skip
        self.fail_on_rank = fail_on_rank
        self.model = LlamaForCausalLM(config)

    def calibration_loss(self, batch: Any) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses = causal_lm_losses(self.model(**batch).logits, labels)
        return losses * float("nan") if self.global_rank == self.fail_on_rank else losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = self.model(**batch, labels=labels).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Tokens(), batch_size=4)


def run(out: Path, devices: int, strategy: str, settings: dict[str, Any]) -> None:
    """Fit, and write masks and weights of this rank to ``out/rankN.safetensors``."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    settings = dict(settings)
    module = Model(settings.pop("fail_on_rank", None))
    if settings.pop("checkpointing", False):
        module.model.gradient_checkpointing_enable()
    schedule = CubicSchedule(0, 4, 2) if settings.pop("gradual", False) else None
    resume, max_steps = settings.pop("resume", None), settings.pop("max_steps", 4)
    trainer_settings = settings.pop("trainer", {})
    pruning = WeightPruning(**{"num_samples": 16, "progress": False, "schedule": schedule, **settings})
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=STRATEGIES[strategy](), max_steps=max_steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[pruning, ModelCheckpoint(dirpath=out, filename="end")], **trainer_settings,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    state = {f"mask.{n}": m.to(torch.uint8) for n, m in pruning.masks.items()}
    state |= {f"weight.{n}": p.detach().clone().contiguous() for n, p in module.named_parameters()}
    save_file(state, out / f"rank{trainer.global_rank}.safetensors")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
