"""Set the pruned elements of tensors to +0.0 by their bits: a byte a weight on CPUs, one bit a weight on CUDA.

A product with 0 would turn infinity into NaN and negatives into -0.0. On a CPU a mask is int8, all bits set where kept,
and widened in pieces to the tensor's integer type; unpacking bits there takes half as long again and more. On CUDA a
Triton kernel reads bits, one launch for many tensors, and no memory beside; without Triton it is bytes there too.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_prune.pruning.bits import pack_mask, unpack_mask

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}
# Elements widened at a time. Smaller pieces cost calls (2^16: half as much again), larger ones leave the processor's
# cache; on a GPU kernel launches count instead. `tests/benchmarks/enforcement.py --passes` measures it.
_CPU_PIECE = 1 << 20
_GPU_PIECE = 1 << 24
_BLOCK = 4096  # elements a program of the kernel masks


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
    if tensor.dtype == torch.complex128:
        for part in _parts(tensor):
            zero_pruned_(part, mask)
        return tensor
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


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """What can be seen as integers: no integer is as wide as a complex number of two doubles."""
    return (tensor.real, tensor.imag) if tensor.dtype == torch.complex128 else (tensor,)


def bits_of(tensor: Tensor) -> torch.dtype:
    """Return the integer type as wide as a tensor's elements."""
    return _INTEGER[tensor.element_size()]


def piece_of(device: torch.device) -> int:
    """Return how many elements are widened at a time."""
    return _CPU_PIECE if device.type == "cpu" else _GPU_PIECE


class HeldMask(Protocol):
    """A mask on its tensor's device."""

    shape: torch.Size
    device: torch.device

    def bool(self) -> Tensor:
        """The mask, True = kept."""

    def clear(self, tensor: Tensor) -> None:
        """Set the pruned elements of a tensor of the mask's shape to +0.0, in place."""


def held(mask: Tensor, device: torch.device) -> HeldMask:
    """A bool mask, True = kept, in the form that `device` applies quickest."""
    return BitMask(mask, device) if device.type == "cuda" and kernel_runs(device) else ByteMask(mask, device)


def _checked(tensor: Tensor) -> Tensor:
    """A tensor's bits as integers."""
    if tensor.layout != torch.strided:
        raise RuntimeError(f"cannot mask a {tensor.layout} tensor; use dense gradients")
    return tensor.view(_INTEGER[tensor.element_size()])


class ByteMask:
    """A mask of int8, one byte a weight.

    Args:
        mask: Bool, True = kept.
        device: Where the tensors are that it is for.
    """

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        self._bytes = to_bytes(mask, device)
        self.shape, self.device = self._bytes.shape, self._bytes.device

    def bool(self) -> Tensor:
        """The mask, True = kept."""
        return self._bytes.bool()

    def clear(self, tensor: Tensor) -> None:
        """Set the pruned elements of a tensor of the mask's shape to +0.0, in place.

        Raises:
            RuntimeError: the tensor is sparse.
        """
        size = min(piece_of(self.device), tensor.numel())
        zero_pruned_(_checked(tensor), self._bytes, _scratch(size, bits_of(tensor), self.device))


_kept = threading.local()


def _scratch(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory to widen a piece into; on a CPU the same each time in a thread, since new memory is slow to write to."""
    if device.type != "cpu":  # streams may run side by side, and torch keeps freed memory for each
        return torch.empty(size, dtype=dtype, device=device)
    found: Tensor | None = getattr(_kept, str(dtype), None)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # it outlives the mode that it is first needed in
            found = torch.empty(size, dtype=dtype, device=device)
        setattr(_kept, str(dtype), found)
    return found


class BitMask:
    """A mask of packed bits, as `pack_mask` has them, for the Triton kernel.

    Args:
        mask: Bool, True = kept.
        device: Where the tensors are that it is for.
    """

    def __init__(self, mask: Tensor, device: torch.device) -> None:
        self.shape = mask.shape
        self._bits = pack_mask(mask.to(device))
        self.device = self._bits.device

    def bool(self) -> Tensor:
        """The mask, True = kept."""
        return unpack_mask(self._bits, self.shape)

    def clear(self, tensor: Tensor) -> None:
        """Set the pruned elements of a tensor of the mask's shape to +0.0, in place.

        Raises:
            RuntimeError: the tensor is sparse.
        """
        clear_all([(self, tensor)])

    def operands(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """The bits of a contiguous tensor as integers, and those of the mask."""
        return _checked(tensor), self._bits


def clear_all(pairs: Iterable[tuple[HeldMask, Tensor]]) -> None:
    """Set the pruned elements of tensors to +0.0, in place; as many as the kernel can take in one launch.

    Raises:
        RuntimeError: a tensor is sparse.
    """
    launches: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
    for mask, tensor in ((mask, part) for mask, whole in pairs for part in _parts(whole)):
        if not isinstance(mask, BitMask):
            mask.clear(tensor)
            continue
        values, bits = mask.operands(tensor)
        if not values.is_contiguous():
            values.bitwise_and_(to_bytes(mask.bool(), values.device).to(values.dtype))
        elif values.numel():
            # Only then does the kernel move 16 bytes at a time.
            aligned = values.data_ptr() % 16 == 0 and values.numel() % 16 == 0
            launches.setdefault((values.device, values.dtype, aligned), []).append((values, bits))
    for (device, _, aligned), group in launches.items():
        _launch(group, device, aligned)


def _launch(pairs: Sequence[tuple[Tensor, Tensor]], device: torch.device, aligned: bool) -> None:
    """One launch for values of one dtype and the bits of their masks."""
    rows = tuple((values.data_ptr(), bits.data_ptr(), values.numel()) for values, bits in pairs)
    grid = (-(-max(count for *_, count in rows) // _BLOCK), len(rows))
    first = pairs[0][0]
    if device.type == "cuda":
        with torch.cuda.device(device):
            table = _table(rows, device, torch.cuda.current_stream().cuda_stream)
            _kernel()[grid](first, table, BLOCK=_BLOCK, ALIGNED=aligned)
    else:  # Triton's interpreter
        _kernel()[grid](first, _table(rows, device, 0), BLOCK=_BLOCK, ALIGNED=aligned)


@lru_cache(maxsize=4096)
def _table(rows: tuple[tuple[int, int, int], ...], device: torch.device, stream: int) -> Tensor:
    """Addresses and sizes, ``[N, 3]``, on the device; tensors mostly stay where they are. Of its stream alone."""
    table = torch.tensor(rows, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def clear_pruned(like, table, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
        row = table + tl.program_id(1) * 3
        values = tl.load(row).to(like.dtype)
        mask = tl.load(row + 1).to(tl.pointer_type(tl.uint8))
        count = tl.load(row + 2)
        if ALIGNED:
            values, count = tl.multiple_of(values, 16), tl.multiple_of(count, 16)
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        byte = tl.load(mask + at // 8, mask=inside, other=0).to(tl.int32)
        kept = (byte >> (7 - at % 8).to(tl.int32)) & 1
        value = tl.load(values + at, mask=inside, other=0)
        tl.store(values + at, tl.where(kept != 0, value, 0), mask=inside)

    return clear_pruned


@cache
def kernel_runs(device: torch.device) -> bool:
    """Whether the Triton kernel can be compiled for a device, and does what it should there."""
    try:
        masks = [torch.arange(size) % 3 == 0 for size in (13, 48, 16)]
        values = [torch.full(mask.shape, -1.5, device=device) for mask in masks]
        clear_all([(BitMask(mask, device), tensor) for mask, tensor in zip(masks, values, strict=True)])
        right = all(torch.equal(v.cpu(), torch.where(m, -1.5, 0.0)) for v, m in zip(values, masks, strict=True))
        reason = "" if right else "its kernel computes something else"
    except ImportError:
        return False
    except Exception as error:  # Triton has many: no compiler, an unknown architecture, a driver too old
        right, reason = False, f"{type(error).__name__}: {error}"
    if not right:
        warnings.warn(f"masks are held as bytes, not as bits, since Triton fails on {device}: {reason}", stacklevel=2)
    return right
