"""Hold pruned weights at zero through training: weights, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.pruning.clearing import held
from lightning_prune.sharding import as_shard_of, local


class Enforcer:
    """The masks of a model's parameters, ready to be applied every step.

    Args:
        weights: Parameters by name.
        masks: Bool masks by name, True = kept, of the parameters' shapes.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)
        self._held = {id(p): held(local(masks[name]), local(p).device) for name, p in weights.items()}

    def masks(self) -> dict[str, Tensor]:
        """The bool masks by name, laid out over ranks as the parameters are."""
        return {name: as_shard_of(p, self._held[id(p)].bool()) for name, p in self._weights.items()}

    def rename(self, rename: Callable[[str], str]) -> None:
        """Call the parameters by other names."""
        self._weights = {rename(name): weight for name, weight in self._weights.items()}

    def follows(self, name: str, parameter: Tensor | None) -> bool:
        """Whether a parameter is the one that is masked under a name, where and of the shape it was then."""
        if parameter is None or parameter is not self._weights[name]:
            return False
        own, mask = local(parameter.detach()), self._held[id(parameter)]
        return own.device == mask.device and own.shape == mask.shape

    @property
    def weights(self) -> Mapping[str, nn.Parameter]:
        """The masked parameters by name."""
        return self._weights

    def parameters_of(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """The masked parameters that an optimizer steps."""
        return [p for group in optimizer.param_groups for p in group["params"] if id(p) in self._held]

    @torch.no_grad()
    def mask_weights(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Zero the pruned weights (of all parameters by default)."""
        for parameter in self._weights.values() if parameters is None else parameters:
            self._held[id(parameter)].clear(local(parameter.detach()))

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Zero the gradients of pruned weights, where there are any."""
        for parameter in self._weights.values() if parameters is None else parameters:
            if parameter.grad is not None:
                self._held[id(parameter)].clear(local(parameter.grad))

    @torch.no_grad()
    def mask_states(self, optimizer: Optimizer) -> None:
        """Zero momentum, variance and any other state of a weight's shape where the weight is pruned."""
        for parameter in self.parameters_of(optimizer):
            for state in optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape and state.is_floating_point():
                    self._held[id(parameter)].clear(local(state))

    @torch.no_grad()
    def resurrected(self) -> dict[str, int]:
        """How many pruned weights of each parameter (its part here) are not zero now; empty if masks hold."""
        counts = {}
        for name, parameter in self._weights.items():
            alive = int((local(parameter.detach()) != 0).logical_and_(~self._held[id(parameter)].bool()).sum())
            if alive:
                counts[name] = alive
        return counts
