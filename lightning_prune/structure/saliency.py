"""Compute what a unit is worth: from gradients, magnitudes or kfac, at once or while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.pruning.layer_kinds import layer_kind
from lightning_prune.pruning.precision import full_precision
from lightning_prune.pruning.statistics import INPUT_NORM, OUTPUT_GRAD_NORM, LayerStatistics, wide_dtype
from lightning_prune.pruning.targets import Target, find_targets
from lightning_prune.ranks import shard_group
from lightning_prune.sharding import local, shard_bounds
from lightning_prune.structure.sizes import IN_LAYERS, UnitType, check_types
from lightning_prune.structure.streaming import StreamedStatistics
from lightning_prune.structure.units import Removal, Structure, unit_indices

GRADIENT_SALIENCIES = ("taylor2", "taylor1", "magnitude")
TRAINING_SALIENCIES = (*GRADIENT_SALIENCIES, "kfac")
SALIENCIES = (*TRAINING_SALIENCIES, "obs", "reap")

Unexplained = Callable[[str, Tensor], Tensor | None]
Costs = Callable[[str, Tensor, Tensor, Tensor], Tensor]

INPUT_AXIS: dict[str, str] = {"attention": "q", "ffn": "f", "hidden": "d"}
"""Axis that the layers reading a type's units have as inputs."""

# Weights worked on at a time: half a mebibyte of float32 stays in a core's cache; on a GPU kernel launches count.
_CPU_PIECE = 1 << 17
_GPU_PIECE = 1 << 24


def check_saliency(saliency: str, known: Sequence[str] = SALIENCIES) -> None:
    """Raise ValueError for an unknown saliency."""
    if saliency not in known:
        raise ValueError(f"saliency={saliency!r} must be one of {', '.join(map(repr, known))}")


class SaliencyAccumulator:
    """Sums of weight saliencies by unit, over training steps.

    Args:
        structure: Of the model.
        types: Unit types to score.
        kind: Of a weight w with gradient g: ``"taylor2"``, ``abs(g w - 1/2 g^2 w^2)`` (LLM-Pruner, Ma et al. 2023,
            arXiv 2305.11627, which EfficientLLM, arXiv 2502.06663, takes over), ``"taylor1"``, ``abs(g w)``, or
            ``"magnitude"``, ``abs(w)``.
        decay: Share of all sums that a `reset` keeps, from 0 (it forgets) to below 1: a running mean over prunings,
            less noisy than the few steps between two of them.

    Attributes:
        steps: Steps that count, since the last `reset`.
        stream: Hooks on layers that feed the sums; None where weights and gradients are enough.
    """

    stream: StreamedStatistics | None = None

    def __init__(self, structure: Structure, types: Sequence[str], kind: str = "taylor2", decay: float = 0.0) -> None:
        check_saliency(kind, GRADIENT_SALIENCIES)
        self.types = check_types(types)
        self.kind = kind
        self.decay = decay
        self.steps = 0
        self._weight = 0.0  # steps with those before the last reset, as far as they still count
        self._sums: dict[UnitType, Tensor] = {}
        self._scratch: dict[torch.device, Tensor] = {}
        self.follow(structure)

    def follow(self, structure: Structure, removal: Removal | None = None) -> None:
        """Score a model whose sizes have changed.

        Args:
            structure: Of the model as it is now.
            removal: Units that it lost, as they were numbered before: the sums of those that stay are kept. None: from
                zero.

        Raises:
            ValueError: parameters that are cut otherwise than along one dimension of processes, see `shard_group`.
        """
        kept = None if removal is None else {t: _without(sums, t, removal) for t, sums in self._sums.items()}
        if kept is None:
            self.steps, self._weight = 0, 0.0
        parameters = structure.parameters()
        self._shards = shard_group(parameters)
        self.structure = structure
        device = next(iter(parameters.values())).device
        # Sums over millions of weights, in float64 where the device has it.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = {
            t: torch.zeros(structure.places(t), structure.units(t), dtype=self._dtype, device=device)
            for t in self.types
        }
        self._uses = self._find_uses(device)
        layers = range(structure.sizes.num_hidden_layers) if "layer" in self.types else ()
        self._layers = {name: i for i in layers for name in structure.in_layer(i)}
        for unit_type, sums in (kept or {}).items():
            self._sums[unit_type].copy_(sums)

    def _find_uses(self, device: torch.device) -> dict[str, list[tuple[int, int, UnitType, Tensor]]]:
        """Of each parameter: dimension, place, unit type, and indices ``[U, M]``, which layers share."""
        structure, uses = self.structure, dict[str, list[tuple[int, int, UnitType, Tensor]]]()
        for unit_type in (t for t in self.types if t != "layer"):
            by_axis = unit_indices(structure.sizes, unit_type, structure.attention_unit)
            on_device = {axis: indices.to(device) for axis, indices in by_axis.items()}
            for place, slices in enumerate(structure.slices(unit_type)):
                for s in slices:
                    axis = structure.axes[s.name][s.dim]
                    uses.setdefault(s.name, []).append((s.dim, place, unit_type, on_device[axis]))
        return uses

    def read_gradients(self) -> list[str]:
        """Return the names of the parameters whose gradients the sums are made of."""
        names = () if self.kind == "magnitude" else self.structure.axes
        return [name for name in names if name in self._uses or name in self._layers]

    @torch.no_grad()
    def add(self, scale: float = 1.0) -> None:
        """Take in the weights and the gradients that they hold now, `scale` times too large: just before a step.

        Weights without a gradient count as zero. A step with NaN or infinity does not count (an optimizer under a
        gradient scaler skips it too). Of sharded parameters each rank takes its part, and the parts are summed, in one
        collective; every rank must call.
        """
        step = {t: torch.zeros_like(s) for t, s in self._sums.items()}
        for name, p in self.structure.parameters().items():
            uses, layer = self._uses.get(name, ()), self._layers.get(name)
            if (not uses and layer is None) or (p.grad is None and self.kind != "magnitude"):
                continue
            dims = sorted({dim for dim, *_ in uses}) or [0]
            by_dim = self._sum_over_others(p, dims, scale)
            for dim, place, unit_type, indices in uses:
                step[unit_type][place] += by_dim[dim][indices].sum(1)
            if layer is not None:
                step["layer"][0, layer] += by_dim[dims[0]].sum()
        step = self._shards.sum_all(step)
        if bool(torch.stack([torch.isfinite(s).all() for s in step.values()]).all()):
            for unit_type, sums in step.items():
                self._sums[unit_type] += sums
            self._count_step()

    def _count_step(self) -> None:
        self.steps += 1
        self._weight += 1.0

    def _sum_over_others(self, p: nn.Parameter, dims: Sequence[int], scale: float) -> dict[int, Tensor]:
        """Saliencies of a parameter's weights, summed over all dimensions but one, for each of `dims`."""
        weight, grad = local(p.detach()), None if p.grad is None else local(p.grad)
        bounds = shard_bounds(p)
        sums = {dim: torch.zeros(p.shape[dim], dtype=self._dtype, device=weight.device) for dim in dims}
        if not weight.numel():
            return sums
        piece = _CPU_PIECE if weight.device.type == "cpu" else _GPU_PIECE
        rows = max(1, piece // weight[0].numel())
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            values = self._values(weight[part], None if grad is None else grad[part], scale)
            for dim in dims:
                first = bounds[dim][0] + (start if dim == 0 else 0)
                others = [d for d in range(values.dim()) if d != dim]
                sums[dim][first : first + values.shape[dim]] += values.sum(others) if others else values
        return sums

    def _values(self, w: Tensor, g: Tensor | None, scale: float) -> Tensor:
        """Saliency of every weight of a piece, in float32 or wider; valid until the next call."""
        dtype = torch.promote_types(w.dtype, torch.float32)
        buffer = self._scratch.get(w.device)
        if buffer is None or buffer.numel() < w.numel() or buffer.dtype != dtype:
            buffer = self._scratch[w.device] = torch.empty(w.numel(), dtype=dtype, device=w.device)
        out = buffer[: w.numel()].view(w.shape)
        if self.kind == "magnitude":
            return torch.abs(w.to(dtype), out=out)
        assert g is not None
        torch.mul(w.to(dtype), g.to(dtype), out=out)
        if scale != 1.0:
            out.div_(scale)
        if self.kind == "taylor2":
            out.addcmul_(out, out, value=-0.5)
        return out.abs_()

    def sums(self, unit_type: str) -> Tensor:
        """Saliency of every unit of a type, summed over its weights and the steps, ``[P, U]`` in float64."""
        return self._sums[unit_type].clone()  # type: ignore[index]

    def means(self) -> dict[str, Tensor]:
        """Saliency of every unit of each type: the mean over its weights and the steps, ``[P, U]`` on the CPU."""
        steps = self._weight or 1.0
        return {t: (self.sums(t) / (self.structure.unit_weights(t) * steps)).cpu() for t in self.types}

    def reset(self) -> None:
        """Forget the steps so far, but for the share `decay`."""
        self.steps, self._weight = 0, self._weight * self.decay
        for sums in self._sums.values():
            sums.mul_(self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Sums and steps; tensors and numbers only."""
        sums = {str(t): self.sums(t).cpu() for t in self.types}
        return {"steps": self.steps, "weight": self._weight, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, at any number of processes.

        Raises:
            ValueError: saved of a model of other sizes, or of other types.
        """
        saved = {t: tuple(s.shape) for t, s in state["sums"].items()}
        own = {str(t): tuple(s.shape) for t, s in self._sums.items()}
        if saved != own:
            raise ValueError(f"the saved saliencies have the shapes {saved}, those of this model and types are {own}")
        self.steps = int(state["steps"])
        self._weight = float(state["weight"])
        for t, sums in self._sums.items():
            sums.copy_(state["sums"][t])


def _without(sums: Tensor, unit_type: UnitType, removal: Removal) -> Tensor:
    """Sums ``[P, U]`` of the units that stay: removed units go, and so do the places in removed layers."""
    gone = removal.get(unit_type)
    if gone is not None:
        stays = torch.ones_like(sums, dtype=torch.bool)
        for row, units in zip(stays, gone, strict=True):
            row[units.to(row.device)] = False
        sums = sums[stays].view(len(sums), -1)  # every place loses as many
    if "layer" in removal and unit_type in IN_LAYERS:
        layers = torch.ones(len(sums), dtype=torch.bool, device=sums.device)
        layers[removal["layer"][0].to(sums.device)] = False
        sums = sums[layers]
    return sums


# -- from calibration statistics -------------------------------------------------------------------------------------


def reader_targets(structure: Structure, types: Sequence[str]) -> list[Target]:
    """The layers that read units of these types, as targets of `lightning_prune.pruning.calibration.collect`.

    A layer type is judged by what its attention and FFN write, so by their readers; an expert by its down projection.
    """
    modules, found = structure.modules(), dict[str, Target]()
    for unit_type in _read_types(types):
        for names in structure.readers(unit_type):
            for name in names:
                kind = layer_kind(modules[name])
                assert kind is not None
                found[name] = Target(f"{name}.weight", modules[name], kind, (modules[name],))
    if "expert" in types:
        found |= {t.name: t for places in expert_outputs(structure) for t in places}
    return list(found.values())


def expert_outputs(structure: Structure) -> list[list[Target]]:
    """The last product of every expert, one list a layer."""
    names = [f"{experts}.down_proj" for experts in structure.expert_names()]
    targets = find_targets(structure.model, names, frozen=True)
    return [[t for t in targets if t.parameter == name] for name in names]


def _read_types(types: Sequence[str]) -> tuple[str, ...]:
    wanted = {*types, *(("attention", "ffn") if "layer" in types else ())} - {"layer"}
    return tuple(t for t in ("attention", "ffn", "hidden") if t in wanted)


@torch.no_grad()
@full_precision()
def kfac_saliency(
    structure: Structure,
    statistics: Mapping[str, LayerStatistics],
    types: Sequence[str],
    unexplained: Unexplained | None = None,
    costs: Costs | None = None,
) -> dict[str, Tensor]:
    """Unit saliencies from the diagonal of the Kronecker-factored Fisher, ``[P, U]`` by type.

    Of one input j of a layer, ``sum over i of W_ij^2 E[delta_i^2] E[x_j^2]``: twice the expected loss increase of
    removing it. A unit's are summed over its inputs and all layers that read them (down projection, output projection,
    or all that read the hidden channels; of an expert its own down projection), and divided by the number of its
    weights. Of sharded weights each rank takes its part, and the parts are summed, in one collective; every rank must
    call.

    Args:
        structure: Of the model.
        statistics: Input and output-gradient norms by parameter name, of `reader_targets`.
        types: Unit types.
        unexplained: Says of a layer and its inputs by unit, ``[U, M]``, which second moments the other inputs cannot
            stand in for, ``[U, M, M]``, as a share of all inputs' (see `StreamedMoments.unexplained`). They take the
            place of ``E[x_j^2]``: the loss increase is then that after the update of what remains (optimal brain
            surgeon). Where it says None, or is None, nothing is taken to be updated.
        costs: Says of the only layer that reads some units, of its inputs by unit, of its weight, ``[O, I]``, and of
            ``E[delta_i^2]``, what each unit costs after the cheaper ones, by a share of all inputs' second moments (see
            `lightning_prune.pruning.hessian.removal_costs`). Goes before `unexplained`; of whole weights.
    """
    result = _read_saliency(structure, statistics, [t for t in types if t != "layer"], unexplained, costs)
    if "layer" in types:  # nothing in a layer that goes could be updated
        plain = _read_saliency(structure, statistics, ["layer"])
        per_layer = [
            plain[t].sum(1) * structure.unit_weights(t) / structure.unit_weights("layer") for t in ("attention", "ffn")
        ]
        result["layer"] = (per_layer[0] + per_layer[1])[None]
    if "expert" in types:
        outputs = [[_input_saliency(t, statistics[t.name]).sum() for t in ts] for ts in expert_outputs(structure)]
        result["expert"] = torch.stack([torch.stack(o).cpu().double() for o in outputs])
        result["expert"] /= structure.unit_weights("expert")
    return {str(t): result[t] for t in check_types(types)}


def _read_saliency(
    structure: Structure,
    statistics: Mapping[str, LayerStatistics],
    types: Sequence[str],
    unexplained: Unexplained | None = None,
    costs: Costs | None = None,
) -> dict[str, Tensor]:
    """`kfac_saliency` of the types that layers read."""
    targets = {t.name: t for t in reader_targets(structure, types)}
    totals: dict[str, Tensor] = {}
    for unit_type in _read_types(types):
        by_axis = unit_indices(structure.sizes, unit_type, structure.attention_unit)
        places = []
        for names in structure.readers(unit_type):
            total = torch.zeros(structure.units(unit_type), dtype=torch.float64, device="cpu")
            for name in names:
                target, units = targets[f"{name}.weight"], by_axis[INPUT_AXIS[unit_type]]
                if costs is not None and len(names) == 1:
                    found = statistics[target.name]
                    shares = costs(name, units, target.matrix(), found.get(OUTPUT_GRAD_NORM).square())
                    total += (shares * found.get(INPUT_NORM).square().sum().to(shares)).cpu().double()
                    continue
                left = None if unexplained is None else unexplained(name, units)
                if left is None:
                    total += _input_saliency(target, statistics[target.name]).cpu().double()[units].sum(1)
                else:
                    total += _updated_saliency(target, statistics[target.name], units, left).cpu().double()
            places.append(total)
        totals[unit_type] = torch.stack(places)
    totals = shard_group(structure.parameters()).sum_all(totals)
    return {t: total / structure.unit_weights(t) for t, total in totals.items()}


def _input_saliency(target: Target, statistics: LayerStatistics) -> Tensor:
    """``sum over i of W_ij^2 E[delta_i^2] E[x_j^2]`` of every input, ``[I]``; this rank's weights' share of it."""
    weight = target.matrix()  # [O, I], or what this rank has of it
    weight = weight.to(wide_dtype(weight.dtype))
    rows = statistics.get(OUTPUT_GRAD_NORM).square()  # [O]
    columns = statistics.get(INPUT_NORM).square()  # [I]
    (row, row_end), (column, column_end) = target.layout.bounds
    found = weight.new_zeros(len(columns))
    own = rows[row:row_end].to(weight) @ weight.square()
    found[column:column_end] = own * columns[column:column_end].to(weight.device)
    return found


def _updated_saliency(target: Target, statistics: LayerStatistics, units: Tensor, unexplained: Tensor) -> Tensor:
    """``sum over i of W_iu E[delta_i^2] A_u W_iu^T`` of every unit's inputs u, ``[U]``; this rank's rows' share of it.

    ``A_u`` is `unexplained` times all inputs' second moments.
    """
    weight = target.rows()  # [r, I]
    start, stop = target.layout.row_bounds
    weight = weight.to(wide_dtype(weight.dtype))
    scale = statistics.get(INPUT_NORM).square().sum()
    rows = statistics.get(OUTPUT_GRAD_NORM).square()[start:stop].to(weight)
    picked = weight[:, units.to(weight.device)]  # [r, U, M]
    products = torch.einsum("rum,run->umn", picked * rows[:, None, None], picked)
    return (products * unexplained.to(products)).sum((1, 2)) * scale.to(products)


class StreamedKFAC(SaliencyAccumulator):
    """Sums of kfac saliency by unit, over training steps, with what `SaliencyAccumulator` offers.

    Of one step, ``sum over i of W_ij^2 E[delta_i^2] E[x_j^2]`` (see `kfac_saliency`) from the tokens of the step, with
    delta the gradient of the training loss.

    Args:
        structure: Of the model.
        types: Unit types to score.
        reduce: Sums a tensor over processes that see different samples.
        decay: Share of all sums that a `reset` keeps.
        unexplained: See `kfac_saliency`; None where pruning does not update what remains.

    Attributes:
        stream: The hooks on the layers that read units.
    """

    stream: StreamedStatistics

    def __init__(
        self,
        structure: Structure,
        types: Sequence[str],
        reduce: Callable[[Tensor], Tensor] | None = None,
        decay: float = 0.0,
        unexplained: Unexplained | None = None,
    ) -> None:
        self.stream = StreamedStatistics(structure, {})
        super().__init__(structure, types, decay=decay)
        self.kind = "kfac"
        self._reduce = reduce
        self._unexplained = unexplained

    def follow(self, structure: Structure, removal: Removal | None = None) -> None:
        """See `SaliencyAccumulator.follow`; the hooks move with the layers."""
        super().follow(structure, removal)
        self._targets = reader_targets(structure, self.types)
        wanted = frozenset({INPUT_NORM, OUTPUT_GRAD_NORM})
        self.stream.follow(structure, {t.name.removesuffix(".weight"): wanted for t in self._targets})

    def read_gradients(self) -> list[str]:
        """Return the weights of the layers that are watched, whose outputs have gradients where these have."""
        return [target.name for target in self._targets if target.name in self.structure.axes]  # not a tied head

    @torch.no_grad()
    def add(self, scale: float = 1.0) -> None:
        """Take in the step whose passes were observed, of a loss `scale` times too large.

        One with NaN or infinity does not count.

        Raises:
            ValueError: a layer ran while no gradient was recorded, and not again.
        """
        hidden = self.stream.without_gradient
        taken, vectors = self.stream.take(), []
        if unseen := sorted(hidden - taken.keys()):
            raise ValueError(
                f"saliency='kfac' needs the gradients of layers' outputs, and {unseen[0]!r} ({len(unseen)} layers in "
                "all) runs where none are recorded: under no_grad, or in a re-entrant gradient checkpoint. Checkpoint "
                "with gradient_checkpointing_enable({'use_reentrant': False}), or use saliency='taylor2'"
            )
        for target in self._targets:
            outputs, inputs = target.shape  # of the whole weight, which passes see where it is sharded
            seen = taken.get(target.name.removesuffix(".weight"))
            for name, length in ((INPUT_NORM, inputs), (OUTPUT_GRAD_NORM, outputs)):
                zeros = torch.zeros(length, dtype=self._dtype, device=target.weight.device)
                vectors.append(zeros if seen is None or name not in seen.sums else zeros + seen.sums[name].to(zeros))
        flat = torch.cat(vectors)
        if self._reduce is not None:
            flat = self._reduce(flat)
        if not bool(torch.isfinite(flat).all()):
            return
        norms = iter(torch.split(flat.sqrt(), [len(vector) for vector in vectors]))
        statistics = {
            target.name: LayerStatistics(1, input_norm=next(norms), output_grad_norm=next(norms) / scale)
            for target in self._targets
        }
        for unit_type, means in kfac_saliency(self.structure, statistics, self.types, self._unexplained).items():
            sums = self._sums[unit_type]  # type: ignore[index]
            sums += (means * self.structure.unit_weights(unit_type)).to(sums)
        self._count_step()
