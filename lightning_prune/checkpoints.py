"""Open a checkpoint of any format without running what is in it, and read its tensors one at a time.

Safetensors files, ``torch.load(weights_only=True)``, and an allow-list of types for the index of a distributed
checkpoint. Memory stays that of the largest tensor: files are mapped, and shards put together tensor by tensor.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint cannot be read: missing, damaged, of an unknown format, or not safe to open."""


@dataclass
class Checkpoint:
    """An opened checkpoint. Nothing of its tensors is read before they are asked for.

    Attributes:
        path: The path that was opened.
        format: ``"safetensors"``, ``"state dict"``, ``"Lightning checkpoint"``, ``"distributed checkpoint"``.
        files: The files that hold the tensors.
        count: Number of tensors.
        entries: Call it for names and functions that load the tensor; `tensors` turns their errors into sentences.
        callbacks: States of Lightning callbacks.
        hyper_parameters: Those of the LightningModule.
        data_hyper_parameters: Those of the LightningDataModule.
        progress: Of a Lightning checkpoint ``epoch``, ``global_step`` and the version ``lightning``.
        config: Configuration of the transformers model, from ``config.json`` or the hyper-parameters.
        ties: Name to the name of an earlier tensor that is the same memory.
    """

    path: Path
    format: str
    files: list[Path]
    count: int
    entries: Callable[[], Iterator[tuple[str, Callable[[], Tensor]]]]
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    data_hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str | None:
        """The family of the transformers model, such as ``"llama"``, or None if the checkpoint does not say."""
        model_type = self.config.get("model_type")
        return model_type if isinstance(model_type, str) else None

    def names(self) -> list[str]:
        """Names of all tensors, in the order of the files."""
        return [name for name, _ in self.entries()]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, in the order of the files; drop each tensor before asking for the next.

        Raises:
            CheckpointError: naming a tensor that cannot be read.
        """
        for name, load in self.entries():
            yield name, self._load(name, load)  # no name of its own here, which would keep the tensor alive

    def load(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some of the tensors, by name; names that the checkpoint does not have are left out.

        Raises:
            CheckpointError: naming a tensor that cannot be read.
        """
        return {name: self._load(name, load) for name, load in self.entries() if name in names}

    def _load(self, name: str, load: Callable[[], Tensor]) -> Tensor:
        with readable(self.path, name):
            return load()

    def take_extras(self, stored: Mapping[str, Any]) -> None:
        """Take from what Lightning stores beside the tensors what says more about them."""
        self.callbacks = _mapping(stored.get("callbacks"))
        self.hyper_parameters = _mapping(stored.get("hyper_parameters"))
        self.data_hyper_parameters = _mapping(stored.get("datamodule_hyper_parameters"))
        self.config = _mapping(self.hyper_parameters.get("config"))
        keys = {"epoch": "epoch", "global_step": "global_step", "lightning": "pytorch-lightning_version"}
        self.progress = {name: stored[key] for name, key in keys.items() if isinstance(stored.get(key), (int, str))}


def open_checkpoint(path: str | Path, argument: str = "path") -> Checkpoint:
    """Open a checkpoint of any format; the files are checked, and tensors read when asked for.

    Args:
        path: A transformers folder (safetensors or ``pytorch_model.bin``, sharded or not), a ``.safetensors``
            file, a Lightning ``.ckpt``, a state dict saved by ``torch.save``, or the folder of a distributed
            checkpoint (``torch.distributed.checkpoint``, Lightning's FSDP and ModelParallel strategies).
        argument: What the caller's user calls `path`, for the error.

    Raises:
        CheckpointError: the path does not exist, is damaged, or is of none of these formats.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(
            f"{argument}={str(path)!r} does not exist; give a checkpoint file or folder on this machine "
            "(models of the Hugging Face hub must be downloaded first)"
        )
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path])
    if path.suffix == ".gguf":
        fail(
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


def _open_folder(folder: Path) -> Checkpoint:
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
        checkpoint = _open_torch(folder / "pytorch_model.bin")
        checkpoint.config = _read_config(folder)
        return checkpoint
    checkpoints = sorted(folder.glob("*.ckpt")) + sorted(folder.glob("*.bin"))
    hint = f"; did you mean {str(checkpoints[0])!r}?" if checkpoints else ""
    fail(
        folder,
        "is a folder without model.safetensors, pytorch_model.bin, an index of shards, or the .metadata of a "
        f"distributed checkpoint{hint}",
    )


def _read_config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _mapping(config)


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping in place of anything else that a file may hold there."""
    return value if isinstance(value, Mapping) else {}


def _open_index(index: Path) -> Checkpoint:
    with readable(index):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        owners = Counter({str(shard): 0 for shard in weight_map.values()})
        owners.update(weight_map.values())
    files = [index.parent / shard for shard in owners]
    for file in files:
        if file.parent != index.parent:
            fail(index, f"names a shard outside of its folder: {file}")
        if not file.is_file():
            fail(index, f"names the shard {file.name}, which is missing; download or copy it again")
    if files and files[0].suffix != ".safetensors":
        return _open_bin_shards(index, files)
    checkpoint = _open_safetensors(index.parent, files)
    _same_names(index, set(weight_map), set(checkpoint.names()))
    return checkpoint


def _same_names(index: Path, expected: set[str], found: set[str]) -> None:
    missing = sorted(expected - found)
    if missing:
        fail(index, f"lists {len(missing)} tensors that the shards do not hold, such as {missing[0]!r}")


def _open_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    count = 0
    for file in files:
        with readable(file), safe_open(file, framework="pt") as handle:
            count += len(handle.keys())

    def entries() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for file in files:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 -- not a dict
                    yield name, partial(handle.get_tensor, name)

    config = _read_config(files[0].parent) if files else {}
    return Checkpoint(path, "safetensors", files, count, entries, config=config)


def _torch_load(path: Path) -> Any:
    """Load without running code from the file; mapped into memory: a tensor is read when looked at."""
    with readable(path):
        # Only the zip format can be mapped; files written before torch 1.6 are read whole.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _open_torch(path: Path) -> Checkpoint:
    loaded = _torch_load(path)
    if not isinstance(loaded, Mapping):
        fail(path, f"holds a {type(loaded).__name__}, not a state dict or a Lightning checkpoint")
    is_lightning = "pytorch-lightning_version" in loaded
    state = loaded
    for key in ("state_dict", "model", "module"):
        if isinstance(loaded.get(key), Mapping):
            state = loaded[key]
            break
    checkpoint = _from_state_dicts(path, [path], [state])
    if is_lightning:
        checkpoint.format = "Lightning checkpoint"
        checkpoint.take_extras(loaded)
    return checkpoint


def _open_bin_shards(index: Path, files: list[Path]) -> Checkpoint:
    checkpoint = _from_state_dicts(index.parent, files, [_torch_load(file) for file in files])
    checkpoint.config = _read_config(index.parent)
    return checkpoint


def _from_state_dicts(path: Path, files: list[Path], states: list[Mapping[str, Any]]) -> Checkpoint:
    found = {n: t for state in states for n, t in state.items() if isinstance(t, Tensor)}
    if not found:
        fail(path, "holds no tensors at its top level, nor under 'state_dict', 'model' or 'module'")
    # Two names of one memory are one parameter (tied embeddings). Empty tensors have no memory to share.
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in found.items():
        if tensor.layout == torch.strided and tensor.numel():
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            original = first.setdefault(memory, name)
            if original != name:
                ties[name] = original

    def entries() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for name, tensor in found.items():
            yield name, tensor.detach

    return Checkpoint(path, "state dict", files, len(found), entries, ties=ties)


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


def _open_distributed(folder: Path) -> Checkpoint:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    with readable(folder / ".metadata"), (folder / ".metadata").open("rb") as stream:
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
    sizes: dict[str, int] = {}
    for info in stored.values():  # also those of optimizers: a shorter file is a damaged checkpoint
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    files = [_inside(folder, name) for name in sorted(sizes)]
    for file in files:
        if file.stat().st_size < sizes[file.relative_to(folder).as_posix()]:
            fail(file, "is cut off; copy it again")

    def entries_of_model() -> Iterator[tuple[str, Callable[[], Tensor]]]:
        for short, name in wanted.items():
            yield short, partial(_distributed_tensor, folder, name, entries[name], stored)

    checkpoint = Checkpoint(folder, "distributed checkpoint", files, len(wanted), entries_of_model)
    meta = folder / "meta.pt"  # Lightning's: epoch, callbacks and all that is not sharded
    if meta.is_file():
        checkpoint.take_extras(_mapping(_torch_load(meta)))
    return checkpoint


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
        fail(folder, f"its .metadata names a file outside of the folder: {name!r}")
    if not file.is_file():
        fail(folder, f"its .metadata names {name!r}, which is missing; copy the whole folder")
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
            fail(folder, f"{name!r} is compressed ({', '.join(info.transform_descriptors)}), which is not read")
        with _inside(folder, info.relative_path).open("rb") as file:
            data = _slice(file, info.offset, info.length)
        part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[region].copy_(part)
        filled += part.numel()
    if filled != whole.numel():
        fail(folder, f"{name!r} is stored with {filled} of its {whole.numel()} elements")
    return whole


def _slice(file: BinaryIO, offset: int, length: int) -> bytes:
    missing = offset + length - file.seek(0, io.SEEK_END)
    if missing > 0 or min(offset, length) < 0:
        raise EOFError(f"{Path(file.name).name} ends {missing} bytes early")
    file.seek(offset)
    return file.read(length)


# -- errors -----------------------------------------------------------------------------------------------------------


def fail(path: Path, problem: str) -> NoReturn:
    """Raise a `CheckpointError` that begins with the path."""
    raise CheckpointError(f"{path}: {problem}")


@contextlib.contextmanager
def readable(path: Path, name: str | None = None) -> Iterator[None]:
    """Turn whatever a damaged or hostile file provokes into one sentence that says which file it is."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise CheckpointError(
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
        raise CheckpointError(
            f"{path}{what} is damaged, cut off, or of another format: {reason}; copy or download it again"
        ) from error
