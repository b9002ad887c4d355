"""`WeightPruning(schedule=ELSA(...))` in a Trainer against ADMM and Adam written out."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from perp_trainers import loader, make_module, make_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from versions import WEIGHTS_ONLY

from lightning_prune import ELSA, PERPRetraining, WeightPruning

STEP, EVERY, PENALTY, STEPS, RATE = 12, 4, 0.3, 16, 0.02


class Net(L.LightningModule):
    """Two layers on one batch, so that every step sees the same data."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        self.automatic_optimization = not manual

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.net(x) - y).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(*batch)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=RATE)


def data(batch_size: int = 40) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, n, generator=generator).double() for n in (6, 5))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def largest(scores: Tensor, sparsity: float) -> Tensor:
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    kept = scores.numel() - int(sparsity * scores.numel())
    mask[scores.flatten().argsort(descending=True)[:kept]] = True
    return mask.view(scores.shape)


def naive(sparsity: float, penalty: float = PENALTY) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """x, z, u and Adam's moments of every weight; after the step masked training."""
    module = Net()
    x, y = data().dataset.tensors
    w = {n: p.detach().clone() for n, p in module.named_parameters()}
    m, v, u = ({n: torch.zeros_like(p) for n, p in w.items()} for _ in range(3))
    z: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    matrices = [n for n, p in w.items() if p.dim() == 2]

    def project() -> dict[str, Tensor]:
        return {n: largest(v[n] * (w[n] + u[n]) ** 2, sparsity) for n in matrices}

    for step in range(1, STEPS + 1):
        leaves = {n: p.clone().requires_grad_() for n, p in w.items()}
        output = torch.func.functional_call(module.net, {n.removeprefix("net."): p for n, p in leaves.items()}, (x,))
        (output - y).square().mean().backward()
        for n, leaf in leaves.items():
            g = leaf.grad
            if n in z:
                g = g + penalty * (w[n] - z[n] + u[n])
            g = g * masks[n] if n in masks else g
            m[n], v[n] = 0.9 * m[n] + 0.1 * g, 0.999 * v[n] + 0.001 * g * g
            w[n] = w[n] - RATE * (m[n] / (1 - 0.9**step)) / ((v[n] / (1 - 0.999**step)).sqrt() + 1e-8)
            w[n] = w[n] * masks[n] if n in masks else w[n]
        if step == STEP:
            masks, z = project(), {}
            for n in matrices:
                w[n], m[n], v[n] = (w[n] + u[n]) * masks[n], m[n] * masks[n], v[n] * masks[n]
        elif step % EVERY == 0 and step < STEP:
            kept = project()
            for n in matrices:
                z[n] = (w[n] + u[n]) * kept[n]
                u[n] = u[n] + w[n] - z[n]
    return w, masks


def elsa(**changes: Any) -> WeightPruning:
    schedule = ELSA(STEP, EVERY, PENALTY)
    return WeightPruning(**{"score": "magnitude", "sparsity": 0.75, "schedule": schedule, "ignore": (), **changes})


def fit(path: Path, module: Net, pruner: WeightPruning, *callbacks: L.Callback, **trainer: Any) -> L.Trainer:
    batches = trainer.pop("batches", data())
    resume = trainer.pop("ckpt_path", None)
    made = make_trainer(path, pruner, *callbacks, **{"max_epochs": STEPS, "precision": "64-true", **trainer})
    made.fit(module, batches, ckpt_path=resume, **WEIGHTS_ONLY)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("manual", [False, True])
def test_weights_are_those_of_the_formulas(manual: bool, tmp_path: Path) -> None:
    expected, masks = naive(0.75)
    module, pruner = Net(manual), elsa()
    fit(tmp_path, module, pruner)
    assert pruner.finished
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, masks[name]), name
        assert not module.get_parameter(name).detach()[~mask].view(torch.int64).any()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-8, atol=1e-11, msg=name)


def test_accumulated_halves_of_a_batch_are_one_step(tmp_path: Path) -> None:
    expected, _ = naive(0.75)
    module, pruner = Net(), elsa()
    fit(tmp_path, module, pruner, batches=data(20), accumulate_grad_batches=2)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("step", [3, 10, 14])
def test_resumed_it_goes_on_to_the_bit(step: int, tmp_path: Path) -> None:
    whole, pruner = Net(), elsa()
    save = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(tmp_path, whole, pruner, save)
    resumed, again = Net(), elsa()
    nn.init.zeros_(resumed.net[0].weight)
    fit(tmp_path / "b", resumed, again, ckpt_path=tmp_path / f"step={step}.ckpt")
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in whole.named_parameters())
    assert all(torch.equal(mask, again.masks[n]) for n, mask in pruner.masks.items())


@pytest.mark.parametrize("ending", ["done", "failed"])
def test_a_checkpoint_saved_after_an_unfinished_fit_goes_on_to_the_bit(ending: str, tmp_path: Path) -> None:
    class Fail(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if ending == "failed" and trainer.global_step == 10:
                raise RuntimeError("power cut")

    whole, cut, resumed = Net(), Net(), Net()
    fit(tmp_path, whole, elsa())
    trainer = make_trainer(tmp_path, elsa(), Fail(), max_epochs=10, precision="64-true")
    with nullcontext() if ending == "done" else pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(cut, data())
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fit(tmp_path / "b", resumed, elsa(), ckpt_path=tmp_path / "after.ckpt")
    assert all(torch.equal(p, resumed.get_parameter(n)) for n, p in whole.named_parameters())


def test_a_second_fit_trains_with_the_masks_and_a_copy_is_a_fresh_start(tmp_path: Path) -> None:
    module, pruner = Net(), elsa()
    fit(tmp_path, module, pruner)
    masks = pruner.masks
    fit(tmp_path, module, pruner, max_epochs=3)
    assert all(torch.equal(mask, pruner.masks[n]) for n, mask in masks.items())
    assert all(not module.get_parameter(n).detach()[~mask].any() for n, mask in masks.items())
    copied, other = copy.deepcopy(elsa()), Net()
    fit(tmp_path, other, copied)
    assert copied.finished


@pytest.mark.few_fast(2)
@pytest.mark.parametrize(
    "setting", [{"pattern": "2:4", "sparsity": None}, {"group": "global"}, {"group": "row"}], ids=str
)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_language_model_ends_with_the_masks_of_its_pattern(
    setting: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    module, pruner = make_module(), elsa(schedule=ELSA(8, 2), ignore=["lm_head"], **setting)
    make_trainer(tmp_path, pruner, max_epochs=2, precision=precision).fit(module, loader())
    assert pruner.sparsity == pytest.approx(0.75 if setting.get("pattern") is None else 0.5, abs=0.01)
    for name, mask in pruner.masks.items():
        assert not module.get_parameter(name)[~mask].any()
        if setting.get("pattern"):
            assert bool((mask.view(-1, 4).sum(1) == 2).all())


class Sgd(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


@pytest.mark.parametrize(
    ("arguments", "module", "trainer", "message"),
    [
        ({}, Sgd, {}, "is trained by SGD, but ELSA chooses by Adam's second moments"),
        ({"allocation": "owl"}, Net, {}, "needs calibration samples"),
    ],
)
def test_a_fit_that_cannot_work_is_refused_before_training(
    arguments: dict[str, Any], module: type[Net], trainer: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made = module()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, made, elsa(**arguments), **trainer)
    assert all(torch.equal(p, before[n]) for n, p in made.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "wanda"}, "pass score='magnitude'"),
        ({"update": "obs"}, "have no effect with ELSA"),
        ({"sequential": True}, "have no effect with ELSA"),
    ],
)
def test_settings_that_it_would_not_follow_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        elsa(**arguments)


def test_adapters_beside_it_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="retrain in a fit of its own"):
        make_trainer(tmp_path, elsa(ignore=["lm_head"]), PERPRetraining()).fit(make_module(), loader())


def test_too_short_a_fit_says_that_nothing_is_pruned(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="let the schedule end earlier"):
        fit(tmp_path, Net(), elsa(), max_epochs=5)
