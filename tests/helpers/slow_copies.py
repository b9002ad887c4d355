"""An optimizer that steps another one."""

from __future__ import annotations

from typing import Any

import torch


class Slow(torch.optim.Optimizer):
    """Pulls weights towards slow copies, which are states of its own; in groups of the other one, or of its own."""

    def __init__(self, optimizer: torch.optim.Optimizer, shared: bool = True) -> None:
        groups = optimizer.param_groups
        super().__init__(groups if shared else [{"params": list(group["params"])} for group in groups], {})
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Step the other, and go halfway back."""
        loss = self.optimizer.step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                p.copy_(slow.lerp_(p, 0.5))
        return loss
