"""One of several processes that shard a model with FSDP2: saliencies, masks, and what is refused."""

import os
from pathlib import Path

import structure_models as zoo
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_prune.sharding import gather_whole
from lightning_prune.structure import mask_units, read_structure, remove_units
from lightning_prune.structure.saliency import SaliencyAccumulator

TYPES = ("attention", "ffn", "hidden", "layer")
REMOVAL = {"attention": [[1], [0], [2]], "ffn": [[3, 20], [0, 27], [5, 6]], "hidden": [0, 17, 47]}


def run(name: str, sharded: bool) -> dict[str, torch.Tensor]:
    """Saliencies of one backward over two samples, then logits and weights with masked units."""
    model = zoo.make(name)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in zoo.layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    ids = zoo.tokens()
    own = ids[dist.get_rank()][None] if sharded else ids
    # Not Adam: where a gradient is zero but for rounding (biases of keys), it would take steps of any sign.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    scores = SaliencyAccumulator(read_structure(model), TYPES)
    for _ in range(2):
        model(input_ids=own, labels=own).loss.backward()
        scores.add()
        optimizer.step()
        optimizer.zero_grad()
    state = {f"saliency.{t}": means for t, means in scores.means().items()}
    twin = SaliencyAccumulator(read_structure(model), TYPES)
    twin.load_state_dict(scores.state_dict())
    state |= {f"restored.{t}": means for t, means in twin.means().items()}
    mask_units(model, REMOVAL, [optimizer])
    model(input_ids=own, labels=own).loss.backward()
    optimizer.step()
    state["logits"] = zoo.logits(model)
    state |= {f"weight.{n}": gather_whole(p.detach()) for n, p in model.named_parameters()}
    if sharded:
        try:
            remove_units(model, {"ffn": REMOVAL["ffn"]})
        except ValueError as error:
            state["refused"] = torch.tensor("is sharded over processes" in str(error))
    return {n: t.contiguous() for n, t in state.items()}


def run_sharded(names: tuple[str, ...], world: int, folder: Path) -> None:
    """Write what `run` returns on each of several processes."""
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    for name in names:
        save_file(run(name, sharded=True), folder / f"{name}{rank}.safetensors")
    dist.destroy_process_group()
