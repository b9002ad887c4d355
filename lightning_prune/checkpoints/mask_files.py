"""Masks alone in a safetensors file: one bit a weight, with shapes and check sums in the file's metadata."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_prune.checkpoints.reading import Checkpoint, open_checkpoint, readable
from lightning_prune.checkpoints.states import StoredMasks
from lightning_prune.errors import CheckpointError, check_bool
from lightning_prune.naming import clean_name
from lightning_prune.pruning.masks import Masks, pack_masks, unpack_masks
from lightning_prune.safety import expanded, publish

_FORMAT = "lightning-prune masks 1"


def save_masks(masks: Mapping[str, Tensor], path: str | Path, **facts: str) -> None:
    """Write masks as packed bits. The file appears whole or not at all; an old one is replaced.

    Where masks are sharded every rank must call, and rank 0 writes.

    Args:
        masks: Bool masks by parameter name, True = kept, as `prune` returns them.
        path: File to write.
        facts: More to store in the file's metadata, such as ``score="gblm"``.

    Raises:
        ValueError: a mask is not bool, or the file cannot be written; an old file is as it was then.
    """
    for name, mask in masks.items():
        if str(mask.dtype) != "torch.bool":
            raise ValueError(
                f"the mask of {name!r} has dtype {mask.dtype}; masks are torch.bool, True = kept (mask.bool())"
            )
    packed = pack_masks(masks)
    if packed or not masks:
        _save(packed, expanded(path, "path"), facts)


def _save(packed: Mapping[str, Any], path: Path, facts: Mapping[str, str]) -> None:
    layout = {name: {"shape": list(entry["shape"]), "crc32": entry["crc32"]} for name, entry in packed.items()}
    metadata = {**facts, "format": _FORMAT, "masks": json.dumps(layout)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target: only within one file system is renaming a single step.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
            new = Path(scratch, path.name)
            save_file({name: entry["bits"] for name, entry in packed.items()}, new, metadata)
            load_masks(new)  # what was written is read again before it counts
            publish(new)
            os.replace(new, path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} cannot be written: {error}; free space or choose another place (what was there is unchanged)"
        ) from error


def load_masks(path: str | Path) -> Masks:
    """Read masks that `save_masks` or ``lightning-prune export --masks_only`` has written.

    Args:
        path: The file.

    Returns:
        Bool masks by parameter name; `lightning_prune.apply_masks` puts them on a model, or refuses another model's.

    Raises:
        CheckpointError: the file does not exist, holds something else, or is damaged.
    """
    path = expanded(path, "path")
    if not path.is_file():
        raise CheckpointError(f"{path} is not an existing file; give a file of masks")
    with readable(path), safe_open(path, framework="pt") as handle:
        metadata = handle.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise CheckpointError(
                f"{path} holds tensors, but no masks; lightning-prune export --masks_only writes them"
            )
        layout = json.loads(metadata["masks"])
        packed = {name: {**entry, "bits": handle.get_tensor(name)} for name, entry in layout.items()}
    try:
        return unpack_masks(packed)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def export_masks(checkpoint: str | Path, output: str | Path, overwrite: bool = False) -> int:
    """Write the masks that `WeightPruning` left in a checkpoint as one file.

    Args:
        checkpoint: A Lightning ``.ckpt`` or the folder of a distributed checkpoint.
        output: File to write, such as ``masks.safetensors``. Masks are named as the parameters of the transformers
            model where the checkpoint is one of `CausalLM`, else as those of the LightningModule.
        overwrite: Replace `output` if it holds masks.

    Returns:
        Number of masks.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or one of its masks is.
        ValueError: it has no masks, or `output` exists, holds other things than masks, or cannot be written.
    """
    check_bool("overwrite", overwrite)
    source, target = open_checkpoint(checkpoint, argument="checkpoint"), expanded(output, "output")
    if target.is_dir() or (target.exists() and not overwrite):
        raise ValueError(
            f"output={str(output)!r} {'is a folder' if target.is_dir() else 'exists'}; give the name of a new file "
            "(masks.safetensors), or replace a file of masks with overwrite=True (--overwrite)"
        )
    if target.exists() and not _may_replace(target):
        raise ValueError(
            f"output={str(output)!r} holds other things than masks, which overwrite would delete; give the name of a "
            "new file, or remove it yourself"
        )
    stored = StoredMasks.of(source)
    if stored is None or not stored.count:
        raise ValueError(
            f"checkpoint={str(source.path)!r} holds no masks: the callback WeightPruning leaves them in Lightning "
            "checkpoints. Zeros are not masks, but score='keep' of WeightPruning takes them for such"
        )
    masks = stored.masks().renamed(lambda name: _name(source, name))
    facts = {"score": stored.score} if stored.score else {}
    save_masks(masks, target, **facts)
    return len(masks)


def _may_replace(file: Path) -> bool:
    """Whether a file is empty or holds masks; no weights, which are safetensors too."""
    try:
        with safe_open(file, framework="pt") as handle:
            return (handle.metadata() or {}).get("format") == _FORMAT
    except SafetensorError:
        return not file.stat().st_size


def _name(source: Checkpoint, name: str) -> str:
    name = clean_name(name)
    return name.removeprefix("model.") if source.model_type else name
