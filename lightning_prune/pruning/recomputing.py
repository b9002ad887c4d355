"""Hold a block's activations, and what is brought of its weights, for its own backward pass alone.

Autograd keeps every weight and every activation that a forward pass has met until its backward. Of a block that is
checkpointed it keeps the inputs; the block runs again in the backward pass, which brings its weights once more, and
both go when its backward is done.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_prune.pruning.forwards import forwards_replaced


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the code inside runs, blocks run again in the backward pass; those in training mode do so by themselves."""
    others = {block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks if not block.training}
    # A block that stops once autograd has all it needs would leave the weights of a layer where they were brought.
    with set_checkpoint_early_stop(False), forwards_replaced(others):
        yield
