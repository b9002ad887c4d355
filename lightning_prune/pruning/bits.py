"""Pack a bool mask into bits, and unpack it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Bool mask to bits, uint8 ``[ceil(numel / 8)]``, first element in the highest bit of the first byte.

    >>> pack_mask(torch.tensor([True, False, False, False, False, False, False, True, True])).tolist()
    [129, 128]
    """
    flat = mask.detach().reshape(-1)
    if flat.device.type == "cpu":  # numpy's takes a fiftieth of the time of eight shifts
        return torch.from_numpy(np.packbits(flat.numpy()))
    return bits_by_product(torch.nn.functional.pad(flat, (0, -flat.numel() % 8)))


def bits_by_product(flat: Tensor) -> Tensor:
    """The bits of a flat bool mask of whole bytes, as `pack_mask`, in three passes on any device."""
    # Each product with eight bytes of 0 or 1 has them as bits in its highest byte.
    products = flat.view(torch.int64).mul(0x8040201008040201 - (1 << 64))
    return products.bitwise_right_shift_(56).to(torch.uint8)


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `pack_mask`."""
    if packed.device.type == "cpu":
        flat = torch.from_numpy(np.unpackbits(packed.numpy())).view(torch.bool)
    else:
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=packed.device)
        flat = ((packed[:, None] >> shifts) & 1).bool().view(-1)
    size = torch.Size(shape)
    return flat[: size.numel()].view(size)
