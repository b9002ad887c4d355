"""Try out what a layer does with its weight: whether zeros of it remove anything, and whether it is a plain product."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from lightning_prune.naming import own_parameters
from lightning_prune.sharding import ones_for_shard

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN = (nn.Linear, *CONVOLUTIONS)
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
    them. What else it learns is tried without zeros: a gain that begins at zero hides what will become of the weight's.

    Args:
        layer: A Linear or convolution, or of a class that inherits from one.
    """
    weight = own_parameters(layer).get("weight")
    if type(layer) in _PLAIN or weight is None or weight.is_meta or not weight.is_floating_point():
        return True
    try:
        index = torch.arange(weight.numel(), device=weight.device)
        made = ((index % 2) * (1 + index % 3)).to(weight.dtype).view(weight.shape)  # every second is zero
        products = _Products(made.numel())
        with products:
            run_copy(layer, nn.Parameter(made), _input(layer, made), learned=True)
    except Exception:  # whatever it needs, it cannot be run alone
        return True
    zeros = int((made == 0).sum())
    return all(found >= zeros for found in products.zeros)


class _Inputs(TorchFunctionMode):
    """Writes down the inputs of convolutions with a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith("conv") and any(
            a is self.weight for a in (*args, *kwargs.values())
        ):
            self.seen.append(args[0] if args else kwargs["input"])
        return func(*args, **kwargs)


@torch.no_grad()
def pads_by_itself(layer: nn.Module) -> bool:
    """Return whether a convolution pads its input before it multiplies, as those of TensorFlow's "same" padding do.

    It is tried out as in `keeps_zeros`.
    """
    weight = own_parameters(layer).get("weight")
    if type(layer) in _PLAIN or weight is None or weight.is_meta or is_lazy(weight):
        return False
    trial = nn.Parameter(torch.ones(weight.shape, dtype=weight.dtype, device=weight.device))
    x = _input(layer, trial)
    try:
        with _Inputs(trial) as inputs:
            run_copy(layer, trial, x)
    except Exception:  # whatever it needs, it cannot be run alone
        return False
    return [seen.numel() > x.numel() for seen in inputs.seen] == [True]


@torch.no_grad()
def is_plain_product(layer: nn.Module, transposed: bool = False) -> bool:
    """Return whether a layer multiplies its input with its weight and adds its bias, and no more.

    It is tried out with a made-up weight and bias, since its own may hide what it does with them (new ones are zeros,
    or all positive). One that cannot be run alone does something else, and so does one without numbers yet, or with
    other parameters: a gain begins at one, an adapter at zero.

    Args:
        layer: Of any class, with a parameter ``weight``.
        transposed: Whether that is stored ``[I, O]``, and not ``[O, I]``.
    """
    own, weight, bias = vars(layer).get("forward"), own_parameters(layer).get("weight"), getattr(layer, "bias", None)
    if weight is None or is_lazy(weight) or weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        return False
    if any(parameter is not weight and parameter is not bias for parameter in layer.parameters()):
        return False
    made = _ramp(weight) if own is None else weight
    added = _ramp(bias) if own is None and isinstance(bias, nn.Parameter) else bias
    matrix = made.t() if transposed else made
    x = torch.linspace(-1, 1, 2 * matrix.shape[1], device=weight.device).to(weight.dtype).view(2, -1)
    x = torch.cat([x, -x])  # a single output has both signs
    try:
        found = run_copy(layer, made, x, added) if own is None else own(x)
        expected = F.linear(x, matrix, added)
        close = 0.02 if weight.element_size() < 4 else 1e-4
        least = close * float(expected.abs().max()) if expected.numel() else 0.0
        return found.shape == expected.shape and torch.allclose(found, expected, close, least, equal_nan=True)
    except Exception:  # whatever it needs, it gets no such thing from a trial, or from an adapter in its place
        return False


def _ramp(like: Tensor) -> nn.Parameter:
    """Different numbers of both signs, here, in the shape and precision of a parameter."""
    ramp = torch.linspace(-1, 1, like.numel(), dtype=torch.float32, device=like.device)
    return nn.Parameter(ramp.to(like.dtype).view(like.shape))


def run_copy(
    layer: nn.Module, weight: nn.Parameter, x: Tensor, bias: nn.Parameter | None = None, learned: bool = False
) -> Any:
    """Run the forward of a layer's class on a copy in evaluation mode, so that the layer stays as it is.

    Args:
        layer: The layer. It is not called, so that its hooks do not run.
        weight: Of the copy, which shares it.
        x: Its input.
        bias: Of the copy, in the place of the layer's; default a copy of that.
        learned: Whether to run it as it may be once it has learned: with ones for zeros in its other parameters.
    """
    trial, own = copy.copy(layer), own_parameters(layer).get("weight")
    held = vars(trial)
    for kind in ("_parameters", "_buffers", "_modules"):
        held[kind] = copy.deepcopy({name: value for name, value in held[kind].items() if value is not own})
    for module in trial.modules():
        for name, parameter in own_parameters(module).items():
            module.register_parameter(name, ones_for_shard(parameter))
    for parameter in own_parameters(trial).values() if learned else ():
        parameter.masked_fill_(parameter == 0, 1)
    trial.weight = weight
    if bias is not None:
        trial.bias = bias
    with torch.random.fork_rng([weight.device] if weight.is_cuda else []):
        return type(layer).forward(trial.eval(), x)


def _input(layer: nn.Module, weight: Tensor) -> Tensor:
    """Ones that a layer takes, not as many as its weight has."""
    if isinstance(layer, CONVOLUTIONS):
        # Twice what the kernel spans: a padding mode may want more than the padding.
        spans = [2 * step * (size - 1) + 1 for size, step in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = [layer.in_channels, *spans]
    else:
        assert isinstance(layer, nn.Linear)
        shape = [layer.in_features]
    x = weight.new_ones(1, *shape)
    return x if x.numel() != weight.numel() else weight.new_ones(2, *shape)
