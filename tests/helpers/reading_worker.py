"""One of several processes that fit a CausalLM: who reads its weights, what they are before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DistributedSampler
from worker import STRATEGIES, Tokens

from lightning_prune import CausalLM, WeightPruning
from lightning_prune.sharding import gather_whole
from lightning_prune.text import module as text_module
from lightning_prune.text.data import ResumableLoader

_load = text_module.load_pretrained
_MODEL = ("model", "dtype", "cpu_offload", "gradient_checkpointing", "read_once")


class Beginning(L.Callback):
    """Keeps what the fit begins with."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = pl_module.model
        self.state = {f"begin.{n}": gather_whole(p.detach()).clone() for n, p in model.named_parameters()}
        self.state |= {f"buffer.{n}": b.clone() for n, b in model.named_buffers()}
        trained = [p.requires_grad for p in model.parameters()]
        self.state["trained"] = torch.tensor(trained)
        self.state["tied"] = torch.tensor(model.lm_head.weight is model.get_input_embeddings().weight)


def run(out: Path, devices: int, strategy: str, settings: dict[str, Any]) -> None:
    """Write ``out/rankN.safetensors``: weights before ("begin") and after ("end"), and how often this process read."""
    reads: list[str] = []

    def counted(source: str, *arguments: Any) -> Any:
        reads.append(source)
        model = _load(source, *arguments)
        if settings.get("wide_block", False):  # as families that keep some weights in float32
            model.model.layers[0].float()
        return model

    text_module.load_pretrained = counted
    try:
        _fit(out, devices, strategy, settings, reads)
    finally:
        text_module.load_pretrained = _load


def _fit(out: Path, devices: int, strategy: str, settings: dict[str, Any], reads: list[str]) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    module = CausalLM(learning_rate=1e-2, **{k: settings[k] for k in _MODEL if k in settings})
    empty = all(p.is_meta for p in module.model.parameters())
    module.model.get_input_embeddings().weight.requires_grad_(not settings.get("frozen", False))
    if settings.get("changed", False):
        module.model.model.layers = module.model.model.layers[:1]
    beginning = Beginning()
    pruning = WeightPruning(score="wanda", sparsity=0.5, num_samples=8, progress=False)
    saving = ModelCheckpoint(dirpath=out, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=STRATEGIES[strategy](), max_steps=settings.get("max_steps", 2),
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        precision=settings.get("precision", "32-true"),
        callbacks=[beginning, pruning, saving],
    )  # fmt: skip
    refused = ""
    data = Tokens()
    order: DistributedSampler[Any] = DistributedSampler(data, devices, trainer.global_rank)
    loader = ResumableLoader(data, batch_size=4, sampler=order)
    loader.reader = type(loader.reader)(trainer)
    try:
        trainer.fit(module, loader, ckpt_path=settings.get("resume"))
    except (ValueError, RuntimeError) as error:
        if not settings.get("refused", False):
            raise
        refused = f"{type(error).__name__}: {error}"
    (out / f"refused{trainer.global_rank}").write_text(refused)
    state = beginning.state | {"reads": torch.tensor(len(reads)), "empty": torch.tensor(empty)}
    if not refused:
        if Path(settings["model"]).is_dir():  # the GGUF file has no tokenizer
            module.save_pretrained(out / "model")
        state |= {f"end.{n}": gather_whole(p.detach()).clone() for n, p in module.model.named_parameters()}
    save_file(
        {name: value.contiguous() for name, value in state.items()}, out / f"rank{trainer.global_rank}.safetensors"
    )
