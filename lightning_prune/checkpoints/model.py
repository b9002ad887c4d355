"""Make a model of a checkpoint: one way from a path to a model."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lightning_prune.checkpoints.inspection import Inspection, TensorReport, report_tensor
from lightning_prune.checkpoints.reading import Checkpoint, check_no_adapter, check_no_kernel, open_checkpoint
from lightning_prune.checkpoints.sources import (
    config_from,
    existing_path,
    has_tokenizer,
    is_causal_lm,
    load_pretrained,
    load_tokenizer,
    looks_like_path,
    plain_source,
)
from lightning_prune.checkpoints.states import StoredMasks, stored_units
from lightning_prune.errors import ExportError, first_line
from lightning_prune.naming import DTYPES, clean_name
from lightning_prune.progress import progress_bar
from lightning_prune.safety import ProcessWide, check_sum
from lightning_prune.structure.saving import MaskedUnits, slice_masked_units

NO_TOKENIZER = "none"
"""In place of a tokenizer's source: go without one."""

OF_LIGHTNING = ("Lightning checkpoint", "distributed checkpoint")
"""Formats of Lightning, where the transformers model is the attribute `model` of a LightningModule."""

_ATTRIBUTE = "model."


@dataclass(frozen=True)
class ReadModel:
    """A model that was read from a checkpoint.

    Attributes:
        model: The transformers model, on the CPU.
        tokenizer: The tokenizer that was asked for, else the one the checkpoint names, if any.
        reports: What is in its tensors.
        masks: The masks they were held to, if the checkpoint has some.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase | None
    reports: list[TensorReport]
    masks: StoredMasks | None


def read_model(
    source: Checkpoint, tokenizer: str | None = None, dtype: torch.dtype | None = None, progress: bool = True
) -> ReadModel:
    """Read the transformers model of a checkpoint.

    Tensors are read one at a time. A ``.ckpt`` and safetensors stay mapped files unless they are converted; the
    shards of a distributed checkpoint are put together in main memory, which must hold the model once.

    Args:
        source: The opened checkpoint. Adapters that `PERPRetraining` was training are merged, and units that
            `PruningAwarePretraining` had masked are removed.
        tokenizer: Hub id, folder, ``.gguf`` file or ``tokenizer.json``; ``"none"`` for no tokenizer. Default: the one
            the checkpoint names, if it names one.
        dtype: Of floating point weights; default as stored.
        progress: Show a bar where stderr is a terminal.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ExportError: it holds no configuration, other tensors than its architecture has, pruned weights that are not
            zero, or values that `dtype` cannot hold; or the tokenizer cannot be loaded or does not fit.
    """
    units = stored_units(source)
    if not source:
        raise ExportError(f"checkpoint={str(source.path)!r} holds no tensors; give a checkpoint of a model")
    source = _merged(source)
    with quiet_transformers():
        config = _config_of(source)
        found_tokenizer = _tokenizer_of(source, tokenizer)
        model = _empty_model(source, config)
        _check_vocabulary(found_tokenizer, model)
        # Slicing rescales weights, so they are rounded after it.
        read = _read(source, model, dtype if units is None else None, progress)
        model = _fill(source, model, read.state)
        if units is not None:
            model, reports = _without_units(source, model, units, dtype)
            read = _Read({}, reports, read.masks)
        return ReadModel(model, found_tokenizer, read.reports, read.masks)


def _merged(source: Checkpoint) -> Checkpoint:
    """With adapters merged that `PERPRetraining` was training when the checkpoint was written."""
    if not any(".lora_A." in name for name in source):
        return source
    from lightning_prune.checkpoints.states import merged_checkpoint  # takes peft with it, which few need here

    return merged_checkpoint(source)


# -- what is there ----------------------------------------------------------------------------------------------------


def _config_of(source: Checkpoint) -> PretrainedConfig:
    fields, model_type = dict(source.config), source.model_type
    if source.format not in OF_LIGHTNING:
        check_no_adapter(source.files[0].parent)
    if model_type is None:
        raise ExportError(
            f"checkpoint={str(source.path)!r} does not say which model it holds: a Lightning checkpoint must have "
            "hyper_parameters['config'], as those of CausalLM have, and a folder a config.json with 'model_type'. Load "
            "it with the class that wrote it and call save_pretrained of the transformers model"
        )
    if not is_causal_lm(model_type):
        raise ExportError(
            f"checkpoint={str(source.path)!r} has model_type={model_type!r}, which is no causal language model of "
            "transformers, such as 'llama', 'mistral', 'qwen2' or 'gpt2': code that comes with a model is not run "
            "here. Register its classes first (AutoConfig.register, AutoModelForCausalLM.register), or load it "
            "yourself, and call lightning_prune.prune(model, batches) and its save_pretrained"
        )
    if fields.get("quantization_config"):
        raise ExportError(
            f"checkpoint={str(source.path)!r} is quantized, and its weights are not plain numbers; export the model "
            "from before quantization"
        )
    check_no_kernel(source.path, fields)
    # The name is an argument of its own, and auto_map points to code, which no folder of ours shall.
    fields = {name: value for name, value in fields.items() if name not in ("model_type", "auto_map")}
    try:
        return config_from(model_type, fields)
    except Exception as error:  # each family raises its own for values it does not take
        raise ExportError(
            f"checkpoint={str(source.path)!r}: its configuration is not one of {model_type!r}: {first_line(error)}; "
            "it may come from another version of transformers"
        ) from error


def _empty_model(source: Checkpoint, config: PretrainedConfig) -> Any:
    """The model of a configuration on the meta device: shapes and names only."""
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(source):
        raise ExportError(
            f"checkpoint={str(source.path)!r}: its configuration has {layers} layers, which its {len(source)} tensors "
            "cannot fill; take both from the same model"
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # each family raises its own for activations, sizes and kernels it does not have
        raise ExportError(
            f"checkpoint={str(source.path)!r}: no {config.model_type!r} can be built from its configuration: "
            f"{type(error).__name__}: {first_line(error)}; take config.json and weights from the same model"
        ) from error


def _tokenizer_of(source: Checkpoint, wanted: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was asked for, or else that of the checkpoint; None if there is none."""
    if wanted == NO_TOKENIZER:
        return None
    named, settings = wanted, {}
    if named is None and source.format in OF_LIGHTNING:
        stored = {name: source.hyper_parameters.get(name) for name in ("tokenizer", "gguf_file", "revision")}
        plain = {name: value for name, value in stored.items() if isinstance(value, str)}
        named, settings = plain.pop("tokenizer", None), plain
    elif named is None and has_tokenizer(source.files[0].parent):
        named = str(source.files[0].parent)
    if named is None:
        return None
    try:
        return load_tokenizer(named, **settings)
    except Exception as error:  # files of strangers, and a hub that may not answer
        said = first_line(error).removesuffix(".")
        own = said.removeprefix(f"tokenizer={named!r} ")  # most name it
        raise ExportError(
            f"tokenizer={named!r}{'' if wanted else ', which the checkpoint names,'} "
            f"{'cannot be loaded: ' if own == said else ''}{own}; give a hub id, folder, .gguf file or tokenizer.json "
            f"(export takes {NO_TOKENIZER!r} too, for no tokenizer)"
        ) from error


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase | None, model: Any) -> None:
    embeddings = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > embeddings:
        raise ExportError(
            f"tokenizer={tokenizer.name_or_path!r} has {len(tokenizer)} tokens, more than the model's {embeddings} "
            "embeddings; give the tokenizer the model was trained with"
        )


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """The tensors to write by name in the transformers model, what is in them, and the masks they were held to."""

    state: dict[str, Tensor]
    reports: list[TensorReport]
    masks: StoredMasks | None


def _read(source: Checkpoint, model: Any, dtype: torch.dtype | None, progress: bool) -> _Read:
    short = _short_names(source, model)
    masks = StoredMasks.of(source)
    _check_masks_are_of(source, masks)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = tied_names(model)
    holders: dict[str, str] = {}  # first name of a tied weight to the name it was first met under
    state: dict[str, Tensor] = {}
    reports = []
    with progress_bar("Reading weights", len(source), enabled=progress) as advance:
        for name, tensor in source.items():
            own, shape = short[name], tuple(tensor.shape)
            if shapes.get(own, shape) != shape:
                raise ExportError(
                    f"checkpoint={str(source.path)!r}: {name!r} has shape {shape}, but the architecture in the "
                    f"checkpoint has {shapes[own]}; it was saved with the configuration of another model"
                )
            mask = None if masks is None else masks.take(name, shape)
            holder = holders.setdefault(tied.get(own, own), own)
            report = _held_report(source, own, tensor, mask, None if holder == own else holder)
            converted = tensor if dtype is None else _converted(source, name, tensor, dtype)
            if converted is not tensor:
                report = _held_report(source, own, converted, mask, report.tied_to)
            if holder != own:
                _check_same(source, holder, state[holder], own, converted)
                converted = state[holder]  # one of two equal copies is enough
            elif name in source.ties:
                converted = converted.clone()  # shared by chance, as no tie of the architecture would restore
            state[own] = converted
            reports.append(report)
            del tensor, converted, mask
            advance()
    return _Read(state, reports, masks)


def _short_names(source: Checkpoint, model: Any) -> dict[str, str]:
    """Name in the checkpoint to name in the transformers model; other tensors than the model's are refused."""
    names = list(source)
    if source.format not in OF_LIGHTNING:
        return {name: name for name in names}  # strange names are transformers' to translate
    short = {name: clean_name(name) for name in names}
    short = {name: own.removeprefix(_ATTRIBUTE) for name, own in short.items() if own.startswith(_ATTRIBUTE)}
    missing, unexpected = _difference(short.values(), model)
    advice = "it was not saved by CausalLM"
    if any("lora_" in name or "base_layer" in name for name in unexpected):
        advice = "merge the adapters and save again"
    elif not (missing or unexpected):  # a subclass, with a second model
        advice = "load it with the class that wrote it, and call its save_pretrained"
    unexpected += [name for name in names if name not in short]
    if missing or unexpected:
        raise ExportError(
            f"checkpoint={str(source.path)!r} does not hold the tensors of its own architecture "
            f"({type(model).__name__} as the attribute 'model'): {some_of(missing)} missing, {some_of(unexpected)} "
            f"unexpected; {advice}"
        )
    return short


def _difference(names: Iterable[str], model: Any) -> tuple[list[str], list[str]]:
    """Names of the model that are missing, and names that are not the model's. One name of a tied weight is enough."""
    found, expected, tied = set(names), model.state_dict().keys(), tied_names(model)
    there = {tied.get(name, name) for name in found}
    missing = [name for name in expected if tied.get(name, name) not in there]
    return missing, sorted(found - set(expected))


def tied_names(model: Any) -> dict[str, str]:
    """Each name of a weight that has several, the first included, to the first."""
    names: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name: group[0] for group in names.values() if len(group) > 1 for name in group}


def _check_masks_are_of(source: Checkpoint, masks: StoredMasks | None) -> None:
    if masks is None:
        return
    strays = sorted(masks.names - {masks.find(name) for name in source})
    if strays:
        raise ExportError(
            f"checkpoint={str(source.path)!r} has masks of {some_of(strays)} that belong to no tensor in it, so its "
            "zeros cannot be checked; take the checkpoint as Lightning wrote it"
        )


def _held_report(
    source: Checkpoint, name: str, tensor: Tensor, mask: Tensor | None, tied_to: str | None
) -> TensorReport:
    """The report of a tensor, refused if a pruned weight has come back."""
    report = report_tensor(name, tensor, mask, model_type=source.model_type, tied_to=tied_to)
    if report.mask is not None and report.mask.resurrected:
        raise ExportError(
            f"checkpoint={str(source.path)!r}: {report.mask.resurrected} of {report.mask.masked} pruned weights of "
            f"{name!r} are not zero; resume with WeightPruning, which sets them to zero, and save again"
        )
    return report


def _converted(source: Checkpoint, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    # What was infinite before is the model's affair; what conversion makes infinite would be ours.
    if not converted.isfinite().all() and bool((converted.isinf() & tensor.double().isfinite()).any()):
        raise ExportError(
            f"dtype={str(dtype).removeprefix('torch.')!r} cannot hold {name!r} of {str(source.path)!r}, whose values "
            f"go up to {tensor.double().abs().max():.4g} (largest in that dtype: {torch.finfo(dtype).max:.4g}); use "
            "'bfloat16' or 'float32'"
        )
    return converted


def _check_same(source: Checkpoint, first: str, tensor: Tensor, second: str, other: Tensor) -> None:
    if not same_bits(tensor, other):
        raise ExportError(
            f"checkpoint={str(source.path)!r}: {first!r} and {second!r} are one weight in this architecture "
            "(tie_word_embeddings), but differ in the checkpoint, so one of them would be lost; set "
            "tie_word_embeddings to False in the configuration"
        )


def _fill(source: Checkpoint, model: Any, state: dict[str, Tensor]) -> Any:
    """The model on the meta device with real weights, without a copy of them."""
    if any(_difference(state, model)):
        return _fill_by_transformers(source, model, state)
    tied = tied_names(model)
    present = {tied.get(name, name): tensor for name, tensor in state.items()}
    whole = {name: present[tied.get(name, name)] for name in model.state_dict()}
    model.load_state_dict(whole, strict=True, assign=True)
    model.tie_weights()  # assigned one by one, the names of a tied weight have become separate parameters
    return model


def _fill_by_transformers(source: Checkpoint, model: Any, state: dict[str, Tensor]) -> Any:
    """For folders: names and layouts on disk may differ from those in memory (no prefix, experts one by one)."""
    try:
        filled, info = _by_transformers(model, state)
    except (RuntimeError, ValueError) as error:  # shapes
        raise ExportError(
            f"checkpoint={str(source.path)!r} does not fit its config.json: {first_line(error)}; take both from the "
            "same model"
        ) from error
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing or unexpected or info["mismatched_keys"]:
        known = source.config.get("architectures")
        if isinstance(known, list) and known and type(model).__name__ not in known:
            raise ExportError(
                f"checkpoint={str(source.path)!r} is of a {known[0]}, as its config.json says, not of a "
                f"{type(model).__name__}, and so no causal language model: load it with transformers, and call "
                "lightning_prune.prune(model, batches)"
            )
        raise ExportError(
            f"checkpoint={str(source.path)!r} does not hold the tensors of a {type(model).__name__}: "
            f"{some_of(missing)} missing, {some_of(unexpected)} unexpected; take config.json and weights from the same "
            "model"
        )
    return filled


def _by_transformers(model: Any, state: Mapping[str, Tensor]) -> tuple[Any, dict[str, Any]]:
    """A model of the same class and configuration with these weights, and what transformers says of loading them."""
    dtype = widest_dtype(state.values())  # transformers knows one: that which loses nothing
    options: Any = {"config": model.config, "state_dict": dict(state), "dtype": dtype, "output_loading_info": True}
    return type(model).from_pretrained(None, **options)  # type: ignore[no-any-return]


def widest_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The floating point dtype that holds every value of every tensor."""
    floating = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    return reduce(torch.promote_types, floating, torch.bool)


def _without_units(
    source: Checkpoint, model: Any, units: MaskedUnits, dtype: torch.dtype | None
) -> tuple[Any, list[TensorReport]]:
    """The ordinary model that is left without masked units, and what is in its tensors."""
    try:
        slice_masked_units(model, units)
    except ValueError as error:
        raise ExportError(
            f"checkpoint={str(source.path)!r} was written by PruningAwarePretraining while units were masked, which "
            f"cannot be removed: {first_line(error)}"
        ) from error
    if dtype is not None:
        for name, parameter in model.named_parameters():
            parameter.data = _converted(source, name, parameter.data, dtype)
    tied = tied_names(model)
    reports = [
        report_tensor(
            name,
            parameter.detach(),
            model_type=model.config.model_type,
            tied_to=first if (first := tied.get(name, name)) != name else None,
        )
        for name, parameter in model.named_parameters(remove_duplicate=False)
    ]
    return model, reports


# -- words and bits ---------------------------------------------------------------------------------------------------


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same to the bit: NaN equals itself here, and +0.0 is not -0.0."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


_QUIET_TRANSFORMERS = ProcessWide(_quiet_transformers)


def quiet_transformers() -> AbstractContextManager[None]:
    """Go without bars and reports of transformers for a block: there are bars and errors of our own."""
    return _QUIET_TRANSFORMERS.changed()


def some_of(names: list[str]) -> str:
    """How many names, and the first of them."""
    if not names:
        return "none"
    return f"{len(names)} such as {names[0]!r}" if len(names) > 1 else repr(names[0])


@dataclass(frozen=True)
class LoadedModel:
    """A model, on the CPU and in evaluation mode unless it was given as an object.

    Attributes:
        source: What the user called it; the name of the class for an object.
        model: The transformers model.
        tokenizer: Its tokenizer, or None.
    """

    source: str
    model: Any
    tokenizer: PreTrainedTokenizerBase | None

    def inspection(self, state: Mapping[str, Tensor] | None = None) -> Inspection:
        """Zeros and patterns of its weights, as `inspect` counts them in files.

        Args:
            state: Its whole weights, where its parameters are shards.
        """
        model_type = getattr(self.model.config, "model_type", None)
        reports = [
            report_tensor(name, (p if state is None else state[name]).detach().cpu(), None, model_type)
            for name, p in ((clean_name(name), p) for name, p in self.model.named_parameters())
        ]
        return Inspection(self.source, "in memory", 0, reports)

    def facts(self) -> dict[str, Any]:
        """Return what tells this model from others, in plain values: counts, dtype, and a check sum of all weights."""
        found, crc = self.inspection(), 0
        for name, parameter in self.model.named_parameters():
            crc = zlib.crc32(check_sum(name, parameter).to_bytes(4, "little"), crc)
        return {
            "parameters": found.totals(True).numel,
            "prunable": found.totals().numel,
            "zeros": found.totals().zeros,
            "pattern": found.pattern,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "weights_crc32": f"{crc:08x}",
        }


def context_of(loaded: LoadedModel) -> int | None:
    """Most tokens that a model takes, as far as its configuration says."""
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    return context if isinstance(context, int) and context > 0 else None  # XLNet says -1: as many as you like


def load_model(
    source: str | Path | PreTrainedModel,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    argument: str = "model",
    progress: bool = True,
) -> LoadedModel:
    """Load a causal language model; nothing that comes with the files is run.

    Args:
        source: A transformers folder, a Lightning ``.ckpt`` or distributed checkpoint of `CausalLM`, a ``.gguf`` file,
            or a hub id; or a transformers model, which is taken as it is.
        tokenizer: Hub id, folder, ``.gguf`` file, ``tokenizer.json``, or a tokenizer. Default: the model's own.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``; default as stored.
        argument: What the caller's user calls `source`, for errors.
        progress: Show bars where stderr is a terminal.

    Raises:
        FileNotFoundError: a local path does not exist.
        ValueError: the files are damaged, are no causal language model, or lack weights; or an argument is wrong.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(map(repr, DTYPES))}")
    tokenizer = plain_source(tokenizer)
    if isinstance(source, nn.Module):
        if dtype is not None:
            raise ValueError(f"dtype={dtype!r} is for models that are loaded; convert {argument} yourself")
        return LoadedModel(type(source).__name__, source, _tokenizer(tokenizer, None))
    name, wanted = str(source), None if dtype is None else DTYPES[dtype]
    path = existing_path(name, argument) if looks_like_path(name) else None
    if path is None or path.suffix.lower() == ".gguf":
        with quiet_transformers():
            model = load_pretrained(name, options={"dtype": wanted or (torch.float32 if path else "auto")})
        return LoadedModel(name, model.eval(), _tokenizer(tokenizer, name))
    given = tokenizer is not None and not isinstance(tokenizer, str)
    read = read_model(open_checkpoint(path, argument), NO_TOKENIZER if given else tokenizer, wanted, progress)
    return LoadedModel(name, _runnable(read.model).eval(), tokenizer if given else read.tokenizer)


def _runnable(model: Any) -> Any:
    """The model with the buffers that no file holds, such as rotary frequencies, which transformers computes."""
    if not any(buffer.is_meta for buffer in model.buffers()):
        return model
    with quiet_transformers():
        return _by_transformers(model, model.state_dict())[0]


def _tokenizer(tokenizer: str | PreTrainedTokenizerBase | None, default: str | None) -> PreTrainedTokenizerBase | None:
    if tokenizer is None and default is not None:
        tokenizer = default
    return load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer


def device_of(device: str | None) -> torch.device:
    """The device that was asked for, else CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error).partition(". ")[0]  # torch's explanations go on for a page
        raise ValueError(f"device={device!r} is not there ({reason}); use 'cpu', or leave it out") from error
    return found


@contextmanager
def on(device: torch.device, model: nn.Module) -> Iterator[None]:
    """Have a model on a device for the time of the block, and where it was afterwards."""
    before = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(before)
