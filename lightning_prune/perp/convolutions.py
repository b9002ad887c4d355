"""Adapt pruned convolutions of one, two or three dimensions, grouped and depthwise ones too.

The kernel ``[O, I / groups, ...]`` is taken for the matrix of its rows ``[O, K]``: K numbers meet one patch of inputs.
Its adapter is that of a linear layer of this shape, A ``[r, K]`` and B ``[O, r]``, also where there are groups, whose
rows share A. (PEFT's own convolution keeps the same two matrices as ``[r, I, ...]`` and ``[O, r, 1, ...]``; with groups
it has a pair for each, and refuses ranks that they do not divide.) So one matrix is combined, masked and merged as
everywhere else, and the convolution runs with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from lightning_prune.perp.layers import SparseLinear, checked_weight, own_weight
from lightning_prune.perp.substitution import SubstitutingLayer, check_substitution
from lightning_prune.pruning.zeros import keeps_zeros
from lightning_prune.sharding import gather_whole, shard_bounds


class SparseConvolution(SubstitutingLayer):
    """A frozen pruned convolution and one adapter.

    Args:
        base_layer: The convolution.
        adapter_name: PEFT's name of the adapter.
        config: Options of LoRA.
        variant: How weight and adapter are combined.
        r: Rank of the adapter.
        lora_alpha: Scaling times rank.
    """

    parameter_name = "weight"
    transposed = False
    # For models that multiply with it by themselves, as Mamba's do when they decode.
    weight = SparseLinear.weight

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        variant: type[SparseLinear],
        r: int,
        lora_alpha: float,
    ) -> None:
        nn.Module.__init__(self)
        lora.LoraLayer.__init__(self, base_layer)
        self.variant = variant
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)
        self.take_own_zeros()

    def __getattr__(self, name: str) -> Any:
        """An attribute of its own, or else of the convolution: models that pad by themselves read its stride."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def pruned_matrices(self) -> Iterator[Tensor]:
        """See `SubstitutingLayer.pruned_matrices`."""
        yield gather_whole(self.base_weight.detach()).flatten(1)

    def stored(self, matrices: Sequence[Tensor]) -> Tensor:
        """See `SubstitutingLayer.stored`."""
        (matrix,) = matrices
        return matrix

    def factors_of_part(self) -> tuple[Tensor, Tensor]:
        """See `SparseLayer.factors_of_part`."""
        left, right = self.factors()
        rows, *others = (slice(*bounds) for bounds in shard_bounds(self.base_weight))
        columns = (slice(None), *others)
        return left[rows], right.view(-1, *self.base_weight.shape[1:])[columns].flatten(1)

    def weight_with_adapter(self) -> Tensor:
        """See `SparseLayer.weight_with_adapter`; in the weight's memory format, by which kernels are chosen."""
        weight, combined = self.base_weight, super().weight_with_adapter()
        return combined if combined.stride() == weight.stride() else torch.empty_like(weight).copy_(combined)


def put_on_convolution(
    model: nn.Module, path: str, config: LoraConfig, variant: type[SparseLinear], rank: int, alpha: float
) -> None:
    """Put an adapter on the convolution at a path.

    A matrix of few rows or columns, as of depthwise convolutions, has no more rank than these: where more is asked
    for, it gets as much as there is, with the same scaling.
    """
    layer = model.get_submodule(path)
    weight = own_weight(layer)
    assert weight is not None
    full = min(len(weight), weight[0].numel())
    if rank > full:
        share = full / rank
        rank, alpha = full, alpha * (math.sqrt(share) if config.use_rslora else share)
    model.set_submodule(path, SparseConvolution(layer, "default", config, variant, rank, alpha))


def check_convolution(name: str, layer: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse a convolution that cannot be adapted.

    Raises:
        ValueError: see `check_substitution` and `checked_weight`; or it computes with other numbers than zeros where
            its weight has zeros.
    """
    check_substitution(name, options)
    checked_weight(name, layer)
    if not keeps_zeros(layer):
        raise ValueError(
            f"the forward of {name!r} ({type(layer).__name__}) makes other numbers of its weight's zeros (weight "
            "standardization?), so that none would be pruned in what it computes: leave it out (exclude_modules)"
        )
