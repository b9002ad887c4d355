"""Layers of shards that never run, or whose forward is their own: masks are those of one process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from launching import launch_calls
from per_sample_losses import data, squares
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lightning_prune import Ranks, prune
from lightning_prune.pruning.targets import find_targets
from lightning_prune.pruning.zeros import keeps_zeros, pads_by_itself

pytestmark = pytest.mark.distributed

SETTINGS: tuple[dict[str, Any], ...] = (
    {"score": "wanda"},
    {"score": "gblm"},
    {"score": "kfac"},
    {"score": "wanda", "update": "exact"},
)


class Same1d(nn.Conv1d):
    """Pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, (2, 0)), self.weight, self.bias)


class Standardized(nn.Linear):
    """Zeros of its weight are none in what it multiplies with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class GraphLinear(nn.Module):
    """As torch_geometric's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Block(nn.Module):
    """Multiplies with the weights of two layers by itself, with one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.qk, self.out, self.fc = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6)
        self.same, self.graph = Same1d(6, 6, 3), GraphLinear()

    def forward(self, x: Tensor) -> Tensor:
        q = F.linear(x, self.qk.weight)
        k = F.linear(x.tanh(), self.qk.weight, self.qk.bias)
        y = F.linear(F.scaled_dot_product_attention(q, k, x), self.out.weight)
        return x + self.graph(self.fc(y).tanh()) + self.same(y.mT).mT


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()).double()


def all_as_one(model: nn.Module) -> nn.Module:
    return fully_shard(model)


def by_block(model: nn.Sequential) -> nn.Module:
    for block in model:
        fully_shard(block)
    return fully_shard(model)


def check(address: str) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    batches = [batch.double() for batch in data(2, 4, 6, count=6)]
    for settings in SETTINGS:
        how = {"loss_fn": squares, "progress": False, **settings}
        expected = prune(make(), batches, num_samples=12, **how)
        assert len(expected) == 10
        for wrap in (all_as_one, by_block, DistributedDataParallel):
            ranks = Ranks(lockstep=wrap is not DistributedDataParallel)
            found = prune(wrap(make()), batches[rank::2], num_samples=6, ranks=ranks, **how)
            for name, mask in found.items():
                whole = mask.full_tensor() if isinstance(mask, DTensor) else mask
                assert torch.equal(whole, expected[name.removeprefix("module.")]), (name, wrap, settings)
            assert len(found) == len(expected)
    model = nn.Sequential(Standardized(6, 8), nn.Linear(8, 6), Same1d(6, 4, 3))
    fully_shard(model)
    assert [keeps_zeros(layer) for layer in model] == [False, True, True]
    assert pads_by_itself(model[2])
    assert [target.name for target in find_targets(model)] == ["1.weight", "2.weight"]
    dist.destroy_process_group()


def test_masks_are_those_of_one_process(tmp_path: Path) -> None:
    done = launch_calls(2, check, [(f"file://{tmp_path}/meeting",)])
    assert done.returncode == 0, done.stderr[-3000:]
