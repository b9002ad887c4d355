"""Hooks on layers that see what passes through them: each layer's input X, its output gradient delta, their product.

Autograd makes no weight gradient meanwhile; a layer's own per-sample gradient ``G_b = delta_b^T X_b`` is formed in
the backward of its input and added to the aggregate at once. Of sharded weights the hooks see the local samples'
inputs and output gradients, before any reduction; a layer's contribution is summed over ranks and cut to this rank's
part of the aggregate before the next layer's is formed.

Dimensions: B samples, T rows of a sample (tokens), I inputs, O outputs of a layer. Of a convolution in G groups X has
the inputs of all groups, ``[B, T, G I]``; G is 1 of all other layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import CalibrationError
from lightning_prune.naming import to_ignore
from lightning_prune.pruning.experts import ExpertMatrix, Routed, written_out
from lightning_prune.pruning.layer_kinds import LINEAR, LayerKind, as_called
from lightning_prune.pruning.padding import Padding
from lightning_prune.pruning.precision import full_precision
from lightning_prune.pruning.projections import Projection, projections_written_out
from lightning_prune.pruning.statistics import (
    BACKWARD_STATISTICS,
    FORWARD_STATISTICS,
    GRADIENTS,
    HESSIAN,
    Accumulator,
    values_of,
    wide_dtype,
)
from lightning_prune.pruning.targets import Target
from lightning_prune.pruning.weight_uses import LayerCall, WeightUses, same_gradient
from lightning_prune.pruning.zeros import CONVOLUTIONS, pads_by_itself
from lightning_prune.ranks import Ranks
from lightning_prune.sharding import Layout, gather_whole, local

# Share of a sample's gradient that rounding may leave in another's rows; in layouts with samples first it is none.
_LEAK = 1e-3
# Outputs and inputs of a weight whose gradients stand for all of it where only directions are compared.
_CORNER = (64, 8)


@dataclass
class Tap:
    """One target's accumulator, and what passes through its layers during one forward pass."""

    target: Target
    accumulator: Accumulator
    layout: Layout  # as it is trained: in a forward pass FSDP2 has the parameter gathered
    forward_shape: tuple[int, int]  # of the matrix that this rank's forward pass multiplies with
    uses: int = 0
    spread: bool = False  # each rank keeps some rows of the Hessian
    waiting: list[Tensor] = field(default_factory=list)  # inputs [n, I] of a pass, whose products are summed after it
    at_once: bool = True  # used once by every rank: its gradient is complete when the backward of its input runs
    pending: list[Tensor] = field(default_factory=list)  # [B, O, I], the sum over uses, until the backward is done

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.target.name

    @property
    def summed(self) -> frozenset[str]:
        """The statistics of which each rank keeps a part, which is summed over ranks with every pass."""
        hessian = frozenset({HESSIAN} if self.spread else ())
        return hessian | (self.layout.if_spread(GRADIENTS) or frozenset())


@dataclass
class _Increments:
    """What the last input seen adds to forward statistics; valid while the tensor is unchanged."""

    x: Tensor
    version: int
    kind: LayerKind
    spread: bool
    padding: Padding | None
    values: dict[str, Tensor]
    rows: Tensor | None  # whose products are summed after the pass


class _Record:
    """One use of a layer: its output gradient, from the output's hook until the input's backward."""

    __slots__ = ("delta", "doubtful", "layer", "padding", "routed", "tap")

    def __init__(self, tap: Tap, layer: nn.Module, padding: Padding | None) -> None:
        self.tap, self.layer = tap, layer  # tied layers may have geometries of their own
        self.routed = routed_to(layer)
        self.padding = padding  # of the call that runs; others may follow before the backward
        self.delta: Tensor | None = None
        self.doubtful = False  # whether the layer returns the product with its weight as it is


class _SaveInput(torch.autograd.Function):
    """Identity on a layer's input that sees, in backward, that input beside the layer's output gradient.

    The input is saved through autograd, so checkpointed blocks recompute it instead of holding it, and each use of
    a layer is counted exactly once however often its forward is repeated.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, record: _Record, taps: Taps) -> Tensor:
        ctx.save_for_backward(x)
        ctx.record, ctx.taps = record, taps
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.taps.in_backward:
            ctx.taps.take_gradient(ctx.record, x)
        elif torch.is_grad_enabled():
            ctx.taps.fail(
                f"loss_fn differentiates through {ctx.record.tap.name!r} with create_graph=True (a gradient penalty?): "
                "gradients of gradients cannot be calibrated on; pass a loss_fn without that term, or choose a score "
                "without gradients (wanda, sparsegpt, magnitude)"
            )
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None


class Taps:
    """Hooks on every target, and the sums they feed.

    Args:
        targets: The layers.
        statistics: What to collect of each.
        gradient_dtype: dtype of gradient aggregates.
        gradient_device: Their device; default the weight's.
        ranks: Who calibrates together, or None.

    Attributes:
        failure: What went wrong inside a forward pass. Raised by the caller after it: where parameters are sharded,
            a rank that left a forward pass alone would leave the others waiting.
        not_per_sample: The inputs of some layer did not come sample by sample.
        calls: The layers that are running, the innermost last.
        seen: Names of weights whose use has been found sound.
        without_gradient: Names of weights that were used while no gradient was recorded.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        statistics: frozenset[str],
        gradient_dtype: torch.dtype = torch.float32,
        gradient_device: torch.device | str | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.statistics, self.ranks = statistics, ranks
        self.backward = bool(statistics & BACKWARD_STATISTICS)
        self.group = None if ranks is None else ranks.data_group
        self.data_ranks = frozenset[int]() if ranks is None else ranks.data_ranks()
        device = None if gradient_device is None else torch.device(gradient_device)
        self.all = [self._tap(target, gradient_dtype, device) for target in targets]
        self.scale = 1.0
        self.device = torch.device("cpu")  # where the pass computes
        self.size: int | None = None
        self.padding: Padding | None = None
        self.counting = True
        self.of_sequences = False
        self.in_backward = False
        self.whole = False
        self.probed: int | None = None
        self.corners: dict[str, Tensor] | None = None
        # Experts tell the least of a loss: rounding, other in a batch than alone, sends single tokens to another one.
        self.all_routed = all(isinstance(module, ExpertMatrix) for tap in self.all for module in tap.target.modules)
        self.leaks: list[Tensor] = []
        self.calls: list[LayerCall] = []
        self.seen: set[str] = set()
        self.without_gradient: set[str] = set()
        self.of_weights = bool(statistics & GRADIENTS)
        self.uses = WeightUses(self, [(target.parameter, target.modules) for target in targets])
        self.watched = False
        # By parameter: what comes before and after a call of a layer, for one that its parent runs without calling it.
        self.around: dict[str, tuple[nn.Module, Callable[..., Any], Callable[..., Any]]] = {}
        self.failure: CalibrationError | None = None
        self.not_per_sample = False
        self.last_input: _Increments | None = None
        # Makes the graph start at the first target although every parameter is frozen.
        self.anchor = torch.zeros((), requires_grad=True, device="cpu")

    def _tap(self, target: Target, gradient_dtype: torch.dtype, device: torch.device | None) -> Tap:
        layout = target.layout
        (row, row_end), (column, column_end) = layout.forward_bounds(self.data_ranks)
        own = target.part(target.weight).shape
        wide = wide_dtype(target.weight.dtype)
        if device is None and target.offloaded:
            device = torch.device("cpu")  # where there may be room for as many numbers as the model has weights
        # Gradient aggregates are as exact as the weights, unless less was asked for.
        gradient_dtype = wide if gradient_dtype == torch.float32 else gradient_dtype
        accumulator = Accumulator(self.statistics, (own[0], own[1]), gradient_dtype, device, wide)
        spread = self.ranks is not None and HESSIAN in self.statistics and self.ranks.spreads(layout)
        return Tap(target, accumulator, layout, (row_end - row, column_end - column), spread=spread)

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Hooks on every target, while the block runs."""
        handles: list[RemovableHandle] = []
        modules = [(tap, module) for tap in self.all for module in tap.target.modules]
        try:
            for tap, module in modules:
                handles.extend(self._hook(tap, module))
            with (
                written_out(module for _, module in modules if isinstance(module, ExpertMatrix)),
                projections_written_out(module for _, module in modules if isinstance(module, Projection)),
            ):
                yield
        finally:
            for handle in handles:
                handle.remove()
            self.last_input = None
            self.calls, self.leaks, self.around = [], [], {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for uses of weights that hooks do not see, until every layer has been seen once.

        With layers that are never called there is no end to it: the watch is what runs them.
        """
        self.watched = len(self.seen) < len({tap.target.parameter for tap in self.all})
        mode: AbstractContextManager[Any] = self.uses if self.watched else nullcontext()
        try:
            with mode:
                yield
        finally:
            self.watched = False

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Run layers that are never called, in passes that nothing is taken from."""
        with self.uses:
            yield

    def fail(self, message: str) -> None:
        """Note what is wrong; the first message stays."""
        self.failure = self.failure or CalibrationError(message)

    def begin(
        self,
        size: int | None,
        padding: Padding | None,
        of_sequences: bool = False,
        counting: bool = True,
        whole: bool = False,
    ) -> None:
        """A forward pass over `size` samples is about to run.

        Unless `counting`, it must leave no trace in the sums. With `whole`, the batch has one gradient.
        """
        self.size, self.padding, self.of_sequences, self.counting = size, padding, of_sequences, counting
        self.whole, self.calls = whole, []
        self.uses.begin()
        self.last_input, self.failure, self.not_per_sample = None, None, False
        self.settle()
        for tap in self.all:
            tap.uses, tap.pending, tap.at_once = 0, [], True

    def settle(self) -> None:
        """Let what the last forward (and backward) pass has added stand."""
        self._sum_products()
        for tap in self.all:
            tap.accumulator.settle()

    @torch.no_grad()
    def _sum_products(self) -> None:
        """Sum over ranks what the inputs of the last pass add to Hessians of which each rank keeps some rows.

        Not in hooks: a rank may have met a layer that another did not (experts).
        """
        spread = [tap for tap in self.all if tap.spread]
        if not spread or self.ranks is None:
            return
        said: list[int] = []
        before: list[Tensor] = []
        for tap in spread:  # layers that share an input (q, k, v) share the product
            same = bool(before) and list(map(id, tap.waiting)) == list(map(id, before))
            said += [len(tap.waiting), same]
            before = tap.waiting
        every = self.ranks.gather(said)
        part: Tensor | None = None
        for i, tap in enumerate(spread):
            if part is None or not all(answers[2 * i + 1] for answers in every):
                if not any(answers[2 * i] for answers in every):
                    part = None
                    continue
                inputs = tap.target.shape[1]
                total = torch.zeros(inputs, inputs, dtype=tap.accumulator.dtype, device=self.ranks.device)
                for rows in tap.waiting:
                    total = total.to(rows.device).add_(tap.accumulator.products(rows))
                part = self.ranks.sum_to_rows(total)
            tap.accumulator.add({HESSIAN: part})
        for tap in spread:
            tap.waiting = []

    def undo(self, only: bool) -> bool:
        """Take back what the last pass has added before it failed; `only` says that no other has added anything.

        Returns:
            Whether that can be done.
        """
        self.last_input = None
        for tap in self.all:
            tap.pending, tap.waiting = [], []
        return all(tap.accumulator.undo(only) for tap in self.all)

    def run_backward(self, loss: Tensor, everywhere: Sequence[Sequence[int]]) -> None:
        """Backward of a loss, and the sums it feeds.

        Args:
            loss: Already multiplied by `scale`.
            everywhere: Of each rank, how often its forward pass used each target.
        """
        for tap, uses in zip(self.all, zip(*everywhere, strict=True), strict=True):
            tap.at_once = all(n == 1 for n in uses)
        self._backward(loss)
        self.uses.check_gradients()
        if unseen := self.uses.functional & self.without_gradient:
            self.fail(in_checkpoint(min(unseen), "under no_grad, or in a re-entrant gradient checkpoint"))
        for tap, uses in zip(self.all, zip(*everywhere, strict=True), strict=True):
            if not tap.at_once and any(uses) and self.statistics & GRADIENTS:
                self._add_gradients(tap, tap.pending[0] if tap.pending else ())
            tap.pending = []

    def probe(self, losses: Tensor, sample: int) -> bool:
        """Run the backward of one of two samples' losses; returns whether it reached the other's rows of some layer.

        Nothing is added to the sums. Sound layouts have their samples first: of any other, or where the loss of a
        sample depends on the other one, the gradients of both would be mixed up.
        """
        self.probed, self.leaks = sample, []
        try:
            self._backward(losses[sample] if losses.dim() else losses)
        finally:
            self.probed = None
        leaks, self.leaks = self.leaks, []
        return any(values_of(leaks))

    def gradient_corners(self, loss: Tensor) -> dict[str, Tensor]:
        """Run the backward of a loss; returns some numbers of each weight's gradient. Nothing is added to the sums."""
        self.corners = {}
        try:
            self._backward(loss * self.scale)
        finally:
            corners, self.corners = self.corners, None
        return {name: corner.cpu() for name, corner in corners.items()}  # once all are on their way

    def _backward(self, loss: Tensor) -> None:
        self.device, self.in_backward = loss.device, True
        try:
            torch.autograd.backward(loss)  # the method would end the watch over weights meanwhile
        finally:
            self.in_backward = False

    # -- hooks ---------------------------------------------------------------------------------------------------

    def run_as_layer(self, name: str, x: Tensor, how: dict[str, Any], product: Callable[[Tensor], Any]) -> Any:
        """Make a product with a layer's weight as if the layer were called; None where it cannot be one of a layer.

        Args:
            name: Of the weight.
            x: The input.
            how: Other arguments of the product.
            product: Makes it.
        """
        if name not in self.around or not isinstance(x, Tensor):
            return None
        module, before, after = self.around[name]
        layer = as_called(module, **how) if isinstance(module, CONVOLUTIONS) else module
        if layer is None:
            return None
        self.uses.enter(name, functional=True)
        changed = before(layer, (x,), {})
        output = product(x if changed is None else changed[0][0])
        after(layer, (x,), output)
        return output

    def _hook(self, tap: Tap, module: nn.Module) -> Iterator[RemovableHandle]:
        def called(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.uses.enter(tap.target.parameter)
            return before(layer, args, kwargs)

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = "input" if "input" in kwargs else next(iter(kwargs), "")
            x = args[0] if args else kwargs.get(key)
            name = tap.name.removesuffix(".weight")
            if not isinstance(x, Tensor):
                raise CalibrationError(f"{name!r} receives {type(x).__name__}, not a tensor; add {to_ignore(name)}")
            if x.is_meta:
                raise CalibrationError(
                    f"{name!r} receives no data: a layer before it ran without its offloaded weights: load the model "
                    "whole, without a device_map"
                )
            if not self.backward:
                self._enter(tap, layer, x, None)
                self._take_input(tap, layer, x)
                return None
            if x.is_nested and x.layout is torch.strided:
                raise CalibrationError(
                    f"{name!r} receives a nested tensor of strided layout, whose gradients cannot be watched: make it "
                    "with layout=torch.jagged, or choose a score without gradients (wanda, sparsegpt, magnitude)"
                )
            if not self.in_backward:
                tap.uses += 1
                self._check_per_sample(tap, layer, x)
            if not torch.is_grad_enabled():  # the first, gradient-free pass of a re-entrant checkpoint
                self.without_gradient.add(tap.target.parameter)
                self._enter(tap, layer, x, None)
                return None
            record = _Record(tap, layer, self._padding_now())
            saved = _SaveInput.apply(x, self.anchor.to(x.device), record, self)  # type: ignore[no-untyped-call]
            self._enter(tap, layer, saved, record)
            return ((saved, *args[1:]), kwargs) if args else (args, {**kwargs, key: saved})

        def after(layer: nn.Module, _: Any, output: Any) -> None:
            call = self.calls.pop()
            while call.layer is not layer:  # a layer inside failed, and the model went on
                call = self.calls.pop()
            if self.watched:
                self.uses.forget(call)
            if not isinstance(output, Tensor):
                if self.backward:
                    self.fail(
                        f"{tap.name.removesuffix('.weight')!r} returns {type(output).__name__}, not a tensor, so its "
                        f"gradient cannot be told; add {to_ignore(tap.name)}; routers of experts are best left dense"
                    )
                return
            if self.watched and tap.target.parameter in self.uses.called:
                self.seen.add(tap.target.parameter)
            doubtful = self.watched and self.backward and not call.returns_product(output)
            if doubtful and call.record is None:  # recomputed later by a re-entrant checkpoint, out of sight
                self._refuse_changed(tap.name)
            if not output.requires_grad and call.record is not None:  # its forward runs under no_grad by itself
                self.without_gradient.add(tap.target.parameter)
            elif call.record is not None:
                record = call.record
                record.doubtful = doubtful
                on_gradient(output, lambda delta: setattr(record, "delta", delta))

        padded = isinstance(module, CONVOLUTIONS) and pads_by_itself(module)
        if tap.target.kind is LINEAR or padded:
            self.around[tap.target.parameter] = (module, before, after)
        if padded:  # what it multiplies with is not what it is called with
            return
        # Next to the layer, inside the hooks of others: these may change what it receives and returns.
        yield module.register_forward_pre_hook(called, with_kwargs=True)
        yield module.register_forward_hook(after, prepend=True)

    def _enter(self, tap: Tap, layer: nn.Module, x: Tensor, record: _Record | None) -> None:
        self.calls.append(LayerCall(tap.target.parameter, layer, x, record))
        if self.watched:
            self.uses.add(tap.target.parameter, layer)

    def made_product(self, call: LayerCall, product: Tensor) -> None:
        """Compare, in backward, the gradient of the product with a weight to that of the layer's output, if need be."""
        record, name = call.record, call.name
        if record is None or not product.requires_grad:
            return

        def compare(delta: Tensor) -> None:
            if record.doubtful and (record.delta is None or not same_gradient(record.delta, delta)):
                self._refuse_changed(name)

        on_gradient(product, compare)

    def _refuse_changed(self, name: str) -> None:
        self.fail(
            f"{name.removesuffix('.weight')!r} changes the product with its weight before it returns it (it is "
            f"scaled?), so its gradient cannot be told; add {to_ignore(name)}"
        )

    def _take_input(self, tap: Tap, layer: nn.Module, x: Tensor) -> None:
        """Forward statistics; layers called one after the other on the same tensor (q, k, v) compute them once."""
        if self.failure is not None or not (self.counting or HESSIAN in self.statistics):
            return
        known = self.last_input
        kind, spread, padding = tap.target.kind, tap.spread, self._padding_now()
        now = (x._version, kind, spread)
        same = known is not None and known.x is x and known.padding is padding
        if known is None or not same or (known.version, known.kind, known.spread) != now:
            rows = self._input_rows(tap, layer, x.detach())
            keep = self._keep_for(tap, layer, x, rows, routed_to(layer), padding)
            known = _Increments(x, *now, padding, *self._increments(tap, rows, keep))
            # Patches of a convolution depend on the layer too, so only plain inputs are remembered.
            self.last_input = None if isinstance(layer, CONVOLUTIONS) else known
        self._add_input(tap, known.values, known.rows)

    def _increments(self, tap: Tap, rows: Tensor, keep: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """What rows ``[B, T, I]`` add to the sums, and those whose products wait for the end of the pass."""
        values = tap.accumulator.input_increments(rows, keep, products=not tap.spread)
        flat = rows.reshape(-1, rows.shape[-1])
        # A copy, since the model may change its activations in place.
        return values, (flat.clone() if keep is None else flat[keep.reshape(-1)]) if tap.spread else None

    def _add_input(self, tap: Tap, values: dict[str, Tensor], rows: Tensor | None) -> None:
        if self.counting:
            tap.accumulator.add(values)
            tap.waiting += [] if rows is None else [rows]

    def _input_rows(self, tap: Tap, layer: nn.Module, x: Tensor) -> Tensor:
        """``[B, T, I]``; with tensor parallelism the inputs of the forward's part, unless products of all are asked."""
        return tap.target.kind.input_rows(layer, gather_whole(x) if HESSIAN in self.statistics else local(x))

    def _check_per_sample(self, tap: Tap, layer: nn.Module, x: Tensor) -> None:
        if self.size is not None and self.size > 1 and self.statistics & GRADIENTS:
            if self.whole:
                return
            if (routed := routed_to(layer)) is not None:
                self.not_per_sample |= not routed.divides_into(self.size)
                return
            # Two dimensions then are tokens of all samples put together (experts), whatever their number.
            least = layer.weight.dim() if isinstance(layer, CONVOLUTIONS) else 3 if self.of_sequences else 2
            if x.is_nested or x.dim() < least or x.shape[0] != self.size:
                self.not_per_sample = True

    def _padding_now(self) -> Padding | None:
        return None if self.padding is None else self.padding.now

    def _keep_for(
        self,
        tap: Tap,
        layer: nn.Module,
        x: Tensor,
        rows: Tensor,
        routed: Routed | None,
        padding: Padding | None,
    ) -> Tensor | None:
        """Which of a layer's rows ``[B, T, I]``, made of its input x, are real; None where all are."""
        if padding is None or x.is_nested:  # of which all rows are real
            return None
        if routed is None:
            return padding.keep(tap.name, layer, local(x), rows.shape)
        assert isinstance(layer, ExpertMatrix)
        return padding.keep_routed(tap.name, layer.experts, routed)

    def take_gradient(self, record: _Record, x: Tensor) -> None:
        """Backward of a layer's input: add the layer's statistics for one use."""
        tap, delta, record.delta = record.tap, record.delta, None
        if delta is None:
            return
        if self.corners is not None:
            if record.routed is None or self.all_routed:
                self._add_corner(self.corners, record, x, delta)
            return
        if self.probed is not None:
            deltas = tap.target.kind.output_rows(local(delta.detach()))
            self._look_for_leak(deltas if record.routed is None else record.routed.by_sample(deltas, 2))
            return
        with torch.no_grad(), full_precision():
            kind, accumulator, groups = tap.target.kind, tap.accumulator, tap.target.groups
            rows = kind.input_rows(record.layer, local(x))  # [B, T, G I]
            deltas = kind.output_rows(local(delta))  # [B, T, O]
            self._check_layout(tap, rows, deltas)
            if self.statistics & FORWARD_STATISTICS:
                seen = self._input_rows(tap, record.layer, x) if HESSIAN in self.statistics else rows
                if self.counting:
                    keep = self._keep_for(tap, record.layer, x, seen, record.routed, record.padding)
                    self._add_input(tap, *self._increments(tap, seen, keep))
            if self.counting:
                accumulator.add_output_gradient(deltas, self.scale)
            if not self.statistics & GRADIENTS:
                return
            # Wide, so that a product of many tokens is rounded, or overflows, no earlier than its sum.
            wide = torch.promote_types(torch.promote_types(rows.dtype, deltas.dtype), torch.float32)
            rows, deltas = rows.to(wide), deltas.to(wide)
            if self.size == 1 or self.whole:  # all rows belong to the one sample, in whatever layout
                rows, deltas = rows.reshape(1, -1, rows.shape[-1]), deltas.reshape(1, -1, deltas.shape[-1])
            elif record.routed is not None and self.size is not None:
                rows, deltas = record.routed.by_sample(rows, self.size), record.routed.by_sample(deltas, self.size)
            if not tap.at_once:  # abs and squares are of the sum over uses
                gradients = _gradient(deltas, rows, groups)  # [B, O, I]
                tap.pending = [tap.pending[0].add_(gradients)] if tap.pending else [gradients]
                return
            self._add_gradients(tap, (_gradient(*pair, groups) for pair in zip(deltas, rows, strict=True)))

    @torch.no_grad()
    @full_precision()
    def _add_corner(self, corners: dict[str, Tensor], record: _Record, x: Tensor, delta: Tensor) -> None:
        tap, kind, layer, x = record.tap, record.tap.target.kind, record.layer, local(x)
        if isinstance(layer, CONVOLUTIONS):  # patches of a few channels, since those of all may be as many as never run
            _, of_group, *places = layer.weight.shape
            channels = -(-_CORNER[1] // math.prod(places))
            if channels > of_group:  # whole groups
                channels = min(layer.in_channels, -(-channels // of_group) * of_group)
            x = x.narrow(1 - layer.weight.dim(), 0, channels)
        rows = kind.input_rows(layer, x)[..., : _CORNER[1]].flatten(0, 1)
        deltas = kind.output_rows(local(delta))[..., : _CORNER[0]].flatten(0, 1)
        corner = deltas.to(wide_dtype(deltas.dtype)).t() @ rows.to(wide_dtype(rows.dtype))
        name = tap.target.parameter  # of all experts together
        corners[name] = corners[name].to(corner.device) + corner if name in corners else corner

    def _look_for_leak(self, deltas: Tensor) -> None:
        assert self.probed is not None
        if deltas.shape[0] != 2:
            self.leaks.append(torch.tensor(True, device=deltas.device))
            return
        own, other = deltas[self.probed].abs().amax(), deltas[1 - self.probed].abs().amax()
        self.leaks.append(~(other <= own * _LEAK))  # NaN is one

    def _check_layout(self, tap: Tap, rows: Tensor, deltas: Tensor) -> None:
        outputs, inputs = tap.forward_shape
        alike = rows.shape[:2].numel() == deltas.shape[:2].numel()
        if alike and (deltas.shape[-1], rows.shape[-1]) == (outputs, inputs * tap.target.groups):
            return
        raise CalibrationError(
            f"{tap.name!r} met inputs {tuple(rows.shape)} and output gradients {tuple(deltas.shape)} on this rank, "
            f"which do not belong to its part ({outputs}, {inputs}) of the weight: sequence parallelism is not "
            "supported in calibration; use ColwiseParallel and RowwiseParallel with their default layouts"
        )

    def _add_gradients(self, tap: Tap, gradients: Iterable[Tensor]) -> None:
        """Add per-sample gradients ``[o, i]`` of the forward's part to the aggregate."""
        if not tap.summed:
            for gradient in gradients if self.counting else ():
                tap.accumulator.add_gradient(gradient, self.scale)
            return
        wide = tap.accumulator.dtype
        step = Accumulator(self.statistics & GRADIENTS, tap.forward_shape, wide, dtype=wide)
        for gradient in gradients if self.counting else ():
            step.add_gradient(gradient, self.scale)
        for name in sorted(step.statistics):
            part = step.sums.pop(name, None)
            part = torch.zeros(tap.forward_shape, dtype=wide, device=self.device) if part is None else part
            tap.accumulator.add_aggregate(name, tap.layout.sum_to_shard(part, self.group, self.data_ranks))


def _gradient(delta: Tensor, x: Tensor, groups: int) -> Tensor:
    """Gradients of a weight ``[..., O, I]``, of output gradients ``[..., T, O]`` and inputs ``[..., T, G I]``."""
    if groups > 1:
        delta, x = (torch.unflatten(rows, -1, (groups, -1)).movedim(-2, -3) for rows in (delta, x))  # [..., G, T, .]
        return (delta.mT @ x).flatten(-3, -2)
    return delta.mT @ x


def in_checkpoint(name: str, where: str = "in a gradient checkpoint") -> str:
    """Say that a product which stands for a call of a layer cannot be seen when it is made again in backward."""
    layer = name.removesuffix(".weight")
    return (
        f"what {layer!r} multiplies with is seen only where its weight is used (F.linear by what holds it, or padding "
        f"of its own), and that is {where}, in which it cannot be seen: switch checkpointing off until the model is "
        f"pruned, choose a score without gradients (wanda, sparsegpt, magnitude), or add {to_ignore(layer)}"
    )


def routed_to(layer: nn.Module) -> Routed | None:
    """The tokens that a layer sees in the call that runs, if it is one expert's; None for a layer that sees all."""
    return layer.routed if isinstance(layer, ExpertMatrix) else None


def on_gradient(output: Tensor, take: Callable[[Tensor], None]) -> None:
    """Call `take` with the gradient of a layer's output as it is now, before anyone changes it in place."""
    base = output._base
    if base is not None and base.numel() == output.numel() and base.requires_grad:
        # A linear layer returns a view; an in-place change of a view replaces its history, not that of its base.
        shape = output.shape  # not the output, whose graph would stay alive in a circle of references
        base.register_hook(lambda delta: take(delta.reshape(shape)))  # type: ignore[no-untyped-call]
    else:
        output.register_hook(take)  # type: ignore[no-untyped-call]
