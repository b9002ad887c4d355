"""Decide, on the first batch, whether the loss of a batch is made of losses of its samples.

Gradient statistics are of one gradient a sample. A contrastive loss, one over pairs, or one with statistics of the
batch has no samples in that sense: run alone, each gives no gradient or a wrong one. Then the batch is one sample.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.batches import batch_size, is_sequences, take
from lightning_prune.pruning.hooks import Taps
from lightning_prune.pruning.room import Passes
from lightning_prune.pruning.running import ForwardContext, without_label
from lightning_prune.ranks import ShortOfMemoryError, meet

# Samples that are compared with the batch they make up; the cost is some passes over them, once a run.
_SAMPLES = 8
# Half precision moves a loss by about a hundredth; a loss that needs its batch is moved far more.
_TOLERANCE = 1e-2
# Share of a layer's gradient of a batch that those of its samples, each by a factor of its own, may leave over. A mean
# over the tokens of a batch beside one over its samples leaves some; a term between samples leaves all there is of it.
_LEFT_OVER = 0.3


class How(enum.IntEnum):
    """How batches are run; of ranks that differ, the last of these holds."""

    UNKNOWN = 0
    TOGETHER = 1
    ONE_BY_ONE = 2
    WHOLE = 3


class _Kind(enum.IntEnum):
    """What a loss function returned for two samples."""

    SINGLE = 0
    VECTOR = 1
    SCALAR = 2
    FAILED = 3


def loss_of(losses: Any, taps: Taps) -> tuple[Tensor | None, CalibrationError | None]:
    """What a loss function returned, a scalar or a vector of losses; or what is wrong with it."""
    if taps.failure is not None:
        return None, taps.failure
    if losses is None:
        return None, CalibrationError(
            "the loss of a calibration batch is None: a training step that returns None passes over the batch, which "
            "has no gradient then. Leave such batches out (calibration=), pass a loss_fn=f(module, batch) that gives "
            "them one, or choose a score without gradients (wanda, sparsegpt, magnitude)"
        )
    if not isinstance(losses, Tensor) or losses.dim() > 1:
        got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        return None, CalibrationError(f"loss_fn must return a scalar or one loss a sample, got {got}")
    if not losses.requires_grad:
        return None, CalibrationError("the calibration loss does not depend on any layer to prune (is it detached?)")
    return losses[0] if losses.dim() == 1 and losses.shape[0] == 1 else losses, None


class Decision:
    """The passes that tell, and what they tell.

    Args:
        model: The model.
        taps: Hooks on its targets; nothing is added to their sums.
        loss_fn: The loss.
        forward_context: Makes the context that forward passes run in.
        passes: How they run. Of ranks in lock step each makes as many as the others, and all decide alike.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        forward_context: ForwardContext,
        passes: Passes,
    ) -> None:
        self.model, self.taps, self.loss_fn = model, taps, loss_fn
        self.forward_context, self.passes, self.lockstep = forward_context, passes, passes.ranks

    def make(self, batch: Any) -> tuple[How, str]:
        """How batches like this one are to be run, and why.

        Raises:
            CalibrationError: the loss of the batch is no loss at all.
        """
        size = batch_size(batch)
        sizes = [own for (own,) in meet(self.lockstep, None, [size or 0])]
        if 0 in sizes:
            return How.WHOLE, "its tensors do not share a first dimension"
        if max(sizes) == 1:
            return self._untold(), ""
        assert size is not None
        pair = batch if size <= 2 else take(batch, 0, 2)
        losses, failure = self._loss(pair)
        problem = failure if batch_size(pair) == size else None  # only a part of the batch may be impossible
        kind = _Kind.SINGLE
        if losses is None:
            kind = _Kind.FAILED
        elif size != 1:
            kind = _Kind.VECTOR if losses.dim() else _Kind.SCALAR
        kind = _Kind(max(own for (own,) in meet(self.lockstep, problem, [kind])))
        if kind is _Kind.VECTOR:
            assert losses is not None
            return self._of_vector(losses, pair)
        del losses  # and its graph
        if kind is _Kind.FAILED:
            return self._of_whole(batch, failure)
        return self._of_scalar(batch, max(sizes))

    def of_each_alone(self, batch: Any) -> bool:
        """Whether the first two samples of a batch have a loss each that depends on its own rows alone."""
        size = batch_size(batch)
        pair = batch if size is None else take(batch, 0, min(size, 2))
        losses, _ = self._loss(pair)
        one_each = losses is not None and losses.numel() == batch_size(pair)
        if not all(each for (each,) in meet(self.lockstep, None, [int(one_each)])):
            return False
        return not (self.taps.not_per_sample or self.taps.probe(cast(Tensor, losses), 0)) and batch_size(pair) == 2

    def _untold(self) -> How:
        """What is right in any layout: tokens may come first, and a later batch have as many samples as tokens."""
        return How.ONE_BY_ONE if self.taps.of_weights else How.UNKNOWN

    def _loss(self, batch: Any) -> tuple[Tensor | None, Exception | None]:
        """The loss of a batch, or why it has none; but memory that runs out, on any rank, says nothing of the loss."""
        self.taps.begin(
            batch_size(batch), None, is_sequences(batch), counting=False
        )  # nothing is summed, so no padding
        result: tuple[Tensor | None, Exception | None] | None = None
        short: ShortOfMemoryError | None = None
        try:
            with self.forward_context():
                result, short = self.passes.run(lambda: loss_of(self.loss_fn(self.model, batch), self.taps))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            result = None, error
        meet(self.lockstep, short, [])
        assert result is not None
        return result

    def _of_whole(self, batch: Any, failure: Exception | None) -> tuple[How, str]:
        """A batch whose first two samples cannot run alone."""
        losses, problem = self._loss(batch)
        vector = losses is not None and losses.dim() == 1
        every = meet(self.lockstep, problem, [int(vector)])
        if all(own for (own,) in every):
            return How.TOGETHER, ""
        return How.WHOLE, "" if failure is None else f"two samples of it alone raise {_said(failure)}"

    def _of_vector(self, losses: Tensor, pair: Any) -> tuple[How, str]:
        """Two losses of two samples: does each depend on its own rows alone?"""
        taps = self.taps
        if losses.dim() and losses.shape[0] != batch_size(pair):
            return How.UNKNOWN, ""  # the run itself says what is wrong
        if not taps.of_weights:
            return How.TOGETHER, ""  # sums over all samples and tokens, in any order
        finite = torch.isfinite(losses.detach()).flatten().tolist()
        if not any(value for (value,) in meet(self.lockstep, None, [int(any(finite))])):
            return self._untold(), ""
        chosen = finite.index(True) if any(finite) else 0
        value = float(losses.detach().flatten()[chosen])
        mixed = taps.not_per_sample
        mixed = (taps.probe(losses, chosen) and any(finite) and losses.dim() == 1) or mixed
        if not any(flag for (flag,) in meet(self.lockstep, taps.failure, [int(mixed)])):
            return How.TOGETHER, ""
        # Either the layout is another, which running samples alone mends, or the losses need each other.
        alone, problem = self._loss(take(pair, chosen, chosen + 1))
        depends = problem is not None or alone is None or (any(finite) and not _close(float(alone.detach()), value))
        if any(flag for (flag,) in meet(self.lockstep, None, [int(depends)])):
            return How.WHOLE, "the loss of a sample changes with the other samples of its batch"
        return How.ONE_BY_ONE, ""

    def _of_scalar(self, batch: Any, largest: int) -> tuple[How, str]:
        """One loss of a batch: is it a mean or a sum of those of its samples?"""
        size = batch_size(batch)
        assert size is not None
        most = min(largest, _SAMPLES)
        while True:
            count = min(size, most)
            try:
                whole, failure = self._loss(batch if count == size else take(batch, 0, count))
                break
            except ShortOfMemoryError:
                if most <= 2:  # two are the least that tells anything
                    raise
            most = (most + 1) // 2
        total = None if whole is None else float(whole.detach().mean())
        together = self._corners(whole)
        del whole
        found: list[float] = []
        last: Any = None
        alone: list[dict[str, Tensor]] = []
        reason = ""
        for i in range(most):
            sample = take(batch, i % count, i % count + 1)
            loss, problem = self._loss(sample)
            if i >= count:
                continue  # keeps other ranks company
            value = float("nan") if loss is None else float(loss.detach().mean())
            if value != value and without_label(sample):
                continue
            if problem is not None:
                reason = reason or f"a sample of it alone raises {_said(problem)}"
            elif not abs(value) < float("inf"):
                reason = reason or f"that of a sample of it alone is {value}"
            elif together and not reason:
                alone.append(self._corners(loss))
                last = sample
            found.append(value)
            del loss
        if total is None:
            reason = reason or f"a part of it alone raises {_said(failure)}"
        elif found and not reason and not _made_of(total, found):
            reason = (
                f"it is {total:.4g} for {count} samples, which alone have losses of {min(found):.4g} to "
                f"{max(found):.4g}: neither a mean nor a sum of them"
            )
        elif found and not reason and (layer := _left_over(together, alone)):
            again = self._corners(self._loss(last)[0])  # of a loss that draws at random it does not tell
            if not _left_over(again, alone[-1:], _TOLERANCE):
                reason = f"the gradient of {count} samples in {layer!r} is not made of those that they have alone"
        whole_anywhere = any(flag for (flag,) in meet(self.lockstep, None, [int(bool(reason) and size > 1)]))
        return (How.WHOLE, reason) if whole_anywhere else (How.ONE_BY_ONE, "")

    def _corners(self, loss: Tensor | None) -> dict[str, Tensor]:
        """Parts of the weights' gradients of a loss; nothing where they cannot be had.

        Ranks in lock step go without: one whose memory is too short for a backward pass would leave the others alone.
        """
        if loss is None or self.lockstep is not None:
            return {}
        try:
            return self.taps.gradient_corners(loss.mean())
        except torch.OutOfMemoryError:  # of more samples than ever run together
            return {}


def _left_over(together: dict[str, Tensor], alone: list[dict[str, Tensor]], most: float = _LEFT_OVER) -> str:
    """The layer whose gradient of a batch is not made of those of its samples, if there is one."""
    for name, corner in together.items():
        wanted = corner.flatten().double()
        parts = torch.stack([wanted * 0, *(c[name].flatten().double() for c in alone if name in c)], dim=1)
        if not bool(torch.isfinite(parts).all() & torch.isfinite(wanted).all()):
            continue  # the run itself says what is wrong
        left = wanted - parts @ torch.linalg.lstsq(parts, wanted[:, None], driver="gelsd").solution[:, 0]
        noise = _TOLERANCE * float(parts.norm(dim=0).max())
        if float(left.norm()) > max(most * float(wanted.norm()), noise):
            return name
    return ""


def _said(error: Exception | None) -> str:
    return f"{type(error).__name__} ({error})"


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other))


def _made_of(total: float, parts: list[float]) -> bool:
    """Whether a loss is between the smallest and the largest of its samples' losses, or their sum, up to rounding."""
    slack = _TOLERANCE * max(map(abs, [total, *parts]))
    return min(parts) - slack <= total <= max(parts) + slack or abs(total - sum(parts)) <= slack
