"""Open a checkpoint of any format without running what is in it, and read its tensors one at a time.

Safetensors files, ``torch.load(weights_only=True)``, and an allow-list of types for the index of a distributed
checkpoint. Memory stays that of the largest tensor: files are mapped, and shards put together tensor by tensor. What a
file claims must agree with the bytes it has before memory is taken for it, and check sums, where there are some, are
compared: those of a torch file when it is opened, those of safetensors as each tensor is read.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pickle
import re
import shlex
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_prune.errors import CheckpointError, first_line
from lightning_prune.safety import check_claims, check_records, check_sum, expanded, stored_sums


@dataclass(eq=False)
class Checkpoint(Mapping[str, Tensor]):
    """An opened checkpoint: a mapping of names to tensors, each of which is read when it is asked for.

    Names come in the order of the files. Drop each tensor before you ask for the next, and no two are in memory. Asking
    for one that cannot be read raises a `CheckpointError` that names it.

    Attributes:
        path: The path that was opened.
        format: ``"safetensors"``, ``"state dict"``, ``"Lightning checkpoint"``, ``"distributed checkpoint"``.
        files: The files that hold the tensors.
        loaders: By name what loads the tensor.
        callbacks: States of Lightning callbacks.
        hyper_parameters: Those of the LightningModule.
        data_hyper_parameters: Those of the LightningDataModule.
        progress: Of a Lightning checkpoint ``epoch``, ``global_step`` and the version ``lightning``.
        config: Configuration of the transformers model, from ``config.json`` or the hyper-parameters.
        ties: Name to the name of an earlier tensor that is the same memory.
        summed: Whether tensors have check sums, which are compared as each is read.
    """

    path: Path
    format: str
    files: list[Path]
    loaders: Mapping[str, Callable[[], Tensor]]
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    data_hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    summed: bool = False

    def __getitem__(self, name: str) -> Tensor:
        load = self.loaders[name]
        with readable(self.path, name):
            return load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.loaders)

    def __len__(self) -> int:
        return len(self.loaders)

    def __contains__(self, name: object) -> bool:
        return name in self.loaders

    @property
    def model_type(self) -> str | None:
        """The family of the transformers model, such as ``"llama"``, or None if the checkpoint does not say."""
        model_type = self.config.get("model_type")
        return model_type if isinstance(model_type, str) else None

    @property
    def bytes_on_disk(self) -> int:
        """Size of the files."""
        return sum(file.stat().st_size for file in self.files)

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
    path = expanded(path, argument)
    if not path.exists():
        raise CheckpointError(
            f"{argument}={str(path)!r} does not exist; give a checkpoint file or folder on this machine "
            "(models of the Hugging Face hub must be downloaded first)"
        )
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        fail(path, "is neither a file nor a folder")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [path])
    if path.suffix == ".gguf":
        fail(
            path,
            "GGUF files are not read; load it with transformers and save_pretrained() it to a folder first",
        )
    if _INDEX.search(path.name):
        return _open_index(path)
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file under another name: 8 bytes of header length, then a JSON object.
    if len(head) == 9 and head[8:] == b"{" and not zipfile.is_zipfile(path):
        return _open_safetensors(path, [path])
    return _open_torch(path)


# What transformers reads, in its order: a folder may hold weights twice, or an index of shards that are gone.
_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_VARIANTS = "pytorch_model.*.bin"
# Also of a variant: model.safetensors.index.fp16.json.
_INDEX = re.compile(r"\.index(\.[^.]+)?\.json$")


def _open_folder(folder: Path) -> Checkpoint:
    if (folder / ".metadata").is_file():
        return _open_distributed(folder)
    for file in filter(Path.is_file, (folder / name for name in _NAMES)):
        if _INDEX.search(file.name):
            return _open_index(file)
        if file.suffix == ".safetensors":
            return _open_safetensors(folder, [file])
        return _open_torch(file)
    if len(indices := _files(folder, "*.index.*.json")) == 1:
        return _open_index(indices[0])
    if whole := _files(folder, "*.safetensors"):
        shards = Counter(part.groups() for f in whole if (part := re.fullmatch(r"(.+)-\d+-of-(\d+)", f.stem)))
        for (stem, count), found in shards.items():
            if found != int(count):
                fail(folder, f"holds {found} of the {count} shards {stem}-*.safetensors; download or copy the others")
        return _open_safetensors(folder, whole)
    if len(variants := _files(folder, _VARIANTS)) == 1:
        return _open_torch(variants[0])
    hint = ""
    with contextlib.suppress(OSError):  # of files that come and go while they are looked for
        near = _files(folder, "*.ckpt") + _files(folder, "*.bin") + checkpoints_of_runs(folder)
        near += [config.parent for config in sorted(folder.glob("*/config.json"))]
        hint = f"; did you mean {str(near[0])!r}?" if near else ""
    fail(
        folder,
        "is a folder without model.safetensors, pytorch_model.bin, an index of shards, or the .metadata of a "
        f"distributed checkpoint{hint}",
    )


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(filter(Path.is_file, folder.glob(pattern)))


def checkpoints_of_runs(folder: Path) -> list[Path]:
    """Find the checkpoints of runs in a folder (``lightning_logs``, or one above it), the newest first."""
    found = [path for above in ("", "*/", "*/*/", "*/*/*/") for path in folder.glob(f"{above}checkpoints/*.ckpt")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def check_folder(folder: Path) -> None:
    """Read a transformers folder before transformers does: every tensor, where there are check sums, and no code.

    Raises:
        CheckpointError: it is damaged, or its configuration names a kernel of the hub, which would be fetched and run.
    """
    check_config(folder)
    if weights := _files(folder, "*.safetensors") + _files(folder, "pytorch_model*"):
        if not any((folder / name).is_file() for name in _NAMES):
            name = min(file.name for file in weights)
            fail(
                folder,
                f"holds weights by a name that transformers does not look for by itself, {name} (a variant?); write "
                f"a folder that it loads first: lightning-prune export {shlex.quote(str(folder))} FOLDER",
            )
        opened = _open_folder(folder)
        if opened.summed:
            for _ in opened.values():
                pass


def check_config(folder: Path) -> None:
    """Read the configuration of a transformers folder before transformers does.

    Raises:
        CheckpointError: it is damaged, or names a kernel of the hub; or it is an adapter's.
    """
    check_no_adapter(folder)
    check_no_kernel(folder / "config.json", _read_config(folder))


def check_no_adapter(folder: Path) -> None:
    """Refuse a folder with an adapter of PEFT: transformers would put that on a model which it names, and freeze all.

    Raises:
        CheckpointError: there is one.
    """
    if (folder / "adapter_config.json").is_file():
        whole = (folder / "config.json").is_file()
        merged = "If the model beside it has it merged, remove the adapter's files (adapter_*). " if whole else ""
        fail(folder, f"holds an adapter (adapter_config.json). {merged}{merge_advice(folder)}")


def merge_advice(adapter: str | Path) -> str:
    """Return how to make a plain model of a folder, or hub id, that holds an adapter."""
    return (
        "Merge it into its model first, into a folder of its own: "
        f"peft.AutoPeftModelForCausalLM.from_pretrained({str(adapter)!r}).merge_and_unload().save_pretrained(FOLDER), "
        "and the tokenizer beside it (an adapter of PERPRetraining: lightning_prune.perp.load_adapter, then merge)"
    )


def check_no_kernel(path: Path | str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that names a kernel of the hub: transformers would fetch it, and run it.

    Raises:
        CheckpointError: beginning with `path`.
    """
    named = [config[key] for key in config if "attn_implementation" in str(key) and "/" in str(config[key])]
    if named:
        fail(Path(path), f"its configuration names the kernel {named[0]!r} of the hub, which is code; take it out")


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        return {}
    with readable(file):
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, Mapping):
            raise TypeError(f"it holds a {type(config).__name__}, not an object")
    return config


def _mapping(value: Any) -> Mapping[str, Any]:
    """The value, or an empty mapping in place of anything else that a file may hold there."""
    return value if isinstance(value, Mapping) else {}


def _open_index(index: Path) -> Checkpoint:
    with readable(index):
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        owners = Counter({str(shard): 0 for shard in weight_map.values()})
        owners.update(weight_map.values())
        if not all(isinstance(name, str) for name in (*weight_map, *owners)):
            raise TypeError("its weight_map is not one of names to names")
    files = [index.parent / shard for shard in owners]
    for file in files:
        if file.parent != index.parent:
            fail(index, f"names a shard outside of its folder: {file}")
        if not file.is_file():
            fail(index, f"names the shard {file.name}, which is missing; download or copy it again")
    binary = bool(files) and files[0].suffix != ".safetensors"
    checkpoint = _open_bin_shards(index, files) if binary else _open_safetensors(index.parent, files)
    missing = sorted(set(weight_map) - set(checkpoint))
    if missing:
        fail(index, f"lists {len(missing)} tensors that the shards do not hold, such as {missing[0]!r}")
    return checkpoint


def _open_safetensors(path: Path, files: list[Path]) -> Checkpoint:
    loaders: dict[str, Callable[[], Tensor]] = {}
    summed = False
    for file in files:
        with readable(file):
            handle: Any = safe_open(file, framework="pt")  # mapped as long as the checkpoint is there
            sums = stored_sums(handle.metadata())
            found = {name: partial(_checked_tensor, handle, name, sums.get(name)) for name in handle.keys()}  # noqa: SIM118
        _check_once(path, loaders, found)
        loaders |= found
        summed |= bool(sums)
    config = _read_config(files[0].parent) if files else {}
    return Checkpoint(path, "safetensors", files, loaders, config=config, summed=summed)


def _check_once(path: Path, known: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    if twice := sorted(map(str, known.keys() & found)):
        fail(path, f"holds {twice[0]!r} in 2 files; name the file, or move the others away")


def _checked_tensor(handle: Any, name: str, expected: int | None) -> Tensor:
    tensor: Tensor = handle.get_tensor(name)
    if expected is not None and check_sum(name, tensor) != expected:
        raise ValueError("its bytes are not those that were written (check sum)")
    return tensor


def _torch_load(path: Path) -> Any:
    """Load without running code from the file; mapped into memory: a tensor is read when looked at."""
    with readable(path):
        with path.open("rb") as file:
            check_records(file)
            file.seek(0)
            head = file.read(2)
        # torch.save writes archives, and before torch 1.6 pickles of protocol 2; cut off ones are torch's to refuse.
        if head and head != b"PK" and head[:1] != pickle.PROTO:
            fail(path, "is no checkpoint: neither a safetensors file nor one that torch.save has written")
        # Only the zip format can be mapped; files written before torch 1.6 are read whole.
        with warnings.catch_warnings():  # torch's about another protocol, beside the error that follows
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        check_claims(loaded, path.stat().st_size)
        return loaded


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
    elif path.name == "pytorch_model.bin" or path.match(_VARIANTS):
        checkpoint.config = _read_config(path.parent)
    return checkpoint


def _open_bin_shards(index: Path, files: list[Path]) -> Checkpoint:
    checkpoint = _from_state_dicts(index.parent, files, [_torch_load(file) for file in files])
    checkpoint.config = _read_config(index.parent)
    return checkpoint


def _from_state_dicts(path: Path, files: list[Path], states: list[Mapping[str, Any]]) -> Checkpoint:
    found: dict[Any, Tensor] = {}
    for state in states:
        own = {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
        _check_once(path, found, own)
        found |= own
    if not found:
        fail(path, "holds no tensors at its top level, nor under 'state_dict', 'model' or 'module'")
    if not all(isinstance(name, str) for name in found):
        fail(path, "holds tensors whose names are no text; it is no state dict")
    # Two names of one memory are one parameter (tied embeddings). Empty tensors have no memory to share.
    first: dict[tuple[Any, ...], str] = {}
    ties = {}
    for name, tensor in found.items():
        if tensor.layout == torch.strided and tensor.numel():
            memory = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            original = first.setdefault(memory, name)
            if original != name:
                ties[name] = original

    return Checkpoint(path, "state dict", files, {name: t.detach for name, t in found.items()}, ties=ties)


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
            ("builtins", "getattr"): _memory_format,
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


def _memory_format(kind: Any, name: str) -> Any:
    """Return a member of the only enumeration in an index; early releases of Python 3.11 pickle it by ``getattr``."""
    from torch.distributed.checkpoint import metadata

    if kind is not metadata._MEM_FORMAT_ENCODING or name not in kind.__members__:
        raise pickle.UnpicklingError(f"refused attribute {name!r} of {kind!r}")
    return kind[name]


def _read_metadata(file: Path) -> Any:
    """The index of a distributed checkpoint."""
    from torch.distributed.checkpoint.metadata import Metadata

    with readable(file), file.open("rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata) or not metadata.storage_data:
            raise pickle.UnpicklingError("no index of tensors")
        return metadata


def check_loads_safely(path: str | Path) -> None:
    """Read what Lightning or torch would unpickle without limits, without running what is in it.

    Of a distributed checkpoint that is the index, and all that is no tensor. Whole files are torch's to check
    (``weights_only``); here only their check sums are compared.

    Args:
        path: A Lightning ``.ckpt``, or the folder of a distributed checkpoint. Addresses other than of the web pass,
            as torch checks what comes from them.

    Raises:
        CheckpointError: it is missing, damaged or not safe to open.
    """
    if "://" in str(path):
        if str(path).startswith("http"):  # Lightning unpickles these without limits
            fail(Path(path), "is an address of the web, and what comes from there could run code; download it first")
        return
    path = expanded(path, "path")
    if path.is_dir():
        _check_parts(path)
        for index in sorted(path.glob("*.metadata")):  # torch also looks for one of each rank
            _check_objects(path, _read_metadata(index))
        path = path / "meta.pt"
        if not path.is_file():
            fail(path.parent, "has no meta.pt, in which Lightning keeps what is not sharded; copy the whole folder")
    elif not path.is_file():
        fail(path, "does not exist; give a Lightning .ckpt, or the folder of a distributed checkpoint")
    with readable(path), path.open("rb") as file:
        check_records(file)


def read_resumable(path: str | Path) -> Mapping[str, Any]:
    """Read a checkpoint as Lightning is about to, but without running what is in it.

    Returns:
        What Lightning stores beside the tensors; of a file the tensors too, mapped. Empty for an address.

    Raises:
        CheckpointError: it is missing, damaged, not safe to open, or no checkpoint of Lightning.
    """
    check_loads_safely(path)
    if "://" in str(path):
        return {}
    path = expanded(path, "path")
    stored = _torch_load(path / "meta.pt" if path.is_dir() else path)
    _check_of_lightning(path, stored)
    return _mapping(stored)


def _check_objects(folder: Path, metadata: Any) -> None:
    """Load what the index lists and is no tensor: torch unpickles these bytes without limits."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if not isinstance(entry, TensorStorageMetadata):
            file = _inside(folder, info.relative_path)
            with readable(file, index.fqn), file.open("rb") as stream:
                _load_part(stream, info)


def _check_of_lightning(path: Path, stored: Any) -> None:
    """Refuse what Lightning would fail on in the midst of a resume."""
    problem = None
    if not isinstance(stored, Mapping):
        problem = f"holds a {type(stored).__name__}"
    elif not isinstance(stored.get("pytorch-lightning_version"), str):
        problem = "does not say which version of Lightning wrote it"
    elif not path.is_dir() and not isinstance(stored.get("state_dict"), Mapping):
        problem = "has no state_dict"
    else:
        kinds: dict[str, Any] = dict.fromkeys(("callbacks", "hyper_parameters", "loops", "state_dict"), Mapping)
        kinds |= dict.fromkeys(("optimizer_states", "lr_schedulers"), list)
        kinds |= dict.fromkeys(("epoch", "global_step"), int)
        wrong = [k for k, kind in kinds.items() if stored.get(k) is not None and not isinstance(stored[k], kind)]
        if wrong:
            problem = f"holds a {type(stored[wrong[0]]).__name__} under {wrong[0]!r}"
    if problem:
        fail(path, f"{problem}, so it is no checkpoint that Lightning can resume from; give one that a Trainer wrote")


def _check_parts(folder: Path) -> tuple[Any, list[Path]]:
    """The index of a distributed checkpoint, and its files, which hold what the index says."""
    if not (folder / ".metadata").is_file():
        fail(folder, "is no distributed checkpoint: it has no .metadata")
    metadata = _read_metadata(folder / ".metadata")
    with readable(folder / ".metadata"):
        sizes: dict[str, int] = {}
        claims: Counter[str] = Counter()
        for info in metadata.storage_data.values():  # also of optimizers: a shorter file is a damaged checkpoint
            sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
            claims[info.relative_path] += info.length
        files = [_inside(folder, name) for name in sorted(sizes)]
        for file in files:
            name, size = file.relative_to(folder).as_posix(), file.stat().st_size
            if size < sizes[name]:
                fail(file, "is cut off; copy it again")
            if size < claims[name]:
                fail(file, f"has {size:,} bytes, and the index claims {claims[name]:,}; copy the folder again")
    return metadata, files


def _open_distributed(folder: Path) -> Checkpoint:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata, files = _check_parts(folder)
    with readable(folder / ".metadata"):
        entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        stored = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        wanted = _model_entries(entries, metadata.planner_data or {})
    loaders = {
        short: partial(_distributed_tensor, folder, name, entries[name], stored) for short, name in wanted.items()
    }
    checkpoint = Checkpoint(folder, "distributed checkpoint", files, loaders)
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
    claimed = math.prod(entry.size) * entry.properties.dtype.itemsize
    if claimed > sum(info.length for info in infos.values()):
        raise EOFError(f"{claimed} bytes are more than its chunks hold")
    whole = torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
    filled = 0
    for chunk in entry.chunks:
        info = infos[tuple(chunk.offsets)]
        if transforms := getattr(info, "transform_descriptors", None):  # torch 2.6 has none
            fail(folder, f"{name!r} is compressed ({', '.join(transforms)}), which is not read")
        with _inside(folder, info.relative_path).open("rb") as file:
            part = _load_part(file, info)
        if tuple(part.shape) != tuple(chunk.sizes):
            fail(folder, f"a part of {name!r} has shape {tuple(part.shape)}, the index says {tuple(chunk.sizes)}")
        region = tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[region].copy_(part)
        filled += part.numel()
    if filled != whole.numel():
        fail(folder, f"{name!r} is stored with {filled} of its {whole.numel()} elements")
    return whole


def _load_part(file: BinaryIO, info: Any) -> Any:
    """What a rank has written at one place of a file."""
    data = io.BytesIO(_slice(file, info.offset, info.length))
    check_records(data)
    part = torch.load(data, map_location="cpu", weights_only=True)
    check_claims(part, info.length)
    return part


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
        object_of = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        reason = f"an object of {object_of[1]}" if object_of else str(error).split(". ")[0].splitlines()[0]
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
        ArithmeticError,
        AssertionError,
        MemoryError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        if os.path.exists(path) and not os.access(path, os.R_OK):  # which safetensors takes for a missing file
            raise CheckpointError(f"{path} may not be read by this user; change its permissions, or copy it") from error
        what = f" (tensor {name!r})" if name else ""
        raise CheckpointError(
            f"{path}{what} is damaged, cut off, or of another format: {first_line(error)}; copy or download it again"
        ) from error


def check_checkpoint_of(trainer: Any) -> None:
    """Have a Trainer's strategy refuse checkpoints that are damaged, or could run code; call it in ``setup``.

    That hook comes before anything is loaded, but the Trainer does not say yet what will be: the strategy's
    ``load_checkpoint`` is wrapped, once. It then raises what `check_loads_safely` does.
    """
    original: Any = trainer.strategy.load_checkpoint
    if getattr(original, "reads_safely", False):
        return

    @wraps(original)
    def load_checkpoint(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        check_loads_safely(checkpoint_path)
        return original(checkpoint_path, *args, **kwargs)

    load_checkpoint.reads_safely = True  # type: ignore[attr-defined]
    trainer.strategy.__dict__["load_checkpoint"] = load_checkpoint
