"""What a report shows of the weights: zeros, how the kept ones lie in rows and columns, and how large they are.

Dimensions: O outputs, I inputs of a layer; R, C rows and columns of a picture of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.checkpoints import Checkpoint, CheckpointError, open_checkpoint, readable
from lightning_prune.inspection import Inspection, TensorReport, report_tensor
from lightning_prune.progress import progress_bar
from lightning_prune.score_summary import ScoreSummary
from lightning_prune.stored_masks import StoredMasks
from lightning_prune.targets import clean_name
from lightning_prune.tensor_names import as_matrix

CELLS = 96
"""Most rows and columns of a picture; larger matrices are averaged."""


@dataclass(frozen=True)
class Structure:
    """How the kept weights of one matrix lie.

    Attributes:
        density: ``[R, C]``, share of kept weights in each cell.
        rows: ``[R]``, share of kept weights by output.
        columns: ``[C]``, share of kept weights by input.
        row_spread: Variance of the densities of all O rows over what independent zeros would give; 1 is chance, 0
            means that every row keeps the same number.
        column_spread: The same of the I columns.
    """

    density: Tensor
    rows: Tensor
    columns: Tensor
    row_spread: float
    column_spread: float

    @property
    def spread(self) -> float:
        """How much rows and columns differ in all."""
        return self.row_spread + self.column_spread


@dataclass
class Measured:
    """A model as a report sees it.

    Attributes:
        inspection: What `inspect` would say.
        structures: Of each pruned matrix, by parameter name.
        magnitudes: Histograms of ``abs(W)``, kept and pruned: of the dense model where there is one, else of what is
            left.
        dense: Whether `magnitudes` are those of a dense model.
        dense_bytes: Size of its files, or None.
    """

    inspection: Inspection
    structures: dict[str, Structure] = field(default_factory=dict)
    magnitudes: ScoreSummary = field(default_factory=ScoreSummary)
    dense: bool = False
    dense_bytes: int | None = None


def measure(checkpoint: Checkpoint, dense: str | Path | None = None, progress: bool = True) -> Measured:
    """Read a model once, tensor by tensor.

    Args:
        checkpoint: The model.
        dense: The same model before it was pruned, as any path that `open_checkpoint` opens.
        progress: Show a bar where stderr is a terminal.

    Raises:
        CheckpointError: a tensor cannot be read, or `dense` has none of the pruned layers, or other shapes.
    """
    masks = StoredMasks.of(checkpoint)
    before = None if dense is None else _Dense(dense)
    reports: list[TensorReport] = []
    measured = Measured(Inspection("", "", 0, reports), dense=before is not None)
    with progress_bar("Reading weights", checkpoint.count, enabled=progress) as advance:
        for name, tensor in checkpoint.tensors():
            mask = None if masks is None else masks.take(name, tuple(tensor.shape))
            counted = masks is None or masks.counts(name)
            report = report_tensor(
                name, tensor, mask, checkpoint.model_type, checkpoint.ties.get(name), counted=counted
            )
            reports.append(report)
            if report.prunable and report.tied_to is None:
                weight = as_matrix(name, tensor, checkpoint.model_type)
                kept = (weight != 0) if mask is None else as_matrix(name, mask, checkpoint.model_type)
                if report.zeros:
                    measured.structures[name] = structure_of(kept)
                _take_magnitudes(measured.magnitudes, name, weight, kept, before, checkpoint.model_type)
            del tensor, mask
            advance()
    if not reports:
        raise CheckpointError(f"{checkpoint.path} holds no tensors")
    if before is not None:
        measured.dense_bytes = before.bytes
        if not before.used:
            raise CheckpointError(
                f"dense={str(dense)!r} has none of the layers of {checkpoint.path}: it is another model"
            )
    measured.inspection = Inspection(
        path=str(checkpoint.path),
        format=checkpoint.format,
        bytes_on_disk=sum(file.stat().st_size for file in checkpoint.files),
        tensors=reports,
        masks=None if masks is None else masks.count,
    )
    return measured


def structure_of(kept: Tensor) -> Structure:
    """How kept weights lie.

    Args:
        kept: Bool ``[O, I]``, True = kept.
    """
    live = kept.to(torch.float32)  # [O, I]
    rows, columns = live.mean(1), live.mean(0)  # [O], [I]
    size = (min(CELLS, kept.shape[0]), min(CELLS, kept.shape[1]))
    density = F.adaptive_avg_pool2d(live[None], size)[0]  # [R, C]
    return Structure(
        density=density,
        rows=F.adaptive_avg_pool1d(rows[None], size[0])[0],
        columns=F.adaptive_avg_pool1d(columns[None], size[1])[0],
        row_spread=_spread(rows, kept.shape[1]),
        column_spread=_spread(columns, kept.shape[0]),
    )


def _spread(densities: Tensor, trials: int) -> float:
    """Variance over that of a binomial distribution with the same mean."""
    mean = float(densities.double().mean())
    chance = mean * (1 - mean) / trials
    return float(densities.double().var(correction=0)) / chance if chance > 0 else 0.0


def _take_magnitudes(
    summary: ScoreSummary, name: str, weight: Tensor, kept: Tensor, before: _Dense | None, model_type: str | None
) -> None:
    if before is None:
        sizes = weight.float().abs().masked_fill(~kept, -torch.inf)  # pruned ones are gone: left out
    else:
        dense = before.find(name, weight.shape, model_type)
        if dense is None:
            return
        sizes = dense.float().abs()
    summary.add(name, sizes, kept, weight.numel())


class _Dense:
    """Tensors of the dense model by the names of the pruned one."""

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = open_checkpoint(path, argument="dense")
        self.bytes = sum(file.stat().st_size for file in self.checkpoint.files)
        self.names = {_core(name): name for name in self.checkpoint.names()}
        self.used = 0

    def find(self, name: str, shape: tuple[int, ...], model_type: str | None) -> Tensor | None:
        """The matrix before pruning, or None if it is not there."""
        wanted = self.names.get(_core(name))
        if wanted is None:
            return None
        matrix = as_matrix(name, self._load(wanted), self.checkpoint.model_type or model_type)
        if matrix.shape != shape:
            raise CheckpointError(
                f"dense={str(self.checkpoint.path)!r} has {name!r} of shape {tuple(matrix.shape)}, the pruned model "
                f"{tuple(shape)}: it is another model"
            )
        self.used += 1
        return matrix

    def _load(self, wanted: str) -> Tensor:
        # Files are open only while their entries are walked.
        for name, load in self.checkpoint.entries():
            if name == wanted:
                with readable(self.checkpoint.path, name):
                    return load()
        raise CheckpointError(f"{self.checkpoint.path}: {wanted!r} has gone")


def _core(name: str) -> str:
    """A name from its first number on with what stands before it, without the attributes that wrap a model.

    >>> _core("model.model.layers.0.q_proj.weight"), _core("model.layers.0.q_proj.weight")
    ('layers.0.q_proj.weight', 'layers.0.q_proj.weight')
    """
    parts = clean_name(name).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(0, first - 1) :]) if first < len(parts) else name.removeprefix("model.")
