"""Retrain a sliver of a pruned model: put adapters on, train with any loop, merge; every zero survives.

PERP: Zimmer et al. 2023, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs", arXiv 2312.15230.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_prune.errors import refuse_inference_tensors
from lightning_prune.naming import clean_path, is_bias, is_compiled_alone, plain_name, uncompiled
from lightning_prune.perp.convolutions import check_convolution, put_on_convolution
from lightning_prune.perp.experts import check_experts, place_of, put_on_experts, weight_name
from lightning_prune.perp.layers import SparseLayer, check_base_layer, find_variant, sparse_layers
from lightning_prune.perp.masks import set_masks
from lightning_prune.perp.options import (
    WholeNames,
    by_pattern,
    check_adapter,
    check_options,
    check_parts,
    make_config,
    match_modules,
    select_parameters,
    warn_of_unmatched,
)
from lightning_prune.perp.record import Retraining, find_retraining, remember, retraining_of, unwrapped
from lightning_prune.perp.storage import (
    CONFIG_FILE,
    PEFT_TYPE,
    check_state,
    check_sum,
    files_of,
    options_for,
    read_config,
    read_masks,
    read_tensors,
    remove_unnamed,
    replace_file,
    settings_of,
    write_named,
)
from lightning_prune.progress import is_main_process, warn
from lightning_prune.pruning.coverage import pruned_zeros
from lightning_prune.pruning.layer_kinds import CONV1D, CONV2D, CONVOLUTION1D, CONVOLUTION3D, EXPERT, LINEAR, embeds
from lightning_prune.pruning.masks import Masks, check_masks, pack_masks
from lightning_prune.pruning.running import checkpoints_reentrantly
from lightning_prune.pruning.targets import Target, find_targets, parameters_of
from lightning_prune.pruning.zeros import CONVOLUTIONS
from lightning_prune.safety import expanded, uninterrupted
from lightning_prune.sharding import (
    as_shard_of,
    count_over_ranks,
    gather_whole,
    local,
    refuse_shard_root,
    refuse_shards,
    reshard,
)

# Kinds of layer that take an adapter; what "all-linear" means, as in PEFT.
_ADAPTED = (LINEAR.name, CONV1D.name, EXPERT.name, CONVOLUTION1D.name, CONV2D.name, CONVOLUTION3D.name)
_LINEAR = (LINEAR.name, CONV1D.name)


def add_adapters(
    model: nn.Module,
    adapter: str | None = "mask_lora",
    masks: Mapping[str, Tensor] | None = None,
    train: Iterable[str] = ("bias", "norm"),
    adapt_head: bool = False,
    **lora_options: Any,
) -> nn.Module:
    """Freeze a pruned model, and put adapters on its pruned layers.

    Only the adapters and the parts in `train` require gradients afterwards. Give those to an optimizer (the paper:
    AdamW without weight decay, a linear schedule with 10 % warm-up), train, and `merge`.

    Args:
        model: A model with pruned weights, of transformers or any other. It is changed in place; use what is returned.
        adapter: ``"mask_lora"``: W + M * (s B A). ``"scale_lora"``: W * (B A). ``"hira"``: W + W * (B A).
            ``"lora_prune"``: W + s B A, masked at the merge. ``"lora"``: W + s B A, never merged. None: no adapters,
            only `train`. Or the name of a variant of your own, see `register_adapter`.
        masks: Bool masks by parameter name, True = kept, as `prune` returns them; a weight without one takes its
            exact zeros, and so do all by default.
        train: Any of ``"bias"``, ``"norm"``, ``"head"`` (of a classifier too) and ``"embedding"``.
        adapt_head: Put an adapter on the output embeddings too, as the code of the paper does. Nothing of them is
            pruned, so with mask_lora and lora_prune it is a plain LoRA, and merged densely.
        **lora_options: ``r`` (16; of a convolution at most the rank that its kernel can have), ``lora_alpha`` (2 r; s =
            lora_alpha / r), ``use_rslora``, ``init_lora_weights``, ``target_modules`` (default: every Linear, Conv1D,
            convolution and parameter of experts with a pruned weight, without the head; experts are named by their
            own name or by that of one parameter, ``down_proj``),
            ``exclude_modules``, ``layers_to_transform``, ``layers_pattern``, ``rank_pattern``, ``alpha_pattern``, and
            ``lora_dropout`` for the variants that add the adapter's output to the layer's.

    Returns:
        A `SparsePeftModel` around the same model; with ``adapter=None`` the model itself.

    Raises:
        TypeError, ValueError: an option that is unknown or does not go with the variant; no weight is pruned; masks
            of another model; quantized, sharded or missing weights; nothing to train. The model is as it was then.

    Example::

        prune(model, batches, score="wanda", sparsity=0.5)
        model = add_adapters(model)
        ...  # train the parameters that require gradients
        model = merge(model)
    """
    return attach(model, adapter, masks, train, lora_options, adapt_head=adapt_head)


def attach(
    model: nn.Module,
    adapter: str | None,
    masks: Mapping[str, Tensor] | None,
    train: Iterable[str],
    options: Mapping[str, Any],
    pruned_later: bool = False,
    adapt_head: bool = False,
    told: bool = False,
    held: Collection[str] = (),
) -> nn.Module:
    """`add_adapters`; with `pruned_later` no weight needs to be zero yet, and every target gets an adapter.

    With `told` somebody else says which zeros parts that are trained whole lose; those of the weights named in `held`
    somebody else prunes and holds.
    """
    check_adapter(adapter)
    check_options(adapter, options)
    parts = check_parts(train)
    check_plain_model(model)
    masks = dict(masks or {})
    check_masks(model, masks)
    trained = select_parameters(model, parts)
    head = head_name(model, adapter) if adapt_head else None
    names = [] if adapter is None else adapted_modules(model, adapter, options, masks, pruned_later, head)
    if not names and not trained:
        raise ValueError(f"adapter={adapter!r} with train={parts} leaves nothing to train in {type(model).__name__}")
    _check_not_revived(model, trained, masks)
    twice = [name for name in names if weight_name(model, name) in trained]
    if twice:
        raise ValueError(
            f"{twice[0]!r} is trained whole by train={parts}, which would fill its zeros, and would get an adapter "
            "too; leave one of them out"
        )
    filled = [*([] if told else trained), *([] if head is None else [f"{head}.weight"])]
    _warn_of_zeros(model, [name for name in filled if name not in held], masks)

    record = Retraining(
        adapter=adapter,
        train=parts,
        options={**options, "target_modules": names} if names else {},
        trained=tuple(trained),
        required_grad=frozenset(name for name, p in model.named_parameters() if p.requires_grad),
        input_grads=adapter is not None and checkpoints_reentrantly(model),
    )
    modules = {path: model.get_submodule(path) for path, _ in (place_of(model, name) for name in names)}
    with uninterrupted():
        try:
            built = model if adapter is None else _build(model, adapter, record)
            for parameter in unwrapped(built).parameters():
                parameter.requires_grad_(False)
            for _, layer in sparse_layers(built):
                layer.set_adapter(layer.active_adapters)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            for name, layer in sparse_layers(built):
                layer.stays_dense = name == head
            if names and not pruned_later:
                set_masks(built, masks)
        except BaseException:
            _take_off(model, modules, record)
            raise
        remember(model, record)
    return built


def check_plain_model(model: nn.Module) -> None:
    """Refuse a model that cannot take adapters: it has some, is sharded or quantized, or is a LightningModule."""
    if hasattr(model, "training_step"):  # by its method, so that the functional core does not import lightning
        raise ValueError(
            f"{type(model).__name__} is a LightningModule: pass the transformers model in it (module.model), or use "
            "the PERPRetraining callback"
        )
    if (
        isinstance(model, PeftModel)
        or find_retraining(model)
        or any(isinstance(m, BaseTunerLayer) for m in model.modules())  # of PEFT's too, wherever they are
    ):
        raise ValueError(f"{type(model).__name__} has adapters already; merge or remove them first")
    if hasattr(model, "peft_config"):
        raise ValueError(f"{type(model).__name__} has adapters of PEFT already; merge or unload them first")
    refuse_shards(
        model,
        f"the parameters of {type(model).__name__} are sharded (DTensor) already; add adapters first, then call "
        "fully_shard, so that they are sharded with the weights",
    )
    refuse_inference_tensors(model.named_parameters())
    if getattr(model, "is_quantized", False) and _quantization(model) != "gguf":  # GGUF is dequantized on loading
        raise ValueError(
            f"{type(model).__name__} is quantized: an adapter cannot be merged into it with its zeros kept. Load the "
            "model unquantized, retrain, merge, and quantize last"
        )


def _quantization(model: nn.Module) -> str | None:
    """The method's name in the model's configuration."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method)).lower()


def adapted_modules(
    model: nn.Module,
    adapter: str,
    options: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    pruned_later: bool = False,
    head: str | None = None,
) -> list[str]:
    """Return the names of the modules that get an adapter, all of them checked, and of the head where it is named."""
    names = chosen_modules(model, adapter, options, masks, pruned_later, head)
    for name in names:
        path, parameter = place_of(model, name)
        layer = model.get_submodule(path)
        if is_compiled_alone(path):
            raise ValueError(
                f"the {'products' if path == name else 'experts'} of {clean_path(name)!r} were given to torch.compile "
                "alone, and would go on without an adapter: add adapters first, and compile the blocks or the model, "
                "or leave them out (exclude_modules)"
            )
        if path != name:
            check_experts(name, layer, parameter, options)
        elif isinstance(layer, CONVOLUTIONS):
            check_convolution(name, layer, options)
        else:
            check_base_layer(name, layer)
    check_unshared(model, {name: model.get_parameter(weight_name(model, name)) for name in names})
    chosen = options.get("target_modules") is not None
    pruned = None if pruned_later else lambda name, weight: has_pruned(weight, masks.get(name))
    left = "" if chosen else without_adapter(find_targets(model, frozen=True, parametrized=False), pruned)
    if not pruned_later and not any(_is_pruned(model, name, masks) for name in names):
        raise ValueError(
            f"no weight of {type(model).__name__} that would get an adapter is pruned (exactly zero), so there is no "
            f"sparsity to keep: prune the model first, or use plain PEFT{f'. {left}' if left else ''}"
        )
    warn(left)
    return names


def chosen_modules(
    model: nn.Module,
    adapter: str,
    options: Mapping[str, Any],
    masks: Mapping[str, Tensor],
    pruned_later: bool = False,
    head: str | None = None,
) -> list[str]:
    """Return the names of the modules that are to get an adapter, whether they can or not.

    Args:
        model: The plain model.
        adapter: The variant.
        options: Of LoRA.
        masks: See `attach`.
        pruned_later: See `attach`.
        head: Name of output embeddings that get one too.

    Raises:
        ValueError: none is named, or none can be pruned.
    """
    if options.get("target_modules") in (None, "all-linear"):
        kinds = _ADAPTED if options.get("target_modules") is None else _LINEAR
        found = adaptable(find_targets(model, frozen=True, parametrized=False), kinds)
        check_any_adapted(model, found)
        names = match_modules(model, adapter, {**options, "target_modules": WholeNames(found)})
        if options.get("target_modules") is None and not pruned_later:
            names = [name for name in names if _is_pruned(model, name, masks)]
    else:
        names = match_modules(model, adapter, options)
    return names if head is None else [*(name for name in names if name != head), head]


def check_any_adapted(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse a model of which no layer that is pruned can get an adapter, such as one that is recurrent.

    Raises:
        ValueError: saying what to train in place of adapters.
    """
    if not names:
        raise ValueError(
            f"no layer of {type(model).__name__} that is pruned can get an adapter, which goes with Linear, Conv1D, "
            "convolutions and experts alone: train biases and norms with adapter=None, or the kept weights themselves "
            "under masks (WeightPruning without PERPRetraining, or hold_masks)"
        )


def check_unshared(model: nn.Module, weights: Mapping[str, nn.Parameter | None]) -> None:
    """Refuse weights that something else in the model has too: it would go on without the adapter, until the merge.

    Args:
        model: Also one that holds the adapted one.
        weights: Of the layers that get an adapter, by the layers' names.

    Raises:
        ValueError: naming all that share one.
    """
    # By memory: a weight may be tied as a parameter, as data, or by its layer, which stands in two places.
    users: dict[tuple[torch.device, int], list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and (part := local(parameter)).numel():
            users.setdefault((part.device, part.data_ptr()), []).append(plain_name(name))
    for layer, weight in weights.items():
        shared = users.get((weight.device, weight.data_ptr()), []) if weight is not None and weight.numel() else []
        if len(shared) > 1:
            raise ValueError(
                f"the weight of {layer!r} is also that of others ({', '.join(shared)}), which would compute without "
                f"its adapter until the merge and with it after: leave {layer!r} out (exclude_modules), or untie them"
            )


def head_name(model: nn.Module, adapter: str | None) -> str:
    """Return the name of the output embeddings, which are to get an adapter."""
    if adapter is None:
        raise ValueError("adapt_head=True with adapter=None has no adapter to put on the head; name one, or remove it")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    name: str | None = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        raise ValueError(f"adapt_head=True, but {type(model).__name__} has no output embeddings; remove it")
    return name


def adaptable(targets: Iterable[Target], kinds: Collection[str] = _ADAPTED) -> list[str]:
    """The names of what can get an adapter: layers, and parameters of experts, each once."""
    return list(dict.fromkeys(t.parameter.removesuffix(".weight") for t in targets if t.kind.name in kinds))


def _is_pruned(model: nn.Module, name: str, masks: Mapping[str, Tensor]) -> bool:
    weight = weight_name(model, name)
    return has_pruned(model.get_parameter(weight), masks.get(weight))


def has_pruned(weight: Tensor, mask: Tensor | None) -> bool:
    """Whether a mask prunes any weight; without one, whether any is zero."""
    return count_over_ranks({"": weight.detach() if mask is None else mask}, lambda part: int((part == 0).sum())) > 0


def without_adapter(targets: Sequence[Target], pruned: Callable[[str, nn.Parameter], bool] | None = None) -> str:
    """Name the weights that are pruned and of kinds that no adapter goes with; empty if there are none.

    Args:
        targets: What may be pruned.
        pruned: Whether a parameter is, by its name; None where all are, or will be.
    """
    others = parameters_of([t for t in targets if t.kind.name not in _ADAPTED])
    left = {name: weight for name, weight in others.items() if pruned is None or pruned(name, weight)}
    if not left:
        return ""
    share = sum(weight.numel() for weight in left.values()) / sum(t.numel for t in targets)
    return (
        f"{share:.0%} of the weights that can be pruned get no adapter, which goes with Linear, Conv1D, convolutions "
        f"and experts alone, and stay as they are ({next(iter(left))!r} and {len(left) - 1} more parameters): to "
        "retrain them too, use reconstruct(..., train='all'), or train the model under hold_masks"
    )


def _check_not_revived(model: nn.Module, trained: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    for name in trained:
        mask = masks.get(name)
        if mask is not None and not bool(mask.all()):
            raise ValueError(
                f"{name!r} is pruned by its mask, and training it whole would fill its zeros; leave its part out of "
                "train, or its mask out of masks"
            )


def _warn_of_zeros(model: nn.Module, names: Iterable[str], masks: Mapping[str, Tensor]) -> None:
    """Say which matrices have zeros that look pruned and will be filled, as ``score="keep"`` does of all."""
    lost = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        weight = getattr(module, attribute)
        if name not in masks and weight.dim() > 1 and not weight.is_meta and not is_bias(attribute):
            lost[name] = pruned_zeros(weight, whole_rows=not embeds(module))
    text = ", ".join(f"{zeros:,} of {name!r}" for name, zeros in lost.items() if zeros)
    if text:
        warn(
            f"training whole matrices (train, adapt_head) fills zeros that look pruned: {text}. To keep them, leave "
            "that part out, or train the model under WeightPruning(score='keep', targets=...) or hold_masks",
        )


def _build(model: nn.Module, adapter: str, record: Retraining) -> SparsePeftModel:
    config, variant = make_config(adapter, record.options), find_variant(adapter)
    places = {name: place_of(model, name) for name in record.options["target_modules"]}
    convolutions = [name for name in places if isinstance(model.get_submodule(places[name][0]), CONVOLUTIONS)]
    linear = [name for name, (path, _) in places.items() if path == name and name not in convolutions]
    # The names are decided; what selected them must not act again on PEFT's side, nor may they be endings of others.
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.target_modules = "|".join(map(re.escape, linear)) or DUMMY_TARGET_MODULES
    known = {*places, *(path for path, _ in places.values())}
    warn_of_unmatched("rank_pattern", config.rank_pattern, known)
    warn_of_unmatched("alpha_pattern", config.alpha_pattern, known)
    ranks, alphas = (
        {name: by_pattern(pattern, (name, path), default) for name, (path, _) in places.items()}
        for pattern, default in ((config.rank_pattern, config.r), (config.alpha_pattern, config.lora_alpha))
    )
    # By whole names, of layers alone: what the patterns say has been found out, compiled blocks or not.
    config.rank_pattern = {re.escape(name): ranks[name] for name in linear if ranks[name] != config.r}
    config.alpha_pattern = {re.escape(name): alphas[name] for name in linear if alphas[name] != config.lora_alpha}
    with _of_no_family(model):
        built = SparsePeftModel(model, config)
    for name, (path, parameter) in places.items():
        if path != name:
            put_on_experts(model, path, parameter, config, variant, ranks[name], alphas[name])
    for name in convolutions:
        put_on_convolution(model, name, config, variant, ranks[name], alphas[name])
    # PEFT documents the registration of layer classes as experimental, and builds a plain LoRA where it fails.
    for name in linear:
        if type(module := model.get_submodule(name)) is not variant:
            raise RuntimeError(
                f"PEFT {peft.__version__} has put a {type(module).__name__} on {name!r} in place of adapter="
                f"{adapter!r}, which would fill its zeros; install a version of PEFT that this package was tested with"
            )
    return built


@contextmanager
def _of_no_family(model: nn.Module) -> Iterator[None]:
    """Hide from PEFT of which family a model is, while it builds adapters on layers whose names are decided.

    It takes names such as gate_proj for experts of transformers 4, in families that have experts, and puts plain LoRA
    on the parameters that hold those now; and it refuses out_proj of Mamba's, which multiplies with `layer.weight`
    by itself (see `SparseLinear.weight`).
    """
    told = getattr(getattr(model, "config", None), "__dict__", {})
    had = {name: told[name] for name in ("model_type",) if name in told}
    told["model_type"] = ""
    try:
        yield
    finally:
        del told["model_type"]
        told.update(had)


# -- taking them off again -------------------------------------------------------------------------------------------


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Merge the adapters into the weights, and give back the plain transformers model.

    Pruned weights are +0.0 to the bit, which is checked, in any dtype. Of all but lora_prune the logits are
    those of the model before the merge; lora_prune loses here what the mask cuts off. Parameters require gradients
    again as they did before `add_adapters`.

    Where FSDP2 shards the model every rank must call, and merges its parts: of each layer only the two thin matrices
    are gathered. Weights stay shards.

    Args:
        model: A model of `add_adapters`, changed in place.

    Returns:
        The model that was given to `add_adapters`, the same object.

    Raises:
        ValueError: ``adapter="lora"``; a merged weight would not be finite; no model of `add_adapters`. Nothing is
            changed then.
    """
    record = retraining_of(model)
    reshard(model)
    layers = dict(sparse_layers(model))
    _check_mergeable(layers)
    plain = unwrapped(model)
    with uninterrupted():
        for layer in layers.values():
            layer.merge(adapter_names=list(layer.lora_A))
            layer.finish()
        _take_off(plain, _base_layers(layers), record)
    for name, layer in layers.items():
        _check_zeros(name, layer)
    return plain


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """Merge the adapters into the weights and begin them anew, so that training can go on from the merged weights.

    The model computes the same as before (with lora_prune, as after a merge). Initial values are drawn from the global
    random state. Where the model is sharded, `set_masks` has to follow.

    Args:
        model: A model of `add_adapters`, changed in place.

    Raises:
        ValueError: as `merge`. Nothing is changed then.
    """
    record, layers = retraining_of(model), dict(sparse_layers(model))
    reshard(model)
    _check_mergeable(layers)
    with uninterrupted():
        for layer in layers.values():
            layer.fold(record.options.get("init_lora_weights") or True)  # a random start would be another model


def _check_mergeable(layers: Mapping[str, SparseLayer]) -> None:
    """All layers before any is written."""
    for name, layer in layers.items():
        broken = as_shard_of(layer.base_weight, ~layer.merged_weight().isfinite())
        if count_over_ranks({name: broken}, lambda part: int(part.sum())):  # on one rank: all stop
            half = layer.base_weight.dtype == torch.float16  # Adam's eps is 0 there, and a new adapter's gradient too
            raise ValueError(
                f"the merged weight of {name!r} has values that are not finite: training diverged; use a lower "
                f"learning rate{', or bfloat16 (or eps=1e-4 in Adam: 1e-8 is zero in float16)' if half else ''}. "
                "Nothing was merged"
            )


@contextmanager
def adapters_aside(model: nn.Module) -> Iterator[nn.Module]:
    """Take the adapters off for a while, and give the plain transformers model.

    Afterwards the same adapters are on again, with the parameters that an optimizer may hold.
    """
    plain, record, layers = unwrapped(model), retraining_of(model), dict(sparse_layers(model))
    configuration = uncompiled(plain).__dict__.get("peft_config")
    try:
        _exchange(plain, _base_layers(layers), None)
        yield plain
    finally:
        outermost: dict[str, nn.Module] = {}  # of several around the same experts
        for name, layer in layers.items():
            outermost.setdefault(layer.path(name), layer)
        with uninterrupted():
            _exchange(plain, outermost, record, configuration)


def _base_layers(layers: Mapping[str, SparseLayer]) -> dict[str, nn.Module]:
    return {layer.path(name): layer.get_base_layer() for name, layer in layers.items()}


def _exchange(
    model: nn.Module, modules: Mapping[str, nn.Module], record: Retraining | None, configuration: Any = None
) -> None:
    """Put layers in their places, and have the plain model say whether it is adapted: a record, PEFT's configuration.

    Without a record it is not. No parameter is touched.
    """
    for name, module in modules.items():
        model.set_submodule(name, module)
    remember(model, record)
    bare = uncompiled(model)  # to which torch.compile hands on what PEFT sets
    bare.__dict__.pop("peft_config", None)
    if configuration is not None:
        bare.__dict__["peft_config"] = configuration


def _take_off(model: nn.Module, modules: Mapping[str, nn.Module], record: Retraining) -> None:
    """Undo `attach` on a plain model: the layers as given, flags and hooks as they were."""
    _exchange(model, modules, None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.required_grad)
    if record.input_grads:
        model.disable_input_require_grads()  # type: ignore[operator]


def _check_zeros(name: str, layer: SparseLayer) -> None:
    filled = int(((layer.base_part != 0) & (layer.kept_part == 0)).count_nonzero())
    if filled:
        raise RuntimeError(f"{filled} pruned weights of {name!r} are not zero after the merge; this is a bug")


def remove_adapters(model: nn.Module) -> nn.Module:
    """Take the adapters off without merging; parts of `train` keep what they learned.

    Args:
        model: A model of `add_adapters`, changed in place.

    Returns:
        The plain transformers model, the same object that was given to `add_adapters`.
    """
    record = retraining_of(model)
    reshard(model)
    plain, layers = unwrapped(model), dict(sparse_layers(model))
    with uninterrupted():
        for layer in layers.values():
            layer.unmerge()
            layer.finish()
        _take_off(plain, _base_layers(layers), record)
    return plain


def adapter_masks(model: nn.Module) -> Masks:
    """The masks of the adapted weights, bool, by the plain model's parameter names; sharded as the weights are."""
    reshard(model)
    layers = {layer.weight_name(name): layer for name, layer in sparse_layers(model)}
    return {name: as_shard_of(layer.base_weight, layer.kept_part != 0) for name, layer in layers.items()}


def trainable_share(model: nn.Module) -> float:
    """Parameters that are trained, as a share of the model's own parameters (the paper's percentage / 100).

    Adapters count as trained, but not as the model's own.
    """
    parameters = list(model.named_parameters())
    own = sum(p.numel() for name, p in parameters if not is_adapter_parameter(name))
    return sum(p.numel() for _, p in parameters if p.requires_grad) / own if own else 0.0


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's matrix."""
    return any(part in ("lora_A", "lora_B") for part in name.split("."))


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is trained, by plain names: ``"<module>.lora_A"``, ``"<module>.lora_B"``, and own parameters.

    And what training changes besides, or may change: buffers of numbers that belong to the model, such as running
    averages of norms and codebooks. The tensors share memory with the model.
    """
    record = retraining_of(model)
    stored = model.state_dict().keys()  # first: FSDP2 frees gathered parameters when it is asked for this
    own = {plain_name(name): p for name, p in model.named_parameters() if not is_adapter_parameter(name)}
    state = {name: own[name].detach() for name in map(plain_name, record.trained)}  # blocks may be compiled
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            state[plain_name(name)] = buffer
    for name, layer in sparse_layers(model):
        a, b = layer.matrices()
        state[f"{name}.lora_A"], state[f"{name}.lora_B"] = a.detach(), b.detach()
    return state


class SparsePeftModel(PeftModel):
    """A `peft.PeftModel` of `add_adapters`.

    ``save_pretrained``, ``from_pretrained`` and ``merge_and_unload`` are `save_adapter`, `load_adapter` and `merge`;
    the rest is PEFT's.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """That of the transformers model.

        Raises:
            ValueError: ``fully_shard`` was given this wrapper, which the merge takes off, and its shards with it.
        """
        refuse_shard_root(
            self,
            "fully_shard was called on the PEFT model, which does not outlive the merge; call it on the "
            "transformers model in it: fully_shard(model.get_base_model())",
        )
        return super().forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """An attribute of PEFT's, or else of the transformers model.

        Between them stands PEFT's tuner, whose ``model`` is the transformers model; what runs a part of its model
        (``self.model.model(...)``, then the head) means that of the transformers model.
        """
        if name != "model":
            return super().__getattr__(name)
        plain = super().__getattr__("base_model").model
        return getattr(plain, name, plain)

    def __getitem__(self, index: Any) -> Any:
        """A part of the model, where it is a list of such, such as `nn.Sequential`; over which it can be iterated."""
        plain: Any = self.get_base_model()
        return plain[index]

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> Any:
        """Make embeddings' outputs require gradients where checkpoints are re-entrant, which need it.

        PEFT does so for every kind of checkpointing; it costs the gradients of the first layers' inputs.
        """
        if checkpoints_reentrantly(model):
            super().prepare_model_for_gradient_checkpointing(model)
        return model

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """See `lightning_prune.perp.save_adapter`.

        Raises:
            TypeError: an argument of PEFT's method that has no meaning here.
        """
        # Given by callers that save any model; they ask for nothing else than what is done.
        harmless = {"safe_serialization": True, "is_main_process": True, "state_dict": None}
        refused = {k: v for k, v in kwargs.items() if k not in harmless or (k == "safe_serialization" and not v)}
        if refused:
            raise TypeError(f"save_pretrained of a sparse adapter does not take {sorted(refused)}; leave them out")
        if kwargs.get("is_main_process", True):
            save_adapter(self, save_directory)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, model: nn.Module, model_id: str | Path, is_trainable: bool = False
    ) -> nn.Module:
        """See `lightning_prune.perp.load_adapter`."""
        return load_adapter(model, model_id, trainable=is_trainable)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """See `lightning_prune.perp.merge`; the merge is always checked, so `safe_merge` makes no difference."""
        return merge(self)

    def unload(self) -> nn.Module:
        """See `lightning_prune.perp.remove_adapters`."""
        return remove_adapters(self)


def save_adapter(model: nn.Module, folder: str | Path) -> None:
    """Save the adapters, their masks and the trained parts of a model, without the model.

    PEFT refuses to load the folder (``KeyError: 'LIGHTNING_PRUNE_PERP: ...'``); `load_adapter` does.
    In a distributed run the first process writes; where the model is sharded every process must call.

    Args:
        model: A model of `add_adapters`.
        folder: Created if it does not exist; an earlier adapter in it is replaced in one step. Whatever happens
            meanwhile, the folder holds the old adapter or the new one.

    Raises:
        ValueError: the model is none of `add_adapters`, or `folder` is a file.
    """
    retraining_of(model)
    folder = expanded(folder, "folder")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is a file; give a folder")
    state = {name: gather_whole(tensor).contiguous().clone() for name, tensor in trained_state(model).items()}
    packed = pack_masks(adapter_masks(model))
    if not is_main_process():
        return
    settings = settings_of(model)
    json.dumps(settings)  # before anything is written: an option may not be serializable
    bits = {name: entry["bits"] for name, entry in packed.items()}
    shapes = {name: json.dumps([entry["shape"], entry["crc32"]]) for name, entry in packed.items()}
    folder.mkdir(parents=True, exist_ok=True)
    try:
        settings["files"] = {
            "adapter": write_named(folder, "perp_adapter", lambda path: save_file(state, path, {"format": "pt"})),
            "masks": write_named(folder, "perp_masks", lambda path: save_file(bits, path, {"format": "pt", **shapes})),
        }
        settings["crc32"] = check_sum(settings)
        name = getattr(unwrapped(model), "name_or_path", None) or None
        config = {"peft_type": PEFT_TYPE, "base_model_name_or_path": name, "perp": settings}
        text = json.dumps(config, indent=2)
        replace_file(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    finally:
        remove_unnamed(folder)


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = True) -> nn.Module:
    """Put a saved adapter on the pruned model that it was trained on.

    Args:
        model: The plain transformers model, pruned as it was then. It is changed in place; use what is returned.
        folder: A folder of `save_adapter`.
        trainable: Let adapters and trained parts require gradients, to train on.

    Returns:
        What `add_adapters` returned when the adapter was made, with its weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder holds another kind of adapter, is damaged (check sums), has regular expressions in its
            settings, or belongs to a model with other shapes or other zeros. The model is as it was then.
    """
    folder = expanded(folder, "folder")
    settings = read_config(folder)
    files = files_of(settings, folder)
    weights, masks = read_tensors(folder, files["adapter"]), read_masks(folder, files["masks"], model)
    where = repr(str(folder / CONFIG_FILE))
    options = options_for(model, settings, weights, where)
    try:
        built = add_adapters(model, settings["adapter"], masks, settings["train"], **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the adapter in {str(folder)!r} does not fit {type(model).__name__}: {error}") from error
    state = trained_state(built)
    try:
        check_state(folder, state, weights)
    except ValueError:
        remove_adapters(built)
        raise
    for name, tensor in state.items():
        tensor.copy_(weights[name])
    if not trainable:
        built.requires_grad_(False)
    return built
