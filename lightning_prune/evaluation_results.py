"""What `evaluate` measured: plain values for JSON, and tables made from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_prune.tables import Table

KIND = "lightning-prune evaluate"
"""Says in a JSON file what it is."""


@dataclass(frozen=True)
class TextResult:
    """Perplexity on one text.

    Attributes:
        text: Name of the file.
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
    texts: list[TextResult] = field(default_factory=list)
    tasks: list[TaskResult] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationResults:
    """What `lightning_prune.evaluate.evaluate` returns.

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
