"""What is in a checkpoint: zeros, sparsity and N:M structure of every tensor, read one tensor at a time.

Nothing is unpickled freely and no model is built: safetensors files, ``torch.load(weights_only=True)``, and
an allow-list of types for the index of a distributed checkpoint. Memory stays that of the largest tensor.

Dimensions: O outputs, I inputs of a layer, M the size of a group of an N:M pattern.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


class InspectionError(ValueError):
    """A checkpoint cannot be read: missing, damaged, of an unknown format, or not safe to open."""


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
        return _totals(self.selected(all_tensors))

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
        return {block: _totals(grouped[block]) for block in sorted(grouped, key=block_order)}

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
        path: A transformers folder (safetensors or ``pytorch_model.bin``, sharded or not), a ``.safetensors``
            file, a Lightning ``.ckpt``, a state dict saved by ``torch.save``, or the folder of a distributed
            checkpoint (``torch.distributed.checkpoint``, Lightning's FSDP and ModelParallel strategies).
        progress: Show a bar where stderr is a terminal.

    Returns:
        An `Inspection`. If the checkpoint holds the state of a `WeightPruning` callback, every masked weight
        is also compared with its mask.

    Raises:
        InspectionError: the path does not exist, is damaged, or is of none of these formats.
    """
    path = Path(path)
    if not path.exists():
        raise InspectionError(
            f"path={str(path)!r} does not exist; give a checkpoint file or folder on this machine "
            "(models of the Hugging Face hub must be downloaded first)"
        )
    source = _open(path)
    masks = _Masks.of(source)
    reports: list[TensorReport] = []
    with progress_bar("Counting zeros", source.count, enabled=progress) as advance:
        for name, load in source.tensors():
            with _readable(source.path, name):
                tensor = load()
            reports.append(_report(name, tensor, source, masks))
            del tensor
            advance()
    if not reports:
        raise InspectionError(f"{path} holds no tensors")
    return Inspection(
        path=str(path),
        format=source.format,
        bytes_on_disk=sum(file.stat().st_size for file in source.files),
        tensors=reports,
        masks=None if masks is None else masks.count,
    )


# ---------------------------------------------------------------------------------------------- counting


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


def _report(name: str, tensor: Tensor, source: _Source, masks: _Masks | None) -> TensorReport:
    shape = tuple(tensor.shape)
    input_first = source.model_type in _CONV1D_FAMILIES and _CONV1D_NAME.search(name) is not None
    mask = None if masks is None else masks.take(name, shape)
    zeros, patterns, found = _count(_matrix(tensor, input_first), None if mask is None else _matrix(mask, input_first))
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
        tied_to=source.ties.get(name),
        mask=found,
    )


def _matrix(tensor: Tensor, input_first: bool) -> Tensor:
    """A tensor of any shape to ``(O, I)``, with the inputs that form N:M groups next to each other."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if input_first:
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


def _totals(tensors: list[TensorReport]) -> Totals:
    return Totals(len(tensors), sum(t.numel for t in tensors), sum(t.zeros for t in tensors))


def block_order(name: str) -> tuple[bool, list[tuple[bool, int | str]]]:
    """Sort key that puts ``layers.2`` before ``layers.10`` and what is in no block last."""
    parts: list[tuple[bool, int | str]] = [(p.isdigit(), int(p) if p.isdigit() else p) for p in name.split(".")]
    return name == "", parts


# --------------------------------------------------------------------------------------------- the formats


@dataclass
class _Source:
    """An opened checkpoint: how many tensors it has, and how to load each of them."""

    path: Path
    format: str
    files: list[Path]
    count: int
    tensors: Callable[[], Iterator[tuple[str, Callable[[], Tensor]]]]
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    model_type: str | None = None
    ties: dict[str, str] = field(default_factory=dict)


def _open(path: Path) -> _Source:
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path])
    if path.suffix == ".gguf":
        _fail(
            path,
            "GGUF files are not read; load it with transformers and save_pretrained() it to a folder first",
        )
    if path.name.endswith(".index.json"):
        return _open_index(path)
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file under another name: 8 bytes of header length, then a JSON object.
    if len(head) == 9 and head[8:] == b"{" and not zipfile.is_zipfile(path):
        return _open_safetensors(path, [path])
    return _open_torch(path)


def _open_folder(folder: Path) -> _Source:
    if (folder / ".metadata").is_file():
        return _open_distributed(folder)
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            return _open_index(folder / index)
    whole = sorted(folder.glob("*.safetensors"))
    # Some folders hold the same weights twice, under the name transformers reads and under another.
    whole = [f for f in whole if f.name == "model.safetensors"] or whole
    if whole:
        return _open_safetensors(folder, whole)
    if (folder / "pytorch_model.bin").is_file():
        source = _open_torch(folder / "pytorch_model.bin")
        source.model_type = _model_type(folder)
        return source
    checkpoints = sorted(folder.glob("*.ckpt")) + sorted(folder.glob("*.bin"))
    hint = f"; did you mean {str(checkpoints[0])!r}?" if checkpoints else ""
    _fail(
        folder,
        "is a folder without model.safetensors, pytorch_model.bin, an index of shards, or the .metadata of a "
        f"distributed checkpoint{hint}",
    )


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def _open_index(index: Path) -> _Source:
    with _readable(index):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        owners = Counter({str(shard): 0 for shard in weight_map.values()})
        owners.update(weight_map.values())
    files = [index.parent / shard for shard in owners]
    for file in files:
        if file.parent != index.parent:
            _fail(index, f"names a shard outside of its folder: {file}")
        if not file.is_file():
            _fail(index, f"names the shard {file.name}, which is missing; download or copy it again")
    if files and files[0].suffix != ".safetensors":
        return _open_bin_shards(index, files)
    source = _open_safetensors(index.parent, files)
    _same_names(index, set(weight_map), {name for name, _ in source.tensors()})
    return source


def _same_names(index: Path, expected: set[str], found: set[str]) -> None:
    missing = sorted(expected - found)
    if missing:
        _fail(index, f"lists {len(missing)} tensors that the shards do not hold, such as {missing[0]!r}")


def _open_safetensors(path: Path, files: list[Path]) -> _Source:
    count = 0
    for file in files:
        with _readable(file), safe_open(file, framework="pt") as handle:
            count += len(handle.keys())

    def tensors() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 -- not a dict
                    yield name, partial(handle.get_tensor, name)

    model_type = _model_type(files[0].parent) if files else None
    return _Source(path, "safetensors", files, count, tensors, model_type=model_type)


def _torch_load(path: Path) -> Any:
    """Load without running code from the file; mapped into memory: a tensor is read when looked at."""
    with _readable(path):
        # Only the zip format can be mapped; files written before torch 1.6 are read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _open_torch(path: Path) -> _Source:
    loaded = _torch_load(path)
    if not isinstance(loaded, Mapping):
        _fail(path, f"holds a {type(loaded).__name__}, not a state dict or a Lightning checkpoint")
    is_lightning = "pytorch-lightning_version" in loaded
    state = loaded
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded.get(key), Mapping):
            state = loaded[key]
            break
    callbacks = loaded.get("callbacks") if is_lightning else None
    source = _from_state_dicts(path, [path], [state])
    source.format = "Lightning checkpoint" if is_lightning else "state dict"
    source.callbacks = callbacks if isinstance(callbacks, Mapping) else {}
    return source


def _open_bin_shards(index: Path, files: list[Path]) -> _Source:
    source = _from_state_dicts(index.parent, files, [_torch_load(file) for file in files])
    source.model_type = _model_type(index.parent)
    return source


def _from_state_dicts(path: Path, files: list[Path], states: list[Mapping[str, Any]]) -> _Source:
    found = {n: t for state in states for n, t in state.items() if isinstance(t, Tensor)}
    if not found:
        _fail(path, "holds no tensors at its top level, nor under 'state_dict', 'model' or 'module'")
    # Two names of one memory are one parameter (tied embeddings). Empty tensors have no memory to share.
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in found.items():
        if tensor.layout == torch.strided and tensor.numel():
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            original = first.setdefault(memory, name)
            if original != name:
                ties[name] = original

    def tensors() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for name, tensor in found.items():
            yield name, tensor.detach

    return _Source(path, "state dict", files, len(found), tensors, ties=ties)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint, a pickle by definition of the format, and no other types.

    `FileSystemReader.read_metadata` would unpickle it without limits, and so run whatever a stranger put in.
    """

    def find_class(self, module: str, name: str) -> Any:
        from torch.distributed.checkpoint import filesystem, metadata

        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        allowed: dict[tuple[str, str], Any] = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): _layout,
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): filesystem._StorageInfo,
            ("collections", "OrderedDict"): dict,
        }
        for kind in (
            metadata.Metadata,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
        ):
            allowed[metadata.__name__, kind.__name__] = kind
        for path_module in ("pathlib", "pathlib._local"):  # Python 3.13 moved the classes
            allowed[path_module, "PosixPath"] = allowed[path_module, "PurePosixPath"] = PurePosixPath
            allowed[path_module, "WindowsPath"] = allowed[path_module, "PureWindowsPath"] = PureWindowsPath
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"refused type {module}.{name}")
        return allowed[module, name]


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"refused layout {name!r}")
    return layout


def _open_distributed(folder: Path) -> _Source:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    with _readable(folder / ".metadata"), (folder / ".metadata").open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise pickle.UnpicklingError("no index of tensors")
        entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        wanted = _model_entries(entries, metadata.planner_data or {})
    # meta.pt is Lightning's: epoch, callbacks and all that is not sharded.
    meta = folder / "meta.pt"
    extra = _torch_load(meta) if meta.is_file() else {}
    callbacks = extra.get("callbacks") if isinstance(extra, Mapping) else None
    sizes: dict[str, int] = {}
    for info in stored.values():  # also those of optimizers: a shorter file is a damaged checkpoint
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    files = [_inside(folder, name) for name in sorted(sizes)]
    for file in files:
        if file.stat().st_size < sizes[file.relative_to(folder).as_posix()]:
            _fail(file, "is cut off; copy it again")

    def tensors() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for short, name in wanted.items():
            yield short, partial(_distributed_tensor, folder, name, entries[name], stored)

    return _Source(
        folder,
        "distributed checkpoint",
        files,
        len(wanted),
        tensors,
        callbacks=callbacks if isinstance(callbacks, Mapping) else {},
    )


def _model_entries(entries: Mapping[str, Any], planner_data: Mapping[str, Any]) -> dict[str, str]:
    """Name in the model to name in the checkpoint, without the states of optimizers."""
    paths = {name: tuple(planner_data.get(name, (name,))) for name in entries}
    for root in ("state_dict", "model", "module"):
        inside = {".".join(map(str, p[1:])): n for n, p in paths.items() if len(p) > 1 and p[0] == root}
        if inside:
            return inside
    return {n: n for n, p in paths.items() if not re.match(r"optim", str(p[0]))}


def _inside(folder: Path, name: str) -> Path:
    file = folder / name
    if not file.resolve().is_relative_to(folder.resolve()):
        _fail(folder, f"its .metadata names a file outside of the folder: {name!r}")
    if not file.is_file():
        _fail(folder, f"its .metadata names {name!r}, which is missing; copy the whole folder")
    return file


def _distributed_tensor(
    folder: Path, name: str, entry: Any, stored: Mapping[tuple[str, tuple[int, ...]], Any]
) -> Tensor:
    """One tensor put together from the chunks that the ranks wrote."""
    infos = {tuple(chunk.offsets): stored[name, tuple(chunk.offsets)] for chunk in entry.chunks}
    # Before memory is taken for what a damaged index claims.
    claimed = entry.size.numel() * entry.properties.dtype.itemsize
    if claimed > sum(info.length for info in infos.values()):
        raise EOFError(f"{claimed} bytes are more than its chunks hold")
    whole = torch.empty(entry.size, dtype=entry.properties.dtype)
    filled = 0
    for chunk in entry.chunks:
        info = infos[tuple(chunk.offsets)]
        if info.transform_descriptors:
            _fail(folder, f"{name!r} is compressed ({', '.join(info.transform_descriptors)}), which is not read")
        with _inside(folder, info.relative_path).open("rb") as file:
            data = _slice(file, info.offset, info.length)
        part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[region].copy_(part)
        filled += part.numel()
    if filled != whole.numel():
        _fail(folder, f"{name!r} is stored with {filled} of its {whole.numel()} elements")
    return whole


def _slice(file: BinaryIO, offset: int, length: int) -> bytes:
    missing = offset + length - file.seek(0, io.SEEK_END)
    if missing > 0 or min(offset, length) < 0:
        raise EOFError(f"{Path(file.name).name} ends {missing} bytes early")
    file.seek(offset)
    return file.read(length)


# -------------------------------------------------------------------------------------- errors and masks


def _fail(path: Path, problem: str) -> NoReturn:
    raise InspectionError(f"{path}: {problem}")


@contextlib.contextmanager
def _readable(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes into one sentence that says which file it is."""
    try:
        yield
    except InspectionError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise InspectionError(
            f"{path} holds more than tensors and plain values, or is damaged, and is not opened, because "
            f"loading it could run code ({reason}); save a state dict or safetensors from where you trust it"
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
        zipfile.BadZipFile,
    ) as error:
        what = f" (tensor {name!r})" if name else ""
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InspectionError(
            f"{path}{what} is damaged, cut off, or of another format: {reason}; copy or download it again"
        ) from error


class _Masks:
    """The masks that `WeightPruning` callbacks left in a checkpoint, unpacked one at a time."""

    def __init__(self, path: Path, packed: dict[str, Any]) -> None:
        self._path = path
        self._packed = packed
        self.count = len(packed)

    @classmethod
    def of(cls, source: _Source) -> _Masks | None:
        """The masks of all `WeightPruning` callbacks, or None without such a callback."""
        states = [state for key, state in source.callbacks.items() if str(key).startswith("WeightPruning") and state]
        if not states:
            return None
        packed: dict[str, Any] = {}
        for state in states:
            masks = state.get("masks") if isinstance(state, Mapping) else None
            if not isinstance(masks, Mapping):
                _fail(source.path, "the state of its WeightPruning callback holds no masks; it is damaged")
            packed.update(masks)
        return cls(source.path, packed)

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The mask of a tensor, or None. Masks may be named from further inside the model than the tensor."""
        parts = clean_name(name).split(".")
        tails = (".".join(parts[start:]) for start in range(len(parts)))
        found = next((tail for tail in tails if tail in self._packed), None)
        if found is None:
            return None
        try:
            mask = unpack_masks({found: self._packed[found]})[found]
        except ValueError as error:
            raise InspectionError(f"{self._path}: {error}") from error
        if tuple(mask.shape) != shape:
            _fail(self._path, f"{name!r} has shape {shape}, its mask {tuple(mask.shape)}")
        return mask


# ------------------------------------------------------------------------------------------------- output


def render(inspection: Inspection, console: Console | None = None, all_tensors: bool = False) -> None:
    """Print an inspection as tables.

    Args:
        inspection: What `inspect` returned.
        console: Where to print; default standard output.
        all_tensors: One row a tensor, also those that are not pruned, instead of one row a block.
    """
    console = console or Console()
    everything, prunable = inspection.totals(True), inspection.totals()
    console.print(f"[bold]{_escape(inspection.path)}[/bold]", highlight=False, soft_wrap=True)
    console.print(
        f"{inspection.format}, {_bytes(inspection.bytes_on_disk)} on disk, {everything.tensors} tensors, "
        f"{everything.numel:,} parameters",
        highlight=False,
    )
    console.print(_tensor_table(inspection) if all_tensors else _block_table(inspection))
    console.print(
        f"[bold]{prunable.sparsity:.2%}[/bold] of {prunable.numel:,} prunable weights in {prunable.tensors} "
        f"tensors are zero ({everything.sparsity:.2%} of all parameters); {_pattern_line(inspection)}",
        highlight=False,
    )
    if inspection.masks is not None:
        console.print(_mask_line(inspection), highlight=False)


def _pattern_line(inspection: Inspection) -> str:
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
            f"zero, in {len(wrong)} tensors such as {_escape(wrong[0])}"
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
    title = f"Sparsity by block of {stack[:-1]}" if stack else "Sparsity by block"
    table = Table(title=_escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("block", no_wrap=True, justify="right" if stack else "left")
    wide = 1 < len(kinds) <= 8
    if wide:
        for kind in kinds:
            table.add_column(kind.removesuffix("_proj"), justify="right")
    else:
        table.add_column("weights", justify="right")
    table.add_column("total", justify="right", style="bold")
    for block, totals in inspection.blocks().items():
        cells = [f"{totals.numel:,}"]
        if wide:
            here = {k: _totals([t for t in chosen if t.block == block and t.kind == k]) for k in kinds}
            cells = [f"{h.sparsity:.1%}" if h.tensors else "" for h in here.values()]
        table.add_row(_escape(block.removeprefix(stack)) or "other", *cells, f"{totals.sparsity:.2%}")
    return table


def _tensor_table(inspection: Inspection) -> Table:
    table = Table(title="Tensors", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("name", overflow="fold")
    for column in ("shape", "dtype", "zeros", "sparsity", "N:M", "prunable"):
        table.add_column(column, justify="right", no_wrap=column != "dtype")
    for t in inspection.tensors:
        name = f"{t.name} (= {t.tied_to})" if t.tied_to else t.name
        table.add_row(
            _escape(name),
            "x".join(map(str, t.shape)) or "scalar",
            t.dtype,
            f"{t.zeros:,}",
            f"{t.sparsity:.2%}",
            t.pattern or "",
            "yes" if t.prunable else "",
        )
    return table


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
