"""Adapters on disk: safetensors, and a configuration that nothing but `load_adapter` takes for its own.

Three files. Their names and contents are chosen so that no other program mistakes the adapter for a plain LoRA, which
would give wrong outputs and, merged, fill the zeros:

- ``adapter_config.json``, where PEFT looks: its ``peft_type`` is one that PEFT does not know, so it stops;
- ``perp_adapter-*.safetensors``: the adapters' matrices, and the trained norms, biases, head and embeddings;
- ``perp_masks-*.safetensors``: the masks, one bit a weight, with check sums.

The configuration names the two others, and what they hold: their names are part of their check sums. So one step, in
which the configuration is replaced, puts a new adapter in the place of an old one, and a folder is at no moment without
one of them, whatever is killed. Folders of older versions have names without check sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_prune.masks import Masks, pack_masks, unpack_masks
from lightning_prune.perp.adapters import adapter_masks, add_adapters, remove_adapters, trained_state
from lightning_prune.perp.model import plain_model, retraining_of
from lightning_prune.perp.stored_settings import check_sum, checked_settings, options_for, settings_of
from lightning_prune.progress import is_main_process
from lightning_prune.sharding import gather_whole

CONFIG_FILE = "adapter_config.json"
# PEFT names an unknown type in its error, so the type says what to do.
PEFT_TYPE = "LIGHTNING_PRUNE_PERP: load this adapter with lightning_prune.perp.load_adapter"
_OLD_NAMES = {"adapter": "perp_adapter.safetensors", "masks": "perp_masks.safetensors"}
_OURS = re.compile(r"\.?perp_(adapter|masks)(-[0-9a-f]{16})?\.safetensors(\.new)?")


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the adapters, their masks and the trained parts of a model, without the model.

    PEFT refuses to load the folder (``KeyError: 'LIGHTNING_PRUNE_PERP: ...'``); `load_adapter` does.
    In a distributed run the first process writes; where the model is sharded every process must call.

    Args:
        model: A model of `add_adapters`.
        folder: Created if it does not exist; an earlier adapter in it is replaced in one step. Whatever happens
            meanwhile, the folder holds the old adapter or the new one.

    Raises:
        ValueError: the model is none of `add_adapters`, or `folder` is a file.
    """
    retraining_of(model)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder")
    state = {name: gather_whole(tensor).contiguous().clone() for name, tensor in trained_state(model).items()}
    packed = pack_masks(adapter_masks(model))
    if not is_main_process():
        return
    settings = settings_of(model)
    json.dumps(settings)  # before anything is written: an option may not be serialisable
    bits = {name: entry["bits"] for name, entry in packed.items()}
    shapes = {name: json.dumps([entry["shape"], entry["crc32"]]) for name, entry in packed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        settings["files"] = {
            "adapter": _write_named(folder, "perp_adapter", lambda path: save_file(state, path, {"format": "pt"})),
            "masks": _write_named(folder, "perp_masks", lambda path: save_file(bits, path, {"format": "pt", **shapes})),
        }
        settings["crc32"] = check_sum(settings)
        name = getattr(plain_model(model), "name_or_path", None) or None
        config = {"peft_type": PEFT_TYPE, "base_model_name_or_path": name, "perp": settings}
        text = json.dumps(config, indent=2)
        _replace(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    finally:
        _remove_unnamed(folder)


def _write_named(folder: Path, stem: str, write: Callable[[Path], Any]) -> dict[str, str]:
    """Write a file beside all others, under a name that no other content has."""
    temporary = folder / f".{stem}.safetensors.new"
    write(temporary)
    digest = _digest(temporary)
    path = folder / f"{stem}-{digest[:16]}.safetensors"
    _replace(path, lambda new: os.replace(temporary, new))
    return {"name": path.name, "sha256": digest}


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole, onto the disk, and put it in its place in one step."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        write(temporary)
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk hold what was written, before anything relies on it; folders where the system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError:  # nor do all file systems flush them
        pass
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _remove_unnamed(folder: Path) -> None:
    """Remove what the configuration does not name: files of the adapter before, or of an attempt that failed."""
    try:
        named = {file["name"] for file in _files_of(_read_config(folder), folder).values()}
    except (OSError, ValueError):
        return
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = True) -> nn.Module:
    """Put a saved adapter on the pruned model that it was trained on.

    Args:
        model: The plain transformers model, pruned as it was then. It is changed in place; use what is returned.
        folder: A folder of `save_adapter`.
        trainable: Let adapters and trained parts require gradients, to train on.

    Returns:
        What `add_adapters` returned when the adapter was made, with its weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another kind of adapter, is damaged (check sums), has regular expressions in its
            settings, or belongs to a model with other shapes or other zeros. The model is as it was then.
    """
    folder = Path(folder)
    settings = _read_config(folder)
    files = _files_of(settings, folder)
    weights, masks = _read_tensors(folder, files["adapter"]), _read_masks(folder, files["masks"], model)
    where = repr(str(folder / CONFIG_FILE))
    options = options_for(model, settings, weights, where)
    try:
        built = add_adapters(model, settings["adapter"], masks, settings["train"], **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapter in {str(folder)!r} does not fit {type(model).__name__}: {error}") from error
    state = trained_state(built)
    try:
        _check_state(folder, state, weights)
    except ValueError:
        remove_adapters(built)
        raise
    for name, tensor in state.items():
        tensor.copy_(weights[name])
    if not trainable:
        built.requires_grad_(False)
    return built


def _check_state(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    wrong = sorted(expected.keys() ^ found.keys())
    if wrong:
        where = "missing from the folder" if wrong[0] in expected else "not in the model"
        raise ValueError(f"{wrong[0]!r} is {where} {str(folder)!r}: the adapter belongs to another model")
    for name, tensor in expected.items():
        if not found[name].is_floating_point():
            raise ValueError(f"{name!r} is {found[name].dtype} in {str(folder)!r}: the file is damaged")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{name!r} has shape {tuple(found[name].shape)} in {str(folder)!r}, but {tuple(tensor.shape)} in the "
                "model: the adapter belongs to another model"
            )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"folder={str(folder)!r} holds no {CONFIG_FILE}; give a folder of save_adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind, settings = config["peft_type"], config.get("perp")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error!r}") from error
    if kind != PEFT_TYPE or not isinstance(settings, dict):
        raise ValueError(
            f"{str(folder)!r} holds an adapter of type {kind!r}, not of save_adapter; load it with "
            "peft.PeftModel.from_pretrained"
        )
    checked_settings(settings, repr(str(path)))
    return settings


def _files_of(settings: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Names and digests of the other files; no digests in folders of older versions."""
    if "files" not in settings:
        return {what: {"name": name, "sha256": None} for what, name in _OLD_NAMES.items()}
    try:
        files = {what: dict(settings["files"][what]) for what in _OLD_NAMES}
        sound = all(_OURS.fullmatch(file["name"]) and isinstance(file["sha256"], str) for file in files.values())
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r} is damaged: 'files' must name the adapter's files")
    return files


def _checked_file(folder: Path, file: Mapping[str, Any]) -> Path:
    path: Path = folder / file["name"]
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing: the adapter was not saved completely")
    if file["sha256"] is not None and _digest(path) != file["sha256"]:
        raise ValueError(f"{str(path)!r} is damaged: its check sum is another; take another copy")
    return path


def _read_tensors(folder: Path, file: Mapping[str, Any]) -> dict[str, Tensor]:
    path = _checked_file(folder, file)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _read_masks(folder: Path, file: Mapping[str, Any], model: nn.Module) -> Masks:
    bits = _read_tensors(folder, file)
    with safe_open(folder / file["name"], "pt") as handle:
        shapes = handle.metadata() or {}
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    state: dict[str, Any] = {}
    for name, tensor in bits.items():
        try:
            shape, crc32 = json.loads(shapes[name])
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"the saved mask of {name!r} is damaged: {error!r}") from error
        if shape != expected.get(name, shape):  # before it is unpacked to a byte for each weight
            raise ValueError(
                f"the mask of {name!r} has shape {shape} in {str(folder)!r}, but the parameter {expected[name]}: the "
                "adapter belongs to another model"
            )
        state[name] = {"bits": tensor, "shape": shape, "crc32": crc32}
    return unpack_masks(state)
