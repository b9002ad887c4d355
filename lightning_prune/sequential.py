"""Walk a model decoder block by decoder block: each block meets the outputs of the already pruned blocks before it.

Only the inputs of one block are held at a time, for all samples. What else a block receives (attention mask,
positions, rotary embeddings, whatever the architecture passes) is recorded by a forward pass in which every block is
a pass-through, so nothing here depends on a family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        calls: What each block receives beside the hidden states.
        device: Where the blocks run.
        counting: False for a batch that only keeps other ranks company.
    """

    hidden: Tensor
    keep: Tensor | None
    samples: int
    calls: list[_Call]
    device: torch.device
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
        offload: Where hidden states wait between two blocks, such as the CPU; default where the model made them.

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
        offload: torch.device | None = None,
    ) -> None:
        self.blocks = list(blocks)
        self.offload = offload
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
            output = self.forward(index, batch, batch.hidden)
            if keep_output:
                batch.hidden = self.put_by(output)

    def forward(
        self, index: int, batch: BlockBatch, hidden: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """What block `index` makes of hidden states ``[B, T, D]``, with what else it receives for this batch.

        Args:
            index: The block.
            batch: Whose masks and positions it receives.
            hidden: Its input, wherever it is.
            weights: Parameters to run the block with in place of its own, by their names in the block.
        """
        call = batch.calls[index]
        hidden = hidden.to(batch.device)
        args, kwargs = (hidden, *call.args), call.kwargs
        if call.by_keyword:
            args, kwargs = (), {**call.kwargs, "hidden_states": hidden}
        with self.forward_context():
            if weights is None:
                output = self.blocks[index](*args, **kwargs)
            else:
                output = torch.func.functional_call(self.blocks[index], dict(weights), args, kwargs)
        whole: Tensor = output[0] if isinstance(output, tuple) else output
        return whole

    def put_by(self, hidden: Tensor) -> Tensor:
        """Hidden states where they wait until they are needed."""
        return hidden if self.offload is None else hidden.to(self.offload)

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
        hidden = first[0].detach()
        return BlockBatch(self.put_by(hidden), padding_mask(batch), size, calls, hidden.device)
