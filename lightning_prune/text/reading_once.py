"""Read a model's weights in one process of all, and send each of the others its shards of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from lightning_prune.ranks import Ranks, synchronized_errors


def read_here(model: Any, load: Callable[[], Any]) -> None:
    """Give a model without memory the weights that `load` reads, in this process.

    Args:
        model: A transformers model, its parameters on the meta device. It stays the same object; what was frozen
            stays frozen.
        load: Returns the same model with its weights.

    Raises:
        ValueError: the model is not that of the weights any more.
    """
    with torch.random.fork_rng(devices=[]):
        loaded = load()
    _check_same(model, loaded)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config


def read_once(model: Any, load: Callable[[], Any], shard: Callable[[], None], device: torch.device) -> None:
    """Shard a model without memory, and fill the shards with weights that the first process reads; every rank calls.

    Beside its shards a rank holds one whole weight at a time; the first holds the whole model in main memory meanwhile.

    Args:
        model: As in `read_here`, on every rank. Buffers have their values already.
        load: Returns the same model with its weights. Called by the first process alone.
        shard: Applies ``fully_shard`` to the model, without tensor parallelism.
        device: Where the shards are to be.

    Raises:
        ValueError: the model is not that of the weights any more.
        CalibrationError: on the other ranks, if reading fails on the first.
    """
    loaded: Any = None
    with synchronized_errors(Ranks()):
        if dist.get_rank() == 0:
            with torch.random.fork_rng(devices=[]):  # random numbers go on alike on all ranks
                loaded = load()
            _check_same(model, loaded)
    told: list[Any] = [None]
    if loaded is not None:
        told = [({name: p.dtype for name, p in loaded.named_parameters()}, loaded.generation_config)]
    dist.broadcast_object_list(told, src=0)
    dtypes, model.generation_config = told[0]
    for name, parameter in model.named_parameters():  # some families keep some weights in float32, when they are read
        parameter.data = parameter.data.to(dtypes[name])

    shard()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[name])
    weights = {} if loaded is None else loaded.state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def _check_same(model: nn.Module, loaded: nn.Module) -> None:
    mine, read = ({name: tuple(p.shape) for name, p in m.named_parameters()} for m in (model, loaded))
    if mine != read:
        differing = sorted(name for name in mine.keys() | read.keys() if mine.get(name) != read.get(name))
        first = differing[0]
        raise ValueError(
            f"read_once=True reads weights for a model that has changed since it was built: {len(differing)} of its "
            f"parameters differ, such as {first!r}, here of shape {mine.get(first)}, in the source {read.get(first)}; "
            "change the model after configure_model, or leave read_once out"
        )
