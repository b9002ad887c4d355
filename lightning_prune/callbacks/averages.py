"""Averages of a module's weights that callbacks and modules keep: find them, and hold them to the masks.

An average of weights that are zero stays zero, so what matters is that an average is masked whenever masks change:
what it took in before then would stay in it, in the checkpoints and validations that use it, and in the final weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.callbacks.kinds import callbacks_of, is_kind
from lightning_prune.naming import clean_name
from lightning_prune.pruning.masks import apply_masks, named_weights
from lightning_prune.sharding import laid_out_like, type_name


def averages(trainer: L.Trainer) -> list[nn.Module]:
    """The averaged copies of the module that Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging`` hold.

    They make them in ``setup`` of a fit.

    Raises:
        RuntimeError: see `_kept_by`.
    """
    kinds = ("WeightAveraging", "StochasticWeightAveraging")
    found = [_kept_by(callback, trainer) for callback in callbacks_of(trainer) if is_kind(callback, *kinds)]
    return [average.module if isinstance(average, AveragedModel) else average for average in found]


def mask_averages(
    trainer: L.Trainer, module: L.LightningModule, find_masks: Callable[[], Mapping[str, Tensor]]
) -> list[str]:
    """Set the pruned weights to zero in every average of the module, or of a part of it, that can be found.

    Those of Lightning's ``WeightAveraging`` and ``StochasticWeightAveraging``, and every ``AveragedModel`` that the
    module or a callback has as an attribute, or in a list or mapping there.

    Args:
        trainer: In its fit.
        module: Its module.
        find_masks: Gives the masks by the module's parameter names; called only if there is an average.

    Returns:
        What to tell the user of averages that could not be masked.

    Raises:
        RuntimeError: see `_kept_by`.
    """
    found, problems = list(_averages_in(trainer, module)), []
    masks = find_masks() if found else {}
    for average, owner in found:
        prefix = "" if owner is None else _prefix_of(average, module)
        if prefix is None:
            problems.append(
                f"WeightPruning: which part of {type(module).__name__} the AveragedModel of {type(owner).__name__} "
                "averages cannot be told, so it is not held to the masks: apply those of "
                "that part after each change, with lightning_prune.apply_masks(averaged.module, masks)"
            )
            continue
        weights = named_weights(average)
        chosen = {name.removeprefix(prefix): mask for name, mask in masks.items() if name.startswith(prefix)}
        if missing := [name for name in chosen if name not in weights]:
            problems.append(
                f"WeightPruning: an average of {type(module).__name__} has no parameter {missing[0]!r}, so it is not "
                "held to the masks; put the averaging callback after those that change the module"
            )
            continue
        apply_masks(average, {name: laid_out_like(weights[name], mask) for name, mask in chosen.items()})
    return problems


def _averages_in(trainer: L.Trainer, module: L.LightningModule) -> Iterator[tuple[nn.Module, object | None]]:
    """Averaged modules; with each, who holds an ``AveragedModel`` that need not be one of the whole module."""
    held = averages(trainer)
    yield from ((average, None) for average in held)
    seen = {id(average) for average in held}
    inside = ((m, module) for m in module.modules())
    beside = ((value, owner) for owner in (module, *callbacks_of(trainer)) for value in _values(vars(owner)))
    for value, owner in (*inside, *beside):
        if isinstance(value, AveragedModel) and id(value.module) not in seen:
            seen.add(id(value.module))
            yield value.module, owner


def _kept_by(callback: Any, trainer: L.Trainer) -> Any:
    """What an averaging callback of Lightning averages into, which it makes in ``setup``.

    Raises:
        RuntimeError: no attribute of the callback is a model.
    """
    for value in vars(callback).values():
        if isinstance(value, nn.Module) and value is not trainer.lightning_module:
            return value
    raise RuntimeError(
        f"no attribute of {type(callback).__name__} (lightning {L.__version__}) is an averaged model, so the average "
        "cannot be held to the masks: use lightning 2.6, or leave the callback out while weights are pruned"
    )


def _values(attributes: Mapping[str, Any]) -> Iterator[Any]:
    for value in attributes.values():
        yield value
        if isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, (list, tuple)):
            yield from value


def _prefix_of(average: nn.Module, module: nn.Module) -> str | None:
    """What names of the average's parameters begin with in the module; None if no one part is like the average."""
    averaged = {id(m) for a in module.modules() if isinstance(a, AveragedModel) for m in a.modules()}
    shapes = _shapes(average.named_parameters())
    found = [
        clean_name(f"{name}.") if name else ""
        for name, part in module.named_modules()
        if id(part) not in averaged
        and type_name(part) == type_name(average)
        and _shapes(part.named_parameters()) == shapes
    ]
    return found[0] if len(found) == 1 else None


def _shapes(parameters: Iterable[tuple[str, Tensor]]) -> dict[str, torch.Size]:
    return {clean_name(name): parameter.shape for name, parameter in parameters}
