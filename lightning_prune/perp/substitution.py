"""Adapt a layer that runs as it is, whatever it computes, with the combined weight in the place of its own.

While it runs it finds the combined weight where its parameter was, so nothing of it is written anew here, and a hook of
somebody else sees what it always sees. The combined weight is made once a forward pass, and held until its backward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune.perp.layers import SparseLayer, SparseLinear
from lightning_prune.sharding import local, take_shard


class SubstitutingLayer(SparseLayer):
    """A frozen pruned parameter of a layer, and an adapter whose matrices are those of linear layers of its shape."""

    _made_with: LoraConfig

    def pruned_matrices(self) -> Iterator[Tensor]:
        """The frozen weight as matrices ``[O, I]``, each of which gets an A and a B."""
        raise NotImplementedError

    def stored(self, matrices: Sequence[Tensor]) -> Tensor:
        """One parameter of the A of each matrix, or of the B."""
        raise NotImplementedError

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Build the matrices, each as the variant builds those of a linear layer.

        Raises:
            ValueError: the variant refuses; see `SparseLinear.update_layer`.
        """
        self._made_with = config
        last, *stored = self._made(adapter_name, r, lora_alpha)
        for name in ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias"):
            getattr(self, name)[adapter_name] = getattr(last, name)[adapter_name]
        for holders, matrices in zip((self.lora_A, self.lora_B), stored, strict=True):
            holders[adapter_name] = holder = nn.Module()
            # As PEFT has it for adapters of layers: at least float32, whatever the weight is.
            wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
            holder.register_parameter(self.parameter_name, nn.Parameter(wide))
        self.set_adapter(self.active_adapters)

    @torch.no_grad()
    def _made(self, adapter_name: str, r: int, lora_alpha: float) -> tuple[SparseLinear, Tensor, Tensor]:
        """Take each matrix for a linear layer, one after the other, and put a new adapter on it.

        Returns:
            The last such layer, and what is stored of the A of all, and of the B.
        """
        first: list[Tensor] = []
        second: list[Tensor] = []
        for matrix in self.pruned_matrices():
            layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(matrix, requires_grad=False)
            adapted = self.variant(layer, adapter_name, config=self._made_with, r=r, lora_alpha=lora_alpha)
            for stack, made in zip((first, second), adapted.matrices(), strict=True):
                stack.append(made.detach())
        return adapted, self.stored(first), self.stored(second)

    @torch.no_grad()
    def begin_anew(self, init_lora_weights: bool | str) -> None:
        """See `SparseLayer.begin_anew`."""
        (name,) = self.lora_A
        self._made_with = copy.copy(self._made_with)
        self._made_with.init_lora_weights = init_lora_weights  # type: ignore[assignment]
        _, *stored = self._made(name, self.r[name], self.lora_alpha[name])
        for matrix, new in zip(self.matrices(), stored, strict=True):
            local(matrix).copy_(take_shard(matrix, new))

    # What a model calls its layer with differs between families.
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer with the combined weight in the parameter's place."""
        self.check_gathered()
        if self.runs_alone(kwargs):
            return self.base_layer(*args, **kwargs)
        name, within = self.parameter_name, self.base_layer
        while isinstance(within, SubstitutingLayer):
            name, within = f"base_layer.{name}", within.base_layer
        return functional_call(self.base_layer, {name: self.weight_with_adapter()}, args, kwargs)


def check_substitution(name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that an adapter of a weight which is substituted has not.

    Raises:
        ValueError: `options` have dropout, which drops inputs of layers; `name` is in the message.
    """
    if options.get("lora_dropout"):
        raise ValueError(
            f"lora_dropout={options['lora_dropout']!r} must be 0 for {name!r}: it would drop inputs of the adapter "
            "alone, but experts and convolutions compute with one weight; use weight decay, or leave them out "
            f"(exclude_modules=[{name.rpartition('.')[2]!r}])"
        )
