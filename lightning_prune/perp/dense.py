"""The dense weights that a pruned model is fitted to, one decoder block at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune.checkpoints import open_checkpoint
from lightning_prune.masks import named_weights
from lightning_prune.targets import clean_name

DenseSource = nn.Module | Mapping[str, Tensor] | str | Path


class DenseBlocks:
    """Dense weights of decoder blocks, loaded when asked for.

    Args:
        dense: The dense model; its weights by parameter name, of which those that are not pruned may be missing; or
            the path of a transformers folder, safetensors file or checkpoint of it, read block by block.
        model: The pruned model.
        blocks: Clean names and modules of its decoder blocks.
        pruned: Names of its parameters that are pruned.

    Raises:
        TypeError: `dense` is none of these.
        ValueError: a weight is missing.
        CheckpointError: the path cannot be read.
    """

    def __init__(
        self,
        dense: DenseSource,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        pruned: Collection[str],
    ) -> None:
        self._blocks = blocks
        names, self._load = _opened(dense, model)
        self._sources: dict[str, str] = {}
        for block, module in blocks:
            for name in named_weights(module):
                whole = f"{block}.{name}"
                source = _find(whole, names, getattr(model, "base_model_prefix", ""))
                if source is not None:
                    self._sources[whole] = source
                elif whole in pruned or not isinstance(dense, Mapping):
                    raise ValueError(
                        f"dense has no {whole!r}, which the pruned model has: give the model that was pruned, as it "
                        "was before"
                    )

    def weights(self, index: int) -> dict[str, Tensor]:
        """Weights of one block by their names in it, of its own dtype and device.

        Raises:
            ValueError: a weight has another shape than the pruned model's.
        """
        block, module = self._blocks[index]
        wanted = {self._sources.get(f"{block}.{clean_name(name)}"): (name, p) for name, p in module.named_parameters()}
        found = {}
        for source, tensor in self._load([name for name in wanted if name is not None]).items():
            name, own = wanted[source]
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{source!r} of dense has shape {tuple(tensor.shape)}, but {tuple(own.shape)} in the pruned model: "
                    "give the model that was pruned, as it was before"
                )
            found[name] = tensor.detach().to(own.device, own.dtype)
        return found


def _opened(
    dense: DenseSource, model: nn.Module
) -> tuple[Collection[str], Callable[[Collection[str]], Mapping[str, Tensor]]]:
    """The names of all weights, and a function that loads some of them."""
    if isinstance(dense, (str, Path)):
        checkpoint = open_checkpoint(dense, argument="dense")
        return set(checkpoint.names()), checkpoint.load
    if isinstance(dense, nn.Module):
        if dense is model:
            raise ValueError("dense is the pruned model itself; give a copy of the model from before it was pruned")
        weights: Mapping[str, Tensor] = named_weights(dense)
    elif isinstance(dense, Mapping):
        weights = dense
    else:
        raise TypeError(
            f"dense={type(dense).__name__} must be the dense model, its weights by name, or the path of a folder, "
            "safetensors file or checkpoint that holds them"
        )
    return set(weights), lambda names: {name: weights[name] for name in names}


def _find(name: str, names: Collection[str], prefix: str) -> str | None:
    """What a parameter is called in a source: as in the model, in a LightningModule, or without the family's prefix."""
    candidates = (name, f"model.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in names), None)


@torch.no_grad()
def check_is_dense(name: str, dense: Tensor, pruned: Tensor) -> None:
    """Refuse dense weights with zeros where those of the pruned model are.

    Raises:
        ValueError: nothing was there before, so there is nothing to fit to.
    """
    if not bool(dense[pruned].any()):
        raise ValueError(
            f"all {int(pruned.sum())} pruned weights of {name!r} are zero in dense too: it is pruned itself; give the "
            "model from before it was pruned"
        )
