"""Where models and tokenizers are loaded from: a hub id, a local folder, or a GGUF file.

Nothing loaded through this module executes code that comes with the files.
"""

from pathlib import Path
from typing import Any


def looks_like_path(source: str) -> bool:
    """Whether `source` can only mean a local file or folder, so that it is never looked up on the hub.

    Example:
        >>> [looks_like_path(source) for source in ("HuggingFaceTB/SmolLM2-135M", "./model", "a.gguf")]
        [False, True, True]
    """
    known = {".gguf", ".json", ".jsonl", ".txt", ".parquet", ".ckpt", ".safetensors"}
    return (
        source.startswith((".", "/", "~"))
        or source.count("/") > 1
        or Path(source).suffix.lower() in known
        or Path(source).exists()
    )


def expanded(path: str | Path, argument: str) -> Path:
    """Expand `~`.

    Raises:
        ValueError: If the user it names has no home; the message names `argument`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{argument}={str(path)!r} begins with the home of a user who is not known here") from error


def existing_path(source: str, argument: str) -> Path:
    """Expand `~` and check that the path exists.

    Raises:
        FileNotFoundError: If it does not; the message names `argument`.
    """
    path = expanded(source, argument)
    if not path.exists():
        raise FileNotFoundError(
            f"{argument}={source!r} is not an existing file or folder (looked at {path.absolute()}). "
            "Check the path; a hub id has the form 'name' or 'owner/name'."
        )
    return path


def pretrained_arguments(source: str, gguf_file: str | None, argument: str) -> tuple[str, dict[str, Any]]:
    """Turn a source into the first argument and the keyword arguments of transformers' `from_pretrained`.

    Args:
        source: Hub id, local folder, or path of a `.gguf` file.
        gguf_file: Name of a GGUF file inside the folder or hub repository `source`.
        argument: What the user called `source`, for error messages.

    Returns:
        The name or folder, and `{"gguf_file": ...}` or `{}`; remote code is always refused.

    Raises:
        FileNotFoundError: If a local path does not exist.
        ValueError: If a GGUF file is named twice, or `source` is a file of another kind.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": False}
    if not looks_like_path(source):
        return source, kwargs if gguf_file is None else {**kwargs, "gguf_file": gguf_file}
    path = existing_path(source, argument)
    if path.is_dir():
        if gguf_file is None:
            return str(path), kwargs
        existing_path(str(path / gguf_file), "gguf_file")
        return str(path), {**kwargs, "gguf_file": gguf_file}
    if path.suffix.lower() != ".gguf":
        raise ValueError(
            f"{argument}={source!r} is a file, but only .gguf files are loaded directly. "
            f"Pass the folder that holds it, or a hub id."
        )
    if gguf_file is not None:
        raise ValueError(
            f"{argument}={source!r} already names a GGUF file, and gguf_file={gguf_file!r} names another. "
            "Leave gguf_file out."
        )
    return str(path.parent), {**kwargs, "gguf_file": path.name}
