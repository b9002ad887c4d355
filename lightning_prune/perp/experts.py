"""Adapt the experts of a layer that are one pruned parameter: a pair of thin matrices for each expert's slice.

As PEFT's own wrapper of a parameter it stands around the module that holds it; of two parameters one wrapper stands
around the other. While the experts run they find the combined weight in the parameter's place, so every
``experts_implementation`` of transformers computes with it, and a hook of somebody else sees what it always sees.

Letters: E experts, I inputs, O outputs of an expert's matrix, r rank, P and Q as in `effective`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune.naming import clean_name, is_compiled_alone, own_parameters
from lightning_prune.perp.layers import SparseLayer, SparseLinear, check_base_weight
from lightning_prune.pruning.experts import expert_parameters
from lightning_prune.sharding import gather_whole, local, take_shard


class SparseExperts(SparseLayer, lora.ParamWrapper):
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

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Build the matrices of all experts, each as the variant builds those of a linear layer.

        Raises:
            ValueError: the variant refuses; see `SparseLinear.update_layer`.
        """
        self.transposed = expert_parameters(self.get_base_layer())[self.parameter_name]
        self._made_with = config
        layers = list(self._as_layers(adapter_name, r, lora_alpha))
        for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias"):
            getattr(self, name)[adapter_name] = getattr(layers[0], name)[adapter_name]
        for holders, matrices in zip((self.lora_A, self.lora_B), _stacked(layers), strict=True):
            holders[adapter_name] = holder = nn.Module()
            # As PEFT has it for adapters of layers: at least float32, whatever the weight is.
            wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            holder.register_parameter(self.parameter_name, nn.Parameter(wide))
        self.set_adapter(self.active_adapters)

    def _as_layers(self, adapter_name: str, r: int, lora_alpha: int) -> Iterator[SparseLinear]:
        """Each expert's slice as a linear layer with a new adapter, in order."""
        for weight in gather_whole(self.base_weight.detach()):
            matrix = weight.mT if self.transposed else weight
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=False)
            yield self.variant(layer, adapter_name, config=self._made_with, r=r, lora_alpha=lora_alpha)

    @torch.no_grad()
    def begin_anew(self, init_lora_weights: bool | str) -> None:
        """See `SparseLayer.begin_anew`."""
        (name,) = self.lora_A
        self._made_with = copy.copy(self._made_with)
        self._made_with.init_lora_weights = init_lora_weights  # type: ignore[assignment]
        layers = list(self._as_layers(name, self.r[name], self.lora_alpha[name]))
        for matrix, new in zip(self.matrices(), _stacked(layers), strict=True):
            local(matrix).copy_(take_shard(matrix, new))

    # What a block calls its experts with differs between families.
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts with the combined weight in the parameter's place."""
        self.check_gathered()
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names (several adapters in one batch) is not supported beside a pruned weight")
        kwargs.pop("alora_offsets", None)
        if self.is_off:
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        name, within = self.parameter_name, self.base_layer
        while isinstance(within, SparseExperts):
            name, within = f"base_layer.{name}", within.base_layer
        return functional_call(self.base_layer, {name: self.weight_with_adapter()}, args, kwargs)


def _stacked(layers: Sequence[SparseLinear]) -> tuple[Tensor, Tensor]:
    """A ``[E, r, I]`` and B ``[E, O, r]`` of experts from those of each."""
    first, second = zip(*(layer.matrices() for layer in layers), strict=True)
    return torch.stack(first).detach(), torch.stack(second).detach()


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
        ValueError: see `check_base_weight`; the experts are compiled by themselves; or `options` have dropout, which
            drops inputs of layers.
    """
    if is_compiled_alone(name.rpartition(".")[0]):
        raise ValueError(
            f"the experts of {clean_name(name)!r} were given to torch.compile by themselves, and would go on without "
            "an adapter: add adapters first, and compile the blocks or the model"
        )
    if options.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout={options['lora_dropout']!r} must be 0 for {name!r}: it would drop inputs of the adapter "
            "alone, but experts compute with one weight; use weight decay, or leave experts out "
            "(exclude_modules=['experts'])"
        )
    check_base_weight(name, experts, own_parameters(experts)[parameter_name])
