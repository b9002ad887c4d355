"""Tell layers in whose product a zero of the weight is no zero: pruning them would remove nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.naming import own_parameters

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = (nn.Linear, *_CONVOLUTIONS)
_PRODUCTS = frozenset(("linear", "conv1d", "conv2d", "conv3d", "matmul", "mm", "addmm", "__matmul__"))


class _Products(TorchFunctionMode):
    """Counts the zeros of what meets an input and has as many elements as a weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.zeros: list[int] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _PRODUCTS:
            operands = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, Tensor)]
            self.zeros += [int((a == 0).sum()) for a in operands if a.dim() > 1 and a.numel() == self.size]
        return func(*args, **kwargs)


@torch.no_grad()
def keeps_zeros(layer: nn.Module) -> bool:
    """Return whether zeros of a layer's weight are zeros in what its forward multiplies with the input.

    Weight standardization subtracts a mean first, after which none is. A scale or a rounding keeps them. A layer of a
    class of its own is tried with a made-up weight and input, on a copy; one that cannot be run so counts as keeping
    them.

    Args:
        layer: A Linear, Conv1d, Conv2d or Conv3d, or of a class that inherits from one.
    """
    weight = own_parameters(layer).get("weight")
    if type(layer) in _PLAIN or weight is None or weight.is_meta or not weight.is_floating_point():
        return True
    try:
        index = torch.arange(weight.numel(), device=weight.device)
        made = ((index % 2) * (1 + index % 3)).to(weight.dtype).view(weight.shape)  # every second is zero
        products = _Products(made.numel())
        with products:
            run_copy(layer, nn.Parameter(made), _input(layer, made))
    except Exception:  # whatever it needs, it cannot be run alone
        return True
    zeros = int((made == 0).sum())
    return all(found >= zeros for found in products.zeros)


def run_copy(layer: nn.Module, weight: nn.Parameter, x: Tensor) -> Any:
    """Run the forward of a layer's class on a copy in evaluation mode, so that the layer stays as it is.

    Args:
        layer: The layer. It is not called, so that its hooks do not run.
        weight: Of the copy, which shares it.
        x: Its input.
    """
    trial, own = copy.copy(layer), own_parameters(layer).get("weight")
    held = vars(trial)
    for kind in ("_parameters", "_buffers", "_modules"):
        held[kind] = copy.deepcopy({name: value for name, value in held[kind].items() if value is not own})
    trial.weight = weight
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        return type(layer).forward(trial.eval(), x)


def _input(layer: nn.Module, weight: Tensor) -> Tensor:
    """Ones that a layer takes, not as many as its weight has."""
    if isinstance(layer, _CONVOLUTIONS):
        # Twice what the kernel spans: a padding mode may want more than the padding.
        spans = [2 * step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = [layer.in_channels, *spans]
    else:
        assert isinstance(layer, nn.Linear)
        shape = [layer.in_features]
    x = weight.new_ones(1, *shape)
    return x if x.numel() != weight.numel() else weight.new_ones(2, *shape)
