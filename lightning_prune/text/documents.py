"""Text in files: which ones an argument names, in which encoding, and their documents, read by the datasets library."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from lightning_prune.checkpoints.sources import existing_path, looks_like_path, named_where_it_fails
from lightning_prune.errors import first_line
from lightning_prune.safety import ProcessWide, expanded

EMBEDDED = {"austen": Path(__file__).parent / "embedded" / "austen.txt"}
"""Texts in the package, by the name that stands for the file."""

# what a file begins with -> encoding; longer marks first
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UTF8 = {"utf-8", "utf-8-sig"}
_CONVERT = "convert it to plain UTF-8, such as with: iconv -f {} -t UTF-8 old.txt > new.txt"
_DICT = "dataset_dict.json"
# extension -> builder of the datasets library
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def is_local(source: str | list[str]) -> bool:
    """Whether a source names files or an embedded text, not a dataset on the hub."""
    return isinstance(source, list) or source in EMBEDDED or looks_like_path(source)


def check_local(source: str | list[str], argument: str) -> None:
    """Refuse names of files that cannot be read as text, before anything long begins; names of the hub pass.

    Raises:
        ValueError, FileNotFoundError: see `local_documents`.
    """
    if is_local(source) and not is_saved(source):
        _local_files(source, argument)


def check_parts(source: str | list[str], argument: str, **parts: str | None) -> None:
    """Refuse what names a part of a dataset on the hub, where a source is files, which have no such parts.

    Args:
        source: As of `texts_of`.
        argument: What the user calls it, for errors.
        parts: Its configuration, split and revision, as the user calls them; a split of a saved `DatasetDict` is one.

    Raises:
        ValueError: naming the one that would not be heard.
    """
    if is_local(source):
        for name, value in parts.items():
            saved = name.endswith("split") and bool(saved_splits(source))
            if value not in (None, "train") and not saved:  # which is the default of a split
                raise ValueError(
                    f"{name}={value!r} is of datasets on the hub, and {argument}={source!r} is on this machine: leave "
                    f"{name} out, or name a dataset"
                )


def local_documents(
    source: str | list[str], argument: str, sample_by: str, cache_dir: str | None, streaming: bool = False
) -> Any:
    """The documents of local files, with all their columns.

    Args:
        source: "austen", a file, a folder, or a list of these.
        argument: What the user calls it, for errors.
        sample_by: What one document is in .txt files: "document", "paragraph" or "line".
        cache_dir: Of the datasets library.
        streaming: Read the files while they are used.

    Returns:
        A dataset; an iterable one with `streaming`.

    Raises:
        ValueError: the files are of an unknown kind, of several kinds, empty, or damaged.
        FileNotFoundError: a file does not exist.
    """
    files = _local_files(source, argument)
    readers = {_READERS[file.suffix.lower()] for file in files}
    if len(readers) > 1:
        kinds = sorted({file.suffix for file in files})
        raise ValueError(
            f"{argument}={source!r} mixes files of the kinds {kinds}. Pass files of one kind, e.g. as a list."
        )
    reader = readers.pop()
    options: dict[str, Any] = {}
    encoding = _encoding_of(files, argument) if reader != "parquet" else "utf-8"
    if reader == "text":
        options = {"sample_by": sample_by, "encoding": encoding}
    elif encoding != "utf-8":
        raise ValueError(f"{argument}={source!r} begins with a mark of {encoding}; {_CONVERT.format(encoding)}")
    try:
        return datasets.load_dataset(
            reader,
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=cache_dir,
            streaming=streaming,
            **options,
        )
    except (DatasetGenerationError, ValueError, RuntimeError, LookupError, TypeError) as error:
        problems = [not_in(encoding, file) for file in files if reader != "parquet"]
        if not any(problems):
            problems = [bad_json_line(file) for file in files if file.suffix.lower() == ".jsonl"]
        problem = next(filter(None, problems), None)
        if problem is None:
            cause = (error.__cause__ if isinstance(error, DatasetGenerationError) else None) or error
            problem = f"cannot be read as {reader}: {first_line(cause)}"
        raise ValueError(f"{argument}={source!r}: {problem}") from error


def texts_of(
    source: str | list[str], name: str | None = None, split: str = "train", text_field: str = "text"
) -> Iterator[str]:
    """Yield the documents of a source one by one; a dataset of the hub is read only as far as it is asked for.

    Args:
        source: "austen", local files or a folder of them, a folder of ``save_to_disk``, or the name of a hub dataset.
        name: Configuration of the hub dataset.
        split: Split of the hub dataset, or of a saved `DatasetDict`.
        text_field: Field or column that holds the text.

    Raises:
        ValueError: see `local_documents`; or there is no such field, or it holds no text.
        FileNotFoundError: a local file does not exist.
    """
    if is_saved(source):
        rows = saved_rows(str(source), split, "text", streaming=True)
    elif isinstance(source, list) or is_local(source):
        rows = local_documents(source, "text", "document", None)
    else:
        with named_where_it_fails("text", source):
            rows = datasets.load_dataset(source, name, split=split, streaming=True)
    for row in rows:
        text = row.get(text_field, 0)
        if not isinstance(text, (str, type(None))):
            held = f"holds a {type(text).__name__} in a row" if text_field in row else f"is none of {sorted(row)}"
            raise ValueError(f"text_field={text_field!r} names no text of text={source!r}: it {held}")
        if text and _has_text(text):
            yield text


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            datasets.enable_progress_bars()


_QUIET_DATASETS = ProcessWide(_quiet_datasets)


def quiet_datasets() -> AbstractContextManager[None]:
    """Go without bars of the datasets library for a block, which it shows in logs too."""
    return _QUIET_DATASETS.changed()


def _encoding_of(files: list[Path], argument: str) -> str:
    """The encoding that marks at the beginning of text files name, UTF-8 where there are none."""
    found = set()
    for file in files:
        with file.open("rb") as stream:
            head = stream.read(1 << 12)
        found.add(next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8"))
        if found <= _UTF8 and b"\0" in head:
            raise ValueError(
                f"{argument}={str(file)!r} holds zero bytes, so it is no UTF-8 text; if it is UTF-16, "
                f"{_CONVERT.format('UTF-16LE')}"
            )
    if found <= _UTF8:
        return "utf-8-sig" if "utf-8-sig" in found else "utf-8"
    if len(found) > 1:
        raise ValueError(f"{argument} names files in {' and '.join(sorted(found))}; {_CONVERT.format('UTF-16')}")
    return found.pop()


def not_in(encoding: str, file: Path) -> str | None:
    """What is wrong where a text file is not of an encoding; None where nothing is."""
    decoder = codecs.getincrementaldecoder(encoding)()
    position = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 20):
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                byte = f"0x{error.object[error.start]:02x} near position {position + error.start:,}"
                return f"{file} is not {encoding.upper()} text (byte {byte}); {_CONVERT.format('LATIN1')}"
            position += len(piece)
    return None


def is_saved(source: Any) -> bool:
    """Whether a source is a folder that ``save_to_disk`` of the datasets library has written."""
    if not isinstance(source, str) or not is_local(source) or source in EMBEDDED:
        return False
    folder = expanded(source, "source")
    return (folder / _DICT).is_file() or all((folder / name).is_file() for name in ("state.json", "dataset_info.json"))


def saved_rows(source: str, split: str, argument: str, streaming: bool = False) -> Any:
    """The rows of a folder that ``save_to_disk`` has written.

    Args:
        source: The folder, see `is_saved`.
        split: Which of its datasets, where it holds several.
        argument: What the user calls it, for errors.
        streaming: As an iterable dataset.

    Raises:
        ValueError: the folder is damaged, or has no such split.
    """
    folder = expanded(source, argument)
    try:
        saved = datasets.load_from_disk(str(folder))
    except MemoryError:
        raise
    except Exception as error:  # JSON, Arrow and the datasets library each raise their own
        raise ValueError(
            f"{argument}={source!r} cannot be read as a folder of save_to_disk: {first_line(error)}"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise ValueError(f"{argument}={source!r} has the splits {sorted(saved)}, no {split!r}; name one")
        saved = saved[split]
    return saved.to_iterable_dataset() if streaming else saved


def saved_splits(source: Any) -> list[str]:
    """Names of the splits in a folder that ``save_to_disk`` has written; empty for anything else."""
    if not is_saved(source) or not (file := expanded(source, "source") / _DICT).is_file():
        return []
    try:
        return [str(name) for name in json.loads(file.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error}; save the dataset again") from error


def _local_files(source: str | list[str], argument: str) -> list[Path]:
    """The text files that `source` names, sorted within a folder."""
    files: list[Path] = []
    for entry in [source] if isinstance(source, str) else source:
        path = EMBEDDED[entry] if entry in EMBEDDED else existing_path(entry, argument)
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in _READERS)
            if not found:
                raise ValueError(f"{argument}={entry!r} is a folder without {', '.join(_READERS)} files.")
            files += found
        elif path.suffix.lower() in _READERS:
            files.append(path)
        else:
            raise ValueError(
                f"{argument}={entry!r} has the unknown extension {path.suffix!r}. Use one of "
                f"{', '.join(_READERS)}; plain text belongs in a .txt file, compressed files must be unpacked, and of "
                "an .arrow file give the folder that save_to_disk has written."
            )
        if path.is_dir() and (is_saved(entry) or saved_splits(entry)):
            raise ValueError(f"{argument}={source!r} has a folder of save_to_disk in a list; pass it alone.")
    if all(file.stat().st_size == 0 for file in files):
        raise ValueError(f"{argument}={source!r} is empty. Pass a file with text.")
    return files


def text_only(documents: datasets.Dataset, text_field: str, source: str | list[str], argument: str) -> datasets.Dataset:
    """The text column alone, without documents that hold no text."""
    if text_field not in documents.column_names:
        raise ValueError(
            f"text_field={text_field!r} is not in {argument}={source!r}, which has the fields "
            f"{documents.column_names}. Pass one of them as text_field."
        )
    documents = documents.select_columns([text_field])
    kind = documents.features[text_field]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"text_field={text_field!r} of {argument}={source!r} holds {kind}, not text.")
    documents = documents.filter(_has_text, input_columns=[text_field], desc="Dropping empty documents")
    if len(documents) == 0:
        raise ValueError(f"{argument}={source!r} holds no text in the field {text_field!r}.")
    return documents


def _has_text(text: str | None) -> bool:
    return bool(text and text.strip())


def bad_json_line(file: Path) -> str | None:
    """What is wrong with the first line of a JSON Lines file that is no JSON; None if there is no such line."""
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    json.loads(line)
            except ValueError as error:
                return f"line {number} of {file} is no JSON: {error}"
    return None
