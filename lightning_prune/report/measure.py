"""Gather what a report shows: the run or model of a path, its matrices, and measurements."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from lightning_prune.checkpoints.inspection import Inspection, TensorReport, inspect_checkpoint
from lightning_prune.checkpoints.reading import Checkpoint, checkpoints_of_runs, open_checkpoint
from lightning_prune.errors import CheckpointError, ResultsError, first_line
from lightning_prune.history import HISTORY_FILE, SparsityHistory, read_history
from lightning_prune.naming import as_matrix, clean_name
from lightning_prune.pruning.score_histograms import ScoreSummary
from lightning_prune.safety import expanded

CELLS = 96
"""Most rows and columns of a picture; larger matrices are averaged."""


@dataclass(frozen=True)
class Structure:
    """How the kept weights of one matrix lie.

    Attributes:
        density: ``[R, C]``, share of kept weights in each cell.
        rows: ``[R]``, share of kept weights by output.
        columns: ``[C]``, share of kept weights by input.
        row_spread: Variance of the densities of all O rows over what independent zeros would give; 1 is chance, 0
            means that every row keeps the same number.
        column_spread: The same of the I columns.
    """

    density: Tensor
    rows: Tensor
    columns: Tensor
    row_spread: float
    column_spread: float

    @property
    def spread(self) -> float:
        """How much rows and columns differ in all."""
        return self.row_spread + self.column_spread


@dataclass(frozen=True)
class Measured:
    """A model as a report sees it.

    Attributes:
        inspection: What `inspect` would say.
        structures: Of each pruned matrix, by parameter name.
        magnitudes: Histograms of ``abs(W)``, kept and pruned: of the dense model where there is one, else of what is
            left.
        dense: Whether `magnitudes` are those of a dense model.
        dense_bytes: Size of its files, or None.
    """

    inspection: Inspection
    structures: dict[str, Structure]
    magnitudes: ScoreSummary
    dense: bool
    dense_bytes: int | None


def measure(checkpoint: Checkpoint, dense: str | Path | None = None, progress: bool = True) -> Measured:
    """Read a model once, tensor by tensor.

    Args:
        checkpoint: The model.
        dense: The same model before it was pruned, as any path that `open_checkpoint` opens.
        progress: Show a bar where stderr is a terminal.

    Raises:
        CheckpointError: a tensor cannot be read, or `dense` has none of the pruned layers, or other shapes.
    """
    before = None if dense is None else _Dense(dense)
    structures: dict[str, Structure] = {}
    magnitudes = ScoreSummary()

    def see(report: TensorReport, tensor: Tensor, mask: Tensor | None) -> None:
        if not report.prunable or report.tied_to is not None:
            return
        name, family = report.name, checkpoint.model_type
        weight = as_matrix(name, tensor, family)
        kept = (weight != 0) if mask is None else as_matrix(name, mask, family)
        if report.zeros:
            structures[name] = structure_of(kept)
        _take_magnitudes(magnitudes, name, weight, kept, before, family)

    inspection = inspect_checkpoint(checkpoint, "Reading weights", progress, see)
    if before is not None and not before.used:
        raise CheckpointError(
            f"dense={str(dense)!r} has none of the layers of {checkpoint.path}: it is another model; give the one "
            "that was pruned"
        )
    return Measured(inspection, structures, magnitudes, before is not None, None if before is None else before.bytes)


def structure_of(kept: Tensor) -> Structure:
    """How kept weights lie.

    Args:
        kept: Bool ``[O, I]``, True = kept.
    """
    live = kept.to(torch.float32)  # [O, I]
    rows, columns = live.mean(1), live.mean(0)  # [O], [I]
    size = (min(CELLS, kept.shape[0]), min(CELLS, kept.shape[1]))
    density = F.adaptive_avg_pool2d(live[None], size)[0]  # [R, C]
    return Structure(
        density=density,
        rows=F.adaptive_avg_pool1d(rows[None], size[0])[0],
        columns=F.adaptive_avg_pool1d(columns[None], size[1])[0],
        row_spread=_spread(rows, kept.shape[1]),
        column_spread=_spread(columns, kept.shape[0]),
    )


def _spread(densities: Tensor, trials: int) -> float:
    """Variance over that of a binomial distribution with the same mean."""
    mean = float(densities.double().mean())
    chance = mean * (1 - mean) / trials
    return float(densities.double().var(correction=0)) / chance if chance > 0 else 0.0


def _take_magnitudes(
    summary: ScoreSummary, name: str, weight: Tensor, kept: Tensor, before: _Dense | None, model_type: str | None
) -> None:
    if before is None:
        sizes = weight.float().abs().masked_fill(~kept, -torch.inf)  # pruned ones are gone: left out
    else:
        dense = before.find(name, weight.shape, model_type)
        if dense is None:
            return
        sizes = dense.float().abs()
    summary.add(name, sizes, kept, weight.numel())


class _Dense:
    """Tensors of the dense model by the names of the pruned one."""

    def __init__(self, path: str | Path) -> None:
        self.checkpoint = open_checkpoint(path, argument="dense")
        self.bytes = self.checkpoint.bytes_on_disk
        self.names = {_core(name): name for name in self.checkpoint}
        self.used = 0

    def find(self, name: str, shape: tuple[int, ...], model_type: str | None) -> Tensor | None:
        """The matrix before pruning, or None if it is not there."""
        wanted = self.names.get(_core(name))
        if wanted is None:
            return None
        matrix = as_matrix(name, self.checkpoint[wanted], self.checkpoint.model_type or model_type)
        if matrix.shape != shape:
            raise CheckpointError(
                f"dense={str(self.checkpoint.path)!r} has {name!r} of shape {tuple(matrix.shape)}, the pruned model "
                f"{tuple(shape)}: it is another model; give the one that was pruned"
            )
        self.used += 1
        return matrix


def _core(name: str) -> str:
    """A name from its first number on with what stands before it, without the attributes that wrap a model.

    >>> _core("model.model.layers.0.q_proj.weight"), _core("model.layers.0.q_proj.weight")
    ('layers.0.q_proj.weight', 'layers.0.q_proj.weight')
    """
    parts = clean_name(name).split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[max(0, first - 1) :]) if first < len(parts) else name.removeprefix("model.")


_MODEL_FILES = (".metadata", "*.safetensors", "*.bin", "*.index.json")
_RUN_FILES = ("hparams.yaml", "metrics.csv", "config.yaml", HISTORY_FILE)
_LARGEST = 64 << 20  # of the small files beside a model, and of results; bytes


@dataclass
class Source:
    """A model, and what was found around it.

    Attributes:
        path: What was asked for.
        checkpoint: The model, opened.
        run: Folder of the run, or None.
        history: What `SparsityMonitor` wrote.
        metrics: Curves of ``metrics.csv``: step and value, by name.
        hparams: ``hparams.yaml``.
        config: ``config.yaml`` of the command line.
        sparsity: ``sparsity.json`` of `export`.
        notes: What could not be read, in sentences.
    """

    path: Path
    checkpoint: Checkpoint
    run: Path | None = None
    history: SparsityHistory = field(default_factory=SparsityHistory)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    sparsity: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def open_source(path: str | Path) -> Source:
    """Find the model of a path, and the run that it came from.

    Args:
        path: A run's folder (``hparams.yaml``, ``metrics.csv``, ``checkpoints/``; the newest checkpoint is taken,
            ``last.ckpt`` first; a ``ModelCheckpoint`` with a folder of its own is followed there if `SparsityMonitor`
            or the command line's ``config.yaml`` names it), or whatever `open_checkpoint` opens. Of a checkpoint
            inside a run's folder the run is found too.

    Raises:
        CheckpointError: the path does not exist, holds no model, or one that cannot be read.
    """
    path = expanded(path, "path")
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in _MODEL_FILES):
        source = Source(path, open_checkpoint(_newest_checkpoint(path)), run=_run_of(path))
    else:
        source = Source(path, open_checkpoint(path), run=_run_of(path.resolve().parent))
        if path.is_dir():
            source.sparsity = _read(source, path / "sparsity.json", _json)
    if source.run is not None:
        run = source.run
        source.hparams = _read(source, run / "hparams.yaml", _yaml)
        source.config = _read(source, run / "config.yaml", _yaml)
        source.metrics = _read(source, run / "metrics.csv", _curves)
        history = _read(source, run / HISTORY_FILE, lambda file: {"": read_history(file)})
        source.history = history.get("", source.history)
    return source


def _newest_checkpoint(folder: Path) -> Path:
    places = (folder / "checkpoints", folder)
    found = [c for place in places for c in place.glob("*.ckpt")]
    found = found or [c for place in _named_folders(folder) for c in place.glob("*.ckpt")]
    if found:
        last = [c for c in found if c.stem.startswith("last")]
        return max(last or found, key=lambda c: c.stat().st_mtime)
    runs = list(dict.fromkeys(checkpoint.parent.parent for checkpoint in checkpoints_of_runs(folder)))
    others = f", the newest of {len(runs)} runs in it" if len(runs) > 1 else ""
    hint = f"; did you mean {str(runs[0])!r}{others}?" if runs else ""
    raise CheckpointError(
        f"path={str(folder)!r} holds no model and no checkpoints/*.ckpt{hint or '; give a folder or file of a model'}"
    )


def _named_folders(run: Path) -> list[Path]:
    """Folders of a run's own that its checkpoints were told to go to, as its files say."""
    found: list[Any] = []
    if (run / HISTORY_FILE).is_file():
        told = read_history(run / HISTORY_FILE).run.get("checkpoints")
        found += told if isinstance(told, list) else []
    with suppress(OSError, ValueError, yaml.YAMLError, RecursionError):
        callbacks = nested(_yaml(run / "config.yaml"), "trainer", "callbacks")
        found += [nested(c, "init_args", "dirpath") for c in (callbacks if isinstance(callbacks, list) else ())]
    return [Path(folder) for folder in found if isinstance(folder, str)]


def _run_of(folder: Path) -> Path | None:
    """The run of a folder of checkpoints, which may be the run's own."""
    places = [folder.parent] if folder.name == "checkpoints" else [folder]
    return next((p for p in places if any((p / name).is_file() for name in _RUN_FILES)), None)


def _read(source: Source, file: Path, load: Any) -> dict[str, Any]:
    """A small file as a mapping; empty where it is missing, and with a note where it cannot be read."""
    if not file.is_file():
        return {}
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it has {file.stat().st_size:,} bytes")
        loaded = load(file)
    except (OSError, ValueError, yaml.YAMLError, csv.Error, RecursionError) as error:
        source.notes.append(f"{file.name} was left out: {first_line(error)}")
        return {}
    return loaded if isinstance(loaded, dict) else {}


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
    """Lightning writes tags of Python types (tuples, classes): their plain content is read, and nothing is built."""

    def plain(self, suffix: str, node: Any) -> Any:
        if isinstance(node, yaml.MappingNode):
            return {"type": suffix, **self.construct_mapping(node, deep=True)}
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_scalar(node) or suffix


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _PlainLoader.plain)


def _yaml(file: Path) -> Any:
    return yaml.load(file.read_text(encoding="utf-8"), Loader=_PlainLoader)


def _json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _curves(file: Path) -> dict[str, list[tuple[int, float]]]:
    curves: dict[str, list[tuple[int, float]]] = {}
    with file.open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            step = _source_number(row.get("step"))
            for name, text in row.items():
                value = _source_number(text)
                if isinstance(name, str) and value is not None and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((number if step is None else int(step), value))
    return curves


def _source_number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def nested(mapping: Mapping[str, Any], *keys: str) -> Any:
    """A value inside mappings, or None."""
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


# Keys that name a row, in the order they are shown in; those behind "name" say more about it.
_LABELS = ("name", "model", "row", "role", "implementation", "method", "score", "zeros", "pattern", "text", "source")
_MOST_ROWS = 60


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


def read_results(path: str | Path) -> Results:
    """Read a file.

    Raises:
        ResultsError: it is missing, no JSON, or holds no numbers.
    """
    path = expanded(path, "results")
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"results={str(path)!r} cannot be read: {first_line(error)}; give JSON files") from error
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
