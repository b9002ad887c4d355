"""Walk a model block by block: each block meets the outputs of the already pruned blocks before it.

A model with several stacks of blocks (encoder and decoder, image encoder and language model) is walked stack by
stack, in the order in which they run: the inputs of a stack are recorded when those before it are done, so all that
it receives, such as the encoder's output, comes from pruned weights.

Only the inputs of one block are held at a time, for all samples. What else a block receives (attention mask,
positions, rotary embeddings, whatever the architecture passes) is recorded by a forward pass in which every block is
a pass-through, so nothing here depends on a family; blocks that return more than hidden states are run, for the next
one may need it. So what a model adds to the hidden states between two blocks is what it adds to these. A loss that
runs the model more than once (on chosen and rejected texts) has a record of each time.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.naming import own_parameters
from lightning_prune.pruning.batches import batch_size, form_of, take
from lightning_prune.pruning.batches import samples as first_samples
from lightning_prune.pruning.forwards import forwards_replaced
from lightning_prune.pruning.padding import Padding, PaddingFinder
from lightning_prune.pruning.projections import without_fast_path
from lightning_prune.pruning.room import Passes, Room, numbers_in
from lightning_prune.pruning.running import ForwardContext, RandomStates
from lightning_prune.ranks import Ranks, in_step, meet, no_sample, synchronized_errors
from lightning_prune.sharding import reshard, type_name

_T = TypeVar("_T")


class _AllRecordedError(Exception):
    """Every block has been recorded."""


@dataclass
class _Call:
    """What one block receives beside the hidden states, for one batch.

    Attributes:
        args: By position.
        kwargs: By name.
        keyword: That of the hidden states, where they have one.
        added: What the model adds to the hidden states ahead of the block (images, in Qwen3-VL); None: nothing.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: str | None
    added: Tensor | None = None


@dataclass
class BlockBatch:
    """One batch on its way through the blocks, once.

    Attributes:
        hidden: Input of the next block, ``[B, T, D]``.
        padding: Of the batch, or None.
        block: One of the blocks.
        samples: B.
        calls: What each block receives beside the hidden states.
        device: Where the blocks run.
        numbers: In the largest tensor of the batch; 0 of one that cannot be taken apart.
        counting: False for a batch that only keeps other ranks company.
        again: Whether its samples are counted already, in an earlier run of the model on the same batch.
    """

    hidden: Tensor
    padding: Padding | None
    block: nn.Module
    samples: int
    calls: list[_Call]
    device: torch.device
    numbers: int
    counting: bool = True
    again: bool = False

    @property
    def keep(self) -> Tensor | None:
        """``[B, T]`` bool, True where a row of the hidden states is real, or None: all are."""
        if self.padding is None or self.hidden.dim() != 3:
            return None
        keep = self.padding.keep(type_name(self.block), self.block, self.hidden, self.hidden.shape)
        return None if keep is None else keep.reshape(self.hidden.shape[:2])


@dataclass(frozen=True)
class Samples:
    """Calibration samples, and how they run through a model.

    Attributes:
        model: The model.
        batches: Calibration batches.
        number: Samples to use.
        run: ``run(model, batch)`` starts a forward pass.
        forward_context: Makes the context that forward passes run in (autocast).
        ranks: Whose parameters are sharded, so that they run in lock step; or None.
        offload: Where hidden states wait between two blocks, such as the CPU; default where the model made them.
        room: In what pieces batches run.
        compared: Compare what a stack gives block after block with what it gives in the model, for the first batch of
            each form, and each to which something is added between blocks.
        otherwise: What to do about blocks that cannot be walked, as messages have it.
    """

    model: nn.Module
    batches: Iterable[Any]
    number: int
    run: Callable[[nn.Module, Any], Any]
    forward_context: ForwardContext = contextlib.nullcontext
    ranks: Ranks | None = None
    offload: torch.device | None = None
    room: Room = field(default_factory=Room)
    compared: bool = True
    otherwise: str = "use sequential=False"


class BlockWalk:
    """Record the inputs of the first block, then run block after block.

    Args:
        samples: What runs through the model.
        blocks: A stack of its blocks, in the order they run.
        optional: Pass over batches that do not reach the blocks.

    Raises:
        CalibrationError: no sample, or the model does not pass its blocks one tensor of hidden states.
        ShortOfMemoryError: memory ran out; with ranks in lock step, on any of them.
    """

    def __init__(self, samples: Samples, blocks: Sequence[nn.Module], optional: bool = False) -> None:
        self.blocks, self.samples = list(blocks), samples
        self.returns: int | None = None  # length of the tuple that a block returns, 0 for a tensor
        self.to_the_end = samples.ranks is not None  # FSDP2 cannot be left in the middle of a forward pass
        self.optional = optional and samples.ranks is None
        self.runs = 1  # of all blocks for one batch, as the first of its form shows
        self.padding = PaddingFinder(samples.model)
        self.recording = Passes(samples.model, samples.ranks)
        self.passes = [Passes(samples.model, samples.ranks, block) for block in self.blocks]
        self.batches: list[BlockBatch] = []
        given = False
        runs: dict[Any, int] = {}  # by what a batch is made of
        units = samples.room.units(first_samples(samples.batches, samples.number))
        try:
            for (batch, size), counting in in_step(units, samples.ranks):
                given, form = True, form_of(batch)
                self.runs = runs.get(form, 1)
                drawn = RandomStates(samples.model)
                recorded = self._record(batch, size)
                adds = any(call.added is not None for one in recorded for call in one.calls)
                if recorded and samples.compared and samples.ranks is None and (adds or form not in runs):
                    recorded = self._compared(batch, size, recorded, drawn)
                if recorded:
                    runs[form] = self.runs
                for one in recorded:
                    one.counting = counting
                self.batches += recorded
        finally:
            reshard(samples.model)
        if not given:
            raise no_sample()
        if not self.batches:
            raise CalibrationError(
                f"no calibration sample reached the {len(self.blocks)} {type_name(self.blocks[0])} blocks; add them to "
                "`ignore`, or use other samples"
            )

    @torch.no_grad()
    def run(self, index: int, keep_output: bool = False) -> Iterator[BlockBatch]:
        """Run every batch through block `index`; each is yielded before it runs.

        With `keep_output`, the outputs become the inputs of the next block.

        Raises:
            ShortOfMemoryError: memory ran out; with ranks in lock step, on any of them.
        """
        for batch in self.batches:
            yield batch
            output = self._finished(
                self.passes[index], partial(self.forward, index, batch, batch.hidden), batch.numbers, batch.samples
            )
            if keep_output:
                assert output is not None
                batch.hidden = self.put_by(output)

    def _finished(self, passes: Passes, work: Callable[[], _T], numbers: int, size: int) -> _T | None:
        """What a pass over a batch gives, once no rank has run out of memory in it."""
        result, short = passes.run(work)
        if short is not None:
            self.samples.room.missed = numbers, size
        meet(self.samples.ranks, short, [])
        return result

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
        hidden = hidden.to(batch.device, copy=True)  # a block may change its input in place
        if call.added is not None:
            hidden = hidden + call.added.to(batch.device)
        args, kwargs = (hidden, *call.args), call.kwargs
        if call.keyword is not None:
            args, kwargs = (), {call.keyword: hidden, **call.kwargs}  # first, as `hidden_keyword` finds it
        kwargs = _with_own_caches(kwargs)
        with self.samples.forward_context():
            if weights is None:
                output = self.blocks[index](*args, **kwargs)
            else:
                block = self.blocks[index]
                own = _once_each(block, weights)
                # Where a module has two names, torch's own way with ties leaves one of these weights in it.
                output = torch.func.functional_call(block, own, args, kwargs, tie_weights=False)
        return self._hidden_of(output, index)

    def put_by(self, hidden: Tensor) -> Tensor:
        """Hidden states where they wait until they are needed."""
        return hidden if self.samples.offload is None else hidden.to(self.samples.offload)

    @torch.no_grad()
    def _record(self, batch: Any, size: int) -> list[BlockBatch]:
        """What the blocks receive of a batch each time that they run on it; nothing if they do not."""
        runs: list[list[_Call]] = [[]]
        first: list[Tensor] = []
        passed: list[tuple[Any, int]] = []  # what each block handed on, and how often that had been written to
        beside: list[Tensor] = []  # what else the last block has returned
        inside: list[Padding | None] = []
        forwards = [block.forward for block in self.blocks]

        def recorder(index: int) -> Callable[..., Any]:
            def record(*args: Any, **kwargs: Any) -> Any:
                if index == 0 and len(runs[-1]) == len(self.blocks) and len(runs) < self.runs:
                    runs.append([])
                calls = runs[-1]
                if len(calls) != index:
                    raise self._refusal(
                        f"decoder block {index} ran out of order: block by block needs blocks that run once each, one "
                        "after the other"
                    )
                keyword = None if args else hidden_keyword(kwargs)
                hidden = args[0] if keyword is None else kwargs.pop(keyword, None)
                if not isinstance(hidden, Tensor):
                    raise self._refusal(f"decoder block {index} takes no tensor of hidden states first")
                added = None
                if index > 0 and not _same(hidden, *passed[-1]):
                    added = self._added(hidden, *passed[-1])
                # A second stream (Reformer): it would come from the dense blocks before.
                given = (*args, *kwargs.values())
                if any(other is one and one.shape == hidden.shape for one in beside for other in given):
                    raise self._computes_between()
                if index == 0:
                    first.append(hidden)
                    inside.append(None if padding is None else padding.now)  # of the call that the blocks belong to
                calls.append(_Call(args[1:], kwargs, keyword, added))
                if len(calls) == len(self.blocks) and self.runs == 1 and not self.to_the_end:
                    raise _AllRecordedError
                output: Any = hidden
                if self.returns is None or self.returns > 1:
                    own = hidden.clone()
                    named = kwargs if keyword is None else {keyword: own, **kwargs}
                    output = forwards[index](*(own, *args[1:])[: len(args)], **_with_own_caches(named))
                    self.returns = len(output) if isinstance(output, (tuple, list)) else 0
                    if not self.returns:
                        self._hidden_of(output, index)
                handed = _first(output) if self.returns > 1 else hidden
                beside[:] = [part for part in output[1:] if isinstance(part, Tensor)] if self.returns > 1 else []
                passed.append((handed, _times_written(handed)))
                if self.returns > 1:
                    return output
                return (hidden,) if self.returns else hidden

            return record

        padding = self.padding.find(batch)
        numbers = 0 if batch_size(batch) is None else numbers_in(batch, size)
        with (
            forwards_replaced({block: recorder(index) for index, block in enumerate(self.blocks)}),
            self.padding.watching(),
            self.samples.forward_context(),
            without_fast_path(),  # where blocks would meet nested tensors
            contextlib.suppress(_AllRecordedError),
        ):
            self._finished(self.recording, partial(self.samples.run, self.samples.model, batch), numbers, size)
        if self.optional and not runs[0]:
            return []
        if len(runs[-1]) != len(self.blocks):
            raise self._refusal(f"only {len(runs[-1])} of {len(self.blocks)} decoder blocks ran")
        if batch_size(batch) is None:
            size = first[0].shape[0]
        return [
            BlockBatch(
                self.put_by(hidden.detach()), mask, self.blocks[0], size, calls, hidden.device, numbers, again=again > 0
            )
            for again, (hidden, mask, calls) in enumerate(zip(first, inside, runs, strict=True))
        ]

    @torch.no_grad()
    def _compared(self, batch: Any, size: int, recorded: list[BlockBatch], drawn: RandomStates) -> list[BlockBatch]:
        """The record of a batch, anew if the blocks run on it more than once.

        Args:
            batch: The batch.
            size: Its samples.
            recorded: What the blocks receive of it.
            drawn: From where that was drawn, by a loss that masks tokens or adds noise: it is compared with the same.

        Raises:
            CalibrationError: blocks that are not all that there is between the first one's input and the last one's
                output, or that run again on what they returned.
        """
        seen: list[Any] = []
        gaps: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by run and block, see `_adds_the_same`
        before: dict[int, Any] = {}

        def receive(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, passed = args[0] if args else kwargs[hidden_keyword(kwargs)], before.pop(index)
            if isinstance(passed, Tensor) and hidden.shape == passed.shape:
                received = _wide(hidden)
                gaps[len(seen), index] = received - passed.to(received), _rounding(hidden) * received.norm(dim=-1)

        def run() -> None:
            handles = [self.blocks[-1].register_forward_hook(lambda _, args, output: seen.append(_first(output)))]
            for index in {i for one in recorded for i, call in enumerate(one.calls) if call.added is not None}:
                handles += [
                    self.blocks[index - 1].register_forward_hook(
                        lambda _, args, output, index=index: before.update({index: _first(output)})
                    ),
                    self.blocks[index].register_forward_pre_hook(
                        lambda _, args, kwargs, index=index: receive(index, args, kwargs), with_kwargs=True
                    ),
                ]
            try:
                with self.samples.forward_context():
                    self.samples.run(self.samples.model, batch)
            finally:
                for handle in handles:
                    handle.remove()

        def walk(one: BlockBatch) -> Tensor:
            hidden = one.hidden
            for index in range(len(self.blocks)):
                hidden = self.forward(index, one, hidden)
            return hidden

        with without_fast_path():
            with drawn.again():
                self._finished(self.recording, run, recorded[0].numbers, recorded[0].samples)
            if len(seen) > 1:
                self.runs = len(seen)
                with drawn.again():
                    recorded = self._record(batch, size)
            for number, (one, expected) in enumerate(itertools.zip_longest(recorded, seen)):
                if one is None or expected is None or not _adds_the_same(one, number, gaps):
                    raise self._computes_between()
                hidden = self._finished(self.recording, partial(walk, one), one.numbers, one.samples)
                assert hidden is not None  # which it is of ranks in lock step alone
                tolerance = _tolerance(hidden)
                hidden, expected = hidden.float(), expected.float()
                if hidden.shape != expected.shape or (hidden - expected).norm() > tolerance * expected.norm():
                    raise self._computes_between()
        return recorded

    def _added(self, hidden: Tensor, passed: Any, version: int) -> Tensor:
        """What has been added to the hidden states that a block handed on, if that is all that was done to them.

        Whether it does not depend on them is seen when the batch is compared: it is recorded of pass-throughs.

        Raises:
            CalibrationError: they were replaced, or changed in place; or the batch will not be compared, or only with
                what the same blocks gave.
        """
        compared = self.samples.compared and self.samples.ranks is None and self.returns in (0, 1)
        if not compared or not isinstance(passed, Tensor) or hidden is passed or hidden.shape != passed.shape:
            raise self._computes_between()
        if _times_written(passed) != version:
            raise self._computes_between()
        return self.put_by(hidden.detach() - passed.detach().to(hidden))

    def _computes_between(self) -> CalibrationError:
        return self._refusal(
            f"the {len(self.blocks)} {type_name(self.blocks[0])} modules of {type_name(self.samples.model)}, run one "
            "after the other, do not give what they give in the model, which runs them again on what they gave, or "
            "computes something between them"
        )

    def _hidden_of(self, output: Any, index: int) -> Tensor:
        """The hidden states that block `index` returns; it is refused if there are none."""
        if not isinstance(hidden := _first(output), Tensor):
            raise self._refusal(
                f"decoder block {index} returns a {type(hidden).__name__}, no tensor of hidden states for the next one"
            )
        return hidden

    def _refusal(self, why: str) -> CalibrationError:
        return CalibrationError(f"{why}; {self.samples.otherwise}")


def _same(received: Tensor, passed: Any, version: int) -> bool:
    """Whether a block receives what the one before it returned, on whichever device and in whichever precision."""
    if not isinstance(passed, Tensor):
        return False
    if received is passed:
        return _times_written(received) == version
    return received.shape == passed.shape and torch.allclose(received.to(passed), passed, 0, 0, equal_nan=True)


def _adds_the_same(one: BlockBatch, run: int, gaps: Mapping[tuple[int, int], tuple[Tensor, Tensor]]) -> bool:
    """Whether the model adds to real hidden states what it has added to those of pass-throughs, row by row.

    Args:
        one: The record of a run.
        run: Its number.
        gaps: By run and block, what was added to real hidden states, and how far that is rounded in each row.
    """
    passed = one.hidden
    for index, call in enumerate(one.calls):
        if call.added is None:
            continue
        passed = passed + call.added
        if (run, index) not in gaps:
            return False
        gap, rounded = gaps[run, index]
        added = call.added.to(gap)
        bound = rounded + _rounding(passed) * passed.to(gap).norm(dim=-1) + _tolerance(passed) * added.norm(dim=-1)
        if bool(((gap - added).norm(dim=-1) > bound).any()):
            return False
    return True


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))


def _rounding(hidden: Tensor) -> float:
    return torch.finfo(hidden.dtype).eps


def _tolerance(hidden: Tensor) -> float:
    """How far two ways to compute the same may differ."""
    return 1e-3 if hidden.dtype.itemsize > 2 else 5e-2


def _times_written(tensor: Any) -> int:
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


def hidden_keyword(kwargs: Mapping[str, Any]) -> str:
    """The keyword by which a block is given its hidden states; the first where none has the usual name."""
    return "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs), "hidden_states")


def _first(output: Any) -> Any:
    """What a block returns for the next one."""
    return output[0] if isinstance(output, (tuple, list)) else output


def _once_each(block: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a block by one name for each module that has them, where parameters or modules are shared."""
    given = {block.get_parameter(name): weight for name, weight in weights.items()}
    return {
        f"{path}.{name}" if path else name: given[parameter]
        for path, module in block.named_modules()
        for name, parameter in own_parameters(module).items()
        if parameter in given
    }


def _with_own_caches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a block receives, with copies of caches of keys and values (PEFT's prefixes), to which it adds its own."""
    return {n: copy.deepcopy(v) if hasattr(v, "get_seq_length") else v for n, v in kwargs.items()}


def walk_stacks(
    samples: Samples, stacks: Sequence[Sequence[nn.Module]], errors: Ranks | None = None
) -> Iterator[tuple[int, BlockWalk]]:
    """Walk several stacks of blocks in the order in which they run.

    A stack is recorded when its walk is asked for, so it meets what has become of the stacks before it.

    Args:
        samples: What runs through the model; its batches are held until the end if there are several stacks.
        stacks: Blocks of each stack.
        errors: Processes that do not run in lock step: an error of one while it records is the error of all.

    Yields:
        The position of a stack in `stacks`, and its walk.
    """
    several, order = len(stacks) > 1, [0]
    if several:
        with synchronized_errors(errors):
            held = [batch for batch, _ in first_samples(samples.batches, samples.number)]
            samples = replace(samples, batches=held)
            order = _running_order(samples, stacks, held[:1])
    unplaced: PaddingFinder | None = None
    for position in order:
        with synchronized_errors(errors):
            walk = BlockWalk(samples, stacks[position], several)
        if unplaced is not None:
            walk.padding.unplaced.update(unplaced.unplaced)
        unplaced = walk.padding
        yield position, walk
    if unplaced is not None:
        unplaced.warn()


def _running_order(samples: Samples, stacks: Sequence[Sequence[nn.Module]], first: Sequence[Any]) -> list[int]:
    """Positions of stacks as the first sample runs through them; as they are in the model where it misses one."""
    first = [take(batch, 0, 1) if batch_size(batch) else batch for batch in first]
    ran: dict[int, None] = {}
    handles = [
        stack[0].register_forward_pre_hook(lambda *_, position=position: ran.setdefault(position))
        for position, stack in enumerate(stacks)
    ]
    try:
        with torch.no_grad(), samples.forward_context():
            for batch, _ in in_step(first, samples.ranks):
                samples.run(samples.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return list(ran) if len(ran) == len(stacks) else list(range(len(stacks)))
