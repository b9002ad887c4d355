"""Say beforehand what pruning block by block needs on a device, of a model that need not have any weights yet."""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import mode

from torch import nn

from lightning_prune.naming import is_head
from lightning_prune.pruning.layer_kinds import stored_weights
from lightning_prune.pruning.stacks import stacks_to_walk

# Of the largest layer, in float32: matrices as large as its weight, and as its Hessian beside the one collected.
_WORK = {None: (3, 0), "exact": (7, 2), "alps": (9, 4), "obs": (5, 4), "sparsegpt": (5, 4)}


@dataclass(frozen=True)
class WalkMemory:
    """Bytes on the device where a block runs; what does not run there waits where a `device_map` keeps it.

    Attributes:
        weights: Of the block.
        samples: Hidden states of all calibration samples, which wait for the next block.
        batch: Activations of one batch, and the float32 copy of a layer's input that statistics are taken of.
        hessians: One ``I x I`` matrix in float32 a layer; none without an update.
        solver: What choosing and updating the largest layer takes.
    """

    weights: int
    samples: int
    batch: int
    hessians: int
    solver: int

    @property
    def total(self) -> int:
        """Bytes in all, at the most: batches and solver take turns."""
        return self.weights + self.samples + self.hessians + max(self.batch, self.solver)

    def __str__(self) -> str:
        """One line in GiB."""
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / 2**30:.2f}" for field in fields(self))
        return f"{self.total / 2**30:.2f} GiB ({parts})"


def walk_memory(
    model: nn.Module, update: str | None = None, *, num_samples: int = 128, length: int = 2048, batch_size: int = 1
) -> WalkMemory:
    """Estimate the memory of ``prune(..., sequential=True)`` with Wanda's score.

    Counted for linear layers; attention is taken to hold no matrix of all pairs of tokens (SDPA, flash).

    Args:
        model: A transformers model; its parameters may be on the meta device.
        update: As in `prune`, or ``"sparsegpt"`` for that score.
        num_samples: Calibration samples.
        length: Tokens of each.
        batch_size: Samples of a batch.

    Returns:
        The parts, for the largest block of the model.

    Raises:
        ValueError: the model has no stack of blocks, or the update is unknown.
    """
    if update not in _WORK:
        raise ValueError(f"update={update!r} is not one of {[name for name in _WORK if name]} or None")
    blocks = [block for stack in stacks_to_walk(model) for _, block in stack]
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} names no decoder blocks (_no_split_modules), and has none in a list; "
            "memory is counted for models of blocks"
        )
    block = max(blocks, key=lambda b: sum(p.numel() for p in b.parameters()))
    matrices = [
        kind.to_matrix(getattr(module, name)).shape
        for path, module in block.named_modules()
        if not is_head(path)
        for name, kind in stored_weights(module).items()
        if getattr(module, name).dim() == 2
    ]
    wide, size = max(max(shape) for shape in matrices), next(block.parameters()).element_size()
    hidden = mode(inputs for _, inputs in matrices)  # what most layers of a block take
    tokens = batch_size * length
    copies, squares = _WORK[update]
    return WalkMemory(
        weights=sum(p.numel() * p.element_size() for p in block.parameters()),
        samples=num_samples * length * hidden * size,
        batch=tokens * ((3 * wide + 4 * hidden) * size + 2 * 4 * wide),
        hessians=0 if update is None else 4 * sum(i * i for _, i in matrices),
        solver=4 * max(copies * o * i + squares * i * i for o, i in matrices),
    )
