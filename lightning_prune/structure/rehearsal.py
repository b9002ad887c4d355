"""Know what an optimizer will keep before it has made a step: a copy of it steps small stand-ins of its parameters."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_prune.pruning.holding import with_inner

# Some optimizers factor or quantize states of matrices alone that are larger than 128 or 4096.
_LARGEST_SIDE = 256


@dataclass(frozen=True)
class Rehearsal:
    """What stands where after a first step.

    Attributes:
        optimizers: The copy, and copies of those that it holds.
        parameters: By name, what stands for each parameter in them; one for all of a shape in a group.
        hidden: Optimizers that were stepped too, and that no attribute of the others holds.
    """

    optimizers: list[Optimizer]
    parameters: dict[str, nn.Parameter]
    hidden: list[Optimizer]


def rehearse(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> Rehearsal | None:
    """Have a copy of an optimizer make its first step; nothing of the optimizer or its parameters changes.

    Args:
        optimizer: Before its first step.
        parameters: Of the model, by name.

    Returns:
        What is there then; None where it cannot be known: the optimizer has states already, or cannot be copied, or
        its copy cannot step what stands for its parameters.
    """
    members = list(with_inner([optimizer]))
    if any(member.state for member in members):
        return None
    gradients = [(p, p.grad) for member in members for group in member.param_groups for p in group["params"]]
    devices = {p.device for p, _ in gradients if p.device.type == "cuda"}
    try:
        for p, _ in gradients:
            p.grad = None  # an optimizer that no attribute holds is no copy, and would step
        with torch.random.fork_rng(devices):
            return _stepped(members, parameters)
    except Exception:  # whatever somebody's optimizer does without its model: its own first step will show
        return None
    finally:
        for p, gradient in gradients:
            p.grad = gradient


def _stepped(members: list[Optimizer], parameters: Mapping[str, nn.Parameter]) -> Rehearsal:
    stand_ins = _stand_ins(members)
    memo: dict[int, Any] = dict(stand_ins)  # by the identity of what is copied, as deepcopy has it
    copies: list[Any] = [object.__new__(type(member)) for member in members]
    memo |= {id(member): own for member, own in zip(members, copies, strict=True)}
    for member, own in zip(members, copies, strict=True):
        # Schedulers put a step of their own on the optimizer, which is bound to it, and so are hooks.
        left = {name: v for name, v in vars(member).items() if name != "step" and not name.endswith("hooks")}
        Optimizer.__setstate__(own, copy.deepcopy(left | {"state": defaultdict(dict)}, memo))
        for group in own.param_groups:
            group["params"] = list({id(p): p for p in group["params"]}.values())

    def closure() -> Tensor:
        for p in stand_ins.values():
            p.grad = torch.linspace(-1, 1, p.numel(), device=p.device).view(p.shape).to(p.dtype)
        return torch.ones((), device=next(iter(stand_ins.values())).device)

    closure()
    stepped: list[Optimizer] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: stepped.append(optimizer))
    try:
        copies[0].step(closure)
    finally:
        handle.remove()
    hidden = [o for o in stepped if not any(o is known for known in copies)]
    return Rehearsal(copies, {n: stand_ins[id(p)] for n, p in parameters.items() if id(p) in stand_ins}, hidden)


def _stand_ins(members: list[Optimizer]) -> dict[int, nn.Parameter]:
    """Small parameters by the identity of those that they stand for, of the same dimensions."""
    made: dict[Any, nn.Parameter] = {}
    found: dict[int, nn.Parameter] = {}
    for position, group in enumerate(group for member in members for group in member.param_groups):
        for p in group["params"]:
            shape = tuple(min(size, _LARGEST_SIDE) for size in p.shape)
            key = (position, shape, p.dtype, p.device)
            if id(p) not in found:
                values = torch.linspace(-1, 1, torch.Size(shape).numel(), device=p.device).view(shape).to(p.dtype)
                found[id(p)] = made.setdefault(key, nn.Parameter(values))
    return found
