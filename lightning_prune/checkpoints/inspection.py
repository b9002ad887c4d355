"""Count the zeros of a checkpoint, its N:M structure and its agreement with masks, and print them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from lightning_prune.checkpoints.reading import Checkpoint, open_checkpoint, readable
from lightning_prune.checkpoints.states import StoredMasks
from lightning_prune.errors import CheckpointError
from lightning_prune.naming import as_matrix, block_order, is_prunable, order_kinds, place
from lightning_prune.progress import progress_bar
from lightning_prune.results import Table

PATTERNS: tuple[tuple[int, int], ...] = ((1, 4), (2, 4), (4, 8))
"""The N:M patterns that are looked for: at most N of M consecutive inputs are not zero. M is 4 or 8."""

# Elements looked at in one go; bounds the temporary memory beside the tensor itself.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class MaskReport:
    """Agreement of one tensor with the mask stored beside it.

    Attributes:
        masked: Number of weights that the mask removes.
        resurrected: How many of those are not exactly zero. Anything but 0 is a fault.
        kept_zeros: Weights that the mask keeps and that are zero all the same (rounding, underflow, chance).
    """

    masked: int
    resurrected: int
    kept_zeros: int


@dataclass(frozen=True)
class TensorReport:
    """The facts about one tensor.

    Attributes:
        name: Name in the checkpoint.
        shape: Its shape.
        dtype: Its dtype, without ``torch.``.
        numel: Number of elements.
        zeros: Number of elements equal to zero; both signs of zero count.
        prunable: Whether it counts as a weight that a user would prune: floating point, two dimensions or more, and
            no embedding, head, norm or adapter by its name; also where its layer cannot be pruned, such as an LSTM.
            These are the countable weights of `lightning_prune.pruning.coverage`.
        block: Name up to the first number, such as ``model.layers.3``; empty outside of blocks.
        kind: Name of the layer inside its block, such as ``q_proj``.
        patterns: For each N:M pattern the share of groups with at most N non-zeros; a pattern whose M does
            not divide the inputs is missing. Empty for tensors with less than two dimensions.
        tied_to: Name of the earlier tensor that is the same memory, or None. Totals leave them out.
        mask: Agreement with the stored mask, or None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int
    prunable: bool
    block: str
    kind: str
    patterns: dict[str, float] = field(default_factory=dict)
    tied_to: str | None = None
    mask: MaskReport | None = None

    @property
    def nonzeros(self) -> int:
        """Number of elements other than zero."""
        return self.numel - self.zeros

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0.0 to 1.0."""
        return self.zeros / self.numel if self.numel else 0.0

    def conforms(self, pattern: str) -> bool:
        """Whether every group follows an N:M pattern of ``PATTERNS``, written such as ``"2:4"``."""
        return self.patterns.get(pattern) == 1.0

    @property
    def pattern(self) -> str | None:
        """The strictest N:M pattern the tensor follows, or None."""
        return next((f"{n}:{m}" for n, m in PATTERNS if self.conforms(f"{n}:{m}")), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = {**asdict(self), "shape": list(self.shape)}
        return found | {"nonzeros": self.nonzeros, "sparsity": self.sparsity, "pattern": self.pattern}


@dataclass(frozen=True)
class Totals:
    """Sums over some tensors.

    Attributes:
        tensors: Number of tensors.
        numel: Number of elements.
        zeros: Number of zeros.
    """

    tensors: int
    numel: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros, 0.0 to 1.0."""
        return self.zeros / self.numel if self.numel else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "nonzeros": self.numel - self.zeros, "sparsity": self.sparsity}


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` found.

    Attributes:
        path: The path that was read.
        format: ``"safetensors"``, ``"state dict"``, ``"Lightning checkpoint"``, ``"distributed checkpoint"``.
        bytes_on_disk: Size of the files that hold the tensors, in bytes.
        tensors: One report a tensor, in the order of the files.
        masks: Number of masks that `WeightPruning` left in the checkpoint; None if it holds no such state.
    """

    path: str
    format: str
    bytes_on_disk: int
    tensors: list[TensorReport]
    masks: int | None = None

    def selected(self, all_tensors: bool = False) -> list[TensorReport]:
        """The prunable tensors, or all; tied copies left out."""
        return [t for t in self.tensors if (all_tensors or t.prunable) and t.tied_to is None]

    def totals(self, all_tensors: bool = False) -> Totals:
        """Sums over the prunable tensors, or over all."""
        return totals_of(self.selected(all_tensors))

    @property
    def sparsity(self) -> float:
        """Share of zeros among the prunable weights, 0.0 to 1.0."""
        return self.totals().sparsity

    @property
    def pattern(self) -> str | None:
        """The strictest N:M pattern that every prunable tensor follows, or None."""
        chosen = self.selected()
        names = [f"{n}:{m}" for n, m in PATTERNS]
        return next((p for p in names if chosen and all(t.conforms(p) for t in chosen)), None)

    def blocks(self, all_tensors: bool = False) -> dict[str, Totals]:
        """Sums by block, in the order of the model; the key ``""`` holds what is in no block."""
        grouped: dict[str, list[TensorReport]] = {}
        for tensor in self.selected(all_tensors):
            grouped.setdefault(tensor.block, []).append(tensor)
        return {block: totals_of(grouped[block]) for block in sorted(grouped, key=block_order)}

    @property
    def resurrected(self) -> int:
        """Weights that a stored mask removes and that are not zero, over all tensors."""
        return sum(t.mask.resurrected for t in self.tensors if t.mask)

    def to_dict(self, all_tensors: bool = False) -> dict[str, Any]:
        """Plain values for JSON."""
        compared = [t.mask for t in self.tensors if t.mask]
        masks = None
        if self.masks is not None:
            masks = {
                "stored": self.masks,
                "compared": len(compared),
                "masked": sum(m.masked for m in compared),
                "resurrected": self.resurrected,
                "kept_zeros": sum(m.kept_zeros for m in compared),
            }
        return {
            "path": self.path,
            "format": self.format,
            "bytes_on_disk": self.bytes_on_disk,
            "pattern": self.pattern,
            "prunable": self.totals().to_dict(),
            "all": self.totals(True).to_dict(),
            "blocks": {block: t.to_dict() for block, t in self.blocks(all_tensors).items()},
            "masks": masks,
            "tensors": [t.to_dict() for t in self.tensors if all_tensors or t.prunable],
        }


def inspect(path: str | Path, progress: bool = True) -> Inspection:
    """Count the zeros of every tensor of a checkpoint.

    Args:
        path: A transformers folder, ``.safetensors`` file, Lightning ``.ckpt``, state dict, or the folder of a
            distributed checkpoint.
        progress: Show a bar where stderr is a terminal.

    Returns:
        An `Inspection`. If the checkpoint holds the state of a `WeightPruning` callback, every masked weight
        is also compared with its mask.

    Raises:
        CheckpointError: the path does not exist, is damaged, or is of none of these formats.
    """
    return replace(inspect_checkpoint(open_checkpoint(path), "Counting zeros", progress), path=str(Path(path)))


def inspect_checkpoint(
    checkpoint: Checkpoint,
    message: str,
    progress: bool = True,
    see: Callable[[TensorReport, Tensor, Tensor | None], None] = lambda *_: None,
) -> Inspection:
    """Inspect a checkpoint that is open, one tensor in memory at a time.

    Args:
        checkpoint: The checkpoint.
        message: Stands before the bar.
        progress: See `inspect`.
        see: Called with the report of each tensor, the tensor, and its mask.

    Raises:
        CheckpointError: see `inspect`.
    """
    masks = StoredMasks.of(checkpoint)
    reports: list[TensorReport] = []
    with progress_bar(message, len(checkpoint), enabled=progress) as advance:
        for name, tensor in checkpoint.items():
            mask = None if masks is None else masks.take(name, tuple(tensor.shape))
            counted = masks is None or masks.counts(name)
            with readable(checkpoint.path, name):  # of a kind that cannot be compared
                report = report_tensor(
                    name, tensor, mask, checkpoint.model_type, checkpoint.ties.get(name), counted=counted
                )
            reports.append(report)
            see(report, tensor, mask)
            del tensor, mask
            advance()
    if not reports:
        raise CheckpointError(f"{checkpoint.path} holds no tensors; give a checkpoint of a model")
    return Inspection(
        path=str(checkpoint.path),
        format=checkpoint.format,
        bytes_on_disk=checkpoint.bytes_on_disk,
        tensors=reports,
        masks=None if masks is None else masks.count,
    )


# -- counting ---------------------------------------------------------------------------------------------------------


def report_tensor(
    name: str,
    tensor: Tensor,
    mask: Tensor | None = None,
    model_type: str | None = None,
    tied_to: str | None = None,
    counted: bool = True,
) -> TensorReport:
    """Count what is in one tensor.

    Args:
        name: Its name, which says what it is.
        tensor: Of any shape, dtype and layout.
        mask: Bool mask of the same shape, True = kept.
        model_type: Family of the transformers model: some store layers as ``(I, O)``.
        tied_to: See `TensorReport`.
        counted: False for an embedding whose name does not show it; see `StoredMasks.counts`.
    """
    shape = tuple(tensor.shape)
    matrix = as_matrix(name, tensor, model_type)
    zeros, patterns, found = _count(matrix, None if mask is None else as_matrix(name, mask, model_type))
    block, kind = place(name)
    return TensorReport(
        name=name,
        shape=shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        numel=tensor.numel(),
        zeros=zeros,
        prunable=counted and is_prunable(name, shape, tensor.dtype),
        block=block,
        kind=kind,
        patterns=patterns if len(shape) > 1 else {},
        tied_to=tied_to,
        mask=found,
    )


_GROUPS = {4: (torch.int32, 0x01010101), 8: (torch.int64, 0x0101010101010101)}


def _count(matrix: Tensor, mask: Tensor | None) -> tuple[int, dict[str, float], MaskReport | None]:
    """Zeros, share of groups that follow each N:M pattern, and agreement with the mask; all ``(O, I)``."""
    rows, columns = matrix.shape
    nonzero = masked = resurrected = kept_zeros = 0
    applicable = [(n, m) for n, m in PATTERNS if columns and columns % m == 0]
    follow = dict.fromkeys(applicable, 0)
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = matrix[start : start + step]
        # Eight-bit floats have no comparison of their own.
        part = part.float() if part.is_floating_point() and part.element_size() == 1 else part
        live = (part != 0).contiguous()  # [rows, I]
        nonzero += int(live.count_nonzero())
        for n, m in applicable:
            # The bools of a group, one byte each, are one integer; the product gathers their sum in its highest byte.
            integer, ones = _GROUPS[m]
            in_group = (live.view(-1).view(integer) * ones) >> 8 * (m - 1)
            follow[n, m] += int((in_group <= n).count_nonzero())
        if mask is not None:
            kept = mask[start : start + step]
            masked += kept.numel() - int(kept.count_nonzero())
            resurrected += int((live & ~kept).count_nonzero())
            kept_zeros += int((kept & ~live).count_nonzero())
    shares = {f"{n}:{m}": follow[n, m] / (matrix.numel() // m) for n, m in applicable if matrix.numel()}
    report = None if mask is None else MaskReport(masked, resurrected, kept_zeros)
    return matrix.numel() - nonzero, shares, report


def totals_of(tensors: list[TensorReport]) -> Totals:
    """Sums over some tensors."""
    return Totals(len(tensors), sum(t.numel for t in tensors), sum(t.zeros for t in tensors))


def render(inspection: Inspection, console: Console | None = None, all_tensors: bool = False) -> None:
    """Print an inspection as tables.

    Args:
        inspection: What `inspect` returned.
        console: Where to print; default standard output.
        all_tensors: One row a tensor, also those that are not pruned, instead of one row a block.
    """
    console = console or Console()
    everything, prunable = inspection.totals(True), inspection.totals()
    console.print(f"[bold]{escape(inspection.path)}[/bold]", highlight=False, soft_wrap=True)
    console.print(
        f"{inspection.format}, {format_bytes(inspection.bytes_on_disk)} on disk, {everything.tensors} tensors, "
        f"{everything.numel:,} parameters",
        highlight=False,
    )
    console.print((_tensor_table(inspection) if all_tensors else _block_table(inspection)).rich())
    console.print(
        f"[bold]{prunable.sparsity:.2%}[/bold] of {prunable.numel:,} prunable weights in {prunable.tensors} "
        f"tensors are zero ({everything.sparsity:.2%} of all parameters); {pattern_line(inspection)}",
        highlight=False,
    )
    if inspection.masks is not None:
        console.print(_mask_line(inspection), highlight=False)


def pattern_line(inspection: Inspection) -> str:
    """Which N:M patterns the prunable tensors follow, in words."""
    if inspection.pattern:
        return f"every one of them is {inspection.pattern}"
    found = Counter(t.pattern for t in inspection.selected() if t.pattern)
    if not found:
        return "no N:M pattern"
    return ", ".join(f"{count} of {len(inspection.selected())} are {pattern}" for pattern, count in found.items())


def _mask_line(inspection: Inspection) -> str:
    compared = [t.mask for t in inspection.tensors if t.mask]
    masked = sum(m.masked for m in compared)
    if inspection.resurrected:
        wrong = [t.name for t in inspection.tensors if t.mask and t.mask.resurrected]
        return (
            f"[bold red]Masks broken:[/bold red] {inspection.resurrected:,} of {masked:,} masked weights are not "
            f"zero, in {len(wrong)} tensors such as {escape(wrong[0])}"
        )
    missing = (inspection.masks or 0) - len(compared)
    note = f"; {missing} masks belong to no tensor here" if missing else ""
    kept = f"all {masked:,} weights masked by {len(compared)} stored masks are zero"
    return f"[green]Masks kept:[/green] {kept}{note}"


def _block_table(inspection: Inspection) -> Table:
    """Blocks by kinds of layer, where there are not too many kinds; otherwise sums by block."""
    chosen = inspection.selected()
    kinds = order_kinds(t.kind for t in chosen if t.block)
    # One stack of blocks is named in the title, and its rows by number, which leaves room for the columns.
    stacks = {t.block.rpartition(".")[0] for t in chosen if t.block}
    stack = f"{stacks.pop()}." if len(stacks) == 1 and stacks != {""} else ""
    wide = 1 < len(kinds) <= 8
    rows = []
    for block, totals in inspection.blocks().items():
        cells = [f"{totals.numel:,}"]
        if wide:
            here = {k: totals_of([t for t in chosen if t.block == block and t.kind == k]) for k in kinds}
            cells = [f"{h.sparsity:.1%}" if h.tensors else "" for h in here.values()]
        rows.append((block.removeprefix(stack) or "other", *cells, f"{totals.sparsity:.2%}"))
    names = [kind.removesuffix("_proj") for kind in kinds] if wide else ["weights"]
    title = f"Sparsity by block of {stack[:-1]}" if stack else "Sparsity by block"
    return Table(title, ("block", *names, "total"), rows)


def _tensor_table(inspection: Inspection) -> Table:
    rows = [
        (
            f"{t.name} (= {t.tied_to})" if t.tied_to else t.name,
            "x".join(map(str, t.shape)) or "scalar",
            t.dtype,
            f"{t.zeros:,}",
            f"{t.sparsity:.2%}",
            t.pattern or "",
            "yes" if t.prunable else "",
        )
        for t in inspection.tensors
    ]
    return Table("Tensors", ("name", "shape", "dtype", "zeros", "sparsity", "N:M", "prunable"), rows)


def format_bytes(size: float) -> str:
    """A size with its unit."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
