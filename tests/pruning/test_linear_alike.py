"""Linear layers of a class of their own, as graph libraries have them, are pruned as torch's are."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from per_sample_losses import autograd, data, squares
from torch import Tensor, nn

from lightning_prune import PERPRetraining, WeightPruning, prune
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.layer_kinds import LINEAR_ALIKE, layer_kind
from lightning_prune.pruning.targets import find_targets


class GraphLinear(nn.Module):
    """As torch_geometric's: it may get its shape from the first input, and is no ``nn.Linear``."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        if inputs < 1:
            self.weight = nn.parameter.UninitializedParameter()
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class MonotonicLinear(GraphLinear):
    """Something else than a product with the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs(), self.bias)


class ScaledLinear(GraphLinear):
    """Its gain begins at one."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        self.gain = nn.Parameter(torch.ones(size[1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class AdaptedLinear(GraphLinear):
    """An adapter of its own begins at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x))


class ZeroDense(GraphLinear):
    """New, it returns zeros whatever it computes."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.silu(x))


class PositiveLinear(MonotonicLinear):
    """New, its weight is its own absolute value."""

    def __init__(self, *size: int) -> None:
        super().__init__(*size)
        nn.init.uniform_(self.weight)


class RectifiedDense(GraphLinear):
    """One with an activation of its own, which a few outputs may pass as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def make(kind: Any = GraphLinear) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(kind(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), GraphLinear(8, 4))


@pytest.mark.parametrize("scalar", [False, True])
def test_gradients_and_norms(scalar: bool) -> None:
    model, batches = make(), data(3, 5, 6)
    loss = (lambda m, b: squares(m, b).mean()) if scalar else squares
    how = {"num_samples": 6, "loss_fn": loss, "progress": False}
    found = collect(model, batches, find_targets(model), {"gradient_l2", "input_norm"}, **how)
    wanted = autograd(model, [row[None] for batch in batches for row in batch], squares)
    assert list(found) == list(wanted) == ["0.weight", "2.weight", "4.weight"]
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].gradient_l2.double(), value, rtol=1e-3, atol=1e-6)
    x = torch.cat(batches).flatten(0, 1).double()
    torch.testing.assert_close(found["0.weight"].input_norm.double(), (x.square().sum(0) / 6).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("how", [{"score": "magnitude"}, {}, {"update": "exact"}, {"score": "wanda", "pattern": "1:2"}])
def test_the_masks_are_those_of_the_same_model_of_torchs_layers(how: Any) -> None:
    model, same = make(), make(nn.Linear)
    same[4] = nn.Linear(8, 4)
    same.load_state_dict(model.state_dict())
    settings = {"num_samples": 6, "loss_fn": squares, "progress": False, **how}
    masks, wanted = (prune(m, data(3, 5, 6), **settings) for m in (model, same))
    assert list(masks) == list(wanted)
    assert all(torch.equal(masks[name], mask) for name, mask in wanted.items())
    assert all(torch.equal(weight, same.state_dict()[name]) for name, weight in model.state_dict().items())


def test_one_that_computes_something_else_is_left_out_and_named() -> None:
    with pytest.warns(UserWarning, match=r"\*\.weight \(1 tensor, .*MonotonicLinear cannot be pruned"):
        assert list(prune(make(MonotonicLinear), score="magnitude")) == ["2.weight", "4.weight"]


@pytest.mark.parametrize("kind", [ScaledLinear, AdaptedLinear, ZeroDense, PositiveLinear, RectifiedDense])
def test_one_that_only_begins_as_a_plain_product_is_left_out(kind: Any) -> None:
    for size in ((6, 8), (6, 1)):
        assert layer_kind(kind(*size)) is None
        assert layer_kind(GraphLinear(*size)) is LINEAR_ALIKE


def test_its_being_tried_out_leaves_no_trace() -> None:
    calls: list[Any] = []

    class CountingLinear(GraphLinear):
        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x + 0 * torch.rand(()))

    layer, other = (CountingLinear(6, 8) for _ in range(2))
    for module in (layer, other):
        module.register_buffer("count", torch.zeros(()))
        module.register_forward_hook(lambda *given: calls.append(given))
    other.forward = lambda x: CountingLinear.forward(other, x)  # type: ignore[method-assign]
    random, weight = torch.get_rng_state(), layer.weight.detach().clone()
    assert layer_kind(layer) is LINEAR_ALIKE
    assert layer_kind(other) is None  # it could not be tried out so
    assert not calls
    assert layer.count == other.count == 0
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(weight, layer.weight)
    assert layer.training


def test_one_without_a_shape_is_refused() -> None:
    model = make()
    model[0] = GraphLinear(0, 8)
    with pytest.raises(ValueError, match=r"'0' has no shape yet \(lazy layer\)"):
        prune(model, score="magnitude")


class Module(L.LightningModule):
    """A regression."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make()

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return squares(self.model, batch).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-2)


@pytest.mark.parametrize("adapters", [False, True])
def test_they_keep_their_zeros_in_a_trainer_and_adapters_say_that_they_go_without(adapters: bool) -> None:
    pruning, module, start = WeightPruning(sparsity=0.5, num_samples=8, progress=False), Module(), make()
    trainer = L.Trainer(
        max_steps=3, callbacks=[pruning, *([PERPRetraining(r=2)] if adapters else [])], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.cat(data(8, 5, 6)), batch_size=4)
    if adapters:
        with pytest.warns(UserWarning, match=r"PERPRetraining: 56% .*get no adapter.*'model\.0\.weight' and 1 more"):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
    assert pruning.sparsity == 0.5
    for name, mask in pruning.masks.items():
        weight, before = module.get_parameter(name), start.get_parameter(name.removeprefix("model."))
        assert not weight[~mask].any()
        assert torch.equal(weight[mask], before[mask]) == (adapters and name != "model.2.weight")
