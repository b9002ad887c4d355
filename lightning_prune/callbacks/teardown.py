"""The last moment of a fit in which weights are where they were trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from lightning.pytorch.strategies import Strategy


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
