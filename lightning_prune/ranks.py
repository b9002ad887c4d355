"""Let processes act together: sums, checks and errors that are the same on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_prune.errors import CalibrationError
from lightning_prune.sharding import Layout, all_gather, chunk, cut_once, reduce_scatter

_Unit = TypeVar("_Unit")


class ShortOfMemoryError(torch.OutOfMemoryError):
    """Memory ran out in a pass for which no rank waits any more: it may run again in a way that needs less.

    Attributes:
        here: On this rank.
    """

    here = True


@dataclass(frozen=True)
class Ranks:
    """The processes of one distributed pruning. Every rank of the default group must make the same calls.

    Attributes:
        data_group: Ranks that calibrate on different samples, over which statistics are summed. None: the default
            group. Ranks outside it (tensor parallelism) see the same samples.
        lockstep: Forward passes hold collectives (parameters are sharded), so every rank runs as many of them.
    """

    data_group: dist.ProcessGroup | None = None
    lockstep: bool = False

    @property
    def world_size(self) -> int:
        """Number of processes in all."""
        return dist.get_world_size()

    def data_ranks(self) -> frozenset[int]:
        """Global ranks of the data group."""
        return frozenset(dist.get_process_group_ranks(self.data_group or dist.group.WORLD))

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be sent: NCCL sends none from main memory."""
        return (
            torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        )

    def sum_samples(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that saw different samples, on the tensor's device; the tensor may be overwritten."""
        return self._sum(tensor, self.data_group)

    def sum_parts(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, on the tensor's device; the tensor may be overwritten."""
        return self._sum(tensor, None)

    def _sum(self, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        # Aggregates may be held in main memory, and so may offloaded shards.
        sent = tensor.to(self.device) if tensor.device.type == "cpu" else tensor
        dist.all_reduce(sent, group=group)
        return sent.to(tensor.device)

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank()

    @property
    def all_differ(self) -> bool:
        """Whether each rank has samples of its own (not under tensor parallelism)."""
        return dist.get_world_size(self.data_group) == self.world_size

    def spreads(self, layout: Layout) -> bool:
        """Whether the Hessian of a layer is spread: each rank keeps some rows of it (not under tensor parallelism)."""
        return self.lockstep and layout.if_spread(self) is not None and self.all_differ and self.world_size > 1

    def sum_to_rows(self, hessian: Tensor) -> Tensor:
        """Sum ``[I, I]`` over the ranks that saw different samples; each gets its rows of the sum, ``[i, I]``."""
        return reduce_scatter(hessian, self.data_group)

    def own_rows(self, hessian: Tensor) -> Tensor:
        """This rank's rows of ``[I, I]``, which every rank has whole."""
        size, rank = dist.get_world_size(self.data_group), dist.get_rank(self.data_group)
        start, stop = chunk(0, len(hessian), size, rank)
        return hessian[start:stop].clone()

    def whole_of_rows(self, rows: Tensor) -> Tensor:
        """All rows of a square matrix, ``[I, I]``, from this rank's of `sum_to_rows`."""
        return all_gather(rows, rows.shape[1], self.data_group)

    def gather(self, values: list[int]) -> list[list[int]]:
        """The integers of every process, in the order of ranks."""
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return [part.tolist() for part in parts]

    def agree(self, error: BaseException | None) -> None:
        """Meet; if any rank has an error, every rank raises: its own, or that of the first rank that failed.

        All raise a `ShortOfMemoryError`, or none does: it gives way to any other error.

        Raises:
            CalibrationError: another rank failed.
            ShortOfMemoryError: another rank's.
            BaseException: `error`, if there is one.
        """
        messages: list[tuple[bool, str] | None] = [None] * self.world_size
        mine: tuple[bool, str] | None
        if isinstance(error, ShortOfMemoryError):
            mine = (True, f"rank {self.rank} ran out of memory: {error}" if error.here else str(error))
        elif error is not None:
            mine = (False, f"rank {self.rank} failed: {type(error).__name__}: {error}")
        else:
            mine = None
        dist.all_gather_object(messages, mine)
        failed = [message for message in messages if message is not None]
        useful = all(short for short, _ in failed)
        if error is not None and (useful or not isinstance(error, ShortOfMemoryError)):
            raise error
        for short, text in failed:
            if not short:
                raise CalibrationError(text)
            if useful:
                problem = ShortOfMemoryError(text)
                problem.here = False
                raise problem


def meet(ranks: Ranks | None, error: Exception | None, values: list[int]) -> list[list[int]]:
    """In lock step: the values of every rank, or the error of any of them. Without `ranks`: these, or this error.

    Raises:
        Exception: `error`; CalibrationError where it is another rank's.
    """
    if ranks is None:
        if error is not None:
            raise error
        return [values]
    every = ranks.gather([int(error is not None), *values])
    if any(failed for failed, *_ in every):
        ranks.agree(error)
    return [rest for _, *rest in every]


def in_step(units: Iterable[_Unit], ranks: Ranks | None) -> Iterator[tuple[_Unit, bool]]:
    """This rank's units of work, each with True; in lock step, the last again with False until every rank's have ended.

    Raises:
        CalibrationError: a rank has no unit at all; on every rank.
    """
    iterator = iter(units)
    last: tuple[_Unit] | None = None
    while True:
        unit: tuple[_Unit] | None = None
        error: Exception | None = None
        try:
            unit = next(((item,) for item in iterator), None)
            if unit is None and last is None and ranks is not None:
                raise no_sample(" on this rank")
        except Exception as caught:
            error = caught
        if not any(busy for (busy,) in meet(ranks, error, [int(unit is not None)])):
            return
        last = unit or last
        assert last is not None
        yield last[0], unit is not None


def no_sample(where: str = "") -> CalibrationError:
    """The error of calibration data that is empty."""
    return CalibrationError(f"calibration saw no sample{where}: `batches` is empty; the weights are unchanged")


@contextmanager
def synchronized_errors(ranks: Ranks | None) -> Iterator[None]:
    """If the block fails on one rank, it fails on every rank with that rank's message, instead of hanging there.

    The block must hold no collective.
    """
    if ranks is None:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    ranks.agree(error)


_K = TypeVar("_K")


@dataclass(frozen=True)
class ShardGroup:
    """The processes that together hold each parameter once; other such groups may hold copies of the shards.

    Attributes:
        group: Their process group; None: parameters are whole, and sums are what they are.
        device_type: Of the tensors that it sends.
    """

    group: dist.ProcessGroup | None = None
    device_type: str = "cpu"

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the tensor's device; the tensor may be overwritten."""
        if self.group is None:
            return values
        sent = values.to(self.device_type)  # offloaded shards are in main memory
        dist.all_reduce(sent, group=self.group)
        return sent.to(values.device)

    def sum_all(self, values: Mapping[_K, Tensor]) -> dict[_K, Tensor]:
        """`sum` of several tensors of one dtype, or of none, in one collective."""
        if self.group is None or not values:
            return dict(values)
        flat = self.sum(torch.cat([v.flatten() for v in values.values()]))
        parts = torch.split(flat, [v.numel() for v in values.values()])
        return {key: part.view(v.shape) for part, (key, v) in zip(parts, values.items(), strict=True)}


def shard_group(parameters: Mapping[str, Tensor]) -> ShardGroup:
    """The processes that a model's parameters are sharded over.

    Raises:
        ValueError: see `cut_once`.
    """
    return ShardGroup(*(cut_once(parameters) or ()))
