"""Make do with less memory where a calibration batch does not fit: smaller batches, blocks that are recomputed.

Autograd keeps every weight and every activation that a forward pass has met until its backward. Of a block that is
checkpointed it keeps the inputs; the block runs again in the backward pass, which brings its weights once more, and
both go when its backward is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_prune.pruning.batches import tensors_of
from lightning_prune.pruning.forwards import forwards_replaced


class Room(ExitStack):
    """How batches are run so that they fit; what it does to the blocks ends with its own ``with``.

    Args:
        blocks: What can be recomputed in the backward pass.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = list(blocks)
        self.most: int | None = None  # numbers in the largest tensor of a batch that may still fit
        self.chosen: dict[str, str] = {}

    def recompute(self) -> bool:
        """Hold blocks' inputs alone until the backward pass; returns whether that is anything new."""
        new = bool(self.blocks)
        if new:
            self.enter_context(recomputed(self.blocks))
        self.blocks = []
        return new

    def make(self, batch: Any, size: int, divisible: bool) -> bool:
        """Choose what needs less memory for a batch that did not fit; returns whether there is anything left.

        Args:
            batch: The batch.
            size: Its samples.
            divisible: Whether they give the same sums in several pieces.
        """
        torch.cuda.empty_cache()  # pieces of another size could not use what is cached for these; nothing without CUDA
        if divisible and size > 1:
            self.most = _numbers(batch, size) // 2
            self.chosen["pieces"] = f"batches of {size} samples ran in pieces of {self.samples_in(batch, size)}"
            return True
        if self.recompute():
            self.chosen["blocks"] = "blocks ran again in the backward pass"
            return True
        return False

    def samples_in(self, batch: Any, size: int) -> int:
        """How many of a batch's samples run at once."""
        return size if self.most is None else max(1, min(size, size * self.most // _numbers(batch, size)))

    def __str__(self) -> str:
        """What was chosen; empty where there was room for everything."""
        if not self.chosen:
            return ""
        return f"memory was short, so {' and '.join(self.chosen.values())}; the statistics are the same, up to rounding"


def _numbers(batch: Any, size: int) -> int:
    return max([size, *(tensor.numel() for tensor in tensors_of(batch))])


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the code inside runs, blocks run again in the backward pass; those in training mode do so by themselves."""
    others = {block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks if not block.training}
    # A block that stops once autograd has all it needs would leave the weights of a layer where they were brought.
    with set_checkpoint_early_stop(False), forwards_replaced(others):
        yield
