"""`prune_structured`: shrink a trained model at once, without a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import CalibrationError, check_bool, check_model, refuse_inference_tensors
from lightning_prune.progress import progress_bar, warn
from lightning_prune.pruning.batches import samples
from lightning_prune.pruning.calibration import HALF_SCALE, LossFn, collect
from lightning_prune.pruning.coverage import pruned_zeros
from lightning_prune.pruning.running import model_loss, on_device, quiet_model
from lightning_prune.pruning.statistics import HESSIAN, INPUT_NORM, OUTPUT_GRAD_NORM, LayerStatistics
from lightning_prune.safety import uninterrupted
from lightning_prune.sharding import refuse_shards
from lightning_prune.structure.compensation import compensation, costs_of, observed_layers, unexplained_of
from lightning_prune.structure.device_goals import names_sizes
from lightning_prune.structure.planning import Planner, RoundTo, attention_unit_of, make_planner, plan_removal
from lightning_prune.structure.removal import remove_units
from lightning_prune.structure.routing import reap_saliency
from lightning_prune.structure.saliency import (
    SALIENCIES,
    SaliencyAccumulator,
    check_saliency,
    kfac_saliency,
    reader_targets,
)
from lightning_prune.structure.sizes import IN_LAYERS, AttentionUnit, Goal, Sizes, UnitType, check_types
from lightning_prune.structure.units import Removal, Structure, check_data, check_removal, read_structure


@dataclass(frozen=True)
class StructuredReport:
    """What `prune_structured` did.

    Attributes:
        sizes_before: Sizes of the model that was given.
        sizes: Its sizes now.
        parameters_before: Number of parameters then, tied ones once.
        parameters: Number now.
        removal: Indices of the removed units, in the numbering before.
    """

    sizes_before: Sizes
    sizes: Sizes
    parameters_before: int
    parameters: int
    removal: Removal

    @property
    def share(self) -> float:
        """Share of the parameters that was kept."""
        return self.parameters / self.parameters_before

    def __str__(self) -> str:
        changes = [
            f"{name} {before} -> {after}"
            for (name, before), after in zip(
                self.sizes_before.as_dict().items(), self.sizes.as_dict().values(), strict=True
            )
            if before != after
        ]
        return (
            f"{self.parameters_before:,} -> {self.parameters:,} parameters ({self.share:.1%})"
            f"{'; ' if changes else ''}{', '.join(changes)}"
        )


@torch.inference_mode(False)
def prune_structured(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    target: Goal = 0.75,
    types: Sequence[str] = ("ffn",),
    saliency: str = "kfac",
    compensate: bool = True,
    round_to: RoundTo | None = None,
    num_samples: int = 128,
    loss_fn: LossFn | None = None,
    attention_unit: AttentionUnit = "group",
    rounds: int = 1,
    progress: bool = True,
) -> StructuredReport:
    """Remove heads, FFN channels, hidden channels, layers or experts of a trained model, in place, in one shot.

    Everything is validated first; if calibration fails or is interrupted, the model is bit-identical to before. The
    result has an ordinary configuration; save it with `lightning_prune.structure.save_plain`.

    Args:
        model: A causal language model of transformers of a known family, or a module that holds one.
        batches: Calibration data, see `lightning_prune.prune`. Not needed for ``saliency="magnitude"`` without
            `compensate`. At most `num_samples` samples are kept in memory.
        target: What to end with: a float, the share of all parameters (embeddings included, tied ones once); an int,
            their number; or a mapping of final sizes (``hidden_size``, ``intermediate_size``,
            ``num_attention_heads``, ``num_key_value_heads``, ``num_hidden_layers``, ``num_experts``), which is reached
            exactly. A number of parameters is met exactly, or from the nearest below that the last unit allows.
            ``{"bytes": B}`` are those of the parameters, in the model's dtype or another (``"dtype": "bfloat16"``).
            ``{"seconds_per_token": S, "batch": N}`` is the time until N sequences have their next token, predicted
            from a few products and one step (with an empty cache) that are timed on the model's device and dtype.
        types: Units that may go: ``"attention"``, ``"ffn"``, ``"hidden"`` (hidden channels, the paper's stem),
            ``"layer"``, ``"expert"`` (as many of every layer, down to what a token is sent to). FFN alone is the
            default, since without training it costs least. Of several, the type with the cheapest next unit by mean
            saliency a weight is taken each time.
        saliency: ``"kfac"``: loss increase under the Kronecker-factored Fisher's diagonal; ``"obs"``: the same of what
            is left of a unit when the others have been re-fitted for it (optimal brain surgeon; with `compensate`):
            of heads and FFN channels after the cheaper ones have gone, of hidden channels as if they stayed. That is
            better where training follows; without it now one, now the other. ``"taylor1"``,
            ``"taylor2"``: of the gradients of the batches (LLM-Pruner, arXiv 2305.11627); ``"magnitude"``. A batch's
            gradient is that of its mean loss, so Taylor depends on how samples are batched. For experts alone also
            ``"reap"``: the mean over an expert's tokens of its router weight times the norm of what it makes of them
            (arXiv 2510.13999); without gradients.
        compensate: Re-fit the layers that lose inputs by their Hessian (variant B of EfficientLLM, arXiv 2502.06663),
            all at once on statistics of the model before the removal. Zeros of pruned weights in them are filled,
            with a warning.
        round_to: Multiple that hidden_size and intermediate_size are to end at if they shrink, or multiples by size.
            Default 1; on a GPU 64, or the power of two below an eighth of the size, unless `target` names sizes.
        num_samples: Calibration samples (sequences).
        loss_fn: ``loss_fn(model, batch)``, a scalar or one loss a sample ``[B]``.
        attention_unit: ``"group"``, a key/value head with its query heads, or ``"head"``, one query head of every
            group. A mapping as target that says how many heads decides it.
        rounds: How often units are judged, removed and made up for: each time on the smaller model, along a straight
            line of parameters (or seconds). It takes as many times as long, and keeps the dense weights until the end.
            The model must be an ordinary one after each round.
        progress: Show progress bars in a terminal.

    Returns:
        Sizes and removed units; ``print`` it.

    Raises:
        ValueError: an argument that is not supported, an unknown architecture, or a target that cannot be reached.
        CalibrationError: calibration could not give finite statistics of every layer.

    Example::

        report = prune_structured(model, batches, target=0.8)
        save_plain(model, "smaller", tokenizer)
    """
    check_model(model, loss_fn)
    structure, planner = check_structured(
        model, target, types, saliency, compensate, round_to, num_samples, attention_unit, rounds, batches is not None
    )
    how: dict[str, Any] = {"saliency": saliency, "compensate": compensate, "num_samples": num_samples, "rounds": rounds}
    return shrink_by_plan(structure, planner, batches, **how, loss_fn=loss_fn, progress=progress)


def check_structured(
    model: nn.Module,
    target: Goal,
    types: Sequence[str],
    saliency: str = "kfac",
    compensate: bool = True,
    round_to: RoundTo | None = None,
    num_samples: int = 128,
    attention_unit: AttentionUnit = "group",
    rounds: int = 1,
    data: bool = True,
) -> tuple[Structure, Planner]:
    """Check the arguments of `prune_structured`, and plan what they ask for; a target in seconds is measured.

    Args:
        model: See `prune_structured`, as all others.
        target: See there.
        types: See there.
        saliency: See there.
        compensate: See there.
        round_to: See there.
        num_samples: See there.
        attention_unit: See there.
        rounds: See there.
        data: Whether there are calibration data.

    Raises:
        ValueError: see there.
    """
    checked = check_types(types)
    check_saliency(saliency, SALIENCIES)
    check_bool("compensate", compensate)
    for name, value in (("num_samples", num_samples), ("rounds", rounds)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(f"{name}={value!r} must be an int of 1 or more, below 2**31")
    refuse_shards(model, "prune_structured needs whole parameters, these are sharded over processes: gather the model")
    structure = read_structure(model)
    check_data(structure)
    refuse_inference_tensors(structure.model.named_parameters(), frozen=saliency not in ("magnitude", "reap"))
    unit = attention_unit_of(target, structure.sizes, attention_unit)
    structure = read_structure(model, unit)
    one_by_one = rounds > 1 or not names_sizes(target)
    planner = make_planner(structure, target, checked, round_to, one_by_one=one_by_one)
    if saliency == "reap" and checked != ("expert",):
        raise ValueError(f"saliency='reap' is of experts, and types={checked!r}: use types=('expert',), or 'kfac'")
    if saliency == "obs" and not compensate:
        raise ValueError("saliency='obs' judges units after the re-fit: pass compensate=True, or saliency='kfac'")
    if not data and ((compensate and set(checked) != {"expert"}) or saliency != "magnitude"):
        raise ValueError(f"saliency={saliency!r} with compensate={compensate} needs calibration data: pass batches")
    return structure, planner


@torch.inference_mode(False)  # which also lets gradients be made
def shrink_by_plan(
    structure: Structure,
    planner: Planner,
    batches: Iterable[Any] | None,
    *,
    saliency: str,
    compensate: bool,
    num_samples: int,
    rounds: int,
    loss_fn: LossFn | None = None,
    progress: bool = True,
) -> StructuredReport:
    """Carry out what `check_structured` has planned, which measures nothing anew.

    Structure and planner are from there, of the model as it is still; the other arguments are those of
    `prune_structured` that were checked.

    Raises:
        CalibrationError: see `prune_structured`.
    """
    data = [batch for batch, _ in samples([] if batches is None else batches, num_samples)]
    numbering, now = _Numbering(structure), structure
    start, span = planner.cost(structure.sizes), planner.final - planner.cost(structure.sizes)
    with _unchanged_on_failure(structure.model):
        for done in range(1, rounds + 1):
            down_to = None if done == rounds else start + round(span * done / rounds)
            if done > 1 and planner.reached(now.sizes):
                break
            if down_to is not None and planner.cost(now.sizes) <= down_to:  # the last unit was a large one
                continue
            this = _Round(now, planner.types, saliency, compensate, num_samples, loss_fn, progress)
            numbering.remove(this.run(data, planner, down_to))
            now = read_structure(structure.model, planner.attention_unit)
    shapes = structure.shapes()
    return StructuredReport(
        structure.sizes, now.sizes, shapes.count(structure.sizes), shapes.count(now.sizes), numbering.removal()
    )


class _Round:
    """One structural pruning in progress; the model changes in the last step alone."""

    def __init__(
        self,
        structure: Structure,
        types: tuple[UnitType, ...],
        saliency: str,
        compensate: bool,
        num_samples: int,
        loss_fn: LossFn | None,
        progress: bool,
    ) -> None:
        self.structure, self.types, self.saliency, self.compensate = structure, types, saliency, compensate
        self.num_samples, self.loss_fn, self.progress = num_samples, loss_fn, progress
        self.hessians: dict[str, Tensor] = {}

    def run(self, data: list[Any], planner: Planner, down_to: int | None) -> Removal:
        structure = self.structure
        removal = plan_removal(self._saliencies(data), structure, planner, down_to)
        weights = self._compensated(data, removal) if self.compensate else {}
        parameters = structure.parameters()
        for name, weight in weights.items():
            parameters[name].data = weight
        remove_units(structure.model, removal, attention_unit=structure.attention_unit)
        return removal

    def _collect(self, data: list[Any], targets: list[Any], statistics: set[str]) -> dict[str, LayerStatistics]:
        model = self.structure.model
        return collect(
            model,
            on_device(model, data),
            targets,
            statistics,
            num_samples=self.num_samples,
            loss_fn=self.loss_fn,
            progress=self.progress,
        )

    def _saliencies(self, data: list[Any]) -> dict[str, Tensor]:
        structure = self.structure
        if self.saliency == "reap":
            model, loss_fn, progress = structure.model, self.loss_fn, self.progress
            return {"expert": reap_saliency(structure, on_device(model, data), loss_fn, len(data), progress)}
        if self.saliency in ("kfac", "obs"):
            wanted = {INPUT_NORM, OUTPUT_GRAD_NORM}
            # Hidden channels and experts have too many readers to hold a Hessian each: those come in a second sweep.
            if self.compensate and not {"hidden", "expert"} & set(self.types):
                wanted.add(HESSIAN)
            statistics = self._collect(data, reader_targets(structure, self.types), wanted)
            self.hessians = {name: s.hessian for name, s in statistics.items() if s.hessian is not None}
            if self.saliency == "kfac":
                return kfac_saliency(structure, statistics, self.types)
            moments = self._moments(data)
            layers = sum(structure.places(t) for t in self.types if t in ("attention", "ffn"))
            with progress_bar("Judging", layers, self.progress) as advance:
                left, costs = unexplained_of(moments), costs_of(moments, advance)
                return kfac_saliency(structure, statistics, self.types, left, costs)
        scores = SaliencyAccumulator(structure, self.types, self.saliency)
        if self.saliency == "magnitude":
            scores.add()
        else:
            self._accumulate(scores, data)
        return scores.means()

    def _accumulate(self, scores: SaliencyAccumulator, data: list[Any]) -> None:
        """Forward and backward of every batch; gradients and flags of the model are afterwards what they were."""
        model = self.structure.model
        loss_fn = self.loss_fn or model_loss
        half = any(p.dtype == torch.float16 for p in model.parameters())
        with (
            _own_gradients(list(model.parameters())) as clear,
            quiet_model(model, freeze=False),
            progress_bar("Calibrating (forward + backward)", len(data), self.progress) as advance,
        ):
            for batch in on_device(model, data):
                steps = scores.steps
                for scale in (HALF_SCALE, 1.0) if half else (1.0,):  # large gradients are the rarer ones
                    loss = loss_fn(model, batch).nanmean()  # NaN: a sample without labels
                    if not bool(torch.isfinite(loss)):
                        raise CalibrationError(
                            f"the loss of a calibration batch is not finite ({loss.item()}); the weights are unchanged"
                        )
                    (loss.float() * scale if half else loss).backward()  # type: ignore[no-untyped-call]
                    scores.add(scale)
                    clear()
                    if scores.steps > steps:
                        break
                else:
                    raise CalibrationError(
                        "the gradients of a calibration batch are not finite; the weights are unchanged"
                    )
                advance()
        if not scores.steps:
            raise CalibrationError("there is no calibration sample; the weights are unchanged")

    def _compensated(self, data: list[Any], removal: Removal) -> dict[str, Tensor]:
        """New weights of the layers that lose inputs."""
        moments = self._moments(data, list(removal))
        weights = compensation(self.structure, removal, moments, progress=self.progress) if moments else {}
        self._tell_of_filled_zeros(weights)
        return weights

    def _tell_of_filled_zeros(self, weights: dict[str, Tensor]) -> None:
        """Warn if layers that were pruned before are re-fitted, which knows no masks."""
        now = self.structure.parameters()
        filled = {
            name: int(((now[name].detach() == 0) & (weight != 0)).count_nonzero())
            for name, weight in weights.items()
            if pruned_zeros(now[name], whole_rows=True)
        }
        if filled := {name: count for name, count in filled.items() if count}:
            warn(
                f"compensate=True fills {sum(filled.values()):,} zeros of pruned weights in {len(filled)} layers "
                f"({next(iter(filled))}, ...), which it re-fits for the inputs that go: shrink before you prune, prune "
                "again afterwards, or pass compensate=False, which keeps them",
            )

    def _moments(self, data: list[Any], types: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Second moments of the inputs of layers that can be updated, by name; in a sweep of their own if need be."""
        types = self.types if types is None else types
        observed = observed_layers(self.structure, types)
        names = {f"{name}.weight" for name in observed.values()} - self.hessians.keys()
        targets = [t for t in reader_targets(self.structure, types) if t.name in names]
        if targets:
            found = self._collect(data, targets, {HESSIAN})
            self.hessians |= {name: statistics.get(HESSIAN) for name, statistics in found.items()}
        return {name: self.hessians[f"{seen}.weight"] for name, seen in observed.items()}


@contextmanager
def _own_gradients(parameters: list[nn.Parameter]) -> Iterator[Any]:
    """All parameters require a gradient and have none; yields a function that clears what comes. Undone at the end."""
    before = [(p, p.requires_grad, p.grad) for p in parameters]

    def clear() -> None:
        for p in parameters:
            p.grad = None

    try:
        clear()
        for p in parameters:
            p.requires_grad_(True)
        yield clear
    finally:
        for p, required, grad in before:
            p.requires_grad_(required)
            p.grad = grad


class _Numbering:
    """Which units, numbered as in the first model, are left after some removals."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.layers = torch.arange(structure.sizes.num_hidden_layers, device="cpu")
        self.left = {
            t: [torch.arange(structure.units(t), device="cpu")] * structure.places(t)
            for t in structure.family.types
            if structure.units(t) and t != "layer"
        }

    def remove(self, removal: Removal) -> None:
        """Take in a removal that numbers the units that are left."""
        for t, places in removal.items():
            for place, gone in enumerate(places if t != "layer" else ()):
                first = int(self.layers[place]) if t in IN_LAYERS else 0
                self.left[t][first] = _without(self.left[t][first], gone)
        if "layer" in removal:
            self.layers = _without(self.layers, removal["layer"][0])

    def removal(self) -> Removal:
        """Return all that went, as one removal; a layer that went early loses its first units besides."""
        layers = torch.arange(self.structure.sizes.num_hidden_layers, device="cpu")
        found = {"layer": [_without(layers, self.layers)]}
        for t, places in self.left.items():
            fewest = min(len(left) for left in places)
            stay = [left[len(left) - fewest :] for left in places]
            found[t] = [_without(torch.arange(self.structure.units(t), device="cpu"), left) for left in stay]
        return check_removal(self.structure, {t: places for t, places in found.items() if len(places[0])})


def _without(numbers: Tensor, gone: Tensor) -> Tensor:
    stays = torch.ones(len(numbers), dtype=torch.bool, device="cpu")
    stays[gone] = False
    return numbers[stays]


# What holds the tree of a model: hooks are in dictionaries beside these, and their handles know those by identity.
_TREE = ("_parameters", "_buffers", "_modules")


@contextmanager
def _unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Put back what a model was, parts, sizes and parameters, if the block fails; nothing is copied but buffers."""
    parts = [(part, type(part), dict(vars(part))) for part in model.modules()]
    configs = {id(c): c for part, _, _ in parts if (c := getattr(part, "config", None)) is not None}
    attributes = [(vars(thing), dict(vars(thing))) for thing in (*configs.values(), *(part for part, _, _ in parts))]
    tree = [(before[name], dict(before[name])) for _, _, before in parts for name in _TREE]
    values = [(p, p.data, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    except BaseException:
        with uninterrupted(), torch.no_grad():
            for part, its_class, _ in parts:
                part.__class__ = its_class
            for now, before in (*attributes, *tree):
                now.clear()
                now.update(before)
            for p, data, grad in values:
                p.data, p.grad = data, grad
            for buffer, value in buffers:
                buffer.copy_(value)
        raise
