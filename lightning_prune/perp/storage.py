"""Adapters on disk: safetensors, and a configuration that nothing but `load_adapter` takes for its own.

Three files. Their names and contents are chosen so that no other program mistakes the adapter for a plain LoRA, which
would give wrong outputs and, merged, fill the zeros:

- ``adapter_config.json``, where PEFT looks: its ``peft_type`` is one that PEFT does not know, so it stops;
- ``perp_adapter.safetensors``: the adapters' matrices, and the trained norms, biases, head and embeddings;
- ``perp_masks.safetensors``: the masks, one bit a weight, with check sums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_prune.masks import Masks, pack_masks, unpack_masks
from lightning_prune.perp.adapters import adapter_masks, add_adapters, remove_adapters, trained_state
from lightning_prune.perp.model import plain_model, retraining_of
from lightning_prune.progress import is_main_process
from lightning_prune.sharding import gather_whole

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "perp_adapter.safetensors"
MASKS_FILE = "perp_masks.safetensors"
# PEFT names an unknown type in its error, so the type says what to do.
PEFT_TYPE = "LIGHTNING_PRUNE_PERP: load this adapter with lightning_prune.perp.load_adapter"
_VERSION = 1


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the adapters, their masks and the trained parts of a model, without the model.

    PEFT refuses to load the folder (``KeyError: 'LIGHTNING_PRUNE_PERP: ...'``); `load_adapter` does.
    In a distributed run the first process writes; where the model is sharded every process must call.

    Args:
        model: A model of `add_adapters`.
        folder: Created if it does not exist; files of an earlier adapter are replaced.

    Raises:
        ValueError: the model is none of `add_adapters`, or `folder` is a file.
    """
    record = retraining_of(model)
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder")
    state = {name: gather_whole(tensor).contiguous().clone() for name, tensor in trained_state(model).items()}
    packed = pack_masks(adapter_masks(model))
    if not is_main_process():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": PEFT_TYPE,
        "base_model_name_or_path": getattr(plain_model(model), "name_or_path", None) or None,
        "perp": {
            "version": _VERSION,
            "adapter": record.adapter,
            "train": list(record.train),
            "options": {k: sorted(v) if isinstance(v, set) else v for k, v in record.options.items()},
        },
    }
    text = json.dumps(config, indent=2)  # before anything is written: an option may not be serialisable
    bits = {name: entry["bits"] for name, entry in packed.items()}
    shapes = {name: json.dumps([entry["shape"], entry["crc32"]]) for name, entry in packed.items()}
    # The configuration goes last: without it the folder is no adapter.
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _replace(folder / WEIGHTS_FILE, lambda path: save_file(state, path, {"format": "pt"}))
    _replace(folder / MASKS_FILE, lambda path: save_file(bits, path, {"format": "pt", **shapes}))
    _replace(folder / CONFIG_FILE, lambda path: path.write_text(text))


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
        ValueError: the folder holds another kind of adapter, is damaged, or belongs to a model with other shapes or
            other zeros. The model is as it was then.
    """
    folder = Path(folder)
    settings = _read_config(folder)
    weights, masks = _read_tensors(folder / WEIGHTS_FILE), _read_masks(folder / MASKS_FILE)
    try:
        built = add_adapters(model, settings["adapter"], masks, settings["train"], **settings["options"])
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
        config = json.loads(path.read_text())
        kind, settings = config["peft_type"], config.get("perp")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error!r}") from error
    if kind != PEFT_TYPE or not isinstance(settings, dict):
        raise ValueError(
            f"{str(folder)!r} holds an adapter of type {kind!r}, not of save_adapter; load it with "
            "peft.PeftModel.from_pretrained"
        )
    if settings.get("version") != _VERSION:
        raise ValueError(
            f"{str(path)!r} has version {settings.get('version')!r}, not {_VERSION}; update lightning-prune"
        )
    if not isinstance(settings.get("options"), dict) or not isinstance(settings.get("train"), list):
        raise ValueError(f"{str(path)!r} is damaged: 'options' or 'train' is missing")
    targets = settings["options"].get("target_modules", [])
    # Written as a list of names always; a string would be run as a regular expression.
    if not isinstance(targets, list) or "adapter" not in settings:
        raise ValueError(f"{str(path)!r} is damaged: 'target_modules' is no list of names, or 'adapter' is missing")
    return settings


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is missing: the adapter was not saved completely")
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def _read_masks(path: Path) -> Masks:
    bits = _read_tensors(path)
    with safe_open(path, "pt") as file:
        shapes = file.metadata() or {}
    state: dict[str, Any] = {}
    for name, tensor in bits.items():
        try:
            shape, crc32 = json.loads(shapes[name])
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"the saved mask of {name!r} is damaged: {error!r}") from error
        state[name] = {"bits": tensor, "shape": shape, "crc32": crc32}
    return unpack_masks(state)
