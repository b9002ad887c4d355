"""Several nodes: two torchrun agents on this machine, from the command line to a plain folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import Launched, free_port, launch_command
from tiny import TINY, clean_environment
from transformers import AutoModelForCausalLM

from lightning_prune.checkpoints.inspection import inspect
from lightning_prune.cli import main
from lightning_prune.text.data import EMBEDDED

pytestmark = pytest.mark.distributed

TEXT = EMBEDDED["austen"].read_text(encoding="utf-8")[20_000:60_000]


def torchrun(recipe: Path) -> Launched:
    """Two agents with one process each."""
    launcher, program = (str(Path(sys.executable).with_name(name)) for name in ("torchrun", "lightning-prune"))
    assert shutil.which(launcher)
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    port = str(free_port())
    agents = [
        subprocess.Popen(
            [
                launcher, "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node),
                "--master-addr", "127.0.0.1", "--master-port", port, "--no-python",
                program, "fit", "--config", str(recipe),
            ],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        outputs = [agent.communicate(timeout=300)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return Launched(max(abs(agent.returncode) for agent in agents), "".join(outputs))


def model_parallel(data: int, tensor: int) -> dict[str, Any]:
    sizes = {"data_parallel_size": data, "tensor_parallel_size": tensor}
    return {"class_path": "ModelParallelStrategy", "init_args": sizes}


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("ddp", 1), (model_parallel(2, 1), 1), (model_parallel(1, 2), 1), (model_parallel(2, 2), 2)],
    ids=["ddp", "fsdp2", "tp", "2d"],
)
def test_two_nodes_train_and_export_one_folder(strategy: str | dict[str, Any], devices: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = {
        "seed_everything": 0,
        "model": {"class_path": "CausalLM", "init_args": {"config": TINY}},
        "data": {
            "class_path": "TextDataModule",
            "init_args": {"source": str(tmp_path / "text.txt"), "block_size": 32, "batch_size": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "num_nodes": 2,
            "strategy": strategy,
            "max_steps": 2,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path / "run"),
            "callbacks": [{"class_path": "WeightPruning", "init_args": {"score": "gblm", "num_samples": 8}}],
        },
    }
    config["data"]["init_args"] |= {"vocab_size": TINY["vocab_size"], "cache_dir": str(tmp_path / "cache")}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config), encoding="utf-8")

    # One by the real launcher, which starts Python anew for each process.
    fork = strategy != "ddp"
    done = launch_command(2, devices, ["fit", "--config", str(recipe)]) if fork else torchrun(recipe)
    assert done.returncode == 0, done.stderr[-6000:]

    (checkpoint,) = (tmp_path / "run").rglob("*.ckpt")
    assert checkpoint.is_dir() == (strategy != "ddp")
    assert main(["export", str(checkpoint), str(tmp_path / "model")]) == 0
    inspection = inspect(tmp_path / "model", progress=False)
    assert inspection.sparsity == pytest.approx(0.5, abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
