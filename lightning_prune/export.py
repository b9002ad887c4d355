"""Turn a checkpoint of any format into one ordinary transformers folder, or leave everything as it was.

Nothing in the checkpoint is run, no process group is needed, and what was written is read again and compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_prune.checkpoint_model import (
    DTYPES,
    NO_TOKENIZER,
    ExportError,
    ReadModel,
    quiet_transformers,
    read_model,
)
from lightning_prune.checkpoints import open_checkpoint
from lightning_prune.export_folder import check_apart, check_replaceable, check_written, replacing, write_model
from lightning_prune.inspection import Inspection
from lightning_prune.model_card import CARD_FILE, model_card, read_results
from lightning_prune.sources import expanded

__all__ = ["DTYPES", "NO_TOKENIZER", "SPARSITY_FILE", "ExportError", "export"]

SPARSITY_FILE = "sparsity.json"
"""Written beside the weights: which layers are how sparse, and which score chose the zeros."""


def export(
    checkpoint: str | Path,
    output: str | Path,
    tokenizer: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    results: str | Path | None = None,
    progress: bool = True,
) -> Inspection:
    """Write model, tokenizer and generation settings of a checkpoint as a folder for transformers' `from_pretrained`.

    The folder appears whole or not at all: it is written beside `output`, read again, compared bit by bit, and then
    renamed. Tensors are read one at a time. A ``.ckpt`` and safetensors stay mapped files unless they are converted;
    the shards of a distributed checkpoint are put together in main memory, which must hold the model once.

    Args:
        checkpoint: A Lightning ``.ckpt`` of `CausalLM`, the folder of a distributed checkpoint of one
            (``ModelParallelStrategy``), or a transformers folder. Adapters that `PERPRetraining` was training are
            merged; units that `PruningAwarePretraining` had masked, and not sliced off, are left out.
        output: Folder to write: ``config.json``, ``model.safetensors`` (in shards where it is large), the tokenizer,
            ``generation_config.json``, ``sparsity.json`` and a model card, ``README.md``.
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
    check_apart(Path(checkpoint), target)
    check_replaceable(target, overwrite)
    read = read_model(source, tokenizer, None if dtype is None else DTYPES[dtype], progress)
    texts = {
        SPARSITY_FILE: json.dumps(_sparsity(read), indent=2) + "\n",
        CARD_FILE: model_card(target.name, source, read, measured),
    }
    with quiet_transformers(), replacing(target, overwrite) as folder:
        write_model(folder, target, source, read, texts)
        check_written(folder, read.model, progress)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Inspection(str(output), "safetensors", size, read.reports, None if read.masks is None else read.masks.count)


def _sparsity(read: ReadModel) -> dict[str, Any]:
    """Content of `SPARSITY_FILE`: zeros and pattern of every layer that can be pruned."""
    found = Inspection("", "", 0, read.reports)
    return {
        "score": None if read.masks is None else read.masks.score,
        "settings": [] if read.masks is None else read.masks.settings,
        "pattern": found.pattern,
        "weights": found.totals().numel,
        "zeros": found.totals().zeros,
        "sparsity": found.sparsity,
        "layers": {
            t.name: {"weights": t.numel, "zeros": t.zeros, "sparsity": t.sparsity, "pattern": t.pattern}
            for t in found.selected()
        },
    }
