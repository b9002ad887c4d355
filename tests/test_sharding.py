"""What FSDP2 needs to be told, in a world of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lightning_prune.sharding import reshard, settle


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(mesh: DeviceMesh, root: bool) -> nn.Module:
    """Two blocks and a head, gradients reduced in float32; the head is the root's own, if there is a sharded root."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)), nn.Linear(4, 2))
    for part in (*model[:2], model if root else model[2]):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


@pytest.mark.parametrize("root", [True, False])
def test_a_first_pass_with_frozen_weights_does_not_change_how_gradients_are_reduced(
    root: bool, mesh: DeviceMesh
) -> None:
    model = sharded(mesh, root)
    before = {name: value.full_tensor() for name, value in model.state_dict().items()}
    names = [set(vars(module)) for module in model.modules()]
    settle(model)
    settle(model)  # it may come before every calibration
    assert [set(vars(module)) for module in model.modules()] == names
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), before[name])
        assert parameter.requires_grad

    data = torch.randn(3, 4)
    model.requires_grad_(False)
    with torch.no_grad():
        model(data)
    reshard(model)
    model.requires_grad_(True)
    for _ in range(2):
        model(data).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("root", [True, False])
def test_forward_methods_of_shards_get_arguments(root: bool, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator FSDP2 moves the arguments of the outermost forward pass, and needs one to move."""
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    original, passes = FSDPState._root_pre_forward, []

    def moving(self: FSDPState, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        passes.append((args or (kwargs,))[0])
        assert args or kwargs
        return original(self, module, args, kwargs)

    monkeypatch.setattr(FSDPState, "_root_pre_forward", moving)
    settle(sharded(mesh, root))
    assert passes
