"""The stacks of blocks of transformers models, by what those say of themselves."""

from __future__ import annotations

from torch import nn

from lightning_prune.naming import clean_name, uncompiled
from lightning_prune.pruning.layer_kinds import layer_kind
from lightning_prune.sharding import type_name


def block_classes(model: nn.Module) -> set[str]:
    """Names of the decoder block classes of the transformers models inside `model` (``_no_split_modules``)."""
    return {name for module in model.modules() for name in (getattr(module, "_no_split_modules", None) or ())}


def find_stacks(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The stacks of blocks of the transformers models inside `model`, found by ``_no_split_modules``.

    Encoder-decoders and models that also take images or speech have several.

    Returns:
        Clean name and module of each block, in order, a list for each stack; empty if there are none.
    """
    stacks: list[list[tuple[str, nn.Module]]] = []
    classes, inside = block_classes(model), set[nn.Module]()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and module not in inside and not _has_gaps(module):
            blocks = [
                (clean_name(f"{name}.{i}"), child)
                for i, child in enumerate(module)
                if type_name(uncompiled(child)) in classes
            ]
            if blocks and len(blocks) == len(module):
                stacks.append(blocks)
                inside.update(m for _, block in blocks for m in block.modules())
    return stacks


def likely_stacks(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The outermost lists of modules of one class, each with layers inside: what a model that names no blocks may have.

    Whether they run one after the other is seen when they run.

    Returns:
        As `find_stacks`.
    """
    stacks, inside = list[list[tuple[str, nn.Module]]](), set[nn.Module]()
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or module in inside or _has_gaps(module):
            continue
        blocks = [(clean_name(f"{name}.{i}" if name else str(i)), child) for i, child in enumerate(module)]
        alike = len({type(uncompiled(child)) for child in module}) == 1 < len(set(module))
        if alike and all(_has_layers(uncompiled(child)) for child in module):
            stacks.append(blocks)
            inside.update(module.modules())
    return stacks


def stacks_to_walk(model: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The stacks that a model names, or in one that names none those that it may have."""
    return find_stacks(model) or likely_stacks(model)


def _has_gaps(module: nn.ModuleList | nn.Sequential) -> bool:
    """Whether a list has None in the place of some modules (Informer's convolutions between its layers)."""
    return any(child is None for child in module)


def _has_layers(module: nn.Module) -> bool:
    return layer_kind(module) is None and any(layer_kind(part) is not None for part in module.modules())


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of all stacks (see `find_stacks`), one stack after the other."""
    return [block for stack in find_stacks(model) for block in stack]
