"""Layers whose forward makes other numbers of a weight's zeros are told apart from those that keep them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BitConfig, BitModel

from lightning_prune import prune
from lightning_prune.pruning.targets import find_targets
from lightning_prune.pruning.zeros import keeps_zeros


class Standardized(nn.Conv2d):
    """Weight standardization."""

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (deviation + 1e-5), self.bias)


class Gained(Standardized):
    """Standardization with a gain that is learned from zero on, so that a block begins as the identity."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.zeros(sizes[1], 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.flatten(1)[None], None, None, self.gain.flatten(), training=True)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Gate(nn.Linear):
    """The weight times a gain that is learned from zero on."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.zeros(sizes[1], 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain, self.bias)


class Standardized3d(nn.Conv3d):
    """In what the forward of a convolution calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean((1, 2, 3, 4), keepdim=True), bias)


class Inherited(nn.Conv3d):
    """Nothing of its own."""


class Binary(nn.Linear):
    """The signs of the centered weight."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight - self.weight.mean()).sign().T + self.bias


class Ternary(nn.Linear):
    """Rounded, with the gradient of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        rounded = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (rounded - self.weight).detach(), self.bias)


class Cosine(nn.Linear):
    """Both sides normalized."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Needy(nn.Linear):
    """Cannot be run alone."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean()) + other


class Counting(nn.Linear):
    """Writes to a buffer and draws a random number."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))
        self.inner = nn.BatchNorm1d(sizes[0])

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(self.inner(x) * torch.rand(()))


@pytest.mark.parametrize(
    ("make", "kept"),
    [
        (lambda: Standardized(3, 4, 3, padding=1, padding_mode="reflect"), False),
        (lambda: Standardized(4, 4, 1, dtype=torch.bfloat16), False),
        (lambda: Gained(3, 4, 3), False),
        (lambda: Gate(6, 4), True),
        (lambda: Standardized3d(3, 4, (1, 2, 3), dilation=(1, 2, 1)), False),
        (lambda: Inherited(4, 4, 2, groups=2, padding="same"), True),
        (lambda: Binary(6, 4), False),
        (lambda: Binary(6, 1), False),
        (lambda: Ternary(6, 4), True),
        (lambda: Cosine(6, 4), True),
        (lambda: Cosine(6, 1), True),
        (lambda: Needy(6, 4), True),
        (lambda: Counting(6, 4), True),
        (lambda: Standardized(3, 4, 3, device="meta"), True),
        (lambda: nn.Linear(6, 4), True),
    ],
)
def test_a_zero_is_looked_for_in_what_meets_the_input(make: Any, kept: bool) -> None:
    layer = make()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    drawn, hooks = torch.get_rng_state(), []
    layer.register_forward_hook(lambda *_: hooks.append(1))
    assert keeps_zeros(layer) == kept
    assert torch.equal(drawn, torch.get_rng_state())
    assert not hooks
    assert layer.training
    if not layer.weight.is_meta:
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("score", ["magnitude", "wanda"])
def test_layers_that_standardize_their_weight_are_left_out_and_named(score: str) -> None:
    model = nn.Sequential(Standardized(3, 4, 3), nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 2))
    batches = [torch.randn(4, 3, 3, 3)]
    with pytest.warns(UserWarning, match=r"\*\.weight \(1 tensor, .*standardization"):
        masks = prune(model, batches, score, num_samples=4, progress=False)
    assert list(masks) == ["2.weight", "3.weight"]
    assert model[0].weight.all()
    with pytest.raises(ValueError, match=r"nothing to prune.*weight standardization\?\): '0'"):
        prune(model, batches, score, targets=["0"], progress=False)


def test_of_bit_nothing_can_be_pruned() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [32], "depths": [1], "num_groups": 4}
    with pytest.raises(ValueError, match=r"nothing to prune.*weight standardization"):
        find_targets(BitModel(BitConfig(**sizes)))
