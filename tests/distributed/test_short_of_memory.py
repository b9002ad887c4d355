"""Where memory runs out on one rank, all ranks run smaller batches, or all end with an error that names it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from launching import launch_calls
from tiny import make_llama, make_tokens
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_prune import Ranks, prune
from lightning_prune.errors import CalibrationError
from lightning_prune.pruning.running import causal_lm_losses
from lightning_prune.ranks import ShortOfMemoryError

pytestmark = pytest.mark.distributed

DOWN, HEAD, EMBEDDING = "model.layers.0.mlp.down_proj", "lm_head", "model.embed_tokens"


def losses(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return causal_lm_losses(model(**batch).logits, batch["input_ids"])


SHARDED: tuple[tuple[str, dict[str, Any]], ...] = (
    (DOWN, {"score": "wanda"}),
    (HEAD, {"score": "sparsegpt"}),
    (EMBEDDING, {"score": "gblm"}),
    (DOWN, {"score": "kfac"}),
    (HEAD, {"score": "kfac", "loss_fn": losses}),
    (EMBEDDING, {"score": "wanda", "sequential": True}),
    (DOWN, {"score": "wanda", "sequential": True, "update": "exact"}),
)
WHOLE = (SHARDED[0], SHARDED[3], SHARDED[6])


def make() -> nn.Module:
    return make_llama(hidden_size=24, intermediate_size=36).double()


def shard(model: nn.Module) -> nn.Module:
    for module in (*model.model.layers, model):
        fully_shard(module)
    return model


def run_out(layer: nn.Module, samples: int) -> list[int]:
    """Memory runs out where a layer is given more than so many samples; returns how many it is given."""
    tried: list[int] = []

    def before(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        tried.append(len(args[0]))
        if len(args[0]) > samples:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layer.register_forward_pre_hook(before)
    return tried


def meet_others(address: str, seconds: float) -> int:
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(seconds=seconds))
    return rank


def check(address: str) -> None:
    rank = meet_others(address, 60)
    ids = make_tokens(12, 7)
    mine = [{"input_ids": part} for part in ids.split([1, 3, 2, 6])[2 * rank : 2 * rank + 2]]
    for lockstep, cases in ((False, WHOLE), (True, SHARDED)):
        for layer, settings in cases:
            one, model = make(), shard(make()) if lockstep else make()
            expected = prune(one, [{"input_ids": ids}], num_samples=12, progress=False, **settings)
            tried = run_out(model.get_submodule(layer), 2 if rank else 12)
            with pytest.warns(UserWarning, match="memory was short") if rank else pytest.warns():
                found = prune(model, mine, num_samples=12, progress=False, ranks=Ranks(lockstep=lockstep), **settings)
            assert (max(tried) > 2) or not rank
            for name, mask in expected.items():
                assert torch.equal(whole(found[name]), mask), (name, settings)
                torch.testing.assert_close(whole(model.get_parameter(name).detach()), one.get_parameter(name))
    with pytest.raises(CalibrationError, match="no loss"):  # which smaller batches would not mend
        Ranks().agree(ShortOfMemoryError("CUDA out of memory.") if rank else CalibrationError("no loss"))
    dist.destroy_process_group()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def test_all_ranks_run_smaller_batches(tmp_path: Path) -> None:
    done = launch_calls(2, check, [(f"file://{tmp_path}/meeting",)])
    assert done.returncode == 0, done.stderr[-3000:]


def twice(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return losses(model, batch) + losses(model, batch)


def fail(address: str, way: str) -> None:
    """Memory runs out on rank 1 in a pass that others cannot leave."""
    rank = meet_others(address, 20)
    model, mine = make(), [{"input_ids": make_tokens(4, 7)}]
    settings: dict[str, Any] = {"score": "kfac", "loss_fn": losses if way == "backward" else twice}
    if way != "tensor parallel":
        shard(model)
    else:
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
        plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        for block in model.model.layers:
            parallelize_module(block.mlp, mesh["tensor"], plan)
        settings = {"score": "wanda", "ranks": Ranks(mesh["data"].get_group(), lockstep=True)}

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if rank and way == "backward":
        model.get_submodule(DOWN).register_forward_hook(lambda _, __, output: output.register_hook(refuse) and None)
    elif rank:
        run_out(model.get_submodule(DOWN), 2)
    prune(model, mine, num_samples=4, progress=False, **settings)


@pytest.mark.parametrize("way", ["backward", "a loss that runs the model twice", "tensor parallel"])
def test_all_ranks_end_where_others_are_in_the_middle_of_a_pass(way: str, tmp_path: Path) -> None:
    done = launch_calls(2, fail, [(f"file://{tmp_path}/meeting", way)], timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") >= 2
    assert "CUDA out of memory. (on rank 1, while pruning" in done.stderr
