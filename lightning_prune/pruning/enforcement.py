"""Hold pruned weights at zero through training: weights, gradients and optimizer states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from lightning_prune.pruning.clearing import clear_all, held
from lightning_prune.pruning.masks import PackedMasks
from lightning_prune.pruning.statistics import values_of
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
        self._masked: dict[int, tuple[Any, ...]] = {}  # what gradients were when they were masked last, by parameter

    def __getstate__(self) -> dict[str, Any]:
        """What copies keep: nothing that goes by the identity of a tensor."""
        return {"weights": self._weights, "held": {n: self._held[id(p)] for n, p in self._weights.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._weights, self._masked = state["weights"], {}
        self._held = {id(p): state["held"][n] for n, p in self._weights.items()}

    def masks(self) -> PackedMasks:
        """The bool masks by name, laid out over ranks as the parameters are."""
        return PackedMasks((name, as_shard_of(p, self._held[id(p)].bool())) for name, p in self._weights.items())

    def rename(self, rename: Callable[[str], str]) -> None:
        """Call the parameters by other names."""
        self._weights = {rename(name): weight for name, weight in self._weights.items()}

    def fits(self, parameter: Tensor) -> bool:
        """Whether a masked parameter is where and of the shape it was when it got its mask."""
        own, mask = local(parameter.detach()), self._held[id(parameter)]
        return own.device == mask.device and own.shape == mask.shape

    def follows(self, name: str, parameter: Tensor | None) -> bool:
        """Whether a parameter is the one that is masked under a name, where and of the shape it was then."""
        return parameter is not None and parameter is self._weights[name] and self.fits(parameter)

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
        parameters = self._weights.values() if parameters is None else parameters
        clear_all((self._held[id(p)], local(p.detach())) for p in parameters)

    @torch.no_grad()
    def mask_gradients(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Zero the gradients of pruned weights, where there are any that have changed since the last time."""
        parameters = self._weights.values() if parameters is None else parameters
        changed = [p for p in parameters if p.grad is not None and not self._is_masked(p)]
        clear_all((self._held[id(p)], local(cast(Tensor, p.grad))) for p in changed)
        for parameter in changed:
            gradient = cast(Tensor, parameter.grad)
            self._masked[id(parameter)] = (TensorWeakRef(gradient), _state(gradient))

    def _is_masked(self, parameter: nn.Parameter) -> bool:
        """Whether a gradient is the one that was masked last, and unchanged; unless changed through ``.data``."""
        gradient, (known, state) = parameter.grad, self._masked.get(id(parameter), (None, None))
        return known is not None and gradient is not None and known() is gradient and state == _state(gradient)

    @torch.no_grad()
    def mask_states(self, optimizer: Optimizer) -> None:
        """Zero momentum, variance and any other state of a weight's shape where the weight is pruned."""
        clear_all(
            (self._held[id(parameter)], local(state))
            for parameter in self.parameters_of(optimizer)
            for state in optimizer.state.get(parameter, {}).values()
            if isinstance(state, Tensor) and state.shape == parameter.shape
            if state.is_floating_point() or state.is_complex()
        )

    @torch.no_grad()
    def resurrected(self) -> dict[str, int]:
        """How many pruned weights of each parameter (its part here) are not zero now; empty if masks hold."""
        pruned = ((p, ~self._held[id(p)].bool()) for p in self._weights.values())
        found = [mask.logical_and_(local(p.detach())).count_nonzero() for p, mask in pruned]
        return {name: int(count) for name, count in zip(self._weights, values_of(found), strict=True) if count}


def _state(tensor: Tensor) -> tuple[int, int, int]:
    """What changes when a tensor is written to, or given other memory."""
    own = local(tensor)  # of a shard: what is written through the whole is counted there alone
    return tensor._version, own._version, own.data_ptr()
