"""`hold_masks` in the loops of others: resumed from their own checkpoints, on one process and on two."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from forking import on_ranks
from launching import free_port
from tiny import make_llama, make_tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_prune import HoldMasksCallback, hold_masks, prune
from lightning_prune.sharding import gather_whole

BATCHES = [{"input_ids": make_tokens(4, 12, seed=seed)} for seed in range(4)]


def pruned(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    model = make_llama(seed)
    return model, prune(model, BATCHES[:1], score="magnitude", sparsity=0.5, progress=False)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def part_of(batches: Iterable[dict[str, Tensor]], rank: int, ranks: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch["input_ids"].chunk(ranks)[rank]} for batch in batches]


def fabric_loop(folder: Path, way: str, rank: int = 0, ranks: int = 1, resumed: bool = False) -> nn.Module:
    """Two steps, a checkpoint, two steps more; or the latter alone."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy

    def shard(module: nn.Module, mesh: Any) -> nn.Module:
        for layer in module.model.layers:
            fully_shard(layer, mesh=mesh["data_parallel"])
        return fully_shard(module, mesh=mesh["data_parallel"])

    sharded = ModelParallelStrategy(shard, save_distributed_checkpoint=False)
    strategies = {"one": "auto", "ddp": DDPStrategy(), "fsdp2": sharded}
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategies[way], precision="bf16-mixed")
    fabric.launch()
    plain, masks = pruned(seed=9 if resumed else 0)
    model = fabric.setup_module(plain)
    optimizer = fabric.setup_optimizers(optimizer_of(model))  # of parameters that are sharded by now
    hold = hold_masks(model, masks, optimizer)
    state = {"model": model, "optimizer": optimizer, "hold": hold}
    if resumed:
        fabric.load(folder / "fabric", state)
    batches = part_of(BATCHES, rank, ranks)
    for step, batch in enumerate(batches[2:] if resumed else batches):
        if step == 2:
            fabric.save(folder / "fabric", state)
        fabric.backward(model(**batch, labels=batch["input_ids"]).loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    return plain


def accelerate_loop(folder: Path, way: str, rank: int = 0, ranks: int = 1, resumed: bool = False) -> nn.Module:
    """The same; accelerate shards on GPUs alone."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # of an Accelerator that an earlier test of this process has made
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain, masks = pruned(seed=9 if resumed else 0)
    model, optimizer = accelerator.prepare(plain, optimizer_of(plain))
    hold = hold_masks(model, masks, optimizer)
    accelerator.register_for_checkpointing(hold)
    if resumed:
        accelerator.load_state(str(folder / "accelerate"))
    batches = part_of(BATCHES, rank, ranks)
    for step, batch in enumerate(batches[2:] if resumed else batches):
        if step == 2:
            accelerator.save_state(str(folder / "accelerate"))
        accelerator.backward(model(**batch, labels=batch["input_ids"]).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def trainer_loop(folder: Path, way: str, rank: int = 0, ranks: int = 1, resumed: bool = False) -> nn.Module:
    """The same in transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    plain, masks = pruned(seed=9 if resumed else 0)
    rows = [{"input_ids": row, "labels": row} for batch in BATCHES for row in batch["input_ids"]]
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4 // ranks, "learning_rate": 1e-2}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True}
    args = TrainingArguments(str(folder / "trainer"), **settings, **quiet)
    callback = HoldMasksCallback(None if resumed else masks)
    trainer = Trainer(plain, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=str(folder / "trainer" / "checkpoint-2") if resumed else None)
    return plain


LOOPS = {"fabric": fabric_loop, "accelerate": accelerate_loop, "trainer": trainer_loop}


def assert_held(model: nn.Module) -> None:
    for name, mask in pruned()[1].items():
        weight = gather_whole(model.get_parameter(name).detach())
        assert bool((weight[~mask] == 0).all()), name
        assert bool((weight[mask] != 0).all()), name


@pytest.mark.few_fast(1)
@pytest.mark.parametrize("loop", LOOPS)
def test_resumed_training_is_the_uninterrupted_one(loop: str, tmp_path: Path) -> None:
    model = LOOPS[loop](tmp_path, "one")
    assert_held(model)
    again = LOOPS[loop](tmp_path, "one", resumed=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def _on_each_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "NODE_RANK": "0"}
    for loop, way in (("fabric", "ddp"), ("fabric", "fsdp2"), ("accelerate", "ddp"), ("trainer", "ddp")):
        own = Path(folder, way)
        own.mkdir(exist_ok=True)
        model = LOOPS[loop](own, way, rank, 2)
        assert any(isinstance(p, DTensor) for p in model.parameters()) == (way == "fsdp2")
        assert_held(model)
        again = LOOPS[loop](own, way, rank, 2, resumed=True)
        assert_held(again)
        # Of shards Fabric brings back other weights than it saved, without masks too.
        for one, other in zip(model.parameters(), again.parameters(), strict=True) if way == "ddp" else ():
            assert torch.equal(one, other), (loop, way)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    on_ranks(2, _on_each_rank, free_port(), str(tmp_path))
