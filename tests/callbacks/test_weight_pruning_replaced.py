"""Parameters and optimizers that something replaces while `WeightPruning` masks them, and gradients of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from averaging import assert_zero, magnitude, module
from own_modules import Classifier, Manual, make_trainer
from torch import nn

from lightning_prune import OneShot, WeightPruning


def new_parameter(made: Classifier) -> None:
    made.net[0].weight = nn.Parameter(made.net[0].weight.detach() + 1)


def new_layer(made: Classifier) -> None:
    made.net[3] = nn.Linear(32, 24)


def assigned(made: Classifier) -> None:
    made.net.load_state_dict({n: p.detach() + 1 for n, p in made.net.state_dict().items()}, assign=True)


def emptied(made: Classifier) -> None:
    values = {n: p.detach() + 1 for n, p in made.net.state_dict().items()}
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        made.net.to_empty(device="cpu")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    made.net.load_state_dict(values)


WAYS: list[Callable[[Classifier], None]] = [new_parameter, new_layer, assigned, emptied]


class Replace(L.Callback):
    def __init__(self, how: Callable[[Any], None], hook: str, optimizer: bool = True) -> None:
        self.how, self.optimizer, self.seen = how, optimizer, 0
        setattr(self, hook, self.act)

    def act(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen += 1
        if self.seen == 3:
            self.how(pl_module)
            if self.optimizer:
                trainer.optimizers = [torch.optim.AdamW(pl_module.parameters(), lr=1e-2, weight_decay=0.1)]

    def on_train_batch_end(self, *_: Any) -> None: ...

    def on_train_epoch_end(self, *_: Any) -> None: ...


class Save(L.Callback):
    def __init__(self, path: Path, pruning: WeightPruning) -> None:
        self.path, self.pruning = path, pruning

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        path = self.path / f"{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        assert_zero(torch.load(path, weights_only=True)["state_dict"], self.pruning.masks)


@pytest.mark.few_fast(4)
@pytest.mark.parametrize("pruning_first", [True, False])
@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("how", WAYS)
def test_masks_follow_the_parameter_that_is_there(
    how: Callable[[Any], None], optimizer: bool, pruning_first: bool, tmp_path: Path
) -> None:
    made, pruning = module(), magnitude()
    both = [pruning, Replace(how, "on_train_batch_end", optimizer)]
    callbacks = [*(both if pruning_first else both[::-1]), Save(tmp_path, pruning)]
    with pytest.warns(UserWarning, match="were replaced during training; their masks hold for the new ones"):
        make_trainer(tmp_path, *callbacks, enable_checkpointing=True, max_steps=8).fit(made)
    assert_zero(dict(made.named_parameters()), pruning.masks)
    assert pruning.sparsity == pytest.approx(0.5, abs=1e-3)


def test_what_a_schedule_prunes_later_is_scored_in_the_new_layer(tmp_path: Path) -> None:
    made, pruning = module(), magnitude(OneShot(5))
    make_trainer(tmp_path, Replace(new_layer, "on_train_batch_end"), pruning, max_steps=5).fit(made)
    weight, mask = made.net[3].weight.detach(), pruning.masks["net.3.weight"]
    assert int((~mask).sum()) == mask.numel() // 2
    assert bool((weight[~mask] == 0).all())
    assert bool((weight[mask] != 0).all())


@pytest.mark.parametrize("how", ["gone", "another shape"])
def test_a_mask_that_cannot_follow_is_an_error(how: str, tmp_path: Path) -> None:
    def replace(made: Classifier) -> None:
        made.net[3] = nn.Identity() if how == "gone" else nn.Linear(32, 25)

    made, pruning = module(), magnitude()
    with pytest.raises(RuntimeError, match=r"'net.3.weight' was replaced during training, and its mask cannot follow"):
        make_trainer(tmp_path, Replace(replace, "on_train_batch_end"), pruning, max_steps=8).fit(made)


def test_tied_layers_that_are_torn_apart_are_an_error(tmp_path: Path) -> None:
    class Tied(Classifier):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4))
            self.net[2].weight = self.net[0].weight

    def tear(made: Classifier) -> None:
        made.net[2].weight = nn.Parameter(made.net[2].weight.detach().clone())

    with pytest.raises(RuntimeError, match=r"layers that shared 'net.0.weight' have parameters of their own now"):
        make_trainer(tmp_path, Replace(tear, "on_train_batch_end"), magnitude(), max_steps=8).fit(Tied())


class TwoLosses(Manual):
    """manual_backward and then a plain backward before the step: the second gradient has no hook."""

    raw = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        optimizers = self.optimizers(use_pl_optimizer=not self.raw)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        F.cross_entropy(self.net(x.flip(1)), y).backward()
        optimizers[0].step()
        F.cross_entropy(self.net(2 * x), y).backward()
        optimizers[1].step()


class RawTwoLosses(TwoLosses):
    raw = True


class Closures(Manual):
    """The backward happens in a closure, after the step's first hook."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for optimizer in self.optimizers():

            def closure(optimizer: Any = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(self.net(x), y)
                loss.backward()
                return loss

            optimizer.step(closure=closure)


@pytest.mark.parametrize("kind", [TwoLosses, RawTwoLosses, Closures])
def test_no_gradient_of_a_pruned_weight_reaches_an_optimizer(kind: type[Manual], tmp_path: Path) -> None:
    """Momentum and variance of pruned weights stay zero, whichever backward made the gradient."""

    class States(L.Callback):
        looks = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            weights = dict(pl_module.named_parameters())
            for name, mask in pruning.masks.items():
                for optimizer in trainer.optimizers:
                    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                        if (value := optimizer.state.get(weights[name], {}).get(key)) is not None:
                            assert bool((value[~mask] == 0).all()), (name, key)
                            assert bool((value[mask] != 0).any()), (name, key)
                            self.looks += 1

    torch.manual_seed(0)
    made, pruning, states = kind(), magnitude(), States()
    make_trainer(tmp_path, pruning, states, max_epochs=1).fit(made)
    assert states.looks == 5 * 12
    assert_zero(dict(made.named_parameters()), pruning.masks)
