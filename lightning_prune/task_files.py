"""Zero-shot tasks in JSON Lines files.

Two kinds of files are tasks:

- minimal pairs, as in BLiMP: ``sentence_good`` and ``sentence_bad``; right is who gives the good one the higher
  probability (`acc`);
- multiple choice: ``query``, a list ``choices`` and the index ``gold``; right is who continues the query with that
  choice, by probability (`acc`), and by probability over the length of the choice (`acc_norm`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_prune.sources import existing_path, expanded

PREFIX = "blimp:"
"""May stand before a file or folder of minimal pairs, to say what it must be."""


@dataclass(frozen=True)
class LocalTask:
    """A task from a file.

    Attributes:
        name: Stem of the file.
        group: Name of the folder it is one file of, or None.
        documents: One mapping with ``query``, ``choices`` and ``gold`` a sample.
        metrics: Names of lm-eval's metrics.
    """

    name: str
    group: str | None
    documents: list[dict[str, Any]]
    metrics: tuple[str, ...]


def read_tasks(specs: Sequence[str]) -> tuple[list[LocalTask], list[str]]:
    """Sort what the user asked for into local files, which are read and checked, and names of lm-eval's tasks.

    Args:
        specs: Names of tasks of lm-eval, ``.jsonl`` files, or folders of them; ``blimp:PATH`` for minimal pairs.

    Raises:
        ValueError: a file is no task; the message says which line, and what it lacks.
        FileNotFoundError: a path does not exist.
    """
    local: list[LocalTask] = []
    names: list[str] = []
    for spec in specs:
        path = expanded(spec.removeprefix(PREFIX), "tasks")
        if spec.startswith(PREFIX) or path.suffix == ".jsonl" or path.is_dir() or "/" in spec:
            local += _read_path(existing_path(str(path), "tasks"), pairs_only=spec.startswith(PREFIX))
        elif path.suffix in (".yaml", ".yml", ".json", ".py"):
            raise ValueError(
                f"tasks={spec!r}: local tasks are .jsonl files; definitions may name code, and are not read"
            )
        else:
            names.append(spec)
    seen = [*(task.name for task in local), *names]
    twice = sorted({name for name in seen if seen.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {twice[0]!r} is named twice; name each task once")
    return local, names


def _read_path(path: Path, pairs_only: bool) -> list[LocalTask]:
    if not path.is_dir():
        return [_read_file(path, None, pairs_only)]
    files = sorted(path.glob("*.jsonl"))
    if not files:
        raise ValueError(f"tasks={str(path)!r} is a folder without .jsonl files")
    return [_read_file(file, path.resolve().name, pairs_only) for file in files]


def _read_file(path: Path, group: str | None, pairs_only: bool) -> LocalTask:
    documents: list[dict[str, Any]] = []
    kinds = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"tasks={str(path)!r} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tasks={str(path)!r}, line {number} is not JSON: {error}") from error
        document = _document(fields, len(documents), pairs_only)
        if document is None:
            wanted = "non-empty texts 'sentence_good' and 'sentence_bad'"
            other = "" if pairs_only else ", or 'query', at least two 'choices', and the index 'gold' of one"
            raise ValueError(f"tasks={str(path)!r}, line {number} must have {wanted}{other}")
        kinds.add("sentence_good" in fields)
        documents.append(document)
    if not documents:
        raise ValueError(f"tasks={str(path)!r} holds no samples")
    if len(kinds) > 1:
        raise ValueError(f"tasks={str(path)!r} mixes minimal pairs and multiple choice; make two files of it")
    return LocalTask(path.stem, group, documents, ("acc",) if kinds == {True} else ("acc", "acc_norm"))


def _document(fields: Any, index: int, pairs_only: bool) -> dict[str, Any] | None:
    """A sample in the form of the task below, or None if it is none."""
    if not isinstance(fields, Mapping):
        return None
    good, bad = fields.get("sentence_good"), fields.get("sentence_bad")
    if _is_text(good) and _is_text(bad):
        # lm-eval takes the first of equal choices. The good one stands first in every other sample only, so that a
        # model that gives everything the same probability is right half of the time.
        return {"query": "", "choices": [good, bad] if index % 2 == 0 else [bad, good], "gold": index % 2}
    query, choices, gold = fields.get("query"), fields.get("choices"), fields.get("gold")
    if pairs_only or not isinstance(query, str) or not isinstance(choices, list) or len(choices) < 2:
        return None
    if not all(map(_is_text, choices)) or type(gold) is not int or not 0 <= gold < len(choices):
        return None
    return {"query": query, "choices": choices, "gold": gold}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
