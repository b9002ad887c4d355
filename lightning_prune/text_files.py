"""Text in files: which ones an argument names, and their documents, read by the datasets library."""

from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError

from lightning_prune.chat_data import bad_json_line
from lightning_prune.sources import existing_path, looks_like_path

EMBEDDED = {"austen": Path(__file__).parent / "data" / "austen.txt"}
"""Texts in the package, by the name that stands for the file."""

# extension -> builder of the datasets library
_READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def is_local(source: str | list[str]) -> bool:
    """Whether a source names files or an embedded text, not a dataset on the hub."""
    return isinstance(source, list) or source in EMBEDDED or looks_like_path(source)


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
    options = {"sample_by": sample_by} if reader == "text" else {}
    try:
        return datasets.load_dataset(
            reader,
            data_files=[str(file) for file in files],
            split="train",
            cache_dir=cache_dir,
            streaming=streaming,
            **options,
        )
    except DatasetGenerationError as error:
        found = (bad_json_line(file) for file in files if file.suffix.lower() == ".jsonl")
        if problem := next(filter(None, found), None):
            raise ValueError(f"{argument}={source!r}: {problem}") from error
        raise


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
                f"{', '.join(_READERS)}; plain text belongs in a .txt file."
            )
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
