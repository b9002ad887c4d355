"""Hold pruned weights at zero through training: weights, gradients and optimizer states.

A mask is kept as int8, all bits set where kept, beside its parameter: one byte a weight. It is widened in
pieces to the parameter's integer type and and-ed with its bits, which gives +0.0 whatever was there (a product with 0
turns infinity into NaN and negatives into -0.0), at a few times the speed of a bool product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.sharding import as_shard_of, local

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
# Elements widened at a time. Smaller pieces cost calls (2^16: half as much again), larger ones leave the processor's
# cache; on a GPU kernel launches count instead. `tests/benchmarks/enforcement.py --passes` measures it.
_CPU_PIECE = 1 << 20
_GPU_PIECE = 1 << 24


def to_bytes(mask: Tensor, device: torch.device) -> Tensor:
    """Bool mask to int8, -1 (all bits) where kept and 0 where pruned, on `device`."""
    return mask.to(device=device, dtype=torch.int8).neg_()


def zero_pruned_(tensor: Tensor, mask: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Set the pruned entries of a tensor to +0.0, in place, and return it.

    Args:
        tensor: Any shape, dense.
        mask: int8 of the same shape, see `to_bytes`.
        buffer: Memory to widen the mask in, of `bits_of` the tensor's dtype, with at least as many elements as the
            mask or `piece_of` its device; default new memory.
    """
    bits = bits_of(tensor)
    if not (tensor.is_contiguous() and mask.is_contiguous()):  # channels-last convolutions, transposed views
        tensor.view(bits).bitwise_and_(mask.to(bits))
        return tensor
    flat, flat_mask = tensor.view(-1).view(bits), mask.view(-1)
    piece = piece_of(tensor.device)
    if buffer is None and (piece >= flat.numel() or torch.compiler.is_compiling()):
        flat.bitwise_and_(flat_mask.to(bits))
        return tensor
    buffer = torch.empty(piece, dtype=bits, device=tensor.device) if buffer is None else buffer
    for start in range(0, flat.numel(), piece):
        part = flat[start : start + piece]
        part.bitwise_and_(buffer[: part.numel()].copy_(flat_mask[start : start + piece]))
    return tensor


def bits_of(tensor: Tensor) -> torch.dtype:
    """Return the integer type as wide as a tensor's elements."""
    return _INTEGER[tensor.element_size()]


def piece_of(device: torch.device) -> int:
    """Return how many elements are widened at a time."""
    return _CPU_PIECE if device.type == "cpu" else _GPU_PIECE


class Enforcer:
    """The masks of a model's parameters, ready to be applied every step.

    Args:
        weights: Parameters by name.
        masks: Bool masks by name, True = kept, of the parameters' shapes.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._bytes = {id(p): to_bytes(local(masks[name]), local(p).device) for name, p in weights.items()}
        self._buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def masks(self) -> dict[str, Tensor]:
        """The bool masks by name, laid out over ranks as the parameters are."""
        return {name: as_shard_of(p, self._bytes[id(p)].bool()) for name, p in self._weights.items()}

    def rename(self, rename: Callable[[str], str]) -> None:
        """Call the parameters by other names."""
        self._weights = {rename(name): weight for name, weight in self._weights.items()}

    def follows(self, name: str, parameter: Tensor | None) -> bool:
        """Whether a parameter is the one that is masked under a name, where and of the shape it was then."""
        if parameter is None or parameter is not self._weights[name]:
            return False
        own, mask = local(parameter.detach()), self._bytes[id(parameter)]
        return own.device == mask.device and own.shape == mask.shape

    @property
    def names(self) -> Iterable[str]:
        """The names of the masked parameters."""
        return self._weights.keys()

    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The masked parameters that an optimizer steps."""
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._bytes]

    @torch.no_grad()
    def mask_weights(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Zero the pruned weights (of all parameters by default)."""
        for parameter in self._weights.values() if parameters is None else parameters:
            self._mask(local(parameter.detach()), self._bytes[id(parameter)])

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Zero the gradients of pruned weights, where there are any."""
        for parameter in self._weights.values() if parameters is None else parameters:
            if parameter.grad is not None:
                self._mask(local(parameter.grad), self._bytes[id(parameter)])

    @torch.no_grad()
    def mask_states(self, optimizer: Optimizer) -> None:
        """Zero momentum, variance and any other state of a weight's shape where the weight is pruned."""
        for parameter in self.parameters_of(optimizer):
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape and state.is_floating_point():
                    self._mask(local(state), self._bytes[id(parameter)])

    @torch.no_grad()
    def resurrected(self) -> dict[str, int]:
        """How many pruned weights of each parameter (its part here) are not zero now; empty if masks hold."""
        counts = {}
        for name, parameter in self._weights.items():
            # The mask's bytes are 0 where pruned, so this reads both once and makes one bool temporary.
            alive = int(((local(parameter.detach()) != 0) & (self._bytes[id(parameter)] == 0)).sum())
            if alive:
                counts[name] = alive
        return counts

    def _mask(self, tensor: Tensor, mask: Tensor) -> None:
        if tensor.layout != torch.strided:
            raise RuntimeError(f"cannot mask a {tensor.layout} tensor; use dense gradients")
        size = min(piece_of(tensor.device), tensor.numel())
        zero_pruned_(tensor, mask, self._buffer(tensor.device, bits_of(tensor), size))

    def _buffer(self, device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
        buffer = self._buffers.get((device, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[(device, dtype)] = torch.empty(size, dtype=dtype, device=device)
        return buffer
