"""Make do with less memory where a calibration batch does not fit: smaller batches, blocks that are recomputed.

Autograd keeps every weight and every activation that a forward pass has met until its backward. Of a block that is
checkpointed it keeps the inputs; the block runs again in the backward pass, which brings its weights once more, and
both go when its backward is done.

Modules that FSDP2 shards gather their parameters when they run. A rank that runs out of memory between two of them
goes through the others without computing anything, so that no rank waits for it; then all ranks run the pass again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_prune.pruning.batches import batch_size, take, tensors_of
from lightning_prune.pruning.forwards import forwards_replaced
from lightning_prune.pruning.stacks import find_blocks
from lightning_prune.ranks import Ranks, ShortOfMemoryError, meet
from lightning_prune.sharding import gathering, pass_without_work

_T = TypeVar("_T")


class Room(ExitStack):
    """How batches are run so that they fit; what it does to the blocks ends with its own ``with``.

    Args:
        blocks: What can be recomputed in the backward pass.

    Attributes:
        most: Numbers in the largest tensor of a batch that may still fit.
        alone: Samples run one by one, whatever fits.
        queue: Batches that run before others: taken apart, or once more.
        missed: Numbers and samples of the batch that did not fit, where it is not at hand when room is made.
    """

    def __init__(self, blocks: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.blocks = list(blocks)
        self.most: int | None = None
        self.alone = False
        self.queue: deque[tuple[Any, int]] = deque()
        self.missed = (0, 0)
        self.chosen: dict[str, str] = {}

    def units(self, source: Iterator[tuple[Any, int]]) -> Iterator[tuple[Any, int]]:
        """Batches to run and the number of their samples; taken apart where that has proved necessary."""
        while (unit := self.queue.popleft() if self.queue else next(source, None)) is not None:
            size = batch_size(unit[0]) or 1
            together = self.samples_in(unit[0], size)
            if together == size:
                yield unit
                continue
            if self.most is not None:
                self.chosen["pieces"] = f"batches of {size} samples ran in pieces of {together}"
            starts = reversed(range(0, size, together))
            self.queue.extendleft((take(unit[0], i, i + together), min(together, size - i)) for i in starts)

    def samples_in(self, batch: Any, size: int) -> int:
        """How many of a batch's samples run at once."""
        if self.alone or self.most is None:
            return 1 if self.alone else size
        return max(1, min(size, size * self.most // numbers_in(batch, size)))

    def recompute(self) -> bool:
        """Hold blocks' inputs alone until the backward pass; returns whether that is anything new."""
        new = bool(self.blocks)
        if new:
            self.enter_context(recomputed(self.blocks))
        self.blocks = []
        return new

    def make(
        self, problem: torch.OutOfMemoryError, numbers: int, size: int, divisible: bool, ranks: Ranks | None = None
    ) -> None:
        """Choose what needs less memory for a batch that did not fit, on any rank.

        Args:
            problem: Why.
            numbers: In the largest tensor of this rank's batch.
            size: Its samples.
            divisible: Whether they give the same sums in several pieces.
            ranks: Who must choose together; every one must call.

        Raises:
            torch.OutOfMemoryError: `problem`; there is nothing left to choose.
        """
        torch.cuda.empty_cache()  # pieces of another size could not use what is cached for these; nothing without CUDA
        here = not isinstance(problem, ShortOfMemoryError) or problem.here
        every = meet(ranks, None, [int(here), numbers // 2 if divisible and size > 1 else 0])
        halves = [half for missed, half in every if missed]
        if all(halves):  # the smallest, on every rank: batches of about the same size run in as many pieces
            self.most = min(halves if self.most is None else [*halves, self.most])
        elif self.recompute():
            self.chosen["blocks"] = "blocks ran again in the backward pass"
        else:
            raise problem

    def __str__(self) -> str:
        """What was chosen; empty where there was room for everything."""
        if not self.chosen:
            return ""
        return f"memory was short, so {' and '.join(self.chosen.values())}; the statistics are the same, up to rounding"


def numbers_in(batch: Any, size: int) -> int:
    """Numbers in the largest tensor of a batch of so many samples."""
    return max([size, *(tensor.numel() for tensor in tensors_of(batch))])


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """While the code inside runs, blocks run again in the backward pass; those in training mode do so by themselves."""
    others = {block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks if not block.training}
    # A block that stops once autograd has all it needs would leave the weights of a layer where they were brought.
    with set_checkpoint_early_stop(False), forwards_replaced(others):
        yield


class Passes:
    """Forward passes that end in step on all ranks, also where memory runs out in one of them.

    Args:
        model: What runs.
        ranks: Whose parameters are sharded, so that passes hold collectives; or None.
        part: A part of the model that is called by itself.
    """

    def __init__(self, model: nn.Module, ranks: Ranks | None, part: nn.Module | None = None) -> None:
        self.ranks = ranks
        self.units: list[nn.Module] | None = []
        if ranks is not None:
            # Tensor parallelism has collectives between any two layers, and a pass must run all that gather anything.
            known = bool(gathering(model)) and ranks.all_differ and (part is not None or _all_run(model))
            self.units = gathering(model if part is None else part) if known else None

    def run(self, work: Callable[[], _T]) -> tuple[_T | None, ShortOfMemoryError | None]:
        """Do the work of one pass.

        Returns:
            What it gives; and the error of memory that ran out here, of which the caller must tell the other ranks.

        Raises:
            torch.OutOfMemoryError: memory ran out where other ranks may wait for this one.
        """
        if self.units is None:
            return work(), None
        once = _Pass()
        with forwards_replaced({unit: partial(once.forward, unit, unit.forward) for unit in self.units}):
            result = once.run(lambda: self.units or [], work)
        if once.problem is None and max(once.entered.values(), default=1) > 1:
            self.units = None  # how often, then, could not be told of a pass that fails
        return (result, None) if once.problem is None else (None, ShortOfMemoryError(once.problem))


def _all_run(model: nn.Module) -> bool:
    """Whether each module that gathers parameters runs in every pass: decoder blocks, and one around all others."""
    units, inside = gathering(model), {m for _, block in find_blocks(model) for m in block.modules()}
    others = [unit for unit in units if unit not in inside]
    return not others or (others == units[:1] and inside.union(units) <= set(units[0].modules()))


class _Pass:
    """One pass through modules that gather their parameters."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.entered: Counter[nn.Module] = Counter()

    def run(
        self, inside: Callable[[], list[nn.Module]], work: Callable[..., _T], *args: Any, **named: Any
    ) -> _T | None:
        """Do some work; where memory runs out in it, go through the modules `inside` of it that have not run."""
        try:
            if self.problem is None:
                return work(*args, **named)
        except torch.OutOfMemoryError as caught:
            self.problem = str(caught)
        except Exception:
            if self.problem is None:  # else what came of it
                raise
        for unit in inside():
            if not self.entered[unit]:
                self.entered[unit] += 1
                pass_without_work(unit)
        return None

    def forward(self, unit: nn.Module, own: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """The forward pass of a module, between gathering its parameters and letting go of them."""
        self.entered[unit] += 1
        return self.run(partial(gathering, unit), own, *args, **named)
