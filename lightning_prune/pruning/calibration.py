"""Collect statistics of layers while samples run through the model.

Forward statistics (input norms, Hessians) cost one forward a sample. Gradient statistics cost one forward and one
backward: the parameters are frozen meanwhile, so that autograd makes no weight gradient at all, and hooks form each
layer's own (see `hooks`). So a batch of B samples gives the aggregate of B batches of one, and no full
set of gradients ever exists. Blocks of offloaded weights run again in the backward pass (see `room`).

Where parameters are sharded, forward and backward passes hold collectives, so the ranks run in lock step: each meets
the others before and after every forward pass, one whose samples have ended repeats its last without counting it,
and an error of one is the error of all. Memory that runs out in a forward pass is made for by all of them (see `room`).
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.naming import adapter_in_its_place, to_ignore
from lightning_prune.progress import progress_bar, warn
from lightning_prune.pruning.batches import batch_size, is_sequences, samples, take
from lightning_prune.pruning.hooks import Tap, Taps, in_checkpoint
from lightning_prune.pruning.offloading import put_away
from lightning_prune.pruning.padding import Padding, PaddingFinder
from lightning_prune.pruning.room import Passes, Room, numbers_in
from lightning_prune.pruning.running import (
    ForwardContext,
    forward,
    frozen,
    model_loss,
    predicts_next_tokens,
    quiet_model,
    without_label,
)
from lightning_prune.pruning.stacks import find_blocks
from lightning_prune.pruning.statistics import (
    ALL_STATISTICS,
    BACKWARD_STATISTICS,
    FORWARD_STATISTICS,
    HESSIAN,
    INPUT_NORM,
    OUTPUT_GRAD_NORM,
    LayerStatistics,
    check_finite,
    values_of,
)
from lightning_prune.pruning.taking_apart import Decision, How, loss_of
from lightning_prune.pruning.targets import Target
from lightning_prune.ranks import Ranks, ShortOfMemoryError, in_step, meet, no_sample, synchronized_errors
from lightning_prune.sharding import reshard, settle

LossFn = Callable[[nn.Module, Any], Tensor]

HALF_SCALE = 2.0**14
"""Loss scale for float16 models: output gradients are of the order 1/T, near the smallest float16."""


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
    forward_context: ForwardContext = contextlib.nullcontext,
    ranks: Ranks | None = None,
    progress: bool = True,
    unrouted: dict[str, None] | None = None,
) -> dict[str, LayerStatistics]:
    """Run calibration samples through the model once and return the statistics of every target.

    The model runs in evaluation mode; its mode, its ``requires_grad`` flags, its ``.grad`` and the global random
    state are afterwards what they were.

    Args:
        model: The model that holds the targets.
        batches: Iterable of batches (see `lightning_prune.prune`).
        targets: From `find_targets`.
        statistics: Names out of `lightning_prune.pruning.statistics.ALL_STATISTICS`.
        num_samples: Samples to use in this process; the last batch is cut to fit, unless batches stay whole. A batch
            that is one sample to its gradient counts as all its samples here and in ``LayerStatistics.samples``.
        loss_fn: ``loss_fn(model, batch)`` returns one loss a sample, ``[B]``, or a scalar. With a scalar, batches
            of more than one sample are run sample by sample, which gives the same statistics; unless the first batch
            shows that its loss is not made of losses of its samples (contrastive, preference pairs, statistics of the
            batch): then each batch, whole, is one sample with one gradient, and a warning says so. Samples whose
            labels are all -100 are passed over. Default: the model's own (see `running.model_loss`).
        gradient_dtype: dtype of gradient aggregates (one buffer of the weight's size a target).
        gradient_device: Their device; default that of the weight.
        forward_context: Makes the context that forward passes run in (autocast).
        ranks: The processes that calibrate together, each on samples of its own; every rank must call.
        progress: Show a progress bar.
        unrouted: Gets the names of experts' matrices that no token was routed to, and the caller is to call
            `warn_of_unrouted`. Default: that is done here.

    Returns:
        Statistics by parameter name.

    Raises:
        CalibrationError: no sample; NaN or infinity; a target that the samples never reached, or a loss that gives
            none a gradient; a layout of inputs whose samples cannot be told apart; a layer whose statistics hooks
            cannot see (it returns no tensor, scales its output, or its weight is used elsewhere too). With `ranks`,
            on every rank.
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
    with synchronized_errors(outside), quiet_model(model, freeze=taps.backward), sweep.room:
        if any(target.offloaded for target in targets):
            sweep.room.recompute()
        try:
            with _explained(taps.uses.functional):
                sweep.run(batches, num_samples, progress)
        finally:
            reshard(model)
    sweep.padding.warn()
    if told := str(sweep.room):
        warnings.warn(told, stacklevel=2)
    return _finish(taps, sweep.samples, ranks, sweep.unlabeled, unrouted)


# Parts of what torch says where a loss does what calibration cannot follow, and what that is.
_UNDER_TRANSFORM = ("functorch", "(vjp, jvp, grad, etc) transform")
_WITHOUT_PARAMETERS = ("does not require grad", "not have been used in the graph")
_IN_CHECKPOINT = "number of tensors was saved"


@contextlib.contextmanager
def _explained(functional: Collection[str] = ()) -> Iterator[None]:
    """Say of torch's errors why they come in calibration, though training has none."""
    try:
        yield
    except RuntimeError as error:
        why = ""
        if any(part in str(error) for part in _UNDER_TRANSFORM):
            why = "a layer is called inside a transform of torch.func (vmap, grad, jvp), which hides what passes there"
        elif any(part in str(error) for part in _WITHOUT_PARAMETERS):
            why = "the loss takes gradients by parameters inside of it, which have none while layers are scored"
        if not isinstance(error, CalibrationError) and _IN_CHECKPOINT in str(error) and functional:
            raise CalibrationError(in_checkpoint(min(functional))) from error
        if not why or isinstance(error, CalibrationError):
            raise
        raise CalibrationError(
            f"{why} ({type(error).__name__}: {error}): pass a loss_fn without that (or give the LightningModule a "
            "method calibration_loss(batch)), or choose a score without data (magnitude)"
        ) from error


def collect_forward(
    targets: Sequence[Target],
    statistics: Iterable[str],
    steps: Iterable[tuple[Padding | None, int, bool]],
    ranks: Ranks | None = None,
    unrouted: dict[str, None] | None = None,
) -> dict[str, LayerStatistics]:
    """Forward statistics of some layers while somebody else runs them.

    Args:
        targets: The layers.
        statistics: Out of ``FORWARD_STATISTICS``.
        steps: Yields, *before* each forward pass, its padding (or None), the number of its samples, and whether they
            count.
        ranks: See `collect`.
        unrouted: See `collect`.

    Returns:
        Statistics by parameter name; empty if there are no targets.
    """
    if not targets:
        return {}
    taps, seen = Taps(targets, frozenset(statistics), ranks=ranks), 0
    error: CalibrationError | None = None
    outside = None if ranks is None or ranks.lockstep else ranks
    with synchronized_errors(outside), taps.hooks(), taps.watching():
        for padding, size, counting in steps:
            error = error or taps.failure
            taps.begin(size, padding, counting=counting)
            seen += size if counting else 0
    with synchronized_errors(ranks):
        if error := error or taps.failure:
            raise error
    return _finish(taps, seen, ranks, unrouted=unrouted)


class _Sweep:
    """One pass over the samples."""

    def __init__(
        self,
        model: nn.Module,
        taps: Taps,
        loss_fn: LossFn | None,
        forward_context: ForwardContext,
        ranks: Ranks | None,
    ) -> None:
        self.model, self.taps, self.loss_fn, self.forward_context = model, taps, loss_fn, forward_context
        self.ranks = ranks
        self.lockstep = ranks if ranks is not None and ranks.lockstep else None
        self.device = taps.all[0].target.device
        self.padding = PaddingFinder(model)
        self.samples = 0
        self.unlabeled = 0  # samples without a label, which are passed over
        self.passes = Passes(model, self.lockstep)
        self.decision = Decision(model, taps, loss_fn or model_loss, forward_context, self.passes)
        self.room = Room([block for _, block in find_blocks(model)] if taps.backward else [])
        self.how = How.UNKNOWN
        self.cut = False  # whether the last batch is a part of one
        self.uncut = False  # whether any batch was of a size that is not known
        if taps.backward and self._runs_in_half():
            taps.scale = HALF_SCALE

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
            self.padding.watching(),
            progress_bar(f"Calibrating ({kind})", num_samples, progress) as advance,
            torch.set_grad_enabled(self.taps.backward),
        ):
            if self.taps.backward:
                batches = self._look_at_first(batches if num_samples > 0 else ())
            source = samples(batches, num_samples, cut=self._may_cut)
            for (batch, count), counting in in_step(self.room.units(source), self.lockstep):
                advance(self._run_or_divide(batch, count, counting))
        drawn = self.samples + self.unlabeled
        if 0 < drawn < num_samples:
            uncut = " (a batch whose samples cannot be told apart counts as one)" if self.uncut else ""
            warnings.warn(f"calibration data ended after {drawn} of num_samples={num_samples}{uncut}", stacklevel=3)
        if self.samples and self.unlabeled:
            warnings.warn(
                f"{self.unlabeled} of {drawn} calibration samples have no label (all are -100) and so no gradient; "
                "they were passed over",
                stacklevel=3,
            )

    def _look_at_first(self, batches: Iterable[Any]) -> Iterable[Any]:
        """Settle on how batches are run, alike on every rank, by the first of them; returns all of them."""
        iterator, batch, error = iter(batches), None, None
        chosen, reason = How.UNKNOWN, ""
        try:
            batch = next((item for item in iterator if batch_size(item) != 0), None)
            if self.lockstep is None and batch is not None:
                chosen, reason = self._decide(batch)
        except Exception as caught:
            error = caught
        if self.lockstep is not None:
            if error is None and batch is None:
                error = no_sample(" on this rank")
            meet(self.lockstep, error, [])
            chosen, reason = self._decide(batch)
        self.how = How(max(how for (how,) in meet(self.ranks, error, [chosen])))
        self.room.alone = self.how is How.ONE_BY_ONE
        if self.how is How.WHOLE:
            warnings.warn(
                "the loss of a calibration batch cannot be taken apart into losses of its samples"
                f"{': ' + reason if reason else ''}. So each batch is one sample with one gradient; for gradients per "
                "sample pass a loss_fn (or give the LightningModule a method calibration_loss(batch)) that returns one "
                "loss a sample",
                stacklevel=4,
            )
        return iterator if batch is None else itertools.chain([batch], iterator)

    # -- where memory is short -------------------------------------------------------------------------------------

    def _decide(self, batch: Any) -> tuple[How, str]:
        """What `Decision.make` says; where its two samples do not fit, what is known without them."""
        try:
            with self.taps.trying():
                return self.decision.make(batch)
        except torch.OutOfMemoryError as caught:
            problem = self._known_to_all(caught)
        put_away(self.model)
        alone = self._gives_own_losses(batch)
        size = min(batch_size(batch) or 1, 2)
        pair = take(batch, 0, size)
        self.room.make(problem, numbers_in(pair, size), size, alone, self.lockstep)
        with self.taps.trying():
            return (How.ONE_BY_ONE, "") if alone else self.decision.make(batch)

    def _gives_own_losses(self, batch: Any) -> bool:
        return self.loss_fn is None and predicts_next_tokens(self.model, batch)

    def _run_or_divide(self, batch: Any, count: int, counting: bool) -> int:
        """Run a batch; returns the number of samples dealt with, 0 where it will be run again with less memory."""
        try:
            return self._run_batch(batch, count, counting)
        except torch.OutOfMemoryError as caught:
            problem = self._known_to_all(caught)
        put_away(self.model)
        meet(self.lockstep, None if self.taps.undo(only=not self.samples) else problem, [])
        size = batch_size(batch) or 1
        self.room.make(problem, numbers_in(batch, size), size, self._divisible(batch), self.lockstep)
        if counting:
            self.room.queue.appendleft((batch, count))
        return 0

    def _known_to_all(self, problem: torch.OutOfMemoryError) -> torch.OutOfMemoryError:
        """An error without its frames, which hold what did not fit; raised again where other ranks are in a pass."""
        if self.lockstep is not None and not isinstance(problem, ShortOfMemoryError):
            raise problem
        return problem.with_traceback(None)

    def _divisible(self, batch: Any) -> bool:
        """Whether pieces of a batch give the same sums as all of it."""
        if self.how is How.WHOLE or all(size == 1 for (size,) in meet(self.lockstep, None, [batch_size(batch) or 1])):
            return False
        if not self.taps.backward or self._gives_own_losses(batch):
            return True
        try:
            with self.taps.trying():
                return self.decision.of_each_alone(batch)
        except torch.OutOfMemoryError as caught:
            self._known_to_all(caught)
            return False

    # -- one batch -----------------------------------------------------------------------------------------------

    def _run_batch(self, batch: Any, count: int, counting: bool) -> int:
        """Run a batch; returns the number of samples dealt with."""
        taps, size = self.taps, batch_size(batch)
        self.uncut |= size is None
        if not counting and size is not None:  # repeated, and maybe too large by now
            size = self.room.samples_in(batch, size)
            batch = take(batch, 0, size)
        whole = self.how is How.WHOLE or size is None
        padding = self.padding.find(batch)
        taps.begin(size, padding, is_sequences(batch), counting, whole)
        with taps.watching():
            short: ShortOfMemoryError | None = None
            if not taps.backward:
                try:
                    short = self._run_forward(batch)
                except RuntimeError as error:
                    if not self._record_gradients(error):
                        raise
                    taps.begin(size, padding, is_sequences(batch), counting, whole)
                    short = self._run_forward(batch)
            else:
                losses, problem = self._losses(batch, size, counting)
                split = problem is None and losses is None
                every = meet(self.lockstep, problem, [int(split), *(tap.uses for tap in taps.all)])
                if any(flag for flag, *_ in every):
                    # Nothing has been added yet: sums grow only in backward.
                    if counting:
                        self._again(batch, count, split)
                    return 0
                assert losses is not None
                taps.run_backward(losses.sum() * taps.scale, [uses for _, *uses in every])
        meet(self.lockstep, short or taps.failure, [])
        if taps.counting:
            self.samples += count
        elif counting:
            self.unlabeled += count
        return count if counting else 0

    def _run_forward(self, batch: Any) -> ShortOfMemoryError | None:
        with self.forward_context():
            return self.passes.run(lambda: self._forward(batch))[1]

    def _record_gradients(self, error: RuntimeError) -> bool:
        """Have gradients recorded, but of no parameter, if a loss failed on its first batch since it takes some itself.

        It may take them by its inputs: forces, physics, adversarial examples.
        """
        known = any(part in str(error) for part in _WITHOUT_PARAMETERS) and self.loss_fn is not None
        if not known or self.samples or torch.is_grad_enabled() or self.lockstep is not None:
            return False
        self.taps.undo(only=True)
        self.room.enter_context(frozen(self.model))
        torch.set_grad_enabled(True)  # until the sweep ends
        return True

    def _again(self, batch: Any, count: int, split: bool) -> None:
        """Put a batch first in the queue, taken apart if its samples have to run one by one."""
        if split and self.taps.not_per_sample:
            self.room.alone = True  # by the model's layout: so do all that follow
        parts = [(take(batch, i, i + 1), 1) for i in range(count)] if split else [(batch, count)]
        self.room.queue.extendleft(reversed(parts))

    def _losses(self, batch: Any, size: int | None, counting: bool) -> tuple[Tensor | None, Exception | None]:
        """One loss a sample, ``[B]``, or a scalar; None if the batch must be taken apart; or what is wrong with it."""
        with self.forward_context():
            result, short = self.passes.run(lambda: loss_of((self.loss_fn or model_loss)(self.model, batch), self.taps))
        if result is None:
            return None, short
        losses, problem = result
        if losses is None:
            return None, problem
        if self.taps.whole:
            losses = losses.mean()
        elif losses.dim() == 1 and losses.shape[0] != size:
            return None, CalibrationError(
                f"loss_fn returned {losses.shape[0]} losses for {size} samples; return one a sample, or a scalar"
            )
        elif self.taps.not_per_sample or (losses.dim() == 0 and size != 1):
            return None, None
        if counting and not bool(torch.isfinite(losses).all()):
            alone = self.taps.whole or size == 1
            bad = [batch] if alone else [take(batch, i, i + 1) for i in (~torch.isfinite(losses)).nonzero().flatten()]
            if not bool(losses.isinf().any()) and all(without_label(part) for part in bad):
                self.taps.counting = not alone  # passed over; a rank that skipped the backward would leave others alone
                return (losses, None) if alone else (None, None)
            return None, CalibrationError(
                f"the loss of a calibration sample is not finite ({losses.detach().flatten().tolist()}); the "
                "weights are unchanged"
            )
        return losses, None

    def _may_cut(self) -> bool:
        self.cut = self.how is not How.WHOLE
        return self.cut

    def _forward(self, batch: Any) -> None:
        try:
            if self.loss_fn is not None:
                self.loss_fn(self.model, batch)
            else:
                forward(self.model, batch, [tap.target for tap in self.taps.all])
        except (RuntimeError, ValueError, LookupError) as error:
            # One that gradients are taken of was tried in parts before.
            if not self.cut or isinstance(error, (CalibrationError, torch.OutOfMemoryError)):
                raise
            size = batch_size(batch)
            raise CalibrationError(
                f"the last calibration batch was cut to its first {size} samples, as num_samples asks for, and fails: "
                f"{type(error).__name__}: {error}. If the first dimension of its tensors is not that of samples (a "
                "list of episodes or images without a batch), give num_samples a multiple of that dimension, or put "
                "samples first"
            ) from error


@_explained()
def _finish(
    taps: Taps, total: int, ranks: Ranks | None, unlabeled: int = 0, unrouted: dict[str, None] | None = None
) -> dict[str, LayerStatistics]:
    """Check, sum over ranks, and return the statistics."""
    taps.settle()
    with synchronized_errors(ranks):
        if not total and unlabeled:
            raise CalibrationError(
                f"none of the {unlabeled} calibration samples has a label to predict (all are -100, or it is a "
                "single token), so there is no loss to calibrate on; the weights are unchanged. Pass samples with "
                "labels, or choose a score without a loss (wanda, magnitude)"
            )
        if not total:
            raise no_sample()
    unreached = _check_reached(taps, ranks)
    if ranks is not None:
        total = int(ranks.sum_samples(torch.tensor(total, dtype=torch.int64, device="cpu")))
        _sum_over_ranks(taps, ranks)
    _check_zeros([tap for tap in taps.all if tap not in unreached], taps.statistics, ranks)
    results: dict[str, LayerStatistics] = {}
    with synchronized_errors(ranks):
        for tap in taps.all:
            results[tap.name] = _by_row(tap, tap.accumulator.result(total))
        check_finite(results)
    if unreached:
        names = [tap.name for tap in unreached]
        if unrouted is None:
            warn_of_unrouted(names)
        else:
            unrouted.update(dict.fromkeys(names))
        _fall_back(taps, unreached, results, ranks)
    return results


def _by_row(tap: Tap, statistics: LayerStatistics) -> LayerStatistics:
    """Statistics with the norms ``[G I]`` of all groups of a convolution as ``[O, I]``, each row's own."""
    norms, groups = statistics.input_norm, tap.target.groups
    if norms is None or groups == 1:
        return statistics
    outputs = tap.target.shape[0]
    return replace(statistics, input_norm=norms.view(groups, -1).repeat_interleave(outputs // groups, dim=0))


def _check_reached(taps: Taps, ranks: Ranks | None) -> list[Tap]:
    """Refuse targets that no sample of any rank reached; where another rank's did, the sums here are zero.

    Returns:
        Experts that no token was routed to, while others of their layer received some.
    """
    device = taps.all[0].target.device
    missing = [len(taps.statistics - set(tap.accumulator.sums)) for tap in taps.all]
    every = [missing] if ranks is None else ranks.gather(missing)
    empty = [all(counts) for counts in zip(*every, strict=True)]
    reached = {tap.target.parameter for tap, nothing in zip(taps.all, empty, strict=True) if not nothing}
    lost = [t for t, nothing in zip(taps.all, empty, strict=True) if nothing and t.target.parameter not in reached]
    if lost:
        raise CalibrationError(_not_reached(lost, taps))
    unreached = []
    for tap, nothing in zip(taps.all, empty, strict=True):
        if nothing:
            unreached.append(tap)
        for name in sorted(taps.statistics - set(tap.accumulator.sums)):
            inputs = tap.target.shape[1] if HESSIAN in taps.statistics else tap.forward_shape[1]
            tap.accumulator.fill(name, (tap.forward_shape[0], tap.target.groups * inputs), device)
            if name == HESSIAN and tap.spread and ranks is not None:
                tap.accumulator.sums[name] = ranks.own_rows(tap.accumulator.sums[name])
    return unreached


def _not_reached(lost: Sequence[Tap], taps: Taps) -> str:
    """Say which layers no sample reached, all at once, and what goes into `ignore` for them."""
    names = list(dict.fromkeys(tap.target.parameter for tap in lost))
    absent = ", ".join(sorted(taps.statistics - set(lost[0].accumulator.sums))) or "on other ranks"
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    why = "is not used in the forward pass, or the loss does not depend on it, as on a pooler that nothing reads"
    ways = f"to leave it as it is, add {to_ignore(*names)}; if only some samples use it, use more of them"
    if names[0] in taps.without_gradient:  # all parameters are frozen meanwhile
        why = (
            "runs under no_grad, or in a re-entrant checkpoint whose inputs require a gradient only because of trained "
            "parameters before it"
        )
        ways = f"checkpoint with use_reentrant=False, or add {to_ignore(*names)}"
    unknown = f"no calibration sample reached {names[0]!r}{more} ({absent}), so nothing says which weights matter in it"
    return f"{unknown}: the layer {why}; {ways}{adapter_in_its_place(names[0])}"


def _fall_back(taps: Taps, unreached: Sequence[Tap], results: dict[str, LayerStatistics], ranks: Ranks | None) -> None:
    """Give experts without any token statistics by which their weights are compared by magnitude.

    Each is as large everywhere as it is on average in the expert of the layer where that is least: all that is known
    of these experts is that they are used less than any other.
    """
    parts = ranks if ranks is not None and ranks.lockstep else None

    def mean_squares(name: str, values: Sequence[Tensor]) -> Tensor:
        """Mean of the squares in each tensor, over the parts of all ranks; of a Hessian, mean of its diagonal."""
        flat = [(v.diagonal() if name == HESSIAN else v.square()).double() for v in values]
        sums = torch.stack([torch.stack([v.sum(), v.new_tensor(v.numel())]) for v in flat])
        sums = sums if parts is None else parts.sum_parts(sums)
        return sums[:, 0] / sums[:, 1]

    def whole(tap: Tap, value: Tensor) -> Tensor:
        return ranks.whole_of_rows(value) if ranks is not None and name == HESSIAN and tap.spread else value

    for tap in unreached:
        others = [t for t in taps.all if t.target.parameter == tap.target.parameter and t not in unreached]
        found: dict[str, Any] = {}
        for name in sorted(taps.statistics):
            own = results[tap.name].get(name)
            known = [whole(other, results[other.name].get(name)) for other in others]
            least = float(mean_squares(name, known).min())
            if name != HESSIAN:
                found[name] = torch.full_like(own, least**0.5)
                continue
            equal = torch.eye(own.shape[1], dtype=own.dtype, device=own.device) * least
            found[name] = ranks.own_rows(equal) if ranks is not None and tap.spread else equal
        results[tap.name] = replace(results[tap.name], **found)


def warn_of_unrouted(unrouted: Iterable[str]) -> None:
    """Say which experts' matrices no token was routed to, if there are any."""
    if names := list(unrouted):
        warn(
            f"no calibration token was routed to {len(names)} of the experts' matrices ({', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}): their weights are compared by magnitude, and with other layers' as "
            "if they mattered as little as those of the least used expert. Use more samples for statistics of their "
            "own",
        )


def _check_zeros(taps: Sequence[Tap], statistics: frozenset[str], ranks: Ranks | None) -> None:
    """Refuse gradients that are zero in every layer; warn of layers where they are, or inputs."""
    kinds = [sorted(statistics & FORWARD_STATISTICS), sorted(statistics & BACKWARD_STATISTICS)]
    asked = [name for kind in kinds for name in kind]
    there = iter(values_of(tap.accumulator.sums[name].any() for tap in taps for name in asked))
    # Of each layer: whether anything of its inputs, and of its gradients, is not zero, where that was asked for.
    mine = [int(sum(next(there) for _ in kind) > 0 or not kind) for _ in taps for kind in kinds]
    every = [mine] if ranks is None else ranks.gather(mine)
    some = [any(flags) for flags in zip(*every, strict=True)]
    dead = [tap.name for tap, reached in zip(taps, some[::2], strict=True) if not reached]
    zero = [tap.name for tap, reached in zip(taps, some[1::2], strict=True) if not reached]
    if taps and len(zero) == len(taps):
        raise CalibrationError(
            f"the gradient of the calibration loss is zero in {_some_of(zero, taps)}: no weight could be told from "
            "another; the weights are unchanged. Does the loss of a sample need the others of its batch (then give "
            "batches of several), or does the loss not depend on the model? Pass loss_fn=f(model, batch). Or is the "
            "output layer still zero, as that of a new vision transformer is? Then train it first (in a Trainer: "
            "schedule=OneShot(10)), or choose a score without gradients (wanda, sparsegpt, magnitude)"
        )
    if dead:
        warn(
            f"the inputs are zero in {_some_of(dead, taps)} in every calibration sample (behind a layer that is still "
            "zero?): nothing is known of their weights' effect, and they are pruned by what else their score knows. "
            "Give samples that reach them, or put them into `ignore`",
        )
    if zero := [name for name in zero if name not in dead]:
        warn(
            f"the gradient of the calibration loss is zero in {_some_of(zero, taps)}: nothing is known of their "
            "weights' effect on it, and they are pruned by what else their score knows. Put layers that the loss does "
            "not depend on into `ignore`",
        )


def _some_of(names: Sequence[str], taps: Sequence[Tap]) -> str:
    return f"{len(names)} of {len(taps)} layers ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"


def _sum_over_ranks(taps: Taps, ranks: Ranks) -> None:
    for tap in taps.all:
        sums = tap.accumulator.sums
        for name in sorted(taps.statistics):
            if name in tap.summed:
                continue
            sums[name] = ranks.sum_samples(sums[name])
            if name in (INPUT_NORM, OUTPUT_GRAD_NORM):
                dim = 1 if name == INPUT_NORM else 0
                sums[name] = tap.layout.whole_vector(sums[name], dim, ranks.data_ranks())
