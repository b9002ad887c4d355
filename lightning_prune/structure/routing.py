"""Score experts by what they add to their layer's output: REAP (arXiv 2510.13999)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError
from lightning_prune.progress import progress_bar
from lightning_prune.pruning.calibration import LossFn
from lightning_prune.pruning.experts import Routed, written_out
from lightning_prune.pruning.padding import Padding, PaddingFinder
from lightning_prune.pruning.running import forward, quiet_model
from lightning_prune.structure.units import Structure


@torch.no_grad()
def reap_saliency(
    structure: Structure, batches: Iterable[Any], loss_fn: LossFn | None, number: int, progress: bool
) -> Tensor:
    """Average, over the tokens routed to each expert, its weight times the norm of its output; ``[P, U]`` in float64.

    An expert without any token has 0. Padding does not count.

    Args:
        structure: Of a model of experts.
        batches: Calibration batches on its device.
        loss_fn: Drives the forward pass, if there is one; see `lightning_prune.prune`.
        number: Of batches, for the progress bar.
        progress: Show it.

    Raises:
        CalibrationError: no batch, or outputs that are not finite.
    """
    modules = structure.modules()
    layers = {modules[name]: i for i, name in enumerate(structure.expert_names())}
    sums = torch.zeros(len(layers), structure.units("expert"), dtype=torch.float64, device="cpu")
    counts = torch.zeros_like(sums)
    finder, padding = PaddingFinder(structure.model), list[Padding | None]([None])

    def see(experts: nn.Module, index: int, routed: Routed, made: Tensor, shares: Tensor) -> None:
        values = made.double().norm(dim=-1) * shares.double()
        keep = None if padding[0] is None else padding[0].now.keep_routed(structure.family.layers, experts, routed)
        values = values if keep is None else values[keep[0]]
        sums[layers[experts], index] += values.sum().cpu()
        counts[layers[experts], index] += len(values)

    with (
        quiet_model(structure.model, freeze=False),
        written_out((), layers, see),
        finder.watching(),
        progress_bar("Calibrating (forward)", number, progress) as advance,
    ):
        for batch in batches:
            padding[0] = finder.find(batch)
            if loss_fn is not None:
                loss_fn(structure.model, batch)
            else:
                forward(structure.model, batch, ())
            advance()
    finder.warn()
    if not counts.any():
        raise CalibrationError("there is no calibration sample; the weights are unchanged")
    if not torch.isfinite(sums).all():
        raise CalibrationError("outputs of experts are not finite; check the model. The weights are unchanged")
    return sums / counts.clamp(min=1)
