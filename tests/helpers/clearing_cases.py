"""What both forms of a held mask must do, to the bit; run on any device, and by Triton's interpreter."""

from __future__ import annotations

import sys

import torch

from lightning_prune.pruning import clearing

SHAPES = [(1,), (8,), (16, 32), (5, 7), (4, 3, 2, 5), (3, 4099), (0, 4)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn]


def compare(form: type, device: str) -> None:
    """Every dtype with any bits (NaN, infinity), several blocks, and transposed tensors; alone and together."""
    generator = torch.Generator().manual_seed(0)
    pairs, expectations = [], []
    for shape in SHAPES:
        mask = torch.rand(shape, generator=generator) < 0.5
        held = form(mask, torch.device(device))
        assert torch.equal(held.bool().cpu(), mask)
        for dtype in DTYPES:
            raw = torch.randint(256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
            expected = raw.masked_fill(~mask[..., None], 0)
            values = raw.to(device).view(dtype)[..., 0]
            for tensor in (values.clone(), values.mT.contiguous().mT if values.dim() > 1 else values.clone()):
                held.clear(tensor)
                assert torch.equal(tensor.contiguous()[..., None].view(torch.uint8).cpu(), expected), (shape, dtype)
            pairs.append((held, values))
            expectations.append(expected)
    clearing.clear_all(pairs)
    for (_, values), expected in zip(pairs, expectations, strict=True):
        assert torch.equal(values[..., None].view(torch.uint8).cpu(), expected), (values.shape, values.dtype)


if __name__ == "__main__":
    assert clearing.kernel_runs(torch.device("cpu"))
    compare(clearing.BitMask, sys.argv[1])
