"""Write and read adapters: safetensors, and a configuration that nothing but `load_adapter` takes for its own.

Three files. Their names and contents are chosen so that no other program mistakes the adapter for a plain LoRA, which
would give wrong outputs and, merged, fill the zeros:

- ``adapter_config.json``, where PEFT looks: its ``peft_type`` is one that PEFT does not know, so it stops;
- ``perp_adapter-*.safetensors``: the adapters' matrices, and the trained norms, biases, head and embeddings;
- ``perp_masks-*.safetensors``: the masks, one bit a weight, with check sums.

The configuration names the two others, and what they hold: their names are part of their check sums. So one step, in
which the configuration is replaced, puts a new adapter in the place of an old one, and a folder is at no moment without
one of them, whatever is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_prune.naming import clean_path
from lightning_prune.perp.layers import find_variant, sparse_layers
from lightning_prune.perp.options import DEFAULT_RANK, WholeNames, check_options, check_parts, is_scaling, nameable
from lightning_prune.perp.record import retraining_of
from lightning_prune.pruning.masks import Masks, unpack_masks
from lightning_prune.safety import publish

CONFIG_FILE = "adapter_config.json"
# PEFT names an unknown type in its error, so the type says what to do.
PEFT_TYPE = "LIGHTNING_PRUNE_PERP: load this adapter with lightning_prune.perp.load_adapter"
_FILES = ("adapter", "masks")
_OURS = re.compile(r"\.?perp_(adapter|masks)(-[0-9a-f]{16})?\.safetensors(\.new)?")


def write_named(folder: Path, stem: str, write: Callable[[Path], Any]) -> dict[str, str]:
    """Write a file under a name that its contents give, and return what the configuration says of it."""
    temporary = folder / f".{stem}.safetensors.new"
    write(temporary)
    digest = _digest(temporary)
    path = folder / f"{stem}-{digest[:16]}.safetensors"
    replace_file(path, lambda new: os.replace(temporary, new))
    return {"name": path.name, "sha256": digest}


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole, onto the disk, and put it in its place in one step."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        write(temporary)
        publish(temporary)
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


def remove_unnamed(folder: Path) -> None:
    """Remove what the configuration does not name: files of the adapter before, or of an attempt that failed."""
    try:
        named = {file["name"] for file in files_of(read_config(folder), folder).values()}
    except (OSError, ValueError):
        return
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in named:
            path.unlink(missing_ok=True)


def check_state(folder: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not those of the model."""
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


def read_config(folder: Path) -> dict[str, Any]:
    """Read the configuration, and refuse another program's."""
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


def files_of(settings: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """Return names and digests of the files that the configuration names."""
    try:
        files = {what: dict(settings["files"][what]) for what in _FILES}
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
    if _digest(path) != file["sha256"]:
        raise ValueError(f"{str(path)!r} is damaged: its check sum is another; take another copy")
    return path


def read_tensors(folder: Path, file: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of a file whose check sum is right."""
    path = _checked_file(folder, file)
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error


def read_masks(folder: Path, file: Mapping[str, Any], model: nn.Module) -> Masks:
    """Read the masks of a file whose check sum is right."""
    bits = read_tensors(folder, file)
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


VERSION = 1
_PLAIN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What `load_adapter` needs to make a model's adapters again, with every layer under its name."""
    record = retraining_of(model)
    options = {name: record.options[name] for name in _PLAIN if name in record.options}
    layers = dict(sparse_layers(model))
    if layers:
        rank = record.options.get("r", DEFAULT_RANK)
        alpha = record.options.get("lora_alpha", 2 * rank)
        ranks = {name: next(iter(layer.r.values())) for name, layer in layers.items()}
        alphas = {n: next(iter(layer.lora_alpha.values())) for n, layer in layers.items() if layer.variant.scaled}
        options["target_modules"] = sorted(layers)
        options["rank_pattern"] = {re.escape(name): value for name, value in ranks.items() if value != rank}
        options["alpha_pattern"] = {re.escape(name): value for name, value in alphas.items() if value != alpha}
    return {"version": VERSION, "adapter": record.adapter, "train": list(record.train), "options": options}


def check_sum(settings: Mapping[str, Any]) -> int:
    """CRC of settings, in which a changed digit would go unseen."""
    kept = {name: value for name, value in settings.items() if name != "crc32"}
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def checked_settings(settings: Mapping[str, Any], where: str) -> None:
    """Refuse settings that are damaged, or of another version.

    Raises:
        ValueError: saying what is wrong.
    """
    if settings.get("version") != VERSION:
        raise ValueError(f"{where} has version {settings.get('version')!r}, not {VERSION}; update lightning-prune")
    if settings.get("crc32") != check_sum(settings):
        raise ValueError(f"{where} is damaged, or was changed by hand: its check sum is another; save the adapter anew")
    options, adapter = settings.get("options"), settings.get("adapter")
    if not isinstance(options, dict) or not isinstance(settings.get("train"), list):
        raise ValueError(f"{where} is damaged: 'options' or 'train' is missing")
    targets = options.get("target_modules", [])
    if "adapter" not in settings or not _are_names(targets) or bool(targets) != (adapter is not None):
        raise ValueError(f"{where} is damaged: 'target_modules' is no list of names, or 'adapter' is missing")
    unknown = sorted(options.keys() - {*_PLAIN, *_PATTERNS, "target_modules"}, key=repr)
    if unknown:
        raise ValueError(f"{where} has the option {unknown[0]!r}, which no adapter of save_adapter has")
    try:
        check_parts(settings["train"])
        check_options(adapter, {k: v for k, v in options.items() if k in _PLAIN})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: {error}") from error


def options_for(
    model: nn.Module, settings: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> dict[str, Any]:
    """The options of `add_adapters` that give each layer what the file says, and no more.

    Args:
        model: To get the adapters.
        settings: That `checked_settings` has passed.
        weights: Tensors of the file. Ranks have to be theirs, so that nothing larger than the file is made.
        where: The file, for errors.

    Raises:
        ValueError: a pattern, a number out of range, or a layer that the model does not have.
    """
    options = settings["options"]
    targets = options.get("target_modules", [])
    if not targets:
        return {}
    there = {clean_path(name) for name, _ in nameable(model)}
    strange = [name for name in targets if name not in there]
    if strange:
        raise ValueError(
            f"{strange[0]!r} of {where} is no module of {type(model).__name__}: the adapter belongs to another model"
        )
    rank = options.get("r", DEFAULT_RANK)
    patterns = {field: options.get(field) or {} for field in _PATTERNS}
    for field, pattern in patterns.items():
        _check_pattern(field, pattern, targets, where)
    if not find_variant(settings["adapter"]).scaled:
        del patterns["alpha_pattern"]
    for name in targets:
        stored, told = weights.get(f"{name}.lora_A"), patterns["rank_pattern"].get(re.escape(name), rank)
        if stored is not None and (stored.dim() not in (2, 3) or stored.shape[-2] != told):  # of experts a stack
            raise ValueError(
                f"{where} gives {name!r} the rank {told}, but the adapter's matrix has shape "
                f"{tuple(stored.shape)}: it is damaged, or belongs to another model"
            )
    return {
        **{name: options[name] for name in _PLAIN if name in options},
        "target_modules": WholeNames(targets),
        **{field: pattern for field, pattern in patterns.items() if pattern},
    }


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _check_pattern(field: str, pattern: Any, targets: Collection[str], where: str) -> None:
    """Refuse numbers of layers that are out of range, and patterns that are no layer's whole name: PEFT runs them."""
    names = {re.escape(name) for name in targets}
    if not isinstance(pattern, dict) or not pattern.keys() <= names:
        raise ValueError(
            f"{where} is damaged: {field!r} must give numbers to layers of 'target_modules', each by its whole name; a "
            "regular expression is not run, since it may be written to hang"
        )
    for name, value in pattern.items():
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole if field == "rank_pattern" else is_scaling(value)):
            raise ValueError(f"{where} has {value!r} for {name!r} in {field!r}, which is out of range")
