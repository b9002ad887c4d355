"""Change all or nothing: weights put back after a failure, files replaced and read whole, signals held back."""

from __future__ import annotations

import errno
import json
import os
import signal
import struct
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_prune.sharding import local


class Originals:
    """Copies of parameters in main memory; of a sharded one, of this rank's part.

    Attributes:
        undo: What else has to be done to put everything back, the latest first.
    """

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self._copies: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def keep(self, parameter: nn.Parameter) -> None:
        """Copy a parameter that is about to change, the first time it is named."""
        if id(parameter) not in self._copies:
            self._copies[id(parameter)] = (parameter, local(parameter.detach()).to("cpu", copy=True))

    @torch.no_grad()
    def restore(self, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Put some parameters back that were kept, or all; interrupts wait until that is done."""
        chosen = [self._copies[id(p)] for p in parameters] if parameters is not None else self._copies.values()
        with uninterrupted():
            for parameter, copy in chosen:
                local(parameter).copy_(copy)
            if parameters is None:
                while self.undo:
                    self.undo.pop()()

    @torch.no_grad()
    def go_back(self, share: float) -> None:
        """Leave all that were kept only that share of the way, from what they were, to what they are."""
        for parameter, copy in self._copies.values():
            here = local(parameter)
            wide = torch.promote_types(here.dtype, torch.float32)
            part = torch.lerp(copy.to(here.device, wide), here.to(wide), share).to(here.dtype)
            here.copy_(torch.where(part == 0, here, part))  # halfway from a to -a would look pruned

    def put_back(self, parameters: Iterable[nn.Parameter]) -> None:
        """Restore some parameters, and let go of their copies."""
        chosen = {id(p): p for p in parameters}
        self.restore(chosen.values())
        for key in chosen:
            del self._copies[key]


@contextmanager
def restored_on_failure() -> Iterator[Originals]:
    """Give something that remembers parameters before they change; put all back if the block fails."""
    originals = Originals()
    try:
        yield originals
    except BaseException:
        originals.restore()
        raise
    finally:
        torch.clear_autocast_cache()  # see `uninterrupted`


class ProcessWide:
    """A setting of the whole process that several threads may want changed at once.

    Each would put back what it has found, and the last one so leave for good what another had set. So the first changes
    it, and the last puts it back.

    Args:
        change: Makes the context that changes it; entered and left by whichever thread comes first and goes last.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[Any]]) -> None:
        self._change, self._lock, self._holders = change, threading.Lock(), 0
        self._changed: AbstractContextManager[Any]

    @contextmanager
    def changed(self) -> Iterator[None]:
        """Have it changed while the block runs."""
        with self._lock:
            if not self._holders:
                changed = self._change()
                changed.__enter__()
                self._changed = changed
            self._holders += 1
        try:
            yield
        finally:
            with self._lock:
                self._holders -= 1
                if not self._holders:
                    self._changed.__exit__(None, None, None)


CHECK_SUMS = "lightning_prune.crc32"
"""Key in the metadata of a safetensors file: the check sum of each tensor."""

_PIECE = 1 << 20
# A view of a view claims more than is stored, and is harmless while it is small.
_SLACK = 64 << 20
_MOST = 8


def check_records(file: BinaryIO) -> None:
    """Read the records of a file that `torch.save` has written, and compare each with its check sum.

    ``torch.load`` does not. A file of another format passes; the check sums of one that was written without any
    (``torch.serialization.set_crc32_options(False)``) are all 0.

    Raises:
        ValueError: a record was changed, or is compressed, and could be far larger than the file.
        BadZipFile: the list of records is damaged.
    """
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        size = file.seek(0, os.SEEK_END)
        for record in records:
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError(f"its record {record.filename!r} is compressed, as torch.save never does")
        if sum(record.file_size for record in records) > size:
            raise ValueError(f"its records claim more than the {size} bytes of the file")
        if any(record.CRC for record in records):
            for record in records:
                with archive.open(record) as stream:
                    while stream.read(_PIECE):
                        pass
    file.seek(0)


def check_claims(value: Any, size: int) -> None:
    """Refuse tensors that are far larger than the file which they come from.

    Of an expanded tensor (stride 0) one element is stored, and counting or copying it takes memory for all. What is
    the same memory under several names counts once.

    Args:
        value: What was loaded: tensors in mappings and sequences, at any depth.
        size: Of the file, in bytes.

    Raises:
        ValueError: naming what the tensors claim.
    """
    seen: set[Any] = set()
    claimed, left = 0, [value]
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            if item.is_meta:
                raise ValueError("it holds a tensor without data (on the device 'meta')")
            strided = item.layout == torch.strided
            key = (item.data_ptr(), item.shape, item.stride(), item.dtype) if strided else id(item)
            if key not in seen:
                seen.add(key)
                claimed += item.numel() * item.element_size()
        elif isinstance(item, (Mapping, list, tuple, set)) and id(item) not in seen:
            seen.add(id(item))
            left.extend(item.values() if isinstance(item, Mapping) else item)
    if claimed > _MOST * size + _SLACK:
        raise ValueError(f"its tensors claim {claimed:,} bytes, the file has {size:,}")


def is_stored_whole(tensor: Tensor) -> bool:
    """Whether every element of a tensor has bytes of its own."""
    return tensor.layout == torch.strided and tensor.is_contiguous()


# -- safetensors ------------------------------------------------------------------------------------------------------


def check_sum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor's name, dtype, shape and bytes."""
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data, zlib.crc32(head))


def stored_sums(metadata: Mapping[str, str] | None) -> dict[str, int]:
    """Check sums by tensor from the metadata of a safetensors file; empty where nobody wrote any.

    Raises:
        ValueError: they are damaged.
    """
    text = (metadata or {}).get(CHECK_SUMS)
    if text is None:
        return {}
    found = json.loads(text)
    if not isinstance(found, dict) or not all(isinstance(value, int) for value in found.values()):
        raise ValueError("its check sums are damaged")
    return found


def add_check_sums(files: Iterable[Path]) -> None:
    """Write the check sum of every tensor into the header of safetensors files, each replaced whole.

    Other programs ignore them, and leave them out where they write the file again.
    """
    for file in files:
        with safe_open(file, framework="pt") as handle:
            metadata = dict(handle.metadata() or {})
            sums = {name: check_sum(name, handle.get_tensor(name)) for name in handle.keys()}  # noqa: SIM118
        _replace_metadata(file, metadata | {CHECK_SUMS: json.dumps(sums)})


def _replace_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Copy a safetensors file with other metadata; safetensors itself would want all tensors in memory."""
    with path.open("rb") as old, tempfile.NamedTemporaryFile(dir=path.parent, prefix=".sums.", delete=False) as new:
        try:
            (length,) = struct.unpack("<Q", old.read(8))
            header = json.loads(old.read(length))
            header["__metadata__"] = dict(metadata)
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # the format wants tensors aligned
            new.write(struct.pack("<Q", len(text)) + text)
            while piece := old.read(_PIECE):
                new.write(piece)
            new.close()
            publish(Path(new.name))
            os.replace(new.name, path)
        except BaseException:
            new.close()
            Path(new.name).unlink(missing_ok=True)
            raise


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block is done (main thread only; elsewhere Python sends none).

    An autocast that the caller is in forgets the weights that it has cast: the block may change them.
    """
    try:
        with _signals_held():
            yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def _signals_held() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    previous: dict[int, Any] = {}
    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        if signal.getsignal(number) is not None:  # None: installed outside Python, cannot be restored
            previous[number] = signal.signal(number, lambda n, frame: received.append((n, frame)))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0][0])


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: it cannot be written, naming the file; an old one is as it was.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        publish(Path(name))
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # as when the disk is full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_writable(output: Path, inside: str = "", error: type[ValueError] = ValueError) -> None:
    """Refuse an output that cannot be made, before the work that it is for. Nothing is left behind.

    Args:
        output: A file or a folder, there or not.
        inside: What is to be made in the folder, instead of it.
        error: What to raise.

    Raises:
        ValueError: or what `error` says, naming the output and what is in the way.
    """
    path = output / inside
    parent = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    try:
        # Modes say too little: file systems are read-only or full, and root may do what they forbid.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=parent):
            pass
        if path.is_dir() and not os.access(path, os.W_OK):  # nor can it be moved
            parent = path
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as reason:
        raise error(
            f"output={str(output)!r} cannot be written ({reason.strerror}: {str(parent)!r}); choose another place"
        ) from reason


_ASKING = threading.Lock()


def publish(path: Path) -> None:
    """Give a file the mode of any new file: temporary ones, and those of newer versions of safetensors, are private."""
    with _ASKING:  # two that ask at once would leave the process without any
        mask = os.umask(0)
        os.umask(mask)
    path.chmod(0o666 & ~mask)


def expanded(path: str | Path, argument: str) -> Path:
    """Expand `~`.

    Raises:
        ValueError: If the user it names has no home; the message names `argument`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{argument}={str(path)!r} begins with the home of a user who is not known here; write the path out"
        ) from error
