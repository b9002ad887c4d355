"""What is in a checkpoint: zeros, sparsity and N:M structure of every tensor, read one tensor at a time.

Dimensions: O outputs, I inputs of a layer, M the size of a group of an N:M pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune.checkpoints import Checkpoint, CheckpointError, fail, open_checkpoint
from lightning_prune.masks import unpack_masks
from lightning_prune.progress import progress_bar
from lightning_prune.targets import clean_name

PATTERNS: tuple[tuple[int, int], ...] = ((1, 4), (2, 4), (4, 8))
"""The N:M patterns that are looked for: at most N of M consecutive inputs are not zero. M divides by 4."""

# Elements looked at in one go; bounds the temporary memory beside the tensor itself.
_CHUNK = 1 << 22

# Whole name components (split at "." and "_") that mark embeddings, norms, heads and adapters.
_NOT_PRUNABLE = re.compile(
    r"(^|[._])(embed(ding)?s?|embd|emb|wte|wpe|shared|lm_head|embed_(in|out)|score|classifier|"
    r"\w*norm\d*|ln(_\w+)?|lora_\w+|rotary\w*|position\w*)([._]|$)"
)
# Families whose linear layers are transformers' Conv1D, stored (in, out).
_CONV1D_FAMILIES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_CONV1D_NAME = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


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
        prunable: Whether it looks like the weight of a layer that is pruned: floating point, two dimensions
            or more, and no embedding, head, norm or adapter by its name.
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
        mask = self.mask and {
            "masked": self.mask.masked,
            "resurrected": self.mask.resurrected,
            "kept_zeros": self.mask.kept_zeros,
        }
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "numel": self.numel,
            "zeros": self.zeros,
            "nonzeros": self.nonzeros,
            "sparsity": self.sparsity,
            "prunable": self.prunable,
            "block": self.block,
            "kind": self.kind,
            "patterns": dict(self.patterns),
            "pattern": self.pattern,
            "tied_to": self.tied_to,
            "mask": mask,
        }


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
        return {
            "tensors": self.tensors,
            "numel": self.numel,
            "zeros": self.zeros,
            "nonzeros": self.numel - self.zeros,
            "sparsity": self.sparsity,
        }


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
            distributed checkpoint; see `open_checkpoint`.
        progress: Show a bar where stderr is a terminal.

    Returns:
        An `Inspection`. If the checkpoint holds the state of a `WeightPruning` callback, every masked weight
        is also compared with its mask.

    Raises:
        CheckpointError: the path does not exist, is damaged, or is of none of these formats.
    """
    checkpoint = open_checkpoint(path)
    masks = StoredMasks.of(checkpoint)
    reports: list[TensorReport] = []
    with progress_bar("Counting zeros", checkpoint.count, enabled=progress) as advance:
        for name, tensor in checkpoint.tensors():
            mask = None if masks is None else masks.take(name, tuple(tensor.shape))
            reports.append(
                report_tensor(name, tensor, mask, model_type=checkpoint.model_type, tied_to=checkpoint.ties.get(name))
            )
            del tensor, mask
            advance()
    if not reports:
        raise CheckpointError(f"{path} holds no tensors")
    return Inspection(
        path=str(Path(path)),
        format=checkpoint.format,
        bytes_on_disk=sum(file.stat().st_size for file in checkpoint.files),
        tensors=reports,
        masks=None if masks is None else masks.count,
    )


# -- counting ---------------------------------------------------------------------------------------------------------


def is_prunable(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor looks like the weight of a layer that is pruned by default.

    >>> is_prunable("model.layers.0.self_attn.q_proj.weight", (64, 64), torch.float32)
    True
    >>> is_prunable("model.embed_tokens.weight", (1000, 64), torch.float32)
    False
    """
    if len(shape) < 2 or min(shape) < 1 or not dtype.is_floating_point:
        return False
    return _NOT_PRUNABLE.search(name) is None and not name.endswith("bias")


def place(name: str) -> tuple[str, str]:
    """Block and kind of layer of a parameter; the block is empty outside of numbered ones.

    >>> place("model.layers.3.self_attn.q_proj.weight")
    ('model.layers.3', 'q_proj')
    """
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    words = [part for part in parts if part != "weight" and not part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else "", words[-1] if words else "weight"


# Files list tensors by alphabet; tables and pictures list them in the order a token meets them.
_KINDS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "o_proj", "out_proj", "dense"),
    *("gate_proj", "up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "down_proj", "fc2", "dense_4h_to_h"),
)


def order_kinds(kinds: Iterable[str]) -> list[str]:
    """Kinds of layers without duplicates, attention before MLP where the names are known, others behind.

    >>> order_kinds(["down_proj", "q_proj", "router", "q_proj"])
    ['q_proj', 'down_proj', 'router']
    """
    return sorted(dict.fromkeys(kinds), key=lambda k: _KINDS.index(k) if k in _KINDS else len(_KINDS))


def report_tensor(
    name: str, tensor: Tensor, mask: Tensor | None = None, model_type: str | None = None, tied_to: str | None = None
) -> TensorReport:
    """Count what is in one tensor.

    Args:
        name: Its name, which says what it is.
        tensor: Of any shape, dtype and layout.
        mask: Bool mask of the same shape, True = kept.
        model_type: Family of the transformers model: some store layers as ``(I, O)``.
        tied_to: See `TensorReport`.
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
        prunable=is_prunable(name, shape, tensor.dtype),
        block=block,
        kind=kind,
        patterns=patterns if len(shape) > 1 else {},
        tied_to=tied_to,
        mask=found,
    )


def as_matrix(name: str, tensor: Tensor, model_type: str | None = None) -> Tensor:
    """A tensor of any shape to ``(O, I)``, with the inputs that form N:M groups next to each other.

    Args:
        name: Its name.
        tensor: A weight, or its mask.
        model_type: Family of the transformers model: some store layers as ``(I, O)``.
    """
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if model_type in _CONV1D_FAMILIES and _CONV1D_NAME.search(name) is not None:
        return tensor.t()
    if tensor.dim() == 4:  # a Conv2d: groups run along the input channels
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() else tensor.reshape(1, 1)


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
        nonzero += int(live.sum())
        if applicable:
            # Four bools, one byte each, are one integer; the product gathers their sum in its highest byte.
            counts = (live.view(-1).view(torch.int32) * 0x01010101) >> 24
            for n, m in applicable:
                in_group = counts.view(-1, m // 4).sum(-1) if m > 4 else counts
                follow[n, m] += int((in_group <= n).sum())
        if mask is not None:
            kept = mask[start : start + step]
            masked += int((~kept).sum())
            resurrected += int((live & ~kept).sum())
            kept_zeros += int((~live & kept).sum())
    shares = {f"{n}:{m}": follow[n, m] / (matrix.numel() // m) for n, m in applicable if matrix.numel()}
    report = None if mask is None else MaskReport(masked, resurrected, kept_zeros)
    return matrix.numel() - nonzero, shares, report


def totals_of(tensors: list[TensorReport]) -> Totals:
    """Sums over some tensors."""
    return Totals(len(tensors), sum(t.numel for t in tensors), sum(t.zeros for t in tensors))


def block_order(name: str) -> tuple[bool, list[tuple[bool, int | str]]]:
    """Sort key that puts ``layers.2`` before ``layers.10`` and what is in no block last."""
    parts: list[tuple[bool, int | str]] = [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
    return name == "", parts


# -- masks ------------------------------------------------------------------------------------------------------------


class StoredMasks:
    """The masks that `WeightPruning` callbacks left in a checkpoint, unpacked one at a time.

    Attributes:
        score: Name of the score that made them; of several callbacks, all names.
        settings: What else each callback says of how it pruned, in plain values.
    """

    def __init__(
        self, path: Path, packed: dict[str, Any], score: str | None, settings: list[dict[str, Any]] | None = None
    ) -> None:
        self._path = path
        self._packed = packed
        self.score = score
        self.settings = settings or []

    @property
    def names(self) -> set[str]:
        """Names of the masks."""
        return set(self._packed)

    @property
    def count(self) -> int:
        """Number of masks."""
        return len(self._packed)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> StoredMasks | None:
        """The masks of all `WeightPruning` callbacks, or None without such a callback."""
        states = [
            state for key, state in checkpoint.callbacks.items() if str(key).startswith("WeightPruning") and state
        ]
        if not states:
            return None
        packed: dict[str, Any] = {}
        for state in states:
            masks = state.get("masks") if isinstance(state, Mapping) else None
            if not isinstance(masks, Mapping):
                fail(checkpoint.path, "the state of its WeightPruning callback holds no masks; it is damaged")
            packed.update(masks)
        scores = dict.fromkeys(str(state["score"]) for state in states if state.get("score"))
        settings = [dict(s) for state in states if isinstance(s := state.get("settings"), Mapping)]
        return cls(checkpoint.path, packed, ", ".join(scores) or None, settings)

    def masks(self) -> dict[str, Tensor]:
        """All masks, unpacked, by the names they are stored under.

        Raises:
            CheckpointError: a mask is damaged.
        """
        try:
            return unpack_masks(self._packed)
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {error}") from error

    def find(self, name: str) -> str | None:
        """Name of a tensor's mask, or None. Masks may be named from further inside the model than the tensor."""
        parts = clean_name(name).split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        return next((tail for tail in tails if tail in self._packed), None)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of a tensor, or None.

        Raises:
            CheckpointError: the mask is damaged, or not of this shape.
        """
        found = self.find(name)
        if found is None:
            return None
        try:
            mask = unpack_masks({found: self._packed[found]})[found]
        except ValueError as error:
            raise CheckpointError(f"{self._path}: {error}") from error
        if tuple(mask.shape) != shape:
            fail(self._path, f"{name!r} has shape {shape}, its mask {tuple(mask.shape)}")
        return mask
