"""Walk a model decoder block by decoder block: each block meets the outputs of the already pruned blocks before it.

Only the inputs of one block are held at a time, for all samples. What else a block receives (attention mask,
positions, rotary embeddings, whatever the architecture passes) is recorded by a forward pass in which every block is
a pass-through, so nothing here depends on a family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batches import batch_size, padding_mask, samples
from lightning_prune.ranks import Ranks, in_step, no_sample
from lightning_prune.sharding import reshard
from lightning_prune.statistics import CalibrationError


class _AllRecordedError(Exception):
    """Every block has been recorded."""


@dataclass
class _Call:
    """What one block receives beside the hidden states, for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_keyword: bool


@dataclass
class BlockBatch:
    """One batch on its way through the blocks.

    Attributes:
        hidden: Input of the next block, ``[B, T, D]``.
        keep: ``[B, T]`` bool, True where a token is real, or None.
        samples: B.
        counting: False for a batch that only keeps other ranks company.
    """

    hidden: Tensor
    keep: Tensor | None
    samples: int
    calls: list[_Call]
    counting: bool = True


class BlockWalk:
    """Record the inputs of the first block, then run block after block.

    Args:
        model: The model.
        blocks: Its decoder blocks, in the order they run, from `find_blocks`.
        batches: Calibration batches.
        num_samples: Samples to use.
        run: ``run(model, batch)`` starts a forward pass.
        forward_context: Makes the context that forward passes run in (autocast).
        ranks: Whose parameters are sharded, so that they run in lock step; or None.

    Raises:
        CalibrationError: no sample, or the model does not pass its blocks one tensor of hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Iterable[Any],
        num_samples: int,
        run: Callable[[nn.Module, Any], Any],
        forward_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        ranks: Ranks | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.forward_context = forward_context
        self.tuples: bool | None = None
        self.to_the_end = ranks is not None  # FSDP2 cannot be left in the middle of a forward pass
        self.batches = []
        for (batch, size), counting in in_step(samples(batches, num_samples), ranks):
            self.batches.append(self._record(model, batch, size, run))
            self.batches[-1].counting = counting
        reshard(model)
        if not self.batches:
            raise no_sample()

    @torch.no_grad()
    def run(self, index: int, keep_output: bool = False) -> Iterator[BlockBatch]:
        """Run every batch through block `index`; each is yielded before it runs.

        With `keep_output`, the outputs become the inputs of the next block.
        """
        for batch in self.batches:
            yield batch
            call = batch.calls[index]
            with self.forward_context():
                output = _invoke(self.blocks[index], call, batch.hidden)
            if keep_output:
                batch.hidden = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def _record(self, model: nn.Module, batch: Any, size: int, run: Callable[[nn.Module, Any], Any]) -> BlockBatch:
        calls: list[_Call] = []
        first: list[Tensor] = []

        def recorder(index: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                if len(calls) != index:
                    raise CalibrationError(
                        f"decoder block {index} ran out of order: block-by-block mode needs blocks that run once "
                        "each, one after the other; use sequential=False"
                    )
                by_keyword = not args
                hidden = kwargs.pop("hidden_states") if by_keyword else args[0]
                if not isinstance(hidden, Tensor):
                    raise CalibrationError(f"decoder block {index} takes no tensor of hidden states first")
                if index == 0:
                    first.append(hidden)
                calls.append(_Call(args[1:], kwargs, by_keyword))
                if len(calls) == len(self.blocks) and not self.to_the_end:
                    raise _AllRecordedError
                if self.tuples is None:  # once: does this architecture's block return a tensor or a tuple?
                    given = {**kwargs, "hidden_states": hidden} if by_keyword else kwargs
                    self.tuples = isinstance(first_forward(*args, **given), tuple)
                return (hidden,) if self.tuples else hidden

            return record

        first_forward = self.blocks[0].forward
        # A forward may have been set on the block itself (device maps of accelerate, torch.compile).
        own = [block.__dict__.get("forward") for block in self.blocks]
        try:
            for index, block in enumerate(self.blocks):
                block.__dict__["forward"] = recorder(index)
            with self.forward_context(), contextlib.suppress(_AllRecordedError):
                run(model, batch)
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)  # back to the class's method
                else:
                    block.__dict__["forward"] = forward
        if len(calls) != len(self.blocks):
            raise CalibrationError(f"only {len(calls)} of {len(self.blocks)} decoder blocks ran; use sequential=False")
        if batch_size(batch) is None:
            size = first[0].shape[0]
        return BlockBatch(first[0].detach(), padding_mask(batch), size, calls)


def _invoke(block: nn.Module, call: _Call, hidden: Tensor) -> Any:
    if call.by_keyword:
        return block(hidden_states=hidden, **call.kwargs)
    return block(hidden, *call.args, **call.kwargs)
