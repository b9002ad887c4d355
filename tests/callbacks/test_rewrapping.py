"""What holds on to parameters goes on with those that take their place."""

from __future__ import annotations

import pytest
import torch
from slow_copies import Slow
from torch import nn

from lightning_prune.callbacks.rewrapping import put_in_place
from lightning_prune.pruning.holding import with_inner


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_take_the_place_of_others_in_an_optimizer_and_the_one_it_steps(shared: bool) -> None:
    first, second = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))
    inner = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": [second]}])
    outer = Slow(inner, shared)
    (first.sum() + second.sum()).backward()
    outer.step()
    first.requires_grad_(False)
    joining = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))]
    put_in_place(list(with_inner([outer])), {first: joining})
    for optimizer in (outer, inner):
        assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
            [id(p) for p in joining],
            [id(second)],
        ]
        assert list(optimizer.state) == [second]
        optimizer.load_state_dict(optimizer.state_dict())
    assert inner.param_groups[0]["lr"] == 0.5
    assert first.grad is None
    sum(p.sum() for p in (*joining, second)).backward()
    outer.step()
    assert all(bool((p < 1).all()) for p in joining)
