"""Fit one decoder block to given outputs: its error, and the training of its adapters.

Letters: B samples, T tokens, D hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_prune.learning_rates import learning_rate_factor
from lightning_prune.progress import Advance
from lightning_prune.ranks import Ranks
from lightning_prune.sequential import BlockWalk

# arXiv 2312.15230, section 4: AdamW without weight decay, a linear schedule with 10 % warm-up.
_WARMUP = 0.1


def squared_sum(values: Tensor, keep: Tensor | None) -> Tensor:
    """Sum of squares over real tokens, in float32 at least.

    Args:
        values: ``[B, T, D]``.
        keep: ``[B, T]`` bool, True where a token is real, or None.
    """
    # Chosen, not multiplied with 0: what a block makes of padding may be NaN.
    values = values if keep is None else values[keep]
    return values.to(torch.promote_types(values.dtype, torch.float32)).square().sum()


def squared_error(output: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
    """Sum of squared differences over real tokens, taken in float32 at least; arguments as `squared_sum`."""
    wide = torch.promote_types(torch.promote_types(output.dtype, target.dtype), torch.float32)
    return squared_sum(output.to(wide) - target.to(output.device, wide), keep)


@dataclass(frozen=True)
class BlockFitter:
    """Fits the blocks of a walk, each on the hidden states that the walk has reached.

    Attributes:
        walk: Inputs of the block that is next, and what else it receives.
        steps: Optimizer steps for a block.
        learning_rate: Peak learning rate.
        seed: Of the order of batches.
        ranks: The processes whose gradients and errors are added up, or None.
    """

    walk: BlockWalk
    steps: int
    learning_rate: float
    seed: int
    ranks: Ranks | None

    @torch.no_grad()
    def energy(self, targets: Sequence[Tensor]) -> float:
        """Squares of the targets of every batch, ``[B, T, D]`` each, summed over real tokens and ranks."""
        pairs = zip(self.walk.batches, targets, strict=True)
        return self._over_ranks(sum(float(squared_sum(t.to(b.device), b.keep)) for b, t in pairs))

    @torch.no_grad()
    def error(self, index: int, targets: Sequence[Tensor]) -> float:
        """Squared differences between the block's outputs and the targets, summed over real tokens and ranks."""
        total = 0.0
        for batch, target in zip(self.walk.batches, targets, strict=True):
            output = self.walk.forward(index, batch, batch.hidden)
            total += float(squared_error(output, target, batch.keep))
        return self._over_ranks(total)

    @torch.enable_grad()
    def train(self, index: int, targets: Sequence[Tensor], energy: float, advance: Advance) -> None:
        """Train what requires a gradient in the block on the squared error; ``.grad`` are as before afterwards.

        Args:
            index: The block.
            targets: ``[B, T, D]`` for each batch.
            energy: Of the targets: the loss is a share of it, so that learning rates mean the same in every block.
            advance: Told of each step.
        """
        parameters = [p for p in self.walk.blocks[index].parameters() if p.requires_grad]
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=0.0)
        warmup = round(_WARMUP * self.steps)
        factor = partial(learning_rate_factor, steps=self.steps, warmup_steps=warmup, schedule="linear")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        scale = 1.0 / max(energy / self._tokens(), torch.finfo(torch.float32).tiny)
        for _, position in zip(range(self.steps), self._order(), strict=False):
            batch = self.walk.batches[position]
            output = self.walk.forward(index, batch, batch.hidden)
            error = squared_error(output, targets[position], batch.keep)
            tokens = output[..., 0].numel() if batch.keep is None else int(batch.keep.sum())
            (error * (scale / max(tokens, 1))).backward()  # type: ignore[no-untyped-call]
            self._average(parameters)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def _tokens(self) -> float:
        """Real tokens of all batches and ranks."""
        shapes = ((b.hidden.shape[:2].numel(), b.keep) for b in self.walk.batches)
        return self._over_ranks(float(sum(every if keep is None else int(keep.sum()) for every, keep in shapes)))

    def _order(self) -> Iterator[int]:
        """Positions of batches without end, each pass in a new order."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.walk.batches), generator=generator).tolist()

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        if self.ranks is None:
            return
        count = len(self.ranks.data_ranks())
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad = self.ranks.sum_samples(parameter.grad) / count

    def _over_ranks(self, value: float) -> float:
        if self.ranks is None:
            return value
        total = torch.tensor([value], dtype=torch.float64, device=self.ranks.device)
        return float(self.ranks.sum_samples(total))
