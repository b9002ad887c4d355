"""What a pruning saw of its scores: the mean in each layer, and histograms of those kept and those pruned.

Dimensions: O outputs, I inputs of a layer, N bins of a histogram.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.ranks import Ranks

LOWEST = -40
"""Log2 of the scores at which the first bin begins. Smaller ones, and zero, are counted in it."""

BINS = 160
"""Number of bins; each is half an octave wide, so they end at 2 to the 40."""

# Scores looked at in a layer: enough for a histogram, few enough that it costs nothing beside the scores themselves.
_SAMPLES = 1 << 18


@dataclass
class LayerScores:
    """Scores of one layer.

    Attributes:
        kept: int64 ``[N]``, how many of the sampled scores lie in each bin and were kept.
        pruned: The same for those that were pruned.
        total: Sum of the sampled scores.
    """

    kept: Tensor
    pruned: Tensor
    total: float

    @property
    def count(self) -> int:
        """Number of scores sampled."""
        return int(self.kept.sum() + self.pruned.sum())

    @property
    def mean(self) -> float:
        """Mean of the sampled scores; 0.0 without any."""
        return self.total / self.count if self.count else 0.0


class ScoreSummary:
    """Collects `LayerScores` by parameter name while masks are selected.

    Attributes:
        layers: What was collected, in the order of selection.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerScores] = {}

    def add(self, name: str, scores: Tensor, kept: Tensor, numel: int) -> None:
        """Take the scores of one layer, or of the part of it that is here.

        Args:
            name: The parameter's name.
            scores: ``[o, i]``; what is not finite (weights that were pruned before) is left out.
            kept: Bool ``[o, i]``, the new mask.
            numel: Size of the whole layer, by which every rank takes the same share of samples.
        """
        step = sample_step(numel, scores.shape[-1])
        sample, mask = scores.detach().reshape(-1)[::step], kept.reshape(-1)[::step]
        finite = torch.isfinite(sample)
        sample, mask = sample[finite].double().cpu(), mask[finite].cpu()
        bins = score_bins(sample)
        self.layers[name] = LayerScores(
            torch.bincount(bins[mask], minlength=BINS), torch.bincount(bins[~mask], minlength=BINS), float(sample.sum())
        )

    def leave_out(self, name: str) -> None:
        """Take nothing of a layer whose scores another rank counts."""
        empty = torch.zeros(BINS, dtype=torch.int64, device="cpu")
        self.layers[name] = LayerScores(empty, empty.clone(), 0.0)

    def sum_over(self, ranks: Ranks) -> None:
        """Sum what each rank saw of its parts; every rank must call, with the same layers."""
        if not self.layers:
            return
        rows = [torch.cat([s.kept, s.pruned, s.kept.new_zeros(1)]).double() for s in self.layers.values()]
        table = torch.stack(rows)  # [layers, 2 N + 1]
        table[:, -1] = table.new_tensor([s.total for s in self.layers.values()])
        table = ranks.sum_parts(table)
        for name, row in zip(self.layers, table, strict=True):
            counts = row[:-1].round().long()
            self.layers[name] = LayerScores(counts[:BINS].clone(), counts[BINS:].clone(), float(row[-1]))

    # -- storage -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Plain tensors and numbers, loadable with ``torch.load(weights_only=True)``."""
        return {
            name: {"kept": s.kept.to(torch.int32), "pruned": s.pruned.to(torch.int32), "total": s.total}
            for name, s in self.layers.items()
        }

    @classmethod
    def from_state(cls, state: Any) -> ScoreSummary:
        """The inverse of `state_dict`; what is not of its form is left out, since nothing depends on it."""
        summary = cls()
        for name, entry in state.items() if isinstance(state, Mapping) else ():
            if not isinstance(entry, Mapping):
                continue
            kept, pruned, total = entry.get("kept"), entry.get("pruned"), entry.get("total")
            if _is_histogram(kept) and _is_histogram(pruned) and isinstance(total, (int, float)):
                assert isinstance(kept, Tensor)
                assert isinstance(pruned, Tensor)
                summary.layers[str(name)] = LayerScores(kept.long(), pruned.long(), float(total))
        return summary


def _is_histogram(value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == (BINS,) and not value.is_floating_point()


def sample_step(numel: int, columns: int) -> int:
    """Distance between the scores that are sampled; it shares no factor with a row's length, so all columns are met.

    >>> sample_step(1000, 10), sample_step((1 << 18) + 1, 1 << 18), sample_step(1 << 20, 1024)
    (1, 3, 5)
    """
    step = max(1, -(-numel // _SAMPLES))  # never more than that many
    while math.gcd(step, columns) > 1:
        step += 1
    return step


def score_bins(scores: Tensor) -> Tensor:
    """The bin of each score.

    >>> score_bins(torch.tensor([0.0, 1.0, 1.5, 2.0, 1e30])).tolist()
    [0, 80, 81, 82, 159]
    """
    # Of a score that may be negative (one of a user's own) the sign is not shown.
    place = (scores.abs().log2() - LOWEST) * 2
    return place.clamp(0, BINS - 1).long()
