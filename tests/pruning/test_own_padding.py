"""Convolutions that pad their input by themselves, as TensorFlow's EfficientNets do, are seen as they multiply."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from per_sample_losses import autograd, squares
from torch import Tensor, nn

from lightning_prune import prune
from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import FORWARD_STATISTICS, GRADIENTS
from lightning_prune.pruning.targets import find_targets
from lightning_prune.pruning.zeros import pads_by_itself


def same(size: int, kernel: int, stride: int) -> list[int]:
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return [total // 2, total - total // 2]


class Same2d(nn.Conv2d):
    """TensorFlow's padding: how much depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        sides = [s for i in (3, 2) for s in same(x.shape[i], self.kernel_size[i - 2], self.stride[i - 2])]
        return F.conv2d(F.pad(x, sides), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class Static1d(nn.Conv1d):
    """A layer of its own pads."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.pad = nn.ReflectionPad1d((2, 0))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(self.pad(x), self.weight, self.bias, stride=self.stride, groups=self.groups)


class Padded(nn.Module):
    """The same, written out: a plain convolution after the padding."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv1d
        self.layer = kind(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, groups=layer.groups)
        self.layer.load_state_dict(layer.state_dict())
        self.pad = layer.pad if isinstance(layer, Static1d) else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pad is not None:
            return self.layer(self.pad(x))
        kernel, stride = self.layer.kernel_size[0], self.layer.stride[0]
        return self.layer(F.pad(x, [*same(x.shape[3], kernel, stride), *same(x.shape[2], kernel, stride)]))


LAYERS = [
    (lambda: Same2d(4, 6, 3, stride=2), (4, 6, 6)),
    (lambda: Same2d(4, 6, 5, stride=2), (4, 3, 3)),  # the kernel is larger than the input
    (lambda: Same2d(4, 4, 3, stride=2, groups=4), (4, 5, 6)),
    (lambda: Static1d(4, 6, 3, stride=2), (4, 7)),
]


def models(make: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    layer = make()
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv1d
    own = nn.Sequential(layer, nn.Tanh(), kind(layer.out_channels, 8, 1))
    return own, nn.Sequential(Padded(layer), nn.Tanh(), copy.deepcopy(own[2]))


@pytest.mark.parametrize(("make", "shape"), LAYERS)
@pytest.mark.parametrize("size", [1, 3])
def test_statistics_are_those_of_a_plain_convolution_after_the_padding(make: Any, shape: Any, size: int) -> None:
    own, written = models(make)
    batches = [torch.randn(size, *shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    assert pads_by_itself(own[0])
    assert not pads_by_itself(own[2])
    for statistics in ({*GRADIENTS, "input_norm", "output_grad_norm"}, {"input_norm"}, FORWARD_STATISTICS):
        if own[0].groups > 1 and "hessian" in statistics:
            continue
        found, wanted = (
            collect(m, batches, find_targets(m), statistics, num_samples=2 * size, loss_fn=squares, progress=False)
            for m in (own, written)
        )
        for layer, other in zip(found.values(), wanted.values(), strict=True):
            for name in statistics:
                torch.testing.assert_close(layer.get(name), other.get(name), rtol=1e-5, atol=1e-7)
    gradients = autograd(own, [row[None] for batch in batches for row in batch], squares)
    found = collect(
        own, batches, find_targets(own), {"gradient_l2"}, num_samples=2 * size, loss_fn=squares, progress=False
    )
    for name, value in gradients.items():
        torch.testing.assert_close(found[name].gradient_l2.double(), value, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"score": "gblm"}, {"score": "wanda", "pattern": "1:2"}, {"update": "exact"}])
def test_masks_and_weights_are_the_same_too(how: Any) -> None:
    (make, shape), settings = LAYERS[0], {"num_samples": 6, "loss_fn": squares, "progress": False, **how}
    own, written = models(make)
    batches = [torch.randn(3, *shape, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    masks, wanted = (prune(m, batches, **settings) for m in (own, written))
    for mask, other in zip(masks.values(), wanted.values(), strict=True):
        assert torch.equal(mask, other)
    for weight, other in zip(own.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(weight, other)


def test_one_that_is_never_run_is_refused() -> None:
    own, _ = models(LAYERS[0][0])
    loss = lambda m, b: m[2](torch.tanh(m[0].forward(b)[:, :6] * 0 + 1)).square().flatten(1).mean(1)  # noqa: E731
    prune(own, [torch.randn(3, 4, 6, 6)], "wanda", num_samples=3, loss_fn=loss, progress=False)
    unused = lambda m, b: m[2](torch.ones(len(b), 6, 3, 3)).square().flatten(1).mean(1)  # noqa: E731
    with pytest.raises(CalibrationError, match=r"no calibration sample reached '0\.weight'"):
        prune(own, [torch.randn(3, 4, 6, 6)], "wanda", num_samples=3, loss_fn=unused, progress=False)
