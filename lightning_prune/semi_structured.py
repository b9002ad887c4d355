"""2:4 weights as torch's semi-structured tensors, where the device multiplies them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lightning_prune.inspection import Inspection

_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64)}
"""The (outputs, inputs) of a weight must be multiples of these, by dtype: the rules of torch's kernels."""


def why_not_sparse(found: Inspection, model: nn.Module, device: torch.device) -> str | None:
    """Why 2:4 products cannot be used here; None if they can.

    Args:
        found: What is in the model's weights.
        model: The model.
        device: Where it runs.
    """
    if found.pattern not in ("2:4", "1:4"):
        return "Sparse products need 2:4 in every layer that can be pruned."
    if device.type != "cuda":
        return f"Sparse 2:4 products need CUDA, and were not measured on {device.type}."
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Sparse 2:4 products need compute capability 8.0 (Ampere) or above, and were not measured."
    dtypes = {module.weight.dtype for module in _layers(model, found).values()}
    if not dtypes <= _MULTIPLES.keys():
        return (
            f"Sparse 2:4 products need float16 or bfloat16; the weights are {sorted(map(str, dtypes))}: give a dtype."
        )
    unfit = [
        name
        for name, module in _layers(model, found).items()
        if any(
            size % multiple for size, multiple in zip(module.weight.shape, _MULTIPLES[module.weight.dtype], strict=True)
        )
    ]
    return f"Sparse 2:4 products do not take the shape of {unfit[0]}, and were not measured." if unfit else None


def sparse_copy(model: Any, found: Inspection) -> Any:
    """Replace the 2:4 weights of a model with semi-structured tensors, in place; for inference alone.

    Args:
        model: On a CUDA device, for which `why_not_sparse` found no reason.
        found: What is in its weights.
    """
    for module in _layers(model, found).values():
        sparse = torch.sparse.to_sparse_semi_structured(module.weight.detach())
        module.weight = nn.Parameter(sparse, requires_grad=False)
    return model


def _layers(model: nn.Module, found: Inspection) -> dict[str, nn.Linear]:
    """The linear layers that can be pruned, by name."""
    names = {report.name.removesuffix(".weight") for report in found.selected()}
    return {name: m for name, m in model.named_modules() if name in names and isinstance(m, nn.Linear)}
