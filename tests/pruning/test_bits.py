"""Masks as bits: exact round trips, by numpy's packing."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_prune.pruning.bits import bits_by_product, pack_mask, unpack_mask


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 10**6), st.booleans())
def test_packing_round_trip(shape, density, seed, transposed):
    mask = torch.from_numpy(np.random.default_rng(seed).random(shape) < density)
    if transposed:
        mask = mask.transpose(0, -1)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(packed.numpy(), np.packbits(mask.numpy().reshape(-1)))
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


def test_packing_by_products_is_that_of_numpy():
    """What a GPU does, tried on the CPU."""
    for size in (0, 8, 4096):
        mask = torch.rand(size) < 0.5
        np.testing.assert_array_equal(bits_by_product(mask).numpy(), np.packbits(mask.numpy()))
