"""Averages of the weights hold the masks' zeros: in checkpoints, in validation, at the end, in every order."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from averaging import assert_zero, magnitude, module
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from own_modules import Classifier, dataset, make_trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from versions import EMAWeightAveraging, WeightAveraging

from lightning_prune import LinearSchedule, OneShot, WeightPruning
from lightning_prune.pruning.targets import find_targets

SCHEDULES = {"start": None, "late": OneShot(7), "gradual": LinearSchedule(3, 15, 4)}
AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "ema that waits": lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=100),
    "mean": lambda: WeightAveraging(),
}


class Zeros(L.Callback):
    """Looks at what is validated."""

    def __init__(self, pruning: WeightPruning) -> None:
        self.pruning, self.looks = pruning, 0

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        assert_zero(dict(pl_module.named_parameters()), self.pruning.masks)
        self.looks += bool(self.pruning.masks)


@pytest.mark.few_fast(6)
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_averages_of_lightning(schedule: Any, average: Any, pruning_first: bool, tmp_path: Path) -> None:
    made, pruning = module(), magnitude(schedule)
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    both = [pruning, average()] if pruning_first else [average(), pruning]
    watch = Zeros(pruning)
    make_trainer(tmp_path, *both, watch, saver, max_steps=16, val_check_interval=4).fit(made)
    assert watch.looks
    assert_zero(dict(made.named_parameters()), pruning.masks)
    pruned = {}
    for step in (4, 8, 12, 16):
        state = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        fresh = magnitude()
        fresh.load_state_dict(state["callbacks"]["WeightPruning"])
        assert_zero(state["state_dict"], fresh.masks)
        assert_zero(state["current_model_state"], fresh.masks)
        pruned[step] = fresh.sparsity
    assert pruned[16] == pytest.approx(0.5, abs=1e-3)


def test_resumed_training_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(path: Path, steps: int, resume: Path | None = None) -> tuple[dict[str, Tensor], WeightPruning]:
        made, pruning = module(), magnitude(LinearSchedule(3, 19, 4))
        saver = ModelCheckpoint(path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
        trainer = make_trainer(path, EMAWeightAveraging(decay=0.9), pruning, saver, max_steps=steps, max_epochs=9)
        trainer.fit(made, ckpt_path=resume)
        return {n: p.detach().clone() for n, p in made.named_parameters()}, pruning

    # The end of an epoch: Lightning does not put a loader of its own back into the middle of one.
    whole, pruning = run(tmp_path / "whole", 24)
    resumed, again = run(tmp_path / "rest", 24, tmp_path / "whole" / "step=12.ckpt")
    assert_zero(resumed, pruning.masks)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruning.masks.items())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_the_average_is_that_of_weights_pruned_by_hand(tmp_path: Path) -> None:
    """Against an independent loop: the average of what is kept is as if nothing had been masked."""
    made, pruning = module(optimizer="sgd"), magnitude(OneShot(5))
    twin = copy.deepcopy(made)
    make_trainer(tmp_path, EMAWeightAveraging(decay=0.9), pruning, max_steps=10).fit(made)
    optimizer, masks = twin.configure_optimizers(), {}
    batches = itertools.islice(iter(DataLoader(dataset(), batch_size=8)), 10)
    average: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(batches, 1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin.net(x), y).backward()
        with torch.no_grad():
            for name, p in twin.named_parameters():
                if name in masks:
                    p.grad *= masks[name]
            optimizer.step()
            for name, p in twin.named_parameters():
                if name in masks:
                    p *= masks[name]
                average[name] = 0.9 * average[name] + 0.1 * p if step > 1 else p.clone()
            if step == 5:
                masks = pruning.masks
                for name, p in twin.named_parameters():
                    if name in masks:
                        p *= masks[name]
                        average[name] *= masks[name]
                        optimizer.state[p]["momentum_buffer"] *= masks[name]
    for name, p in made.named_parameters():
        torch.testing.assert_close(p.detach(), average[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_stochastic_weight_averaging(batch_norm: bool, pruning_first: bool, tmp_path: Path) -> None:
    made, pruning = module(), magnitude(OneShot(20))  # after the first average, of epoch 1 (step 12)
    if batch_norm:
        made.net[1] = nn.Sequential(nn.BatchNorm1d(32), nn.ReLU())
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)
    both = [pruning, swa] if pruning_first else [swa, pruning]
    make_trainer(tmp_path, *both, max_epochs=4).fit(made)
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)
    assert_zero(dict(made.named_parameters()), pruning.masks)


class Averaging(Classifier):
    """A module that averages a part of itself, or all of it, and validates the average."""

    def __init__(self, where: str) -> None:
        super().__init__(dropout=0.0)
        averaged = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        if where == "submodule":
            self.ema = averaged
        elif where == "list":
            self.held = [averaged]
        else:
            self.held = {"net": averaged}

    def average(self) -> AveragedModel:
        return self.ema if hasattr(self, "ema") else (self.held[0] if isinstance(self.held, list) else self.held["net"])

    def on_train_batch_end(self, *_: Any) -> None:
        self.average().update_parameters(self.net)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


class AveragingCallback(L.Callback):
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.averaged = AveragedModel(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.averaged.update_parameters(pl_module)


@pytest.mark.parametrize("where", ["submodule", "list", "mapping"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_averages_that_a_module_holds(schedule: Any, where: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, pruning = Averaging(where), magnitude(schedule)
    made.train_dataloader = lambda: DataLoader(dataset(), batch_size=8)
    assert [t.name for t in find_targets(made)] == ["net.0.weight", "net.3.weight", "net.5.weight"]
    saver = ModelCheckpoint(tmp_path, filename="x", every_n_train_steps=16)
    make_trainer(tmp_path, pruning, saver, max_steps=16).fit(made)
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)
    inside = {name.removeprefix("net."): mask for name, mask in pruning.masks.items()}
    assert_zero(dict(made.average().module.named_parameters()), inside)
    if where == "submodule":
        state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        assert_zero(state, {f"ema.module.{name}": mask for name, mask in inside.items()})


def test_the_average_of_a_callback(tmp_path: Path) -> None:
    made, pruning, averaging = module(), magnitude(OneShot(7)), AveragingCallback()
    make_trainer(tmp_path, averaging, pruning, max_steps=16).fit(made)
    assert_zero(dict(averaging.averaged.module.named_parameters()), pruning.masks)


def test_an_average_that_nothing_tells_the_place_of_is_said(tmp_path: Path) -> None:
    made, pruning = module(), magnitude(OneShot(7))
    made.twin = copy.deepcopy(made.net)  # alike: which of the two is averaged?
    made.held = [AveragedModel(made.net)]
    with pytest.warns(UserWarning, match=r"cannot be told.*apply_masks\(averaged.module, masks\)"):
        make_trainer(tmp_path, pruning, max_steps=8).fit(made)


def test_an_average_kept_elsewhere_is_an_error(tmp_path: Path) -> None:
    class Other(EMAWeightAveraging):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            self.elsewhere = {"average": self.__dict__.pop("_average_model")}

    with pytest.raises(RuntimeError, match=r"no attribute of Other .* use lightning 2.6"):
        make_trainer(tmp_path, Other(), magnitude(), max_steps=2).fit(module())
