"""Export a checkpoint to one transformers folder: streamed, checked, with a model card."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lightning_prune.checkpoints.inspection import Inspection
from lightning_prune.checkpoints.model import (
    DTYPES,
    NO_TOKENIZER,
    OF_LIGHTNING,
    ReadModel,
    first_line,
    quiet_transformers,
    read_model,
    same_bits,
    some_of,
    tied_names,
)
from lightning_prune.checkpoints.reading import Checkpoint, open_checkpoint
from lightning_prune.checkpoints.sources import looks_like_path
from lightning_prune.errors import ExportError
from lightning_prune.history import versions
from lightning_prune.progress import progress_bar
from lightning_prune.results import Table, evaluation_tables
from lightning_prune.safety import add_check_sums, expanded, uninterrupted

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


def check_apart(checkpoint: Path, target: Path) -> None:
    """Refuse to write over the checkpoint itself."""
    if checkpoint.resolve().is_relative_to(target):
        raise ExportError(
            f"output={str(target)!r} is or holds the checkpoint, which would be lost with it; choose another folder"
        )


def check_replaceable(target: Path, overwrite: bool) -> None:
    """Refuse to take away anything but an old model, and that only if asked to."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"output={str(target)!r} is a file; give the name of a folder")
    inside = list(target.iterdir())
    if not inside:
        return
    if not overwrite:
        raise ExportError(
            f"output={str(target)!r} is not empty; choose another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )
    if not (target / "config.json").is_file() or any(entry.is_dir() for entry in inside):
        raise ExportError(
            f"output={str(target)!r} holds other things than a model (no config.json, or folders inside), which "
            "overwrite would delete; choose another folder, or remove it yourself"
        )


@contextmanager
def replacing(target: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder that takes the place of `target` once the block is done, and goes away if it fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: only within one file system is renaming a single step.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True
    ) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()  # with the usual permissions, which the folder around it lacks
        yield new
        check_replaceable(target, overwrite)  # once more: writing took a while
        with uninterrupted():
            swap_in(new, target, old)


def swap_in(new: Path, target: Path, old: Path) -> None:
    """Put a folder or file in the place of another.

    Linux and macOS exchange the two in one step, so that whoever reads `target` finds one of them at every moment, also
    after the process was killed. Where the file system cannot, `target` is away for the time between two renamings.

    Args:
        new: What is to be at `target`; afterwards what was there, or nothing.
        target: On the same file system.
        old: A free name there, for what was at `target` meanwhile.

    Raises:
        OSError: nothing has changed then.
    """
    if not target.exists():
        os.replace(new, target)
        return
    if _exchange(new, target):
        return
    os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        os.replace(old, target)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places in one step; False where the system or the file system has no such step."""
    if os.name != "posix":
        return False
    library = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):  # Linux: AT_FDCWD, RENAME_EXCHANGE
        return library.renameat2(-100, names[0], -100, names[1], 2) == 0  # type: ignore[no-any-return]
    if hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP
        return library.renamex_np(names[0], names[1], 2) == 0  # type: ignore[no-any-return]
    return False


def write_model(folder: Path, target: Path, source: Checkpoint, read: ReadModel, texts: Mapping[str, str]) -> None:
    """Write weights, configuration, tokenizer and generation settings, and `texts` by the names of their files.

    Raises:
        ExportError: the folder, which is to become `target`, cannot be written.
    """
    try:
        read.model.save_pretrained(str(folder))
        add_check_sums(sorted(folder.glob("*.safetensors")))
        if read.tokenizer is not None:
            read.tokenizer.save_pretrained(str(folder))
        settings = source.files[0].parent / "generation_config.json"
        if source.format not in OF_LIGHTNING and settings.is_file():
            # As it is: transformers refuses to save some settings that it loads.
            shutil.copyfile(settings, folder / settings.name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"output={str(target)!r} cannot be written: {first_line(error)}; free space or choose another folder "
            "(what was there is unchanged)"
        ) from error


def check_written(folder: Path, model: Any, progress: bool) -> None:
    """Read the files again, and compare each tensor with the model's, bit by bit."""
    expected, tied = model.state_dict(), tied_names(model)
    written = open_checkpoint(folder)
    if set(written.names()) <= expected.keys():
        tensors: Callable[[], Iterable[tuple[str, Tensor]]] = written.tensors
    else:  # names of the disk, not of the memory; transformers translates them back
        tensors = type(model).from_pretrained(str(folder), dtype=model.dtype).state_dict().items
    same = set()
    with progress_bar("Checking what was written", written.count, enabled=progress) as advance:
        for name, tensor in tensors():
            if not same_bits(tensor, expected[name]):
                raise ExportError(f"{name!r} reads back other than it was written; the disk or the memory is faulty")
            same.add(tied.get(name, name))
            del tensor
            advance()
    lost = sorted(name for name in expected if tied.get(name, name) not in same)
    if lost:
        raise ExportError(f"{some_of(lost)} were not written, so that transformers would leave them random")


CARD_FILE = "README.md"
"""Name of the card in the folder of the model."""

_LABELS = {
    "sparsity": "sparsity asked for",
    "group": "compared within",
    "allocation": "allocation of sparsity to layers",
    "update": "update of the remaining weights",
    "num_samples": "calibration samples",
    "sequential": "block by block",
    "schedule": "schedule",
    "seed": "seed",
}


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


def model_card(name: str, source: Checkpoint, read: ReadModel, results: Mapping[str, Any] | None = None) -> str:
    """The text of a model card.

    Args:
        name: Of the model.
        source: Where it was read from.
        read: The model, what is in its tensors, and the masks.
        results: What ``lightning-prune evaluate`` measured, from `read_results`.

    Returns:
        Markdown, with the metadata of the Hugging Face hub in front.
    """
    found = Inspection("", "", 0, read.reports)
    prunable, everything = found.totals(), found.totals(True)
    dense = prunable.zeros == 0
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base = source.hyper_parameters.get("model")
    if isinstance(base, str) and base and not looks_like_path(base):
        head["base_model"] = base
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items())]
    lines += ["tags:", *(f"- {tag}" for tag in ([] if dense else ["pruned", "sparse"]) + ["lightning-prune"]), "---"]
    lines += ["", f"# {name}", ""]
    lines.append(
        f"A {type(read.model).__name__} of {everything.numel:,} parameters. {prunable.zeros:,} of the "
        f"{prunable.numel:,} weights in {prunable.tensors} layers outside embeddings and heads are exactly zero "
        f"({prunable.sparsity:.2%}; {everything.sparsity:.2%} of all parameters)."
    )
    if not dense:
        lines += ["", _pruning(read, found).markdown()]
    if results is not None:
        for table in evaluation_tables(results):
            lines += ["", table.markdown()]
    lines += ["", _USE.format(name=json.dumps(name)).strip()]
    if not dense:
        lines += ["", _limits(found)]
    return "\n".join(lines) + "\n"


def _pruning(read: ReadModel, found: Inspection) -> Table:
    rows = [("N:M pattern of every layer", found.pattern or "none (unstructured)")]
    if read.masks is not None:
        rows.insert(0, ("score", read.masks.score or "unknown"))
        for settings in read.masks.settings:
            rows += [(_LABELS[key], str(settings[key])) for key in _LABELS if settings.get(key) is not None]
        rows.append(("masks", f"{read.masks.count}; every weight they remove is zero in these files"))
    sparsities = [t.sparsity for t in found.selected()]
    rows.append(("sparsest and densest layer", f"{max(sparsities):.2%}, {min(sparsities):.2%}"))
    packages = ("lightning-prune", "torch", "transformers")
    found_versions = versions(packages)
    rows += [(package, found_versions.get(package, "not installed")) for package in packages]
    return Table("Pruning", ("", ""), rows, ["`sparsity.json` has the figures of every layer."])


_USE = """
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})
```
"""


def _limits(found: Inspection) -> str:
    text = (
        "## Size and speed\n\nZeros are stored like other numbers: the files are as large as those of the dense model. "
    )
    if found.pattern == "2:4":
        return text + (
            "On NVIDIA GPUs since Ampere, 2:4 weights can be multiplied in sparse form "
            "(`torch.sparse.to_sparse_semi_structured`); elsewhere they run as fast as dense ones."
        )
    return text + "Matrix products skip no zeros at random places, so the model runs as fast as the dense one."
