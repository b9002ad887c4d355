"""Each rank of a sharded model keeps some rows of every Hessian; masks and weights are those of one process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from experts_models import make_moe
from launching import launch_calls
from tiny import make_llama, make_tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_prune import ALPS, Ranks, prune
from lightning_prune.pruning import pipeline
from lightning_prune.pruning.calibration import collect
from lightning_prune.pruning.statistics import HESSIAN, INPUT_NORM
from lightning_prune.pruning.targets import find_targets

pytestmark = pytest.mark.distributed

SETTINGS: tuple[dict[str, Any], ...] = (
    {"score": "sparsegpt"},
    {"score": "sparsegpt", "pattern": "2:4", "sequential": True},
    {"score": "wanda", "update": "exact", "sequential": True},
    {"score": "kfac", "update": ALPS(iterations=9)},  # no step of it knows how many there will be
    {"score": "kfac", "update": "obs"},
)


def make() -> nn.Module:
    return make_llama(hidden_size=24, intermediate_size=36).double()


def make_experts(unused: bool) -> nn.Module:
    """A Mixtral; with `unused`, two experts of four receive no token."""
    model = make_moe("mixtral")
    if unused:
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 0] = 8.0
            for layer in model.model.layers:
                layer.mlp.gate.weight[:, 0] = torch.tensor([4.0, 4.0, -4.0, -4.0])
    return model


def shard(model: nn.Module, replicas: int) -> nn.Module:
    sizes = (replicas, dist.get_world_size() // replicas)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("copies", "parts")) if replicas > 1 else None
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batches(rank: int, world: int) -> list[torch.Tensor]:
    """Of 6 samples, those of a rank; others have more."""
    return list(make_tokens(6, 7, vocab=32)[rank::world].split(1))


def check(address: str, world: int, replicas: int) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    ranks, mine = Ranks(lockstep=True), batches(rank, world)
    held: list[tuple[int, int]] = []

    def counted(function: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            found = function(*args, **named)
            held.extend(s.hessian.shape for s in found.values() if s.hessian is not None)
            return found

        return run

    pipeline.collect, pipeline.collect_forward = counted(collect), counted(pipeline.collect_forward)
    for settings in SETTINGS if replicas == 1 else SETTINGS[1::2]:
        held.clear()
        one = make()
        expected = prune(one, batches(0, 1), num_samples=6, progress=False, **settings)
        alone = [rows * columns for rows, columns in held]
        assert all(rows == columns for rows, columns in held)
        held.clear()
        model = shard(make(), replicas)
        found = prune(model, mine, num_samples=len(mine), progress=False, ranks=ranks, **settings)
        assert len(held) == len(alone) == 14
        assert [rows for rows, _ in held] == [columns // world for _, columns in held]
        assert sum(rows * columns for rows, columns in held) * world == sum(alone)
        assert all(torch.equal(whole(found[name]), mask) for name, mask in expected.items())
        for name, parameter in model.named_parameters():
            # A Llama's norms are computed in float32, and what is rounded there is magnified by the next solver.
            torch.testing.assert_close(whole(parameter.detach()), one.get_parameter(name), rtol=1e-3, atol=1e-4)
    for unused in (False, True):
        one, model = make_experts(unused), shard(make_experts(unused), replicas)
        how = {"statistics": {INPUT_NORM, HESSIAN}, "progress": False}
        wanted = collect(one, batches(0, 1), find_targets(one), num_samples=6, **how)
        sums = collect(model, mine, find_targets(model), num_samples=len(mine), ranks=ranks, **how)
        for name, expected in wanted.items():
            hessian = ranks.whole_of_rows(sums[name].hessian)
            torch.testing.assert_close(hessian, expected.hessian, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(sums[name].input_norm, expected.input_norm, rtol=1e-9, atol=1e-12)
    dist.destroy_process_group()


@pytest.mark.parametrize(("world", "replicas"), [(2, 1), (4, 2)])
def test_hessians_are_spread_over_ranks(world: int, replicas: int, tmp_path: Path) -> None:
    done = launch_calls(world, check, [(f"file://{tmp_path}/meeting", world, replicas)])
    assert done.returncode == 0, done.stderr[-3000:]
