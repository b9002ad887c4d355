"""Fit one window of a decoder block: what is trained of it, and its training on squared errors.

Letters: B samples, T tokens, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from lightning_prune.perp.adapters import adapted_modules, attach, has_pruned, merge, remove_adapters
from lightning_prune.perp.experts import weight_name
from lightning_prune.perp.options import ReconstructSettings, WholeNames, select_parameters
from lightning_prune.perp.record import find_retraining
from lightning_prune.perp.windows import Window
from lightning_prune.pruning.blocks import BlockWalk
from lightning_prune.pruning.enforcement import Enforcer
from lightning_prune.pruning.masks import named_weights
from lightning_prune.pruning.targets import find_targets, parameters_of
from lightning_prune.ranks import Ranks
from lightning_prune.safety import uninterrupted
from lightning_prune.schedules import learning_rate_factor

# Options that have chosen the modules when the blocks are reached.
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")

Changing = tuple[list[nn.Parameter], Callable[[], None]]


class Training(Protocol):
    """What a window is fitted with."""

    @property
    def weights(self) -> Mapping[str, list[str]]:
        """Names in a block of its pruned weights that are retrained, by the block's name."""

    def fits(self, name: str, block: nn.Module, within: Collection[str] | None = None) -> bool:
        """Return whether a block, or those of its parameters, has pruned weights and something to train."""

    def trained(self, name: str, block: nn.Module) -> dict[str, nn.Parameter]:
        """Return the block's own parameters that are trained, by their names in it."""

    def on(self, window: Window, block: nn.Module) -> AbstractContextManager[Changing]:
        """Let a window be trained inside: what requires a gradient in the block; merge it at the end.

        Gives the parameters that training and merging will change, and what masks their gradients.
        """


class Adapters:
    """Adapters on the pruned layers, and parts of the block."""

    def __init__(
        self,
        settings: ReconstructSettings,
        masks: Mapping[str, Tensor],
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
    ) -> None:
        self.settings, self.masks = settings, masks
        names = adapted_modules(model, settings.adapter or "mask_lora", settings.lora_options, masks)
        self.weights = _by_block([weight_name(model, name) for name in names], blocks)

    def fits(self, name: str, block: nn.Module, within: Collection[str] | None = None) -> bool:
        """See `Training.fits`."""
        has_pruned, trained = _any_within(self.weights[name], within), self.trained(name, block)
        return has_pruned and (self.settings.adapter is not None or _any_within(trained, within))

    def trained(self, name: str, block: nn.Module) -> dict[str, nn.Parameter]:
        """See `Training.trained`."""
        return select_parameters(block, self.settings.parts)

    @contextmanager
    def on(self, window: Window, block: nn.Module) -> Iterator[Changing]:
        """See `Training.on`."""
        adapter, options = self.settings.adapter, self.settings.lora_options
        layers = [w.removesuffix(".weight") for w in self.weights[window.block] if w in window.parameters]
        kept = {name: value for name, value in options.items() if name not in _SELECTING}
        trained = self.trained(window.block, block)
        changing = [p for name, p in trained.items() if name in window.parameters]
        changing += [block.get_parameter(weight_name(block, layer)) for layer in layers if adapter is not None]
        try:
            chosen = {**kept, "target_modules": WholeNames(layers)} if adapter is not None else {}
            attach(block, adapter, _masks_in(window.block, self.masks), self.settings.parts, chosen)
            for name, parameter in trained.items():
                parameter.requires_grad_(name in window.parameters)
            yield changing, lambda: None
            merge(block)
        except BaseException:
            with uninterrupted():
                if find_retraining(block) is not None:
                    remove_adapters(block)
            raise


class KeptWeights:
    """Every weight that pruning could take and has kept, biases and norms."""

    def __init__(
        self,
        settings: ReconstructSettings,
        masks: Mapping[str, Tensor],
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
    ) -> None:
        self.settings, self.masks = settings, masks
        parameters = named_weights(model)
        self._prunable = _by_block(list(parameters_of(find_targets(model, frozen=True, parametrized=False))), blocks)
        self.weights = {
            block: [w for w in names if has_pruned(parameters[f"{block}.{w}"], masks.get(f"{block}.{w}"))]
            for block, names in self._prunable.items()
        }

    def fits(self, name: str, block: nn.Module, within: Collection[str] | None = None) -> bool:
        """See `Training.fits`."""
        return _any_within(self.weights[name], within)

    def trained(self, name: str, block: nn.Module) -> dict[str, nn.Parameter]:
        """See `Training.trained`."""
        parts = select_parameters(block, self.settings.parts)
        return {**parts, **{weight: block.get_parameter(weight) for weight in self._prunable[name]}}

    @contextmanager
    def on(self, window: Window, block: nn.Module) -> Iterator[Changing]:
        """See `Training.on`."""
        trained = {n: p for n, p in self.trained(window.block, block).items() if n in window.parameters}
        masks = _masks_in(window.block, self.masks)
        held = [name for name in trained if name in self._prunable[window.block] or name in masks]
        enforcer = Enforcer(
            {name: trained[name] for name in held},
            {name: masks.get(name, trained[name].detach() != 0) for name in held},
        )
        flags = {parameter: parameter.requires_grad for parameter in block.parameters()}
        chosen = set(trained.values())
        try:
            for parameter in flags:
                parameter.requires_grad_(parameter in chosen)
            yield list(trained.values()), enforcer.mask_gradients
            enforcer.mask_weights()
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


def _any_within(names: Iterable[str], within: Collection[str] | None) -> bool:
    return any(within is None or name in within for name in names)


def _masks_in(block: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of one block, by names in it."""
    return {name.removeprefix(f"{block}."): m for name, m in masks.items() if name.startswith(f"{block}.")}


def _by_block(names: Sequence[str], blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, list[str]]:
    return {block: [n.removeprefix(f"{block}.") for n in names if n.startswith(f"{block}.")] for block, _ in blocks}


# arXiv 2312.15230, section 4: AdamW without weight decay, a linear schedule with 10 % warm-up.
_WARMUP = 0.1
_LEAST_SIZE = 1e-3  # of a parameter, such as a bias that is zero; arXiv 1804.04235, section 8


def squared_sum(values: Tensor, real: Tensor | None) -> Tensor:
    """Return the sum of squares over real tokens, in float32 at least.

    Args:
        values: ``[B, T, D]``.
        real: ``[B, T]`` bool, True where a token is real, or None.
    """
    # Chosen, not multiplied with 0: what a block makes of padding may be NaN.
    values = values if real is None else values[real]
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum()


def squared_error(output: Tensor, target: Tensor, real: Tensor | None) -> Tensor:
    """Return the sum of squared differences over real tokens, in float32 at least; arguments as `squared_sum`."""
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return squared_sum(output.to(wide) - target.to(output.device, wide), real)


@dataclass(frozen=True)
class WindowFitter:
    """Fits windows of a walk's blocks, each on the hidden states that the walk has reached.

    Attributes:
        walk: Inputs of the block that is next, and what else it receives.
        settings: Steps and learning rate.
        seed: Of the order of batches.
        ranks: The processes whose gradients and errors are added up, or None.
    """

    walk: BlockWalk
    settings: ReconstructSettings
    seed: int
    ranks: Ranks | None

    @torch.no_grad()
    def energy(self, targets: Sequence[Tensor]) -> float:
        """Return the squares of the targets of every batch, ``[B, T, D]`` each, summed over real tokens and ranks."""
        pairs = zip(self.walk.batches, targets, strict=True)
        return self._over_ranks(sum(float(squared_sum(t.to(b.device), b.keep)) for b, t in pairs))

    @torch.no_grad()
    def error(self, window: Window, targets: Sequence[Tensor]) -> float:
        """Return the squared differences between outputs and targets, summed over real tokens and ranks."""
        total = 0.0
        for batch, target in zip(self.walk.batches, targets, strict=True):
            total += float(squared_error(window.run(self.walk, batch, batch.hidden), target, batch.keep))
        return self._over_ranks(total)

    @torch.enable_grad()
    def train(
        self,
        window: Window,
        targets: Sequence[Tensor],
        energy: float,
        mask_gradients: Callable[[], None],
        share_of_rate: float = 1.0,
    ) -> None:
        """Train what requires a gradient in the window's block on the squared error; ``.grad`` are as before then.

        Args:
            window: The window.
            targets: ``[B, T, D]`` for each batch.
            energy: Of the targets: the loss is a share of it, so that learning rates mean the same in every window.
            mask_gradients: Called before each step.
            share_of_rate: Of the learning rates of the settings.
        """
        parameters = [p for p in self.walk.blocks[window.index].parameters() if p.requires_grad]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        # Steps of narrow weights would be lost to rounding.
        wide = {p: p.detach().float().requires_grad_() for p in parameters if p.element_size() < 4}
        stepped = [wide.get(p, p) for p in parameters]
        groups: dict[float, list[Tensor]] = {}  # parameters of one rate take one step together
        for tensor in stepped:
            groups.setdefault(share_of_rate * self._rate(tensor), []).append(tensor)
        optimizer = torch.optim.AdamW([{"params": p, "lr": r} for r, p in groups.items()], weight_decay=0.0)
        steps = self._steps()
        factor = partial(learning_rate_factor, steps=steps, warmup_steps=round(_WARMUP * steps), schedule="linear")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scale = 1.0 / max(energy / self._tokens(), torch.finfo(torch.float32).tiny)
        try:
            for _, position in zip(range(steps), self._order(), strict=False):
                batch = self.walk.batches[position]
                output = window.run(self.walk, batch, batch.hidden)
                error = squared_error(output, targets[position], batch.keep)
                tokens = output[..., 0].numel() if batch.keep is None else int(batch.keep.sum())
                (error * (scale / max(tokens, 1))).backward()  # type: ignore[no-untyped-call]
                self._average(parameters)
                mask_gradients()
                for narrow, copy in wide.items():
                    copy.grad, narrow.grad = None if narrow.grad is None else narrow.grad.float(), None
                optimizer.step()
                for narrow, copy in wide.items():
                    narrow.data.copy_(copy.detach())
                schedule.step()
                optimizer.zero_grad()
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    def _rate(self, parameter: Tensor) -> float:
        """Peak learning rate of a parameter."""
        if self.settings.learning_rate is not None:
            return self.settings.learning_rate
        assert self.settings.relative_rate is not None
        kept = parameter.detach()[parameter != 0]
        size = float(kept.square().mean().sqrt()) if kept.numel() else 0.0
        return self.settings.relative_rate * max(size, _LEAST_SIZE)

    def _steps(self) -> int:
        """Optimizer steps: as many on every rank."""
        if self.settings.steps is not None:
            return self.settings.steps
        assert self.settings.epochs is not None
        counts = [len(self.walk.batches)]
        every = [counts] if self.ranks is None else self.ranks.gather(counts)
        return self.settings.epochs * max(count for (count,) in every)

    def _tokens(self) -> float:
        """Real tokens of all batches and ranks."""
        shapes = ((b.hidden.shape[:2].numel(), b.keep) for b in self.walk.batches)
        return self._over_ranks(float(sum(every if keep is None else int(keep.sum()) for every, keep in shapes)))

    def _order(self) -> Iterator[int]:
        """Positions of batches without end, each pass in a new order."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.walk.batches), generator=generator, device="cpu").tolist()

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.ranks is None:
            return
        count = len(self.ranks.data_ranks())
        for parameter in parameters:
            if parameter.grad is None:  # an expert that no token of this rank chose
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = self.ranks.sum_samples(parameter.grad) / count

    def _over_ranks(self, value: float) -> float:
        if self.ranks is None:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.ranks.device)
        return float(self.ranks.sum_samples(total))
