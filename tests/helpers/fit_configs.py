"""A configuration of `lightning-prune fit` that takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from tiny import TINY


def fit_config(folder: Path, **changes: Any) -> str:
    """What ``fit`` reads: one step of magnitude pruning."""
    content: dict[str, Any] = {
        "model": {"init_args": {"config": TINY, "lr_schedule": "constant"} | changes.get("model", {})},
        "data": {
            "init_args": {"source": str(folder / "t.txt"), "vocab_size": 320, "block_size": 16}
            | {"cache_dir": str(folder / "cache")}
            | changes.get("data", {})
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 1, "logger": False, "limit_val_batches": 0, "enable_progress_bar": False,
            "enable_model_summary": False, "enable_checkpointing": False,
            "callbacks": [
                {
                    "class_path": "WeightPruning",
                    "init_args": {"score": "magnitude", "progress": False} | changes.get("pruning", {}),
                }
            ],
        },
    }  # fmt: skip
    file = folder / "fit.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)
