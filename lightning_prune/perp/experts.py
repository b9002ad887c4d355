"""Adapt the experts of a layer that are one pruned parameter: a pair of thin matrices for each expert's slice.

As PEFT's own wrapper of a parameter it stands around the module that holds it; of two parameters one wrapper stands
around the other. While the experts run they find the combined weight in the parameter's place, so every
``experts_implementation`` of transformers computes with it.

Letters: E experts, I inputs, O outputs of an expert's matrix, r rank, P and Q as in `effective`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from lightning_prune.naming import own_parameters
from lightning_prune.perp.layers import SparseLinear, check_base_weight
from lightning_prune.perp.substitution import SubstitutingLayer, check_substitution
from lightning_prune.pruning.experts import expert_parameters
from lightning_prune.sharding import gather_whole


class SparseExperts(SubstitutingLayer, lora.ParamWrapper):
    """A frozen pruned parameter ``[E, P, Q]`` of a layer's experts, and an adapter of each expert.

    Gradients of A ``[E, r, I]`` and B ``[E, O, r]`` are made of that of the combined weight, which is there for one
    parameter at a time. An expert that no token chose has gradients of zero.

    Args:
        base_layer: The experts, or another such wrapper around them.
        adapter_name: PEFT's name of the adapter.
        parameter_name: What the experts call the parameter.
        config: Options of LoRA.
        variant: How weight and adapter are combined.
        r: Rank of each expert's adapter.
        lora_alpha: Scaling times rank.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        variant: type[SparseLinear],
        r: int,
        lora_alpha: int,
    ) -> None:
        self.variant = variant
        super().__init__(base_layer, adapter_name, parameter_name, config=config, r=r, lora_alpha=lora_alpha)
        self.take_own_zeros()

    def own_name(self, path: str) -> str:
        """See `SparseLayer.own_name`."""
        return f"{path}.{self.parameter_name}" if path else self.parameter_name

    def weight_name(self, name: str) -> str:
        """See `SparseLayer.weight_name`."""
        return name

    def path(self, name: str) -> str:
        """See `SparseLayer.path`."""
        return name.rpartition(".")[0]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """See `SubstitutingLayer.update_layer`."""
        self.transposed = expert_parameters(self.get_base_layer())[self.parameter_name]
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def pruned_matrices(self) -> Iterator[Tensor]:
        """See `SubstitutingLayer.pruned_matrices`; one for each expert."""
        for weight in gather_whole(self.base_weight.detach()):
            yield weight.mT if self.transposed else weight

    def stored(self, matrices: Sequence[Tensor]) -> Tensor:
        """See `SubstitutingLayer.stored`."""
        return torch.stack(list(matrices))


def put_on_experts(
    model: nn.Module, path: str, parameter: str, config: LoraConfig, variant: type[SparseLinear], rank: int, alpha: int
) -> None:
    """Put an adapter on a parameter of the experts at a path."""
    layer = SparseExperts(model.get_submodule(path), "default", parameter, config, variant, rank, alpha)
    model.set_submodule(path, layer)


def place_of(model: nn.Module, name: str) -> tuple[str, str]:
    """The path of the layer that an adapter of a plain model goes around, and what the layer calls its weight."""
    path, _, parameter = name.rpartition(".")
    return (path, parameter) if parameter in expert_parameters(model.get_submodule(path)) else (name, "weight")


def weight_name(model: nn.Module, name: str) -> str:
    """The name of the weight that an adapter of a plain model goes with."""
    path, parameter = place_of(model, name)
    return f"{path}.{parameter}" if path else parameter


def check_experts(name: str, experts: nn.Module, parameter_name: str, options: Mapping[str, Any]) -> None:
    """Refuse a parameter of experts that cannot be adapted; `name` is the parameter's.

    Raises:
        ValueError: see `check_substitution` and `check_base_weight`.
    """
    check_substitution(name, options)
    check_base_weight(name, experts, own_parameters(experts)[parameter_name])
