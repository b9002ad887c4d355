"""Export a checkpoint to one transformers folder: streamed, checked, with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_prune.checkpoints.cards import Making, described_files
from lightning_prune.checkpoints.inspection import Inspection
from lightning_prune.checkpoints.model import (
    OF_LIGHTNING,
    LoadedModel,
    ReadModel,
    quiet_transformers,
    read_model,
    same_bits,
    some_of,
    tied_names,
    widest_dtype,
)
from lightning_prune.checkpoints.reading import open_checkpoint
from lightning_prune.checkpoints.states import shrunk_sizes
from lightning_prune.errors import ExportError, first_line
from lightning_prune.naming import DTYPES
from lightning_prune.progress import progress_bar
from lightning_prune.results import Table, evaluation_tables
from lightning_prune.safety import add_check_sums, expanded
from lightning_prune.structure.folders import check_replaceable, replacing
from lightning_prune.structure.saving import save_tokenizer

# Of a model that takes images, speech or video the last ones: the settings of what makes its inputs.
_COPIED = (
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


def export(
    checkpoint: str | Path,
    output: str | Path,
    tokenizer: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    results: str | Path | None = None,
    progress: bool = True,
) -> Inspection:
    """Write model, tokenizer and settings of a checkpoint as a folder for transformers' `from_pretrained`.

    The folder appears whole or not at all: it is written beside `output`, read again, compared bit by bit, and then
    renamed. Tensors are read one at a time. A ``.ckpt`` and safetensors stay mapped files unless they are converted;
    the shards of a distributed checkpoint are put together in main memory, which must hold the model once.

    Args:
        checkpoint: A Lightning ``.ckpt`` of `CausalLM`, the folder of a distributed checkpoint of one
            (``ModelParallelStrategy``), or a transformers folder. Adapters that `PERPRetraining` was training are
            merged; units that `PruningAwarePretraining` had masked, and not sliced off, are left out.
        output: Folder to write: ``config.json``, ``model.safetensors`` (in shards where it is large), the tokenizer,
            ``generation_config.json``, the settings of a processor, ``sparsity.json`` and a model card, ``README.md``.
        tokenizer: Hub id, folder, ``.gguf`` file or ``tokenizer.json``; ``"none"`` for no tokenizer. Default: the one
            the checkpoint names, if it names one.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` to convert floating point weights; default as stored.
        overwrite: Replace `output` if it holds a model.
        results: A file that ``lightning-prune evaluate --output results.json`` has written, for the model card.
        progress: Show bars where stderr is a terminal.

    Returns:
        What is in the new folder, as `inspect` counts it, compared with the masks of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing, damaged, or not safe to open.
        ExportError: it holds no configuration, other tensors than its architecture has, pruned weights that are not
            zero, or values that `dtype` cannot hold; `output` is not to be replaced, or could not be written; or the
            tokenizer cannot be loaded or does not fit. An old `output` is as it was then, as after Ctrl-C.

    Example::

        export("last.ckpt", "model", dtype="bfloat16")
        AutoModelForCausalLM.from_pretrained("model")
    """
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"dtype={dtype!r} is not known; use one of {', '.join(map(repr, DTYPES))}")
    measured = None if results is None else read_results(results)
    source = open_checkpoint(checkpoint, argument="checkpoint")
    target = expanded(output, "output").resolve()
    check_apart(expanded(checkpoint, "checkpoint"), target)
    check_replaceable(target, overwrite)
    read = read_model(source, tokenizer, None if dtype is None else DTYPES[dtype], progress)
    tables = [] if measured is None else _tables_of(measured, read, str(results))
    masks, base = read.masks, source.hyper_parameters.get("model")
    making = Making(base=base, tables=tables, sizes=shrunk_sizes(source.callbacks) or None)
    if masks is not None:
        making = replace(making, score=masks.score, settings=masks.settings, masks=masks.count)
    found = Inspection(str(output), "safetensors", 0, read.reports, making.masks)
    beside = None if source.format in OF_LIGHTNING else source.files[0].parent
    size = write_model(target, read.model, read.tokenizer, found, making, beside, overwrite, progress)
    return replace(found, bytes_on_disk=size)


def write_model(
    target: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    found: Inspection,
    making: Making,
    beside: Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Write a model as a folder for transformers, with card, `sparsity.json` and check sums.

    The folder appears whole or not at all: it is written beside `target`, read again, compared bit by bit, and renamed.

    Args:
        target: The folder.
        model: The transformers model, on the CPU.
        tokenizer: Its tokenizer, if any.
        found: What is in its weights.
        making: How it came about.
        beside: The folder that the model comes from, if any. Settings of its processor are copied, and those of
            generation: transformers refuses to save some that it loads.
        overwrite: Replace `target` if it holds a model.
        progress: Show a bar where stderr is a terminal.

    Returns:
        Size of the weights' files in bytes.

    Raises:
        ExportError: `target` is not to be replaced, or cannot be written; what was there is as it was.
    """
    with quiet_transformers(), replacing(target, overwrite) as folder:
        try:
            model.save_pretrained(str(folder))
            add_check_sums(sorted(folder.glob("*.safetensors")))
            if tokenizer is not None:
                save_tokenizer(tokenizer, folder)
            settings = [] if beside is None else [beside / name for name in _COPIED]
            for file in filter(Path.is_file, settings):
                shutil.copyfile(file, folder / file.name)
            for name, text in described_files(target.name, model, found, making).items():
                (folder / name).write_text(text, encoding="utf-8")
        except (OSError, SafetensorError) as error:
            raise ExportError(
                f"output={str(target)!r} cannot be written: {first_line(error)}; free space or choose another folder "
                "(what was there is unchanged)"
            ) from error
        check_written(folder, model, progress)
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tables_of(results: Mapping[str, Any], read: ReadModel, file: str) -> list[Table]:
    """Tables of an evaluation of this model."""
    (measured,) = [model for model in results["models"] if model["role"] == "model"]
    own = LoadedModel("", read.model, None).facts()
    # Another dtype rounds, and so has other bits and zeros.
    names = tuple(own) if measured["dtype"] == own["dtype"] else ("parameters", "prunable")
    wrong = [name for name in names if measured[name] != own[name]]
    if wrong:
        raise ExportError(
            f"results={file!r} measured another model ({measured['source']}): its {wrong[0]} is "
            f"{measured[wrong[0]]}, here it is {own[wrong[0]]}; measure this one with lightning-prune evaluate"
        )
    return evaluation_tables(results)


def check_apart(checkpoint: Path, target: Path) -> None:
    """Refuse to write over the checkpoint itself, or over files that it links to (as a cache of the hub does)."""
    files = filter(Path.is_file, checkpoint.iterdir() if checkpoint.is_dir() else ())
    places = [checkpoint, *files]
    if any(place.resolve().is_relative_to(target) for place in places):
        raise ExportError(
            f"output={str(target)!r} is or holds the checkpoint, which would be lost with it; choose another folder"
        )


def check_written(folder: Path, model: Any, progress: bool) -> None:
    """Read the files again, and compare each tensor with the model's, bit by bit."""
    expected, tied = model.state_dict(), tied_names(model)
    written = open_checkpoint(folder)
    tensors: Mapping[str, Tensor] = written
    if not set(written) <= expected.keys():  # names of the disk, not of the memory; transformers translates them back
        # Some families keep some of their weights wider than they were.
        loaded = type(model).from_pretrained(str(folder), dtype=widest_dtype(expected.values())).state_dict()
        tensors = {name: tensor.to(expected[name].dtype) for name, tensor in loaded.items()}
    same = set()
    with progress_bar("Checking what was written", len(written), enabled=progress) as advance:
        for name, tensor in tensors.items():
            if not same_bits(tensor, expected[name]):
                raise ExportError(
                    f"{name!r} reads back other than it was written; the disk or the memory is faulty; write to another"
                )
            same.add(tied.get(name, name))
            del tensor
            advance()
    lost = sorted(name for name in expected if tied.get(name, name) not in same)
    if lost:
        raise ExportError(f"{some_of(lost)} were not written, so that transformers would leave them random")


def read_results(path: str | Path) -> Mapping[str, Any]:
    """The results of ``lightning-prune evaluate``, for a card.

    Raises:
        ExportError: the file cannot be read, or holds something else.
    """
    try:
        results = json.loads(expanded(path, "results").read_text(encoding="utf-8"))
        evaluation_tables(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ExportError(
            f"results={str(path)!r} is no file that lightning-prune evaluate --output results.json has written "
            f"({type(error).__name__}: {error})"
        ) from error
    return dict(results)
