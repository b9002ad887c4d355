"""Put the folder of a model in the place of another, whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_prune.errors import ExportError, check_bool
from lightning_prune.safety import check_writable, uninterrupted

# Which transformers makes of tokenizers with several templates.
_TEMPLATES = "additional_chat_templates"
# Weights and their index, as transformers names them where no variant is asked for.
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def check_replaceable(target: Path, overwrite: bool, keep: bool = False) -> None:
    """Refuse what cannot be written to, and to take away anything but an old model, and that only if asked to.

    Args:
        target: A folder, there or not.
        overwrite: Whether an old model may go.
        keep: See `replacing`: the new files may then be moved into a folder that cannot be exchanged.
    """
    check_bool("overwrite", overwrite)
    stays = _stays(target)
    check_writable(target, "new" if keep and stays else "", error=ExportError)
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"output={str(target)!r} is a file; give the name of a folder")
    if stays and not keep:
        raise ExportError(
            f"output={str(target)!r} is the folder that you are in, or where a disk begins, and cannot be exchanged "
            "for another; name a folder inside it"
        )
    inside = list(target.iterdir())
    if not inside:
        return
    if not overwrite:
        raise ExportError(
            f"output={str(target)!r} is not empty; choose another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )
    folders = any(entry.is_dir() and entry.name != _TEMPLATES for entry in inside)
    if not (target / "config.json").is_file() or (folders and not keep):
        why = "no config.json)" if keep else "no config.json, or folders inside), which overwrite would delete"
        raise ExportError(
            f"output={str(target)!r} holds other things than a model ({why}; choose another folder, or remove it "
            "yourself"
        )


@contextmanager
def replacing(target: Path, overwrite: bool, keep: bool = False) -> Iterator[Path]:
    """An empty folder that takes the place of `target` once the block is done, and goes away if it fails.

    Args:
        target: A folder, there or not.
        overwrite: See `check_replaceable`.
        keep: Leave all in `target` that is no part of a model, and refuse nothing that is there. Where it holds
            folders, or cannot be exchanged for another, the new files are moved into it one by one.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    stays = _stays(target)
    # Beside the target: only within one file system is renaming a single step.
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", dir=target if stays else target.parent, ignore_cleanup_errors=True
    ) as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()  # with the usual permissions, which the folder around it lacks
        yield new
        if not keep:
            check_replaceable(target, overwrite)  # once more: writing took a while
        with uninterrupted():
            try:
                if target.exists():
                    _take_over(target, new, keep)
                swap_in(new, target, old)
            except (OSError, NotImplementedError):  # also where another process saves the same model
                if not (keep and target.is_dir()):
                    raise
                _move_in(new, target)


def _stays(target: Path) -> bool:
    """Whether a folder cannot be exchanged: a disk begins there, this process works in it, or it may not be moved."""
    return target.is_dir() and (
        os.path.ismount(target)
        or os.path.samefile(target, ".")
        or not all(os.access(folder, os.W_OK) for folder in (target, target.parent))
    )


def _take_over(target: Path, new: Path, keep: bool) -> None:
    """Give a folder the mode of the one whose place it is to take, and what that holds beside a model by a second name.

    Raises:
        OSError: the other one holds folders, belongs to others, or has to stay; nothing of it is changed.
        NotImplementedError: the system gives files no second names. A copy would leave behind who writes to the first.
    """
    if keep:
        others = [e for e in target.iterdir() if not (new / e.name).exists() and not _WEIGHTS.fullmatch(e.name)]
        owners = {(status.st_uid, status.st_gid) for status in (target.stat(), new.stat())}
        if _stays(target) or len(owners) > 1 or any(entry.is_dir() for entry in others):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(target))
        for entry in others:
            os.link(entry, new / entry.name, follow_symlinks=False)
    shutil.copymode(target, new)


def _move_in(new: Path, target: Path) -> None:
    """Move what a folder holds into another, where it replaces what has its name, and old weights."""
    for old in target.iterdir():
        if _WEIGHTS.fullmatch(old.name) and not (new / old.name).exists():
            old.unlink(missing_ok=True)
    for entry in new.iterdir():
        if entry.is_dir():
            shutil.rmtree(target / entry.name, ignore_errors=True)
        os.replace(entry, target / entry.name)


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
