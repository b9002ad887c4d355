"""What FSDP2 needs to be told, in a world of one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from tiny import make_llama, make_tokens
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_prune import prune
from lightning_prune.callbacks.traces import unchanged
from lightning_prune.sharding import gathered_dtypes, reshard, settle, shard_dim, type_name
from lightning_prune.structure.classes import is_own_class


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


def test_a_first_pass_that_leaves_no_trace_leaves_state_dicts_sharded(mesh: DeviceMesh) -> None:
    """FSDP2's first pass has state dicts shard what is gathered, and notes that it has."""
    model = sharded(mesh, root=True)
    with unchanged({"model": model}):
        model(torch.randn(2, 4))
    model(torch.randn(2, 4))  # the root's own parameters stay gathered
    assert all(isinstance(value, DTensor) for value in model.state_dict().values())


def test_gathered_dtypes_are_those_of_each_forward_pass(mesh: DeviceMesh) -> None:
    """The innermost policy counts; a module that is sharded as a part of another has that other's."""
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    half = MixedPrecisionPolicy(param_dtype=torch.float16)
    fully_shard(model[0], mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(model[1], mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    fully_shard(model, mesh=mesh, mp_policy=half)
    layers = {"bfloat16": model[0][0], "float32": model[1][0], "float16": model[2]}
    settle(model)
    found = gathered_dtypes(model)
    assert {name: found[layer] for name, layer in layers.items()} == {n: getattr(torch, n) for n in layers}
    assert all(isinstance(p, DTensor) for p in model.parameters())

    seen = {}

    def note(layer: nn.Linear, args: tuple[torch.Tensor]) -> torch.Tensor:
        seen[next(name for name, known in layers.items() if known is layer)] = str(layer.weight.dtype)
        return args[0].to(layer.weight.dtype)

    for layer in layers.values():
        layer.register_forward_pre_hook(note)
    model(torch.randn(3, 4))
    assert seen == {n: f"torch.{n}" for n in layers}


def test_a_class_that_fsdp_made_has_its_original_name(mesh: DeviceMesh) -> None:
    class Router(nn.Linear):
        pass

    module = Router(4, 4)
    fully_shard(module, mesh=mesh)
    assert type(module) is not Router
    assert type_name(module) == "Router"
    assert is_own_class(module)
    llama = make_llama()
    fully_shard(llama, mesh=mesh)
    assert not is_own_class(llama)


def test_what_fsdp_cut_after_tensor_parallelism_is_told_from_what_was_cut_before() -> None:
    """The strided placement is private in torch; what it is told by must be what it was."""
    strided = _StridedShard(0, split_factor=2)
    assert shard_dim(strided) == 0
    assert strided.split_factor == 2
    assert not hasattr(Shard(0), "split_factor")


@pytest.mark.parametrize("sequential", [False, True])
def test_a_language_model_that_is_sharded_around_its_body(mesh: DeviceMesh, sequential: bool) -> None:
    ids = make_tokens(2, 6)
    plain, model = make_llama(), make_llama()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    expected = prune(plain, [ids], "wanda", sequential=sequential, num_samples=2)
    found = prune(model, [ids], "wanda", sequential=sequential, num_samples=2)
    assert all(torch.equal(found[name].full_tensor(), mask) for name, mask in expected.items())
