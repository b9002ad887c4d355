"""Write a transformers folder beside an old one, read it again, compare, and only then put it in its place."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from lightning_prune.checkpoint_model import (
    OF_LIGHTNING,
    ExportError,
    ReadModel,
    first_line,
    same_bits,
    some_of,
    tied_names,
)
from lightning_prune.checkpoints import Checkpoint, open_checkpoint
from lightning_prune.masks import uninterrupted
from lightning_prune.progress import progress_bar
from lightning_prune.stored_bytes import add_check_sums


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
