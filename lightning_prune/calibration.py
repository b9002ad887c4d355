"""Collect statistics of layers while samples run through the model.

Forward statistics (input norms, Hessians) cost one forward a sample. Gradient statistics cost one forward and one
backward: the parameters are frozen meanwhile, so that autograd makes no weight gradient at all, and each layer's own
per-sample gradient is formed from its input X and output gradient delta, ``G_b = delta_b^T X_b``, and added to the
aggregate at once. So a batch of B samples gives the aggregate of B batches of one, and no full set of gradients
ever exists.

Dimensions: B samples, T rows of a sample (tokens), I inputs, O outputs of a layer.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.batches import batch_size, is_sequences, padding_mask, samples, take
from lightning_prune.progress import progress_bar
from lightning_prune.running import causal_lm_loss, forward, quiet_model, synchronized_errors
from lightning_prune.statistics import (
    ALL_STATISTICS,
    BACKWARD_STATISTICS,
    FORWARD_STATISTICS,
    GRADIENTS,
    Accumulator,
    CalibrationError,
    LayerStatistics,
    check_finite,
)
from lightning_prune.targets import LayerKind, Target

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
    distributed: bool = False,
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
        distributed: Sum over all ranks of the default process group; every rank must call.
        progress: Show a progress bar.

    Returns:
        Statistics by parameter name.

    Raises:
        CalibrationError: no sample; NaN or infinity; a target that the samples never reached; a layout of
            inputs whose padding or samples cannot be told apart. With `distributed`, on every rank.
    """
    wanted = frozenset(statistics)
    if unknown := wanted - ALL_STATISTICS:
        raise ValueError(f"statistics {sorted(unknown)} are unknown; choose from {sorted(ALL_STATISTICS)}")
    if not wanted:
        return {}
    sweep = _Sweep(model, targets, wanted, loss_fn, gradient_dtype, gradient_device, forward_context)
    with synchronized_errors(distributed), quiet_model(model, freeze=sweep.backward):
        sweep.run(batches, num_samples, progress)
    return sweep.finish(distributed)


def collect_forward(
    targets: Sequence[Target],
    statistics: Iterable[str],
    steps: Iterable[tuple[Tensor | None, int]],
    distributed: bool = False,
) -> dict[str, LayerStatistics]:
    """Forward statistics of some layers while somebody else runs them.

    Args:
        targets: The layers.
        statistics: Out of ``FORWARD_STATISTICS``.
        steps: Yields, *before* each forward pass, the padding mask ``[B, T]`` (or None) and number of its samples.
        distributed: Sum over all ranks.

    Returns:
        Statistics by parameter name; empty if there are no targets.
    """
    if not targets:
        return {}
    sweep = _Sweep(None, targets, frozenset(statistics))
    with synchronized_errors(distributed), sweep.hooks():
        for keep, size in steps:
            sweep.begin(size, keep)
            sweep.samples += size
    return sweep.finish(distributed)


class _NotPerSampleError(Exception):
    """The inputs of a layer do not come sample by sample."""


@dataclass
class _Tap:
    """One target's accumulator, and what passes through its layers during one forward pass."""

    target: Target
    accumulator: Accumulator
    uses: int = 0
    pending: list[Tensor] = field(default_factory=list)  # [B, O, I] of each use of a layer used more than once

    @property
    def name(self) -> str:
        return self.target.name


@dataclass
class _Increments:
    """What the last input seen adds to forward statistics; valid while the tensor is unchanged."""

    x: Tensor
    version: int
    kind: LayerKind
    values: dict[str, Tensor]


class _Record:
    """One use of a layer: its output gradient, from the output's hook until the input's backward."""

    __slots__ = ("delta", "tap")

    def __init__(self, tap: _Tap) -> None:
        self.tap = tap
        self.delta: Tensor | None = None


class _SaveInput(torch.autograd.Function):
    """Identity on a layer's input that sees, in backward, that input beside the layer's output gradient.

    The input is saved through autograd, so checkpointed blocks recompute it instead of holding it, and each use of
    a layer is counted exactly once however often its forward is repeated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, record: _Record, sweep: _Sweep) -> Tensor:
        ctx.save_for_backward(x)
        ctx.record, ctx.sweep = record, sweep
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        ctx.sweep.take_gradient(ctx.record, x)
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


class _Sweep:
    """One pass over the samples with hooks on every target."""

    def __init__(
        self,
        model: nn.Module | None,
        targets: Sequence[Target],
        statistics: frozenset[str],
        loss_fn: LossFn | None = None,
        gradient_dtype: torch.dtype = torch.float32,
        gradient_device: torch.device | str | None = None,
        forward_context: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        device = None if gradient_device is None else torch.device(gradient_device)
        self.model = model
        self.statistics = statistics
        self.backward = bool(statistics & BACKWARD_STATISTICS)
        self.loss_fn = loss_fn
        self.forward_context = forward_context
        self.taps = [_Tap(t, Accumulator(statistics, t.shape, gradient_dtype, device)) for t in targets]
        self.samples = 0
        self.size: int | None = None
        self.keep: Tensor | None = None
        self.in_backward = False
        self.one_by_one = False
        self.of_sequences = False
        self.last_input: _Increments | None = None
        self.scale = _HALF_SCALE if self.backward and self._runs_in_half() else 1.0
        # Makes the graph start at the first target although every parameter is frozen.
        self.anchor = torch.zeros((), requires_grad=True)

    def _runs_in_half(self) -> bool:
        """Whether output gradients are float16: by the weights, or by autocast."""
        if any(tap.target.weight.dtype == torch.float16 for tap in self.taps):
            return True
        device = self.taps[0].target.weight.device.type
        with self.forward_context():
            return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on every target, while the block runs."""
        handles: list[RemovableHandle] = []
        try:
            for tap in self.taps:
                for module in tap.target.modules:
                    handles.extend(self._hook(tap, module))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.last_input = None

    def begin(self, size: int | None, keep: Tensor | None) -> None:
        """A forward pass over `size` samples is about to run."""
        self.size, self.keep, self.last_input = size, keep, None
        for tap in self.taps:
            tap.uses = 0

    def run(self, batches: Iterable[Any], num_samples: int, progress: bool) -> None:
        """Take in up to `num_samples` samples."""
        with ExitStack() as stack:
            stack.enter_context(self.hooks())
            kind = "forward + backward" if self.backward else "forward"
            advance = stack.enter_context(progress_bar(f"Calibrating ({kind})", num_samples, progress))
            stack.enter_context(torch.enable_grad() if self.backward else torch.no_grad())
            for batch, size in samples(batches, num_samples):
                self._run_batch(batch, batch_size(batch))
                self.samples += size
                advance(size)
        if 0 < self.samples < num_samples:
            warnings.warn(f"calibration data ended after {self.samples} of num_samples={num_samples}", stacklevel=2)

    def finish(self, distributed: bool) -> dict[str, LayerStatistics]:
        """Check, reduce over ranks, and return the statistics."""
        total = self.samples
        with synchronized_errors(distributed):
            if not total:
                raise CalibrationError("calibration saw no sample: `batches` is empty; the weights are unchanged")
            for tap in self.taps:
                if missing := self.statistics - set(tap.accumulator.sums):
                    raise CalibrationError(
                        f"no calibration sample reached {tap.name!r} ({', '.join(sorted(missing))}): the layer "
                        "is not used in the forward pass, or no gradient flows to it; add it to `ignore`, or "
                        "use more samples"
                    )
        if distributed:
            count = torch.tensor(total, dtype=torch.int64, device=self.taps[0].target.weight.device)
            dist.all_reduce(count)
            total = int(count)
            for tap in self.taps:
                tap.accumulator.all_reduce()
        results: dict[str, LayerStatistics] = {}
        with synchronized_errors(distributed):
            for tap in self.taps:
                results[tap.name] = tap.accumulator.result(total)
                check_finite(tap.name, results[tap.name])
        return results

    # -- one batch -----------------------------------------------------------------------------------------------

    def _run_batch(self, batch: Any, size: int | None) -> None:
        if self.backward and self.one_by_one and size is not None and size > 1:
            for i in range(size):
                self._run_batch(take(batch, i, i + 1), 1)
            return
        self.begin(size, padding_mask(batch))
        self.of_sequences = is_sequences(batch)
        if not self.backward:
            with self.forward_context():
                self._forward(batch)
            return
        try:
            with self.forward_context():
                losses = self._losses(batch)
        except _NotPerSampleError:
            losses = None
        if losses is None or (losses.dim() == 0 and size != 1):
            if size is None or size == 1:
                raise CalibrationError(
                    f"per-sample gradients need batches that can be taken apart, got {type(batch).__name__} of "
                    "unknown size; use batches of tensors that share their first dimension"
                )
            # Nothing has been added yet: sums grow only in backward.
            self.one_by_one = True
            self._run_batch(batch, size)
            return
        if not bool(torch.isfinite(losses).all()):
            raise CalibrationError(
                f"the loss of a calibration sample is not finite ({losses.detach().flatten().tolist()}); the "
                "weights are unchanged"
            )
        self.in_backward = True
        try:
            (losses.sum() * self.scale).backward()  # type: ignore[no-untyped-call]
        finally:
            self.in_backward = False
        for tap in self.taps:
            self._flush(tap)

    def _losses(self, batch: Any) -> Tensor:
        """One loss a sample, ``[B]``, or a scalar."""
        assert self.model is not None
        losses = (self.loss_fn or causal_lm_loss)(self.model, batch)
        if not isinstance(losses, Tensor) or losses.dim() > 1:
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
            raise CalibrationError(f"loss_fn must return a scalar or one loss a sample, got {got}")
        if not losses.requires_grad:
            raise CalibrationError("the calibration loss does not depend on any layer to prune (is it detached?)")
        if losses.dim() == 1 and losses.shape[0] == 1:
            losses = losses[0]
        if losses.dim() == 1 and losses.shape[0] != self.size:
            raise CalibrationError(
                f"loss_fn returned {losses.shape[0]} losses for {self.size} samples; return one a sample, or a scalar"
            )
        return losses

    def _forward(self, batch: Any) -> None:
        assert self.model is not None
        if self.loss_fn is not None:
            self.loss_fn(self.model, batch)
        else:
            forward(self.model, batch, [tap.target for tap in self.taps])

    # -- hooks ---------------------------------------------------------------------------------------------------

    def _hook(self, tap: _Tap, module: nn.Module) -> Iterator[RemovableHandle]:
        stack: list[_Record] = []

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = args[0] if args else kwargs["input"]
            if not self.backward:
                self._take_input(tap, layer, x)
                return None
            if not self.in_backward:
                tap.uses += 1
                self._check_per_sample(tap, layer, x)
            if not torch.is_grad_enabled():  # the first, gradient-free pass of a re-entrant checkpoint
                return None
            record = _Record(tap)
            stack.append(record)
            saved = _SaveInput.apply(x, self.anchor.to(x.device), record, self)  # type: ignore[no-untyped-call]
            return ((saved, *args[1:]), kwargs) if args else (args, {**kwargs, "input": saved})

        def after(_: nn.Module, __: Any, output: Any) -> None:
            if self.backward and torch.is_grad_enabled():
                record = stack.pop()
                _on_gradient(output, lambda delta: setattr(record, "delta", delta))

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def _take_input(self, tap: _Tap, layer: nn.Module, x: Tensor) -> None:
        """Forward statistics; layers called one after the other on the same tensor (q, k, v) compute them once."""
        known = self.last_input
        if known is None or known.x is not x or known.version != x._version or known.kind is not tap.target.kind:
            rows = tap.target.kind.input_rows(layer, x.detach())
            increments = tap.accumulator.input_increments(rows, self._keep_for(tap, rows))
            # Patches of a convolution depend on the layer too, so only plain inputs are remembered.
            known = _Increments(x, x._version, tap.target.kind, increments)
            self.last_input = None if isinstance(layer, nn.Conv2d) else known
        tap.accumulator.add(known.values)

    def _check_per_sample(self, tap: _Tap, layer: nn.Module, x: Tensor) -> None:
        if self.size is not None and self.size > 1 and self.statistics & GRADIENTS:
            # Two dimensions then are tokens of all samples put together (experts), whatever their number.
            least = 4 if isinstance(layer, nn.Conv2d) else 3 if self.of_sequences else 2
            if x.dim() < least or x.shape[0] != self.size:
                raise _NotPerSampleError(tap.name)

    def _keep_for(self, tap: _Tap, rows: Tensor) -> Tensor | None:
        """The padding mask in the layout of a layer's rows ``[B, T, I]``."""
        if self.keep is None:
            return None
        if rows.shape[:2].numel() != self.keep.numel():
            raise CalibrationError(
                f"the padding of the batch {tuple(self.keep.shape)} cannot be found in the inputs of {tap.name!r} "
                f"({tuple(rows.shape[:2])} rows): calibrate on samples without padding"
            )
        return self.keep.to(rows.device)

    def take_gradient(self, record: _Record, x: Tensor) -> None:
        """Backward of a layer's input: add the layer's statistics for one use."""
        tap, delta, record.delta = record.tap, record.delta, None
        if delta is None:
            return
        kind, accumulator = tap.target.kind, tap.accumulator
        with torch.no_grad():
            rows = kind.input_rows(tap.target.module, x)  # [B, T, I]
            deltas = kind.output_rows(delta)  # [B, T, O]
            if self.statistics & FORWARD_STATISTICS:
                accumulator.add(accumulator.input_increments(rows, self._keep_for(tap, rows)))
            accumulator.add_output_gradient(deltas, self.scale)
            if not self.statistics & GRADIENTS:
                return
            rows = rows.to(deltas.dtype)  # what autocast did in the forward pass
            if self.size == 1:  # all rows belong to the one sample, in whatever layout
                rows, deltas = rows.reshape(1, -1, rows.shape[-1]), deltas.reshape(1, -1, deltas.shape[-1])
            if tap.uses > 1:  # abs and squares are of the sum over uses
                gradients = torch.bmm(deltas.transpose(1, 2), rows)  # [B, O, I]
                tap.pending = [tap.pending[0].add_(gradients)] if tap.pending else [gradients]
                return
            for x_b, delta_b in zip(rows, deltas, strict=True):
                accumulator.add_gradient(delta_b.t() @ x_b, self.scale)

    def _flush(self, tap: _Tap) -> None:
        for gradients in tap.pending:
            for gradient in gradients:
                tap.accumulator.add_gradient(gradient, self.scale)
        tap.pending = []


def _on_gradient(output: Tensor, take: Callable[[Tensor], None]) -> None:
    """Call `take` with the gradient of a layer's output as it is now, before anyone changes it in place."""
    base = output._base
    if base is not None and base.numel() == output.numel() and base.requires_grad:
        # A linear layer returns a view; an in-place change of a view replaces its history, not that of its base.
        base.register_hook(lambda delta: take(delta.reshape(output.shape)))  # type: ignore[no-untyped-call]
    else:
        output.register_hook(take)  # type: ignore[no-untyped-call]
