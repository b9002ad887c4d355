"""Change which parameters a module has while it trains, whatever holds on to them: DDP, optimizers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


@contextmanager
def without_wrapper(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Take DDP off the module while the block changes shapes or flags of parameters, and wrap it anew after."""
    strategy: Any = trainer.strategy
    wrapped = isinstance(strategy.model, DistributedDataParallel)
    if wrapped:
        # The old wrapper's hooks on the parameters must be gone before shapes change.
        strategy.model = module
        gc.collect()
    try:
        yield
    finally:
        if wrapped:
            strategy.configure_ddp()


def put_in_place(optimizers: Sequence[Optimizer], successors: Mapping[Tensor, Sequence[Tensor]]) -> None:
    """Have optimizers go on with what requires a gradient now; groups keep their settings, schedules go on.

    Args:
        optimizers: Their parameters without a gradient leave, with their states; those among them that others step
            may share groups with them.
        successors: Parameters that join the group which holds (or held) another.
    """
    left: dict[Tensor, None] = {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        joined = [new for p in group["params"] for new in (p, *successors.get(p, ()))]
        group["params"] = [p for p in joined if p.requires_grad]
        left |= dict.fromkeys(p for p in joined if not p.requires_grad)
    for p in left:
        p.grad = None
        for optimizer in optimizers:
            optimizer.state.pop(p, None)
