"""Run by test_pruning_aware in processes of its own: shrink a small language model, write what each rank ended with.

Usage: shrinking_worker.py DEVICES CASES_JSON, where a case is [folder, settings]; they run one after the other.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lightning_prune import CausalLM, OneShot, PERPRetraining, PruningAwarePretraining, WeightPruning

LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.1,
}  # fmt: skip
MIXTRAL = LLAMA | {
    "model_type": "mixtral", "intermediate_size": 32, "num_local_experts": 7, "num_experts_per_tok": 2,
}  # fmt: skip


def run(out: Path, devices: int, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    settings = dict(settings)
    resume, epochs = settings.pop("resume", None), settings.pop("epochs", 4)
    ddp, trainer_settings = settings.pop("ddp", {}), settings.pop("trainer", {})
    config = MIXTRAL if "expert" in settings.get("types", ()) else LLAMA
    module = CausalLM(config=config, learning_rate=1e-3, weight_decay=0.1, lr_schedule="constant")
    ids = torch.randint(64, (32, 8), generator=torch.Generator().manual_seed(0)).repeat(1, 3)
    samples = [{"input_ids": row} for row in ids]
    # Each rank's own samples, so that together they see in a step what one process would.
    mine = DataLoader(samples[int(os.environ.get("LOCAL_RANK", "0")) :: devices], batch_size=8 // devices)
    beside: list[L.Callback] = []
    if (masks_at := settings.pop("masks_at", None)) is not None:  # 0: before the first step
        masks: dict[str, Any] = {
            "sparsity": None,
            "pattern": "2:4",
            "schedule": OneShot(masks_at) if masks_at else None,
        }
        beside = [PERPRetraining(r=2), WeightPruning("magnitude", **masks, progress=False)]
    callback = PruningAwarePretraining(**settings)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, max_epochs=epochs, logger=False, use_distributed_sampler=False,
        strategy=DDPStrategy(process_group_backend="gloo", **ddp) if devices > 1 else "auto",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[*beside, callback, ModelCheckpoint(dirpath=out, filename="{epoch}", save_top_k=-1)],
        **trainer_settings,
    )  # fmt: skip
    trainer.fit(module, mine, ckpt_path=resume)
    save_file(
        {n: p.detach().clone().contiguous() for n, p in module.named_parameters()},
        out / f"rank{trainer.global_rank}.safetensors",
    )
    history = [record.to_dict() for record in callback.history]
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(history), encoding="utf-8")
