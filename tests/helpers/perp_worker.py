"""Run by test_perp_ddp in processes of its own: prune, retrain and merge under DDP, write what each rank ended with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, LinearSchedule, WeightPruning
from lightning_prune.callbacks.perp_retraining import PERPRetraining

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1,
}  # fmt: skip


def run(out: Path, devices: int, case: str = "one shot") -> None:
    L.seed_everything(0, verbose=False)
    module = CausalLM(config=LLAMA, learning_rate=1e-2, lr_schedule="constant")
    ids = torch.randint(64, (16, 12), generator=torch.Generator().manual_seed(1))
    samples = [{"input_ids": row} for row in ids]
    # Each rank's own samples, so that together they see in a step what one process would.
    mine = DataLoader(samples[int(os.environ.get("LOCAL_RANK", "0")) :: devices], batch_size=4 // devices)
    calibration = DataLoader(samples, batch_size=1)
    pruner = WeightPruning(score="gblm", sparsity=0.5, num_samples=8, progress=False, calibration=calibration)
    if case == "schedule":
        pruner = WeightPruning(
            score="magnitude", sparsity=0.5, schedule=LinearSchedule(0, 4, 2), progress=False
        )  # fmt: skip
    calibrating = {"learning_rate": 1e-2, "num_samples": 16, "calibration": DataLoader(samples, batch_size=4)}
    options: dict[str, Any] = {}
    if case == "reconstruct":
        options = {"reconstruct": {"steps": 6, **calibrating}}
    elif case == "kept weights":
        options = {"reconstruct": {"train": "all", "epochs": 3, **calibrating}}
    elif case == "distilled":
        L.seed_everything(3, verbose=False)
        options = {"distill_from": CausalLM(config=LLAMA).model, "adapt_head": True}
    perp = PERPRetraining(**options)
    trainer = L.Trainer(
        default_root_dir=out, accelerator="cpu", devices=devices, max_steps=6, logger=False,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto", enable_checkpointing=False,
        use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[perp, pruner],
    )  # fmt: skip
    trainer.fit(module, mine)
    assert type(module.model).__name__ == "LlamaForCausalLM"
    state = {f"weight.{n}": p.detach().clone() for n, p in module.named_parameters()}
    if perp.reconstruction is not None:
        state["errors"] = torch.tensor([[b.before, b.after] for b in perp.reconstruction.blocks])
    state |= {f"mask.{n}": mask for n, mask in pruner.masks.items()}
    save_file(state, out / f"{case}-{devices}-{trainer.global_rank}.safetensors")
