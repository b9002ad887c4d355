"""Hold figures as values, and write them as tables and files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from lightning_prune.safety import check_writable, expanded, replace_text


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Headings; the first column is aligned to the left, the others to the right.
        rows: Cells, as many as there are columns.
        notes: Sentences below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        table = rich.table.Table(
            title=escape(self.title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False
        )
        for index, column in enumerate(self.columns):
            table.add_column(escape(column), justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        r"""For a document, with a heading of the second level.

        Examples:
            >>> print(Table("Sizes", ("file", "MiB"), [("a|b", "3")], ["Two files."]).markdown())
            ## Sizes
            <BLANKLINE>
            | file | MiB |
            |:--|--:|
            | a\|b | 3 |
            <BLANKLINE>
            Two files.
        """
        lines = [f"## {self.title}", "", _line(self.columns), "|:--|" + "--:|" * (len(self.columns) - 1)]
        lines += map(_line, self.rows)
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in cells) + " |"


def short(value: float) -> str:
    """A number of weights in three digits.

    >>> short(106168320), short(999), short(1.5e9)
    ('106 M', '999', '1.5 B')
    """
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def check_outputs(outputs: Sequence[str]) -> list[Path]:
    """The files to write results to, checked before work of minutes or hours begins.

    Raises:
        ValueError: a name that ends neither in .json nor in .md, a folder, a folder that does not exist or cannot be
            written to, or a file that holds anything but older results.
    """
    paths = [expanded(output, "output") for output in outputs]
    for path in paths:
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"output={str(path)!r} must end in .json or .md")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"output={str(path)!r} is a folder, or in a folder that does not exist; make it first")
        check_writable(path)
        if path.is_file() and not _may_replace(path):
            raise ValueError(
                f"output={str(path)!r} is there, and holds other things than results of lightning-prune evaluate or "
                "benchmark; give the name of a new file"
            )
    return paths


# What titles begin with: the names of the commands.
_TITLES = ("Evaluate", "Benchmark")


def _may_replace(path: Path) -> bool:
    """Whether a file is empty or begins as `write_results` begins it: no config.json or README.md of a model."""
    with path.open(encoding="utf-8", errors="replace") as file:
        start = file.read(100)
    return not start or start.startswith(('{\n  "kind": "lightning-prune ', *(f"# {name} " for name in _TITLES)))


def write_results(outputs: Sequence[Path], results: Mapping[str, Any], title: str, tables: Sequence[Table]) -> None:
    """Write results as JSON and as Markdown, as the names of the files say.

    Raises:
        OSError: a file cannot be written; an old one is as it was then.
    """
    for path in outputs:
        if path.suffix == ".json":
            text = json.dumps(results, indent=2)
        else:
            text = "\n\n".join([f"# {title}", *(table.markdown() for table in tables)])
        replace_text(path, text + "\n")


KIND = "lightning-prune evaluate"
"""Says in a JSON file what it is."""


@dataclass(frozen=True)
class TextResult:
    """Perplexity on one text.

    Attributes:
        text: Name of the file, with folders around it where texts share a name.
        sha256: Of its content.
        perplexity: exp(nll), weighted by tokens.
        nll: Mean negative log-likelihood of a predicted token, in nats.
        tokens: Number of predicted tokens.
        seq_len: Tokens in a window.
        stride: Tokens between the starts of two windows.
        windows: Number of windows.
    """

    text: str
    sha256: str
    perplexity: float
    nll: float
    tokens: int
    seq_len: int
    stride: int
    windows: int


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task: Name; a group's name where it is the mean over its tasks.
        metric: Such as ``"acc"``.
        value: The metric.
        stderr: Its standard error over samples, or None.
        samples: Number of samples.
        group: Whether this is a mean over tasks.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    group: bool = False


@dataclass(frozen=True)
class ModelResult:
    """Everything about one model.

    Attributes:
        source: Where it was loaded from.
        role: ``"model"`` or ``"baseline"``.
        parameters: Number of parameters, tied ones once.
        prunable: Number of weights in layers that can be pruned.
        zeros: How many of those are zero.
        pattern: The N:M pattern that every such layer follows, or None.
        dtype: Of the weights.
        weights_crc32: A check sum of all weights, which tells the model from others.
        texts: Perplexities.
        tasks: Metrics of tasks.
    """

    source: str
    role: str
    parameters: int
    prunable: int
    zeros: int
    pattern: str | None
    dtype: str
    weights_crc32: str
    texts: list[TextResult] = field(default_factory=list)
    tasks: list[TaskResult] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationResults:
    """What `lightning_prune.evaluation.evaluate.evaluate` returns.

    Attributes:
        models: The baseline first, if there is one, then the model.
        settings: What was asked for.
        versions: Of Python and packages.
        device: Where it ran.
        seconds: How long it took.
    """

    models: list[ModelResult]
    settings: dict[str, Any]
    versions: dict[str, str]
    device: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are not finite, which JSON lacks, as strings."""
        return {"kind": KIND, **_finite(asdict(self))}

    def tables(self) -> list[Table]:
        """The results for people."""
        return evaluation_tables(self.to_dict())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def evaluation_tables(results: Mapping[str, Any]) -> list[Table]:
    """Tables of results as `EvaluationResults.to_dict` gives them, from memory or from a file.

    Raises:
        ValueError, LookupError, TypeError: they are something else.
    """
    if results["kind"] != KIND:
        raise ValueError(f"kind={results['kind']!r} is not {KIND!r}")
    models = results["models"]
    tables = []
    if any(model["texts"] for model in models):
        tables.append(_perplexities(models))
    if any(model["tasks"] for model in models):
        tables.append(_tasks(models))
    return tables


def _headings(models: Sequence[Mapping[str, Any]]) -> list[str]:
    # The zeros are what tells the two apart; names of folders may be long, and are in the JSON.
    return [f"{m['role']}, {m['zeros'] / m['prunable'] if m['prunable'] else 0:.1%} zeros" for m in models]


def _perplexities(models: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        (texts[0]["text"], f"{texts[0]['tokens']:,}", *(_number(t["perplexity"]) for t in texts))
        for texts in zip(*(model["texts"] for model in models), strict=True)
    ]
    first = models[0]["texts"][0]
    overlap = "without overlap" if first["stride"] == first["seq_len"] else f"every {first['stride']} tokens"
    return Table(
        "Perplexity",
        ("text", "predicted tokens", *_headings(models)),
        rows,
        [f"Weighted by tokens, in windows of {first['seq_len']} tokens {overlap}; lower is better."],
    )


def _tasks(models: Sequence[Mapping[str, Any]]) -> Table:
    rows = []
    for same in zip(*(model["tasks"] for model in models), strict=True):
        one = same[0]
        name = f"mean of {one['task']}" if one["group"] else one["task"]
        rows.append((f"{name}, {one['metric']}", f"{one['samples']:,}", *map(_with_error, same)))
    return Table(
        "Zero-shot tasks",
        ("task, metric", "samples", *_headings(models)),
        rows,
        ["Measured with lm-eval; ± one standard error."],
    )


def _with_error(task: Mapping[str, Any]) -> str:
    if task["stderr"] is None or isinstance(task["value"], str):
        return _number(task["value"])
    return f"{task['value']:.4f} ± {float(task['stderr']):.4f}"


def _number(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if value < 10 else f"{value:,.2f}"
