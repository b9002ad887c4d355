"""The callbacks in a Trainer of `pytorch_lightning`, whose classes are others than those of `lightning`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from tiny import make_llama, make_tokens
from torch.utils.data import DataLoader

from lightning_prune import (
    ELSA,
    CubicSchedule,
    PERPRetraining,
    PruningAwarePretraining,
    SparsityMonitor,
    WeightPruning,
)
from lightning_prune.callbacks.kinds import is_kind

PACKAGES = (lightning.pytorch, pytorch_lightning)


def make_module(package: ModuleType) -> Any:
    """A module of the one package or the other; the rest of it is the same."""

    class Language(package.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_llama(vocab_size=64)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch, labels=batch["input_ids"]).loss
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

        def train_dataloader(self) -> DataLoader:
            return DataLoader([{"input_ids": row} for row in make_tokens(48, 12, vocab=64)], batch_size=4)

    return Language()


def make_trainer(package: ModuleType, folder: Path, callbacks: list[Any], **settings: Any) -> Any:
    defaults = {"max_steps": 6, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return package.Trainer(
        accelerator="cpu", devices=1, default_root_dir=folder, callbacks=callbacks, **{**defaults, **settings}
    )


def prune(**settings: Any) -> WeightPruning:
    return WeightPruning(**{"num_samples": 8, "progress": False, **settings})


CASES: dict[str, tuple[Callable[[], list[Any]], dict[str, Any]]] = {
    "kfac": (lambda: [prune(score="kfac")], {}),
    "schedule": (lambda: [prune(score="gblm", schedule=CubicSchedule(1, 5, 2))], {"accumulate_grad_batches": 2}),
    "half": (lambda: [prune(score="wanda", pattern="2:4")], {"precision": "bf16-mixed"}),
    "elsa": (lambda: [prune(score="magnitude", schedule=ELSA(4, 2))], {}),
    "perp": (lambda: [prune(score="wanda"), PERPRetraining(r=2)], {}),
    "reconstruct": (lambda: [prune(score="wanda"), PERPRetraining(r=2, reconstruct=True)], {}),
    "shrinking": (lambda: [PruningAwarePretraining(target=0.8, end=6)], {}),
    "monitor": (lambda: [prune(score="magnitude"), SparsityMonitor(every_n_steps=2)], {"logger": True}),
}  # fmt: skip


@pytest.mark.parametrize("package", PACKAGES)
def test_hooks_of_data_modules_run_on_calibration_batches(package: ModuleType, tmp_path: Path) -> None:
    class Data(package.LightningDataModule):  # type: ignore[name-defined, misc]
        prepared = 0

        def train_dataloader(self) -> DataLoader:
            return make_module(package).train_dataloader()

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.prepared += 1
            return {"input_ids": batch["input_ids"].clamp(max=7)}

    module, data, pruning = make_module(package), Data(), prune(score="wanda")
    seen: list[int] = []
    module.model.model.embed_tokens.register_forward_hook(lambda m, args, out: seen.append(int(args[0].max())))
    make_trainer(package, tmp_path, [pruning], max_steps=1).fit(module, datamodule=data)
    assert pruning.masks
    assert len(seen) > 1
    assert max(seen) <= 7
    assert data.prepared == 1  # the training batch: calibration leaves no trace


@pytest.mark.few_fast(2)
@pytest.mark.parametrize("case", CASES)
def test_callbacks_do_the_same_in_both_packages(case: str, tmp_path: Path) -> None:
    callbacks, settings = CASES[case]
    states = []
    for package in PACKAGES:
        torch.manual_seed(0)
        module = make_module(package)
        trainer = make_trainer(package, tmp_path / package.__name__, callbacks(), **settings)
        trainer.fit(module)
        kept = tmp_path / f"{package.__name__}.ckpt"
        trainer.save_checkpoint(kept)
        states.append((module.state_dict(), torch.load(kept, weights_only=True)["state_dict"]))
    for one, other in zip(*states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    if case != "shrinking":
        assert 0.4 < (states[0][0]["model.model.layers.0.mlp.up_proj.weight"] == 0).double().mean() < 0.6


def test_a_run_goes_on_in_the_other_package(tmp_path: Path) -> None:
    def settings() -> list[Any]:
        return [prune(score="wanda", schedule=CubicSchedule(1, 7, 2))]

    torch.manual_seed(0)
    first, begun = make_module(pytorch_lightning), make_trainer(pytorch_lightning, tmp_path, settings(), max_steps=4)
    begun.fit(first)
    begun.save_checkpoint(tmp_path / "half.ckpt")
    ends = []
    for package in PACKAGES:
        module = make_module(package)
        make_trainer(package, tmp_path, settings(), max_steps=8).fit(module, ckpt_path=tmp_path / "half.ckpt")
        ends.append(module.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize(
    "callback",
    [prune(), PERPRetraining(), SparsityMonitor()],
    ids=lambda c: type(c).__name__,
)
def test_what_is_refused_is_refused_in_both(callback: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = type("FSDPStrategy", (pytorch_lightning.strategies.SingleDeviceStrategy,), {})
    strategy.__module__ = "pytorch_lightning.strategies.fsdp"
    trainer = make_trainer(pytorch_lightning, tmp_path, [callback], strategy=strategy(device=torch.device("cpu")))
    with pytest.raises(ValueError, match="ModelParallelStrategy"):
        trainer.fit(make_module(pytorch_lightning))


def test_several_loaders_are_refused(tmp_path: Path) -> None:
    combined = pytorch_lightning.utilities.CombinedLoader([make_module(pytorch_lightning).train_dataloader()])
    with pytest.raises(ValueError, match="CombinedLoader, not one DataLoader"):
        make_trainer(pytorch_lightning, tmp_path, [prune()]).fit(make_module(pytorch_lightning), combined)


def test_a_steps_end_is_unknown_where_accumulation_changes(tmp_path: Path) -> None:
    scheduler = pytorch_lightning.callbacks.GradientAccumulationScheduler({0: 2, 1: 3})
    trainer = make_trainer(
        pytorch_lightning, tmp_path, [prune(score="magnitude", schedule=CubicSchedule(0, 2, 1)), scheduler],
        max_steps=-1, max_epochs=2,
    )  # fmt: skip
    trainer.fit(make_module(pytorch_lightning))
    assert trainer.global_step > 0


def test_names_of_other_packages_are_not_lightnings() -> None:
    assert is_kind(pytorch_lightning.callbacks.ModelCheckpoint(), "Checkpoint")
    assert not is_kind(type("Checkpoint", (), {"__module__": "mine"})(), "Checkpoint")
