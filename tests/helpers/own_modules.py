"""LightningModules of a user's own, small, and a Trainer for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric


def dataset(n: int = 96, features: int = 16, classes: int = 4) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, features, generator=generator)
    return TensorDataset(x, (x[:, :classes] + 0.3 * torch.randn(n, classes, generator=generator)).argmax(1))


class Classifier(L.LightningModule):
    """A user's own module: dropout, a metric, a counter, a list, logs."""

    def __init__(self, optimizer: str = "adamw", dropout: float = 0.1) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = nn.Sequential(
            nn.Linear(16, 32), nn.ReLU(), nn.Dropout(dropout), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 4)
        )
        self.seen = MeanMetric()
        self.calls = 0
        self.losses: list[float] = []
        self.batches: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.calls += 1
        self.losses.append(float(loss))
        self.seen.update(loss.detach())
        self.log("loss", loss, prog_bar=False)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self.net(x), y))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch[0].clone())

    def configure_optimizers(self) -> Any:
        return make_optimizer(self.optimizer, self.parameters())

    def train_dataloader(self) -> DataLoader:
        return DataLoader(dataset(), batch_size=8, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(dataset(24), batch_size=8)


def make_optimizer(name: str, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return {
        "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
        "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
    }[name](parameters)


class Manual(Classifier):
    """Manual optimization, two optimizers, two steps a batch, clipping by hand; the loss without manual_backward."""

    plain_backward = False

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first = list(self.net[0].parameters())
        rest = [p for layer in self.net[1:] for p in layer.parameters()]
        return [make_optimizer("sgd", iter(first)), make_optimizer("adamw", iter(rest))]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():
            loss = F.cross_entropy(self.net(x), y)
            optimizer.zero_grad()
            if self.plain_backward:
                loss.backward()
            else:
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()


class FindAgain(LearningRateFinder):
    """Looks for a rate at every epoch's start, as Lightning's documentation shows, goes back, and takes none."""

    def __init__(self, attr_name: str = "") -> None:
        super().__init__(num_training_steps=3, early_stop_threshold=None, update_attr=False, attr_name=attr_name)

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.lr_find(trainer, pl_module)


def squared_error(module: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[1], reduction="none")


def make_trainer(path: Any, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
    kwargs = {k: v() if callable(v) else v for k, v in kwargs.items()}
    return L.Trainer(
        **{
            "default_root_dir": path,
            "max_epochs": 2,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "callbacks": list(callbacks),
            **kwargs,
        }
    )
