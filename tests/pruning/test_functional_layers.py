"""Layers that are never called, since what holds them multiplies with their weight: Swin, BEiT and EVA do it so."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from per_sample_losses import autograd, data, squares
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_prune import LinearSchedule, PERPRetraining, WeightPruning, prune
from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import FORWARD_STATISTICS
from lightning_prune.pruning.targets import find_targets

ALL = {"input_norm", "output_grad_norm", "gradient_l1", "gradient_l2", "hessian"}


class Attention(nn.Module):
    """The queries' and values' biases are parameters, the keys' is none; the output matrix goes into a function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18, bias=False), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.bias[:6], torch.zeros(6, dtype=x.dtype), self.bias[6:]])
        q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
        return F.linear(F.scaled_dot_product_attention(q, k, v), self.proj.weight, self.proj.bias)


class Block(nn.Module):
    """Attention and an ordinary layer."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.attention, self.fc, self.reentrant = Attention(), nn.Linear(6, 6), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is not None and torch.is_grad_enabled():
            y = checkpoint(self.attention, x, use_reentrant=self.reentrant)
        else:
            y = self.attention(x)
        return x + self.fc(torch.tanh(x + y))


def make(**how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(**how), Block(**how))


def gather(model: nn.Module, batches: list[Tensor], loss: Any, statistics: Any = ALL) -> Any:
    samples = sum(len(batch) for batch in batches)
    targets = find_targets(model)
    return collect(model, batches, targets, statistics, num_samples=samples, loss_fn=loss, progress=False)


def products(model: nn.Module, batches: list[Tensor], loss: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of inputs and of output gradients of the model in float64, by name, written down where they are made."""
    model = copy.deepcopy(model).double()
    names = {id(weight): name for name, weight in model.named_parameters()}
    inputs: dict[str, list[Tensor]] = {}
    deltas: dict[str, list[Tensor]] = {}
    linear = F.linear

    def seen(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        output, name = linear(input, weight, bias), names[id(weight)]
        inputs.setdefault(name, []).append(input.detach().flatten(0, -2))
        output.register_hook(lambda delta: deltas.setdefault(name, []).append(delta.flatten(0, -2)))
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", seen)
        for batch in batches:
            loss(model, batch.double()).sum().backward()
    return {n: torch.cat(x) for n, x in inputs.items()}, {n: torch.cat(x) for n, x in deltas.items()}


@pytest.mark.parametrize("scalar", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_statistics_are_those_of_the_products_that_their_parents_make(size: int, scalar: bool) -> None:
    model, batches = make(), data(size, 4, 6)
    loss = (lambda m, b: squares(m, b).mean()) if scalar else squares
    found = gather(model, batches, loss)
    inputs, deltas = products(make(), batches, squares)
    wanted = autograd(make(), [row[None] for batch in batches for row in batch], squares)
    assert list(found) == list(wanted) == [n for n, p in model.named_parameters() if p.dim() == 2]
    for name, layer in found.items():
        x, count = inputs[name], 2 * size
        torch.testing.assert_close(layer.input_norm.double(), (x.square().sum(0) / count).sqrt(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.hessian.double(), x.T @ x / count, rtol=1e-4, atol=1e-5)
        squared = deltas[name].square().sum(0) / count
        torch.testing.assert_close(layer.output_grad_norm.double(), squared.sqrt(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(layer.gradient_l2.double(), wanted[name], rtol=1e-3, atol=1e-6)
    forward = gather(model, batches, squares, FORWARD_STATISTICS)
    assert all(torch.allclose(forward[name].hessian, layer.hessian, rtol=1e-5) for name, layer in found.items())


def test_they_are_run_in_every_batch_and_not_in_the_first_alone() -> None:
    found = gather(make(), data(2, 4, 6, count=5), squares, FORWARD_STATISTICS)
    inputs, _ = products(make(), data(2, 4, 6, count=5), squares)
    for name, layer in found.items():
        torch.testing.assert_close(layer.hessian.double(), inputs[name].T @ inputs[name] / 10, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_in_a_checkpoint_are_refused_and_norms_are_right(reentrant: bool) -> None:
    batches = data(3, 4, 6)
    with pytest.raises(CalibrationError, match=r"'0\.attention\.(qkv|proj)(\.weight)?'.*checkpoint.*to `ignore`"):
        gather(make(reentrant=reentrant), batches, squares)
    found, plain = (gather(make(reentrant=how), batches, squares, FORWARD_STATISTICS) for how in (reentrant, None))
    assert all(torch.equal(found[name].hessian, layer.hessian) for name, layer in plain.items())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("statistics", [{"gradient_l2"}, {"output_grad_norm"}])
def test_a_second_use_in_a_checkpoint_is_refused_too(reentrant: bool, statistics: set[str]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def use(self, x: Tensor) -> Tensor:
            return F.linear(x, self.layer.weight, self.layer.bias).tanh()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.use, self.use(x), use_reentrant=reentrant))

    with pytest.raises(CalibrationError, match=r"'layer' .*checkpoint.*add 'layer' to `ignore`"):
        gather(Twice(), data(2, 4, 6), squares, statistics)


@pytest.mark.parametrize("called_first", [False, True])
def test_a_layer_that_is_called_too_is_refused(called_first: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            parts = [lambda: self.layer(x), lambda: F.linear(x.tanh(), self.layer.weight)]
            one, other = (part() for part in (parts if called_first else reversed(parts)))
            return self.last(one + other)

    for statistics in (ALL, FORWARD_STATISTICS):
        with pytest.raises(CalibrationError, match=r"'layer\.weight' is also used outside.*add 'layer' to `ignore`"):
            gather(Both(), data(2, 4, 6), squares, statistics)


@pytest.mark.parametrize("score", ["wanda", "kfac"])
def test_a_penalty_on_products_of_weights_is_no_call_of_a_layer(score: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def loss(m: nn.Module, batch: Tensor) -> Tensor:
        return 0 * F.linear(m[0].weight, m[2].weight).sum() + squares(m, batch)

    found, wanted = (
        prune(copy.deepcopy(model), data(3, 4, 6), score, num_samples=6, loss_fn=f, progress=False)
        for f in (loss, squares)
    )
    assert all(torch.equal(mask, wanted[name]) for name, mask in found.items())


@pytest.mark.parametrize("how", [{"score": "wanda"}, {"update": "exact"}, {"score": "wanda", "pattern": "1:2"}])
def test_block_by_block_the_later_block_sees_what_the_pruned_one_gives(how: Any) -> None:
    model, batches = make(), data(4, 5, 6)
    settings = {"num_samples": 8, "loss_fn": lambda m, b: squares(m, b), "progress": False, **how}
    masks = prune(model, batches, sequential=True, **settings)
    at_once = make()
    prune(at_once, batches, **settings)
    assert len([name for name in masks if name.startswith("0.")]) == 3
    assert any(not torch.equal(w, o) for w, o in zip(model[1].parameters(), at_once[1].parameters(), strict=True))
    assert all(not (model.get_parameter(n) * ~masks[n]).any() for n in masks)


class Module(L.LightningModule):
    """A regression through two such blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return (self.model(batch) - batch.roll(1, -1)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


def fit(module: Module, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_steps=6, callbacks=list(callbacks), logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.cat(data(8, 4, 6, count=2)), batch_size=4))


def pruner(score: str) -> WeightPruning:
    return WeightPruning(score, 0.5, num_samples=8, progress=False, schedule=LinearSchedule(0, 4, 2))


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("score", ["kfac", "wanda", "magnitude"])
def test_in_a_trainer_along_a_schedule(score: str, adapters: bool) -> None:
    pruning, module, start = pruner(score), Module(), make()
    fit(module, pruning, *([PERPRetraining(r=2)] if adapters else []))
    assert pruning.sparsity == 0.5
    assert len(pruning.masks) == 6
    for name, mask in pruning.masks.items():
        weight, before = module.get_parameter(name), start.get_parameter(name.removeprefix("model."))
        assert not weight[~mask].any()
        assert not torch.allclose(weight[mask], before[mask])


@pytest.mark.parametrize("score", ["kfac", "wanda"])
def test_new_adapters_change_no_mask(score: str) -> None:
    found = []
    for others in ([], [PERPRetraining(r=2)]):
        pruning = WeightPruning(score, 0.5, num_samples=8, progress=False)
        fit(Module(), pruning, *others)
        found.append(dict(pruning.masks))
    assert list(found[0]) == list(found[1])
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_what_is_frozen_of_adapters_stays_so() -> None:
    class FrozenA(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            for name, parameter in pl_module.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and "lora_A" not in name)

    flags: list[bool] = []

    class Watch(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            flags.extend(p.requires_grad for name, p in pl_module.named_parameters() if "lora_A" in name)

    fit(Module(), FrozenA(), WeightPruning("wanda", num_samples=8, progress=False), PERPRetraining(r=2), Watch())
    assert len(flags) == 6
    assert not any(flags)
