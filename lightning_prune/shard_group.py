"""The processes that a model's parameters are sharded over, and sums over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_prune.sharding import shard_dim

_K = TypeVar("_K")


@dataclass(frozen=True)
class ShardGroup:
    """The processes that together hold each parameter once; other such groups may hold copies of the shards.

    Attributes:
        group: Their process group.
        device_type: Of the tensors that it sends.
    """

    group: dist.ProcessGroup
    device_type: str

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, on the tensor's device; the tensor may be overwritten."""
        sent = values.to(self.device_type)  # offloaded shards are in main memory
        dist.all_reduce(sent, group=self.group)
        return sent.to(values.device)

    def sum_all(self, values: Mapping[_K, Tensor]) -> dict[_K, Tensor]:
        """`sum` of several tensors of one dtype, in one collective."""
        flat = self.sum(torch.cat([v.flatten() for v in values.values()]))
        parts = torch.split(flat, [v.numel() for v in values.values()])
        return {key: part.view(v.shape) for part, (key, v) in zip(parts, values.items(), strict=True)}


def shard_group(parameters: Mapping[str, Tensor]) -> ShardGroup | None:
    """The processes that a model's parameters are sharded over; None if they are whole.

    Args:
        parameters: By name.

    Raises:
        ValueError: parameters that are cut more than once (tensor parallelism), over different processes, or only some
            of them.
    """
    found: dict[frozenset[int], ShardGroup] = {}
    whole = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    for name, p in parameters.items():
        if not isinstance(p, DTensor):
            continue
        cut = [mesh_dim for mesh_dim, placement in enumerate(p.placements) if shard_dim(placement) is not None]
        if len(cut) != 1:
            raise ValueError(
                f"{name!r} is laid out as {p.placements} over {p.device_mesh.ndim} mesh dimensions; units are found in "
                "parameters that one dimension cuts (FSDP2 without tensor parallelism)"
            )
        group = p.device_mesh.get_group(cut[0])
        ranks = frozenset(dist.get_process_group_ranks(group))
        found.setdefault(ranks, ShardGroup(group, p.device_mesh.device_type))
        if whole or len(found) > 1:
            raise ValueError(
                f"{name!r} is sharded over the processes {sorted(ranks)}, and {(whole or list(parameters))[0]!r} is "
                "not: call fully_shard on the whole model, with one device mesh"
            )
    return next(iter(found.values()), None)
