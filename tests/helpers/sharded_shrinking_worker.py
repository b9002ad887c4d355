"""Run by test_pruning_aware_sharded in processes of its own: shrink a small Llama as shards, write what is left.

Usage: sharded_shrinking_worker.py DEVICES CASES_JSON, where a case is [folder, strategy, settings]; they run one after
the other.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from shrinking_worker import LLAMA
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from versions import WeightAveraging
from worker import STRATEGIES

from lightning_prune import CausalLM, PruningAwarePretraining
from lightning_prune.sharding import gather_whole, has_sharded_parameters, local, take_shard
from lightning_prune.structure import save_plain

PROBE = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(1))
HEAD_DIM, GROUPS = LLAMA["hidden_size"] // LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"]


def lost(name: str, shape: torch.Size, units: dict[str, list[Tensor]], unit: str = "group") -> Tensor:
    """Bool of a parameter's shape, True where pruned units lie: of Llama, written out; of GPT-2 the FFN alone."""
    gone, parts = torch.zeros(shape, dtype=torch.bool), name.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    if layer is not None and "layer" in units and layer in units["layer"][0].tolist():
        return torch.ones(shape, dtype=torch.bool)
    if layer is not None and "attention" in units and unit == "head":
        for head in units["attention"][layer].tolist():
            if "q_proj" in parts:
                gone.view(GROUPS, -1, HEAD_DIM, shape[1])[:, head] = True
            elif "o_proj" in parts:
                gone.view(shape[0], GROUPS, -1, HEAD_DIM)[:, :, head] = True
    elif layer is not None and "attention" in units:
        for group in units["attention"][layer].tolist():
            if "q_proj" in parts:
                gone.view(GROUPS, -1, shape[1])[group] = True
            elif "k_proj" in parts or "v_proj" in parts:
                gone[group * HEAD_DIM : (group + 1) * HEAD_DIM] = True
            elif "o_proj" in parts:
                gone.view(shape[0], GROUPS, -1)[:, group] = True
    if layer is not None and "ffn" in units:
        if "gate_proj" in parts or "up_proj" in parts:
            gone[units["ffn"][layer]] = True
        elif "down_proj" in parts and len(shape) == 2:
            gone[:, units["ffn"][layer]] = True
        elif "c_fc" in parts:
            gone[..., units["ffn"][layer]] = True
        elif "mlp" in parts and len(shape) == 2:
            gone[units["ffn"][layer]] = True
    if "hidden" in units:
        if "o_proj" in parts or "down_proj" in parts or len(shape) == 1:
            gone[units["hidden"][0]] = True
        else:
            gone[:, units["hidden"][0]] = True
    return gone


class Hybrid(CausalLM):
    """Shards within pairs of ranks, copies between them."""

    def configure_model(self) -> None:
        mesh = init_device_mesh("cpu", (2, self.trainer.world_size // 2), mesh_dim_names=("replicate", "shard"))
        for block in self.model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Watch(L.Callback):
    """After every step: what is pruned is zero, in weights and optimizer states, in every rank's part."""

    def __init__(self, callback: PruningAwarePretraining, leave_gathered: bool) -> None:
        self.callback, self.leave_gathered, self.masked = callback, leave_gathered, 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        pending = self.callback._shrinking.pending
        states = trainer.optimizers[0].state
        for name, p in pl_module.named_parameters():
            gone = lost(name, p.shape, pending, self.callback.attention_unit)
            here = take_shard(p, gone)
            for tensor in (p.detach(), *(s for s in states[p].values() if s.dim())) if p in states else (p.detach(),):
                assert local(tensor).shape == here.shape, name
                assert not local(tensor).view(torch.int32)[here].any(), name
            self.masked += int(gone.sum())
        if self.leave_gathered:  # FSDP2 lets no parameter go after a forward pass without a backward
            logits_of(pl_module)


@torch.no_grad()
def logits_of(module: Any) -> Tensor:
    logits: Tensor = module.model(PROBE, use_cache=False).logits
    return logits.float().clone()


def run(out: Path, devices: int, strategy: str, settings: dict[str, Any]) -> None:
    """Fit, and write to ``out/rankN``: the whole weights, logits, the history; to ``out/model`` what is saved."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    settings = dict(settings)
    refused, again, alone = settings.pop("refused", None), settings.pop("again", None), settings.pop("alone", False)
    resume, epochs, averaged = settings.pop("resume", None), settings.pop("epochs", 4), settings.pop("averaged", False)
    trainer_settings, leave_gathered = settings.pop("trainer", {}), settings.pop("leave_gathered", False)
    options = {"learning_rate": 1e-3, "weight_decay": 0.1, "lr_schedule": "constant", **settings.pop("module", {})}
    torch.manual_seed(settings.pop("initial", 0))
    config = settings.pop("config", {})
    module = (Hybrid if strategy == "hsdp" else CausalLM)(
        config=config if "model_type" in config else {**LLAMA, **config}, **options
    )
    if settings.pop("distilled", False):
        settings["distill_from"] = copy.deepcopy(module.model)
    ids = torch.randint(64, (32, 8), generator=torch.Generator().manual_seed(0)).repeat(1, 3)
    samples = [{"input_ids": row} for row in ids]
    # Each rank's own samples, so that together they see in a step what one process would.
    mine = DataLoader(samples[int(os.environ.get("LOCAL_RANK", "0")) :: devices], batch_size=8 // devices)
    callback = PruningAwarePretraining(**settings)
    watch = Watch(callback, leave_gathered)

    def make_trainer(epochs: int, *others: L.Callback, checkpoints: bool = True) -> L.Trainer:
        save = [ModelCheckpoint(dirpath=out, filename="{epoch}", save_top_k=-1)] if checkpoints else []
        return L.Trainer(
            accelerator="cpu", devices=devices, max_epochs=epochs, logger=False, use_distributed_sampler=False,
            strategy=STRATEGIES[strategy](), enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=out, callbacks=[*others, *save], enable_checkpointing=checkpoints, **trainer_settings,
        )  # fmt: skip

    if refused is not None:
        average = [WeightAveraging()] if averaged else []
        with pytest.raises(ValueError, match=r".+") as error:
            make_trainer(1, callback, *average, checkpoints=False).fit(module, mine, ckpt_path=resume)
        (out / f"rank{os.environ.get('LOCAL_RANK', '0')}.txt").write_text(str(error.value))
        return
    trainer = make_trainer(epochs, *([] if alone else [callback, watch]))
    trainer.fit(module, mine, ckpt_path=resume)
    if again is not None:
        other = PruningAwarePretraining(0.5)
        if has_sharded_parameters(module):
            with pytest.raises(ValueError, match="another PruningAwarePretraining has masked"):
                make_trainer(1, other, checkpoints=False).fit(module, mine)
        trainer = make_trainer(again, callback, watch, checkpoints=False)
        trainer.fit(module, mine)
    module.save_pretrained(out / "model")
    if has_sharded_parameters(module):
        save_plain(module, out / "plain")
    state = {n: gather_whole(p.detach()).clone().contiguous() for n, p in module.named_parameters()}
    state |= {"logits": logits_of(module), "masked": torch.tensor(watch.masked)}
    save_file(state, out / f"rank{trainer.global_rank}.safetensors")
    history = [record.to_dict() for record in callback.history]
    (out / f"rank{trainer.global_rank}.json").write_text(json.dumps(history), encoding="utf-8")
