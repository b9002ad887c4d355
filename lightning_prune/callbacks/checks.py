"""Refuse what callbacks cannot do under a Trainer, before anything changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.kinds import callbacks_of, is_kind, start_method
from lightning_prune.callbacks.teardown import refuse_offloaded, refuse_unmovable
from lightning_prune.callbacks.weight_pruning import WeightPruning, pruners_of
from lightning_prune.checkpoints.reading import check_checkpoint_of
from lightning_prune.errors import check_bool, check_whole, refuse_inference_tensors
from lightning_prune.naming import has_class, uncompiled
from lightning_prune.pruning.coverage import pruned_zeros
from lightning_prune.pruning.elsa import ELSA
from lightning_prune.pruning.holding import with_inner
from lightning_prune.pruning.patterns import parse_pattern
from lightning_prune.ranks import shard_group
from lightning_prune.report.figures import check_picture
from lightning_prune.schedules import OneShot
from lightning_prune.sharding import refuse_shards
from lightning_prune.structure.device_goals import check_device_goal
from lightning_prune.structure.planning import multiples_of
from lightning_prune.structure.rehearsal import rehearse
from lightning_prune.structure.removal import check_rescaling, holds_tensors
from lightning_prune.structure.saliency import TRAINING_SALIENCIES, SaliencyAccumulator, check_saliency
from lightning_prune.structure.saving import noted_units
from lightning_prune.structure.sizes import ATTENTION_UNITS, UnitType
from lightning_prune.structure.units import Structure

_C = TypeVar("_C")


def check_settings(callback: Any) -> None:
    """Values that are wrong for any model.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    check_saliency(callback.saliency, TRAINING_SALIENCIES)
    if callback.saliency == "kfac" and "expert" in callback.types:
        raise ValueError(
            f"saliency='kfac' while training watches layers, which experts are not, and types={callback.types!r}: use "
            "'taylor2', or leave 'expert' out"
        )
    if callback.attention_unit not in ATTENTION_UNITS:
        raise ValueError(f"attention_unit={callback.attention_unit!r} must be one of {ATTENTION_UNITS}")
    check_bool("second_order", callback.second_order)
    for name in ("second_order_every", "compact_every", "round_to"):
        if name != "round_to" or callback.round_to is not None:
            check_whole(name, getattr(callback, name))
    for name in ("saliency_decay", "second_order_decay"):
        if not 0 <= getattr(callback, name) < 1:
            raise ValueError(f"{name}={getattr(callback, name)!r} must be in [0, 1)")
    if callback.schedule.end is not None and callback.schedule.units != 1:
        raise ValueError(
            f"units_per_pruning={callback.schedule.units} and end={callback.schedule.end} exclude each other: with end "
            "each pruning takes as many units as it needs to arrive there. Leave one out"
        )
    if callback.distill_from is not None and not 0 < callback.distill_weight <= 1:
        raise ValueError(f"distill_weight={callback.distill_weight!r} must be above 0 and at most 1")
    if not callback.temperature > 0:
        raise ValueError(f"temperature={callback.temperature!r} must be above 0")
    if callback.picture is not None:
        check_picture(callback.picture, "picture")
    target = callback.target
    if isinstance(target, bool) or not isinstance(target, (int, float, dict)):
        raise TypeError(
            f"target={target!r} must be a float (share), an int (parameters) or a dict of final sizes, bytes or seconds"
        )
    check_device_goal(target)


def check_trainer(trainer: L.Trainer, callback: Any) -> None:
    """Strategies and callbacks that hold shapes of their own, and a precision that scales gradients under kfac.

    Raises:
        ValueError: naming it, and what to use.
    """
    strategy: Any = trainer.strategy
    known = is_kind(strategy, "SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
    if not known or is_kind(strategy, "DeepSpeedStrategy"):  # which is one of DDP to Lightning
        raise ValueError(
            f"PruningAwarePretraining does not support {type(strategy).__name__}, whose shards hide the units; use one "
            "device, strategy='ddp', or strategy=ModelParallelStrategy(tensor_parallel_size=1), which shards with "
            "FSDP2 (fully_shard in configure_model)"
        )
    if is_kind(strategy, "ModelParallelStrategy"):
        _check_sharding(strategy, trainer)
    if is_kind(strategy, "DDPStrategy"):
        if (method := start_method(strategy)) is not None:
            raise ValueError(
                f"PruningAwarePretraining does not support DDP with start_method={method!r}, which "
                "returns the weights to a module of the old sizes; use strategy='ddp'"
            )
        if strategy._ddp_comm_state is not None:
            raise ValueError(
                "PruningAwarePretraining does not support DDP with ddp_comm_state, whose buffers keep the old shapes; "
                "leave it out"
            )
    if callback.saliency == "kfac" and getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"saliency='kfac' squares output gradients, which precision={trainer.precision!r} scales from step to "
            "step; use precision='bf16-mixed', or another saliency"
        )
    if len(pruners_of(trainer)) > 1:
        raise ValueError(
            "PruningAwarePretraining beside two WeightPruning is not supported: prune all layers with one of them, or "
            "in a fit of its own, on the small model that save_pretrained writes"
        )
    for other in callbacks_of(trainer):
        if other is callback:
            continue
        if is_kind(other, "StochasticWeightAveraging", "ModelPruning"):
            raise ValueError(
                f"{type(other).__name__} keeps tensors of the weights' shapes, which change here: run it in a fit of "
                "its own, after the model has shrunk"
            )
        # By name: importing the adapters' callback would load PEFT.
        beside = isinstance(other, WeightPruning) or has_class(other, "PERPRetraining")
        if beside and is_kind(strategy, "ModelParallelStrategy"):
            raise ValueError(
                f"{type(other).__name__} beside PruningAwarePretraining is not supported under ModelParallelStrategy, "
                "where pruned units stay in the shards as zeros: use one device or strategy='ddp', or run it in a fit "
                "of its own, on the small model that save_pretrained writes"
            )


def _check_sharding(strategy: Any, trainer: L.Trainer) -> None:
    tensor = strategy.device_mesh["tensor_parallel"].size()
    if tensor > 1:
        raise ValueError(
            f"PruningAwarePretraining does not support ModelParallelStrategy(tensor_parallel_size={tensor}), which "
            "splits units between processes; use tensor_parallel_size=1 and data_parallel_size for all processes"
        )
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        raise ValueError(
            f"PruningAwarePretraining does not support precision={trainer.precision!r} where parameters are sharded: "
            "its scaler may skip a step on one process alone; use precision='bf16-mixed'"
        )
    for other in callbacks_of(trainer):
        if is_kind(other, "WeightAveraging"):
            raise ValueError(
                f"{type(other).__name__} keeps a copy of the model in which no units are masked where parameters are "
                "sharded; use strategy='ddp', or leave it out"
            )


def _is_compiled(module: L.LightningModule) -> bool:
    """Whether a part of a module is compiled: by ``torch.compile``, as a module of Lightning, or by ``compile()``."""
    try:
        to_uncompiled(copy.copy(module))  # the copy alone forgets it
    except ValueError:
        return any(uncompiled(m) is not m or m._compiled_call_impl is not None for m in module.modules())
    return True


def check_module(module: L.LightningModule, strategy: Any) -> None:
    """Modules that cannot change their shapes.

    Raises:
        ValueError: manual optimization, a compiled module, one that another strategy has sharded, or that
            torch.inference_mode has made.
    """
    if not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} uses manual optimization, where nobody says which gradients a step is made of; "
            "PruningAwarePretraining needs automatic optimization"
        )
    if _is_compiled(module):
        raise ValueError(
            "the model is compiled (torch.compile), and every compaction would compile it anew; train without, and "
            "compile the model once it is small"
        )
    refuse_offloaded(strategy, module)
    refuse_inference_tensors(module.named_parameters(), frozen=False)
    if not is_kind(strategy, "ModelParallelStrategy"):
        refuse_shards(
            module,
            f"parameters are sharded (DTensor) under {type(strategy).__name__} and cannot be sliced; use the "
            "ModelParallelStrategy(tensor_parallel_size=1) that sharded them, or start from save_pretrained",
        )


def neighbor(trainer: L.Trainer, kind: type[_C]) -> _C | None:
    """Return the first callback of a kind in the Trainer, None without one."""
    return next((callback for callback in callbacks_of(trainer) if isinstance(callback, kind)), None)


def masked_while_shrinking(trainer: L.Trainer, callback: Any) -> bool:
    """Return whether a `WeightPruning` in the same Trainer prunes before a `PruningAwarePretraining` is done."""
    pruner, end = neighbor(trainer, WeightPruning), callback.schedule.end
    return pruner is not None and (end is None or pruner.schedule.start <= end)


def check_neighbors(trainer: L.Trainer, callback: Any, structure: Structure) -> dict[UnitType, int]:
    """Refuse a `WeightPruning` in the same Trainer whose masks could not follow a model that shrinks.

    Returns:
        How many units of a type, side by side, have to go together for N:M groups to stay whole.

    Raises:
        ValueError: naming the settings that exclude each other, and what to use.
    """
    pruner = neighbor(trainer, WeightPruning)
    if pruner is None:
        return {}
    if isinstance(pruner.schedule, ELSA):
        raise ValueError(
            f"WeightPruning(schedule={pruner.schedule!r}) has sparse copies of the weights, which would keep their "
            "shapes when PruningAwarePretraining slices these: shrink in a fit of its own, and train into the sparsity "
            "after it"
        )
    if pruner.distill_from is not None and callback.distill_from is not None:
        raise ValueError(
            "distill_from is given to WeightPruning and to PruningAwarePretraining: give it to one of them"
        )
    settings = pruner.settings
    names = [*(settings.targets or ()), *settings.ignore]
    names += settings.allocation if isinstance(settings.allocation, Mapping) else ()
    numbers = [int(n) for name in names if isinstance(name, str) for n in re.findall(r"(?<![^.])\d+(?![^.])", name)]
    if not masked_while_shrinking(trainer, callback):
        left = callback.target.get("num_hidden_layers", 1) if isinstance(callback.target, Mapping) else 1
        if "layer" in callback.types and max(numbers, default=0) >= left:
            raise ValueError(
                f"WeightPruning names the layer {max(numbers)} (targets, ignore or allocation), which may be gone when "
                f"it prunes: types={callback.types!r} and target={callback.target!r} are sure to leave {left}. Leave "
                "the number out, or run WeightPruning in a fit of its own"
            )
        return {}
    later = (
        "let it prune when the model has its size: PruningAwarePretraining(end=STEP) and "
        "WeightPruning(schedule=OneShot(STEP + 1))"
    )
    nm = parse_pattern(settings.pattern)
    if nm is None and (settings.update or settings.score.name == "sparsegpt"):
        raise ValueError(
            f"WeightPruning(score={settings.score.name!r}, update={settings.update!r}) prunes once, and a model "
            f"that shrinks afterwards would have another sparsity: use another score without update, or {later}"
        )
    named = isinstance(settings.allocation, Mapping) or settings.targets is not None or bool(numbers)
    if "layer" in callback.types and named:
        raise ValueError(
            "WeightPruning names layers (allocation, targets or ignore), whose numbers change when types=('layer', "
            f"...) removes some: leave the names out, or {later}"
        )
    if nm is None:
        return {}
    rounded = multiples_of(callback.round_to, structure, callback.target)
    for unit_type, name in (("ffn", "intermediate_size"), ("hidden", "hidden_size")):
        size = getattr(structure.sizes, name)
        if unit_type in callback.types and (rounded.get(name, 1) % nm.m or size % nm.m):
            raise ValueError(
                f"pattern={settings.pattern!r} has groups of {nm.m} inputs, which stay whole only if "
                f"round_to={callback.round_to!r} and {name}={size} are multiples of {nm.m}: use round_to={nm.m}, or "
                f"{later}"
            )
    if "attention" in callback.types and structure.sizes.head_dim % nm.m:
        raise ValueError(
            f"pattern={settings.pattern!r} has groups of {nm.m} inputs, which heads of {structure.sizes.head_dim} "
            f"dimensions do not keep whole: leave 'attention' out of types, or {later}"
        )
    return {"ffn": nm.m, "hidden": nm.m}


def units_stay(structure: Structure, strategy: Any, types: Sequence[str]) -> bool:
    """Whether pruned units are to stay masks: where parameters are shards.

    Raises:
        ValueError: a strategy of shards without shards, or parameters of which only some are; experts.
    """
    sharded = shard_group(structure.parameters()).group is not None
    if sharded and "expert" in types:
        raise ValueError(
            f"types={types!r} with sharded parameters: experts cannot be masked (a router would go on choosing them), "
            "and shards cannot be sliced. Train on one device or under DDP"
        )
    if is_kind(strategy, "ModelParallelStrategy") and not sharded:
        raise ValueError(
            "no parameter is sharded under ModelParallelStrategy, so processes would train apart: call fully_shard in "
            "configure_model, as CausalLM does"
        )
    return sharded


def warn_of_readers(module: L.LightningModule, structure: Structure) -> None:
    """Warn of parameters beside the language model that may read its hidden channels: nothing slices them with it."""
    own, hidden = set(structure.model.parameters()), structure.sizes.hidden_size
    beside = [name for name, p in module.named_parameters() if p not in own and hidden in p.shape]
    if beside:
        rank_zero_warn(
            f"PruningAwarePretraining: {beside[0]!r} ({len(beside)} parameters in all) is no part of the language "
            f"model and has a dimension of {hidden}, the number of hidden channels. Nothing slices it with the model: "
            "if it reads hidden states, training will fail once hidden channels are sliced off. Leave 'hidden' out of "
            "types then"
        )


def warn_of_pruned(structure: Structure) -> None:
    """Warn of weights that were pruned before, and that nothing holds at zero while the model shrinks."""
    inside = {name for i in range(structure.sizes.num_hidden_layers) for name in structure.in_layer(i)}
    matrices = {name: p for name, p in structure.parameters().items() if name in inside and p.dim() > 1}
    zeros = {name: count for name, p in matrices.items() if (count := pruned_zeros(p, whole_rows=False))}
    if zeros:
        rank_zero_warn(
            f"PruningAwarePretraining: {len(zeros)} layers ({next(iter(zeros))}, ...) have {sum(zeros.values()):,} "
            "zeros of pruned weights, which training fills, as nothing holds them: put WeightPruning(score='keep') "
            "beside it, or prune when the model has its size"
        )


def check_not_masked(structure: Structure) -> None:
    """A model whose units another callback has masked, and which this one would count as there.

    Raises:
        ValueError: there are such units.
    """
    if noted_units(structure.model) is not None:
        raise ValueError(
            "the model holds units that another PruningAwarePretraining has masked: go on with that one (or with its "
            "checkpoint), or start from the small model that save_pretrained writes"
        )


def check_trained(structure: Structure, saliency: SaliencyAccumulator, types: Sequence[str]) -> None:
    """Frozen parameters whose gradients the saliency is made of: they would count as zero.

    Raises:
        ValueError: there are some.
    """
    parameters = structure.parameters()
    if frozen := [name for name in saliency.read_gradients() if not parameters[name].requires_grad]:
        raise ValueError(
            f"saliency={saliency.kind!r} of types={tuple(types)!r} needs gradients, but {len(frozen)} parameters are "
            f"frozen ({frozen[0]}, ...); train them, use saliency='magnitude', or types of units that they are no part "
            "of ('ffn' needs those of its own layers alone)"
        )


def check_optimizers(
    structure: Structure, optimizers: Sequence[Optimizer], saliency: SaliencyAccumulator, types: Sequence[str]
) -> None:
    """Optimizers and gradients that the saliency cannot be read from, and states that could not be sliced.

    Raises:
        ValueError: several optimizers, parameters whose gradients are needed and that have none or are never stepped,
            or see `check_states`: of the states that are there, or that the first step would make.
    """
    if len(optimizers) != 1:
        raise ValueError(
            f"PruningAwarePretraining needs one optimizer, found {len(optimizers)}: with several, a step is no longer "
            "one set of gradients"
        )
    check_trained(structure, saliency, types)
    parameters, needed = structure.parameters(), saliency.read_gradients()
    found = list(with_inner(optimizers))
    stepped = {p for optimizer in found for group in optimizer.param_groups for p in group["params"]}
    trained = {p for p in parameters.values() if p.requires_grad}
    if trained and stepped.isdisjoint(trained):
        raise ValueError(
            f"{type(optimizers[0]).__name__} has no parameter of the model (it may step copies of them), so none would "
            "follow when the model shrinks: give it the model's own, model.parameters()"
        )
    # Hooks see the gradients of one batch alone.
    if left_out := [n for n in needed if parameters[n] not in stepped and saliency.stream is None]:
        raise ValueError(
            f"saliency={saliency.kind!r} of types={tuple(types)!r} needs the gradients of {left_out[0]} "
            f"({len(left_out)} parameters in all), which {type(optimizers[0]).__name__} does not have, so that nobody "
            "clears them after a step: give them to it, or freeze them (requires_grad_(False)) and use types of units "
            "that they are no part of, or saliency='magnitude'"
        )
    check_states(structure, found, types)
    for optimizer in optimizers:
        if (rehearsal := rehearse(optimizer, parameters)) is None:
            continue
        if rehearsal.hidden:
            raise ValueError(
                f"{type(optimizer).__name__} steps a {type(rehearsal.hidden[0]).__name__} that is not among its "
                "attributes, so its states would not be sliced with the weights: keep it in an attribute, or use that "
                "optimizer alone"
            )
        check_states(structure, rehearsal.optimizers, types, rehearsal.parameters)


def check_states(
    structure: Structure,
    optimizers: Sequence[Optimizer],
    types: Sequence[str],
    parameters: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Optimizer states that cannot be sliced with their weight, and copies of weights; those that exist by now.

    Args:
        structure: Of the model.
        optimizers: That step it, and those that they hold.
        types: Of units that are to go.
        parameters: What the optimizers step, by the names of the model's; default the model's.

    Raises:
        ValueError: naming the optimizer and the state, or its attribute.
    """
    way = "use one whose states have the weight's shape (Adam, AdamW, SGD, RMSprop, Adagrad)"
    parameters = structure.parameters() if parameters is None else parameters
    least = min((p.numel() for p in parameters.values() if p.dim() > 1), default=1)
    for optimizer in optimizers:
        of_all = {name: held for name, held in optimizer.state.items() if not isinstance(name, Tensor)}
        for attribute, held in {**vars(optimizer), "state": of_all}.items():
            if attribute != "param_groups" and holds_tensors(held, least):
                raise ValueError(
                    f"{type(optimizer).__name__} keeps tensors in its attribute {attribute!r}, beside the states of "
                    f"single weights, and they would not be sliced with these: {way}"
                )
        for name, p in parameters.items():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                    found = f"with shape {tuple(value.shape)}"
                elif not isinstance(value, Tensor) and holds_tensors(value):
                    found = f"as a {type(value).__name__}"
                else:
                    continue
                raise ValueError(
                    f"{type(optimizer).__name__} keeps the state {key!r} of {name!r} {found}, which cannot be sliced "
                    f"with the weight's {tuple(p.shape)}; {way}"
                )
    if "hidden" in types:
        check_rescaling(structure, optimizers, parameters)


def check_strategy(
    strategy: Any, module: L.LightningModule, has_adapters: bool, reconstruct: bool, merge: bool
) -> None:
    """Whether adapters can be trained, and merged, under a strategy.

    Args:
        strategy: Of the Trainer.
        module: As it is before adapters are put on.
        has_adapters: Whether an earlier fit left them on.
        reconstruct: Whether blocks are to be fitted before training.
        merge: Whether adapters are to be merged at the end.

    Raises:
        ValueError: naming what to use instead.
    """
    if is_kind(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise ValueError(
            f"PERPRetraining does not support {type(strategy).__name__}, whose flat shards hide the weights; use "
            "strategy=ModelParallelStrategy(tensor_parallel_size=1), which shards with FSDP2 (fully_shard in "
            "configure_model), or 'ddp'"
        )
    if (method := start_method(strategy)) is not None and has_adapters == merge:
        # Lightning loads what comes back without looking whether any name is the module's.
        end, here = ("without", "with") if merge else ("with", "without")
        raise ValueError(
            f"PERPRetraining(merge={merge}) does not support DDP with start_method={method!r}: its processes end {end} "
            f"adapters, and give their weights to a module {here}, which takes none of them; use strategy='ddp', or "
            f"merge={not merge}"
        )
    if is_kind(strategy, "ModelParallelStrategy"):
        tensor = strategy.device_mesh["tensor_parallel"].size()
        if tensor > 1:
            raise ValueError(
                f"PERPRetraining does not support ModelParallelStrategy(tensor_parallel_size={tensor}): adapters "
                "are not split within layers; use tensor_parallel_size=1 and data_parallel_size for all processes"
            )
        if reconstruct:
            raise ValueError(
                "reconstruct fits blocks one by one on whole weights, which ModelParallelStrategy shards: pass "
                "reconstruct=False, or use strategy='ddp'"
            )
    else:
        refuse_shards(
            module,
            f"parameters are sharded (DTensor) under {type(strategy).__name__}; use the "
            "ModelParallelStrategy(tensor_parallel_size=1) that sharded them",
        )
    refuse_offloaded(strategy, module)
    if any(parameter.is_meta for parameter in module.parameters()):
        refuse_unmovable(
            strategy,
            f"parameters of {type(module).__name__} have no values yet (meta device), and adapters are made from them: "
            "load the weights in __init__ (CausalLM without read_once)",
        )
    if not has_adapters:
        refuse_shards(
            module,
            f"the parameters of {type(module).__name__} are sharded (DTensor) already, and adapters have to be there "
            "before: build the module anew, from the saved weights, and call fully_shard in configure_model alone",
        )


class _Retraining(Protocol):
    """What is read of `PERPRetraining`."""

    adapter: str | None
    masks: Any
    reconstruct: Any
    options: Any
    distill_from: Any


def check_order(callbacks: Sequence[Any], retraining: _Retraining) -> None:
    """Whether callbacks that copy the module in ``setup`` come after the adapters, which their copy needs.

    Raises:
        ValueError: naming the one to put later.
    """
    for callback in callbacks[: callbacks.index(retraining)]:
        if retraining.adapter is not None and is_kind(callback, "WeightAveraging", "StochasticWeightAveraging"):
            raise ValueError(
                f"{type(callback).__name__} copies the module before PERPRetraining has put adapters on it: put "
                "PERPRetraining before it in Trainer(callbacks=[...])"
            )


def check_pruner(pruner: WeightPruning, retraining: _Retraining) -> None:
    """Whether the `WeightPruning` of the same Trainer can prune what is retrained.

    Raises:
        ValueError: naming the settings that exclude each other.
    """
    if retraining.masks is not None:
        raise ValueError("masks are those of the WeightPruning callback in the same Trainer; leave masks out")
    if pruner.distill_from is not None and retraining.distill_from is not None:
        raise ValueError("distill_from is given to WeightPruning and to PERPRetraining: give it to one of them")
    if isinstance(pruner.schedule, ELSA):
        raise ValueError(
            f"WeightPruning(schedule={pruner.schedule!r}) trains the weights themselves into their sparsity, which "
            "adapters would hold fixed: retrain in a fit of its own, after it"
        )
    if isinstance(pruner.schedule, OneShot) and not pruner.schedule.start:
        return
    if retraining.reconstruct is not None:
        raise ValueError(
            f"reconstruct comes before training, but WeightPruning(schedule={pruner.schedule!r}) prunes during it; "
            "use schedule=None, or reconstruct=False"
        )
    initial = retraining.options.get("init_lora_weights", True)
    if retraining.adapter == "lora" or initial is False:
        way = "leave init_lora_weights out" if initial is False else "use adapter='mask_lora'"
        raise ValueError(
            f"WeightPruning(schedule={pruner.schedule!r}) prunes while the adapters train, and merges them first, "
            f"which adapter={retraining.adapter!r} with init_lora_weights={initial} cannot: {way}, or schedule=None"
        )


def check_after_shrinking(
    trainer: L.Trainer, pruners: Sequence[WeightPruning], retraining: _Retraining, left_on: bool
) -> None:
    """Whether adapters can go on in the middle of a fit, after a model has shrunk and was pruned.

    Raises:
        ValueError: naming what cannot be beside each other.
    """
    if not pruners:
        raise ValueError(
            "PERPRetraining beside PruningAwarePretraining needs the masks of a WeightPruning in the same Trainer, "
            "since those of the large model do not fit the small one: add WeightPruning(...), or run it in another fit"
        )
    if retraining.reconstruct is not None or retraining.masks is not None:
        name = "masks" if retraining.masks is not None else "reconstruct"
        raise ValueError(
            f"{name} of PERPRetraining is for weights of the shapes at fit start, which PruningAwarePretraining "
            f"changes: leave {name} out, or run PERPRetraining in a fit of its own"
        )
    if retraining.distill_from is not None:
        raise ValueError(
            "distill_from of PERPRetraining beside PruningAwarePretraining: give distill_from to "
            "PruningAwarePretraining, or run PERPRetraining in a fit of its own"
        )
    if retraining.adapter == "lora":
        raise ValueError(
            "adapter='lora' cannot be merged, so checkpoints of a model that has shrunk could not hold it: use "
            "adapter='mask_lora', or run PERPRetraining in a fit of its own"
        )
    if left_on:
        raise ValueError(
            "the module has adapters of an earlier fit, and PruningAwarePretraining needs the plain model: merge them "
            "(lightning_prune.perp.merge), or take PruningAwarePretraining out"
        )
    if (average := next((c for c in callbacks_of(trainer) if is_kind(c, "WeightAveraging")), None)) is not None:
        raise ValueError(
            f"{type(average).__name__} averages the weights that the module has at fit start, and adapters come later: "
            "leave it out, or run PERPRetraining in a fit of its own"
        )


class CheckpointCheck(L.Callback):
    """Calls `check_checkpoint_of`, for modules and callbacks that do not."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See `check_checkpoint_of`."""
        check_checkpoint_of(trainer)
