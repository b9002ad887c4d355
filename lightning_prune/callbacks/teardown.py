"""The end of a fit: the last moment in which weights are where they were trained; and weights that cannot be moved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import NoReturn

from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_prune.naming import own_parameters
from lightning_prune.pruning.offloading import is_offloaded


class BeforeTeardown:
    """Has something done right before a strategy's next teardown, which moves the module and its optimizers away.

    Nothing may touch weights after it: masks of ours stay on the device, and where weights are sharded the processes
    may have parted. ``on_fit_end`` comes after it. ``on_train_end`` comes before, but other callbacks still write
    weights and checkpoints there, and a fit that has nothing left to train never gets to it.

    Args:
        strategy: Of the Trainer.
        action: What to do, once. If it fails, the Trainer tears down after it has told the callbacks (`on_exception`).
    """

    def __init__(self, strategy: Strategy, action: Callable[[], None]) -> None:
        original = strategy.teardown
        own = strategy.__dict__.get("teardown")  # another of this kind
        self._waiting = [action]

        @wraps(original)
        def teardown() -> None:
            waiting = list(self._waiting)
            self.remove()
            for do in waiting:
                do()
            original()

        def unwrap() -> None:
            if strategy.__dict__.get("teardown") is not teardown:
                return  # within another, which is called first, and takes itself off
            if own is None:
                del strategy.__dict__["teardown"]
            else:
                strategy.__dict__["teardown"] = own

        self._unwrap = unwrap
        strategy.__dict__["teardown"] = teardown

    def remove(self) -> None:
        """Take it back: after an exception there is a teardown too."""
        self._waiting.clear()
        self._unwrap()


def refuse_offloaded(strategy: Strategy, module: nn.Module) -> None:
    """Refuse to train weights that accelerate keeps elsewhere (``device_map``), before Lightning fails to move them.

    Raises:
        ValueError: naming the first.
    """
    for name, layer in module.named_modules():
        if is_offloaded(layer) and any(parameter.is_meta for parameter in own_parameters(layer).values()):
            refuse_unmovable(
                strategy,
                f"the weight of {name!r} is offloaded to main memory or disk (device_map), where nothing trains it: "
                "load the model without device_map; lightning_prune.prune takes it as it is",
            )


def refuse_unmovable(strategy: Strategy, message: str) -> NoReturn:
    """Refuse a module that has weights without values, so that this is what the user sees.

    The strategy's teardown moves the module all the same, and torch's error would come last.

    Raises:
        ValueError: with the message.
    """
    original = strategy.teardown
    own = strategy.__dict__.get("teardown")

    @wraps(original)
    def teardown() -> None:
        del strategy.__dict__["teardown"]
        strategy.__dict__.update({} if own is None else {"teardown": own})
        with suppress(NotImplementedError):  # there is nothing to move
            original()

    strategy.__dict__["teardown"] = teardown
    raise ValueError(message)
