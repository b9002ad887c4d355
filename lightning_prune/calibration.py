"""Collect statistics of layers while samples run through the model.

Forward statistics (input norms, Hessians) cost one forward a sample. Gradient statistics cost one forward and one
backward: the parameters are frozen meanwhile, so that autograd makes no weight gradient at all, and hooks form each
layer's own (see `lightning_prune.taps`). So a batch of B samples gives the aggregate of B batches of one, and no full
set of gradients ever exists.

Where parameters are sharded, forward and backward passes hold collectives, so the ranks run in lock step: each meets
the others before and after every forward pass, one whose samples have ended repeats its last without counting it,
and an error of one is the error of all.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.batches import batch_size, is_sequences, padding_mask, samples, take
from lightning_prune.progress import progress_bar
from lightning_prune.ranks import Ranks, in_step, meet, no_sample, synchronized_errors
from lightning_prune.running import causal_lm_loss, forward, quiet_model
from lightning_prune.sharding import reshard, settle
from lightning_prune.statistics import (
    ALL_STATISTICS,
    GRADIENTS,
    HESSIAN,
    INPUT_NORM,
    OUTPUT_GRAD_NORM,
    CalibrationError,
    LayerStatistics,
    check_finite,
)
from lightning_prune.taps import Taps
from lightning_prune.targets import Target

LossFn = Callable[[nn.Module, Any], Tensor]

# Loss scale for float16 models: output gradients are of the order 1/T, near the smallest float16.
_HALF_SCALE = 2.0**14


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    targets: Sequence[Target],
    statistics: Iterable[str],
    *,
    num_samples: int = 128,
    loss_fn: LossFn | None = None,
    gradient_dtype: torch.dtype = torch.float32,
    gradient_device: torch.device | str | None = None,
    forward_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ranks: Ranks | None = None,
    progress: bool = True,
) -> dict[str, LayerStatistics]:
    """Run calibration samples through the model once and return the statistics of every target.

    The model runs in evaluation mode; its mode, its ``requires_grad`` flags, its ``.grad`` and the global random
    state are afterwards what they were.

    Args:
        model: The model that holds the targets.
        batches: Iterable of batches (see `lightning_prune.prune`).
        targets: From `find_targets`.
        statistics: Names out of `lightning_prune.statistics.ALL_STATISTICS`.
        num_samples: Samples to use in this process; the last batch is cut to fit.
        loss_fn: ``loss_fn(model, batch)`` returns one loss a sample, ``[B]``, or a scalar. With a scalar, batches
            of more than one sample are run sample by sample, which gives the same statistics. Default: the
            next-token cross-entropy of a transformers causal language model.
        gradient_dtype: dtype of gradient aggregates (one buffer of the weight's size a target).
        gradient_device: Their device; default that of the weight.
        forward_context: Makes the context that forward passes run in (autocast).
        ranks: The processes that calibrate together, each on samples of its own; every rank must call.
        progress: Show a progress bar.

    Returns:
        Statistics by parameter name.

    Raises:
        CalibrationError: no sample; NaN or infinity; a target that the samples never reached; a layout of
            inputs whose padding or samples cannot be told apart. With `ranks`, on every rank.
    """
    wanted = frozenset(statistics)
    if unknown := wanted - ALL_STATISTICS:
        raise ValueError(f"statistics {sorted(unknown)} are unknown; choose from {sorted(ALL_STATISTICS)}")
    if not wanted:
        return {}
    taps = Taps(targets, wanted, gradient_dtype, gradient_device, ranks)
    sweep = _Sweep(model, taps, loss_fn, forward_context, ranks)
    # In lock step errors meet inside; an error elsewhere must not start a collective that no other rank is in.
    outside = None if sweep.lockstep is not None else ranks
    settle(model)
    with synchronized_errors(outside), quiet_model(model, freeze=taps.backward):
        try:
            sweep.run(batches, num_samples, progress)
        finally:
            reshard(model)
    return _finish(taps, sweep.samples, ranks)


def collect_forward(
    targets: Sequence[Target],
    statistics: Iterable[str],
    steps: Iterable[tuple[Tensor | None, int, bool]],
    ranks: Ranks | None = None,
) -> dict[str, LayerStatistics]:
    """Forward statistics of some layers while somebody else runs them.

    Args:
        targets: The layers.
        statistics: Out of ``FORWARD_STATISTICS``.
        steps: Yields, *before* each forward pass, the padding mask ``[B, T]`` (or None), the number of its samples, and
            whether they count.
        ranks: See `collect`.

    Returns:
        Statistics by parameter name; empty if there are no targets.
    """
    if not targets:
        return {}
    taps, seen = Taps(targets, frozenset(statistics), ranks=ranks), 0
    error: CalibrationError | None = None
    with synchronized_errors(None if ranks is None or ranks.lockstep else ranks), taps.hooks():
        for keep, size, counting in steps:
            error = error or taps.failure
            taps.begin(size, keep, counting=counting)
            seen += size if counting else 0
    with synchronized_errors(ranks):
        if error := error or taps.failure:
            raise error
    return _finish(taps, seen, ranks)


class _Sweep:
    """One pass over the samples."""

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        loss_fn: LossFn | None,
        forward_context: Callable[[], AbstractContextManager[Any]],
        ranks: Ranks | None,
    ) -> None:
        self.model, self.taps, self.loss_fn, self.forward_context = model, taps, loss_fn, forward_context
        self.lockstep = ranks if ranks is not None and ranks.lockstep else None
        self.device = taps.all[0].target.weight.device
        self.samples = 0
        self.one_by_one = False
        self.queue: deque[tuple[Any, int]] = deque()  # batches taken apart, or to be run again
        if taps.backward and self._runs_in_half():
            taps.scale = _HALF_SCALE

    def _runs_in_half(self) -> bool:
        """Whether output gradients are float16: by the weights, or by autocast."""
        if any(tap.target.weight.dtype == torch.float16 for tap in self.taps.all):
            return True
        with self.forward_context():
            kind = self.device.type
            return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16

    def run(self, batches: Iterable[Any], num_samples: int, progress: bool) -> None:
        """Take in up to `num_samples` samples."""
        kind = "forward + backward" if self.taps.backward else "forward"
        with (
            self.taps.hooks(),
            progress_bar(f"Calibrating ({kind})", num_samples, progress) as advance,
            torch.set_grad_enabled(self.taps.backward),
        ):
            for (batch, count), counting in in_step(self._units(batches, num_samples), self.lockstep):
                advance(self._run_batch(batch, count, counting))
        if 0 < self.samples < num_samples:
            warnings.warn(f"calibration data ended after {self.samples} of num_samples={num_samples}", stacklevel=3)

    def _units(self, batches: Iterable[Any], num_samples: int) -> Iterator[tuple[Any, int]]:
        """Batches to run and the number of their samples; taken apart once that has proved necessary."""
        source = samples(batches, num_samples)
        while (unit := self.queue.popleft() if self.queue else next(source, None)) is not None:
            if self.one_by_one and (size := batch_size(unit[0]) or 1) > 1:
                self.queue.extendleft((take(unit[0], i, i + 1), 1) for i in reversed(range(size)))
            else:
                yield unit

    # -- one batch -----------------------------------------------------------------------------------------------

    def _run_batch(self, batch: Any, count: int, counting: bool) -> int:
        """Run a batch; returns the number of samples taken in."""
        taps, size = self.taps, batch_size(batch)
        if self.one_by_one and size is not None and size > 1:  # a repeated batch
            batch, size = take(batch, 0, 1), 1
        taps.begin(size, padding_mask(batch), is_sequences(batch), counting)
        if not taps.backward:
            with self.forward_context():
                self._forward(batch)
        else:
            losses, problem = self._losses(batch, size, counting)
            split = problem is None and losses is None
            every = meet(self.lockstep, problem, [int(split), *(tap.uses for tap in taps.all)])
            if any(flag for flag, *_ in every):
                # Nothing has been added yet: sums grow only in backward.
                self.one_by_one = True
                if counting:
                    self.queue.appendleft((batch, count))
                return 0
            assert losses is not None
            taps.run_backward(losses.sum() * taps.scale, [uses for _, *uses in every])
        meet(self.lockstep, taps.failure, [])
        if not counting:
            return 0
        self.samples += count
        return count

    def _losses(self, batch: Any, size: int | None, counting: bool) -> tuple[Tensor | None, CalibrationError | None]:
        """One loss a sample, ``[B]``, or a scalar; None if the batch must be taken apart; or what is wrong with it."""
        with self.forward_context():
            losses = (self.loss_fn or causal_lm_loss)(self.model, batch)
        if self.taps.failure is not None:
            return None, self.taps.failure
        if not isinstance(losses, Tensor) or losses.dim() > 1:
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            return None, CalibrationError(f"loss_fn must return a scalar or one loss a sample, got {got}")
        if not losses.requires_grad:
            return None, CalibrationError(
                "the calibration loss does not depend on any layer to prune (is it detached?)"
            )
        if losses.dim() == 1 and losses.shape[0] == 1:
            losses = losses[0]
        if losses.dim() == 1 and losses.shape[0] != size:
            return None, CalibrationError(
                f"loss_fn returned {losses.shape[0]} losses for {size} samples; return one a sample, or a scalar"
            )
        if self.taps.not_per_sample or (losses.dim() == 0 and size != 1):
            if size is None or size == 1:
                return None, CalibrationError(
                    f"per-sample gradients need batches that can be taken apart, got {type(batch).__name__} of "
                    "unknown size; use batches of tensors that share their first dimension"
                )
            return None, None
        if counting and not bool(torch.isfinite(losses).all()):
            return None, CalibrationError(
                f"the loss of a calibration sample is not finite ({losses.detach().flatten().tolist()}); the "
                "weights are unchanged"
            )
        return losses, None

    def _forward(self, batch: Any) -> None:
        if self.loss_fn is not None:
            self.loss_fn(self.model, batch)
        else:
            forward(self.model, batch, [tap.target for tap in self.taps.all])


def _finish(taps: Taps, total: int, ranks: Ranks | None) -> dict[str, LayerStatistics]:
    """Check, sum over ranks, and return the statistics."""
    with synchronized_errors(ranks):
        if not total:
            raise no_sample()
    _check_reached(taps, ranks)
    if ranks is not None:
        total = int(ranks.sum_samples(torch.tensor(total, dtype=torch.int64)))
        _sum_over_ranks(taps, ranks)
    results: dict[str, LayerStatistics] = {}
    with synchronized_errors(ranks):
        for tap in taps.all:
            results[tap.name] = tap.accumulator.result(total)
            check_finite(tap.name, results[tap.name])
    return results


def _check_reached(taps: Taps, ranks: Ranks | None) -> None:
    """Refuse targets that no sample of any rank reached; where another rank's did, the sums here are zero."""
    device = taps.all[0].target.weight.device
    missing = [len(taps.statistics - set(tap.accumulator.sums)) for tap in taps.all]
    every = [missing] if ranks is None else ranks.gather(missing)
    for tap, counts in zip(taps.all, zip(*every, strict=True), strict=True):
        absent = sorted(taps.statistics - set(tap.accumulator.sums))
        if all(counts):
            raise CalibrationError(
                f"no calibration sample reached {tap.name!r} ({', '.join(absent) or 'on other ranks'}): the layer "
                "is not used in the forward pass, or no gradient flows to it; add it to `ignore`, or use more samples"
            )
        for name in absent:
            inputs = tap.target.shape[1] if HESSIAN in taps.statistics else tap.forward_shape[1]
            tap.accumulator.fill(name, (tap.forward_shape[0], inputs), device)


def _sum_over_ranks(taps: Taps, ranks: Ranks) -> None:
    for tap in taps.all:
        sums = tap.accumulator.sums
        for name in sorted(taps.statistics):
            if name in GRADIENTS and tap.layout is not None:
                continue  # summed with every backward
            sums[name] = ranks.sum_samples(sums[name])
            if tap.layout is not None and name in (INPUT_NORM, OUTPUT_GRAD_NORM):
                dim = 1 if name == INPUT_NORM else 0
                sums[name] = tap.layout.whole_vector(sums[name], dim, ranks.data_ranks())
