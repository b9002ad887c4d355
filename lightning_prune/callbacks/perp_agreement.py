"""Refuse to train adapters on that are others than `PERPRetraining` asks for: a checkpoint's, or an earlier fit's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_prune.naming import plain_name
from lightning_prune.perp.adapters import adapters_aside, chosen_modules, head_name
from lightning_prune.perp.convolutions import SparseConvolution
from lightning_prune.perp.layers import SparseLayer, find_variant, sparse_layers
from lightning_prune.perp.options import DEFAULT_RANK, by_pattern
from lightning_prune.perp.record import Retraining, retraining_of

# What adapters must have been made with to be trained on: otherwise the same tensors mean something else.
_SAME = ("adapter", "train", "r", "lora_alpha", "use_rslora")
# And what else they compute and begin with, of which checkpoints say nothing: a resumed fit makes its adapters anew.
_SAME_AT_HAND = {"lora_dropout": 0.0, "init_lora_weights": True}
_INSTEAD = "use the same setting, or merge what is there first"


def settings_of(record: Retraining) -> dict[str, Any]:
    """What has to agree for adapters to be trained on, in plain values."""
    options = record.options
    rank = options.get("r", DEFAULT_RANK) if record.adapter is not None else None
    alpha = None if rank is None or not find_variant(record.adapter).scaled else options.get("lora_alpha", 2 * rank)
    values = (record.adapter, list(record.train), rank, alpha, bool(options.get("use_rslora", False)))
    return dict(zip(_SAME, values, strict=True))


def check_same(found: Mapping[str, Any], mine: Mapping[str, Any], whose: str) -> None:
    """Refuse adapters that were made with other settings, see `settings_of`.

    Raises:
        ValueError: naming the setting.
    """
    for name in mine:
        if found.get(name) != mine[name]:
            raise ValueError(
                f"{whose} made with {name}={found.get(name)!r}, but this PERPRetraining has {mine[name]!r}; {_INSTEAD}"
            )


def check_scalings(saved: Mapping[str, Mapping[str, Any]], model: nn.Module) -> None:
    """Refuse adapters that were scaled otherwise: the same matrices would be another model."""
    for name, layer in sparse_layers(model):
        scaling = layer.combining()["scaling"]
        if name in saved and saved[name]["scaling"] != scaling:
            raise ValueError(
                f"the checkpoint's adapter of {name!r} was scaled by {saved[name]['scaling']:g}, but this "
                f"PERPRetraining scales it by {scaling:g}; use the same alpha_pattern and rank_pattern in lora_options"
            )


def check_left_on(
    model: nn.Module, asked: Retraining, masks: Mapping[str, Tensor], pruned_later: bool, adapt_head: bool
) -> None:
    """Refuse adapters that an earlier fit left on a model, if those that are asked for would be others.

    Dense layers may have some or none: which layers are pruned may have changed since.

    Args:
        model: With adapters.
        asked: What they are to be.
        masks: That they are to get, see `attach`.
        pruned_later: See `attach`; of those that are asked for.
        adapt_head: Whether the output embeddings are to have one.

    Raises:
        ValueError: naming a setting, or a layer.
    """
    record = retraining_of(model)
    check_same(settings_of(record), settings_of(asked), "the module's adapters were")
    if asked.adapter is None:
        return
    there, here = ({n: r.options.get(n, default) for n, default in _SAME_AT_HAND.items()} for r in (record, asked))
    check_same(there, here, "the module's adapters were")
    layers = dict(sparse_layers(model))
    with adapters_aside(model) as plain:
        head = head_name(plain, asked.adapter) if adapt_head else None
        least, most = (
            {plain_name(name) for name in chosen_modules(plain, asked.adapter, asked.options, masks, later, head)}
            for later in (pruned_later, True)
        )
    if differing := (least - layers.keys()) | (layers.keys() - most):
        name = min(differing)
        has, gets = ("an", "none") if name in layers else ("no", "one")
        raise ValueError(
            f"{name!r} has {has} adapter from an earlier fit, and this PERPRetraining asks for {gets} (target_modules, "
            "adapt_head; exclude_modules, layers_to_transform and layers_pattern in lora_options; targets of "
            f"WeightPruning); {_INSTEAD}"
        )
    for name, layer in layers.items():
        _check_numbers(name, layer, asked.options)


def _check_numbers(name: str, layer: SparseLayer, options: Mapping[str, Any]) -> None:
    """Refuse another rank or scaling than options give a layer."""
    names, (a, b) = (name, layer.path(name)), layer.matrices()
    rank = by_pattern(options.get("rank_pattern"), names, options["r"])
    alpha = by_pattern(options.get("alpha_pattern"), names, options.get("lora_alpha", 2 * options["r"]))
    scaling = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    if isinstance(layer, SparseConvolution):
        rank = min(rank, len(b), a.shape[1])  # as it is made; see `put_on_convolution`
    found = layer.combining()["scaling"]
    for what, there, here in (
        ("has the rank", a.shape[-2], rank),
        ("is scaled by", found, found if math.isclose(found, scaling) or not layer.variant.scaled else scaling),
    ):
        if there != here:
            raise ValueError(
                f"the adapter of {name!r} from an earlier fit {what} {there:g}, but this PERPRetraining gives it "
                f"{here:g} (r, lora_alpha; rank_pattern and alpha_pattern in lora_options); {_INSTEAD}"
            )
