"""PEFT's ``LoraConfig`` from the options a user gives, with those refused that would break the zeros."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_prune.perp.layers import CombinedLinear
from lightning_prune.perp.variants import find_variant

# Section 4 and the published settings of arXiv 2312.15230: rank 16, alpha twice the rank.
DEFAULT_RANK = 16
_PASSED = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "use_rslora",
    "init_lora_weights",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
_SCALINGS = ("lora_alpha", "use_rslora", "alpha_pattern")
_INSTEAD = {
    "bias": "train=('bias',)",
    "lora_bias": "train=('bias',)",
    "modules_to_save": "train, any of 'norm', 'head' and 'embedding'",
}


def check_adapter(adapter: object) -> None:
    """Refuse an unknown variant.

    Raises:
        ValueError: none that is known, nor None.
    """
    if adapter is not None:
        find_variant(adapter)


def make_config(adapter: str, options: Mapping[str, Any]) -> LoraConfig:
    """The configuration, with the layer classes of the variant registered.

    Args:
        adapter: The variant.
        options: Fields of LoraConfig. Defaults: ``r=16``, ``lora_alpha=2 * r``.

    Raises:
        TypeError: an option that LoraConfig does not have.
        ValueError: one that does not go with the variant, or a value out of range.
    """
    check_options(adapter, options)
    options = dict(options)
    rank = options.setdefault("r", DEFAULT_RANK)
    options.setdefault("lora_alpha", 2 * rank)
    config = LoraConfig(**options)
    layer = find_variant(adapter)
    config._register_custom_module({nn.Linear: layer, Conv1D: layer})
    return config


def check_options(adapter: str | None, options: Mapping[str, Any]) -> None:
    """Refuse options that do not go with a variant; see `make_config`."""
    if adapter is None and options:
        raise ValueError(f"adapter=None takes no LoRA options, got {sorted(options)}; leave them out")
    for name, value in options.items():
        if name in _PASSED:
            continue
        if name not in LoraConfig.__dataclass_fields__:
            near = difflib.get_close_matches(name, _PASSED, n=1) or [", ".join(_PASSED)]
            raise TypeError(f"{name}={value!r} is no option of LoRA; did you mean {near[0]}?")
        instead = f"use {_INSTEAD[name]}" if name in _INSTEAD else f"the options are {', '.join(_PASSED)}"
        raise ValueError(f"{name}={value!r} is not supported for adapters of a pruned model; {instead}")
    if adapter is None:
        return
    layer = find_variant(adapter)
    rank, dropout = options.get("r", DEFAULT_RANK), options.get("lora_dropout", 0.0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"r={rank!r} must be an integer >= 1, such as {DEFAULT_RANK}")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout={dropout!r} must be a number in [0, 1)")
    if dropout and issubclass(layer, CombinedLinear):
        raise ValueError(
            f"lora_dropout={dropout!r} must be 0 for adapter={adapter!r}: it would drop inputs of the adapter alone, "
            "but adapter and weight are one matrix here; use weight decay, or adapter='lora_prune'"
        )
    init = options.get("init_lora_weights", True)
    if init not in layer.inits:
        raise ValueError(
            f"init_lora_weights={init!r} must be one of {layer.inits} for adapter={adapter!r}; PEFT's others "
            "change the base weights, which would fill their zeros, or need data"
        )
    alpha = options.get("lora_alpha")
    if alpha is not None and not is_scaling(alpha):
        raise ValueError(f"lora_alpha={alpha!r} must be a number above 0, up to 1e6; the default is 2 r")
    for name in _SCALINGS:
        if not layer.scaled and options.get(name):
            raise ValueError(
                f"{name}={options[name]!r} has no effect on adapter={adapter!r}, whose product is not scaled; leave it "
                "out"
            )


def is_scaling(value: object) -> bool:
    """Whether a number can be lora_alpha."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1e6


def match_modules(model: nn.Module, adapter: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the modules that ``target_modules`` and its companions name, as PEFT would find them.

    Raises:
        ValueError: none, or a pattern that cannot be compiled.
    """
    chosen = options["target_modules"]
    if not isinstance(chosen, str) and not (
        isinstance(chosen, (Sequence, set)) and chosen and all(isinstance(name, str) for name in chosen)
    ):
        raise ValueError(f"target_modules={chosen!r} must be a list of module names or a regular expression")
    config = make_config(adapter, {**options, "target_modules": chosen if isinstance(chosen, str) else list(chosen)})
    names = [name for name, _ in model.named_modules() if name]
    try:
        found = [name for name in names if check_target_module_exists(config, name)]
    except re.error as error:
        raise ValueError(f"target_modules={chosen!r} is no regular expression: {error}") from error
    if not found:
        tails = sorted({name.rsplit(".", 1)[-1] for name in names})
        near = [
            n for c in ([chosen] if isinstance(chosen, str) else chosen) for n in difflib.get_close_matches(c, tails)
        ]
        raise ValueError(
            f"target_modules={chosen!r} matches no module of {type(model).__name__}; did you mean "
            f"{', '.join(map(repr, near or tails[:8]))}?"
        )
    return found
