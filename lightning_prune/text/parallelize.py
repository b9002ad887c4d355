"""Spread a transformers model over ranks: FSDP2 on the data-parallel dimension, tensor parallelism within layers."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lightning_prune.pruning.stacks import find_blocks
from lightning_prune.sharding import check_device

_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
_HEADS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def parallelize(
    model: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool = True, cpu_offload: bool = False
) -> None:
    """Shard a model in place, each decoder block by itself and the rest with the root.

    Args:
        model: A transformers model with decoder blocks (``_no_split_modules``), or a PEFT model around one. For tensor
            parallelism its configuration must have a ``base_model_tp_plan``, as those of Llama, Mistral, Qwen and
            Gemma have.
        mesh: Two dimensions named ``"data_parallel"`` and ``"tensor_parallel"``, as of ``ModelParallelStrategy``.
        reshard_after_forward: Let a block's gathered weights go after its forward and gather them again for its
            backward: less memory, more communication.
        cpu_offload: Keep shards in main memory; they are copied to the device block by block.

    Raises:
        ValueError: the model has no decoder blocks, no plan for tensor parallelism, or sizes that do not divide.
        RuntimeError: this PyTorch cannot shard on the device.
    """
    if hasattr(model, "get_base_model"):  # of PEFT, which goes when adapters are merged
        model = model.get_base_model()  # type: ignore[operator]
    blocks = find_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} names no decoder blocks (_no_split_modules), so there is nothing to shard one by "
            "one; override configure_model and call fully_shard yourself"
        )
    check_device(mesh.device_type)
    tensor = mesh["tensor_parallel"]
    if tensor.size() > 1:
        _split_layers(model, tensor)
    offload = CPUOffloadPolicy(pin_memory=tensor.device_type == "cuda") if cpu_offload else OffloadPolicy()
    options: dict[str, Any] = {
        "mesh": mesh["data_parallel"],
        "reshard_after_forward": reshard_after_forward,
        "offload_policy": offload,
    }
    for _, block in blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)


def _split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Apply the tensor-parallel plan of the model's family."""
    config, base = getattr(model, "config", None), getattr(model, "base_model", model)
    plan: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    # Other styles (sequence parallelism, gathered outputs) hide a rank's own part from its layers' inputs.
    styles = {pattern: _STYLES[style] for pattern, style in plan.items() if style in _STYLES}
    layers = {
        name: style()
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        for pattern, style in styles.items()
        if fnmatchcase(name, pattern)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no plan for tensor parallelism (base_model_tp_plan of its configuration); use "
            "ModelParallelStrategy(tensor_parallel_size=1), or override configure_model"
        )
    for field in _HEADS:
        size = getattr(config, field, None)
        if size is not None and size % mesh.size():
            raise ValueError(
                f"tensor_parallel_size={mesh.size()} does not divide the model's {field}={size}; use a divisor of it"
            )
    parallelize_module(base, mesh, layers)
