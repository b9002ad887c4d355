"""Variant B: what remains of a layer takes over from the inputs it lost, by the local Hessian ``H = X^T X``.

``W[:, q] <- W[:, q] - W[:, p] inv(Hinv[p, p]) Hinv[p, q]`` for the lost inputs p and the kept ones q (EfficientLLM,
arXiv 2502.06663; Optimal Brain Surgeon for several weights at once). By block inversion that is
``W[:, q] + W[:, p] H[p, q] inv(H[q, q])``, the least squares fit of the lost inputs by the kept ones, which needs one
factorisation of the smaller matrix.

Dimensions: O outputs, I inputs of a layer; p lost and q kept inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_prune.masks import uninterrupted
from lightning_prune.obs import DAMPING
from lightning_prune.precision import full_precision
from lightning_prune.progress import progress_bar
from lightning_prune.shard_group import shard_group
from lightning_prune.sharding import local
from lightning_prune.statistics import CalibrationError
from lightning_prune.structure.saliency import INPUT_AXIS, reader_targets
from lightning_prune.structure.units import Removal, Structure, unit_indices
from lightning_prune.targets import Target


@full_precision()
def compensated(weight: Tensor, hessian: Tensor, lost: Tensor, damping: float = DAMPING) -> Tensor:
    """A weight that does without some of its inputs.

    Args:
        weight: ``[O, I]``; not changed.
        hessian: ``X^T X`` of the layer's inputs, ``[I, I]``, up to a factor; not changed. Solved in float64 (float32
            on MPS).
        lost: Indices of inputs that go, or are gone already.
        damping: Share of the mean diagonal (of inputs that were not always zero) that is added to it; grows tenfold,
            three times at most, if the matrix is not positive definite to working precision.

    Returns:
        ``[O, I]`` in the weight's dtype, zero in the lost columns.

    Raises:
        CalibrationError: the matrix stays indefinite, or the result is not finite.
    """
    dtype = torch.float32 if hessian.device.type == "mps" else torch.float64
    stays = torch.ones(len(hessian), dtype=torch.bool, device=hessian.device)
    stays[lost.to(hessian.device)] = False
    kept, lost = stays.nonzero().flatten(), (~stays).nonzero().flatten()
    diagonal = hessian.diagonal().to(dtype).clone()
    alive = diagonal != 0  # units that are masked already must not count in the mean
    scale = diagonal[alive].mean() if bool(alive.any()) else torch.ones((), dtype=dtype, device=diagonal.device)
    diagonal[~alive] = scale
    qq = hessian[kept][:, kept].to(dtype)  # [q, q]
    qp = hessian[kept][:, lost].to(dtype)  # [q, p]
    for attempt in range(4):
        qq.diagonal().copy_(diagonal[kept] + damping * 10**attempt * scale)
        factor, failed = torch.linalg.cholesky_ex(qq)
        if not int(failed):
            fit = torch.cholesky_solve(qp, factor)  # [q, p]: lost inputs as sums of kept ones
            wide = weight.to(device=hessian.device, dtype=dtype)
            result = torch.zeros_like(wide)
            result[:, kept] = wide[:, kept] + wide[:, lost] @ fit.t()
            result = result.to(weight)
            if bool(torch.isfinite(result).all()):
                return result
    raise CalibrationError(
        "the layer's Hessian X^T X is not positive definite even when damped; use more calibration samples"
    )


def observed_layers(structure: Structure, types: Sequence[str]) -> dict[str, str]:
    """By the name of each layer that can be re-fitted, that of the layer whose inputs to observe for it.

    Layers of one module that read hidden channels (queries, keys, values) read the same tensor, so the first stands for
    all; every other layer stands for itself. A head that is tied to the embedding is left out: changing it would
    change the embedding.
    """
    found: dict[str, str] = {}
    for unit_type in (t for t in types if t != "layer"):
        first: dict[str, str] = {}
        for name in (name for names in structure.readers(unit_type) for name in names):
            if f"{name}.weight" in structure.axes:  # not a tied head
                found[name] = first.setdefault(name.rpartition(".")[0], name)
    return found


@torch.no_grad()
def compensation(
    structure: Structure,
    removal: Removal,
    moments: Mapping[str, Tensor],
    damping: float = DAMPING,
    progress: bool = False,
) -> dict[str, Tensor]:
    """New weights of all layers that lose inputs, by parameter name, in the parameters' shapes; the model is unchanged.

    All at once, on moments of the model before the removal. Where hidden channels go, what their loss changes in the
    divisor of a norm is left out. Of a sharded weight each rank re-fits the rows that it has (of one that is cut along
    its inputs, it gets whole rows for that); every rank must call, with the same moments.

    Args:
        structure: Of the model.
        removal: From `check_removal`. Units that are masked already need not be in it if their moments are zero.
        moments: ``X^T X`` up to a factor, ``[I, I]``, by the name of each layer in `observed_layers`.
        damping: See `compensated`.
        progress: Show a progress bar.

    Raises:
        CalibrationError: see `compensated`; on every rank, if it happens on one.
    """
    targets = {t.name: t for t in reader_targets(structure, [t for t in removal if t != "layer"])}
    lost = lost_inputs(structure, removal)
    shards = shard_group(structure.parameters())
    weights: dict[str, Tensor] = {}
    failure: CalibrationError | None = None
    with progress_bar("Compensating", len(lost), progress) as advance:
        for name, indices in lost.items():
            target = targets[f"{name}.weight"]
            rows = _whole_rows(target)
            try:
                rows = compensated(rows, moments[name], indices, damping)
            except CalibrationError as error:
                if shards is None:
                    raise
                failure = error  # the other ranks wait in the exchange of rows
            weights[target.name] = _from_rows(target, rows)
            advance()
    if shards is not None and int(shards.sum(torch.tensor(int(failure is not None)))):
        raise failure or CalibrationError("a layer's update failed on another rank; use more calibration samples")
    return weights


def _whole_rows(target: Target) -> Tensor:
    """The weight as ``[O, I]``; where it is sharded, some of its rows, ``[r, I]``."""
    return target.matrix() if target.layout is None else target.layout.to_rows(target.matrix())


def _from_rows(target: Target, rows: Tensor) -> Tensor:
    """The inverse of `_whole_rows`, in the parameter's shape and layout."""
    return target.to_parameter(rows if target.layout is None else target.layout.from_rows(rows))


@torch.no_grad()
def compensate(structure: Structure, removal: Removal, moments: Mapping[str, Tensor], damping: float = DAMPING) -> None:
    """Write the weights of `compensation` into the model, once all are known.

    Raises:
        CalibrationError: see `compensated`; nothing is changed then.
    """
    weights, parameters = compensation(structure, removal, moments, damping), structure.parameters()
    with uninterrupted():
        for name, weight in weights.items():
            local(parameters[name].data).copy_(local(weight))


def lost_inputs(structure: Structure, removal: Removal) -> dict[str, Tensor]:
    """Inputs that go, by name of the layer; of layers that stay."""
    gone = [f"{structure.family.layers}.{i}." for i in removal["layer"][0].tolist()] if "layer" in removal else []
    found: dict[str, Tensor] = {}
    for unit_type, places in removal.items():
        if unit_type == "layer":
            continue
        indices = unit_indices(structure.sizes, unit_type, structure.attention_unit)[INPUT_AXIS[unit_type]]
        for names, units in zip(structure.readers(unit_type), places, strict=True):
            for name in names:
                if f"{name}.weight" in structure.axes and not name.startswith(tuple(gone)):
                    found[name] = indices[units].reshape(-1)
    return found
