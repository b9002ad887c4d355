"""Put weights back, to the bit, if what changes them fails or is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.masks import uninterrupted
from lightning_prune.sharding import local

Keeper = Callable[[nn.Parameter], None]


class Originals:
    """Copies of parameters in main memory; of a sharded one, of this rank's part."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def keep(self, parameter: nn.Parameter) -> None:
        """Copy a parameter that is about to change, the first time it is named."""
        if id(parameter) not in self._copies:
            self._copies[id(parameter)] = (parameter, local(parameter.detach()).to("cpu", copy=True))

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Put some parameters back that were kept, or all; interrupts wait until that is done."""
        chosen = [self._copies[id(p)] for p in parameters] if parameters is not None else self._copies.values()
        with uninterrupted():
            for parameter, copy in chosen:
                local(parameter).copy_(copy)


@contextmanager
def restored_on_failure() -> Iterator[Originals]:
    """Give something that remembers parameters before they change; put all back if the block fails."""
    originals = Originals()
    try:
        yield originals
    except BaseException:
        originals.restore()
        raise
