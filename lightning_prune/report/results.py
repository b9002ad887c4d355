"""Measurements of other commands, from their JSON files: perplexities, accuracies, latencies, as tables of numbers.

Read are the files of ``lightning-prune quickstart`` and ``evaluate``, those of ``tests/benchmarks``, and any other list
of objects, or object with such a list, that hold numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Keys that name a row, in the order they are shown in; those behind "name" say more about it.
_LABELS = ("name", "model", "row", "role", "implementation", "method", "score", "zeros", "pattern", "text", "source")
_MOST_ROWS = 60
_LARGEST = 64 << 20


@dataclass
class Row:
    """One line of a table.

    Attributes:
        label: What was measured.
        values: Numbers by the name of their column.
        folder: Where the model lies, as the file says, or "".
        dense: Whether the label says that this is the dense model.
    """

    label: str
    values: dict[str, float]
    folder: str = ""
    dense: bool = False


@dataclass
class Results:
    """The content of one file.

    Attributes:
        name: Name of the file.
        rows: Its measurements.
        left_out: Rows beyond those shown.
        facts: What it says of how they were made: settings, versions.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    left_out: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """Columns in which there is a number, perplexities first."""
        names = dict.fromkeys(name for row in self.rows for name in row.values)
        return sorted(names, key=lambda name: not name.startswith("perplexity"))


class ResultsError(ValueError):
    """A file holds no measurements."""


def read_results(path: str | Path) -> Results:
    """Read a file.

    Raises:
        ResultsError: it is missing, no JSON, or holds no numbers.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultsError(f"results={str(path)!r} cannot be read: {reason}; give JSON files") from error
    rows = [row for row in map(_row, _entries(loaded)) if row is not None]
    if not rows:
        raise ResultsError(
            f"results={str(path)!r} holds no measurements; give files that lightning-prune quickstart or evaluate "
            "wrote, or a list of objects with numbers"
        )
    results = Results(path.name, rows[:_MOST_ROWS], max(0, len(rows) - _MOST_ROWS))
    if isinstance(loaded, Mapping):
        unigram = _number(loaded.get("unigram_perplexity"))
        if unigram is not None:
            results.rows.append(Row("word frequencies alone", {"perplexity": unigram}))
        for key in ("settings", "environment", "versions", "device"):
            if loaded.get(key):
                results.facts[key] = loaded[key]
    return results


def _entries(loaded: Any) -> Iterable[Mapping[str, Any]]:
    """The objects that are rows."""
    if isinstance(loaded, Mapping):
        for key in ("models", "rows", "results"):
            if isinstance(loaded.get(key), list):
                loaded = loaded[key]
                break
        else:
            loaded = [loaded]
    return [entry for entry in loaded if isinstance(entry, Mapping)] if isinstance(loaded, list) else []


def _row(entry: Mapping[str, Any]) -> Row | None:
    values: dict[str, float] = {}
    for key, value in entry.items():
        if key == "seconds" and isinstance(value, Mapping):
            value = value.get("total")
        if key in ("texts", "tasks") and isinstance(value, list):
            for item in value:
                values |= _measurement(item)
        elif isinstance(value, Mapping):
            values |= {f"{key}, {k}": n for k, v in value.items() if (n := _number(v)) is not None and key != "options"}
        elif (number := _number(value)) is not None:
            values[key] = number
    if isinstance(entry.get("zeros"), int) and values.get("prunable"):
        values["sparsity"] = values.pop("zeros") / values["prunable"]
    if not values:
        return None
    parts = [str(entry[key]) for key in _LABELS if isinstance(entry.get(key), str) and entry[key]]
    words = {str(entry.get(key)) for key in ("model", "name", "method", "row")}
    dense = "dense" in words or entry.get("role") == "baseline"
    return Row(", ".join(parts) or "measured", values, str(entry.get("folder") or entry.get("source") or ""), dense)


def _measurement(item: Any) -> dict[str, float]:
    """One text or task of ``evaluate``."""
    if not isinstance(item, Mapping):
        return {}
    perplexity, value = _number(item.get("perplexity")), _number(item.get("value"))
    if perplexity is not None:
        return {f"perplexity, {item.get('text', 'text')}": perplexity}
    if value is not None:
        return {f"{item.get('task', 'task')}, {item.get('metric', 'metric')}": value}
    return {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def before_and_after(results: Iterable[Results], path: Path) -> tuple[str, float, float] | None:
    """Perplexity of the dense model and of this one, with the column's name, where a file has both.

    Args:
        results: Files in the order given; the first with both counts.
        path: The model of the report; its folder is looked for in the rows. In a file of two models, a dense one and
            another, the other is taken.
    """
    for file in results:
        dense = [row for row in file.rows if row.dense]
        here = [row for row in file.rows if row.folder and Path(row.folder).name == path.name and not row.dense]
        others = [row for row in file.rows if not row.dense]
        if not here and len(dense) == 1 and len(others) == 1:
            here = others
        for row in here[:1]:
            for column in file.columns:
                if column.startswith("perplexity") and dense and column in dense[0].values and column in row.values:
                    return column, dense[0].values[column], row.values[column]
    return None
