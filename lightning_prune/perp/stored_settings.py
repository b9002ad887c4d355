"""How an adapter was made, as its file says it: plain values within limits, and no pattern that PEFT would run.

PEFT takes keys of ``rank_pattern`` and ``alpha_pattern``, and any string among the options that select modules, for
regular expressions. One written to hang would hang whoever loads the adapter. So files name every layer, and what does
not is refused.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune.perp.layers import sparse_layers
from lightning_prune.perp.model import retraining_of
from lightning_prune.perp.options import DEFAULT_RANK, check_options, is_scaling
from lightning_prune.perp.selection import check_parts
from lightning_prune.perp.variants import find_variant

VERSION = 1
_PLAIN = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights")
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Written by older versions. They have selected the layers, which are named; run again they could only do harm.
_SELECTING = ("exclude_modules", "layers_to_transform", "layers_pattern")


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What `load_adapter` needs to make a model's adapters again, with every layer under its name."""
    record = retraining_of(model)
    options = {name: record.options[name] for name in _PLAIN if name in record.options}
    layers = dict(sparse_layers(model))
    if layers:
        rank = record.options.get("r", DEFAULT_RANK)
        alpha = record.options.get("lora_alpha", 2 * rank)
        ranks = {name: next(iter(layer.r.values())) for name, layer in layers.items()}
        alphas = {name: next(iter(layer.lora_alpha.values())) for name, layer in layers.items() if layer.scaled}
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

    Args:
        settings: As read.
        where: The file, for errors.

    Raises:
        ValueError: saying what is wrong.
    """
    if settings.get("version") != VERSION:
        raise ValueError(f"{where} has version {settings.get('version')!r}, not {VERSION}; update lightning-prune")
    if "crc32" in settings and settings["crc32"] != check_sum(settings):
        raise ValueError(f"{where} is damaged, or was changed by hand: its check sum is another; save the adapter anew")
    options, adapter = settings.get("options"), settings.get("adapter")
    if not isinstance(options, dict) or not isinstance(settings.get("train"), list):
        raise ValueError(f"{where} is damaged: 'options' or 'train' is missing")
    targets = options.get("target_modules", [])
    if "adapter" not in settings or not _are_names(targets) or bool(targets) != (adapter is not None):
        raise ValueError(f"{where} is damaged: 'target_modules' is no list of names, or 'adapter' is missing")
    unknown = sorted(options.keys() - {*_PLAIN, *_PATTERNS, *_SELECTING, "target_modules"}, key=repr)
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
    there = {name for name, _ in model.named_modules()}
    strange = [name for name in targets if name not in there]
    if strange:
        raise ValueError(
            f"{strange[0]!r} of {where} is no module of {type(model).__name__}: the adapter belongs to another model"
        )
    rank = options.get("r", DEFAULT_RANK)
    ranks = _by_layer(options, "rank_pattern", targets, where)
    alphas = _by_layer(options, "alpha_pattern", targets, where) if find_variant(settings["adapter"]).scaled else {}
    for name in targets:
        stored = weights.get(f"{name}.lora_A")
        if stored is not None and (stored.dim() != 2 or stored.shape[0] != ranks.get(name, rank)):
            raise ValueError(
                f"{where} gives {name!r} the rank {ranks.get(name, rank)}, but the adapter's matrix has shape "
                f"{tuple(stored.shape)}: it is damaged, or belongs to another model"
            )
    return {
        **{name: options[name] for name in _PLAIN if name in options},
        "target_modules": list(targets),
        **({"rank_pattern": {re.escape(n): v for n, v in ranks.items()}} if ranks else {}),
        **({"alpha_pattern": {re.escape(n): v for n, v in alphas.items()}} if alphas else {}),
    }


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _by_layer(options: Mapping[str, Any], field: str, targets: Collection[str], where: str) -> dict[str, Any]:
    """Values of a pattern for the layers it names, by whole names or their ends; nothing is run."""
    pattern = options.get(field) or {}
    if not isinstance(pattern, dict) or len(pattern) > len(targets):
        raise ValueError(f"{where} is damaged: {field!r} must give numbers to layers, at most one to each")
    values = {}
    for key, value in pattern.items():
        name = re.sub(r"\\(.)", r"\1", key)
        if key != re.escape(name) and not re.fullmatch(r"[\w.-]+", key):
            raise ValueError(
                f"{where} has the regular expression {key!r} in {field!r}, which is not run, since it may be written "
                "to hang: save the adapter anew, which names every layer"
            )
        whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if not (whole if field == "rank_pattern" else is_scaling(value)):
            raise ValueError(f"{where} has {value!r} for {name!r} in {field!r}, which is out of range")
        values[name] = value
    found = {}
    for target in targets:
        parts = target.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        end = next((end for end in ends if end in values), None)
        if end is not None:
            found[target] = values[end]
    return found
