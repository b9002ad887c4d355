"""What a report can be made of: a run's folder, or a model by itself; found, and read as plain values."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_prune.checkpoints import Checkpoint, CheckpointError, open_checkpoint
from lightning_prune.sparsity_history import HISTORY_FILE, SparsityHistory, read_history

_MODEL_FILES = (".metadata", "*.safetensors", "*.bin", "*.index.json")
_RUN_FILES = ("hparams.yaml", "metrics.csv", "config.yaml", HISTORY_FILE)
_LARGEST = 64 << 20  # of the small files beside a model, bytes


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
            ``last.ckpt`` first), or whatever `open_checkpoint` opens. Of a checkpoint inside a run's folder the run
            is found too.

    Raises:
        CheckpointError: the path does not exist, holds no model, or one that cannot be read.
    """
    path = Path(path)
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in _MODEL_FILES):
        source = Source(path, open_checkpoint(_newest_checkpoint(path)), run=path)
    else:
        source = Source(path, open_checkpoint(path), run=_run_around(path))
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
    found = [c for place in (folder / "checkpoints", folder) for c in place.glob("*.ckpt")]
    if found:
        last = [c for c in found if c.stem.startswith("last")]
        return max(last or found, key=lambda c: c.stat().st_mtime)
    inside = [p.parent for name in _RUN_FILES for p in folder.glob(f"**/{name}")] if folder.is_dir() else []
    inside = [p for p in dict.fromkeys(inside) if any((p / "checkpoints").glob("*.ckpt"))]
    hint = f"; did you mean {str(max(inside, key=lambda p: p.stat().st_mtime))!r}?" if inside else ""
    raise CheckpointError(
        f"path={str(folder)!r} holds no model and no checkpoints/*.ckpt{hint or '; give a folder or file of a model'}"
    )


def _run_around(path: Path) -> Path | None:
    """The run of a checkpoint: the folder of its ``checkpoints``, or its own."""
    folder = path.resolve().parent
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
        reason = (str(error) or type(error).__name__).splitlines()[0]
        source.notes.append(f"{file.name} was left out: {reason}")
        return {}
    return loaded if isinstance(loaded, dict) else {}


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
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
            step = _number(row.get("step"))
            for name, text in row.items():
                value = _number(text)
                if isinstance(name, str) and value is not None and name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((number if step is None else int(step), value))
    return curves


def _number(text: Any) -> float | None:
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
