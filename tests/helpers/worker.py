"""Run by the tests in processes of their own: fit small language models, write what each rank ended with.

Usage: worker.py DEVICES CASES_JSON, where a case is [folder, strategy, settings]; they run one after the other.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from attention_models import TorchCausalLM
from convolution_models import make_short_convolution
from experts_models import make_moe
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_prune import ALPS, ELSA, CausalLM, CubicSchedule, SparsityMonitor, WeightPruning, apply_masks, prune
from lightning_prune.pruning.running import causal_lm_losses
from lightning_prune.sharding import gather_whole, local

STRATEGIES = {
    "single": lambda: "auto",
    "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
    "ddp_static_graph": lambda: DDPStrategy(process_group_backend="gloo", static_graph=True),
    "ddp_bucket_view": lambda: DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=True),
    "ddp_find_unused": lambda: DDPStrategy(process_group_backend="gloo", find_unused_parameters=True),
    "ddp_forkserver": lambda: DDPStrategy(process_group_backend="gloo", start_method="forkserver"),
    "fsdp2": lambda: sharded("auto", 1),
    "fsdp2_full_checkpoint": lambda: sharded("auto", 1, save_distributed_checkpoint=False),
    "tp": lambda: sharded(1, "auto"),
    "tp_full_checkpoint": lambda: sharded(1, "auto", save_distributed_checkpoint=False),
    "2d": lambda: sharded(2, 2),
    "2d_full_checkpoint": lambda: sharded(2, 2, save_distributed_checkpoint=False),
    "hsdp": lambda: sharded("auto", 1),
}
SHARDED = [name for name in STRATEGIES if name != "single" and not name.startswith("ddp")]
LLAMA = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "use_cache": False,
}  # fmt: skip
_MODEL_SETTINGS = ("fail_on_rank", "family", "intermediate_size", "two_optimizers", "compiled")
COLWISE, ROWWISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def sharded(data: int | str, tensor: int | str, **settings: Any) -> ModelParallelStrategy:
    class Strategy(ModelParallelStrategy):
        def setup_environment(self) -> None:
            # "auto" means nodes and devices of a node; here the sizes follow from the number of processes.
            if data == "auto":
                self._data_parallel_size = self.num_processes
            super().setup_environment()

    return Strategy(
        data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo",
        timeout=timedelta(seconds=100), **settings,
    )  # fmt: skip


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


class Functional(L.Callback):
    """`prune` without the callback: on the sharded model, with this rank's share of the samples."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.masks = settings, {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ranks, tokens = trainer.world_size, Tokens()
        batches = [{k: v[None] for k, v in tokens[i].items()} for i in range(trainer.global_rank, 16, ranks)]
        found = prune(pl_module.model, batches, num_samples=len(batches), progress=False, **self.settings)
        self.masks = {f"model.{name}": mask for name, mask in found.items()}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        apply_masks(pl_module, self.masks)


class ReadAlone(L.Callback):
    """Rank 0 alone reads what every rank may read alone; a collective in it would wait for the others."""

    def __init__(self, pruning: WeightPruning) -> None:
        self.pruning, self.read = pruning, []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            copied = copy.deepcopy(self.pruning)
            assert copied.sparsity == self.pruning.sparsity
            self.read.append((self.pruning.sparsity, self.pruning.finished))

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            assert abs(self.read[-1][0] - 0.5) < 0.01, self.read
            assert self.read[-1][1], self.read


class Model(L.LightningModule):
    def __init__(
        self,
        fail_on_rank: int | None = None,
        parallel: dict[str, Any] | None = None,
        family: str = "llama",
        intermediate_size: int = 64,
        two_optimizers: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = not two_optimizers
        self.fail_on_rank, self.parallel, self.compiled, self.placed = fail_on_rank, parallel, compiled, False
        if family == "gpt2":
            gpt2 = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4)
            self.model = GPT2LMHeadModel(gpt2)
            return
        if family in ("mixtral", "gpt_oss"):
            self.model = make_moe(family).float().train()
            return
        if family == "lfm2":  # a short convolution and attention
            self.model = make_short_convolution().train()
            return
        if family == "attention":
            self.model = TorchCausalLM()
            return
        fields = {**LLAMA, "intermediate_size": intermediate_size}
        fields.pop("model_type")
        self.model = LlamaForCausalLM(LlamaConfig(**fields))

    def configure_model(self) -> None:
        if self.placed or (self.parallel is None and not self.compiled):
            return
        self.placed = True
        blocks = self.model.transformer.h if hasattr(self.model, "transformer") else self.model.model.layers
        if self.parallel is not None:
            self._shard(blocks, dict(self.parallel))
        elif self.compiled:
            for block in blocks:
                block.compile(backend="aot_eager")

    def _shard(self, blocks: Any, options: dict[str, Any]) -> None:
        root_only, replicas = options.pop("root_only", False), options.pop("replicas", 1)
        if options.pop("bf16", False):
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if (dim := options.pop("expert_dim", None)) is not None:
            options["shard_placement_fn"] = lambda p: Shard(dim) if p.dim() == 3 else None
        if options.pop("offload", False):
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        mesh, data = self.device_mesh, self.device_mesh["data_parallel"]
        if replicas > 1:  # hybrid: shards within a group of ranks, copies between groups
            data = init_device_mesh("cpu", (replicas, data.size() // replicas), mesh_dim_names=("replicate", "shard"))
        for block in blocks:
            if mesh["tensor_parallel"].size() > 1:
                plan = {n: ColwiseParallel() for n, _ in block.named_modules() if n.endswith(COLWISE)}
                plan |= {n: RowwiseParallel() for n, _ in block.named_modules() if n.endswith(ROWWISE)}
                parallelize_module(block, mesh["tensor_parallel"], plan)
            if self.compiled:
                block.compile(backend="aot_eager")
            if not root_only:
                fully_shard(block, mesh=data, **options)
        fully_shard(self.model, mesh=data, **options)

    def calibration_loss(self, batch: Any) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        losses = causal_lm_losses(self.model(**batch).logits, labels)
        return losses * float("nan") if self.global_rank == self.fail_on_rank else losses

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = self.model(**batch, labels=labels).loss
        self.log("loss", loss)
        if not self.automatic_optimization:
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        if self.automatic_optimization:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.1)
        first = list(self.model.model.layers[0].parameters())
        rest = [p for p in self.parameters() if all(p is not q for q in first)]
        return [torch.optim.AdamW(first, lr=1e-3, weight_decay=0.1), torch.optim.SGD(rest, lr=1e-3, momentum=0.9)]


def run(out: Path, devices: int, strategy: str, settings: dict[str, Any]) -> None:
    """Fit, and write masks and weights (whole) and the size of each mask's part here to ``out/rankN.safetensors``."""
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    settings = dict(settings)
    model_settings = {k: settings.pop(k) for k in _MODEL_SETTINGS if k in settings}
    parallel = settings.pop("parallel", {})
    if settings.pop("causal_lm", False):
        module: Any = CausalLM(config=LLAMA, learning_rate=1e-3, weight_decay=0.1, lr_schedule="constant")
    else:
        module = Model(parallel=parallel if strategy in SHARDED else None, **model_settings)
    if settings.pop("checkpointing", False):
        module.model.gradient_checkpointing_enable()
    schedule: Any = CubicSchedule(0, 4, 2) if settings.pop("gradual", False) else None
    if (steps := settings.pop("elsa", None)) is not None:
        schedule = ELSA(*steps, penalty=1.0)
    twice, with_monitor = settings.pop("twice", False), settings.pop("monitor", False)
    read_alone = settings.pop("read_alone", False)
    if (iterations := settings.pop("iterations", None)) is not None:
        settings["update"] = ALPS(iterations=iterations)
    resume, max_steps, saved = settings.pop("resume", None), settings.pop("max_steps", 4), settings.pop("saved", True)
    trainer_settings = settings.pop("trainer", {})
    share = settings.pop("calibration_batches", None)  # fewer batches than ranks leave one without any
    calibration = None if share is None else list(DataLoader(Tokens(), batch_size=4))[:share]
    if settings.pop("functional", False):
        pruning: Any = Functional(settings)
    else:
        common = {"num_samples": 16, "progress": False, "schedule": schedule, "calibration": calibration}
        pruning = WeightPruning(**{**common, **settings})
    monitor = [SparsityMonitor(every_n_steps=2)] if with_monitor else []
    alone = [ReadAlone(pruning)] if read_alone else []
    save = [ModelCheckpoint(dirpath=out, filename="end")] if saved else []
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=STRATEGIES[strategy](), max_steps=max_steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        callbacks=[*monitor, pruning, *alone, *save], enable_checkpointing=saved, **trainer_settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(Tokens(), batch_size=4), ckpt_path=resume)
    if strategy == "ddp_forkserver":  # only the weights come back from the processes
        state = {f"weight.{n}": p.detach().clone() for n, p in module.named_parameters()}
        save_file(state, out / "rank0.safetensors")
        return
    if twice:
        trainer = L.Trainer(
            accelerator="cpu", devices=devices, strategy=STRATEGIES[strategy](), max_steps=max_steps, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, callbacks=[pruning],
        )  # fmt: skip
        trainer.fit(module, DataLoader(Tokens(), batch_size=4))
    if isinstance(module, CausalLM):
        module.save_pretrained(out / "model")
    state = {f"mask.{n}": gather_whole(m.to(torch.uint8)) for n, m in pruning.masks.items()}
    state |= {f"weight.{n}": gather_whole(p.detach()).clone().contiguous() for n, p in module.named_parameters()}
    state |= {f"held.{n}": torch.tensor(local(m).numel()) for n, m in pruning.masks.items()}
    save_file(state, out / f"rank{trainer.global_rank}.safetensors")
